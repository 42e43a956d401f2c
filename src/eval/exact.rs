//! Converts a graph so that it computes everything in f32 or wider.

use crate::base::Result;
use crate::ir::{self, DataType, Model};
use crate::rewrite::widened;
use crate::runtime::{Optimisation, Session, SessionOptions, TensorValue};

/// `accuracy_level` of `MatMulNBits` for products in f32, as in the interpreter. The default, 0, also means f32.
const F32_ACCURACY_LEVEL: i64 = 1;

/// Session options for comparisons with the interpreter: activations are not rounded when the graph
/// leaves this to the engine.
pub const EXACT: SessionOptions =
    SessionOptions { threads: None, optimisation: Optimisation::All, exact_products: true, memory_limit: None };

/// The graph with f32 in place of 16-bit floats and of rounded activations in products; `None` when it already has this
/// form. The interpreter computes in this form, so ONNX Runtime runs this graph in comparisons.
pub fn in_f32(model: &Model) -> Option<Model> {
    let wide = widened(model);
    if find_node(&model.graph.body, &rounds_activations).is_none() {
        return wide;
    }
    let mut exact = wide.unwrap_or_else(|| model.clone());
    level_body(&mut exact.graph.body);
    Some(exact)
}

/// The largest relative error of rounding one operator's result to the graph's 16-bit floats; `None`
/// when it has no such floats.
pub fn unit_roundoff(model: &Model) -> Option<f64> {
    let values = model.graph.values.iter().filter_map(|value| value.ty.as_ref()?.dtype());
    let weights = model.graph.body.initializers.iter().map(|(_, tensor)| tensor.dtype);
    let bits = values.chain(weights).filter_map(|dtype| match dtype {
        DataType::Bfloat16 => Some(8),
        DataType::Float16 => Some(11),
        _ => None,
    });
    bits.min().map(|bits| f64::powi(2.0, -bits))
}

/// The tensors converted to the session's declared types, for floats only.
pub fn in_types_of(session: &Session, feeds: &[(String, TensorValue)]) -> Result<Vec<(String, TensorValue)>> {
    let mut converted = Vec::with_capacity(feeds.len());
    for (name, tensor) in feeds {
        let wanted = session.input(name).map_or(tensor.dtype()?, |port| port.dtype);
        let tensor = if tensor.dtype()?.is_float() && wanted.is_float() {
            TensorValue::from_f32(wanted, &tensor.shape(), tensor.to_f32()?.into_owned())?
        } else {
            TensorValue::from_ir(&tensor.to_ir()?)?
        };
        converted.push((name.clone(), tensor));
    }
    Ok(converted)
}

/// True when ONNX Runtime rounds the activations of a product (to 8 bits at level 4) and the interpreter does not.
fn rounds_activations(node: &ir::Node) -> bool {
    let level = node.attribute("accuracy_level").and_then(ir::Attribute::as_int);
    node.op_type == "MatMulNBits" && level.is_some_and(|level| level > F32_ACCURACY_LEVEL)
}

fn level_body(body: &mut ir::Body) {
    for node in &mut body.nodes {
        if rounds_activations(node) {
            for (_, level) in node.attributes.iter_mut().filter(|(name, _)| name == "accuracy_level") {
                level.kind = ir::AttributeKind::Int(F32_ACCURACY_LEVEL);
            }
        }
        node.bodies_mut().for_each(level_body);
    }
}

/// The first node for which the test is true, nested bodies included.
pub fn find_node<'a>(body: &'a ir::Body, test: &dyn Fn(&ir::Node) -> bool) -> Option<&'a ir::Node> {
    body.nodes.iter().find_map(|node| {
        if test(node) {
            return Some(node);
        }
        node.bodies().find_map(|inner| find_node(inner, test))
    })
}
