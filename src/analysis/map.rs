//! Builds the result of the analysis: layers, their boundaries, ports, weights and shared values.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::ir::{Body, Graph, GraphIndex, Node, ValueId};

use super::blocks::LayerBlocks;
use super::chain::Chain;
use super::dataflow::data_inputs;
use super::layer::{Layer, LayerMap};
use super::owner::Owner;
use super::owners::Owners;
use super::{glue, kinds};

/// Builds the map without the ports.
pub(super) fn build(graph: &Graph, body: &Body, chain: &Chain, grouped: Vec<LayerBlocks>) -> LayerMap {
    let index = GraphIndex::of_body(body);
    let mut layers = Vec::with_capacity(grouped.len());
    let mut classes: HashMap<u64, usize> = HashMap::new();
    let mut layer_of_level: HashMap<usize, usize> = HashMap::new();
    for (number, blocks) in grouped.iter().enumerate() {
        let path: Vec<usize> = (blocks.start..blocks.end).flat_map(|position| chain.segment(position)).collect();
        for position in blocks.start..blocks.end {
            layer_of_level.insert(position, number);
        }
        let places = blocks.blocks.iter().flat_map(|block| [block.position, block.position + 1, block.end]);
        let inner: BTreeSet<usize> = places.filter(|place| (blocks.start + 1..blocks.end).contains(place)).collect();
        let signature = signature(body, &index, &path, chain.values[blocks.start]);
        let next = classes.len();
        let class = *classes.entry(signature).or_insert(next);
        layers.push(Layer {
            index: number,
            input: chain.values[blocks.start],
            carried: blocks.carried,
            output: chain.values[blocks.end],
            sums: inner.into_iter().map(|place| chain.values[place]).collect(),
            last_block: blocks.blocks.last().map_or(blocks.carried, |block| block.carried),
            kind: kind(body, blocks, &path),
            class,
            path,
            weights: Vec::new(),
            shared_weights: Vec::new(),
            shared_values: Vec::new(),
            beside: Vec::new(),
            ports: Vec::new(),
        });
    }
    let owners = Owners::new(body, chain, &layers);
    let from_stream = layers.first().map(|first| computed_from(body, first.input)).unwrap_or_default();
    for layer in &mut layers {
        fill_shared(body, &index, &owners, layer);
        layer.beside = read_beside(body, &index, layer, &from_stream);
    }
    let glue = glue::between(graph, body, chain, &layer_of_level);
    LayerMap {
        source: chain.source,
        result: chain.result,
        layers,
        glue,
        taps: Vec::new(),
        node_owners: owners.nodes,
        weight_owners: owners.weights,
    }
}

/// Values that a layer reads besides its input, from outside its path, and that are in `from_stream`.
fn read_beside(body: &Body, index: &GraphIndex, layer: &Layer, from_stream: &HashSet<ValueId>) -> Vec<ValueId> {
    let on_path: HashSet<usize> = layer.path.iter().copied().collect();
    let foreign = |id: ValueId| index.node_of(id).is_none_or(|(node, _)| !on_path.contains(&node));
    let mut found = Vec::new();
    for value in layer.path.iter().flat_map(|&number| data_inputs(body, number)) {
        if value != layer.input && foreign(value) && from_stream.contains(&value) && !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// All values computed from the content of a value.
fn computed_from(body: &Body, value: ValueId) -> HashSet<ValueId> {
    let mut found = HashSet::from([value]);
    for (number, node) in body.nodes.iter().enumerate() {
        if !node.reads_shape_only() && data_inputs(body, number).iter().any(|id| found.contains(id)) {
            found.extend(node.present_outputs());
        }
    }
    found
}

/// Products of a layer that has attention alone: query, key, value, scores, the weighted sum and the output.
const SERIAL_PRODUCTS: usize = 6;

/// Kinds of a layer's blocks in order, for messages and tables: `attention + mlp`.
fn kind(body: &Body, blocks: &LayerBlocks, path: &[usize]) -> String {
    let mut words: Vec<&str> = Vec::new();
    for block in &blocks.blocks {
        if words.last() != Some(&block.mixing.label()) {
            words.push(block.mixing.label());
        }
    }
    if blocks.blocks.len() == 1 && blocks.blocks[0].mixing.is_mixer() {
        // Attention and feed-forward in parallel on one norm, or a layer without a feed-forward part.
        let products = path.iter().filter(|&&node| body.nodes[node].op_type.contains("MatMul")).count();
        if products > SERIAL_PRODUCTS {
            words.push("parallel mlp");
        }
    }
    words.join(" + ")
}

/// A hash of the operators between a layer's input and output and of their connections. Every value from outside the
/// path (weights, masks, shapes) has the same hash.
fn signature(body: &Body, index: &GraphIndex, path: &[usize], input: ValueId) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let on_path: HashSet<usize> = path.iter().copied().collect();
    let mut hashes: HashMap<ValueId, u64> = HashMap::from([(input, 1)]);
    let mut last = 0;
    for &number in path {
        let node = &body.nodes[number];
        let mut hasher = DefaultHasher::new();
        operator_name(node).hash(&mut hasher);
        for value in data_inputs(body, number) {
            let hash = match index.node_of(value) {
                Some((producer, output)) if on_path.contains(&producer) => {
                    hashes.get(&value).copied().unwrap_or(2).wrapping_add(output as u64)
                }
                _ if value == input => 1,
                _ => 0,
            };
            hash.hash(&mut hasher);
        }
        if kinds::window(node).is_some() {
            "window".hash(&mut hasher);
        }
        last = hasher.finish();
        for output in node.present_outputs() {
            hashes.insert(output, last);
        }
    }
    last
}

/// One name for all operators that compute the same function.
fn operator_name(node: &Node) -> String {
    match node.op_type.as_str() {
        "SimplifiedLayerNormalization" | "RMSNormalization" => "RMSNormalization".into(),
        _ => node.op(),
    }
}

/// Sets the layer's own weights, the weights that it shares with others, and the values that it reads from outside its
/// path and does not own.
fn fill_shared(body: &Body, index: &GraphIndex, owners: &Owners, layer: &mut Layer) {
    let mine = |owner: &Owner| owner.only() == Some(layer.index);
    let mut weights = Vec::new();
    let mut shared_weights = Vec::new();
    for (id, tensor) in &body.initializers {
        match owners.weights.get(id) {
            Some(owner) if mine(owner) => weights.push(*id),
            Some(owner) if owner.contains(layer.index) && tensor.element_count() > 1 => shared_weights.push(*id),
            _ => {}
        }
    }
    let on_path: HashSet<usize> = layer.path.iter().copied().collect();
    let mut shared_values = Vec::new();
    let mut seen = HashSet::new();
    for &number in &layer.path {
        for value in data_inputs(body, number) {
            let foreign = match index.node_of(value) {
                Some((node, _)) => !on_path.contains(&node) && !mine(&owners.nodes[node]),
                None => !index.is_initializer(value),
            };
            if foreign && value != layer.input && seen.insert(value) {
                shared_values.push(value);
            }
        }
    }
    layer.weights = weights;
    layer.shared_weights = shared_weights;
    layer.shared_values = shared_values;
}
