//! What of a graph has an element type.

use super::{AttributeKind, Body, DataType, Graph, Model, ValueType};

/// Weights, inputs, outputs and casts of an element type, in bodies and functions too, each as messages show it.
pub fn of_type(model: &Model, dtype: DataType) -> Vec<String> {
    let mut found = Vec::new();
    for graph in std::iter::once(&model.graph).chain(model.functions.iter().map(|function| &function.graph)) {
        of_body(graph, &graph.body, dtype, &mut found);
    }
    found
}

fn of_body(graph: &Graph, body: &Body, dtype: DataType, found: &mut Vec<String>) {
    let weights = body.initializers.iter().filter(|(_, tensor)| tensor.dtype == dtype);
    found.extend(weights.map(|(id, _)| format!("initializer `{}`", graph.name(*id))));
    let ports = body.inputs.iter().filter(|id| body.initializer(**id).is_none()).map(|id| ("input", id));
    for (what, id) in ports.chain(body.outputs.iter().map(|id| ("output", id))) {
        if matches!(graph.value(*id).ty, Some(ValueType::Tensor { dtype: own, .. }) if own == dtype) {
            found.push(format!("{what} `{}`", graph.name(*id)));
        }
    }
    for node in &body.nodes {
        let makes = |kind: &AttributeKind| match kind {
            AttributeKind::Tensor(tensor) => tensor.dtype == dtype,
            AttributeKind::Int(to) => node.op_type == "Cast" && *to == dtype as i64,
            _ => false,
        };
        if node.attributes.iter().any(|(_, attribute)| makes(&attribute.kind)) {
            found.push(node.describe(graph));
        }
        node.bodies().for_each(|inner| of_body(graph, inner, dtype, found));
    }
}
