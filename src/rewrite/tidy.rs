//! Final steps of every rewrite: removes dead code and unused values, and sorts the nodes.

use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::base::{Error, Result};
use crate::ir::{self, Body, Graph, GraphIndex, Model, Value, ValueId};

/// Replaces values in all readers, body outputs included. Chains of replacements are followed.
pub fn replace_uses(body: &mut Body, map: &HashMap<ValueId, ValueId>) {
    if map.is_empty() {
        return;
    }
    let resolve = |id: ValueId| {
        let mut id = id;
        // A chain is at most as long as the map. Boundaries follow each other in order, so there is no cycle.
        for _ in 0..=map.len() {
            match map.get(&id) {
                Some(&next) if next != id => id = next,
                _ => break,
            }
        }
        id
    };
    replace_in(body, &resolve);
}

fn replace_in(body: &mut Body, resolve: &dyn Fn(ValueId) -> ValueId) {
    for node in &mut body.nodes {
        for input in node.inputs.iter_mut().flatten() {
            *input = resolve(*input);
        }
        for inner in node.bodies_mut() {
            replace_in(inner, resolve);
        }
    }
    for output in &mut body.outputs {
        *output = resolve(*output);
    }
}

/// Removes nodes and initializers on which no output depends.
pub fn remove_dead_code(body: &mut Body) {
    let index = GraphIndex::of_body(body);
    let mut live = vec![false; body.nodes.len()];
    let mut needed: HashSet<ValueId> = HashSet::new();
    let mut open: Vec<ValueId> = body.outputs.clone();
    while let Some(value) = open.pop() {
        if !needed.insert(value) {
            continue;
        }
        if let Some((number, _)) = index.node_of(value)
            && !live[number]
        {
            live[number] = true;
            let node = &body.nodes[number];
            open.extend(node.present_inputs());
            open.extend(node.bodies().flat_map(ir::captured));
        }
    }
    let mut keep = live.iter();
    body.nodes.retain(|_| keep.next().copied().unwrap_or(false));
    body.initializers.retain(|(id, _)| needed.contains(id) || body.inputs.contains(id));
}

/// Removes inputs that lost their last reader.
pub fn remove_unread_inputs(before: &Body, body: &mut Body) {
    let (known, index) = (GraphIndex::of_body(before), GraphIndex::of_body(body));
    let outputs = &body.outputs;
    body.inputs.retain(|id| known.uses(*id).is_empty() || !index.uses(*id).is_empty() || outputs.contains(id));
}

/// For each node: true when an output needs the content of its results, and not only their shapes.
pub fn content_needed(body: &Body) -> Vec<bool> {
    let index = GraphIndex::of_body(body);
    let mut needed = vec![false; body.nodes.len()];
    let mut open: Vec<ValueId> = body.outputs.clone();
    while let Some(value) = open.pop() {
        let Some((number, _)) = index.node_of(value) else { continue };
        if std::mem::replace(&mut needed[number], true) {
            continue;
        }
        let node = &body.nodes[number];
        if !node.reads_shape_only() {
            open.extend(node.present_inputs());
            open.extend(node.bodies().flat_map(ir::captured));
        }
    }
    needed
}

/// Sorts nodes into execution order and otherwise keeps their previous order.
///
/// Errors: `Error::Invalid` naming a node of a cycle.
pub fn sort_nodes(graph: &mut Graph) -> Result<()> {
    let index = GraphIndex::of_body(&graph.body);
    let body = &mut graph.body;
    let mut waiting = vec![0usize; body.nodes.len()];
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); body.nodes.len()];
    for (number, node) in body.nodes.iter().enumerate() {
        let inputs: HashSet<usize> = node
            .present_inputs()
            .chain(node.bodies().flat_map(ir::captured))
            .filter_map(|id| index.node_of(id).map(|(producer, _)| producer))
            .collect();
        waiting[number] = inputs.len();
        for producer in inputs {
            readers[producer].push(number);
        }
    }
    let mut ready: BinaryHeap<std::cmp::Reverse<usize>> =
        (0..body.nodes.len()).filter(|&number| waiting[number] == 0).map(std::cmp::Reverse).collect();
    let mut order = Vec::with_capacity(body.nodes.len());
    while let Some(std::cmp::Reverse(number)) = ready.pop() {
        order.push(number);
        for &reader in &readers[number] {
            waiting[reader] -= 1;
            if waiting[reader] == 0 {
                ready.push(std::cmp::Reverse(reader));
            }
        }
    }
    if order.len() != body.nodes.len() {
        let stuck = waiting.iter().position(|&count| count > 0).unwrap_or(0);
        let subject = graph.body.nodes[stuck].describe(graph);
        return Err(Error::invalid(subject, "waits for its own result after the rewrite"));
    }
    let mut nodes: Vec<Option<ir::Node>> = std::mem::take(&mut body.nodes).into_iter().map(Some).collect();
    body.nodes = order.into_iter().filter_map(|number| nodes[number].take()).collect();
    Ok(())
}

/// Removes unused values from the arena, then checks the graph.
///
/// Errors: `Error::Invalid` when the graph is broken or two values have the same name.
pub fn finish(model: &mut Model) -> Result<()> {
    sort_nodes(&mut model.graph)?;
    compact(&mut model.graph);
    ir::check(model)
}

fn compact(graph: &mut Graph) {
    let mut new_ids: HashMap<ValueId, ValueId> = HashMap::new();
    let mut compacted = Graph::default();
    let old = std::mem::take(&mut graph.values);
    let mut renew = |id: &mut ValueId| {
        *id = *new_ids.entry(*id).or_insert_with(|| {
            let value: Value = old.get(id.index()).cloned().unwrap_or_default();
            compacted.add_value(value)
        });
    };
    renew_body(&mut graph.body, &mut renew);
    graph.values = compacted.values;
}

/// Calls `renew` on every id of a body, definitions before their readers when the nodes are in execution order.
pub fn renew_body(body: &mut Body, renew: &mut dyn FnMut(&mut ValueId)) {
    body.inputs.iter_mut().for_each(&mut *renew);
    body.initializers.iter_mut().for_each(|(id, _)| renew(id));
    for node in &mut body.nodes {
        node.inputs.iter_mut().flatten().for_each(&mut *renew);
        for inner in node.bodies_mut() {
            renew_body(inner, renew);
        }
        node.outputs.iter_mut().flatten().for_each(&mut *renew);
    }
    body.outputs.iter_mut().for_each(&mut *renew);
}
