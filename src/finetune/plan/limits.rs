//! What a run may take of the machine; it decides no result.

/// What a run may take of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the training device's memory; passes are made smaller until they fit.
    pub memory: Option<u64>,
    /// Tokens of one forward pass, padding included, longer samples aside.
    pub batch_tokens: Option<u64>,
    /// Bytes of disk for rows of the frozen layers and of the dense model that are read again; None for a fifth of what is
    /// free, at most 32 GB. Rows without room are computed each time that they are needed.
    pub cache: Option<u64>,
    /// Networks that work side by side on a processor; None for one per core, and one on all cores for large models.
    pub workers: Option<u64>,
}
