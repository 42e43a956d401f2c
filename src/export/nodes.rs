//! Nodes and checks that the targets share which build graphs around a model's components.

use crate::base::{Error, Result, list_preview};
use crate::ir::{AttributeKind, DataType, Dim, Graph, Model, Tensor, ValueId, ValueType};
use crate::rewrite::{JoinScope, Joined};
use crate::runtime::{Input, Port};

/// A size that the graph leaves free.
pub(super) fn symbol(name: &str) -> Dim {
    Dim::Symbol(name.into())
}

/// The type of a tensor.
pub(super) fn tensor(dtype: DataType, shape: &[Dim]) -> ValueType {
    ValueType::Tensor { dtype, shape: Some(shape.to_vec()) }
}

/// Adds an input to the joined graph.
pub(super) fn graph_input(joined: &mut Joined, name: &str, dtype: DataType, shape: &[Dim]) -> ValueId {
    let id = joined.value(name);
    joined.model.graph.values[id.index()].ty = Some(tensor(dtype, shape));
    joined.model.graph.body.inputs.push(id);
    id
}

/// Inputs of a graph that are no weights, with their kinds.
pub(super) fn inputs_of(name: &str, model: &Model) -> Result<Vec<(ValueId, Input)>> {
    let graph = &model.graph;
    let open: Vec<ValueId> =
        graph.body.inputs.iter().copied().filter(|&id| graph.body.initializer(id).is_none()).collect();
    let port = |&id: &ValueId| {
        Port::of_value(graph, id).ok_or_else(|| undeclared(format!("input `{}` of the {name}", graph.name(id))))
    };
    let ports = open.iter().map(port).collect::<Result<Vec<_>>>()?;
    let inputs = Input::all(&format!("graph `{name}`"), &ports)?;
    Ok(open.into_iter().zip(inputs).collect())
}

/// The error of an input that a graph around the components cannot have.
pub(super) fn refused(port: &Port, problem: &str) -> Error {
    Error::unsupported(format!("input {}", port.described()), problem)
        .remedy("use the components of another target, such as openvino, with a loop of your own around them")
}

/// The error of an input or output whose type the file does not say.
pub(super) fn undeclared(subject: String) -> Error {
    Error::unsupported(subject, "declares no element type and number of axes, by which the export knows what it holds")
        .remedy("export the graph with the types of its inputs and outputs, or run shape inference over it")
}

/// The error of a decoder whose logits have another name.
pub(super) fn no_logits(graph: &Graph) -> Error {
    let names: Vec<&str> = graph.body.outputs.iter().map(|&id| graph.name(id)).collect();
    let problem = format!("has no output `logits`, by which it is found; it has {}", list_preview(&names, 4));
    Error::unsupported("the decoder", problem).remedy("name its output of logits `logits` in the exporter")
}

/// The error of two components with one name in the target.
pub(super) fn same_name(name: &str, one: &str, other: &str) -> Error {
    Error::invalid(format!("`{name}`"), format!("would be the name of two components, `{one}` and `{other}`"))
        .remedy("export a folder with one of them, or name one of their precisions with `--variant`")
}

/// The only output of a graph.
pub(super) fn only_output(subject: &str, model: &Model) -> Result<Port> {
    let graph = &model.graph;
    let [output] = graph.body.outputs[..] else {
        let names: Vec<&str> = graph.body.outputs.iter().map(|&id| graph.name(id)).collect();
        return Err(Error::unsupported(subject, format!("gives {}, expected one output", names.join(", ")))
            .remedy("export it with one output, or use the components of another target, such as openvino"));
    };
    Port::of_value(graph, output).ok_or_else(|| undeclared(format!("output `{}` of {subject}", graph.name(output))))
}

/// A cast, unless the types are equal.
pub(super) fn cast(scope: &mut JoinScope<'_>, value: ValueId, from: DataType, to: DataType) -> ValueId {
    match from == to {
        true => value,
        false => scope.op("cast", "Cast", &[value], &[("to", AttributeKind::Int(to as i64))]),
    }
}

/// A constant list of numbers.
pub(super) fn ints(scope: &mut JoinScope<'_>, name: &str, values: &[i64]) -> ValueId {
    scope.joined.constant(name, Tensor::from_i64(&[values.len() as u64], values))
}

/// A constant number without axes.
pub(super) fn scalar(scope: &mut JoinScope<'_>, name: &str, value: i64) -> ValueId {
    scope.joined.constant(name, Tensor::from_i64(&[], &[value]))
}

/// True, as a scalar, if any element of a tensor of bools is.
pub(super) fn any(scope: &mut JoinScope<'_>, flags: ValueId) -> ValueId {
    let numbers = cast(scope, flags, DataType::Bool, DataType::Int64);
    let most = scope.op("most", "ReduceMax", &[numbers], &[("keepdims", AttributeKind::Int(0))]);
    let zero = scalar(scope, "zero", 0);
    scope.op("any", "Greater", &[most, zero], &[])
}

/// The embeddings `[1, T, D]` with one row of `features` `[N, D]` at each place where `is_image` `[1, T]` is true.
pub(super) fn with_rows_at(
    scope: &mut JoinScope<'_>,
    values: ValueId,
    is_image: ValueId,
    features: ValueId,
) -> ValueId {
    let places = scope.op("places", "NonZero", &[is_image], &[]);
    let places = scope.op("places", "Transpose", &[places], &[("perm", AttributeKind::Ints(vec![1, 0]))]);
    scope.op("merged", "ScatterND", &[values, places, features], &[])
}
