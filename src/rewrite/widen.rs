//! Replaces 16-bit floats by f32.

use crate::ir::{Attribute, AttributeKind, Body, DataType, Graph, Model, Tensor, Value, ValueType};

use super::build::{ADDED_PREFIX, operator};

/// Attributes that hold an element type, over all operators.
pub const TYPE_ATTRIBUTES: &[&str] =
    &["to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type"];

/// The model with f32 in place of f16 and bf16; its results differ by rounding only. Weights stay in the file's type,
/// each followed by a cast. `None` when the model has no 16-bit floats.
pub fn widened(model: &Model) -> Option<Model> {
    let mut wide = model.clone();
    let mut found = widen_graph(&mut wide.graph);
    for function in &mut wide.functions {
        found |= widen_graph(&mut function.graph);
        for (name, attribute) in &mut function.attribute_defaults {
            found |= widen_attribute(name, attribute);
        }
    }
    found.then_some(wide)
}

fn is_narrow(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float16 | DataType::Bfloat16)
}

fn widen_graph(graph: &mut Graph) -> bool {
    let mut found = false;
    for value in &mut graph.values {
        if let Some(ValueType::Tensor { dtype, .. }) = &mut value.ty
            && is_narrow(*dtype)
        {
            *dtype = DataType::Float;
            found = true;
        }
    }
    let mut body = std::mem::take(&mut graph.body);
    found |= widen_body(graph, &mut body);
    graph.body = body;
    found
}

fn widen_body(graph: &mut Graph, body: &mut Body) -> bool {
    let mut found = false;
    let mut casts = Vec::new();
    for (id, tensor) in &mut body.initializers {
        if !is_narrow(tensor.dtype) {
            continue;
        }
        found = true;
        if body.inputs.contains(id) {
            // The default value of an input has the type of the input.
            widen_tensor(tensor);
            continue;
        }
        let name = format!("{ADDED_PREFIX}stored.{}", graph.values.len());
        let stored = graph.add_value(Value { name, ..Value::default() });
        casts.push(operator("Cast", &[stored], *id, &[("to", AttributeKind::Int(DataType::Float as i64))]));
        *id = stored;
    }
    for node in &mut body.nodes {
        for (name, attribute) in &mut node.attributes {
            found |= widen_attribute(name, attribute);
            for inner in attribute.bodies_mut() {
                found |= widen_body(graph, inner);
            }
        }
    }
    body.nodes.splice(0..0, casts);
    found
}

fn widen_attribute(name: &str, attribute: &mut Attribute) -> bool {
    let tensors = match &mut attribute.kind {
        AttributeKind::Int(number) if TYPE_ATTRIBUTES.contains(&name) => {
            let dtype = i32::try_from(*number).ok().and_then(DataType::from_number);
            if !dtype.is_some_and(is_narrow) {
                return false;
            }
            *number = DataType::Float as i64;
            return true;
        }
        AttributeKind::Tensor(tensor) => std::slice::from_mut(tensor),
        AttributeKind::Tensors(tensors) => tensors.as_mut_slice(),
        _ => return false,
    };
    let mut found = false;
    for tensor in tensors {
        found |= widen_tensor(tensor);
    }
    found
}

fn widen_tensor(tensor: &mut Tensor) -> bool {
    let numbers = if is_narrow(tensor.dtype) { tensor.to_f64s() } else { None };
    let Some(numbers) = numbers else { return false };
    let numbers: Vec<f32> = numbers.into_iter().map(|number| number as f32).collect();
    *tensor = Tensor::from_f32(&tensor.dims, &numbers);
    true
}
