//! Residual blocks between the values of the stream, and their grouping into layers.

use std::collections::{HashMap, HashSet};

use crate::base::{Error, Result};
use crate::ir::{Attribute, Body, Graph, GraphIndex, ValueId, ValueType};

use super::chain::Chain;
use super::dataflow::data_inputs;
use super::kinds::{self, Mixing};
use super::residual::{addends, passed_through};

/// `x + f(x)` between two neighbouring values of the stream.
#[derive(Clone, Debug)]
pub struct Block {
    /// The chain position of `x`.
    pub position: usize,
    /// The chain position of the sum, or of the sum with the bias added after it.
    pub end: usize,
    /// The addend that carries the stream: `x` itself, or a cast of it.
    pub carried: ValueId,
    pub mixing: Mixing,
}

/// The blocks of one layer in order: one that mixes tokens, and the blocks before and after it that do not.
#[derive(Clone, Debug)]
pub struct LayerBlocks {
    pub blocks: Vec<Block>,
    /// Chain positions of the layer's input and output, including the norms and scales that belong to the layer.
    pub start: usize,
    pub end: usize,
    /// The addend that carries the layer's input: the input itself, or a cast of it.
    pub carried: ValueId,
}

impl LayerBlocks {
    fn of(blocks: Vec<Block>) -> Self {
        let (start, end) = (blocks[0].position, blocks[blocks.len() - 1].end);
        LayerBlocks { start, end, carried: blocks[0].carried, blocks }
    }

    /// Kind of token mixing in the layer.
    pub fn mixing(&self) -> Mixing {
        self.blocks.iter().map(|block| block.mixing).find(|mixing| mixing.is_mixer()).unwrap_or(self.blocks[0].mixing)
    }
}

/// Chain positions whose segment is a residual block, each with the addend that carries the stream.
pub fn residual_positions(body: &Body, index: &GraphIndex, chain: &Chain) -> Vec<(usize, ValueId)> {
    let mut found = Vec::new();
    for position in 0..chain.values.len().saturating_sub(1) {
        let (from, to) = (chain.values[position], chain.values[position + 1]);
        let Some((node, _)) = index.node_of(to) else { continue };
        let Some(operands) = addends(body, node) else { continue };
        // One addend is the stream itself; another is computed from it.
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

fn on_path(index: &GraphIndex, chain: &Chain, value: ValueId, position: usize) -> bool {
    index.node_of(value).is_some_and(|(node, _)| chain.level[node] == Some(position))
}

/// True when `value` is `from`, a cast, a reshape or a multiple of it, or a sum with such an addend.
fn carries(body: &Body, index: &GraphIndex, value: ValueId, from: ValueId, depth: usize) -> bool {
    if value == from {
        return true;
    }
    let Some((node, _)) = index.node_of(value) else { return false };
    if depth > 8 {
        return false;
    }
    if let Some(handed) = passed_through(body, index, node) {
        return carries(body, index, handed, from, depth + 1);
    }
    match addends(body, node) {
        Some(operands) => operands.iter().any(|&id| carries(body, index, id, from, depth + 1)),
        None => false,
    }
}

/// The addend below sums that is `from` or a cast of it. A multiple of `from` is not accepted: a dropped layer must be
/// the identity.
fn carried_value(body: &Body, index: &GraphIndex, value: ValueId, from: ValueId) -> ValueId {
    let mut value = value;
    // The lowest value reached so far below all sums and products; only casts and copies follow it.
    let mut plain = value;
    while value != from {
        let Some((node, _)) = index.node_of(value) else { break };
        let changes = matches!(body.nodes[node].op_type.as_str(), "Mul" | "Div");
        let inner = match passed_through(body, index, node) {
            Some(inner) => Some(inner),
            None => addends(body, node)
                .and_then(|operands| operands.into_iter().find(|&id| carries(body, index, id, from, 0))),
        };
        let Some(inner) = inner else { break };
        if changes || passed_through(body, index, node).is_none() {
            plain = inner;
        }
        value = inner;
    }
    plain
}

/// `from` itself when `carried` is a cast of it to a narrower type and back: the next layer rounds the stream itself.
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

/// True when the addend that carries the stream is itself a sum with a computed addend: `(x + f(x)) + bias`.
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
/// Errors: `Error::Unsupported` for the decoder of an encoder-decoder, for layers that all attend to another sequence,
/// and for blocks without token mixing.
pub fn group(graph: &Graph, body: &Body, chain: &Chain) -> Result<Vec<LayerBlocks>> {
    let index = GraphIndex::of_body(body);
    let ports = port_levels(body, &index, chain);
    let mut layers: Vec<LayerBlocks> = Vec::new();
    let mut leading: Vec<Block> = Vec::new();
    let positions = residual_positions(body, &index, chain);
    for &(position, carried) in &positions {
        let nodes: Vec<usize> = chain.segment(position).collect();
        let mixing = kinds::mixing(body, &index, chain, &nodes, ports.contains(&position));
        let carried = unrounded(graph, body, &index, carried, chain.values[position]);
        let block = Block { position, end: end_of(body, &index, chain, position), carried, mixing };
        match (block.mixing.is_mixer(), layers.last_mut()) {
            (true, _) => layers.push(LayerBlocks::of(vec![block])),
            (false, Some(layer)) => layer.blocks.push(block),
            (false, None) => leading.push(block),
        }
    }
    if layers.is_empty() {
        return Err(Error::unsupported(
            "the graph",
            format!(
                "{} residual blocks between `{}` and `{}`, none with attention or a state, so these are not transformer layers",
                positions.len(),
                graph.name(chain.source),
                graph.name(chain.result)
            ),
        ).remedy("interlace works on transformer decoders and encoders; give the graph of one"));
    }
    move_leading(&mut layers, leading);
    trim_last(&mut layers);
    let layers: Vec<LayerBlocks> = layers.into_iter().map(|layer| LayerBlocks::of(layer.blocks)).collect();
    refuse_other_sequences(graph, body, &layers)?;
    let convolutions = layers.iter().filter(|layer| matches!(layer.mixing(), Mixing::Convolution)).count();
    if convolutions == layers.len() {
        return Err(Error::unsupported(
            "the graph",
            format!("{convolutions} residual blocks of convolutions and no attention: a convolutional network"),
        )
        .remedy("interlace works on transformer decoders and encoders"));
    }
    if layers.len() < 2 {
        return Err(Error::unsupported("the graph", "a single layer, so nothing is repeated")
            .remedy("interlace needs at least two layers of the same kind"));
    }
    Ok(layers)
}

/// Rejects encoder-decoders: every layer has cross-attention, alone or after its own self-attention. Cross-attention
/// layers between layers of self-attention are accepted.
fn refuse_other_sequences(graph: &Graph, body: &Body, layers: &[LayerBlocks]) -> Result<()> {
    let crosses: Vec<(usize, usize)> = layers
        .iter()
        .enumerate()
        .filter_map(|(number, layer)| match layer.mixing() {
            Mixing::Cross(node) => Some((number, node)),
            _ => None,
        })
        .collect();
    let Some(&(_, node)) = crosses.first() else { return Ok(()) };
    if crosses.len() == layers.len() {
        return Err(Error::unsupported(
            body.nodes[node].describe(graph),
            format!(
                "each of the {} layers attends to another sequence (cross-attention), none to its own",
                layers.len()
            ),
        )
        .remedy("interlace works on decoders and encoders whose layers attend to their own sequence"));
    }
    // A layer with self-attention and no feed-forward block, followed by cross-attention.
    let half = |number: usize| number > 0 && layers[number - 1].blocks.len() == 1;
    if let Some(&(_, node)) = crosses.iter().find(|(number, _)| half(*number)) {
        return Err(Error::unsupported(
            body.nodes[node].describe(graph),
            "attends to another sequence (cross-attention) behind the same layer's self-attention, so this is the \
             decoder of an encoder-decoder",
        )
        .remedy("interlace works on decoder-only models and on encoders"));
    }
    Ok(())
}

/// The chain position after a block's sum and after its bias, which a fused norm leaves as a
/// separate addition of a weight.
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

/// Moves the blocks before the first mixer. When the last layer lacks as many blocks at its end as there are leading
/// blocks, every layer begins with such blocks. Otherwise the leading blocks are a residual adapter before the layers.
fn move_leading(layers: &mut [LayerBlocks], leading: Vec<Block>) {
    let count = leading.len();
    let Some((last, others)) = layers.split_last().filter(|_| count > 0) else { return };
    let usual = last.blocks.len() + count;
    if others.is_empty() || others.iter().any(|layer| layer.blocks.len() != usual) {
        return;
    }
    let mut front = leading;
    for layer in layers {
        // The last layer has no blocks to pass to a next layer.
        let next = layer.blocks.split_off(layer.blocks.len().min(usual - count));
        front.append(&mut layer.blocks);
        layer.blocks = std::mem::replace(&mut front, next);
    }
}

/// Removes a residual adapter from the last layer: a layer has at most as many blocks as most layers have.
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

/// Chain positions whose segment is the only reader of an input and the only producer of an output: a recurrent state.
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
            // The stream itself is not a state.
            if chain.is_stream(value) {
                break;
            }
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
