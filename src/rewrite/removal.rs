//! Removes layers from one graph: boundaries, ports, and checks that no remaining node needs them.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Layer, LayerMap, PortRole};
use crate::base::{Error, Result};
use crate::ir::{Body, Graph, Model, Node, ValueId, captured};

use super::{fuse, tidy};

/// Constants with at most this many elements are shapes, axes and scales, which exporters share between layers.
const SHAPE_ELEMENTS: u64 = 64;

/// A graph without the given layers: boundaries redirected, their ports and `gone_outputs` removed, dead code removed,
/// fusions restored. Ports keep their names; nodes may be out of order.
pub fn without_layers(
    source: &Model,
    map: &LayerMap,
    dropped: &[usize],
    kept: &[usize],
    gone_outputs: &[ValueId],
) -> Result<Model> {
    refuse_glue(source, map, dropped)?;
    let mut model = source.clone();
    let mut replacements: HashMap<ValueId, ValueId> = HashMap::new();
    let mut gone_ports: HashSet<ValueId> = HashSet::new();
    for &layer in dropped {
        let layer = &map.layers[layer];
        let read_sums = layer.sums.iter().filter(|id| read_outside(&source.graph.body, layer, **id));
        for &value in read_sums.chain([&layer.output]) {
            check_replaceable(&model.graph, layer, value)?;
        }
        replacements.extend(layer.sums.iter().chain([&layer.output]).map(|&id| (id, layer.carried)));
        for port in &layer.ports {
            gone_ports.extend(port.past);
            gone_ports.extend(port.present);
            if let Some(past) = port.past
                && let Some(other) = surviving_past(map, layer.index, port.role, kept)
            {
                replacements.insert(past, other);
            }
        }
    }
    let body = &mut model.graph.body;
    body.outputs.retain(|id| !gone_ports.contains(id) && !gone_outputs.contains(id));
    keep_output_names(body, &mut replacements);
    tidy::replace_uses(body, &replacements);
    tidy::remove_dead_code(body);
    repoint_shape_readers(&source.graph.body, body, map, dropped, kept);
    tidy::remove_dead_code(body);
    body.inputs.retain(|id| !gone_ports.contains(id));
    tidy::remove_unread_inputs(&source.graph.body, body);
    refuse_leftovers(source, &model, map, dropped)?;
    fuse::fuse_skip_norms(&mut model);
    tidy::remove_dead_code(&mut model.graph.body);
    Ok(model)
}

/// Checks that the value that enters a layer can replace `value`, which the layer computes.
///
/// Errors: `Error::Unsupported` when the two have different element types.
pub(super) fn check_replaceable(graph: &Graph, layer: &Layer, value: ValueId) -> Result<()> {
    let (from, to) = (graph.value(value), graph.value(layer.carried));
    if let (Some(a), Some(b)) = (&from.ty, &to.ty)
        && a.dtype() != b.dtype()
    {
        return Err(Error::unsupported(
            format!("layer {}", layer.index),
            format!("`{}` in it and its input `{}` are of different types", from.name, to.name),
        )
        .remedy("keep this layer, or export the model in one float type"));
    }
    Ok(())
}

/// The cache input of the same role of the nearest kept layer; layers of the same kind have priority.
fn surviving_past(map: &LayerMap, from: usize, role: PortRole, kept: &[usize]) -> Option<ValueId> {
    let class = map.layers[from].class;
    kept.iter()
        .filter_map(|&layer| {
            let layer = &map.layers[layer];
            let port = layer.ports.iter().find(|port| port.role == role)?;
            Some((layer.class != class, layer.index.abs_diff(from), port.past?))
        })
        .min_by_key(|&(other_class, distance, _)| (other_class, distance))
        .map(|(_, _, past)| past)
}

/// When a dropped layer's output is a graph output, an `Identity` node keeps its name.
fn keep_output_names(body: &mut Body, replacements: &mut HashMap<ValueId, ValueId>) {
    let outputs: Vec<ValueId> = body.outputs.iter().copied().filter(|id| replacements.contains_key(id)).collect();
    for output in outputs {
        let Some(mut source) = replacements.remove(&output) else { continue };
        while let Some(&next) = replacements.get(&source) {
            source = next;
        }
        for node in &mut body.nodes {
            for slot in &mut node.outputs {
                if *slot == Some(output) {
                    *slot = None;
                }
            }
            for input in node.inputs.iter_mut().flatten() {
                if *input == output {
                    *input = source;
                }
            }
        }
        body.nodes.retain(|node| node.outputs.iter().any(Option::is_some));
        body.nodes.push(Node {
            op_type: "Identity".into(),
            inputs: vec![Some(source)],
            outputs: vec![Some(output)],
            ..Node::default()
        });
    }
}

/// Redirects nodes that need only the shape of a value inside a dropped layer (an exporter computed a shape once for
/// all layers) to the corresponding value of the first kept layer.
fn repoint_shape_readers(before: &Body, body: &mut Body, map: &LayerMap, dropped: &[usize], kept: &[usize]) {
    let mut twin: HashMap<ValueId, ValueId> = HashMap::new();
    for &layer in dropped {
        let layer = &map.layers[layer];
        let operators = |path: &[usize]| path.iter().map(|&node| before.nodes[node].op()).collect::<Vec<_>>();
        let own = operators(&layer.path);
        let same = kept.iter().map(|&other| &map.layers[other]).find(|other| operators(&other.path) == own);
        let Some(other) = same else { continue };
        for (&mine, &theirs) in layer.path.iter().zip(&other.path) {
            let (mine, theirs) = (&before.nodes[mine], &before.nodes[theirs]);
            for (output, replacement) in mine.outputs.iter().zip(&theirs.outputs) {
                if let (Some(output), Some(replacement)) = (output, replacement) {
                    twin.insert(*output, *replacement);
                }
            }
        }
    }
    let content = tidy::content_needed(body);
    for (node, by_content) in body.nodes.iter_mut().zip(content) {
        if !by_content || node.reads_shape_only() {
            for input in node.inputs.iter_mut().flatten() {
                if let Some(&replacement) = twin.get(input) {
                    *input = replacement;
                }
            }
        }
    }
}

/// True when a node outside the layer or a graph output reads a value of the layer.
fn read_outside(body: &Body, layer: &Layer, value: ValueId) -> bool {
    let reads = |node: &Node| node.present_inputs().chain(node.bodies().flat_map(captured)).any(|id| id == value);
    body.outputs.contains(&value)
        || body.nodes.iter().enumerate().any(|(number, node)| layer.path.binary_search(&number).is_err() && reads(node))
}

/// Rejects nodes with weights between layers: they could belong to the layer before them, to the layer
/// after them, or to neither.
fn refuse_glue(model: &Model, map: &LayerMap, dropped: &[usize]) -> Result<()> {
    for glue in &map.glue {
        let Some(&weight) = glue.weights.first() else { continue };
        let beside = [glue.after, Some(glue.after.map_or(0, |layer| layer + 1))];
        if let Some(layer) = beside.into_iter().flatten().find(|layer| dropped.contains(layer)) {
            let place = glue.after.map_or("before layer 0".to_string(), |layer| format!("behind layer {layer}"));
            return Err(Error::unsupported(
                format!("layer {layer}"),
                format!(
                    "{place} the stream passes {} with weight `{}`, which not every layer has, so it is unclear whether it \
                     belongs to the layer",
                    glue.operators.join(", "),
                    model.graph.name(weight)
                ),
            )
            .remedy(format!("keep layer {layer}")));
        }
    }
    Ok(())
}

/// Errors: `Error::Unsupported` when a remaining node reads a value from inside a dropped layer.
fn refuse_leftovers(source: &Model, model: &Model, map: &LayerMap, dropped: &[usize]) -> Result<()> {
    let (before, body) = (&source.graph.body, &model.graph.body);
    let content = tidy::content_needed(body);
    for &layer in dropped {
        let layer = &map.layers[layer];
        let made = layer.path.iter().flat_map(|&node| before.nodes[node].present_outputs());
        let inner: HashSet<ValueId> = made.filter(|id| *id != layer.output && !layer.sums.contains(id)).collect();
        let left = body
            .nodes
            .iter()
            .zip(&content)
            .find(|(node, content)| **content && node.present_outputs().any(|id| inner.contains(&id)));
        if let Some((node, _)) = left {
            return Err(leftover(source, model, map, layer, node));
        }
        let live: HashMap<ValueId, u64> =
            body.initializers.iter().map(|(id, tensor)| (*id, tensor.element_count())).collect();
        if let Some(&weight) = layer.weights.iter().find(|id| live.get(id).is_some_and(|&count| count > SHAPE_ELEMENTS))
        {
            return Err(Error::unsupported(
                format!("layer {}", layer.index),
                format!("the remaining graph still needs its weight `{}`", model.graph.name(weight)),
            )
            .remedy("the graph reads this layer's inside from elsewhere; export it again without such sharing"));
        }
    }
    Ok(())
}

/// Names the readers of `node`, which is inside a dropped layer: kept layers, or otherwise outputs.
fn leftover(source: &Model, model: &Model, map: &LayerMap, layer: &Layer, node: &Node) -> Error {
    let before = &source.graph.body;
    let mut reached: HashSet<ValueId> = node.present_outputs().collect();
    let mut readers: Vec<usize> = Vec::new();
    for (number, other) in before.nodes.iter().enumerate() {
        let reads = other.present_inputs().chain(other.bodies().flat_map(captured)).any(|id| reached.contains(&id));
        if !reads || other.reads_shape_only() {
            continue;
        }
        match map.layers.iter().find(|other| other.path.binary_search(&number).is_ok()) {
            Some(other) if other.index != layer.index => readers.push(other.index),
            Some(_) | None => reached.extend(other.present_outputs().filter(|id| !is_boundary(map, *id))),
        }
    }
    readers.dedup();
    let outputs = before.outputs.iter().filter(|id| reached.contains(id) && model.graph.body.outputs.contains(id));
    let outputs: Vec<String> = outputs.map(|id| format!("output `{}`", source.graph.name(*id))).collect();
    let layers: Vec<String> = readers.iter().map(|reader| format!("layer {reader}")).collect();
    let (needed_by, remedy) = match (layers.is_empty(), outputs.is_empty()) {
        (false, _) => (layers.join(", "), format!("keep layer {}, or drop {} with it", layer.index, layers.join(", "))),
        (true, false) => (
            outputs.join(", "),
            format!("keep layer {}, or export the graph without {}", layer.index, outputs.join(", ")),
        ),
        (true, true) => ("the remaining graph".to_string(), format!("keep layer {}", layer.index)),
    };
    Error::unsupported(
        format!("layer {}", layer.index),
        format!("{} in it is needed by {needed_by}", node.describe(&source.graph)),
    )
    .remedy(remedy)
}

fn is_boundary(map: &LayerMap, value: ValueId) -> bool {
    map.layers.iter().any(|layer| layer.output == value || layer.sums.contains(&value))
}
