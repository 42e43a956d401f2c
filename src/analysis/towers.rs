//! Splits a graph that contains a vision tower and the language model after it.

use crate::base::Result;
use crate::ir::{Body, Graph, GraphIndex};

use super::blocks::{self, LayerBlocks};
use super::chain::Chain;
use super::dataflow::from_weights;
use super::products::product;
use super::stream;

/// A stream and its layers.
pub type TowerLayers = (Chain, Vec<LayerBlocks>);

/// The language model's stream and layers, and those of a vision tower before it if the graph has one.
///
/// In a graph with both, the stream leads from the pictures through the tower, a projection and the language model. The
/// graph has two towers when the stream passes a product with weights between two layers and another input, the tokens,
/// leads only to the layers after that product.
///
/// Errors: as `blocks::group`.
pub fn split(graph: &Graph, body: &Body, chain: Chain) -> Result<(TowerLayers, Option<TowerLayers>)> {
    let layers = blocks::group(graph, body, &chain)?;
    let index = GraphIndex::of_body(body);
    let cuts = (2..layers.len()).rev().filter(|&cut| {
        let between = layers[cut - 1].end..layers[cut].start;
        between.flat_map(|position| chain.segment(position)).any(|node| projects(body, &index, node))
    });
    for cut in cuts {
        let (before, behind) = (chain.values[layers[cut - 1].end], chain.values[layers[cut].start]);
        let wanted = |other: &Chain| other.is_stream(behind) && !other.is_stream(before);
        let Some(own) = stream::longest_where(graph, body, chain.result, &wanted) else { continue };
        let own_layers = blocks::group(graph, body, &own)?;
        let tower = layers[..cut].to_vec();
        return Ok(((own, own_layers), Some((chain, tower))));
    }
    Ok(((chain, layers), None))
}

/// True for a product of the stream with weights.
fn projects(body: &Body, index: &GraphIndex, node: usize) -> bool {
    let node = &body.nodes[node];
    let factors = product(node).and_then(|row| row.factors(node));
    factors.is_some_and(|factors| factors.iter().any(|&id| from_weights(body, index, id)))
}
