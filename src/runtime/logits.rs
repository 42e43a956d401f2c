//! Logits of the last position, from a decoder's output, and their maximum.

use crate::base::{Error, Result};

use super::tensor::TensorValue;

/// Logits of the last position of every row, `[B, V]`.
pub(super) fn last_logits(logits: &TensorValue, batch: usize) -> Result<Vec<f32>> {
    let shape = logits.shape();
    let [rows, time, vocabulary] = shape[..] else {
        return Err(Error::invalid("logits", format!("have shape {shape:?}, expected [batch, positions, vocabulary]")));
    };
    if rows != batch || time == 0 || vocabulary == 0 {
        return Err(Error::invalid("logits", format!("have shape {shape:?} for a batch of {batch}")));
    }
    let data = logits.to_f32()?;
    let last = data.chunks_exact(time * vocabulary).flat_map(|row| &row[(time - 1) * vocabulary..]);
    Ok(last.copied().collect())
}

/// The most probable token of each row at its last position; the first one on ties.
///
/// Errors: `Error::Invalid` unless `logits` has shape `[batch, T, V]` and is not empty.
pub fn argmax_last(logits: &TensorValue, batch: usize) -> Result<Vec<i64>> {
    let last = last_logits(logits, batch)?;
    let vocabulary = last.len() / batch.max(1);
    last.chunks_exact(vocabulary.max(1))
        .map(|row| {
            let mut best = 0;
            for (token, &value) in row.iter().enumerate() {
                if value.is_nan() {
                    return Err(Error::invalid("logits", "contain a value that is not a number"));
                }
                if value > row[best] {
                    best = token;
                }
            }
            Ok(best as i64)
        })
        .collect()
}
