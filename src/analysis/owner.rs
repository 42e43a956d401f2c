//! The layers that use a node or a weight.

use std::collections::BTreeSet;

/// The users of a node or weight: layers, and anything outside the layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Indices of the layers.
    pub layers: BTreeSet<usize>,
    /// True when something outside all layers uses it too.
    pub outside: bool,
}

impl Owner {
    /// The layer, when exactly one layer and nothing else uses it.
    pub fn only(&self) -> Option<usize> {
        if self.outside || self.layers.len() != 1 { None } else { self.layers.first().copied() }
    }

    /// True when this layer uses it.
    pub fn contains(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    /// Adds the users of `other`.
    pub(super) fn merge(&mut self, other: &Owner) {
        self.layers.extend(&other.layers);
        self.outside |= other.outside;
    }
}
