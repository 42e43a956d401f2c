//! Takes whole layers out of a graph.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Analysis, LayerMap};
use crate::base::{Error, Result};
use crate::ir::{Body, Model, Node, ValueId};

use super::{fuse, merged, renumber, tidy};

/// The metadata key that holds the original index of every layer of a pruned graph, joined by commas.
pub const LAYERS_KEY: &str = "interlace.layers";

/// For each layer of the graph, its index in the graph it was pruned from; the identity where nothing was recorded.
pub fn original_layers(model: &Model, layers: usize) -> Vec<usize> {
    let recorded: Option<Vec<usize>> = model
        .metadata
        .iter()
        .find(|(key, _)| key == LAYERS_KEY)
        .and_then(|(_, list)| list.split(',').map(|item| item.trim().parse().ok()).collect());
    recorded.filter(|list| list.len() == layers).unwrap_or_else(|| (0..layers).collect())
}

/// The model without the given layers. A dropped layer is the identity: its output's readers read its input instead;
/// its cache ports go, the others are renumbered without a gap; whatever nothing reads any more goes too.
///
/// Errors: `Error::Invalid` when a layer does not exist, is named twice, or none would be left; when a dropped layer's
/// weights are still needed by what stays.
pub fn drop_layers(analysis: &Analysis, drop: &[usize]) -> Result<Model> {
    let map = &analysis.map;
    let count = map.layers.len();
    let dropped = validate(drop, count)?;
    let kept: Vec<usize> = (0..count).filter(|layer| !dropped.contains(layer)).collect();
    let mut model = match &analysis.merged {
        Some(merged) => merged::drop_in_branches(merged, &dropped, &kept)?,
        None => {
            let mut model = cut(&analysis.model, map, &dropped, &kept)?;
            renumber::rename_ports(&mut model.graph, map, &kept)?;
            model
        }
    };
    let original = original_layers(&model, count);
    let list: Vec<String> = kept.iter().map(|&layer| original[layer].to_string()).collect();
    model.metadata.retain(|(key, _)| key != LAYERS_KEY);
    model.metadata.push((LAYERS_KEY.to_string(), list.join(",")));
    tidy::finish(&mut model)?;
    Ok(model)
}

/// A graph without the given layers: boundaries redirected, ports gone, dead code removed, fusions put back. Ports keep
/// their names and nodes may be out of order.
pub(super) fn cut(source: &Model, map: &LayerMap, dropped: &[usize], kept: &[usize]) -> Result<Model> {
    let mut model = source.clone();
    let mut replacements: HashMap<ValueId, ValueId> = HashMap::new();
    let mut gone_ports: HashSet<ValueId> = HashSet::new();
    for &layer in dropped {
        let layer = &map.layers[layer];
        let (from, to) = (model.graph.value(layer.output), model.graph.value(layer.carried));
        if let (Some(a), Some(b)) = (&from.ty, &to.ty)
            && a.dtype() != b.dtype()
        {
            return Err(Error::unsupported(
                format!("layer {}", layer.index),
                format!("its output `{}` and input `{}` are of different types", from.name, to.name),
            ));
        }
        replacements.insert(layer.output, layer.carried);
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
    body.outputs.retain(|id| !gone_ports.contains(id));
    keep_output_names(body, &mut replacements);
    tidy::replace_uses(body, &replacements);
    tidy::remove_dead_code(body);
    repoint_shape_readers(&source.graph.body, body, map, dropped, kept);
    tidy::remove_dead_code(body);
    body.inputs.retain(|id| !gone_ports.contains(id));
    fuse::fuse_skip_norms(&mut model);
    tidy::remove_dead_code(&mut model.graph.body);
    refuse_leftovers(&model, map, dropped)?;
    Ok(model)
}

fn validate(drop: &[usize], count: usize) -> Result<Vec<usize>> {
    let mut sorted = drop.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid("layers to drop", format!("layer {} is named twice", twice[0])));
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
        ));
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

/// A dropped layer's own weight that is still read means that something outside the layer depends on its inside.
fn refuse_leftovers(model: &Model, map: &LayerMap, dropped: &[usize]) -> Result<()> {
    let live: HashMap<ValueId, u64> =
        model.graph.body.initializers.iter().map(|(id, tensor)| (*id, tensor.element_count())).collect();
    for &layer in dropped {
        let layer = &map.layers[layer];
        if let Some(&left) = layer.weights.iter().find(|id| live.get(id).is_some_and(|&count| count > 64)) {
            return Err(Error::unsupported(
                format!("layer {}", layer.index),
                format!("its weight `{}` is still needed by what stays", model.graph.name(left)),
            )
            .remedy("the graph reads this layer's inside from elsewhere; export it again without such sharing"));
        }
    }
    Ok(())
}
