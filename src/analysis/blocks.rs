//! Residual blocks between the values of the stream, and layers out of blocks.

use std::collections::{HashMap, HashSet};

use crate::base::{Error, Result};
use crate::ir::{Attribute, Body, Graph, GraphIndex, ValueId, ValueType};

use super::kinds::{self, Mixing};
use super::stream::{Chain, data_inputs};

/// `x + f(x)` between two neighbouring values of the stream.
#[derive(Clone, Debug)]
pub struct Block {
    /// The chain position of `x`.
    pub position: usize,
    /// The chain position of the sum, a bias added behind it included.
    pub end: usize,
    /// The addend that carries `x` on: `x` itself, or a cast of it.
    pub carried: ValueId,
    pub mixing: Mixing,
}

/// The blocks of one layer in order: one that mixes tokens, and those behind it that do not.
#[derive(Clone, Debug)]
pub struct LayerBlocks {
    pub blocks: Vec<Block>,
}

/// Operators that hand a tensor on without computing with it.
const HAND_ON: &[&str] = &["Cast", "Identity", "Dropout", "Reshape", "Squeeze", "Unsqueeze"];

/// Chain positions whose segment is a residual block, with the addend that carries the stream on.
pub fn residual_positions(body: &Body, index: &GraphIndex, chain: &Chain) -> Vec<(usize, ValueId)> {
    let mut found = Vec::new();
    for position in 0..chain.values.len().saturating_sub(1) {
        let (from, to) = (chain.values[position], chain.values[position + 1]);
        let Some((node, _)) = index.node_of(to) else { continue };
        let Some(operands) = addends(body, node) else { continue };
        // One addend is the stream itself, another one is computed from it on its own path.
        let carried = operands.iter().copied().find(|&value| carries(body, index, value, from, 0));
        let Some(carried) = carried else { continue };
        let computed = chain.segment(position).filter(|&inner| inner != node).count();
        let branch = operands.iter().any(|&value| value != carried && on_path(index, chain, value, position))
            || inner_branch(body, index, chain, carried, from, position);
        if branch && computed > 0 {
            found.push((position, carried_value(body, index, carried, from)));
        }
    }
    found
}

fn addends(body: &Body, node: usize) -> Option<Vec<ValueId>> {
    let node = &body.nodes[node];
    match (node.domain.as_str(), node.op_type.as_str()) {
        ("", "Add" | "Sum") => Some(node.present_inputs().collect()),
        // alpha * A * B + beta * C: the stream can come in as C.
        ("", "Gemm") | ("com.microsoft", "FusedGemm") => Some(node.present_inputs().collect()),
        _ => None,
    }
}

fn on_path(index: &GraphIndex, chain: &Chain, value: ValueId, position: usize) -> bool {
    index.node_of(value).is_some_and(|(node, _)| chain.level[node] == Some(position))
}

/// True when `value` is `from`, a cast or reshape of it, or a sum with such an addend.
fn carries(body: &Body, index: &GraphIndex, value: ValueId, from: ValueId, depth: usize) -> bool {
    if value == from {
        return true;
    }
    let Some((node, _)) = index.node_of(value) else { return false };
    if depth > 8 {
        return false;
    }
    let inner = &body.nodes[node];
    if inner.domain.is_empty() && HAND_ON.contains(&inner.op_type.as_str()) {
        return inner.inputs.first().copied().flatten().is_some_and(|id| carries(body, index, id, from, depth + 1));
    }
    match addends(body, node) {
        Some(operands) => operands.iter().any(|&id| carries(body, index, id, from, depth + 1)),
        None => false,
    }
}

/// Under sums, the addend that is `from` or a cast of it.
fn carried_value(body: &Body, index: &GraphIndex, value: ValueId, from: ValueId) -> ValueId {
    let mut value = value;
    loop {
        let Some((node, _)) = index.node_of(value).filter(|_| value != from) else { return value };
        let Some(operands) = addends(body, node) else { return value };
        match operands.into_iter().find(|&id| carries(body, index, id, from, 0)) {
            Some(inner) => value = inner,
            None => return value,
        }
    }
}

/// `from` itself where `carried` is a cast of it to a narrower type and back: the next layer rounds the stream for itself.
fn unrounded(graph: &Graph, body: &Body, index: &GraphIndex, carried: ValueId, from: ValueId) -> ValueId {
    let Some(own) = graph.value(from).ty.as_ref().and_then(ValueType::dtype) else { return carried };
    let mut types = Vec::new();
    let mut value = carried;
    while value != from {
        let Some((node, _)) = index.node_of(value) else { return carried };
        let node = &body.nodes[node];
        match (node.domain.as_str(), node.op_type.as_str()) {
            ("", "Identity") => {}
            ("", "Cast") => types.push(node.attribute("to").and_then(Attribute::as_int)),
            _ => return carried,
        }
        let Some(inner) = node.inputs.first().copied().flatten() else { return carried };
        value = inner;
    }
    let is_own = |to: &Option<i64>| *to == Some(own as i64);
    if types.first().is_some_and(is_own) && !types.iter().all(is_own) { from } else { carried }
}

/// True when the carrying addend is itself a sum with a computed addend: `(x + f(x)) + bias`.
fn inner_branch(
    body: &Body,
    index: &GraphIndex,
    chain: &Chain,
    carried: ValueId,
    from: ValueId,
    position: usize,
) -> bool {
    if carried == from {
        return false;
    }
    let Some((node, _)) = index.node_of(carried) else { return false };
    let Some(operands) = addends(body, node) else { return false };
    let Some(inner) = operands.iter().copied().find(|&id| carries(body, index, id, from, 0)) else { return false };
    operands.iter().any(|&id| id != inner && on_path(index, chain, id, position))
        || inner_branch(body, index, chain, inner, from, position)
}

/// Groups residual blocks into layers.
///
/// Errors: `Error::Unsupported` for cross-attention, for blocks without any token mixing, and where a block that does
/// not mix tokens stands before the first one that does.
pub fn group(graph: &Graph, body: &Body, chain: &Chain) -> Result<Vec<LayerBlocks>> {
    let index = GraphIndex::of_body(body);
    let ports = port_levels(body, &index, chain);
    let mut layers: Vec<LayerBlocks> = Vec::new();
    let mut mixers = 0;
    let positions = residual_positions(body, &index, chain);
    for &(position, carried) in &positions {
        let nodes: Vec<usize> = chain.segment(position).collect();
        let mixing = kinds::mixing(body, &index, &nodes, ports.contains(&position));
        if let Mixing::Cross(node) = mixing {
            return Err(Error::unsupported(
                body.nodes[node].describe(graph),
                "attends to another sequence (cross-attention), so this is the decoder of an encoder-decoder",
            )
            .remedy("interlace works on decoder-only models and on encoders"));
        }
        let carried = unrounded(graph, body, &index, carried, chain.values[position]);
        let block = Block { position, end: end_of(body, &index, chain, position), carried, mixing };
        match (block.mixing.is_mixer(), layers.last_mut()) {
            (true, _) => {
                mixers += 1;
                layers.push(LayerBlocks { blocks: vec![block] });
            }
            (false, Some(layer)) => layer.blocks.push(block),
            // A residual adapter before the first layer is not a layer.
            (false, None) => {}
        }
    }
    if mixers == 0 {
        return Err(Error::unsupported(
            "the graph",
            format!(
                "{} residual blocks between `{}` and `{}`, none with attention or a state, so these are not transformer layers",
                positions.len(),
                graph.name(chain.source),
                graph.name(chain.result)
            ),
        ));
    }
    trim_last(&mut layers);
    let convolutions = layers.iter().filter(|layer| matches!(layer.blocks[0].mixing, Mixing::Convolution)).count();
    if convolutions == layers.len() {
        return Err(Error::unsupported(
            "the graph",
            format!("{convolutions} residual blocks of convolutions and no attention: a convolutional network"),
        )
        .remedy("interlace works on transformer decoders and encoders"));
    }
    if layers.len() < 2 {
        return Err(Error::unsupported("the graph", "a single layer, so nothing is repeated"));
    }
    Ok(layers)
}

/// Behind a block's sum, past the bias of its last product: an addition of a weight, as a fused norm leaves it.
fn end_of(body: &Body, index: &GraphIndex, chain: &Chain, position: usize) -> usize {
    let mut end = position + 1;
    while end + 1 < chain.values.len() {
        let mut segment = chain.segment(end);
        let (Some(number), None) = (segment.next(), segment.next()) else { break };
        let operands = addends(body, number).filter(|_| body.nodes[number].op_type == "Add").unwrap_or_default();
        let of_layer = |&id: &ValueId| id == chain.values[end] || index.is_initializer(id);
        if operands.len() != 2 || !operands.iter().all(of_layer) {
            break;
        }
        end += 1;
    }
    end
}

/// A residual adapter behind the last layer is not part of it: no layer has more blocks than most layers have.
fn trim_last(layers: &mut [LayerBlocks]) {
    let mut counts: HashMap<usize, usize> = HashMap::new();
    for layer in layers.iter() {
        *counts.entry(layer.blocks.len()).or_default() += 1;
    }
    let usual = counts.into_iter().max_by_key(|&(blocks, count)| (count, blocks)).map_or(0, |(blocks, _)| blocks);
    if let Some(last) = layers.last_mut()
        && last.blocks.len() > usual
    {
        last.blocks.truncate(usual);
    }
}

/// Chain positions whose segment reads an input and computes an output that no other segment has to do with: a state.
fn port_levels(body: &Body, index: &GraphIndex, chain: &Chain) -> HashSet<usize> {
    let mut readers: HashMap<ValueId, HashSet<usize>> = HashMap::new();
    for (number, level) in chain.level.iter().enumerate() {
        let Some(level) = level else { continue };
        for input in data_inputs(body, number) {
            if body.inputs.contains(&input) {
                readers.entry(input).or_default().insert(*level);
            }
        }
    }
    let own: HashSet<usize> = readers
        .iter()
        .filter(|(id, levels)| levels.len() == 1 && **id != chain.source)
        .flat_map(|(_, levels)| levels.iter().copied())
        .collect();
    let mut writers = HashSet::new();
    for &output in &body.outputs {
        if output == chain.result {
            continue;
        }
        let mut value = output;
        for _ in 0..8 {
            let Some((node, _)) = index.node_of(value) else { break };
            if let Some(level) = chain.level[node] {
                writers.insert(level);
                break;
            }
            match body.nodes[node].inputs.first().copied().flatten() {
                Some(inner) => value = inner,
                None => break,
            }
        }
    }
    own.intersection(&writers).copied().collect()
}
