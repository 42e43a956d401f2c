//! Finds the residual stream: the values on every path from a source to the result.

use std::collections::HashSet;

use crate::base::{Error, Result};
use crate::ir::{Body, Graph, GraphIndex, Node, ValueId};

use super::chain::Chain;
use super::dataflow::{data_inputs, part_of_rows};
use super::{blocks, kinds, residual};

/// The chain with the most residual blocks that mix tokens, over all sources.
///
/// Errors: `Error::Unsupported` when no source leads to a result through residual blocks.
pub fn longest_chain(graph: &Graph, body: &Body) -> Result<Chain> {
    let index = GraphIndex::of_body(body);
    let result = result_of(graph, body, &index)?;
    let mut found = best(graph, body, &index, result, &|_| true);
    // Several outputs can be computed from one value, as keys and values for another graph are from an encoder's
    // states. That value becomes the result when it has as many mixing blocks.
    if let Some(origin) = common_origin(body, &index, result)
        && let Some(other) = best(graph, body, &index, origin, &|_| true)
        && found.as_ref().is_none_or(|(rank, _)| other.0.mixers >= rank.mixers)
    {
        found = Some(other);
    }
    match found {
        Some((rank, chain)) if rank.blocks >= 2 => Ok(chain),
        Some((_, chain)) => Err(Error::unsupported(
            "the graph",
            format!(
                "from input `{}` to output `{}` no value is carried on as `x + f(x)` from block to block, so there is \
                 no residual stream",
                graph.name(chain.source),
                graph.name(result)
            ),
        )
        .remedy("interlace works on transformer decoders and encoders")),
        None => {
            let problem = format!("no input leads to output `{}`", graph.name(result));
            Err(Error::unsupported("the graph", problem)
                .remedy("give a graph whose first output is computed from its inputs"))
        }
    }
}

/// The chain to `result` with the most residual blocks that mix tokens, among chains with at least two blocks for which
/// `wanted` is true.
pub fn longest_where(graph: &Graph, body: &Body, result: ValueId, wanted: &dyn Fn(&Chain) -> bool) -> Option<Chain> {
    let found = best(graph, body, &GraphIndex::of_body(body), result, wanted);
    found.filter(|(rank, _)| rank.blocks >= 2).map(|(_, chain)| chain)
}

/// Criteria for the choice between chains, the most important first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Residual blocks that mix tokens.
    mixers: usize,
    /// True for a chain of dominators, false for one of sums; see [`chains`].
    by_dominators: bool,
    /// Residual blocks.
    blocks: usize,
    /// Number of values: of otherwise equal chains the longer one starts earlier (at token ids,
    /// not at their embeddings).
    values: usize,
}

fn best(
    graph: &Graph,
    body: &Body,
    index: &GraphIndex,
    result: ValueId,
    wanted: &dyn Fn(&Chain) -> bool,
) -> Option<(Rank, Chain)> {
    let mut best: Option<(Rank, Chain)> = None;
    let parts = body.nodes.iter().filter(|node| part_of_rows(graph, body, node).is_some());
    let sources = body.inputs.iter().copied().chain(parts.flat_map(|node| node.present_outputs()));
    for source in sources.collect::<Vec<_>>() {
        if index.is_initializer(source) || grows_into_an_output(body, index, source) {
            continue;
        }
        for chain in chains(graph, body, index, source, result).into_iter().filter(|chain| wanted(chain)) {
            let positions = blocks::residual_positions(body, index, &chain);
            let mixes = |position: usize| chain.segment(position).any(|node| kinds::can_mix(&body.nodes[node]));
            let mixers = positions.iter().filter(|&&(position, _)| mixes(position)).count();
            let (by_dominators, blocks, values) = (!chain.by_sums, positions.len(), chain.values.len());
            let rank = Rank { mixers, by_dominators, blocks, values };
            if best.as_ref().is_none_or(|(known, _)| rank > *known) {
                best = Some((rank, chain));
            }
        }
    }
    best
}

/// True for a cache input: an output is this input with new entries appended.
fn grows_into_an_output(body: &Body, index: &GraphIndex, source: ValueId) -> bool {
    let grown = |node: &Node| node.domain.is_empty() && node.op_type == "Concat" && node.inputs.len() > 1;
    let nodes = index.uses(source).iter().filter_map(|used| body.nodes.get(used.node));
    nodes.filter(|node| grown(node)).flat_map(Node::present_outputs).any(|output| body.outputs.contains(&output))
}

/// The output that depends on the most nodes: logits or image features rather than a cache.
fn result_of(graph: &Graph, body: &Body, index: &GraphIndex) -> Result<ValueId> {
    let mut best: Option<(usize, ValueId)> = None;
    for &output in &body.outputs {
        let count = ancestors(body, index, output).len();
        if best.is_none_or(|(most, _)| count > most) {
            best = Some((count, output));
        }
    }
    best.map(|(_, output)| output).ok_or_else(|| {
        Error::invalid(format!("graph `{}`", body.name), format!("has no outputs ({} values)", graph.values.len()))
            .remedy("export the graph with its outputs")
    })
}

/// When other outputs depend on as many nodes as `result`: the output from which all of them are computed, if there is
/// one (the last of several).
fn common_origin(body: &Body, index: &GraphIndex, result: ValueId) -> Option<ValueId> {
    let behind: Vec<(ValueId, HashSet<usize>)> =
        body.outputs.iter().map(|&output| (output, ancestors(body, index, output))).collect();
    let most = behind.iter().find(|(output, _)| *output == result)?.1.len();
    let (alike, others): (Vec<_>, Vec<_>) = behind.iter().partition(|(_, nodes)| nodes.len() == most);
    let leads = |output: ValueId| {
        let made_by = index.node_of(output).map(|(node, _)| node);
        made_by.is_some_and(|node| alike.iter().all(|(_, nodes)| nodes.contains(&node)))
    };
    let origins = others.into_iter().filter(|(output, _)| alike.len() > 1 && leads(*output));
    origins.max_by_key(|(_, nodes)| nodes.len()).map(|&(output, _)| output)
}

/// The nodes on which an output depends.
fn ancestors(body: &Body, index: &GraphIndex, output: ValueId) -> HashSet<usize> {
    let mut seen = HashSet::new();
    let mut open = vec![output];
    while let Some(value) = open.pop() {
        if let Some((node, _)) = index.node_of(value)
            && seen.insert(node)
        {
            open.extend(data_inputs(body, node));
        }
    }
    seen
}

/// Candidate chains from `source` to `result`; none when `result` does not depend on `source`.
///
/// One candidate is the chain of dominators. It misses the stream when nodes outside it read the source or a layer's
/// inside, as when each layer takes a part of a projection of the embeddings or later layers read an earlier layer's
/// keys. The other candidate is the chain of sums that carry the stream.
fn chains(graph: &Graph, body: &Body, index: &GraphIndex, source: ValueId, result: ValueId) -> Vec<Chain> {
    let Some((dominators, reached)) = dominators(graph, body, source, result) else { return Vec::new() };
    let mut lists = vec![dominators];
    let sums = residual::walk(body, index, &reached, source, result);
    if sums.len() > 1 && sums != lists[0] {
        lists.push(sums);
    }
    let leads = leading(body, index, result);
    let make = |(number, values): (usize, Vec<ValueId>)| {
        let level = levels(graph, body, index, &values, &reached, &leads);
        let stream = values.iter().copied().collect();
        Chain { source, result, values, level, reached: reached.clone(), stream, by_sums: number > 0 }
    };
    lists.into_iter().enumerate().map(make).collect()
}

/// Values on every path from `source` to `result`, in order, and for each node whether it depends on `source`.
fn dominators(graph: &Graph, body: &Body, source: ValueId, result: ValueId) -> Option<(Vec<ValueId>, Vec<bool>)> {
    // Vertices of the dominator tree: first the values by id, then the nodes.
    let values = graph.values.len();
    let vertices = values + body.nodes.len();
    let mut parent = vec![u32::MAX; vertices];
    let mut depth = vec![0u32; vertices];
    let mut reached = vec![false; vertices];
    reached[source.index()] = true;
    for (number, node) in body.nodes.iter().enumerate() {
        if node.reads_shape_only() {
            continue;
        }
        let inputs = data_inputs(body, number).into_iter().filter(|input| reached[input.index()]);
        let dominator = inputs.map(|input| input.index() as u32).reduce(|a, b| common_ancestor(&parent, &depth, a, b));
        let Some(dominator) = dominator else { continue };
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
    let chain = on_chain.iter().filter_map(|vertex| ids.get(vertex).copied()).collect();
    Some((chain, reached.split_off(values)))
}

/// The nearest vertex on the way to the root from both `a` and `b`.
fn common_ancestor(parent: &[u32], depth: &[u32], mut a: u32, mut b: u32) -> u32 {
    while a != b {
        if depth[a as usize] >= depth[b as usize] {
            a = parent[a as usize];
        } else {
            b = parent[b as usize];
        }
    }
    a
}

/// For each node: true when `result` depends on its content.
fn leading(body: &Body, index: &GraphIndex, result: ValueId) -> Vec<bool> {
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
    leads
}

/// For each node: the chain position that it follows, if the next chain value depends on it.
fn levels(
    graph: &Graph,
    body: &Body,
    index: &GraphIndex,
    chain: &[ValueId],
    reached: &[bool],
    leads: &[bool],
) -> Vec<Option<usize>> {
    let mut value_level: Vec<Option<usize>> = vec![None; graph.values.len()];
    let mut position_of: Vec<Option<usize>> = vec![None; graph.values.len()];
    for (position, id) in chain.iter().enumerate() {
        position_of[id.index()] = Some(position);
    }
    if let Some(source) = chain.first() {
        value_level[source.index()] = Some(0);
    }
    let mut highest = vec![None; body.nodes.len()];
    for (number, node) in body.nodes.iter().enumerate() {
        if !reached[number] || !leads[number] {
            continue;
        }
        highest[number] = data_inputs(body, number).iter().filter_map(|id| value_level[id.index()]).max();
        for output in node.present_outputs() {
            value_level[output.index()] = position_of[output.index()].or(highest[number]);
        }
    }
    // A node after a position on which only later chain values depend is outside the chain.
    let mut level = vec![None; body.nodes.len()];
    for (position, &next) in chain.iter().skip(1).enumerate() {
        let mut open = vec![next];
        while let Some(value) = open.pop() {
            let Some((node, _)) = index.node_of(value) else { continue };
            if highest[node] == Some(position) && level[node].is_none() {
                level[node] = highest[node];
                open.extend(data_inputs(body, node));
            }
        }
    }
    level
}

/// Map from arena position to id, for the values of one body.
fn id_table(body: &Body) -> std::collections::HashMap<usize, ValueId> {
    let inputs = body.inputs.iter().copied();
    inputs.chain(body.nodes.iter().flat_map(|node| node.present_outputs())).map(|id| (id.index(), id)).collect()
}
