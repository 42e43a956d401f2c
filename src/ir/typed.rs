//! What of a graph has an element type.

use super::{AttributeKind, Body, DataType, Graph, Model, ValueType};

/// Attributes that are the number of an element type, whatever operator has them: of casts, of constants and random numbers, of
/// windows, of quantisation, and the type in which a normalisation computes.
const TYPES: &[&str] = &["to", "dtype", "output_dtype", "output_datatype", "stash_type"];

/// Weights, inputs, outputs and nodes with a constant or an attribute of an element type, in bodies and functions too, each as
/// messages show it.
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
        let makes = |name: &str, kind: &AttributeKind| match kind {
            AttributeKind::Tensor(tensor) => tensor.dtype == dtype,
            AttributeKind::Int(number) => TYPES.contains(&name) && *number == dtype as i64,
            _ => false,
        };
        if node.attributes.iter().any(|(name, attribute)| makes(name, &attribute.kind)) {
            found.push(node.describe(graph));
        }
        node.bodies().for_each(|inner| of_body(graph, inner, dtype, found));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Node, Value};

    #[test]
    fn an_attribute_that_is_a_type_is_found_on_every_operator_and_a_flag_is_none() {
        let found = |operator: &str, attribute: &str, number: i64| {
            let mut graph = Graph::default();
            let made = graph.add_value(Value { name: "made".into(), ..Value::default() });
            graph.body.nodes.push(Node {
                op_type: operator.into(),
                outputs: vec![Some(made)],
                attributes: vec![(attribute.into(), AttributeKind::Int(number).into())],
                ..Node::default()
            });
            of_type(&Model { graph, ..Model::default() }, DataType::Bfloat16).len()
        };
        for (operator, attribute) in [
            ("Cast", "to"),
            ("BitCast", "to"),
            ("EyeLike", "dtype"),
            ("RandomNormalLike", "dtype"),
            ("DequantizeLinear", "output_dtype"),
            ("HannWindow", "output_datatype"),
            ("LayerNormalization", "stash_type"),
        ] {
            assert_eq!(found(operator, attribute, 16), 1, "{operator}");
            assert_eq!(found(operator, attribute, 1), 0, "{operator}");
        }
        for (operator, attribute) in [("Cast", "saturate"), ("MatMulNBits", "block_size"), ("Softmax", "axis")] {
            assert_eq!(found(operator, attribute, 16), 0, "{operator}");
        }
    }
}
