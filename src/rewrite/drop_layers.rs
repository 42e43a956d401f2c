//! Takes whole layers out of a graph.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Analysis, Layer, LayerMap};
use crate::base::{Error, Result};
use crate::ir::{Body, Model, Node, ValueId, captured};

use super::hidden_states::{MovedTap, Series, moved_taps};
use super::{fuse, merged, renumber, tidy};

/// The metadata key that holds the original index of every layer of a pruned graph, joined by commas.
pub const LAYERS_KEY: &str = "interlace.layers";

/// The same for the vision tower of a graph that holds the language model too.
const VISION_LAYERS_KEY: &str = "interlace.layers.vision";

/// For each layer of the graph, its index in the graph it was pruned from; the identity where nothing was recorded.
pub fn original_layers(model: &Model, layers: usize) -> Vec<usize> {
    recorded_layers(model, LAYERS_KEY, layers)
}

fn recorded_layers(model: &Model, key: &str, layers: usize) -> Vec<usize> {
    let recorded: Option<Vec<usize>> = model
        .metadata
        .iter()
        .find(|(known, _)| known == key)
        .and_then(|(_, list)| list.split(',').map(|item| item.trim().parse().ok()).collect());
    recorded.filter(|list| list.len() == layers).unwrap_or_else(|| (0..layers).collect())
}

/// The model without the given layers. A dropped layer is the identity: its output's readers read its input instead, outputs
/// that show the stream among them; its cache ports go, the others are renumbered without a gap; whatever nothing reads any
/// more is removed too, inputs that only dropped layers read among it. Every other input and output stays under its name, but for
/// outputs that are a list of hidden states with one for every layer, which are numbered anew; [`tap_changes`] tells of them.
///
/// Errors: `Error::Invalid` when a layer does not exist, is named twice, or none would be left; `Error::Unsupported` when what
/// stays needs the inside of a dropped layer, or nodes with weights beside it could belong to it or not.
pub fn drop_layers(analysis: &Analysis, drop: &[usize]) -> Result<Model> {
    let map = &analysis.map;
    let count = map.layers.len();
    let dropped = validate(drop, count)?;
    let kept: Vec<usize> = (0..count).filter(|layer| !dropped.contains(layer)).collect();
    let mut model = match &analysis.merged {
        Some(merged) => merged::drop_in_branches(merged, &dropped, &kept)?,
        None => {
            let lists = Series::all(&analysis.model.graph, map);
            let gone: Vec<ValueId> = lists.iter().flat_map(|list| list.outputs_of(&dropped)).collect();
            let mut model = cut(&analysis.model, map, &dropped, &kept, &gone)?;
            renumber::rename_ports(&mut model.graph, map, &kept)?;
            lists.iter().for_each(|list| list.renumber(&mut model.graph, &kept));
            model
        }
    };
    let key = if analysis.is_vision_beside_text { VISION_LAYERS_KEY } else { LAYERS_KEY };
    let original = recorded_layers(&model, key, count);
    let list: Vec<String> = kept.iter().map(|&layer| original[layer].to_string()).collect();
    model.metadata.retain(|(known, _)| known != key);
    model.metadata.push((key.to_string(), list.join(",")));
    tidy::finish(&mut model)?;
    Ok(model)
}

/// What [`drop_layers`] changes of the outputs that show the residual stream, in the order of the outputs.
pub fn tap_changes(analysis: &Analysis, drop: &[usize]) -> Vec<MovedTap> {
    let kept: Vec<usize> = (0..analysis.map.layers.len()).filter(|layer| !drop.contains(layer)).collect();
    match &analysis.merged {
        Some(merged) => {
            merged::outer_map(merged).map(|map| moved_taps(&merged.original.graph, &map, &kept)).unwrap_or_default()
        }
        None => moved_taps(&analysis.model.graph, &analysis.map, &kept),
    }
}

/// A graph without the given layers: boundaries redirected, ports and `gone_outputs` gone, dead code removed, fusions put
/// back. Ports keep their names and nodes may be out of order.
pub(super) fn cut(
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
        for &from in layer.sums.iter().filter(|id| read_outside(&source.graph.body, layer, **id)).chain([&layer.output])
        {
            let (from, to) = (model.graph.value(from), model.graph.value(layer.carried));
            if let (Some(a), Some(b)) = (&from.ty, &to.ty)
                && a.dtype() != b.dtype()
            {
                return Err(Error::unsupported(
                    format!("layer {}", layer.index),
                    format!("`{}` in it and its input `{}` are of different types", from.name, to.name),
                )
                .remedy("keep this layer, or export the model in one float type"));
            }
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

fn validate(drop: &[usize], count: usize) -> Result<Vec<usize>> {
    let mut sorted = drop.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid("layers to drop", format!("layer {} is named twice", twice[0]))
            .remedy("name each layer once"));
    }
    if let Some(&layer) = sorted.last()
        && layer >= count
    {
        return Err(Error::invalid("layers to drop", format!("layer {layer} does not exist"))
            .remedy(format!("the layers are 0 to {}", count.saturating_sub(1))));
    }
    if sorted.len() == count {
        return Err(Error::invalid(
            "layers to drop",
            format!("all {count} layers are named, so nothing would be left"),
        )
        .remedy("keep at least one"));
    }
    Ok(sorted)
}

/// The cache input of the same role of the nearest layer that stays, the same kind of layer first.
fn surviving_past(map: &LayerMap, from: usize, role: crate::analysis::PortRole, kept: &[usize]) -> Option<ValueId> {
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

/// Where a dropped layer's output is an output of the graph, a copy takes over its name.
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

/// Nodes that stay only for the shape of something inside a dropped layer (an exporter that computed a shape once for
/// all layers) read the same place of the first layer that stays.
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

/// True when something outside the layer reads a value of it.
fn read_outside(body: &Body, layer: &Layer, value: ValueId) -> bool {
    let reads = |node: &Node| node.present_inputs().chain(node.bodies().flat_map(captured)).any(|id| id == value);
    body.outputs.contains(&value)
        || body.nodes.iter().enumerate().any(|(number, node)| layer.path.binary_search(&number).is_err() && reads(node))
}

/// Nodes between layers that read weights could be part of the layer before them, of the one behind, or of neither.
fn refuse_glue(model: &Model, map: &LayerMap, dropped: &[usize]) -> Result<()> {
    for glue in &map.glue {
        let Some(&weight) = glue.weights.first() else { continue };
        let beside = [glue.after, Some(glue.after.map_or(0, |layer| layer + 1))];
        if let Some(layer) = beside.into_iter().flatten().find(|layer| dropped.contains(layer)) {
            let place = glue.after.map_or("before layer 0".to_string(), |layer| format!("behind layer {layer}"));
            return Err(Error::unsupported(
                format!("layer {layer}"),
                format!(
                    "{place} the stream passes {} with weight `{}`, which not every layer has, so whether that goes with \
                     the layer is not known",
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
        if let Some(&weight) = layer.weights.iter().find(|id| live.get(id).is_some_and(|&count| count > 64)) {
            return Err(Error::unsupported(
                format!("layer {}", layer.index),
                format!("its weight `{}` is still needed by what stays", model.graph.name(weight)),
            )
            .remedy("the graph reads this layer's inside from elsewhere; export it again without such sharing"));
        }
    }
    Ok(())
}

/// Names who needs `node` of a dropped layer: layers that stay, or else outputs.
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
        (true, true) => ("what stays".to_string(), format!("keep layer {}", layer.index)),
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
