//! The place of a node that is written anew: new nodes, values and constants.

use std::collections::HashSet;

use crate::base::{Error, Result};
use crate::ir::{Attribute, AttributeKind, DataType, Dim, FreshNames, Graph, Node, Tensor, Value, ValueId};

use super::super::build::operator;
use super::Weights;

/// Collects the nodes that replace one node.
pub(super) struct Site<'a> {
    graph: &'a mut Graph,
    names: FreshNames,
    weights: &'a Weights,
    read: &'a HashSet<ValueId>,
    added: &'a mut Vec<(ValueId, Tensor)>,
    /// The element type with which the node computes, where a declaration says it.
    float_type: Option<DataType>,
    /// The nodes so far, in execution order.
    pub nodes: Vec<Node>,
}

impl<'a> Site<'a> {
    pub fn new(
        graph: &'a mut Graph,
        weights: &'a Weights,
        read: &'a HashSet<ValueId>,
        added: &'a mut Vec<(ValueId, Tensor)>,
    ) -> Self {
        let names = FreshNames::of(graph);
        Site { graph, names, weights, read, added, float_type: None, nodes: Vec::new() }
    }

    /// The node in messages.
    pub fn described(&self, node: &Node) -> String {
        node.describe(self.graph)
    }

    /// Adds a node with one new output.
    pub fn op(&mut self, op_type: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) -> ValueId {
        let name = self.names.fresh(&format!("standard/{op_type}"));
        let output = self.graph.add_value(Value { name, ..Value::default() });
        self.nodes.push(operator(op_type, inputs, output, attributes));
        output
    }

    /// Adds a node that gives `output`.
    pub fn give(&mut self, output: ValueId, op_type: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) {
        self.nodes.push(operator(op_type, inputs, output, attributes));
    }

    /// Adds a weight.
    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = self.names.fresh("standard/constant");
        let id = self.graph.add_value(Value { name, ..Value::default() });
        self.added.push((id, tensor));
        id
    }

    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::from_i64(&[values.len() as u64], values))
    }

    pub fn int(&mut self, value: i64) -> ValueId {
        self.constant(Tensor::from_i64(&[], &[value]))
    }

    pub fn float(&mut self, value: f32) -> ValueId {
        self.constant(Tensor::from_f32(&[], &[value]))
    }

    pub fn cast(&mut self, value: ValueId, to: DataType) -> ValueId {
        self.op("Cast", &[value], &[("to", AttributeKind::Int(to as i64))])
    }

    /// Begins with another node.
    pub fn enter(&mut self, node: &Node) {
        let values = node.present_inputs().chain(node.present_outputs());
        self.float_type = values.filter_map(|id| self.dtype(id)).find(|dtype| dtype.is_float());
    }

    /// True when the node computes in f32.
    pub fn is_f32(&self) -> bool {
        self.float_type == Some(DataType::Float)
    }

    /// A number in the type of `like`, a float with which the node computes.
    pub fn float_like(&mut self, value: f32, like: ValueId) -> ValueId {
        let value = self.float(value);
        self.like(value, like)
    }

    /// An f32 value in the type of `like`, a float with which the node computes.
    pub fn like(&mut self, value: ValueId, like: ValueId) -> ValueId {
        match self.is_f32() {
            true => value,
            false => self.op("CastLike", &[value, like], &[]),
        }
    }

    pub fn reshape(&mut self, value: ValueId, shape: &[i64]) -> ValueId {
        let shape = self.ints(shape);
        self.op("Reshape", &[value, shape], &[])
    }

    pub fn transpose(&mut self, value: ValueId, order: &[i64]) -> ValueId {
        self.op("Transpose", &[value], &[("perm", AttributeKind::Ints(order.to_vec()))])
    }

    pub fn concat(&mut self, values: &[ValueId], axis: i64) -> ValueId {
        self.op("Concat", values, &[("axis", AttributeKind::Int(axis))])
    }

    /// The elements `from..to` along one axis.
    pub fn slice(&mut self, value: ValueId, axis: i64, from: i64, to: i64) -> ValueId {
        let bounds = [self.ints(&[from]), self.ints(&[to]), self.ints(&[axis])];
        self.op("Slice", &[value, bounds[0], bounds[1], bounds[2]], &[])
    }

    /// The size of an axis as a list of one number.
    pub fn size(&mut self, value: ValueId, axis: i64) -> ValueId {
        let attributes = [("start", AttributeKind::Int(axis)), ("end", AttributeKind::Int(axis + 1))];
        self.op("Shape", &[value], &attributes)
    }

    /// The tensor of a weight.
    pub fn weight(&self, id: ValueId) -> Option<&Tensor> {
        self.weights.get(&id)
    }

    /// Number of axes, where the graph or a weight says it.
    pub fn rank(&self, id: ValueId) -> Option<usize> {
        let declared = self.graph.value(id).ty.as_ref().and_then(|ty| Some(ty.shape()?.len()));
        self.weight(id).map(|tensor| tensor.dims.len()).or(declared)
    }

    /// All sizes, where the graph or a weight says them.
    pub fn dims(&self, id: ValueId) -> Option<Vec<i64>> {
        if let Some(tensor) = self.weight(id) {
            return Some(tensor.dims.iter().map(|size| *size as i64).collect());
        }
        self.graph.value(id).ty.as_ref()?.shape()?.iter().map(known).collect()
    }

    /// The size of the last axis, where the graph says it.
    pub fn last_size(&self, id: ValueId) -> Option<i64> {
        known(self.graph.value(id).ty.as_ref()?.shape()?.last()?)
    }

    /// Element type, where the graph or a weight says it.
    pub fn dtype(&self, id: ValueId) -> Option<DataType> {
        self.weight(id).map(|tensor| tensor.dtype).or_else(|| self.graph.value(id).ty.as_ref()?.dtype())
    }

    /// An input that must be there.
    pub fn input(&self, node: &Node, position: usize) -> Result<ValueId> {
        optional(node, position).ok_or_else(|| Error::invalid(self.described(node), format!("lacks input {position}")))
    }

    /// The first output.
    pub fn output(&self, node: &Node) -> Result<ValueId> {
        node.outputs.first().copied().flatten().ok_or_else(|| Error::invalid(self.described(node), "has no output"))
    }

    /// An output that something reads.
    pub fn read_output(&self, node: &Node, position: usize) -> Option<ValueId> {
        node.outputs.get(position).copied().flatten().filter(|id| self.read.contains(id))
    }

    /// The error of a form of an operator that is not written.
    pub fn refuse(&self, node: &Node, problem: &str) -> Error {
        Error::unsupported(self.described(node), format!("{problem}, and is not written with standard operators"))
            .remedy("export the graph without it, or serve it from ONNX Runtime")
    }

    /// Errors: `Error::Unsupported` naming an attribute that is not among `known`, or an input from `inputs` on.
    pub fn only(&self, node: &Node, known: &[&str], inputs: usize) -> Result<()> {
        if let Some((name, _)) = node.attributes.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            return Err(self.refuse(node, &format!("has the attribute `{name}`")));
        }
        match (inputs..node.inputs.len()).find(|position| optional(node, *position).is_some()) {
            Some(position) => Err(self.refuse(node, &format!("has input {position}"))),
            None => Ok(()),
        }
    }
}

fn known(dim: &Dim) -> Option<i64> {
    match dim {
        Dim::Known(size) => Some(*size),
        _ => None,
    }
}

/// An input that may be left out.
pub(super) fn optional(node: &Node, position: usize) -> Option<ValueId> {
    node.inputs.get(position).copied().flatten()
}

pub(super) fn int(node: &Node, name: &str, default: i64) -> i64 {
    node.attribute(name).and_then(Attribute::as_int).unwrap_or(default)
}

pub(super) fn float(node: &Node, name: &str, default: f32) -> f32 {
    node.attribute(name).and_then(Attribute::as_float).unwrap_or(default)
}
