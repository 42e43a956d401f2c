//! Outputs that read the stream and are not caches.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::ir::{Body, GraphIndex, ValueId};

use super::chain::Chain;
use super::dataflow::data_inputs;
use super::layer::{Layer, Tap};

/// Places at which an output reads the stream; `None` when it does not.
pub fn tap(
    body: &Body,
    index: &GraphIndex,
    chain: &Chain,
    layers: &[Layer],
    layer_of: &HashMap<usize, usize>,
    output: ValueId,
) -> Option<Tap> {
    let place_of: HashMap<ValueId, usize> = chain.values.iter().enumerate().map(|(place, id)| (*id, place)).collect();
    // Chain positions of the layers' outputs, used to count the layers before a position.
    let ends: Vec<usize> = layers.iter().filter_map(|layer| place_of.get(&layer.output).copied()).collect();
    let starts: Vec<usize> = layers.iter().filter_map(|layer| place_of.get(&layer.input).copied()).collect();
    let mut places = BTreeSet::new();
    let mut inside = BTreeSet::new();
    let mut open = vec![output];
    let mut seen = HashSet::new();
    while let Some(value) = open.pop() {
        if let Some(&position) = place_of.get(&value) {
            let before = ends.iter().filter(|&&end| end <= position).count();
            match starts.get(before) {
                Some(&start) if start < position => inside.insert(before),
                _ => places.insert(before),
            };
            continue;
        }
        let Some((node, _)) = index.node_of(value) else { continue };
        if let Some(&layer) = layer_of.get(&node) {
            inside.insert(layer);
        } else if !body.nodes[node].reads_shape_only() && chain.reached[node] && seen.insert(node) {
            open.extend(data_inputs(body, node));
        }
    }
    if places.is_empty() && inside.is_empty() {
        return None;
    }
    Some(Tap { output, places: places.into_iter().collect(), inside: inside.into_iter().collect() })
}
