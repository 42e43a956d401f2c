//! The input of every verb besides its arguments, and its outcome.

use crate::base::Cancel;

use super::output::Output;

/// Input of every verb besides its arguments.
pub struct Context {
    /// Form of the printed results.
    pub output: Output,
    /// Set by Ctrl-C.
    pub cancel: Cancel,
}

/// Outcome of a verb that ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every gate and check was satisfied.
    Done,
    /// A check failed or a gate was not satisfied; the verb has printed which one.
    GateFailed,
}
