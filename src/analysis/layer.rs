//! The layers of a transformer graph: boundaries, ports, weights and shared values.

use std::collections::{HashMap, HashSet};

use crate::ir::{Body, ValueId};

use super::owner::Owner;
use super::parameters::parameter_counts;

/// The layers of a transformer graph.
#[derive(Clone, Debug)]
pub struct LayerMap {
    /// The graph input at which the stream begins, or the part of its rows that holds the embeddings when other
    /// features are packed behind them.
    pub source: ValueId,
    /// The graph output at which the stream ends.
    pub result: ValueId,
    /// Layers in the order of the stream; the output of one is the input of the next, up to `glue`.
    pub layers: Vec<Layer>,
    /// Changes of the stream between layers, such as features added from outside.
    pub glue: Vec<Glue>,
    /// Outputs other than the result that are computed from the stream and are not caches.
    pub taps: Vec<Tap>,
    /// For each node of the body: the layers that use it.
    pub node_owners: Vec<Owner>,
    /// For each initializer: the layers that read it.
    pub weight_owners: HashMap<ValueId, Owner>,
}

/// One decoder or encoder layer: `output = layer(input)`.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Position in `LayerMap::layers`.
    pub index: usize,
    /// The stream before the layer, h_i.
    pub input: ValueId,
    /// The value that replaces `output` when the layer is dropped: `input`, or a cast of it to the type of `output`.
    pub carried: ValueId,
    /// The stream after the layer.
    pub output: ValueId,
    /// The stream between the layer's blocks.
    pub sums: Vec<ValueId>,
    /// The stream before the layer's last block, in most networks the MLP.
    pub last_block: ValueId,
    /// The kinds of its blocks for messages: `attention + mlp`, `sliding attention + moe`.
    pub kind: String,
    /// Layers with the same number have the same operators in the same arrangement; attributes and sizes may differ.
    pub class: usize,
    /// Nodes on the way from `input` to `output`, in execution order.
    pub path: Vec<usize>,
    /// Initializers that only this layer reads, in file order.
    pub weights: Vec<ValueId>,
    /// Initializers of more than one element that this layer shares with other readers.
    pub shared_weights: Vec<ValueId>,
    /// Values computed outside the layer and read inside it, other than the stream, weights and ports: masks, rotary
    /// tables, shapes.
    pub shared_values: Vec<ValueId>,
    /// Values computed from the stream that the layer reads besides its input: an earlier layer's keys, a projection of
    /// the embeddings.
    pub beside: Vec<ValueId>,
    /// Cached tensors, keys before values.
    pub ports: Vec<KvPort>,
}

impl Layer {
    /// Number of the layer's own weights; packed ones count as the weights that they hold.
    pub fn parameters(&self, body: &Body) -> u64 {
        let counts = parameter_counts(body);
        let own: HashSet<ValueId> = self.weights.iter().copied().collect();
        own.iter().filter_map(|id| counts.get(id)).sum()
    }

    /// Bytes of the layer's own weights.
    pub fn weight_bytes(&self, body: &Body) -> u64 {
        let own: HashSet<ValueId> = self.weights.iter().copied().collect();
        body.initializers.iter().filter(|(id, _)| own.contains(id)).map(|(_, tensor)| tensor.byte_len()).sum()
    }
}

/// Content of a cached tensor. Ports of the same role in two layers correspond to each other.
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
    /// Graph input with the state of the earlier tokens.
    pub past: Option<ValueId>,
    /// Graph output with the state of the earlier and the new tokens.
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
    /// Operators between `from` and `to`.
    pub operators: Vec<String>,
    /// Graph inputs that are first read here (DeepStack features).
    pub inputs: Vec<ValueId>,
    /// Weights of more than one element that are read here. The graph does not show whether they belong to the layer
    /// before or after.
    pub weights: Vec<ValueId>,
}

/// An output that is computed from the stream and is not a cache: a hidden state, or features of some layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The graph output.
    pub output: ValueId,
    /// Places at which the output reads the stream, ascending: `i` is before layer `i`; the number of layers is after
    /// the last one.
    pub places: Vec<usize>,
    /// Layers inside which the output reads values, ascending.
    pub inside: Vec<usize>,
}
