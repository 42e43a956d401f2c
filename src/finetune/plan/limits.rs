//! Limits on a run's use of the machine. They change no result.

use crate::base::{Error, Result};
use crate::torch::Hold;

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
    /// How frozen weights of 16 bits or less are held. `None`: in f32 where that adds little.
    pub frozen: Option<Hold>,
}

/// The environment variable of [`Limits::frozen`].
const FROZEN: &str = "INTERLACE_FROZEN";

impl Limits {
    /// How frozen weights are held by `value`, the environment variable INTERLACE_FROZEN; `None` where it is not set.
    ///
    /// Errors: `Error::Invalid` for another value than `file` and `f32`.
    pub fn frozen_from(value: Option<&str>) -> Result<Option<Hold>> {
        match value {
            None | Some("") => Ok(None),
            Some("file") => Ok(Some(Hold::Stored)),
            Some("f32") => Ok(Some(Hold::Widened)),
            Some(other) => Err(Error::invalid(FROZEN, format!("is `{other}`")).remedy(
                "set it to `file` or `f32`, or leave it out: weights are held in f32 where that adds less than 256 MB",
            )),
        }
    }

    /// These limits with how the environment says that frozen weights are held.
    ///
    /// Errors: as [`Limits::frozen_from`].
    pub fn with_environment(self) -> Result<Self> {
        let value = std::env::var(FROZEN).ok();
        Ok(Limits { frozen: Self::frozen_from(value.as_deref())?, ..self })
    }
}
