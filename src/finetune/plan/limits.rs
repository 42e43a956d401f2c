//! Limits on a run's use of the machine. They change no result.

/// Largest number of tokens of one forward pass.
pub const MOST_BATCH_TOKENS: u64 = 1 << 24;

/// Limits on a run's use of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory of the training device, in bytes. Passes are reduced until they fit.
    pub memory: Option<u64>,
    /// Maximum number of tokens of one forward pass, padding included, at most [`MOST_BATCH_TOKENS`]. A longer sample forms a pass of its own.
    pub batch_tokens: Option<u64>,
    /// Maximum number of bytes on disk for rows of the frozen layers and of the dense model. `None`: a fifth of the
    /// free disk, at most 32 GB. Rows that exceed the limit are computed each time that they are needed.
    pub cache: Option<u64>,
    /// Number of networks that run in parallel on a CPU. `None`: one per core, or a single network on all cores for
    /// large models.
    pub workers: Option<u64>,
}
