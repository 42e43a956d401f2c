//! Finds the layers of a transformer in its graph, by structure.
//!
//! The residual stream is the chain of values on every path from the embeddings to the result (dominators). Where
//! layers read values of other layers besides the stream, it is the chain of sums that carries the stream. Between two
//! values of the chain is either glue (a cast, a feature added from outside) or a residual block `x + f(x)`. A block
//! that mixes tokens and the neighbouring blocks that do not form a layer; a norm or scale after every layer is part of
//! it. Names are only used to confirm the result.

mod blocks;
mod canonical;
mod chain;
mod dataflow;
mod glue;
mod head;
mod kinds;
mod layer;
mod map;
mod merged;
mod names;
mod operands;
mod owner;
mod owners;
mod parameters;
mod ports;
mod positions;
mod products;
mod projection;
mod residual;
mod stream;
mod sublayers;
mod taps;
mod towers;

pub use canonical::{FUSED_MARK, FUSED_OUTPUTS, FusedNorm, unfuse_skip_norms};
pub use head::{head_input, head_weight, position_wise_from};
pub use layer::{Glue, KvPort, Layer, LayerMap, PortRole, Tap};
pub use merged::{Branch, Merged};
pub use owner::Owner;
pub use owners::Owners;
pub use parameters::parameter_counts;
pub use projection::Projection;
pub use sublayers::Sublayers;

use crate::base::{Error, Result};
use crate::ir::{Body, Graph, GraphIndex, Model};

/// A model in the form in which layers are found, with its layers.
#[derive(Clone, Debug)]
pub struct Analysis {
    /// The model with skip-norm fusions split, so that the residual stream is a value at every layer boundary. It
    /// shares its weights with the original model.
    ///
    /// For a merged decoder (two branches of an `If`), the branch with a cache as a model of its own.
    pub model: Model,
    /// Layers of `model` with their inputs, outputs and cache ports.
    pub map: LayerMap,
    /// The layers of the vision tower, when the same graph contains one before the language model.
    pub vision: Option<LayerMap>,
    /// True when `map` describes that vision tower.
    pub is_vision_beside_text: bool,
    /// The branches, when the model is a merged decoder.
    pub merged: Option<Merged>,
}

impl Analysis {
    /// The analysis with the vision tower's layers as `map` in place of the language model's; `None`
    /// when the graph has no tower.
    pub fn into_vision(self) -> Option<Analysis> {
        let map = self.vision?;
        Some(Analysis { model: self.model, map, vision: None, is_vision_beside_text: true, merged: None })
    }
}

/// Finds the layers of the model's graph.
///
/// Errors: `Error::Unsupported` when the graph has no residual stream of attention layers, is an encoder-decoder, or
/// its names contradict its structure.
pub fn analyse(model: &Model) -> Result<Analysis> {
    if let Some(node) = merged::merging_node(model) {
        let merged = merged::analyse_branches(model, node)?;
        if let Some(branch) = merged.cached() {
            let (model, map) = (branch.model.clone(), branch.map.clone());
            return Ok(Analysis { model, map, vision: None, is_vision_beside_text: false, merged: Some(merged) });
        }
    }
    let mut model = model.clone();
    unfuse_skip_norms(&mut model);
    let (map, vision) = towers_of(&model.graph, &model.graph.body)?;
    Ok(Analysis { model, map, vision, is_vision_beside_text: false, merged: None })
}

/// The layers of an analysed model cut into their residual blocks.
///
/// Errors: `Error::Unsupported` for a merged decoder; as [`analyse`].
pub fn sublayers(analysis: &Analysis) -> Result<Sublayers> {
    if analysis.merged.is_some() || analysis.is_vision_beside_text {
        return Err(Error::unsupported(
            "the graph",
            "its layers can be cut into attention and MLP only in one decoder",
        )
        .remedy("export the decoder as one graph, without branches of an `If`"));
    }
    let (graph, body) = (&analysis.model.graph, &analysis.model.graph.body);
    let ((chain, mut layers), _) = towers::split(graph, body, stream::longest_chain(graph, body)?)?;
    glue::settle(body, &GraphIndex::of_body(body), &chain, &mut layers);
    let (parts, mlps) = sublayers::cut(&layers);
    let mut map = map::build(graph, body, &chain, parts);
    ports::assign(graph, body, &chain, &mut map)?;
    Ok(Sublayers { map, mlps })
}

/// The layers of a graph's top-level body. Skip-norm fusions must have been split before.
///
/// Errors: as [`analyse`].
pub fn layers(graph: &Graph) -> Result<LayerMap> {
    towers_of(graph, &graph.body).map(|(map, _)| map)
}

/// The language model's layers, and those of a vision tower in the same graph.
fn towers_of(graph: &Graph, body: &Body) -> Result<(LayerMap, Option<LayerMap>)> {
    let (own, before) = towers::split(graph, body, stream::longest_chain(graph, body)?)?;
    let vision = before.map(|tower| layers_of(graph, body, tower)).transpose()?;
    Ok((layers_of(graph, body, own)?, vision))
}

fn layers_of(graph: &Graph, body: &Body, (chain, mut layers): towers::TowerLayers) -> Result<LayerMap> {
    glue::settle(body, &GraphIndex::of_body(body), &chain, &mut layers);
    let mut map = map::build(graph, body, &chain, layers);
    ports::assign(graph, body, &chain, &mut map)?;
    names::confirm(graph, body, &map)?;
    Ok(map)
}

#[cfg(test)]
mod tests;
