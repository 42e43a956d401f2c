//! Samples of a draw by a budget of tokens.

use std::collections::BTreeMap;

use crate::base::{Cancel, Result};

use super::{Dataset, Encoder};

/// Samples that are read together when their tokens are counted.
const COUNTED_TOGETHER: usize = 64;

/// The first samples of `drawn`, in that order, up to the one that reaches a budget of tokens, each with its number of
/// tokens; all where they have fewer. Samples that cannot be read, or that have more than `max_tokens`, have 0.
///
/// A data set is read in the order of its files, in which rows of one kind are often neighbours: to stop reading where the
/// budget is used up would take the first of these.
///
/// Errors: as `Dataset::read`; `Error::Interrupted` on Ctrl-C.
pub fn within_tokens(
    (dataset, encoder): (&Dataset, &Encoder),
    drawn: &[usize],
    budget: u64,
    max_tokens: u64,
    cancel: &Cancel,
) -> Result<Vec<(usize, u64)>> {
    let mut total = 0;
    let mut taken = Vec::new();
    for chunk in drawn.chunks(COUNTED_TOGETHER) {
        let mut lengths = BTreeMap::new();
        for sample in dataset.read(chunk)? {
            cancel.check("nothing is written")?;
            // What cannot be read is left out and counted by whoever reads the samples.
            let Ok(sample) = sample else { continue };
            let Ok(encoded) = encoder.conversation(&sample) else { continue };
            lengths.insert(sample.index, encoded.len() as u64);
        }
        for &index in chunk {
            if total >= budget {
                return Ok(taken);
            }
            let length = lengths.get(&index).copied().filter(|&length| length <= max_tokens).unwrap_or(0);
            total += length;
            taken.push((index, length));
        }
    }
    Ok(taken)
}
