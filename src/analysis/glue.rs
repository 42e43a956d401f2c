//! Changes of the stream between layers: some belong to a layer, others to none.

use std::collections::{HashMap, HashSet};

use crate::ir::{Body, DataType, Graph, GraphIndex, ValueId};

use super::blocks::LayerBlocks;
use super::chain::Chain;
use super::dataflow::{data_inputs, from_weights, part_of_rows};
use super::layer::Glue;

/// Operators left out of the description of a change, because they do not affect its meaning.
const SILENT: &[&str] = &["Cast", "Identity"];

/// The nodes between two neighbouring values of the stream.
#[derive(PartialEq)]
struct Segment {
    operators: Vec<String>,
    /// True when the segment reads a weight, such as that of a norm or a scale.
    weights: bool,
}

/// Assigns glue with weights to the layers: the norm of `norm(x + f(x))`, or a scale of the stream. It
/// belongs to the layer before it when it follows every layer including the last; otherwise to the layer
/// after it when it precedes every layer.
pub fn settle(body: &Body, index: &GraphIndex, chain: &Chain, layers: &mut [LayerBlocks]) {
    let (Some(first), Some(last)) = (layers.first().map(|layer| layer.start), layers.last().map(|layer| layer.end))
    else {
        return;
    };
    let segments = |from: usize, to: usize| -> Vec<Segment> {
        (from..to).map(|position| segment(body, index, chain, position)).collect()
    };
    let between: Vec<Vec<Segment>> = layers.windows(2).map(|pair| segments(pair[0].end, pair[1].start)).collect();
    let Some(shortest) = between.iter().map(Vec::len).min().filter(|&shortest| shortest > 0) else { return };
    let last_position = chain.values.len() - 1;

    let tail = segments(last, last_position.min(last + shortest));
    let alike = |number: usize| tail.get(number).is_some_and(|own| between.iter().all(|list| list[number] == *own));
    let mut behind = (0..shortest).take_while(|&number| alike(number)).count();
    while behind > 0 && !tail[behind - 1].weights {
        behind -= 1;
    }
    if behind > 0 {
        layers.iter_mut().for_each(|layer| layer.end += behind);
        return;
    }

    // Numbered from the layer backwards.
    let head = segments(first.saturating_sub(shortest), first);
    let from_end = |list: &[Segment], number: usize| list.len().checked_sub(number + 1);
    let alike = |number: usize| {
        from_end(&head, number).is_some_and(|own| {
            between.iter().all(|list| from_end(list, number).is_some_and(|other| list[other] == head[own]))
        })
    };
    let mut before = (0..shortest).take_while(|&number| alike(number)).count();
    while before > 0 && !head[head.len() - before].weights {
        before -= 1;
    }
    if before > 0 {
        for layer in layers {
            layer.start -= before;
            layer.carried = chain.values[layer.start];
        }
    }
}

fn segment(body: &Body, index: &GraphIndex, chain: &Chain, position: usize) -> Segment {
    let nodes: Vec<usize> = chain.segment(position).collect();
    let operators = nodes.iter().map(|&node| body.nodes[node].op()).collect();
    Segment { operators, weights: !weights(body, index, &nodes).is_empty() }
}

/// Numeric constants that the nodes read, without shapes and positions: weights and values computed from them.
fn weights(body: &Body, index: &GraphIndex, nodes: &[usize]) -> Vec<ValueId> {
    let numbers = |dtype: DataType| {
        use DataType::{Bfloat16, Double, Float, Float16};
        matches!(dtype, Float | Double | Float16 | Bfloat16)
    };
    let floats: HashSet<ValueId> =
        body.initializers.iter().filter(|(_, tensor)| numbers(tensor.dtype)).map(|(id, _)| *id).collect();
    let mut found = Vec::new();
    for &node in nodes {
        for input in data_inputs(body, node) {
            if !from_weights(body, index, input) {
                continue;
            }
            let mut open = vec![input];
            let mut seen = HashSet::new();
            while let Some(value) = open.pop() {
                match index.node_of(value) {
                    Some((inner, _)) if seen.insert(inner) => open.extend(body.nodes[inner].present_inputs()),
                    Some(_) => {}
                    None if floats.contains(&value) && !found.contains(&value) => found.push(value),
                    None => {}
                }
            }
        }
    }
    found
}

/// All changes of the stream that belong to no layer.
pub fn between(graph: &Graph, body: &Body, chain: &Chain, layer_of_level: &HashMap<usize, usize>) -> Vec<Glue> {
    let index = GraphIndex::of_body(body);
    let first = layer_of_level.keys().min().copied().unwrap_or(0);
    let last = layer_of_level.keys().max().copied().unwrap_or(0);
    let elements: HashMap<ValueId, u64> =
        body.initializers.iter().map(|(id, tensor)| (*id, tensor.element_count())).collect();
    let mut found: Vec<Glue> = Vec::new();
    for position in first..=last {
        if layer_of_level.contains_key(&position) {
            continue;
        }
        let after = (first..position).rev().find_map(|before| layer_of_level.get(&before).copied());
        let nodes: Vec<usize> = chain.segment(position).collect();
        let operators: Vec<String> = nodes.iter().map(|&node| body.nodes[node].op()).collect();
        if operators.iter().all(|name| SILENT.contains(&name.as_str())) {
            continue;
        }
        let inputs = nodes
            .iter()
            .flat_map(|&node| data_inputs(body, node))
            .filter_map(|id| match index.node_of(id) {
                None => Some(id),
                Some((node, _)) if id != chain.source => part_of_rows(graph, body, &body.nodes[node]),
                Some(_) => None,
            })
            .filter(|id| body.inputs.contains(id) && *id != chain.source)
            .collect();
        let mut weights = weights(body, &index, &nodes);
        weights.retain(|id| elements.get(id).is_some_and(|&count| count > 1));
        let (from, to) = (chain.values[position], chain.values[position + 1]);
        match found.last_mut() {
            Some(previous) if previous.to == from => {
                previous.to = to;
                previous.operators.extend(operators);
                let more: Vec<ValueId> = inputs;
                previous.inputs.extend(more);
                previous.weights.extend(weights);
            }
            _ => found.push(Glue { after, from, to, operators, inputs, weights }),
        }
    }
    found
}
