//! Rows of numbers on disk: what the frozen part of a network gives for each token, computed once and read many times.

use std::path::Path;

use crate::base::{AtomicFile, Error, MappedFile, Result};

/// Bytes of one f32.
const ELEMENT: u64 = 4;

/// A mapped file of f32 rows, little-endian, one row per token and nothing else.
#[derive(Debug)]
pub struct Rows {
    file: MappedFile,
    width: usize,
}

impl Rows {
    /// Opens `rows` rows of `width` numbers.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when the file holds another number of bytes.
    pub fn open(path: &Path, rows: u64, width: usize) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let want = rows.checked_mul(width as u64).and_then(|count| count.checked_mul(ELEMENT));
        if want != Some(file.len() as u64) {
            let problem = format!("holds {} bytes, {rows} rows of {width} f32 numbers take another amount", file.len());
            return Err(Error::invalid(format!("cache `{}`", path.display()), problem)
                .remedy("remove the file; it is computed again"));
        }
        Ok(Rows { file, width })
    }

    /// Numbers per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The bytes of `count` rows from row `start` on; shorter where the file ends.
    pub fn bytes(&self, start: u64, count: usize) -> &[u8] {
        let stride = self.width * ELEMENT as usize;
        let from = (start as usize).saturating_mul(stride).min(self.file.len());
        let to = from.saturating_add(count.saturating_mul(stride)).min(self.file.len());
        &self.file[from..to]
    }

    /// The numbers of `count` rows from row `start` on.
    pub fn numbers(&self, start: u64, count: usize) -> Vec<f32> {
        let (chunks, _) = self.bytes(start, count).as_chunks::<4>();
        chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }
}

/// Writes rows one after the other; the file appears when complete.
pub struct RowsWriter {
    file: AtomicFile,
    width: usize,
    buffer: Vec<u8>,
    rows: u64,
}

impl RowsWriter {
    /// Errors: `Error::Io` when the file cannot be made.
    pub fn create(path: &Path, width: usize) -> Result<Self> {
        Ok(RowsWriter { file: AtomicFile::create(path)?, width, buffer: Vec::new(), rows: 0 })
    }

    /// Appends whole rows.
    ///
    /// Errors: `Error::Invalid` when `numbers` is no whole number of rows; `Error::Io`.
    pub fn push(&mut self, numbers: &[f32]) -> Result<()> {
        if self.width == 0 || !numbers.len().is_multiple_of(self.width) {
            let problem = format!("got {} numbers, no whole number of rows of {}", numbers.len(), self.width);
            return Err(Error::invalid("cache of hidden states", problem));
        }
        self.buffer.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self.rows += (numbers.len() / self.width) as u64;
        if self.buffer.len() >= 1 << 20 {
            self.flush()?;
        }
        Ok(())
    }

    /// Completes the file and tells the number of rows. Errors: `Error::Io`.
    pub fn finish(mut self) -> Result<u64> {
        self.flush()?;
        self.file.commit()?;
        Ok(self.rows)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let mut writer = RowsWriter::create(&path, 3).unwrap();
        writer.push(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        writer.push(&[-0.0, f32::MIN_POSITIVE, 9.0]).unwrap();
        assert!(writer.push(&[1.0]).is_err());
        assert!(!path.exists());
        assert_eq!(writer.finish().unwrap(), 3);
        let rows = Rows::open(&path, 3, 3).unwrap();
        assert_eq!(rows.numbers(1, 2), [4.0, 5.0, 6.0, -0.0, f32::MIN_POSITIVE, 9.0]);
        assert_eq!(rows.numbers(2, 5).len(), 3);
        assert!(Rows::open(&path, 4, 3).is_err());
    }
}
