//! Lists of strings in Python's or JSON's notation, as benchmarks have them in one cell.

/// The items of a list such as `['a', "b", 3]`, each as Python's `str` writes it; `None` for a text that is no list.
pub fn string_list(text: &str) -> Option<Vec<String>> {
    let inner = text.trim().strip_prefix('[')?.strip_suffix(']')?;
    let mut items = Vec::new();
    let mut rest = inner.trim_start();
    while !rest.is_empty() {
        let (item, after) = match rest.chars().next()? {
            quote @ ('\'' | '"') => quoted(&rest[1..], quote)?,
            _ => plain(rest)?,
        };
        items.push(item);
        rest = after.trim_start();
        if rest.is_empty() {
            break;
        }
        rest = rest.strip_prefix(',')?.trim_start();
    }
    Some(items)
}

/// A number or name up to the next comma.
fn plain(text: &str) -> Option<(String, &str)> {
    let end = text.find(',').unwrap_or(text.len());
    let (item, after) = text.split_at(end);
    let item = item.trim();
    let item = match item {
        "null" => "None",
        "true" => "True",
        "false" => "False",
        other => other,
    };
    let is_name = ["None", "True", "False"].contains(&item) || item.parse::<f64>().is_ok();
    is_name.then(|| (item.to_string(), after))
}

/// What is between the opening quote, which is behind us, and the next one like it.
fn quoted(text: &str, quote: char) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((place, char)) = chars.next() {
        match char {
            _ if char == quote => return Some((out, &text[place + char.len_utf8()..])),
            '\\' => {
                let (at, escaped) = chars.next()?;
                let hex = |digits: usize| -> Option<char> {
                    let start = at + 1;
                    char::from_u32(u32::from_str_radix(text.get(start..start + digits)?, 16).ok()?)
                };
                let digits = match escaped {
                    'x' => 2,
                    'u' => 4,
                    _ => 0,
                };
                match escaped {
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    '\\' | '\'' | '"' | '/' => out.push(escaped),
                    'x' | 'u' => out.push(hex(digits)?),
                    // Python keeps the backslash of an escape that it does not know.
                    other => out.extend(['\\', other]),
                }
                for _ in 0..digits {
                    chars.next();
                }
            }
            _ => out.push(char),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_python_reads_them() {
        let cases: [(&str, &[&str]); 9] = [
            ("['a', 'b']", &["a", "b"]),
            (r#"["a, b", "it's"]"#, &["a, b", "it's"]),
            (r"['it\'s', 'x\ny', '\u00e9\x41']", &["it's", "x\ny", "éA"]),
            (r"['\pi']", &[r"\pi"]),
            ("[1, 2.5, None]", &["1", "2.5", "None"]),
            ("[]", &[]),
            (" [ 'a' , ] ", &["a"]),
            ("['']", &[""]),
            ("['[a]']", &["[a]"]),
        ];
        for (text, want) in cases {
            assert_eq!(
                string_list(text).as_deref(),
                Some(want.iter().map(|s| s.to_string()).collect::<Vec<_>>().as_slice()),
                "{text}"
            );
        }
        for text in ["a", "['a'", "[a b]", "['a' 'b']", "['a", "[\\", "['\\u12']", "", "[x]"] {
            assert_eq!(string_list(text), None, "{text}");
        }
    }
}
