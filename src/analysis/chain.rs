//! The residual stream as a chain of values.

use std::collections::HashSet;

use crate::ir::ValueId;

/// Values in order from the source to the result, and the nodes between them.
#[derive(Clone, Debug)]
pub struct Chain {
    pub source: ValueId,
    pub result: ValueId,
    /// `values[0]` is the source, the last one the result.
    pub values: Vec<ValueId>,
    /// For each node of the body: the chain position that it follows, if it is on a path from source to result.
    pub level: Vec<Option<usize>>,
    /// For each node of the body: true when it reads the source or anything computed from it.
    pub reached: Vec<bool>,
    pub(super) stream: HashSet<ValueId>,
    /// True when the chain consists of the sums that carry the stream, and not of the values that every path passes.
    pub(super) by_sums: bool,
}

impl Chain {
    /// True for the values of the chain.
    pub fn is_stream(&self, value: ValueId) -> bool {
        self.stream.contains(&value)
    }

    /// Nodes on a path between chain values `position` and `position + 1`, in execution order.
    pub fn segment(&self, position: usize) -> impl Iterator<Item = usize> + '_ {
        self.level.iter().enumerate().filter(move |(_, level)| **level == Some(position)).map(|(node, _)| node)
    }
}
