//! Products with a weight that the graph holds in floats.

use crate::ir::{Attribute, Graph, GraphIndex, Node, ValueId};

/// `operand @ weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// `[B, T, K]` or with rows joined, `[B * T, K]`.
    pub operand: ValueId,
    /// `[K, D]`, or `[D, K]` when `transposed`.
    pub weight: ValueId,
    /// True when the weight is stored transposed.
    pub transposed: bool,
    /// `K`.
    pub width: usize,
}

impl Projection {
    /// The projection that a `MatMul` or `Gemm` computes, its weight an initializer or the transpose of one; `None` for other
    /// nodes.
    pub fn of(graph: &Graph, index: &GraphIndex, node: &Node) -> Option<Self> {
        let &[Some(operand), Some(right), ..] = node.inputs.as_slice() else { return None };
        let flag = |name: &str| node.attribute(name).map_or(Some(0), Attribute::as_int).map(|value| value != 0);
        let mut transposed = match node.op_type.as_str() {
            "MatMul" => false,
            "Gemm" => {
                let alpha = node.attribute("alpha").map_or(Some(1.0), Attribute::as_float)?;
                if alpha != 1.0 || flag("transA")? {
                    return None;
                }
                flag("transB")?
            }
            _ => return None,
        };
        let mut weight = right;
        if let Some((number, _)) = index.node_of(right) {
            let turn = &graph.body.nodes[number];
            let swaps = turn.attribute("perm").is_none_or(|perm| perm.as_ints() == Some(&[1, 0]));
            if turn.op_type != "Transpose" || !swaps {
                return None;
            }
            weight = turn.present_inputs().next()?;
            transposed = !transposed;
        }
        let &[rows, columns] = graph.body.initializer(weight)?.dims.as_slice() else { return None };
        let width = usize::try_from(if transposed { columns } else { rows }).ok()?;
        Some(Projection { operand, weight, transposed, width })
    }
}
