//! Formatting of sizes, lists, names and tables in messages.

use std::borrow::Cow;

/// Units of sizes in arguments, in bytes, those first of which another is the end.
pub const BYTE_UNITS: &[(&str, f64)] = &[
    ("KiB", 1024.0),
    ("MiB", 1024.0 * 1024.0),
    ("GiB", 1024.0 * 1024.0 * 1024.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
];

/// `1.38 MB`, `912 B`: decimal units, three significant digits.
pub fn human_bytes(bytes: u64) -> String {
    scaled(bytes, &["B", "kB", "MB", "GB", "TB"])
}

/// `4.20 M`, `640`: decimal units, three significant digits.
pub fn human_count(count: u64) -> String {
    scaled(count, &["", "k", "M", "G", "T"]).trim_end().to_string()
}

fn scaled(value: u64, units: &[&str]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 999.5 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let digits = match (unit, scaled) {
        (0, _) => 0,
        (_, v) if v < 9.995 => 2,
        (_, v) if v < 99.95 => 1,
        _ => 0,
    };
    format!("{scaled:.digits$} {}", units[unit])
}

/// The first `shown` items joined by commas, with a count of the rest; "nothing" for an empty list.
pub fn list_preview<T: std::fmt::Display>(items: &[T], shown: usize) -> String {
    if items.is_empty() {
        return "nothing".to_string();
    }
    let mut text = items.iter().take(shown).map(|item| format!("`{item}`")).collect::<Vec<_>>().join(", ");
    if items.len() > shown {
        text.push_str(&format!(" and {} more", items.len() - shown));
    }
    text
}

/// The first 60 characters of a cell or a name from a data set, followed by `..` where it is longer.
pub fn shortened(text: &str) -> String {
    const SHOWN: usize = 60;
    if text.chars().nth(SHOWN).is_none() {
        return text.to_string();
    }
    let start: String = text.chars().take(SHOWN).collect();
    format!("{start}..")
}

/// A parser's message without the middle of a long value that it quotes.
pub fn clipped(message: &str) -> String {
    const SHOWN: usize = 90;
    let count = message.chars().count();
    if count <= 2 * SHOWN {
        return message.to_string();
    }
    let start: String = message.chars().take(SHOWN).collect();
    let end: String = message.chars().skip(count - SHOWN).collect();
    format!("{start}..{end}")
}

/// The first `shown` findings, each a sentence of its own, joined by semicolons, with a count of the rest.
pub fn findings_preview(findings: &[String], shown: usize) -> String {
    let mut text = findings.iter().take(shown).cloned().collect::<Vec<_>>().join("; ");
    if findings.len() > shown {
        text.push_str(&format!("; and {} more", findings.len() - shown));
    }
    text
}

/// The text with escapes (`\u{202e}`) in place of characters that change how a terminal shows the rest: control characters
/// other than tab and line feed, and marks that turn the direction of text. Sequences that set colours stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| (c.is_control() && c != '\t' && c != '\n') || turns_direction(c);
    if !text.contains(hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = colour(rest).unwrap_or(c.len_utf8());
        let (here, behind) = rest.split_at(length);
        match here {
            here if length == c.len_utf8() && hidden(c) => shown.extend(here.chars().flat_map(char::escape_unicode)),
            here => shown.push_str(here),
        }
        rest = behind;
    }
    Cow::Owned(shown)
}

/// JSON with the same meaning, in which characters of strings that [`printable`] escapes have JSON's own escapes.
pub fn printable_json(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| (c.is_control() && c != '\n') || turns_direction(c);
    if !text.contains(hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            // All of them are of 16 bits.
            c if hidden(c) => shown.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// True for the marks that turn the direction of the text around them (Unicode's Bidi_Control).
pub fn turns_direction(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Bytes of the sequence that sets a colour at the start of a text.
fn colour(text: &str) -> Option<usize> {
    let inside = text.strip_prefix("\u{1b}[")?;
    let end = inside.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    inside[end..].starts_with('m').then_some(end + 3)
}

/// A table whose first row is the header; columns after the first are right-aligned.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = widths.iter().enumerate().map(|(column, &width)| {
            let cell = row.get(column).map_or("", String::as_str);
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    if lines.len() > 1 {
        lines.insert(1, "-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_cells_and_messages_are_cut() {
        assert_eq!(shortened("ä.png"), "ä.png");
        assert_eq!(shortened(&"ä".repeat(60)), "ä".repeat(60));
        assert_eq!(shortened(&"ä".repeat(61)), format!("{}..", "ä".repeat(60)));
        assert_eq!(clipped("expected a list"), "expected a list");
        let long = clipped(&format!("invalid type: \"{}\", expected a list", "ä".repeat(5000)));
        assert!(long.starts_with("invalid type: \"ä") && long.ends_with("ä\", expected a list"), "{long}");
        assert_eq!(long.chars().count(), 182);
    }

    #[test]
    fn tables_align_numbers_to_the_right() {
        let rows = [["name", "loss"], ["dense", "9.5"], ["a longer one", "10.25"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.map(String::from).to_vec()).collect();
        let want = "name           loss\n-------------------\ndense           9.5\na longer one  10.25";
        assert_eq!(table(&rows), want);
    }

    #[test]
    fn names_cannot_change_how_a_terminal_shows_the_rest() {
        for (text, want) in [
            ("ä.png\t1\n", "ä.png\t1\n"),
            ("a\u{202e}gnp.exe", "a\\u{202e}gnp.exe"),
            ("\u{2066}x\u{2069}", "\\u{2066}x\\u{2069}"),
            ("a\u{200e}b\u{200f}c\u{61c}", "a\\u{200e}b\\u{200f}c\\u{61c}"),
            ("\u{1b}]0;title\u{7}", "\\u{1b}]0;title\\u{7}"),
            ("\u{1b}[2J\rok\u{9b}1m", "\\u{1b}[2J\\u{d}ok\\u{9b}1m"),
            ("\u{1b}[1;31mred\u{1b}[0m\u{1b}[", "\u{1b}[1;31mred\u{1b}[0m\\u{1b}["),
        ] {
            assert_eq!(printable(text), want);
        }
    }

    #[test]
    fn names_in_json_cannot_either_and_keep_their_value() {
        let name = "ä\u{202e}g\u{61c}\u{7f}\u{9b}\u{1b}.exe";
        let text = serde_json::to_string_pretty(&[name]).unwrap();
        let shown = printable_json(&text);
        assert_eq!(shown, "[\n  \"ä\\u202eg\\u061c\\u007f\\u009b\\u001b.exe\"\n]");
        assert_eq!(serde_json::from_str::<Vec<String>>(&shown).unwrap(), [name]);
    }

    #[test]
    fn units_are_decimal_with_three_digits() {
        let cases = [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_950, "1.00 MB"), (16_777_216, "16.8 MB")];
        for (bytes, want) in cases {
            assert_eq!(human_bytes(bytes), want);
        }
        assert_eq!(human_count(640), "640");
        assert_eq!(human_count(4_200_000), "4.20 M");
    }

    #[test]
    fn list_previews_count_the_omitted_items() {
        assert_eq!(list_preview(&["a", "b", "c"], 2), "`a`, `b` and 1 more");
        assert_eq!(list_preview::<&str>(&[], 2), "nothing");
    }
}
