//! The index of a source's rows, built before the rows are read.

use sha2::{Digest, Sha256};

use crate::base::{Error, Result};

/// Entry of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    /// Position in the source.
    pub row: u32,
    /// Number of question and answer pairs; 1 for a row that cannot be read.
    pub turns: u32,
    /// Digest of the row's content without pictures: id, speakers and texts of a Parquet row, the bytes of a JSON row,
    /// the tokens of a sequence, the ids, labels and mask of a row of ready tensors (its embeddings without ids and
    /// labels).
    pub key: u64,
}

impl Listed {
    /// Errors: `Error::Invalid` when `row` or `turns` exceeds `u32::MAX`.
    pub fn new(subject: &str, row: usize, turns: usize, key: u64) -> Result<Self> {
        let narrow = |value: usize| {
            u32::try_from(value).map_err(|_| {
                Error::invalid(subject, format!("has more than {} rows", u32::MAX)).remedy("split the file")
            })
        };
        Ok(Listed { row: narrow(row)?, turns: narrow(turns)?, key })
    }
}

/// The first 64 bits of the SHA-256 of the texts, each after its length. Depends on their order.
pub(super) fn content_key<T: AsRef<[u8]>>(texts: &[T]) -> u64 {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update((text.as_ref().len() as u64).to_le_bytes());
        hasher.update(text);
    }
    let digest = hasher.finalize();
    digest.iter().take(8).fold(0, |key, byte| (key << 8) | u64::from(*byte))
}
