//! Byte ranges of the rows of a JSON file, found in one pass that holds one row at a time.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

use crate::base::{Error, Result};

/// The longest row.
const MAX_ROW_BYTES: usize = 64 << 20;

/// Hands each row and its place in the file to `take`: the elements of a list, or the lines that are not blank.
///
/// Errors: `Error::Io`; `Error::Invalid` for a list that does not end, or a row of more than 64 MiB; those of `take`.
pub(super) fn scan(path: &Path, mut take: impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut scanner = Scanner { path, place: 0, begin: 0, row: Vec::new(), form: Form::Unknown };
    loop {
        let bytes = reader.fill_buf().map_err(|e| Error::io("read", path, e))?;
        if bytes.is_empty() {
            break;
        }
        for &byte in bytes {
            scanner.step(byte, &mut take)?;
        }
        let length = bytes.len();
        reader.consume(length);
    }
    scanner.finish(&mut take)
}

/// What the file is, and where in it the scan is.
enum Form {
    /// Nothing but white space so far.
    Unknown,
    Lines,
    /// Depth of brackets below the list's own; in a string or not; after a backslash or not.
    List {
        depth: usize,
        string: bool,
        escaped: bool,
    },
    /// Behind the list.
    Ended,
}

struct Scanner<'a> {
    path: &'a Path,
    place: u64,
    begin: u64,
    row: Vec<u8>,
    form: Form,
}

impl Scanner<'_> {
    fn step(&mut self, byte: u8, take: &mut impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
        let place = self.place;
        self.place += 1;
        match &mut self.form {
            Form::Unknown if byte.is_ascii_whitespace() => {}
            Form::Unknown if byte == b'[' => {
                self.form = Form::List { depth: 0, string: false, escaped: false };
            }
            // A byte order mark.
            Form::Unknown if place < 3 && [0xef, 0xbb, 0xbf].contains(&byte) => {}
            Form::Unknown => {
                self.form = Form::Lines;
                self.push(byte, place)?;
            }
            Form::Lines if byte == b'\n' => self.give(take)?,
            Form::Lines => self.push(byte, place)?,
            Form::List { depth, string, escaped } => {
                if *string {
                    *string = *escaped || byte != b'"';
                    *escaped = !*escaped && byte == b'\\';
                } else {
                    match byte {
                        b'"' => *string = true,
                        b'[' | b'{' => *depth += 1,
                        b']' if *depth == 0 => {
                            self.form = Form::Ended;
                            return self.give(take);
                        }
                        b']' | b'}' => *depth = depth.saturating_sub(1),
                        b',' if *depth == 0 => return self.give(take),
                        _ => {}
                    }
                }
                self.push(byte, place)?;
            }
            Form::Ended if byte.is_ascii_whitespace() => {}
            Form::Ended => return Err(self.error("has text after the end of its list")),
        }
        Ok(())
    }

    fn push(&mut self, byte: u8, place: u64) -> Result<()> {
        if self.row.is_empty() {
            if byte.is_ascii_whitespace() {
                return Ok(());
            }
            self.begin = place;
        }
        if self.row.len() == MAX_ROW_BYTES {
            return Err(self.error(&format!("has a row of more than {MAX_ROW_BYTES} bytes")));
        }
        self.row.push(byte);
        Ok(())
    }

    fn give(&mut self, take: &mut impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
        if !self.row.is_empty() {
            take(self.begin..self.begin + self.row.len() as u64, &self.row)?;
            self.row.clear();
        }
        Ok(())
    }

    fn finish(mut self, take: &mut impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
        match self.form {
            Form::List { .. } => Err(self.error("does not decode: it ends before its list does")),
            _ => self.give(take),
        }
    }

    fn error(&self, problem: &str) -> Error {
        Error::invalid(format!("`{}`", self.path.display()), problem)
            .remedy("expected a list of objects, or one object per line")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Result<Vec<(Range<u64>, String)>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        std::fs::write(&path, text).unwrap();
        let mut rows = Vec::new();
        scan(&path, |place, bytes| {
            assert_eq!(&text.as_bytes()[place.start as usize..place.end as usize], bytes);
            rows.push((place, String::from_utf8_lossy(bytes).trim().to_string()));
            Ok(())
        })?;
        Ok(rows)
    }

    #[test]
    fn rows_of_json_lists_and_json_lines_are_found() {
        let texts = |text: &str| rows(text).unwrap().into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(
            texts(" [ {\"a\": \"],}\\\"[\"},\n {\"b\": [1, {\"c\": 2}]} ]\n"),
            ["{\"a\": \"],}\\\"[\"}", "{\"b\": [1, {\"c\": 2}]}"]
        );
        assert_eq!(texts("{\"a\": 1}\n\n  {\"b\": 2}\r\n{\"c\": 3}"), ["{\"a\": 1}", "{\"b\": 2}", "{\"c\": 3}"]);
        assert_eq!(texts("\u{feff}{\"a\": 1}\n"), ["{\"a\": 1}"]);
        assert!(texts("[]").is_empty() && texts("").is_empty() && texts("[\n]").is_empty());
    }

    #[test]
    fn malformed_json_lists_are_refused() {
        for (text, want) in [("[{", "ends before its list"), ("[{}] x", "after the end"), ("[\"a", "ends before")] {
            let error = rows(text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
