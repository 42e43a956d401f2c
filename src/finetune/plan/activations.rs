//! Activation memory of a layer: the number of elements per token that the backward pass needs. They are counted on the
//! graph from the operands and results that the gradient of each operator reads. A view shares the memory of its
//! source.
//!
//! Widths are propagated from the residual stream, because few graphs state their shapes. A product with a weight `[K,
//! N]` maps width `K` to width `N`. A product of two values that both depend on the stream belongs to attention: the
//! scores have one element per head and key.
//!
//! In a pass with 16-bit activations some values are in f32, as `torch::MixedPrecision` says; each of their elements counts
//! as two. An operator that reads a 16-bit value in f32 and keeps it for its gradient keeps an f32 copy.

use std::collections::{HashMap, HashSet};

use crate::ir::{Attribute, DataType, Graph, GraphIndex, Node, ValueId};
use crate::rewrite::{EXPANDED_BLOCKS, ROUNDED, ROUNDED_DYNAMICALLY};
use crate::torch::MixedPrecision;

/// Elements per token: `own`, plus `per_key` for each token that the token attends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Width {
    /// Elements that do not depend on the sequence length.
    pub own: u64,
    /// Elements per key.
    pub per_key: u64,
}

impl Width {
    fn plus(self, other: Width) -> Width {
        Width { own: self.own + other.own, per_key: self.per_key + other.per_key }
    }

    fn times(self, factor: u64) -> Width {
        Width { own: factor * self.own, per_key: factor * self.per_key }
    }

    fn larger(self, other: Width) -> Width {
        if (other.per_key, other.own) > (self.per_key, self.own) { other } else { self }
    }

    /// Elements per token when a token attends to `keys` tokens.
    pub fn at(self, keys: u64) -> u64 {
        self.own + self.per_key * keys
    }
}

/// Values that the gradient of an operator reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Saves {
    Nothing,
    /// Each factor that depends on the stream; the gradient of the other factor reads it.
    OtherFactor,
    Inputs,
    Output,
    /// Inputs and the first output: attention and unlisted operators.
    All,
    /// The input in f32, the normalised input for the gradient of the scale, and the output.
    Normalised,
}

/// One row per group of operators. An unlisted operator saves its inputs and its first output.
const SAVES: &[(&[&str], Saves)] = &[
    (
        &[
            "Add",
            "Sub",
            "Neg",
            "Sum",
            "Cast",
            "CastLike",
            "Reshape",
            "Transpose",
            "Squeeze",
            "Unsqueeze",
            "Flatten",
            "Identity",
            "Slice",
            "Split",
            "Concat",
            "Expand",
            "Gather",
            "Where",
            "ReduceMean",
            "ReduceSum",
            "Shape",
            "Size",
            "ConstantOfShape",
            "Tile",
            "Pad",
            ROUNDED_DYNAMICALLY,
        ],
        Saves::Nothing,
    ),
    (&["MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "Mul", "Div"], Saves::OtherFactor),
    (&[ROUNDED, "Pow", "FusedSilu", "Gelu", "FastGelu", "QuickGelu", "Erf", "Sin", "Cos", "Log", "Abs"], Saves::Inputs),
    (&["SimplifiedLayerNormalization", "RMSNormalization", "SkipSimplifiedLayerNormalization"], Saves::Normalised),
    (&["Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Sqrt", "Exp", "Relu", "Reciprocal"], Saves::Output),
];

/// Operators whose result is a view of their first operand.
const VIEWS: &[&str] = &[
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
    "Slice",
    "Split",
    "Cast",
    "CastLike",
    "Expand",
];

/// Products, which are computed in 16 bits where activations are.
const LOWERED: &[&str] = &["MatMul", "Gemm", "FusedMatMul", "MatMulNBits"];

/// Operators that compute attention in a single node.
const ATTENTION: &[&str] = &["FusedAttention", "Attention", "GroupQueryAttention", "MultiHeadAttention"];

/// Activation memory of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Elements kept for the backward pass.
    pub kept: Width,
    /// Elements of the widest value. The backward pass holds its gradient in addition to `kept`.
    pub widest: Width,
}

/// Activation memory of one layer. `piece` lists its nodes in execution order; `(from, width)` is the stream before it
/// and the stream's elements per token. `trained` lists the weights that have gradients. `heads` is the number of
/// attention heads. `low`: activations are in 16 bits.
pub fn of_layer(
    graph: &Graph,
    piece: &[usize],
    (from, width): (ValueId, u64),
    trained: &HashSet<ValueId>,
    heads: u64,
    low: bool,
) -> Kept {
    let walk = Walk::along(graph, piece, (from, width), trained, (heads, low));
    let owners: HashSet<ValueId> = walk.saved.iter().map(|&id| walk.owner(id)).collect();
    let copies = walk.copied.values().copied();
    Kept {
        kept: owners.iter().map(|&id| walk.size(id)).chain(copies).fold(Width::default(), Width::plus),
        widest: walk.widths.keys().map(|&id| walk.size(id)).fold(Width::default(), Width::larger),
    }
}

/// Elements per row of `to` where a row of `from` has `width`; `piece` lists the nodes between them.
pub fn width_at(graph: &Graph, piece: &[usize], (from, width): (ValueId, u64), to: ValueId) -> u64 {
    let walk = Walk::along(graph, piece, (from, width), &HashSet::new(), (1, false));
    walk.widths.get(&to).map_or(0, |width| width.own)
}

struct Walk<'a> {
    graph: &'a Graph,
    heads: u64,
    low: bool,
    /// Widths of the values that depend on the stream or on trained weights.
    widths: HashMap<ValueId, Width>,
    /// Maps a view to the value whose memory it shares.
    owners: HashMap<ValueId, ValueId>,
    /// Values in f32 of a pass with 16-bit activations.
    wide: HashSet<ValueId>,
    saved: HashSet<ValueId>,
    /// Elements of what nodes keep besides values, by the first output of the node.
    copied: HashMap<ValueId, Width>,
}

impl<'a> Walk<'a> {
    /// The widths of the values that these nodes compute, and what their gradients read.
    fn along(
        graph: &'a Graph,
        piece: &[usize],
        (from, width): (ValueId, u64),
        trained: &HashSet<ValueId>,
        (heads, low): (u64, bool),
    ) -> Self {
        let index = GraphIndex::new(graph);
        let mut walk = Walk {
            graph,
            heads,
            low,
            widths: HashMap::new(),
            owners: HashMap::new(),
            wide: HashSet::new(),
            saved: HashSet::new(),
            copied: HashMap::new(),
        };
        walk.widths.insert(from, Width { own: width, per_key: 0 });
        walk.widths.extend(trained.iter().map(|&id| (id, Width::default())));
        for &number in piece {
            let node = &graph.body.nodes[number];
            let moved = |id: ValueId| {
                index.node_of(id).is_some_and(|(number, _)| graph.body.nodes[number].op_type == "Transpose")
            };
            walk.node(node, moved);
        }
        walk
    }

    fn owner(&self, mut id: ValueId) -> ValueId {
        while let Some(&next) = self.owners.get(&id) {
            id = next;
        }
        id
    }

    /// Width of a value, in elements of the stream's type.
    fn size(&self, id: ValueId) -> Width {
        let width = self.widths.get(&id).copied().unwrap_or_default();
        if self.wide.contains(&id) { width.times(2) } else { width }
    }

    /// True when a node's results are in f32 in a pass with 16-bit activations.
    fn gives_wide(&self, node: &Node, flowing: &[ValueId]) -> bool {
        let wide = |id: &ValueId| self.wide.contains(id);
        let MixedPrecision { widens, rounds } = MixedPrecision::of(node);
        match node.op_type.as_str() {
            "Cast" => {
                matches!(node.attribute("to").and_then(Attribute::as_int), Some(to) if to == DataType::Float as i64)
            }
            _ if rounds => flowing.iter().all(wide),
            _ if widens => true,
            op if LOWERED.contains(&op) || ATTENTION.contains(&op) => false,
            _ => flowing.iter().any(wide),
        }
    }

    fn node(&mut self, node: &Node, moved: impl Fn(ValueId) -> bool) {
        let flowing: Vec<ValueId> = node.present_inputs().filter(|id| self.widths.contains_key(id)).collect();
        if flowing.is_empty() || node.reads_shape_only() {
            return;
        }
        let op = node.op_type.as_str();
        let width = self.result(node, &flowing);
        let outputs: Vec<ValueId> = node.present_outputs().collect();
        if self.low && self.gives_wide(node, &flowing) {
            self.wide.extend(&outputs);
        }
        for (number, &output) in outputs.iter().enumerate() {
            let own = match (op, ATTENTION.contains(&op), number) {
                ("Split", ..) => Width { own: width.own / outputs.len() as u64, ..width },
                // Outputs 1 and up are the keys and values of the cache.
                (_, true, 1..) => Width::default(),
                _ => width,
            };
            self.widths.insert(output, own);
            // Reshaping a transposed value copies it.
            let view = VIEWS.contains(&op) && !(op == "Reshape" && moved(flowing[0]));
            if view && self.wide.contains(&output) == self.wide.contains(&flowing[0]) {
                self.owners.insert(output, flowing[0]);
            }
        }
        // What is read in f32 is copied; what has it already is kept as it is.
        let reads_wide = self.low && MixedPrecision::of(node).widens;
        let (copied, flowing): (Vec<ValueId>, Vec<ValueId>) =
            flowing.into_iter().partition(|id| reads_wide && !self.wide.contains(id));
        let row = SAVES.iter().find(|(names, _)| names.contains(&op)).map_or(Saves::All, |(_, saves)| *saves);
        match row {
            Saves::Nothing => {}
            Saves::OtherFactor if flowing.len() + copied.len() > 1 => {
                self.saved.extend(flowing);
                // Both factors of a square are one tensor.
                self.copy(&outputs, &copied[..1.min(copied.len())], 2);
            }
            Saves::OtherFactor => {}
            Saves::Inputs => {
                self.saved.extend(flowing);
                self.copy(&outputs, &copied, 2);
            }
            Saves::Output => self.saved.extend(outputs.first()),
            Saves::All => {
                self.saved.extend(flowing.into_iter().chain(outputs.first().copied()));
                self.copy(&outputs, &copied, 2);
            }
            Saves::Normalised => {
                let (stream, scale): (Vec<ValueId>, Vec<ValueId>) =
                    flowing.iter().partition(|id| self.widths.get(id).is_some_and(|width| *width != Width::default()));
                let scaled = if scale.is_empty() { 0 } else { 1 };
                match self.low {
                    true => self.copy(&outputs, &stream[..1.min(stream.len())], 2 + scaled),
                    false => {
                        self.copy(&outputs, &stream[..1.min(stream.len())], scaled);
                        self.saved.extend(stream);
                    }
                }
                self.saved.extend(outputs.first());
            }
        }
    }

    /// Counts copies of values that a node keeps, of `each` elements for each of theirs.
    fn copy(&mut self, outputs: &[ValueId], values: &[ValueId], each: u64) {
        let width = |id: &ValueId| self.widths.get(id).copied().unwrap_or_default().times(each);
        let sum = values.iter().map(width).fold(Width::default(), Width::plus);
        if let Some(output) = outputs.first() {
            self.copied.insert(*output, sum);
        }
    }

    /// Width of a node's first output.
    fn result(&self, node: &Node, flowing: &[ValueId]) -> Width {
        let width = |id: &ValueId| self.widths.get(id).copied().unwrap_or_default();
        let largest = flowing.iter().map(width).fold(Width::default(), Width::larger);
        let op = node.op_type.as_str();
        if ATTENTION.contains(&op) {
            return flowing.first().map(width).unwrap_or_default();
        }
        match op {
            "Concat" => flowing.iter().map(width).fold(Width::default(), Width::plus),
            "ReduceMean" | "ReduceSum" | "ReduceMax" => Width { own: 1, per_key: 0 },
            // The second input gives the type alone.
            "CastLike" => node.inputs.first().copied().flatten().as_ref().map(width).unwrap_or_default(),
            "MatMul" | "Gemm" | "FusedMatMul" | "MatMulNBits" => match (self.sides(node), flowing) {
                (Some((rows, columns)), [x, ..]) => {
                    let x = width(x);
                    Width { own: (x.own * columns).checked_div(rows).unwrap_or(0), per_key: 0 }
                }
                (None, [a, b, ..]) => match (width(a), width(b)) {
                    (a, b) if a.per_key == 0 && b.per_key == 0 => Width { own: 0, per_key: self.heads },
                    (a, b) => Width { own: a.own.max(b.own), per_key: 0 },
                },
                _ => largest,
            },
            _ => largest,
        }
    }

    /// Rows and columns of a product's weight; `None` for a product of two values that depend on the stream.
    fn sides(&self, node: &Node) -> Option<(u64, u64)> {
        let int = |node: &Node, name: &str| node.attribute(name).and_then(crate::ir::Attribute::as_int).unwrap_or(0);
        let sizes = |node: &Node| Some((u64::try_from(int(node, "K")).ok()?, u64::try_from(int(node, "N")).ok()?));
        if node.op_type == "MatMulNBits" {
            return sizes(node);
        }
        let mut weight = node.inputs.get(1).copied().flatten()?;
        let mut turned = int(node, "transB") != 0;
        // A weight may be transposed, cast or dequantised before the product.
        while self.graph.body.initializer(weight).is_none() {
            let maker = self.graph.body.nodes.iter().find(|maker| maker.present_outputs().any(|id| id == weight))?;
            if maker.op_type == EXPANDED_BLOCKS {
                let (rows, columns) = sizes(maker)?;
                return Some(if turned { (columns, rows) } else { (rows, columns) });
            }
            if !["Transpose", "Cast", "DequantizeLinear", "Identity"].contains(&maker.op_type.as_str()) {
                return None;
            }
            turned ^= maker.op_type == "Transpose";
            weight = maker.inputs.first().copied().flatten()?;
        }
        match self.graph.body.initializer(weight)?.dims.as_slice() {
            [rows, columns] => Some(if turned { (*columns, *rows) } else { (*rows, *columns) }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Model, Tensor, Value};
    use crate::rewrite::fuse_kernels;

    /// `h + down(silu(gate(x)) * up(x))` with `x` the stream, built by hand: width 8, 20 inside.
    fn mlp(trained: bool) -> Kept {
        let mut model = Model::default();
        let graph = &mut model.graph;
        let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
        let [h, gate, sigmoid, active, up, product, down, out, w0, w1, w2] =
            ["h", "gate", "sigmoid", "active", "up", "product", "down", "out", "w0", "w1", "w2"].map(&mut value);
        for (id, dims) in [(w0, [8, 20]), (w1, [8, 20]), (w2, [20, 8])] {
            graph.body.initializers.push((id, Tensor::from_f32(&dims, &[0.0; 160])));
        }
        let node = |op: &str, inputs: [Option<ValueId>; 2], output: ValueId| Node {
            op_type: op.into(),
            inputs: inputs.into_iter().flatten().map(Some).collect(),
            outputs: vec![Some(output)],
            ..Node::default()
        };
        graph.body.inputs = vec![h];
        graph.body.nodes = vec![
            node("MatMul", [Some(h), Some(w0)], gate),
            node("Sigmoid", [Some(gate), None], sigmoid),
            node("Mul", [Some(gate), Some(sigmoid)], active),
            node("MatMul", [Some(h), Some(w1)], up),
            node("Mul", [Some(active), Some(up)], product),
            node("MatMul", [Some(product), Some(w2)], down),
            node("Add", [Some(h), Some(down)], out),
        ];
        graph.body.outputs = vec![out];
        let compiled = fuse_kernels(&model).0.graph;
        let trained: HashSet<ValueId> = if trained { [w0, w1, w2].into() } else { HashSet::new() };
        let piece = crate::finetune::cut::nodes_between(&compiled, h, out);
        of_layer(&compiled, &piece, (h, 8), &trained, 2, false)
    }

    #[test]
    fn values_read_by_gradients_are_counted_once() {
        // `gate` for the SiLU; its result and `up` for the product.
        let frozen = mlp(false);
        assert_eq!((frozen.kept, frozen.widest), (Width { own: 60, per_key: 0 }, Width { own: 20, per_key: 0 }));
        // With trained weights also the stream and the product, for the gradients of the weights.
        assert_eq!(mlp(true).kept, Width { own: 88, per_key: 0 });
    }

    /// A normalisation in five nodes and one in a single node, of a stream of width 8.
    #[test]
    fn normalisations_keep_f32_copies_of_a_16_bit_stream() {
        let kept = |ops: &[(&str, &[usize])], trained: bool, low: bool| {
            let mut graph = Graph::default();
            let mut value = |number: usize| graph.add_value(Value { name: number.to_string(), ..Value::default() });
            let ids: Vec<ValueId> = (0..9).map(&mut value).collect();
            let nodes = ops.iter().enumerate().map(|(place, (op, inputs))| Node {
                op_type: (*op).into(),
                inputs: inputs.iter().map(|&input| Some(ids[input])).collect(),
                outputs: vec![Some(ids[place + 1])],
                ..Node::default()
            });
            graph.body.nodes = nodes.collect();
            let trained = if trained { [ids[8]].into() } else { HashSet::new() };
            let piece: Vec<usize> = (0..ops.len()).collect();
            of_layer(&graph, &piece, (ids[0], 8), &trained, 1, low).kept.own
        };
        // Value 0 is the stream, 7 a constant, 8 the scale.
        let apart: &[(&str, &[usize])] = &[
            ("Pow", &[0, 7]),
            ("ReduceMean", &[1]),
            ("Add", &[2, 7]),
            ("Sqrt", &[3]),
            ("Div", &[0, 4]),
            ("Mul", &[5, 8]),
        ];
        // The stream, and the root of one number. In 16 bits also what is squared, in f32, and the root counts twice.
        assert_eq!([kept(apart, false, false), kept(apart, false, true)], [8 + 1, 8 + 16 + 2]);
        // With a trained scale also what it multiplies, in 16 bits.
        assert_eq!([kept(apart, true, false), kept(apart, true, true)], [8 + 1 + 8, 8 + 16 + 2 + 8]);
        let square: &[(&str, &[usize])] =
            &[("Mul", &[0, 0]), ("ReduceMean", &[1]), ("Add", &[2, 7]), ("Sqrt", &[3]), ("Div", &[0, 4])];
        assert_eq!([kept(square, false, false), kept(square, false, true)], [8 + 1, 8 + 16 + 2]);
        let joined: &[(&str, &[usize])] = &[("SimplifiedLayerNormalization", &[0, 8])];
        assert_eq!([kept(joined, false, false), kept(joined, false, true)], [8 + 8, 16 + 8]);
        assert_eq!([kept(joined, true, false), kept(joined, true, true)], [8 + 8 + 8, 16 + 8 + 8]);
    }

    #[test]
    fn unfused_attention_keeps_one_number_per_head_and_key() {
        let mut graph = Graph::default();
        let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
        let [h, keys, scores, weights, mixed] = ["h", "keys", "scores", "weights", "mixed"].map(&mut value);
        let node = |op: &str, inputs: &[ValueId], output: ValueId| Node {
            op_type: op.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: vec![Some(output)],
            ..Node::default()
        };
        graph.body.inputs = vec![h];
        graph.body.nodes = vec![
            node("Transpose", &[h], keys),
            node("MatMul", &[h, keys], scores),
            node("Softmax", &[scores], weights),
            node("MatMul", &[weights, h], mixed),
        ];
        graph.body.outputs = vec![mixed];
        let kept = of_layer(&graph, &[0, 1, 2, 3], (h, 64), &HashSet::new(), 4, false);
        // The stream, whose transposed view is `keys`, and the attention weights of 4 heads.
        assert_eq!(kept.kept, Width { own: 64, per_key: 4 });
        assert_eq!(kept.kept.at(10), 104);
    }
}
