//! What a program reads and writes where, without its kernels.

use std::sync::Arc;

use super::operator::Operator;

/// Index of a value in a program. The top-level graph's values come first, in the order of their ids.
pub(super) type Slot = usize;

/// How often a body runs, and what it receives.
#[derive(Clone, Copy)]
pub(super) enum Repetition {
    /// A branch of `If`, without inputs.
    Once,
    /// `Loop`: the number of the turn, a condition, and values that return as outputs behind a new condition.
    Loop,
    /// `Scan`: values that return as the first outputs, then slices.
    Scan { slices: usize },
}

/// A body without its kernels.
pub(super) struct BodyWiring {
    pub repetition: Repetition,
    pub steps: Vec<StepWiring>,
    pub inputs: Vec<Slot>,
    pub outputs: Vec<Slot>,
    /// Initializers, which are on the host.
    pub constants: Vec<Slot>,
    /// Values of the scope outside, and their places among the node's inputs.
    pub captures: Vec<(Slot, usize)>,
}

/// A step of a body without its kernel.
pub(super) struct StepWiring {
    pub row: &'static Operator,
    pub inputs: Vec<Option<Slot>>,
    pub outputs: Vec<Option<Slot>>,
    /// Positions of inputs that the step, or a body of it, reads on the host.
    pub on_host: Vec<usize>,
    pub bodies: Vec<Arc<BodyWiring>>,
}
