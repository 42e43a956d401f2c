//! Removes layers from both branches of a merged decoder.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Branch, LayerMap, Merged};
use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, Model, ValueId};

use super::hidden_states::Series;
use super::removal::without_layers;
use super::{renumber, tidy};

/// The merged model without the given layers, before `tidy::finish`.
///
/// Errors: as `drop_layers`; `Error::Invalid` when different outputs would be removed from the branches.
pub fn drop_in_branches(merged: &Merged, dropped: &[usize], kept: &[usize]) -> Result<Model> {
    let mut model = merged.original.clone();
    let known = model.graph.values.len();
    let subject = || model_subject(merged);
    let mut stays: Option<Vec<bool>> = None;
    let mut gone_inputs: HashSet<ValueId> = HashSet::new();
    let mut ports: Option<LayerMap> = None;
    for branch in &merged.branches {
        let gone = gone_outputs(merged, branch, dropped);
        let part = without_layers(&branch.model, &branch.map, dropped, kept, &gone)?;
        let left: HashSet<ValueId> = part.graph.body.outputs.iter().copied().collect();
        let mine: Vec<bool> = branch.model.graph.body.outputs.iter().map(|id| left.contains(id)).collect();
        if *stays.get_or_insert_with(|| mine.clone()) != mine {
            return Err(Error::invalid(subject(), "its branches list their outputs in different order")
                .remedy("export prefill and decode from one model"));
        }
        gone_inputs
            .extend(dropped.iter().flat_map(|&layer| &branch.map.layers[layer].ports).filter_map(|port| port.past));
        merge_ports(&mut ports, branch, &merged.original.graph.body.nodes[merged.node].outputs);
        restore_branch(&mut model, merged.node, branch.attribute, part, known);
    }
    let (Some(stays), Some(ports)) = (stays, ports) else {
        return Err(Error::invalid(subject(), "has no branches"));
    };
    let body = &mut model.graph.body;
    let mut position = 0;
    let mut gone_outputs = HashSet::new();
    body.nodes[merged.node].outputs.retain(|output| {
        let keep = stays.get(position).copied().unwrap_or(true);
        position += 1;
        if !keep {
            gone_outputs.extend(*output);
        }
        keep
    });
    body.outputs.retain(|id| !gone_outputs.contains(id));
    body.inputs.retain(|id| !gone_inputs.contains(id));
    tidy::remove_dead_code(body);
    tidy::remove_unread_inputs(&merged.original.graph.body, body);
    renumber::rename_ports(&mut model.graph, &ports, kept)?;
    let lists = Series::all(&merged.original.graph, &ports);
    lists.iter().for_each(|list| list.renumber(&mut model.graph, kept));
    Ok(model)
}

/// Outputs of a branch that are hidden states of dropped layers, according to the whole model's output names.
fn gone_outputs(merged: &Merged, branch: &Branch, dropped: &[usize]) -> Vec<ValueId> {
    let mut outer = None;
    let outputs = &merged.original.graph.body.nodes[merged.node].outputs;
    merge_ports(&mut outer, branch, outputs);
    let lists = outer.map(|map| Series::all(&merged.original.graph, &map)).unwrap_or_default();
    let gone: Vec<ValueId> = lists.iter().flat_map(|list| list.outputs_of(dropped)).collect();
    let pairs = branch.model.graph.body.outputs.iter().zip(outputs);
    pairs.filter(|(_, outer)| outer.is_some_and(|outer| gone.contains(&outer))).map(|(inner, _)| *inner).collect()
}

/// The layers with the ports and taps of the whole model; `None` without branches.
pub fn outer_map(merged: &Merged) -> Option<LayerMap> {
    let mut outer = None;
    for branch in &merged.branches {
        merge_ports(&mut outer, branch, &merged.original.graph.body.nodes[merged.node].outputs);
    }
    outer
}

fn model_subject(merged: &Merged) -> String {
    merged.original.graph.body.nodes[merged.node].describe(&merged.original.graph)
}

/// Replaces a branch's ports by those of the whole model: inputs from the branch that reads them, outputs of the `If`.
fn merge_ports(ports: &mut Option<LayerMap>, branch: &Branch, outputs: &[Option<ValueId>]) {
    let outer: HashMap<ValueId, ValueId> = branch
        .model
        .graph
        .body
        .outputs
        .iter()
        .zip(outputs)
        .filter_map(|(inner, outer)| Some((*inner, (*outer)?)))
        .collect();
    let mut mine = branch.map.clone();
    for port in mine.layers.iter_mut().flat_map(|layer| &mut layer.ports) {
        port.present = port.present.and_then(|id| outer.get(&id).copied());
    }
    mine.result = outer.get(&mine.result).copied().unwrap_or(mine.result);
    for tap in &mut mine.taps {
        tap.output = outer.get(&tap.output).copied().unwrap_or(tap.output);
    }
    let Some(known) = ports else {
        *ports = Some(mine);
        return;
    };
    for (layer, other) in known.layers.iter_mut().zip(mine.layers) {
        for port in &mut layer.ports {
            if let Some(twin) = other.ports.iter().find(|twin| twin.role == port.role) {
                port.past = port.past.or(twin.past);
                port.present = port.present.or(twin.present);
            }
        }
    }
}

/// Puts a branch back into its `If`. Values that the removal created get ids in the whole model's arena.
fn restore_branch(model: &mut Model, node: usize, attribute: usize, mut part: Model, known: usize) {
    let mut new_ids: HashMap<ValueId, ValueId> = HashMap::new();
    let values = std::mem::take(&mut part.graph.values);
    let graph = &mut model.graph;
    tidy::renew_body(&mut part.graph.body, &mut |id| {
        if id.index() >= known {
            let value = values.get(id.index()).cloned().unwrap_or_default();
            *id = *new_ids.entry(*id).or_insert_with(|| graph.add_value(value));
        }
    });
    let outer_weights: HashSet<ValueId> = model.graph.body.initializers.iter().map(|(id, _)| *id).collect();
    let outer_made: HashSet<ValueId> =
        model.graph.body.nodes[..node].iter().flat_map(|node| node.present_outputs()).collect();
    let mut inner: Body = part.graph.body;
    inner.inputs.clear();
    inner.initializers.retain(|(id, _)| !outer_weights.contains(id));
    inner.nodes.retain(|node| node.present_outputs().all(|id| !outer_made.contains(&id)));
    if let Some((_, content)) = model.graph.body.nodes[node].attributes.get_mut(attribute)
        && let AttributeKind::Graph(body) = &mut content.kind
    {
        body.initializers = inner.initializers;
        body.nodes = inner.nodes;
        body.outputs = inner.outputs;
    }
}
