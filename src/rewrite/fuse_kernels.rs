//! Fuses chains of nodes for which LibTorch has one kernel: attention and SiLU.

use crate::ir::{GraphIndex, Model, Node};

use super::fuse_attention::fuse_attention;
use super::internal::{INTERNAL_DOMAIN, standard};

/// `x * sigmoid(x)`, one input.
pub const FUSED_SILU: &str = "FusedSilu";

/// Number of fused nodes by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fused {
    /// Attentions, each from the scaled product of queries and keys to the product with the values.
    pub attention: usize,
    /// Products of a value with its own sigmoid.
    pub silu: usize,
}

/// The model with one node for each recognised attention and SiLU. Values keep their ids; nodes that are no longer read
/// stay in the graph.
///
/// Normalisation is not fused: on a CPU, LibTorch computes its RMS norm with the same chain of operations, forward and
/// backward, in the same time.
pub fn fuse_kernels(model: &Model) -> (Model, Fused) {
    let mut fused = model.clone();
    let count = Fused { attention: fuse_attention(model, &mut fused), silu: fuse_silu(model, &mut fused) };
    if count != Fused::default() {
        fused.opset_imports.insert(INTERNAL_DOMAIN.into(), 1);
    }
    (fused, count)
}

/// `Mul(x, Sigmoid(x))` with no other reader of the sigmoid.
fn fuse_silu(model: &Model, fused: &mut Model) -> usize {
    let nodes = &model.graph.body.nodes;
    let index = GraphIndex::new(&model.graph);
    let mut count = 0;
    for (number, node) in nodes.iter().enumerate() {
        let (true, &[Some(left), Some(right)]) = (standard(node, "Mul"), node.inputs.as_slice()) else { continue };
        let sigmoid_of = |id, x| {
            let made = index.node_of(id).and_then(|(number, _)| nodes.get(number));
            made.is_some_and(|made| standard(made, "Sigmoid") && made.inputs.as_slice() == [Some(x)])
                && index.uses(id).len() == 1
                && index.output_position(id).is_none()
        };
        let x = if sigmoid_of(right, left) {
            left
        } else if sigmoid_of(left, right) {
            right
        } else {
            continue;
        };
        fused.graph.body.nodes[number] = Node {
            name: node.name.clone(),
            op_type: FUSED_SILU.into(),
            domain: INTERNAL_DOMAIN.into(),
            inputs: vec![Some(x)],
            outputs: node.outputs.clone(),
            ..Node::default()
        };
        count += 1;
    }
    count
}
