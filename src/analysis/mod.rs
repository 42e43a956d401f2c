//! Finds the layers of a transformer in its graph, by structure.
//!
//! The residual stream is the chain of values that every path from the embeddings to the result passes (dominators).
//! Between two of them lies either glue (a cast, a feature added from outside) or a residual block: `x + f(x)`. A
//! block that mixes tokens begins a layer, blocks that do not belong to the layer before them. Names only confirm.

mod blocks;
mod canonical;
mod head;
mod kinds;
mod map;
mod merged;
mod names;
mod owners;
mod ports;
mod positions;
mod products;
mod stream;

pub use canonical::{FUSED_MARK, FUSED_OUTPUTS, FusedNorm, unfuse_skip_norms};
pub use head::head_input;
pub use map::{Glue, KvPort, Layer, LayerMap, PortRole};
pub use merged::{Branch, Merged};
pub use owners::{Owner, Owners};

use crate::base::{Error, Result};
use crate::ir::{Body, Graph, Model};

/// A model in the form that layers are found in, with its layers.
#[derive(Clone, Debug)]
pub struct Analysis {
    /// The model with skip-norm fusions taken apart, so that the residual stream is a value at every layer boundary.
    /// Weights are shared with the model that it came from.
    ///
    /// Of a decoder given as the branches of an `If`, the branch that reads a cache, laid open.
    pub model: Model,
    pub map: LayerMap,
    /// The branches, where the model is such a decoder.
    pub merged: Option<Merged>,
}

/// Finds the layers of the model's graph.
///
/// Errors: `Error::Unsupported` when the graph carries no residual stream of attention layers, is an encoder-decoder,
/// or its names contradict its structure; the message says what was found.
pub fn analyse(model: &Model) -> Result<Analysis> {
    if let Some(node) = merged::merging_node(model) {
        let merged = merged::analyse_branches(model, node)?;
        if let Some(branch) = merged.cached() {
            let (model, map) = (branch.model.clone(), branch.map.clone());
            return Ok(Analysis { model, map, merged: Some(merged) });
        }
    }
    let mut model = model.clone();
    unfuse_skip_norms(&mut model);
    let map = layers(&model.graph)?;
    Ok(Analysis { model, map, merged: None })
}

/// The layers of a graph's top-level body, skip-norm fusions taken apart before.
///
/// Errors: as [`analyse`].
pub fn layers(graph: &Graph) -> Result<LayerMap> {
    layers_of_body(graph, &graph.body)
}

fn layers_of_body(graph: &Graph, body: &Body) -> Result<LayerMap> {
    let chain = stream::longest_chain(graph, body)?;
    let layers = blocks::group(graph, body, &chain)?;
    if layers.is_empty() {
        return Err(Error::unsupported("the graph", "no decoder layers were found")
            .remedy("interlace works on transformer graphs with a residual stream"));
    }
    let mut map = map::build(body, &chain, layers);
    ports::assign(graph, body, &mut map)?;
    names::confirm(graph, body, &map)?;
    Ok(map)
}

#[cfg(test)]
mod tests;
