//! Access of the training loop to the dense model.

use std::collections::BTreeMap;

use crate::base::Result;

/// Source of the dense model's residual stream. Rows are computed on request and not kept.
pub trait DenseStream: Sync {
    /// True when the stream behind `layer`, counted from the first trained one, is computed for a fit alone. Otherwise it is
    /// among the stored rows, because a loss term reads it.
    fn computes(&self, layer: usize) -> bool;

    /// Rows of the stream behind `layers`, which are counted from the first trained layer. The result has one map per
    /// layer, from each of `samples` to its rows `[tokens, hidden]` in bf16, little-endian.
    ///
    /// Errors: those of a run of the dense model.
    fn rows_behind(&self, layers: &[usize], samples: &[usize]) -> Result<Vec<BTreeMap<usize, Vec<u8>>>>;
}
