//! Finds the byte ranges of the rows of a JSON file in one pass. Only one row is in memory at a time.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

use crate::base::{Error, Result};

/// Maximum length of a row in bytes.
const MAX_ROW_BYTES: usize = 64 << 20;
/// Optional first bytes of a file in UTF-8.
const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// Calls `take` with the byte range and the bytes of each row. Rows are the elements of a list, or the lines that are
/// not blank.
///
/// Errors: `Error::Io`; `Error::Invalid` for a list that does not end, text after the list, or a row of more than 64
/// MiB; the errors of `take`.
pub(super) fn scan(path: &Path, mut take: impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut scanner = Scanner { path, place: 0, begin: 0, row: Vec::new(), form: Form::Unknown, after_comma: false };
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

/// Form of the file, and state of the scan.
enum Form {
    /// Only white space so far.
    Unknown,
    Lines,
    /// `depth` is the number of open brackets inside the list. `string` is true inside a string, `escaped` after a
    /// backslash.
    List {
        depth: usize,
        string: bool,
        escaped: bool,
    },
    /// After the end of the list.
    Ended,
}

struct Scanner<'a> {
    path: &'a Path,
    /// Offset of the next byte.
    place: u64,
    /// Offset of the first byte of `row`.
    begin: u64,
    /// Bytes of the current row, from its first one that is not white space.
    row: Vec<u8>,
    form: Form,
    /// True after a comma of the list, until the next element begins.
    after_comma: bool,
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
            Form::Unknown if BYTE_ORDER_MARK.get(place as usize) == Some(&byte) => {}
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
                            return self.end_element(self.after_comma, take);
                        }
                        b']' | b'}' => *depth = depth.saturating_sub(1),
                        b',' if *depth == 0 => {
                            self.end_element(true, take)?;
                            self.after_comma = true;
                            return Ok(());
                        }
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
            (self.begin, self.after_comma) = (place, false);
        }
        if self.row.len() == MAX_ROW_BYTES {
            return Err(self.error(&format!("has a row of more than {MAX_ROW_BYTES} bytes")));
        }
        self.row.push(byte);
        Ok(())
    }

    /// Ends an element of the list, which must not be empty where one is `expected`.
    fn end_element(&mut self, expected: bool, take: &mut impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
        if expected && self.row.is_empty() {
            return Err(self.error("has an empty element in its list"));
        }
        self.give(take)
    }

    /// Passes the row on, without the white space at its end.
    fn give(&mut self, take: &mut impl FnMut(Range<u64>, &[u8]) -> Result<()>) -> Result<()> {
        if !self.row.is_empty() {
            self.row.truncate(self.row.trim_ascii_end().len());
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
            rows.push((place, String::from_utf8_lossy(bytes).to_string()));
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
        assert_eq!(texts("[{\"a\": 1} , {\"a\": 1}\n]"), ["{\"a\": 1}", "{\"a\": 1}"]);
        assert!(texts("[]").is_empty() && texts("").is_empty() && texts("[\n]").is_empty());
    }

    #[test]
    fn malformed_json_lists_are_refused() {
        let refused = [
            ("[{", "ends before its list"),
            ("[{}] x", "after the end"),
            ("[\"a", "ends before"),
            ("[{},,{}]", "an empty element"),
            ("[{}, ]", "an empty element"),
            ("[,{}]", "an empty element"),
        ];
        for (text, want) in refused {
            let error = rows(text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
