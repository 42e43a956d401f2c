//! Formatting of sizes, lists and names in messages.

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
