//! Invariants of every graph, checked after decoding and after every rewrite.

use std::collections::{BTreeMap, HashSet};

use crate::base::{Error, Result};

use super::{Body, Graph, Model, ValueId};

/// Checks a model's graph and functions.
///
/// Invariants: every value is defined before it is read (nodes in execution order) and defined once; names of values in
/// use are distinct and not empty; every weight's byte count fits its type and shape; every output exists; every node's
/// domain has an opset version.
///
/// Errors: `Error::Invalid` naming the node or value.
pub fn check(model: &Model) -> Result<()> {
    check_graph(&model.graph, &model.opset_imports)?;
    for function in &model.functions {
        check_graph(&function.graph, &function.opset_imports)?;
    }
    Ok(())
}

fn check_graph(graph: &Graph, opset_imports: &BTreeMap<String, i64>) -> Result<()> {
    let mut scope = Scope::default();
    check_body(graph, &graph.body, &mut scope)?;
    check_domains(graph, &graph.body, opset_imports)
}

fn check_domains(graph: &Graph, body: &Body, opset_imports: &BTreeMap<String, i64>) -> Result<()> {
    for node in &body.nodes {
        if !opset_imports.contains_key(&node.domain) {
            let name = |domain: &str| if domain.is_empty() { "ai.onnx" } else { domain }.to_string();
            let known: Vec<String> = opset_imports.keys().map(|domain| name(domain)).collect();
            let problem = format!(
                "is of domain `{}`, which no `opset_import` gives a version of; found {}",
                name(&node.domain),
                if known.is_empty() { "none".to_string() } else { known.join(", ") }
            );
            return Err(Error::invalid(node.describe(graph), problem)
                .remedy("export the model again, or add the opset version that it was exported for"));
        }
        for inner in node.bodies() {
            check_domains(graph, inner, opset_imports)?;
        }
    }
    Ok(())
}

/// Values defined so far, outer bodies included.
#[derive(Default)]
struct Scope<'a> {
    ids: HashSet<ValueId>,
    names: HashSet<&'a str>,
}

fn check_body<'a>(graph: &'a Graph, body: &Body, outer: &mut Scope<'a>) -> Result<()> {
    let mut own = Vec::new();
    for &id in &body.inputs {
        define(graph, id, outer, &mut own)?;
    }
    let inputs: HashSet<ValueId> = body.inputs.iter().copied().collect();
    for (id, tensor) in &body.initializers {
        if !inputs.contains(id) {
            define(graph, *id, outer, &mut own)?;
        }
        let name = || format!("initializer `{}`", graph.name(*id));
        let want = tensor
            .dims
            .iter()
            .try_fold(1u64, |count, &dim| count.checked_mul(dim))
            .and_then(|count| tensor.dtype.byte_len(count))
            .ok_or_else(|| Error::invalid(name(), format!("shape {:?} overflows", tensor.dims)))?;
        if tensor.dtype != super::DataType::String && tensor.byte_len() != want {
            return Err(Error::invalid(
                name(),
                format!("holds {} bytes, {} of shape {:?} takes {want}", tensor.byte_len(), tensor.dtype, tensor.dims),
            ));
        }
    }
    for node in &body.nodes {
        for id in node.present_inputs() {
            if !outer.ids.contains(&id) {
                return Err(Error::invalid(
                    node.describe(graph),
                    format!("reads `{}`, which nothing before it defines", graph.name(id)),
                ));
            }
        }
        for inner in node.bodies() {
            check_body(graph, inner, outer)?;
        }
        for id in node.present_outputs() {
            define(graph, id, outer, &mut own)?;
        }
    }
    for &id in &body.outputs {
        if !outer.ids.contains(&id) {
            return Err(Error::invalid(format!("output `{}`", graph.name(id)), "nothing defines it"));
        }
    }
    for id in own {
        outer.ids.remove(&id);
        outer.names.remove(graph.name(id));
    }
    Ok(())
}

fn define<'a>(graph: &'a Graph, id: ValueId, scope: &mut Scope<'a>, own: &mut Vec<ValueId>) -> Result<()> {
    let name = graph.name(id);
    if name.is_empty() {
        return Err(Error::invalid("a value", "has an empty name"));
    }
    if !scope.ids.insert(id) || !scope.names.insert(name) {
        return Err(Error::invalid(format!("value `{name}`"), "is defined twice"));
    }
    own.push(id);
    Ok(())
}
