//! What every verb is given, and how it ends.

use crate::base::Cancel;

use super::output::Output;

/// Input of every verb besides its arguments.
pub struct Context {
    /// Form of the printed results.
    pub output: Output,
    /// Set by Ctrl-C.
    pub cancel: Cancel,
}

/// How a verb ended that met no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran, and every gate and check held.
    Done,
    /// A check or a gate did not hold; the verb has printed which.
    GateFailed,
}
