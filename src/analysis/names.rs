//! Confirms the structure by names: numbers of layers in names must ascend with the layers.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::ir::{Body, Graph};

use super::layer::LayerMap;

/// Words that exporters write before a layer's number.
const LAYER_WORDS: &[&str] = &["layers", "layer", "blocks", "block", "h"];

/// Compares the layer numbers in node names and metadata with the order found.
///
/// Errors: `Error::Invalid` when most names of a later layer carry a number that is not above an earlier layer's.
pub fn confirm(graph: &Graph, body: &Body, map: &LayerMap) -> Result<()> {
    let mut previous: Option<(usize, usize)> = None;
    for layer in &map.layers {
        let mut votes: HashMap<usize, usize> = HashMap::new();
        let mut named = 0;
        for &number in &layer.path {
            let node = &body.nodes[number];
            let texts =
                std::iter::once(node.name.as_str()).chain(node.metadata.iter().map(|(_, value)| value.as_str()));
            if let Some(found) = texts.filter_map(layer_number).next() {
                *votes.entry(found).or_default() += 1;
                named += 1;
            }
        }
        let Some((&winner, &count)) = votes.iter().max_by_key(|&(_, count)| *count) else { continue };
        // A few names that do not fit (shared constants, leftovers of fusions) are not evidence.
        if count * 2 <= named || named * 4 < layer.path.len() {
            continue;
        }
        if let Some((before, at)) = previous
            && winner <= before
        {
            return Err(Error::invalid(
                format!("layer {} (stream from `{}`)", layer.index, graph.name(layer.input)),
                format!("its nodes are named as layer {winner}, but layer {at} before it is named {before}"),
            )
            .remedy("structure and names disagree; strip the names if the structure is right"));
        }
        previous = Some((winner, layer.index));
    }
    Ok(())
}

/// The number after a layer word in a name such as `/model/layers.3/mlp/Mul` or `model.layers.3.mlp`.
pub fn layer_number(name: &str) -> Option<usize> {
    let mut parts = name.split(['/', '.', ':', '[', ']', ' ', ',', '\'', '"']).peekable();
    while let Some(part) = parts.next() {
        if LAYER_WORDS.contains(&part)
            && let Some(number) = parts.peek().and_then(|next| next.parse().ok())
        {
            return Some(number);
        }
        for word in LAYER_WORDS {
            if let Some(number) =
                part.strip_prefix(word).and_then(|rest| rest.strip_prefix('_')).and_then(|rest| rest.parse().ok())
            {
                return Some(number);
            }
        }
    }
    None
}
