//! Rows of numbers on disk: outputs of the frozen part and of the dense model, computed once and read many times.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::bf16;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::base::{AtomicFile, Error, Result};
use crate::finetune::settings::Precision;

/// Element type of stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowDtype {
    F32,
    /// Half the size, about three significant digits. For targets, which are only compared with, and for the stream that
    /// passes in bf16 begin with.
    Bf16,
}

impl RowDtype {
    /// The type in which passes of this precision read the residual stream. They round it to that type where they begin,
    /// so rows of that type give the same numbers as rows in f32.
    pub fn of_stream(precision: Precision) -> Self {
        match precision {
            Precision::F32 => RowDtype::F32,
            Precision::Bf16 => RowDtype::Bf16,
        }
    }

    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            RowDtype::F32 => 4,
            RowDtype::Bf16 => 2,
        }
    }

    /// LibTorch's element type.
    pub fn kind(self) -> Kind {
        match self {
            RowDtype::F32 => Kind::Float,
            RowDtype::Bf16 => Kind::BFloat16,
        }
    }

    /// Bytes of `numbers`, little-endian.
    pub fn bytes_of(self, numbers: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            RowDtype::F32 => append(&mut bytes, numbers, f32::to_le_bytes),
            RowDtype::Bf16 => append(&mut bytes, numbers, |number| bf16::from_f32(number).to_le_bytes()),
        }
        bytes
    }

    /// File name extension.
    pub fn extension(self) -> &'static str {
        match self {
            RowDtype::F32 => "f32",
            RowDtype::Bf16 => "bf16",
        }
    }
}

/// A file of rows, little-endian, one row per token, without a header. It is not memory-mapped, because pages of a
/// mapping that have been read count as memory of the process.
#[derive(Debug)]
pub struct RowsFile {
    path: PathBuf,
    file: File,
    rows: u64,
    width: usize,
    element: RowDtype,
}

impl RowsFile {
    /// Opens a file of `rows` rows of `width` numbers.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when the file has another size.
    pub fn open(path: &Path, rows: u64, width: usize, element: RowDtype) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let found = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        let stride = (width as u64).checked_mul(element.size() as u64);
        let want = stride.and_then(|stride| rows.checked_mul(stride));
        if want != Some(found) {
            let kind = element.extension();
            let problem = format!("holds {found} bytes, expected {rows} rows of {width} {kind} numbers");
            return Err(Error::invalid(format!("cache `{}`", path.display()), problem)
                .remedy("remove the file; it is computed again"));
        }
        Ok(RowsFile { path: path.to_path_buf(), file, rows, width, element })
    }

    /// Numbers per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Element type of the numbers.
    pub fn element(&self) -> RowDtype {
        self.element
    }

    /// Appends to `bytes` the bytes of `count` rows from row `start` on, or of fewer rows at the end of the file.
    ///
    /// Errors: `Error::Io`.
    pub fn read(&self, start: u64, count: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let stride = self.width * self.element.size();
        let start = start.min(self.rows);
        let count = (count as u64).min(self.rows - start) as usize;
        let before = bytes.len();
        bytes.resize(before + count * stride, 0);
        let at = start * stride as u64;
        self.file.read_exact_at(&mut bytes[before..], at).map_err(|e| Error::io("read", &self.path, e))
    }
}

/// Writes rows in order. The file appears under its name when it is complete.
pub struct RowsWriter {
    path: PathBuf,
    file: AtomicFile,
    /// Set by the first rows.
    width: Option<usize>,
    element: RowDtype,
    buffer: Vec<u8>,
    rows: u64,
}

impl RowsWriter {
    /// A writer for the file `path`.
    ///
    /// Errors: `Error::Io` when the file cannot be created.
    pub fn create(path: &Path, element: RowDtype) -> Result<Self> {
        let (path, file) = (path.to_path_buf(), AtomicFile::create(path)?);
        Ok(RowsWriter { path, file, width: None, element, buffer: Vec::new(), rows: 0 })
    }

    /// Appends `count` rows of the same width as the earlier ones.
    ///
    /// Errors: `Error::Invalid` when `numbers` are not `count` rows of that width; `Error::Io`.
    pub fn push(&mut self, numbers: &[f32], count: usize) -> Result<()> {
        let width = *self.width.get_or_insert(numbers.len() / count.max(1));
        if width == 0 || width.checked_mul(count) != Some(numbers.len()) {
            let problem = format!("got {} numbers, {count} rows of {width} were expected", numbers.len());
            return Err(Error::invalid(format!("cache `{}`", self.path.display()), problem));
        }
        self.buffer.extend(self.element.bytes_of(numbers));
        self.rows += count as u64;
        if self.buffer.len() >= 1 << 20 {
            self.flush()?;
        }
        Ok(())
    }

    /// Completes the file.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when no row was written.
    pub fn finish(mut self) -> Result<RowsFile> {
        let Some(width) = self.width else {
            return Err(Error::invalid(format!("cache `{}`", self.path.display()), "holds no row"));
        };
        self.flush()?;
        self.file.commit()?;
        RowsFile::open(&self.path, self.rows, width, self.element)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Appends the bytes of each number to `buffer`.
fn append<const N: usize>(buffer: &mut Vec<u8>, numbers: &[f32], bytes: impl Fn(f32) -> [u8; N]) {
    let before = buffer.len();
    buffer.resize(before + N * numbers.len(), 0);
    for (place, &number) in buffer[before..].chunks_exact_mut(N).zip(numbers) {
        place.copy_from_slice(&bytes(number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        for element in [RowDtype::F32, RowDtype::Bf16] {
            let path = folder.path().join(element.extension());
            let mut writer = RowsWriter::create(&path, element).unwrap();
            writer.push(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2).unwrap();
            writer.push(&[-0.0, 0.25, 9.0], 1).unwrap();
            let error = writer.push(&[1.0], 1).unwrap_err().to_string();
            assert!(error.contains("got 1 numbers, 1 rows of 3 were expected"), "{error}");
            assert!(!path.exists());
            let rows = writer.finish().unwrap();
            assert_eq!((rows.width(), rows.rows), (3, 3));
            let want: Vec<u8> = match element {
                RowDtype::F32 => [4.0f32, 5.0, 6.0, -0.0, 0.25, 9.0].iter().flat_map(|n| n.to_le_bytes()).collect(),
                RowDtype::Bf16 => {
                    [4.0f32, 5.0, 6.0, -0.0, 0.25, 9.0].iter().flat_map(|&n| bf16::from_f32(n).to_le_bytes()).collect()
                }
            };
            let read = |start, count| {
                let mut bytes = vec![7];
                rows.read(start, count, &mut bytes).unwrap();
                assert_eq!(bytes.remove(0), 7);
                bytes
            };
            assert_eq!(read(1, 2), want);
            assert_eq!(read(2, 5).len(), 3 * element.size());
            assert!(read(9, 1).is_empty());
            let error = RowsFile::open(&path, 4, 3, element).unwrap_err().to_string();
            let want = format!("holds {} bytes, expected 4 rows of 3 ", 9 * element.size());
            assert!(error.contains(&want), "{error}");
        }
    }
}
