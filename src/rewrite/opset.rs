//! Raises a model to a later version of the default operator set.
//!
//! From version 13 to 24, later versions of an operator accept all that earlier ones do (more types, optional inputs and
//! attributes), except for the operators in [`CHANGES`]. Source: the changelog of the ONNX operators.

use crate::base::{Error, Result};
use crate::ir::{Attribute, AttributeKind, Body, Graph, Model, Node, Tensor, Value};

use super::build::operator;

/// First version from which a model can be raised, and last version to which.
const VERSIONS: std::ops::RangeInclusive<i64> = 13..=24;

type Convert = fn(&mut Node, &mut Graph, &mut Vec<Node>) -> Result<()>;

/// Operators that a version of the operator set changed, with the conversion of a node to that version. Nodes that a
/// conversion adds are pushed before the node.
const CHANGES: &[(&str, i64, Convert)] = &[
    ("BatchNormalization", 14, refuse),
    ("RoiAlign", 16, |node, _, _| {
        default_attribute(node, "coordinate_transformation_mode", b"output_half_pixel");
        Ok(())
    }),
    ("ReduceL1", 18, axes_as_input),
    ("ReduceL2", 18, axes_as_input),
    ("ReduceLogSum", 18, axes_as_input),
    ("ReduceLogSumExp", 18, axes_as_input),
    ("ReduceMax", 18, axes_as_input),
    ("ReduceMean", 18, axes_as_input),
    ("ReduceMin", 18, axes_as_input),
    ("ReduceProd", 18, axes_as_input),
    ("ReduceSumSquare", 18, axes_as_input),
    ("Split", 18, count_of_parts),
    ("DFT", 20, refuse),
    ("GridSample", 20, refuse),
    ("GroupNormalization", 21, refuse),
];

/// The model in version `version` of the default operator set, with its functions.
///
/// Errors: `Error::Unsupported` when the version is earlier than the model's or out of range, or when an operator is not
/// converted.
pub fn raise_opset(model: &Model, version: i64) -> Result<Model> {
    let own = model.opset_imports.get("").copied().unwrap_or(version);
    let mut raised = model.clone();
    if own == version {
        return Ok(raised);
    }
    if own > version || !VERSIONS.contains(&own) || !VERSIONS.contains(&version) {
        let (from, to) = (VERSIONS.start(), VERSIONS.end());
        return Err(Error::unsupported(
            format!("graph `{}` in opset {version}", model.graph.body.name),
            format!("it is of opset {own}; opsets {from} to {to} are raised, none is lowered"),
        )
        .remedy(match VERSIONS.contains(&own) && own < version {
            true => format!("give `--opset` {own} to {to}"),
            false => format!("leave `--opset` out, or export the graph again in opset {version}"),
        }));
    }
    raise(&mut raised.graph, own, version)?;
    for function in &mut raised.functions {
        if let Some(own) = function.opset_imports.get("").copied().filter(|own| *own < version) {
            raise(&mut function.graph, own, version)?;
            function.opset_imports.insert(String::new(), version);
        }
    }
    raised.opset_imports.insert(String::new(), version);
    crate::ir::check(&raised)?;
    Ok(raised)
}

fn raise(graph: &mut Graph, from: i64, to: i64) -> Result<()> {
    let mut body = std::mem::take(&mut graph.body);
    let done = raise_body(&mut body, graph, from, to);
    graph.body = body;
    done
}

fn raise_body(body: &mut Body, graph: &mut Graph, from: i64, to: i64) -> Result<()> {
    let mut nodes = Vec::with_capacity(body.nodes.len());
    for mut node in std::mem::take(&mut body.nodes) {
        for inner in node.bodies_mut() {
            raise_body(inner, graph, from, to)?;
        }
        for (op_type, version, convert) in CHANGES {
            if node.domain.is_empty() && node.op_type == *op_type && from < *version && *version <= to {
                convert(&mut node, graph, &mut nodes)?;
            }
        }
        nodes.push(node);
    }
    body.nodes = nodes;
    Ok(())
}

fn refuse(node: &mut Node, graph: &mut Graph, _: &mut Vec<Node>) -> Result<()> {
    Err(Error::unsupported(node.describe(graph), "changed its meaning in a later opset and is not converted")
        .remedy("export all graphs of the model in one opset"))
}

/// Sets an attribute that has no value, for an operator whose default changed.
fn default_attribute(node: &mut Node, name: &str, value: &[u8]) {
    if node.attribute(name).is_none() {
        node.attributes.push((name.into(), Attribute::from(AttributeKind::String(value.to_vec()))));
    }
}

/// Version 18 reads the axes of a reduction as an input.
fn axes_as_input(node: &mut Node, graph: &mut Graph, before: &mut Vec<Node>) -> Result<()> {
    let Some(place) = node.attributes.iter().position(|(name, _)| name == "axes") else { return Ok(()) };
    let (_, axes) = node.attributes.remove(place);
    let Some(axes) = axes.as_ints() else {
        return Err(Error::unsupported(node.describe(graph), "has `axes` that are no integers"));
    };
    let name = graph.fresh_name("axes");
    let output = graph.add_value(Value { name, ..Value::default() });
    let value = AttributeKind::Tensor(Tensor::from_i64(&[axes.len() as u64], axes));
    before.push(operator("Constant", &[], output, &[("value", value)]));
    node.inputs.push(Some(output));
    Ok(())
}

/// Version 18 wants the number of parts where their sizes are not given.
fn count_of_parts(node: &mut Node, _: &mut Graph, _: &mut Vec<Node>) -> Result<()> {
    if !matches!(node.inputs.get(1), Some(Some(_))) {
        let count = node.outputs.len() as i64;
        node.attributes.push(("num_outputs".into(), Attribute::from(AttributeKind::Int(count))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Dim, ValueType};

    fn model(op_type: &str, attributes: &[(&str, AttributeKind)], opset: i64) -> Model {
        let mut graph = Graph::default();
        let shape = Some(vec![Dim::Known(2), Dim::Known(4)]);
        let ty = Some(ValueType::Tensor { dtype: DataType::Float, shape });
        let input = graph.add_value(Value { name: "x".into(), ty: ty.clone(), ..Value::default() });
        let output = graph.add_value(Value { name: "y".into(), ty, ..Value::default() });
        graph.body.inputs.push(input);
        graph.body.outputs.push(output);
        graph.body.nodes.push(operator(op_type, &[input], output, attributes));
        Model { ir_version: 8, opset_imports: [(String::new(), opset)].into(), graph, ..Model::default() }
    }

    #[test]
    fn axes_of_a_reduction_become_an_input() {
        let axes = ("axes", AttributeKind::Ints(vec![-1]));
        let raised = raise_opset(&model("ReduceMean", &[axes], 17), 18).unwrap();
        let [constant, mean] = &raised.graph.body.nodes[..] else { panic!("{:?}", raised.graph.body.nodes) };
        assert_eq!((constant.op_type.as_str(), mean.inputs[1]), ("Constant", constant.outputs[0]));
        assert!(mean.attribute("axes").is_none() && raised.opset_imports[""] == 18);
        let split = raise_opset(&model("Split", &[], 13), 21).unwrap();
        assert_eq!(split.graph.body.nodes[0].attribute("num_outputs").and_then(Attribute::as_int), Some(1));
        let whole = raise_opset(&model("ReduceMax", &[], 17), 18).unwrap();
        assert_eq!(whole.graph.body.nodes[0].inputs.len(), 1);
    }

    #[test]
    fn operators_that_changed_otherwise_are_refused() {
        let error = raise_opset(&model("GridSample", &[], 17), 20).unwrap_err().to_string();
        assert!(error.contains("GridSample") && error.contains("one opset"), "{error}");
        assert!(raise_opset(&model("GridSample", &[], 17), 19).is_ok());
        let error = raise_opset(&model("Relu", &[], 18), 17).unwrap_err().to_string();
        assert!(error.contains("none is lowered"), "{error}");
        assert!(raise_opset(&model("Relu", &[], 11), 17).is_err());
    }
}
