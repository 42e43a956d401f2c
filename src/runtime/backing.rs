//! Memory that holds the weights of a session.

use crate::ir::TensorData;

/// Memory of a session's weights. It must outlive the session's graph.
#[allow(dead_code, reason = "the runtime reads it through pointers; the fields keep it alive")]
pub(super) enum Backing {
    /// The tensor's own memory or map.
    Shared(TensorData),
    /// An aligned copy, when the original is not aligned to its element size.
    Aligned(Vec<u64>),
}
