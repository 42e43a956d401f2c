//! Bytes of the models that ONNX Runtime runs: the frozen layers and the dense model.

use std::collections::HashSet;

use crate::ir::{Body, DataType, Graph, ValueId};

/// Smallest number of elements of a weight that counts as one.
const SMALL: u64 = 4096;

/// Bytes of the models that ONNX Runtime runs, each with the components that embed its prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sessions {
    /// The frozen layers.
    pub prefix: u64,
    /// The dense model; 0 without one.
    pub dense: u64,
    /// True when the dense model computes the frozen layers' output too.
    pub in_dense: bool,
}

impl Sessions {
    /// Bytes when one model runs after the other.
    pub fn one_at_a_time(&self) -> u64 {
        self.prefix.max(self.dense)
    }

    /// Bytes of the models that stay loaded between steps. `reads_dense`: whether a loss term reads the dense model.
    pub fn together(&self, reads_dense: bool) -> u64 {
        match (reads_dense && self.dense > 0, self.in_dense) {
            (false, _) => self.prefix,
            (true, true) => self.dense,
            (true, false) => self.prefix + self.dense,
        }
    }
}

/// Bytes that a session of ONNX Runtime holds of a graph's weights. On a CPU it has no products in f16 and bf16: it keeps
/// an f32 copy of each such weight besides the weight of the file, but not of tables that only `Gather` reads.
pub fn session_bytes(graph: &Graph, on_gpu: bool) -> u64 {
    let mut computed = HashSet::new();
    read_by_other_than_gather(&graph.body, &mut computed);
    let weights = graph.body.initializers.iter().map(|(id, tensor)| {
        let narrow = matches!(tensor.dtype, DataType::Float16 | DataType::Bfloat16);
        let copied = !on_gpu && narrow && tensor.element_count() > SMALL && computed.contains(id);
        tensor.byte_len() + if copied { 4 * tensor.element_count() } else { 0 }
    });
    weights.sum()
}

fn read_by_other_than_gather(body: &Body, found: &mut HashSet<ValueId>) {
    for node in &body.nodes {
        if node.op_type != "Gather" {
            found.extend(node.present_inputs());
        }
        node.bodies().for_each(|inner| read_by_other_than_gather(inner, found));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Node, Tensor, Value};

    /// A table that `Gather` reads, a product in f16, one in f32, and a small f16 weight.
    #[test]
    fn weights_in_f16_have_copies_in_f32_on_a_cpu_but_tables_have_none() {
        let mut graph = Graph::default();
        let weights = [("table", DataType::Float16, 100), ("w", DataType::Float16, 90), ("v", DataType::Float, 80)];
        for (name, dtype, side) in weights.into_iter().chain([("small", DataType::Float16, 10)]) {
            let id = graph.add_value(Value { name: name.to_string(), ..Value::default() });
            let tensor =
                Tensor::from_bytes(dtype, &[side, side], vec![0; side as usize * side as usize * dtype.bits() / 8]);
            graph.body.initializers.push((id, tensor));
            let op = if name == "table" { "Gather" } else { "MatMul" };
            graph.body.nodes.push(Node { op_type: op.to_string(), inputs: vec![Some(id)], ..Node::default() });
        }
        let files = 2 * 10_000 + 2 * 8_100 + 4 * 6_400 + 2 * 100;
        assert_eq!(session_bytes(&graph, true), files);
        assert_eq!(session_bytes(&graph, false), files + 4 * 8_100);
    }

    /// The dense model stands in for the frozen layers only where it computes the same.
    #[test]
    fn models_that_stay_loaded_are_added_unless_one_stands_in_for_the_other() {
        let apart = Sessions { prefix: 3, dense: 10, in_dense: false };
        assert_eq!((apart.one_at_a_time(), apart.together(true), apart.together(false)), (10, 13, 3));
        assert_eq!(Sessions { in_dense: true, ..apart }.together(true), 10);
        assert_eq!(Sessions { dense: 0, ..apart }.together(true), 3);
    }
}
