//! Memory that a session's weights point into.

use crate::ir::TensorData;

/// What a session's weights point into; held as long as the session.
#[allow(dead_code, reason = "the runtime reads it through pointers; the fields keep it alive")]
pub(super) enum Backing {
    /// The tensor's own memory or map.
    Shared(TensorData),
    /// A copy in words, where the original does not lie at a multiple of its element size.
    Aligned(Vec<u64>),
}
