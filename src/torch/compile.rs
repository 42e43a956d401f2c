//! Compiles graph nodes to steps: looks up operators, inlines functions, compiles sub-graphs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use tch::{Device, Kind};

use crate::base::{Error, Result};
use crate::ir::{
    Attribute, AttributeKind, Body, DataType, Dim, Function, Graph, GraphIndex, Model, Node, Tensor, ValueId, ValueType,
};

use super::attributes::Attributes;
use super::convert::{computed_kind, constant_from_ir, kind_of};
use super::kernel::{BodyCompiler, Build, OpError, OpResult, SubGraph};
use super::operator::Operator;
use super::precision::mixed;
use super::step::{CompiledNode, places_read};
use super::sub_graph::{CompiledSubGraph, Declared, Ports};
use super::table::find_operator;
use super::wiring::{Repetition, Slot};

/// Limit on nested functions and sub-graphs; bounds the stack on a malformed file.
const MAX_DEPTH: usize = 64;
/// Limit on the operator calls of a graph after inlining its functions; bounds memory on a malformed file.
const MAX_CALLS: usize = 1 << 18;

/// An unsupported operator call.
struct Missing {
    op: String,
    reason: String,
    first: String,
    count: usize,
}

/// Compiles nodes to steps; one compiler per program.
pub(super) struct Compiler<'m> {
    model: &'m Model,
    /// Names of all slots: the top-level ones first, then those of inlined functions.
    names: Vec<String>,
    /// Element types that the graph declares.
    dtypes: HashMap<Slot, DataType>,
    /// True when a constant has a 4-bit type.
    has_4_bits: bool,
    autocast: Option<Kind>,
    device: Device,
    missing: Vec<Missing>,
    unread: Vec<String>,
    depth: usize,
    calls: usize,
}

/// Scope of nodes: the top-level graph, or an inlined function.
pub(super) struct NodeScope<'m> {
    graph: &'m Graph,
    /// Values that a node reads or that are outputs of the scope. Other node outputs are not computed.
    read: HashSet<ValueId>,
    opsets: &'m BTreeMap<String, i64>,
    offset: Slot,
    renamed: HashMap<ValueId, Slot>,
    bindings: Option<HashMap<String, Attribute>>,
    label: String,
}

impl NodeScope<'_> {
    fn slot(&self, id: ValueId) -> Slot {
        self.renamed.get(&id).copied().unwrap_or(self.offset + id.index())
    }
}

/// Compiles the sub-graphs of one node.
struct Bodies<'a> {
    compile: &'a mut dyn FnMut(&Body) -> OpResult<CompiledSubGraph>,
}

impl BodyCompiler for Bodies<'_> {
    fn compile(&mut self, body: &Body) -> OpResult<Box<dyn SubGraph>> {
        Ok(Box::new((self.compile)(body)?))
    }
}

impl<'m> Compiler<'m> {
    pub fn new(model: &'m Model, autocast: Option<Kind>, device: Device) -> Self {
        let names = model.graph.values.iter().map(|value| value.name.clone()).collect();
        let declared = model.graph.values.iter().enumerate();
        let mut dtypes: HashMap<Slot, DataType> =
            declared.filter_map(|(slot, value)| Some((slot, value.ty.as_ref()?.dtype()?))).collect();
        dtypes.extend(model.graph.body.initializers.iter().map(|(id, tensor)| (id.index(), tensor.dtype)));
        let has_4_bits = dtypes.values().any(|&dtype| is_4_bits(dtype));
        let (missing, unread) = (Vec::new(), Vec::new());
        Compiler { model, names, dtypes, has_4_bits, autocast, device, missing, unread, depth: 0, calls: 0 }
    }

    /// The names of all slots.
    pub fn into_names(self) -> Vec<String> {
        self.names
    }

    /// Steps for the selected nodes of the top-level graph. Problems are collected and reported together.
    ///
    /// `wanted` are values to compute even if no node reads them.
    pub fn top_level(
        &mut self,
        nodes: impl Iterator<Item = &'m Node>,
        wanted: &[ValueId],
    ) -> Result<Vec<CompiledNode>> {
        let scope = NodeScope {
            graph: &self.model.graph,
            read: values_read(&self.model.graph.body).into_iter().chain(wanted.iter().copied()).collect(),
            opsets: &self.model.opset_imports,
            offset: 0,
            renamed: HashMap::new(),
            bindings: None,
            label: String::new(),
        };
        let mut steps = Vec::new();
        for node in nodes {
            self.node(&scope, node, &mut steps)?;
        }
        self.finish()?;
        Ok(steps)
    }

    fn finish(&mut self) -> Result<()> {
        if !self.missing.is_empty() {
            let lines: Vec<String> = self
                .missing
                .iter()
                .map(|m| format!("{}: {} ({} nodes, first {})", m.op, m.reason, m.count, m.first))
                .collect();
            return Err(Error::unsupported("the graph", format!("operators are missing: {}", lines.join("; ")))
                .remedy("use an export of the model with standard operators in float"));
        }
        if !self.unread.is_empty() {
            return Err(Error::unsupported("the graph", self.unread.join("; "))
                .remedy("use an export of the model with standard operators in float"));
        }
        Ok(())
    }

    fn node(&mut self, scope: &NodeScope<'m>, node: &Node, steps: &mut Vec<CompiledNode>) -> Result<()> {
        self.calls += 1;
        if self.calls > MAX_CALLS {
            return Err(Error::invalid(
                "the graph",
                format!("its functions expand to more than {MAX_CALLS} operator calls"),
            )
            .remedy("inline or simplify the model's functions before the export"));
        }
        let label = || format!("{}{}", scope.label, node.describe(scope.graph));
        let Some(&version) = scope.opsets.get(&node.domain) else {
            self.lacks(node, "?", format!("the model imports no version of domain `{}`", node.domain), label());
            return Ok(());
        };
        match find_operator(&node.domain, &node.op_type, version) {
            Ok(row) => {
                let resolved = scope.bindings.as_ref().map(|bindings| resolve(&node.attributes, bindings));
                let attributes = resolved.as_deref().unwrap_or(&node.attributes);
                let step = self.step(scope, node, row, version, attributes, label())?;
                steps.extend(step);
                Ok(())
            }
            Err(reason) => {
                let function = self.model.functions.iter().find(|function| {
                    (&function.domain, &function.name, &function.overload)
                        == (&node.domain, &node.op_type, &node.overload)
                });
                match function {
                    Some(function) => self.inline(scope, node, function, label(), steps),
                    None => {
                        self.lacks(node, &version.to_string(), reason, label());
                        Ok(())
                    }
                }
            }
        }
    }

    fn lacks(&mut self, node: &Node, version: &str, reason: String, label: String) {
        let op = format!("{}-{version}", node.op());
        match self.missing.iter_mut().find(|m| m.op == op && m.reason == reason) {
            Some(known) => known.count += 1,
            None => self.missing.push(Missing { op, reason, first: label, count: 1 }),
        }
    }

    fn step(
        &mut self,
        scope: &NodeScope<'m>,
        node: &Node,
        row: &'static Operator,
        version: i64,
        list: &[(String, Attribute)],
        label: String,
    ) -> Result<Option<CompiledNode>> {
        let attributes = Attributes::new(list);
        let mut inputs: Vec<Option<Slot>> = node.inputs.iter().map(|id| id.map(|id| scope.slot(id))).collect();
        let outputs: Vec<Option<Slot>> =
            node.outputs.iter().map(|id| id.filter(|id| scope.read.contains(id)).map(|id| scope.slot(id))).collect();
        let present_inputs: Vec<bool> = inputs.iter().map(Option::is_some).collect();
        let present_outputs: Vec<bool> = outputs.iter().map(Option::is_some).collect();
        if let (Some(value), [Some(output)]) = (constant_of(row, list), &outputs[..]) {
            self.constant_type(*output, value.dtype);
        }
        let dtypes: Vec<Option<DataType>> =
            inputs.iter().map(|slot| self.dtypes.get(slot.as_ref()?).copied()).collect();
        let (has_4_bits, autocast) = (self.has_4_bits, self.autocast);
        let mut failed = None;
        let (mut body_on_host, mut bodies) = (Vec::new(), Vec::new());
        let repetition = repetition(node, list);
        let built = {
            let mut compile = |body: &Body| match self.body(scope, body, &mut inputs, &mut body_on_host) {
                Ok(block) => {
                    bodies.push(Arc::new(block.wiring(repetition)));
                    Ok(block)
                }
                Err(error) => {
                    failed = Some(error);
                    Err(OpError::new("a sub-graph does not compile"))
                }
            };
            let mut compilers = Bodies { compile: &mut compile };
            let mut build = Build {
                attributes: &attributes,
                version,
                inputs: &present_inputs,
                outputs: &present_outputs,
                dtypes: &dtypes,
                has_4_bits,
                autocast,
                bodies: &mut compilers,
            };
            (row.build)(&mut build)
        };
        if let Some(error) = failed {
            return Err(error);
        }
        match built {
            Ok(kernel) => {
                let unread = attributes.unread();
                if !unread.is_empty() {
                    self.unread.push(format!("{label}: attribute `{}` is not known", unread.join("`, `")));
                }
                let kernel = match autocast {
                    Some(low) => mixed(row, node, kernel, low),
                    None => kernel,
                };
                Ok(Some(CompiledNode { label, row, kernel, inputs, body_on_host, bodies, outputs }))
            }
            Err(OpError(reason)) => {
                self.lacks(node, &version.to_string(), reason, label);
                Ok(None)
            }
        }
    }

    /// Records the element type of a constant.
    fn constant_type(&mut self, slot: Slot, dtype: DataType) {
        self.dtypes.insert(slot, dtype);
        self.has_4_bits |= is_4_bits(dtype);
    }

    /// Compiles a sub-graph and appends its captured values to the node's inputs, and to `on_host` the positions of those
    /// that it reads on the host, and of the node's inputs with which a loop's first turn begins that it reads there.
    fn body(
        &mut self,
        scope: &NodeScope<'m>,
        body: &Body,
        node_inputs: &mut Vec<Option<Slot>>,
        on_host: &mut Vec<usize>,
    ) -> Result<CompiledSubGraph> {
        self.enter("a sub-graph")?;
        // Inputs that a node leaves out at its end have places of their own, in front of captured values.
        node_inputs.resize(node_inputs.len().max(body.inputs.len()), None);
        let mut constants = Vec::new();
        for (id, tensor) in &body.initializers {
            let value = constant_from_ir(scope.graph.name(*id), tensor)?;
            self.constant_type(scope.slot(*id), tensor.dtype);
            constants.push((scope.slot(*id), value));
        }
        let mut steps = Vec::new();
        for node in &body.nodes {
            self.node(scope, node, &mut steps)?;
        }
        self.depth -= 1;
        let inputs: Vec<Slot> = body.inputs.iter().map(|&id| scope.slot(id)).collect();
        let outputs: Vec<Slot> = body.outputs.iter().map(|&id| scope.slot(id)).collect();
        let mut defined: HashSet<Slot> = inputs.iter().copied().chain(constants.iter().map(|c| c.0)).collect();
        let mut captures: Vec<(Slot, usize)> = Vec::new();
        let mut read = |slot: Slot, defined: &HashSet<Slot>| {
            if !defined.contains(&slot) && captures.iter().all(|c| c.0 != slot) {
                let position = node_inputs.iter().position(|input| *input == Some(slot)).unwrap_or_else(|| {
                    node_inputs.push(Some(slot));
                    node_inputs.len() - 1
                });
                captures.push((slot, position));
            }
        };
        for step in &steps {
            for &slot in step.inputs.iter().flatten() {
                read(slot, &defined);
            }
            defined.extend(step.outputs.iter().flatten());
        }
        for &slot in &outputs {
            read(slot, &defined);
        }
        let [read_on_host, _] = places_read(&steps);
        // Input N of a body is input N of its `Loop` or `Scan`, or comes of it.
        let own = inputs.iter().enumerate().map(|(position, slot)| (*slot, position));
        let received = captures.iter().copied().chain(own);
        on_host.extend(received.filter(|(slot, _)| read_on_host.contains(slot)).map(|(_, position)| position));
        let declared = body.outputs.iter().map(|&id| declared(scope.graph.value(id).ty.as_ref())).collect();
        Ok(CompiledSubGraph::new(steps, Ports { inputs, outputs, declared }, constants, captures, self.device))
    }

    fn inline(
        &mut self,
        scope: &NodeScope<'m>,
        node: &Node,
        function: &'m Function,
        label: String,
        steps: &mut Vec<CompiledNode>,
    ) -> Result<()> {
        self.enter(&label)?;
        let own = scope.bindings.as_ref().map(|bindings| resolve(&node.attributes, bindings));
        let given = own.as_deref().unwrap_or(&node.attributes);
        let mut bindings: HashMap<String, Attribute> = function.attribute_defaults.iter().cloned().collect();
        for (name, attribute) in given {
            if !function.attributes.contains(name) && !function.attribute_defaults.iter().any(|d| d.0 == *name) {
                return Err(Error::invalid(label, format!("attribute `{name}` is not one of the function's")));
            }
            bindings.insert(name.clone(), attribute.clone());
        }
        let body = &function.graph.body;
        if node.inputs.len() > body.inputs.len() || node.outputs.len() > body.outputs.len() {
            return Err(Error::invalid(label, "has more inputs or outputs than its function"));
        }
        let offset = self.names.len();
        self.names.extend(function.graph.values.iter().map(|value| format!("{}/{}", node.name, value.name)));
        let mut renamed = HashMap::new();
        let mut absent = HashSet::new();
        for (position, &id) in body.inputs.iter().enumerate() {
            match node.inputs.get(position).copied().flatten() {
                Some(outer) => {
                    renamed.insert(id, scope.slot(outer));
                }
                None => {
                    absent.insert(id);
                }
            }
        }
        let mut copies = Vec::new();
        for (position, &id) in body.outputs.iter().enumerate() {
            if let Some(outer) = node.outputs.get(position).copied().flatten() {
                let slot = scope.slot(outer);
                if let Some(taken) = renamed.get(&id).copied() {
                    copies.push((taken, slot));
                } else {
                    renamed.insert(id, slot);
                }
            }
        }
        let inner = NodeScope {
            graph: &function.graph,
            read: values_read(body).into_iter().collect(),
            opsets: &function.opset_imports,
            offset,
            renamed,
            bindings: Some(bindings),
            label: format!("{label}: "),
        };
        for inner_node in &body.nodes {
            if absent.is_empty() {
                self.node(&inner, inner_node, steps)?;
            } else {
                let mut trimmed = inner_node.clone();
                for input in &mut trimmed.inputs {
                    if input.is_some_and(|id| absent.contains(&id)) {
                        *input = None;
                    }
                }
                self.node(&inner, &trimmed, steps)?;
            }
        }
        for (from, to) in copies {
            let row = find_operator("", "Identity", 1).map_err(|reason| Error::unsupported(label.clone(), reason))?;
            steps.push(CompiledNode {
                label: label.clone(),
                row,
                kernel: Box::new(|args| Ok(vec![args.get(0)?.shallow_clone()])),
                inputs: vec![Some(from)],
                body_on_host: Vec::new(),
                bodies: Vec::new(),
                outputs: vec![Some(to)],
            });
        }
        self.depth -= 1;
        Ok(())
    }

    fn enter(&mut self, subject: &str) -> Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Error::invalid(subject, format!("functions or sub-graphs nest deeper than {MAX_DEPTH}"))
                .remedy("inline the model's functions before the export"));
        }
        Ok(())
    }
}

/// How often bodies of a node run.
fn repetition(node: &Node, attributes: &[(String, Attribute)]) -> Repetition {
    let slices =
        || attributes.iter().find(|(name, _)| name == "num_scan_inputs").and_then(|(_, slices)| slices.as_int());
    match node.op_type.as_str() {
        "Loop" => Repetition::Loop,
        "Scan" => Repetition::Scan { slices: slices().and_then(|slices| usize::try_from(slices).ok()).unwrap_or(0) },
        _ => Repetition::Once,
    }
}

fn is_4_bits(dtype: DataType) -> bool {
    matches!(dtype, DataType::Uint4 | DataType::Int4)
}

/// The tensor of a `Constant` node.
fn constant_of<'a>(row: &Operator, attributes: &'a [(String, Attribute)]) -> Option<&'a Tensor> {
    let constant = row.domain.is_empty() && row.op_type == "Constant";
    attributes.iter().find(|(name, _)| constant && name == "value").and_then(|(_, attribute)| attribute.as_tensor())
}

/// The declared type and shape of a sub-graph's output, if type and rank are declared. An axis of
/// unknown length gets length 0.
fn declared(ty: Option<&ValueType>) -> Option<Declared> {
    let Some(ValueType::Tensor { dtype, shape: Some(shape) }) = ty else { return None };
    let axis = |dim: &Dim| if let Dim::Known(size) = dim { (*size).max(0) } else { 0 };
    Some(Declared { kind: kind_of(*dtype).map(computed_kind)?, shape: shape.iter().map(axis).collect() })
}

/// Every value that a body or a nested body reads or outputs.
fn values_read(body: &Body) -> Vec<ValueId> {
    let mut read = body.outputs.clone();
    for node in &body.nodes {
        read.extend(node.present_inputs());
        read.extend(node.bodies().flat_map(values_read));
    }
    read
}

/// For each node: true when the outputs depend on it, given the inputs.
pub(super) fn needed_nodes(model: &Model, inputs: &[ValueId], outputs: &[ValueId]) -> Vec<bool> {
    let body = &model.graph.body;
    let index = GraphIndex::new(&model.graph);
    let captures: Vec<Vec<ValueId>> =
        body.nodes.iter().map(|node| node.bodies().flat_map(values_read).collect()).collect();
    let given: HashSet<ValueId> = inputs.iter().copied().collect();
    let mut needed = vec![false; body.nodes.len()];
    let mut seen = HashSet::new();
    let mut stack = outputs.to_vec();
    while let Some(id) = stack.pop() {
        if given.contains(&id) || !seen.insert(id) {
            continue;
        }
        if let Some((node, _)) = index.node_of(id) {
            needed[node] = true;
            stack.extend(body.nodes[node].present_inputs());
            stack.extend(&captures[node]);
        }
    }
    needed
}

/// The ids of all top-level values with their positions.
pub(super) fn value_ids(model: &Model) -> Vec<(usize, ValueId)> {
    let body = &model.graph.body;
    let nodes = body.nodes.iter().flat_map(|node| node.present_inputs().chain(node.present_outputs()));
    let ids = body.inputs.iter().copied().chain(body.initializers.iter().map(|(id, _)| *id)).chain(nodes);
    ids.chain(body.outputs.iter().copied()).map(|id| (id.index(), id)).collect()
}

/// Attributes with references replaced by the caller's values. A reference without a value is omitted.
fn resolve(attributes: &[(String, Attribute)], bindings: &HashMap<String, Attribute>) -> Vec<(String, Attribute)> {
    attributes
        .iter()
        .filter_map(|(name, attribute)| {
            let resolved = match &attribute.kind {
                AttributeKind::Reference { name, .. } => bindings.get(name)?.clone(),
                _ => {
                    let mut copy = attribute.clone();
                    for body in copy.bodies_mut() {
                        resolve_body(body, bindings);
                    }
                    copy
                }
            };
            Some((name.clone(), resolved))
        })
        .collect()
}

fn resolve_body(body: &mut Body, bindings: &HashMap<String, Attribute>) {
    for node in &mut body.nodes {
        node.attributes = resolve(&node.attributes, bindings);
    }
}
