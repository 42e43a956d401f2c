//! Parses lists of strings in Python's or JSON's notation, as in cells of benchmarks.

/// The items of a list such as `['a', "b", 3]`, each formatted like Python's `str`; `None` for text that is not a list.
pub fn string_list(text: &str) -> Option<Vec<String>> {
    let mut rest = text.trim().strip_prefix('[')?.strip_suffix(']')?.trim_start();
    let mut items = Vec::new();
    while !rest.is_empty() {
        let item;
        if rest.starts_with(['\'', '"']) {
            let mut value = String::new();
            // Adjacent strings are concatenated, as in Python.
            while rest.starts_with(['\'', '"']) {
                rest = parse_string(rest, &mut value)?.trim_start();
            }
            item = value;
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            item = plain(rest[..end].trim())?.to_string();
            rest = &rest[end..];
        }
        items.push(item);
        rest = match rest.strip_prefix(',') {
            Some(rest) => rest.trim_start(),
            None if rest.is_empty() => rest,
            None => return None,
        };
    }
    Some(items)
}

/// A number, or a constant of Python or JSON in Python's notation.
fn plain(item: &str) -> Option<&str> {
    match item {
        "null" | "None" => Some("None"),
        "true" | "True" => Some("True"),
        "false" | "False" => Some("False"),
        number => number.parse::<f64>().ok().map(|_| number),
    }
}

/// Appends a quoted string with Python's escapes to `value`. Returns the rest of the text.
fn parse_string<'a>(text: &'a str, value: &mut String) -> Option<&'a str> {
    let quote = text.chars().next()?;
    let mut rest = &text[quote.len_utf8()..];
    loop {
        let c = rest.chars().next()?;
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => rest = parse_escape(rest, value)?,
            '\n' => return None,
            c if c == quote => return Some(rest),
            c => value.push(c),
        }
    }
}

/// Appends the character of an escape sequence and returns the rest of the text.
fn parse_escape<'a>(text: &'a str, value: &mut String) -> Option<&'a str> {
    let c = text.chars().next()?;
    let rest = &text[c.len_utf8()..];
    let mut coded = |digits: &'a str, radix: u32| -> Option<()> {
        value.push(char::from_u32(u32::from_str_radix(digits, radix).ok()?)?);
        Some(())
    };
    let wide = match c {
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => 0,
    };
    if wide > 0 {
        coded(rest.get(..wide)?, 16)?;
        return rest.get(wide..);
    }
    if c.is_digit(8) {
        let length = text.chars().take(3).take_while(|c| c.is_digit(8)).count();
        coded(&text[..length], 8)?;
        return Some(&text[length..]);
    }
    match c {
        'n' => value.push('\n'),
        't' => value.push('\t'),
        'r' => value.push('\r'),
        'a' => value.push('\u{7}'),
        'b' => value.push('\u{8}'),
        'f' => value.push('\u{c}'),
        'v' => value.push('\u{b}'),
        '\n' => {}
        '\\' | '\'' | '"' => value.push(c),
        other => value.extend(['\\', other]),
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn string_lists_are_parsed_as_in_python() {
        let cases: [(&str, &[&str]); 10] = [
            ("['a', 'b']", &["a", "b"]),
            (r#"["a, b", "it's"]"#, &["a, b", "it's"]),
            (r"['it\'s', 'x\ny', '\u00e9\x41']", &["it's", "x\ny", "\u{e9}A"]),
            (r"['\pi']", &[r"\pi"]),
            ("[1, 2.5, None, true]", &["1", "2.5", "None", "True"]),
            ("[]", &[]),
            (" [ 'a' , ] ", &["a"]),
            ("['']", &[""]),
            ("['[a]']", &["[a]"]),
            ("['a' \"b\"]", &["ab"]),
        ];
        for (text, want) in cases {
            let want: Vec<String> = want.iter().map(|item| item.to_string()).collect();
            assert_eq!(string_list(text), Some(want), "{text}");
        }
        for text in ["a", "['a'", "[a b]", "['a", "[\\", r"['\u12']", "", "[x]", "['a' 3]"] {
            assert_eq!(string_list(text), None, "{text}");
        }
    }
}
