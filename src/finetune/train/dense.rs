//! Access of the training loop to the dense model.

use std::collections::BTreeMap;

use crate::base::Result;

/// Source of the dense model's residual stream. Rows are computed on request and not kept.
pub trait DenseStream: Sync {
    /// Rows of the stream behind `layers`, which are counted from the first trained layer. The result has one map per
    /// layer, from each of `samples` to its rows `[tokens, hidden]` in bf16, little-endian.
    ///
    /// Errors: those of a run of the dense model.
    fn rows_behind(&self, layers: &[usize], samples: &[usize]) -> Result<Vec<BTreeMap<usize, Vec<u8>>>>;
}
