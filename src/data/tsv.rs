//! Benchmarks in VLMEvalKit's TSV layout.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::base::{Error, Result, Sha256Digest, contained_path, folder_of, sha256_file, shortened};

use super::sample::ImageBytes;
use super::string_list::string_list;

/// An `image` cell of at most this many bytes is the index of the row that has the picture.
const MAX_REFERENCE_LENGTH: usize = 64;

/// Texts that `pandas.read_csv` reads as a missing value, besides the empty string.
const MISSING: &[&str] = &[
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
];

/// A benchmark: questions with pictures, or without any. The pictures are read from the file on demand.
#[derive(Debug)]
pub struct Benchmark {
    path: PathBuf,
    columns: Vec<String>,
    rows: Vec<BenchRow>,
    /// Number of rows that are left out because they have no picture.
    without_picture: usize,
}

/// One question. The content of the column `image` is not in memory.
#[derive(Clone, Debug)]
pub struct BenchRow {
    /// The `index` column.
    pub index: String,
    /// Position in the file of the row that has the picture: this row, or the row that it refers to.
    image_position: Option<csv::Position>,
    image_path: Option<String>,
    /// One cell per column; empty if the file has no value, and for the column `image`.
    cells: Vec<String>,
}

impl Benchmark {
    /// True for a file name that ends in `.tsv`.
    pub fn is_one(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension == "tsv")
    }

    /// Reads all columns except the pictures. Rows without a picture are left out, as in VLMEvalKit; in a file that has no column for
    /// pictures all questions are of text.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a missing column, a row with another number of cells, an index that
    /// occurs twice, a reference to a row without a picture, base64 in `image_path`, or columns for pictures without any.
    pub fn open(path: &Path) -> Result<Self> {
        let mut reader = reader(path)?;
        let subject = || format!("benchmark `{}`", path.display());
        let header = reader.headers().map_err(|e| unreadable(path, &e))?.clone();
        let columns: Vec<String> = header.iter().map(str::to_string).collect();
        let column = |name: &str| columns.iter().position(|column| column == name);
        let missing = |name: &str| {
            Error::invalid(subject(), format!("has no column `{name}`, only {}", columns.join(", ")))
                .remedy("expected VLMEvalKit's tab-separated layout: index, image, question, .., answer")
        };
        let index = column("index").ok_or_else(|| missing("index"))?;
        column("question").ok_or_else(|| missing("question"))?;
        let (image, image_path) = (column("image"), column("image_path"));
        let of_text = image.is_none() && image_path.is_none();
        let misnamed = |name: &String| ["image", "picture"].iter().any(|word| name.to_lowercase().contains(word));
        if of_text && columns.iter().any(misnamed) {
            return Err(missing("image"));
        }
        let mut rows: Vec<BenchRow> = Vec::new();
        let mut positions: HashMap<String, Option<csv::Position>> = HashMap::new();
        let mut references: Vec<Option<String>> = Vec::new();
        let mut record = csv::StringRecord::new();
        loop {
            let position = reader.position().clone();
            if !reader.read_record(&mut record).map_err(|e| unreadable(path, &e))? {
                break;
            }
            let cell = |column: usize| record.get(column).unwrap_or_default();
            let name = cell(index).to_string();
            let content = image.map(cell).filter(|cell| !MISSING.contains(cell)).unwrap_or_default();
            let holds = content.len() > MAX_REFERENCE_LENGTH;
            if positions.insert(name.clone(), holds.then(|| position.clone())).is_some() {
                return Err(Error::invalid(subject(), format!("index `{}` occurs twice", shortened(&name)))
                    .remedy("give each row an index of its own"));
            }
            if image_path.map(cell).is_some_and(is_base64) {
                return Err(Error::invalid(
                    subject(),
                    format!("the column `image_path` of row `{}` holds base64, expected a file name", shortened(&name)),
                )
                .remedy("call the column `image`"));
            }
            references.push((!holds && !content.is_empty()).then(|| content.to_string()));
            let keep = |column: usize| if Some(column) == image { String::new() } else { cell(column).to_string() };
            rows.push(BenchRow {
                index: name,
                image_position: holds.then_some(position),
                image_path: image_path
                    .map(cell)
                    .filter(|path| !path.is_empty() && !MISSING.contains(path))
                    .map(str::to_string),
                cells: (0..columns.len()).map(keep).collect(),
            });
        }
        if rows.is_empty() {
            return Err(Error::invalid(subject(), "is empty").remedy("give a benchmark with at least one question"));
        }
        for (row, reference) in rows.iter_mut().zip(references) {
            let Some(reference) = reference else { continue };
            let position = positions.get(&reference).cloned().flatten();
            row.image_position = Some(position.ok_or_else(|| {
                Error::invalid(
                    subject(),
                    format!("row `{}` takes its picture from row `{reference}`, which has none", shortened(&row.index)),
                )
                .remedy("point the row at a row that holds its picture in base64")
            })?);
        }
        let read = rows.len();
        rows.retain(|row| of_text || row.image_position.is_some() || row.image_path.is_some());
        if rows.is_empty() {
            return Err(Error::invalid(subject(), "has no question with a picture")
                .remedy("put pictures into the column `image` in base64, or their paths into `image_path`"));
        }
        let without_picture = read - rows.len();
        Ok(Benchmark { path: path.to_path_buf(), columns, rows, without_picture })
    }

    /// The questions, in file order.
    pub fn rows(&self) -> &[BenchRow] {
        &self.rows
    }

    /// Number of rows that are left out because they have no picture.
    pub fn rows_without_picture(&self) -> usize {
        self.without_picture
    }

    /// The names of all columns.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// A cell by column name, unchanged; `None` if the column does not exist or the cell is empty. The column `image`
    /// is always empty; see [`Benchmark::images`].
    pub fn cell<'a>(&self, row: &'a BenchRow, column: &str) -> Option<&'a str> {
        let column = self.columns.iter().position(|name| name == column)?;
        row.cells.get(column).map(String::as_str).filter(|cell| !cell.is_empty())
    }

    /// A cell by column name, as in VLMEvalKit: `None` also for text that pandas reads as a missing value.
    pub fn value<'a>(&self, row: &'a BenchRow, column: &str) -> Option<&'a str> {
        self.cell(row, column).filter(|text| !MISSING.contains(text))
    }

    /// The lettered choices of a row, in order. A choice that pandas reads as missing is left out, as in VLMEvalKit.
    pub fn options<'a>(&self, row: &'a BenchRow) -> Vec<(char, &'a str)> {
        let choice = |letter: char| self.value(row, letter.encode_utf8(&mut [0; 4]));
        ('A'..='Z').filter_map(|letter| Some((letter, choice(letter)?))).collect()
    }

    /// True when both rows have the same pictures.
    #[cfg(test)]
    pub fn same_images(&self, a: &BenchRow, b: &BenchRow) -> bool {
        let byte = |row: &BenchRow| row.image_position.as_ref().map(csv::Position::byte);
        byte(a) == byte(b) && a.image_path == b.image_path
    }

    /// The pictures of a row: base64 in `image` (one, or a list in Python's or JSON's notation), else the files in
    /// `image_path`, relative to the benchmark's folder.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` names the row when the content is not base64, or a path leads out of the
    /// folder.
    pub fn images(&self, row: &BenchRow) -> Result<Vec<ImageBytes>> {
        let subject = format!("row `{}` of `{}`", shortened(&row.index), self.path.display());
        if let Some(position) = &row.image_position {
            let mut reader = reader(&self.path)?;
            reader.seek(position.clone()).map_err(|e| unreadable(&self.path, &e))?;
            let mut record = csv::StringRecord::new();
            reader.read_record(&mut record).map_err(|e| unreadable(&self.path, &e))?;
            let column = self.columns.iter().position(|name| name == "image");
            let content = column.and_then(|column| record.get(column)).unwrap_or_default();
            let mut images = Vec::new();
            for (number, text) in listed(&subject, content)?.into_iter().enumerate() {
                let subject = format!("image {number} of {subject}");
                let text: String = text.chars().filter(|char| !char.is_ascii_whitespace() && *char != '\\').collect();
                let bytes = STANDARD.decode(text).map_err(|e| {
                    Error::invalid(&subject, format!("is not base64: {e}"))
                        .remedy("encode the bytes of the picture file in base64")
                })?;
                images.push(ImageBytes::held(subject, bytes));
            }
            return Ok(images);
        }
        let folder = folder_of(&self.path);
        let mut images = Vec::new();
        let names = row.image_path.as_deref().map(|names| listed(&subject, names)).transpose()?;
        for name in names.unwrap_or_default() {
            let picture = format!("image `{}` of {subject}", shortened(&name));
            let path = contained_path(folder, &name).map_err(|error| {
                Error::invalid(&picture, error.without_remedy().to_string())
                    .remedy("keep pictures in the folder of the benchmark and name them relative to it")
            })?;
            images.push(ImageBytes::file(picture, path));
        }
        Ok(images)
    }

    /// SHA-256 of the file.
    ///
    /// Errors: `Error::Io` when it cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        sha256_file(&self.path)
    }
}

/// True for a picture in base64 in place of a file name: long, and without the `.` of an extension.
fn is_base64(cell: &str) -> bool {
    cell.len() > MAX_REFERENCE_LENGTH
        && cell.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='))
}

/// Parses one item, `a`, or a list, `['a', 'b']` or `["a", "b"]`.
fn listed(subject: &str, content: &str) -> Result<Vec<String>> {
    let content = content.trim();
    if !(content.starts_with('[') && content.ends_with(']')) {
        return Ok(vec![content.to_string()]);
    }
    string_list(content).ok_or_else(|| {
        Error::invalid(subject, "has a list of pictures that does not decode").remedy("expected `['..', '..']`")
    })
}

fn reader(path: &Path) -> Result<csv::Reader<File>> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    Ok(csv::ReaderBuilder::new().delimiter(b'\t').from_reader(file))
}

fn unreadable(path: &Path, error: &csv::Error) -> Error {
    Error::invalid(format!("benchmark `{}`", path.display()), format!("does not decode: {error}"))
        .remedy("expected VLMEvalKit's tab-separated layout: index, image, question, .., answer")
}
