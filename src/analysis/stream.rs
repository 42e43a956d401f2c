//! The residual stream: the values that every path from a source to the result passes.

use std::collections::HashSet;

use crate::base::{Error, Result};
use crate::ir::{Body, Graph, GraphIndex, ValueId};

use super::blocks;

/// Values in order from the source to the result, and which nodes lie between them.
#[derive(Clone, Debug)]
pub struct Chain {
    pub source: ValueId,
    pub result: ValueId,
    /// `values[0]` is the source, the last one the result.
    pub values: Vec<ValueId>,
    /// For each node of the body: the chain position it follows, if it lies on a path from source to result.
    pub level: Vec<Option<usize>>,
}

impl Chain {
    /// Nodes on a path between chain values `position` and `position + 1`, in execution order.
    pub fn segment(&self, position: usize) -> impl Iterator<Item = usize> + '_ {
        self.level.iter().enumerate().filter(move |(_, level)| **level == Some(position)).map(|(node, _)| node)
    }
}

/// The chain with the most residual blocks, over all sources.
///
/// Errors: `Error::Unsupported` when no source leads to a result through residual blocks.
pub fn longest_chain(graph: &Graph, body: &Body) -> Result<Chain> {
    let index = GraphIndex::of_body(body);
    let result = result_of(graph, body, &index)?;
    let mut best: Option<(usize, Chain)> = None;
    for &source in &body.inputs {
        if index.is_initializer(source) {
            continue;
        }
        let Some(chain) = chain(graph, body, source, result) else { continue };
        let blocks = blocks::residual_positions(body, &index, &chain).len();
        let better = match &best {
            // Of equal chains the longer one starts earlier (token ids before their embeddings).
            Some((count, known)) => blocks > *count || (blocks == *count && chain.values.len() > known.values.len()),
            None => true,
        };
        if better {
            best = Some((blocks, chain));
        }
    }
    match best {
        Some((count, chain)) if count >= 2 => Ok(chain),
        Some((_, chain)) => Err(Error::unsupported(
            "the graph",
            format!(
                "from input `{}` to output `{}` no value is carried on as `x + f(x)` from block to block, so there is no residual stream",
                graph.name(chain.source),
                graph.name(result)
            ),
        )
        .remedy("interlace works on transformer decoders and encoders")),
        None => Err(Error::unsupported(
            "the graph",
            format!("no input leads to output `{}`", graph.name(result)),
        )),
    }
}

/// The output that the most nodes work for: logits or image features rather than a cache.
fn result_of(graph: &Graph, body: &Body, index: &GraphIndex) -> Result<ValueId> {
    let mut best: Option<(usize, ValueId)> = None;
    for &output in &body.outputs {
        let count = ancestors(body, index, output);
        if best.is_none_or(|(most, _)| count > most) {
            best = Some((count, output));
        }
    }
    best.map(|(_, output)| output).ok_or_else(|| {
        Error::invalid(format!("graph `{}`", body.name), format!("has no outputs ({} values)", graph.values.len()))
    })
}

fn ancestors(body: &Body, index: &GraphIndex, output: ValueId) -> usize {
    let mut seen = HashSet::new();
    let mut open = vec![output];
    while let Some(value) = open.pop() {
        if let Some((node, _)) = index.node_of(value)
            && seen.insert(node)
        {
            open.extend(data_inputs(body, node));
        }
    }
    seen.len()
}

/// The inputs of a node, those that bodies inside it capture included.
pub fn data_inputs(body: &Body, node: usize) -> Vec<ValueId> {
    let node = &body.nodes[node];
    let mut inputs: Vec<ValueId> = node.present_inputs().collect();
    for inner in node.bodies() {
        inputs.extend(crate::ir::captured(inner));
    }
    inputs
}

/// Dominators of `result` seen from `source`; `None` when no data flows between them.
fn chain(graph: &Graph, body: &Body, source: ValueId, result: ValueId) -> Option<Chain> {
    // Vertices of the dominator tree: values by id, nodes behind them.
    let values = graph.values.len();
    let vertices = values + body.nodes.len();
    const NONE: u32 = u32::MAX;
    let mut parent = vec![NONE; vertices];
    let mut depth = vec![0u32; vertices];
    let mut reached = vec![false; vertices];
    reached[source.index()] = true;
    for (number, node) in body.nodes.iter().enumerate() {
        if node.reads_shape_only() {
            continue;
        }
        let mut dominator = NONE;
        for input in data_inputs(body, number) {
            if !reached[input.index()] {
                continue;
            }
            let mut a = input.index() as u32;
            if dominator == NONE {
                dominator = a;
                continue;
            }
            let mut b = dominator;
            while a != b {
                if depth[a as usize] >= depth[b as usize] {
                    a = parent[a as usize];
                } else {
                    b = parent[b as usize];
                }
            }
            dominator = a;
        }
        if dominator == NONE {
            continue;
        }
        let vertex = values + number;
        parent[vertex] = dominator;
        depth[vertex] = depth[dominator as usize] + 1;
        reached[vertex] = true;
        for output in node.present_outputs() {
            parent[output.index()] = vertex as u32;
            depth[output.index()] = depth[vertex] + 1;
            reached[output.index()] = true;
        }
    }
    if !reached[result.index()] || source == result {
        return None;
    }
    let mut on_chain = Vec::new();
    let mut vertex = result.index();
    while vertex != source.index() {
        on_chain.push(vertex);
        vertex = parent[vertex] as usize;
    }
    on_chain.push(vertex);
    on_chain.reverse();
    let ids = id_table(body);
    let chain_values: Vec<ValueId> = on_chain.iter().filter_map(|&vertex| ids.get(&vertex).copied()).collect();

    // Nodes that lead to the result.
    let index = GraphIndex::of_body(body);
    let mut leads = vec![false; body.nodes.len()];
    let mut open = vec![result];
    while let Some(value) = open.pop() {
        if let Some((node, _)) = index.node_of(value)
            && !leads[node]
            && !body.nodes[node].reads_shape_only()
        {
            leads[node] = true;
            open.extend(data_inputs(body, node));
        }
    }
    let mut value_level: Vec<Option<usize>> = vec![None; values];
    let mut position_of: Vec<Option<usize>> = vec![None; values];
    for (position, id) in chain_values.iter().enumerate() {
        position_of[id.index()] = Some(position);
    }
    value_level[source.index()] = Some(0);
    let mut level = vec![None; body.nodes.len()];
    for (number, node) in body.nodes.iter().enumerate() {
        if !reached[values + number] || !leads[number] {
            continue;
        }
        let highest = data_inputs(body, number).iter().filter_map(|id| value_level[id.index()]).max();
        level[number] = highest;
        for output in node.present_outputs() {
            value_level[output.index()] = position_of[output.index()].or(highest);
        }
    }
    Some(Chain { source, result, values: chain_values, level })
}

/// Arena position to id, for the values of one body.
fn id_table(body: &Body) -> std::collections::HashMap<usize, ValueId> {
    let inputs = body.inputs.iter().copied();
    inputs.chain(body.nodes.iter().flat_map(|node| node.present_outputs())).map(|id| (id.index(), id)).collect()
}
