//! Adds nodes and constants to a model's top-level body.

use crate::ir::{Attribute, AttributeKind, FreshNames, Model, Node, Tensor, Value, ValueId, ValueType};

/// Prefix of the names of inputs and outputs that a rewrite adds.
pub const ADDED_PREFIX: &str = "interlace.";

/// Adds nodes, inputs and constants to a model. New values are named `interlace.STEM.NUMBER`.
pub struct Builder<'a> {
    pub model: &'a mut Model,
    stem: &'static str,
    names: FreshNames,
}

impl<'a> Builder<'a> {
    pub fn new(model: &'a mut Model, stem: &'static str) -> Self {
        let names = FreshNames::of(&model.graph);
        Builder { model, stem, names }
    }

    /// Version of the default operator set.
    pub fn opset(&self) -> i64 {
        self.model.opset_imports.get("").copied().unwrap_or(1)
    }

    /// Adds a value without a type.
    pub fn value(&mut self) -> ValueId {
        let graph = &mut self.model.graph;
        let name = self.names.fresh(&format!("{ADDED_PREFIX}{}.{}", self.stem, graph.values.len()));
        graph.add_value(Value { name, ..Value::default() })
    }

    /// Adds a graph input.
    pub fn input(&mut self, name: &str, ty: ValueType) -> ValueId {
        let id = self.model.graph.add_value(Value { name: name.into(), ty: Some(ty), ..Value::default() });
        self.model.graph.body.inputs.push(id);
        id
    }

    /// Adds a node of the default domain with one output and returns the output.
    pub fn node(&mut self, op_type: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) -> ValueId {
        let output = self.value();
        let node = operator(op_type, inputs, output, attributes);
        self.model.graph.body.nodes.push(node);
        output
    }

    /// Adds an initializer.
    pub fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        let name = self.names.fresh(&format!("{ADDED_PREFIX}{}.{name}", self.stem));
        let id = self.model.graph.add_value(Value { name, ..Value::default() });
        self.model.graph.body.initializers.push((id, tensor));
        id
    }
}

/// A node of the default domain with one output.
pub fn operator(op_type: &str, inputs: &[ValueId], output: ValueId, attributes: &[(&str, AttributeKind)]) -> Node {
    Node {
        op_type: op_type.into(),
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: vec![Some(output)],
        attributes: attributes.iter().map(|(name, kind)| (name.to_string(), Attribute::from(kind.clone()))).collect(),
        ..Node::default()
    }
}
