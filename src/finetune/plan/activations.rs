//! Activation memory of a layer: the number of elements per token that the backward pass needs. They are counted on the
//! graph from the operands and results that the gradient of each operator reads. A view shares the memory of its
//! source.
//!
//! Widths are propagated from the residual stream, because few graphs state their shapes. A product with a weight `[K,
//! N]` maps width `K` to width `N`. A product of two values that both depend on the stream belongs to attention: the
//! scores have one element per head and key.

use std::collections::{HashMap, HashSet};

use crate::ir::{Graph, GraphIndex, Node, ValueId};
use crate::rewrite::{EXPANDED_BLOCKS, ROUNDED, ROUNDED_DYNAMICALLY};

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
/// attention heads.
pub fn of_layer(
    graph: &Graph,
    piece: &[usize],
    (from, width): (ValueId, u64),
    trained: &HashSet<ValueId>,
    heads: u64,
) -> Kept {
    let walk = Walk::along(graph, piece, (from, width), trained, heads);
    let owners: HashSet<ValueId> = walk.saved.iter().map(|&id| walk.owner(id)).collect();
    let width_of = |id: &ValueId| walk.widths.get(id).copied().unwrap_or_default();
    Kept {
        kept: owners.iter().map(width_of).fold(Width::default(), Width::plus),
        widest: walk.widths.values().copied().fold(Width::default(), Width::larger),
    }
}

/// Elements per row of `to` where a row of `from` has `width`; `piece` lists the nodes between them.
pub fn width_at(graph: &Graph, piece: &[usize], (from, width): (ValueId, u64), to: ValueId) -> u64 {
    let walk = Walk::along(graph, piece, (from, width), &HashSet::new(), 1);
    walk.widths.get(&to).map_or(0, |width| width.own)
}

struct Walk<'a> {
    graph: &'a Graph,
    heads: u64,
    /// Widths of the values that depend on the stream or on trained weights.
    widths: HashMap<ValueId, Width>,
    /// Maps a view to the value whose memory it shares.
    owners: HashMap<ValueId, ValueId>,
    saved: HashSet<ValueId>,
}

impl<'a> Walk<'a> {
    /// The widths of the values that these nodes compute, and what their gradients read.
    fn along(
        graph: &'a Graph,
        piece: &[usize],
        (from, width): (ValueId, u64),
        trained: &HashSet<ValueId>,
        heads: u64,
    ) -> Self {
        let index = GraphIndex::new(graph);
        let mut walk = Walk { graph, heads, widths: HashMap::new(), owners: HashMap::new(), saved: HashSet::new() };
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

    fn node(&mut self, node: &Node, moved: impl Fn(ValueId) -> bool) {
        let flowing: Vec<ValueId> = node.present_inputs().filter(|id| self.widths.contains_key(id)).collect();
        if flowing.is_empty() || node.reads_shape_only() {
            return;
        }
        let op = node.op_type.as_str();
        let width = self.result(node, &flowing);
        let outputs: Vec<ValueId> = node.present_outputs().collect();
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
            if view {
                self.owners.insert(output, flowing[0]);
            }
        }
        let row = SAVES.iter().find(|(names, _)| names.contains(&op)).map_or(Saves::All, |(_, saves)| *saves);
        match row {
            Saves::Nothing => {}
            Saves::OtherFactor if flowing.len() > 1 => self.saved.extend(flowing),
            Saves::OtherFactor => {}
            Saves::Inputs => self.saved.extend(flowing),
            Saves::Output => self.saved.extend(outputs.first()),
            Saves::All => self.saved.extend(flowing.into_iter().chain(outputs.first().copied())),
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
        of_layer(&compiled, &piece, (h, 8), &trained, 2)
    }

    #[test]
    fn values_read_by_gradients_are_counted_once() {
        // `gate` for the SiLU; its result and `up` for the product.
        let frozen = mlp(false);
        assert_eq!((frozen.kept, frozen.widest), (Width { own: 60, per_key: 0 }, Width { own: 20, per_key: 0 }));
        // With trained weights also the stream and the product, for the gradients of the weights.
        assert_eq!(mlp(true).kept, Width { own: 88, per_key: 0 });
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
        let kept = of_layer(&graph, &[0, 1, 2, 3], (h, 64), &HashSet::new(), 4);
        // The stream, whose transposed view is `keys`, and the attention weights of 4 heads.
        assert_eq!(kept.kept, Width { own: 64, per_key: 4 });
        assert_eq!(kept.kept.at(10), 104);
    }
}
