//! Data dependencies: inputs of nodes, and values computed from weights alone.

use std::collections::HashSet;

use crate::ir::{Body, DataType, Graph, GraphIndex, Node, Tensor, ValueId};

/// The inputs of a node, including those that bodies inside it capture.
pub fn data_inputs(body: &Body, node: usize) -> Vec<ValueId> {
    let node = &body.nodes[node];
    let mut inputs: Vec<ValueId> = node.present_inputs().collect();
    for inner in node.bodies() {
        inputs.extend(crate::ir::captured(inner));
    }
    inputs
}

/// True when a value is computed from initializers alone.
pub fn from_weights(body: &Body, index: &GraphIndex, value: ValueId) -> bool {
    let mut open = vec![value];
    let mut seen = HashSet::new();
    while let Some(value) = open.pop() {
        match index.node_of(value) {
            Some((node, _)) => {
                if seen.insert(node) {
                    open.extend(body.nodes[node].present_inputs());
                }
            }
            None if index.is_initializer(value) => {}
            None => return false,
        }
    }
    true
}

/// The tensor of an initializer or of a `Constant` node.
pub fn constant_tensor<'b>(body: &'b Body, index: &GraphIndex, value: ValueId) -> Option<&'b Tensor> {
    match index.node_of(value) {
        Some((number, _)) => {
            let node = body.nodes.get(number).filter(|node| node.op_type == "Constant")?;
            node.attribute("value")?.as_tensor()
        }
        None => body.initializer(value),
    }
}

/// The graph input of which a `Slice` or `Split` takes a part of each row: an exporter that packs features behind the
/// embeddings in one tensor separates them in this way.
pub fn part_of_rows(graph: &Graph, body: &Body, node: &Node) -> Option<ValueId> {
    let input = node.inputs.first().copied().flatten()?;
    let ty = graph.value(input).ty.as_ref()?;
    let rows = ty.dtype().is_some_and(DataType::is_float) && ty.shape().is_some_and(|shape| shape.len() == 3);
    (rows && matches!(node.op_type.as_str(), "Slice" | "Split") && body.inputs.contains(&input)).then_some(input)
}
