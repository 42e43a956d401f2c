//! Which layers a node or a weight works for.

use std::collections::BTreeSet;

/// The layers, and whether anything outside them, that use a node or weight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Indices of the layers.
    pub layers: BTreeSet<usize>,
    /// True when something outside all layers uses it too.
    pub outside: bool,
}

impl Owner {
    /// The one layer that uses it, if it is one alone.
    pub fn only(&self) -> Option<usize> {
        if self.outside || self.layers.len() != 1 { None } else { self.layers.first().copied() }
    }

    /// True when this layer uses it.
    pub fn contains(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    /// Adds the users that `other` has.
    pub(super) fn merge(&mut self, other: &Owner) {
        self.layers.extend(&other.layers);
        self.outside |= other.outside;
    }
}
