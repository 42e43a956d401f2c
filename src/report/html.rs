//! Text and tables of the page. Names and answers are from strangers, so every text passes through [`escaped`].

use std::fmt::Write;

use crate::base::turns_direction;

use super::svg::CHART_STYLE;

/// Text for an element or an attribute in quotes. Characters that XML forbids become U+FFFD.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\t' | '\n' | '\r' => safe.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => safe.push('\u{fffd}'),
            c if turns_direction(c) => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// A paragraph.
pub fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escaped(text))
}

/// A table whose first row is the head and whose first column names the rows. It can be scrolled by keyboard where it is too wide.
pub fn table(caption: &str, rows: &[Vec<String>]) -> String {
    let mut text = format!(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\">\n<table>\n<caption>{0}</caption>\n",
        escaped(caption)
    );
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let cell = escaped(cell);
            match (number, column) {
                (0, _) => format!("<th scope=\"col\">{cell}</th>"),
                (_, 0) => format!("<th scope=\"row\">{cell}</th>"),
                _ => format!("<td>{cell}</td>"),
            }
        });
        let cells: String = cells.collect();
        let (open, close) = match number {
            0 => ("<thead>", "</thead>\n<tbody>"),
            _ => ("", ""),
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{open}<tr>{cells}</tr>{close}");
    }
    if rows.is_empty() {
        text.push_str("<tbody>");
    }
    text.push_str("</tbody>\n</table>\n</div>\n");
    text
}

/// A table that is folded up beside a chart.
pub fn folded_table(caption: &str, rows: &[Vec<String>]) -> String {
    format!("<details>\n<summary>{} as a table</summary>\n{}</details>\n", escaped(caption), table(caption, rows))
}

/// The whole page.
pub fn page(title: &str, contents: &[(&str, &str)], body: &str) -> String {
    let links: String =
        contents.iter().map(|(id, name)| format!("<li><a href=\"#{id}\">{}</a></li>", escaped(name))).collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\" />\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src &#39;none&#39;; style-src &#39;unsafe-inline&#39;; \
         img-src data:\" />\n\
         <title>{0}</title>\n<style>\n{1}{2}</style>\n</head>\n<body>\n<a class=\"skip\" href=\"#main\">Skip to the \
         report</a>\n<header>\n<h1>{0}</h1>\n<nav aria-label=\"Sections\"><ul>{links}</ul></nav>\n</header>\n\
         <main id=\"main\">\n{body}</main>\n</body>\n</html>\n",
        escaped(title),
        CHART_STYLE,
        include_str!("page.css"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_leaves_its_element() {
        let hostile = "</td><script>alert(\"x\")</script>' onload='y & \u{0}\u{1b}[31m\u{202e}\u{200f}";
        let safe = escaped(hostile);
        assert!(!safe.contains(['<', '>', '"', '\'', '\u{0}', '\u{1b}', '\u{202e}', '\u{200f}']), "{safe}");
        assert!(safe.starts_with("&lt;/td&gt;&lt;script&gt;alert(&quot;x&quot;)"), "{safe}");
        let cells = vec![vec!["a".to_string()], vec![hostile.to_string()]];
        assert!(table(hostile, &cells).matches("<script").count() == 0);
    }
}
