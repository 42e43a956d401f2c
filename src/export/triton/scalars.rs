//! Reshapes scalar inputs and outputs, which Triton does not support for models without batching.

use crate::base::{Error, Result};
use crate::ir::{DataType, Dim, Model, Node, Tensor, Value, ValueId, ValueType};

/// Gives every scalar input and output one axis of size 1 through a `Reshape` inside the graph. Names and other shapes
/// stay. Returns the names of the changed ones.
///
/// Errors: `Error::Unsupported` for a scalar that is both input and output.
pub(super) fn with_an_axis(model: &mut Model) -> Result<Vec<String>> {
    let graph = &model.graph;
    let weights: Vec<ValueId> = graph.body.initializers.iter().map(|(id, _)| *id).collect();
    let scalars = |ids: &[ValueId]| -> Vec<ValueId> {
        ids.iter().copied().filter(|id| !weights.contains(id) && is_scalar(model, *id)).collect()
    };
    let (inputs, outputs) = (scalars(&graph.body.inputs), scalars(&graph.body.outputs));
    if let Some(&both) = inputs.iter().find(|id| outputs.contains(id)) {
        let subject = format!("`{}` in a Triton repository", graph.name(both));
        return Err(Error::unsupported(subject, "is a scalar that is input and output at once")
            .remedy("drop the output from the graph: it repeats the input"));
    }
    let mut names = Vec::new();
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for id in inputs {
        let outer = with_axis_of(model, id);
        names.push(model.graph.name(outer).to_string());
        first.push(reshape(model, outer, id, &[]));
        replace(&mut model.graph.body.inputs, id, outer);
    }
    for id in outputs {
        let outer = with_axis_of(model, id);
        names.push(model.graph.name(outer).to_string());
        last.push(reshape(model, id, outer, &[1]));
        replace(&mut model.graph.body.outputs, id, outer);
    }
    model.graph.body.nodes.splice(0..0, first);
    model.graph.body.nodes.extend(last);
    Ok(names)
}

fn is_scalar(model: &Model, id: ValueId) -> bool {
    let ty = model.graph.value(id).ty.as_ref();
    matches!(ty, Some(ValueType::Tensor { shape: Some(shape), .. }) if shape.is_empty())
}

/// Adds a value of shape `[1]` that takes over the scalar's name; the scalar gets a new name.
fn with_axis_of(model: &mut Model, scalar: ValueId) -> ValueId {
    let graph = &mut model.graph;
    let value = graph.value(scalar).clone();
    graph.values[scalar.index()].name = graph.fresh_name(&format!("{}.scalar", value.name));
    let mut ty = value.ty.clone();
    if let Some(ValueType::Tensor { shape, .. }) = &mut ty {
        *shape = Some(vec![Dim::Known(1)]);
    }
    graph.add_value(Value { ty, ..value })
}

fn reshape(model: &mut Model, from: ValueId, to: ValueId, dims: &[i64]) -> Node {
    let graph = &mut model.graph;
    let name = graph.fresh_name(&format!("{}.shape", graph.name(to)));
    let shape = graph.add_value(Value { name, ..Value::default() });
    let bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    graph.body.initializers.push((shape, Tensor::from_bytes(DataType::Int64, &[dims.len() as u64], bytes)));
    Node {
        name: format!("{}.reshape", graph.name(to)),
        op_type: "Reshape".into(),
        inputs: vec![Some(from), Some(shape)],
        outputs: vec![Some(to)],
        ..Node::default()
    }
}

fn replace(ids: &mut [ValueId], old: ValueId, new: ValueId) {
    ids.iter_mut().filter(|id| **id == old).for_each(|id| *id = new);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Graph;

    /// `y = x + x` with a scalar `x`; with `passes`, `x` is an output as well.
    fn doubled(passes: bool) -> Model {
        let mut graph = Graph::default();
        let ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(Vec::new()) });
        let mut value = |name: &str| graph.add_value(Value { name: name.into(), ty: ty.clone(), ..Value::default() });
        let (x, y) = (value("x"), value("y"));
        let node =
            Node { op_type: "Add".into(), inputs: vec![Some(x), Some(x)], outputs: vec![Some(y)], ..Node::default() };
        graph.body.nodes.push(node);
        graph.body.inputs = vec![x];
        graph.body.outputs = if passes { vec![x] } else { vec![y] };
        Model { ir_version: 8, opset_imports: [(String::new(), 17)].into(), graph, ..Model::default() }
    }

    #[test]
    fn scalars_get_an_axis_and_keep_their_names() {
        let mut model = doubled(false);
        assert_eq!(with_an_axis(&mut model).unwrap(), ["x", "y"]);
        crate::ir::check(&model).unwrap();
        let body = &model.graph.body;
        for ids in [&body.inputs, &body.outputs] {
            let ty = model.graph.value(ids[0]).ty.clone();
            assert_eq!(ty, Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(vec![Dim::Known(1)]) }));
        }
        assert_eq!((model.graph.name(body.inputs[0]), model.graph.name(body.outputs[0])), ("x", "y"));
        let operators: Vec<&str> = body.nodes.iter().map(|node| node.op_type.as_str()).collect();
        assert_eq!(operators, ["Reshape", "Add", "Reshape"]);
        assert!(with_an_axis(&mut model).unwrap().is_empty());
        let error = with_an_axis(&mut doubled(true)).unwrap_err().to_string();
        assert!(error.contains("`x`") && error.contains("input and output at once"), "{error}");
    }
}
