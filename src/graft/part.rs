//! The graphs of a model, and what of the checkpoint they do not have.

use std::collections::{BTreeSet, HashMap};

use crate::ir::{Body, Model, Tensor, ValueId};

/// A component of a model with what places need to know of its weights.
pub struct ModelPart<'a> {
    /// Path of the component below the model's folder.
    pub file: &'a str,
    /// Its graph.
    pub model: &'a Model,
    /// True for the vision encoder.
    pub vision: bool,
    /// The layer that alone reads an initializer, by the initializer's name, counted as in the model that was never pruned.
    pub layers: HashMap<String, usize>,
}

/// What of the checkpoint the graphs do not have.
#[derive(Clone, Debug, Default)]
pub struct Absent {
    /// Dropped layers of the language model, counted as in the model that was never pruned.
    pub layers: BTreeSet<usize>,
    /// Beginnings of names of tensors that the user leaves out.
    pub names: Vec<String>,
}

/// The initializers of a graph, those in branches included.
pub fn weights_of(body: &Body) -> Vec<(ValueId, &Tensor)> {
    let mut all: Vec<(ValueId, &Tensor)> = body.initializers.iter().map(|(id, tensor)| (*id, tensor)).collect();
    for inner in body.nodes.iter().flat_map(|node| node.bodies()) {
        all.extend(weights_of(inner));
    }
    all
}
