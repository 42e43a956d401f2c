//! Joins the graphs of several models: their weights and functions are moved once, their nodes as often as needed.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::ir::{Attribute, AttributeKind, Body, Model, Node, Tensor, Value, ValueId};

use super::build::operator;

/// A model that is assembled from the graphs of others.
#[derive(Debug, Default)]
pub struct Joined {
    /// The assembled model: weights, functions and operator sets of every part. The caller adds nodes, inputs and
    /// outputs.
    pub model: Model,
}

/// A model whose weights and functions are in a [`Joined`].
#[derive(Debug)]
pub struct JoinedPart<'a> {
    model: &'a Model,
    /// The weights' ids in the joined model.
    weights: HashMap<ValueId, ValueId>,
}

/// Nodes of a part with ids of the joined model, and the part's outputs in the order of its signature.
#[derive(Debug)]
pub struct Inlined {
    /// In execution order.
    pub nodes: Vec<Node>,
    /// One per output of the part.
    pub outputs: Vec<ValueId>,
}

impl JoinedPart<'_> {
    /// The id in the joined model of a weight of the part.
    pub fn weight(&self, id: ValueId) -> Option<ValueId> {
        self.weights.get(&id).copied()
    }
}

impl Joined {
    /// Moves the weights and functions of `model` in. Names of weights begin with `name/`.
    ///
    /// Errors: `Error::Unsupported` when the operator sets differ from those of earlier parts, or when both define a
    /// function of the same name.
    pub fn part<'a>(&mut self, name: &str, model: &'a Model) -> Result<JoinedPart<'a>> {
        add_opsets_and_functions(&mut self.model, model, name)?;
        let mut weights = HashMap::new();
        for (id, tensor) in &model.graph.body.initializers {
            let value = model.graph.value(*id);
            let value = Value { name: format!("{name}/{}", value.name), ..value.clone() };
            let moved = self.model.graph.add_value(value);
            self.model.graph.body.initializers.push((moved, tensor.clone()));
            weights.insert(*id, moved);
        }
        Ok(JoinedPart { model, weights })
    }

    /// A copy of a part's nodes. Names of its values begin with `copy/`. `bound` maps inputs of the part to values of
    /// the joined model.
    ///
    /// Errors: `Error::Invalid` when an input is not bound.
    pub fn inline(&mut self, part: &JoinedPart<'_>, copy: &str, bound: &HashMap<ValueId, ValueId>) -> Result<Inlined> {
        let graph = &part.model.graph;
        let mut ids = Vec::with_capacity(graph.values.len());
        for (index, value) in graph.values.iter().enumerate() {
            let known = |(id, moved): (&ValueId, &ValueId)| (id.index() == index).then_some(*moved);
            ids.push(match bound.iter().chain(&part.weights).find_map(known) {
                Some(moved) => moved,
                None => {
                    let value = Value { name: format!("{copy}/{}", value.name), ..value.clone() };
                    self.model.graph.add_value(value)
                }
            });
        }
        let open = |id: &&ValueId| !bound.contains_key(id) && !part.weights.contains_key(id);
        if let Some(id) = graph.body.inputs.iter().find(open) {
            return Err(Error::invalid(format!("input `{}` of `{copy}`", graph.name(*id)), "is not bound to a value"));
        }
        let mut body = Body { nodes: graph.body.nodes.clone(), outputs: graph.body.outputs.clone(), ..Body::default() };
        move_ids(&mut body, &|id| ids[id.index()]);
        Ok(Inlined { nodes: body.nodes, outputs: body.outputs })
    }

    /// Adds a constant to the model.
    pub fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        let id = self.value(name);
        self.model.graph.body.initializers.push((id, tensor));
        id
    }

    /// Adds a value without a type; the name is `name`, with a number where it is taken.
    pub fn value(&mut self, name: &str) -> ValueId {
        let name = self.model.graph.fresh_name(name);
        self.model.graph.add_value(Value { name, ..Value::default() })
    }
}

/// Nodes of one scope of a [`Joined`], in execution order.
pub struct JoinScope<'a> {
    /// The model whose arena holds the values.
    pub joined: &'a mut Joined,
    /// The nodes so far.
    pub nodes: Vec<Node>,
}

impl<'a> JoinScope<'a> {
    /// A scope without nodes.
    pub fn new(joined: &'a mut Joined) -> Self {
        JoinScope { joined, nodes: Vec::new() }
    }

    /// Adds a node of the default domain with one output named `name`, and returns the output.
    pub fn op(
        &mut self,
        name: &str,
        op_type: &str,
        inputs: &[ValueId],
        attributes: &[(&str, AttributeKind)],
    ) -> ValueId {
        let output = self.joined.value(name);
        self.nodes.push(operator(op_type, inputs, output, attributes));
        output
    }

    /// Adds a node with bodies and several outputs.
    pub fn control(&mut self, op_type: &str, inputs: &[ValueId], outputs: &[ValueId], bodies: Vec<(&str, Body)>) {
        let attribute = |(name, body): (&str, Body)| (name.to_string(), Attribute::from(AttributeKind::Graph(body)));
        self.nodes.push(Node {
            op_type: op_type.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: outputs.iter().copied().map(Some).collect(),
            attributes: bodies.into_iter().map(attribute).collect(),
            ..Node::default()
        });
    }

    /// Adds a copy of a part and returns its outputs.
    ///
    /// Errors: as [`Joined::inline`].
    pub fn inline(
        &mut self,
        part: &JoinedPart<'_>,
        copy: &str,
        bound: &HashMap<ValueId, ValueId>,
    ) -> Result<Vec<ValueId>> {
        let inlined = self.joined.inline(part, copy, bound)?;
        self.nodes.extend(inlined.nodes);
        Ok(inlined.outputs)
    }
}

/// Adds the operator sets and functions of `part` to `joined`, whose IR version becomes the higher one.
///
/// Errors: as [`Joined::part`].
pub(super) fn add_opsets_and_functions(joined: &mut Model, part: &Model, name: &str) -> Result<()> {
    let subject = || format!("graph `{name}`");
    for (domain, &version) in &part.opset_imports {
        let own = *joined.opset_imports.entry(domain.clone()).or_insert(version);
        if own != version {
            let problem = format!("is of opset {version} (`{domain}`), the decoder of opset {own}");
            return Err(Error::unsupported(subject(), problem).remedy("convert both graphs to one opset"));
        }
    }
    let same = |a: &crate::ir::Function, b: &crate::ir::Function| {
        (&a.domain, &a.name, &a.overload) == (&b.domain, &b.name, &b.overload)
    };
    if let Some(both) = part.functions.iter().find(|new| joined.functions.iter().any(|old| same(new, old))) {
        let problem = format!("defines the function `{}`, and so does the decoder", both.name);
        return Err(Error::unsupported(subject(), problem).remedy("inline the functions of both graphs"));
    }
    joined.functions.extend(part.functions.iter().cloned());
    joined.ir_version = joined.ir_version.max(part.ir_version);
    Ok(())
}

/// Replaces every id of a body and of the bodies inside it.
pub(super) fn move_ids(body: &mut Body, moved: &impl Fn(ValueId) -> ValueId) {
    let ids = body.inputs.iter_mut().chain(&mut body.outputs).chain(body.initializers.iter_mut().map(|(id, _)| id));
    ids.for_each(|id| *id = moved(*id));
    for node in &mut body.nodes {
        node.inputs.iter_mut().chain(&mut node.outputs).flatten().for_each(|id| *id = moved(*id));
        node.bodies_mut().for_each(|body| move_ids(body, moved));
    }
}
