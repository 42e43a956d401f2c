//! Moves features that are added to the residual stream after the first layers (DeepStack) to other layers.

use std::collections::HashSet;

use crate::analysis::{Analysis, Glue, LayerMap, analyse};
use crate::base::{Error, Result};
use crate::ir::{Body, DataType, Graph, GraphIndex, Node, ValueId};

use super::tidy;

/// A part of the stream: its nodes, the stream before and the stream after them.
struct Segment {
    nodes: HashSet<usize>,
    input: ValueId,
    output: ValueId,
}

/// True when features from outside are added to the stream after one of the layers.
pub fn has_additions(map: &LayerMap) -> bool {
    additions(map).next().is_some()
}

fn additions(map: &LayerMap) -> impl Iterator<Item = (usize, &Glue)> {
    map.glue.iter().filter(|glue| !glue.inputs.is_empty()).filter_map(|glue| Some((glue.after?, glue)))
}

/// Moves the additions so that, once `dropped` are removed, the first addition follows the first kept layer, the second
/// follows the second, and so on. Additions without a remaining layer are removed.
///
/// Hugging Face's Qwen3-VL adds the features in its loop over the list of layers, so this equals
/// deleting layers from that list.
///
/// Errors: `Error::Unsupported` when the additions do not follow the first layers one by one, or another change of the
/// stream between layers prevents the move.
pub fn shift_additions(analysis: &Analysis, dropped: &[usize]) -> Result<Analysis> {
    let map = &analysis.map;
    if analysis.merged.is_some() {
        return Err(Error::unsupported("moving features to other layers", "the decoder is two branches of an `If`")
            .remedy("export it as one graph, or use `--deepstack keep`"));
    }
    let graph = &analysis.model.graph;
    check_places(graph, map)?;
    let kept: Vec<usize> = (0..map.layers.len()).filter(|layer| !dropped.contains(layer)).collect();
    let order = new_order(graph, map, &kept)?;
    let old_end = stream_end(map);
    let mut model = analysis.model.clone();
    let body = &mut model.graph.body;
    let inside: HashSet<usize> = order.iter().flat_map(|segment| segment.nodes.iter().copied()).collect();
    let mut stream = map.layers.first().map_or(old_end, |layer| layer.input);
    for segment in &order {
        for &number in &segment.nodes {
            replace_in(&mut body.nodes[number], segment.input, stream);
        }
        stream = segment.output;
    }
    if stream != old_end {
        for (_, node) in body.nodes.iter_mut().enumerate().filter(|(number, _)| !inside.contains(number)) {
            replace_in(node, old_end, stream);
        }
    }
    tidy::remove_dead_code(body);
    tidy::finish(&mut model)?;
    let moved = analyse(&model)?;
    if moved.map.layers.len() != map.layers.len() {
        let problem = format!("{} layers became {}", map.layers.len(), moved.map.layers.len());
        return Err(move_error(problem));
    }
    Ok(moved)
}

fn move_error(problem: impl Into<String>) -> Error {
    Error::unsupported("moving features to other layers", problem)
        .remedy("prune the model that was never pruned, or use `--deepstack keep`")
}

/// Errors: `Error::Unsupported` unless one feature is added after each of the first layers.
fn check_places(graph: &Graph, map: &LayerMap) -> Result<()> {
    let float = |id: &&ValueId| {
        let dtype = graph.value(**id).ty.as_ref().and_then(|ty| ty.dtype());
        dtype.is_some_and(DataType::is_float)
    };
    let places: Vec<usize> = additions(map)
        .flat_map(|(after, glue)| std::iter::repeat_n(after, glue.inputs.iter().filter(float).count()))
        .collect();
    if places.iter().enumerate().any(|(number, &after)| after != number) {
        let problem =
            format!("features are added behind layers {places:?}, expected one behind each of the first layers");
        return Err(move_error(problem));
    }
    Ok(())
}

/// The stream after the last layer and its addition.
fn stream_end(map: &LayerMap) -> ValueId {
    let last = map.layers.len() - 1;
    let behind = map.glue.iter().find(|glue| glue.after == Some(last)).map(|glue| glue.to);
    behind.unwrap_or(map.layers[last].output)
}

/// All layers, each followed by its new addition.
///
/// Errors: `Error::Unsupported` when a segment does not begin where the previous one ends (casts are ignored).
fn new_order(graph: &Graph, map: &LayerMap, kept: &[usize]) -> Result<Vec<Segment>> {
    let body = &graph.body;
    let index = GraphIndex::of_body(body);
    let mut before = map.layers.first().map(|layer| layer.input);
    let mut segment = |input: ValueId, output: ValueId| {
        let from = before.replace(output).unwrap_or(input);
        if input != from && uncast(body, &index, input) != uncast(body, &index, from) {
            let problem = format!("the stream has another change than the features, before `{}`", graph.name(input));
            return Err(move_error(problem));
        }
        Ok(Segment { nodes: between(body, &index, from, output), input: from, output })
    };
    let (mut layers, mut features) = (Vec::new(), Vec::new());
    for layer in &map.layers {
        layers.push(segment(layer.input, layer.output)?);
        for glue in map.glue.iter().filter(|glue| glue.after == Some(layer.index)) {
            let added = segment(glue.from, glue.to)?;
            if !glue.inputs.is_empty() {
                features.push(added);
            }
        }
    }
    if map.glue.iter().any(|glue| glue.after.is_some() && glue.inputs.is_empty()) {
        return Err(move_error("the stream is changed between layers"));
    }
    // The n-th addition follows the n-th kept layer.
    let mut order = Vec::new();
    let mut features = features.into_iter();
    for (number, layer) in layers.into_iter().enumerate() {
        order.push(layer);
        if kept.contains(&number) {
            order.extend(features.next());
        }
    }
    Ok(order)
}

/// The value of which this one is a cast, or the value itself.
fn uncast(body: &Body, index: &GraphIndex, mut value: ValueId) -> ValueId {
    while let Some((number, _)) = index.node_of(value)
        && let node = &body.nodes[number]
        && matches!(node.op_type.as_str(), "Cast" | "Identity")
        && let Some(input) = node.present_inputs().next()
    {
        value = input;
    }
    value
}

/// Numbers of the nodes that compute `to` from `from`.
fn between(body: &Body, index: &GraphIndex, from: ValueId, to: ValueId) -> HashSet<usize> {
    let mut found = HashSet::new();
    let mut open = vec![to];
    while let Some(value) = open.pop() {
        if value == from {
            continue;
        }
        if let Some((number, _)) = index.node_of(value)
            && found.insert(number)
        {
            let node = &body.nodes[number];
            open.extend(node.present_inputs());
            open.extend(node.bodies().flat_map(crate::ir::captured));
        }
    }
    found
}

fn replace_in(node: &mut Node, from: ValueId, to: ValueId) {
    for input in node.inputs.iter_mut().flatten().filter(|input| **input == from) {
        *input = to;
    }
    for inner in node.bodies_mut() {
        inner.nodes.iter_mut().for_each(|node| replace_in(node, from, to));
        inner.outputs.iter_mut().filter(|output| **output == from).for_each(|output| *output = to);
    }
}
