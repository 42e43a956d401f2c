//! The result of the analysis: layers, their boundaries, ports, weights and what they share.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::ir::{Body, Graph, GraphIndex, Node, ValueId};

use super::blocks::LayerBlocks;
use super::owners::{Owner, Owners};
use super::stream::{Chain, data_inputs};
use super::{glue, kinds};

/// The layers of a transformer graph.
#[derive(Clone, Debug)]
pub struct LayerMap {
    /// The graph input that the stream begins at, or the part of its rows where other features are packed behind it.
    pub source: ValueId,
    /// The graph output that the stream ends in.
    pub result: ValueId,
    /// Layers in the order of the stream; the output of one is the input of the next, up to `glue`.
    pub layers: Vec<Layer>,
    /// Changes of the stream between layers, such as features added from outside.
    pub glue: Vec<Glue>,
    /// Outputs beside the result that are no cache and come from the stream.
    pub taps: Vec<Tap>,
    /// For each node of the body: which layers it works for.
    pub node_owners: Vec<Owner>,
    /// For each initializer, by value: which layers read it.
    pub weight_owners: HashMap<ValueId, Owner>,
}

/// One decoder or encoder layer: `output = layer(input)`.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Position in `LayerMap::layers`.
    pub index: usize,
    /// The stream before the layer, h_i.
    pub input: ValueId,
    /// The value of the same type that replaces `output` when the layer is dropped: `input` or a cast of it to that type.
    pub carried: ValueId,
    /// The stream behind the layer.
    pub output: ValueId,
    /// The stream between the layer's blocks.
    pub sums: Vec<ValueId>,
    /// For people: `attention + mlp`, `sliding attention + moe`.
    pub kind: String,
    /// Same number, same operators in the same arrangement (attributes and sizes aside).
    pub class: usize,
    /// Nodes on the way from `input` to `output`, in execution order.
    pub path: Vec<usize>,
    /// Initializers that only this layer reads, in file order.
    pub weights: Vec<ValueId>,
    /// Initializers of more than one element that this layer reads and others too.
    pub shared_weights: Vec<ValueId>,
    /// Values computed outside the layer and read inside it, other than the stream, weights and ports: masks, rotary
    /// tables, shapes.
    pub shared_values: Vec<ValueId>,
    /// Values read inside the layer that are computed from the stream and reach it beside it: an earlier layer's keys, a
    /// projection of the embeddings.
    pub beside: Vec<ValueId>,
    /// Cached tensors, keys before values.
    pub ports: Vec<KvPort>,
}

impl Layer {
    /// Elements of the layer's own weights.
    pub fn parameters(&self, body: &Body) -> u64 {
        let own: HashSet<ValueId> = self.weights.iter().copied().collect();
        body.initializers.iter().filter(|(id, _)| own.contains(id)).map(|(_, tensor)| tensor.element_count()).sum()
    }

    /// Bytes of the layer's own weights.
    pub fn weight_bytes(&self, body: &Body) -> u64 {
        let own: HashSet<ValueId> = self.weights.iter().copied().collect();
        body.initializers.iter().filter(|(id, _)| own.contains(id)).map(|(_, tensor)| tensor.byte_len()).sum()
    }
}

/// Content of a cached tensor; two layers' ports of the same role correspond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortRole {
    /// Attention keys.
    Key,
    /// Attention values.
    Value,
    /// Recurrent and convolution states, in order of appearance.
    State(usize),
}

impl PortRole {
    /// `key`, `value`, `state 0`.
    pub fn label(self) -> String {
        match self {
            PortRole::Key => "key".into(),
            PortRole::Value => "value".into(),
            PortRole::State(number) => format!("state {number}"),
        }
    }
}

/// A cached tensor of one layer, as graph input and output. A prefill-only graph has no `past`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPort {
    /// Content of the tensor.
    pub role: PortRole,
    /// Graph input with the state of earlier tokens.
    pub past: Option<ValueId>,
    /// Graph output with that state and the new tokens' state.
    pub present: Option<ValueId>,
}

/// A change to the stream between two layers.
#[derive(Clone, Debug)]
pub struct Glue {
    /// Index of the layer before it; `None` before the first.
    pub after: Option<usize>,
    /// The stream before the change.
    pub from: ValueId,
    /// The stream after the change.
    pub to: ValueId,
    /// Operators on the way.
    pub operators: Vec<String>,
    /// Graph inputs that come in here and nowhere before (DeepStack features).
    pub inputs: Vec<ValueId>,
    /// Weights of more than one element that take part. Whether the layer before or behind owns them is not known.
    pub weights: Vec<ValueId>,
}

/// An output computed from the stream that is no cache: a hidden state, features of some layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The graph output.
    pub output: ValueId,
    /// Places at which it reads the stream, ascending: `i` is before layer `i`, the number of layers is after the last one.
    pub places: Vec<usize>,
    /// Layers whose inside it reads. In order.
    pub inside: Vec<usize>,
}

/// Puts the map together, ports aside.
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
    let streamed = layers.first().map(|first| computed_from(body, first.input)).unwrap_or_default();
    for layer in &mut layers {
        fill_shared(body, &index, &owners, layer);
        layer.beside = read_beside(body, &index, layer, &streamed);
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

fn read_beside(body: &Body, index: &GraphIndex, layer: &Layer, streamed: &HashSet<ValueId>) -> Vec<ValueId> {
    let on_path: HashSet<usize> = layer.path.iter().copied().collect();
    let foreign = |id: ValueId| index.node_of(id).is_none_or(|(node, _)| !on_path.contains(&node));
    let mut found = Vec::new();
    for value in layer.path.iter().flat_map(|&number| data_inputs(body, number)) {
        if value != layer.input && foreign(value) && streamed.contains(&value) && !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// Everything that is computed from the content of a value.
fn computed_from(body: &Body, value: ValueId) -> HashSet<ValueId> {
    let mut found = HashSet::from([value]);
    for (number, node) in body.nodes.iter().enumerate() {
        if !node.reads_shape_only() && data_inputs(body, number).iter().any(|id| found.contains(id)) {
            found.extend(node.present_outputs());
        }
    }
    found
}

fn kind(body: &Body, blocks: &LayerBlocks, path: &[usize]) -> String {
    let mut words: Vec<&str> = Vec::new();
    for block in &blocks.blocks {
        if words.last() != Some(&block.mixing.label()) {
            words.push(block.mixing.label());
        }
    }
    if blocks.blocks.len() == 1 && blocks.blocks[0].mixing.is_mixer() {
        // Attention and feed-forward side by side on one norm, or a layer without a feed-forward part.
        let products = path.iter().filter(|&&node| body.nodes[node].op_type.contains("MatMul")).count();
        if products > 6 {
            words.push("parallel mlp");
        }
    }
    words.join(" + ")
}

/// A hash of the operators between a layer's input and output and how they are connected; what comes in from the side
/// (weights, masks, shapes) counts as one thing.
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

/// One name for operators that compute the same.
fn operator_name(node: &Node) -> String {
    match node.op_type.as_str() {
        "SimplifiedLayerNormalization" | "RMSNormalization" => "RMSNormalization".into(),
        _ => node.op(),
    }
}

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
