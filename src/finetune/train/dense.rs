//! What the training loop asks of the dense model.

use std::collections::BTreeMap;

use crate::base::Result;

/// The dense model's stream, made when it is asked for and kept nowhere.
pub trait DenseStream: Sync {
    /// For each of `samples` its rows behind each of `layers`, counted from the first trained one: bf16, little-endian.
    ///
    /// Errors: those of a run of the dense model.
    fn behind(&self, layers: &[usize], samples: &[usize]) -> Result<Vec<BTreeMap<usize, Vec<u8>>>>;
}
