//! Sums that carry the stream: `x + f(x)`.

use std::collections::{BTreeSet, HashSet};

use crate::ir::{Body, GraphIndex, ValueId};

use super::dataflow::{data_inputs, from_weights};

/// Operators that pass a tensor on without arithmetic.
const PASS_THROUGH: &[&str] = &["Cast", "Identity", "Dropout", "Reshape", "Squeeze", "Unsqueeze"];
/// Limit on nested sums and chained copies; bounds the search.
const DEPTH: usize = 8;
/// Limit on the addends of one sum `x + f(x)`; bounds the search.
const ADDENDS: usize = 16;

/// Operands of a sum.
pub fn addends(body: &Body, node: usize) -> Option<Vec<ValueId>> {
    let node = &body.nodes[node];
    match (node.domain.as_str(), node.op_type.as_str()) {
        ("", "Add" | "Sum") => Some(node.present_inputs().collect()),
        // alpha * A * B + beta * C: the stream may be C.
        ("", "Gemm") | ("com.microsoft", "FusedGemm") => Some(node.present_inputs().collect()),
        _ => None,
    }
}

/// The tensor that a node passes on unchanged, or scaled by weights alone.
pub fn passed_through(body: &Body, index: &GraphIndex, node: usize) -> Option<ValueId> {
    let inner = &body.nodes[node];
    if !inner.domain.is_empty() {
        return None;
    }
    let input = |number: usize| inner.inputs.get(number).copied().flatten();
    match inner.op_type.as_str() {
        name if PASS_THROUGH.contains(&name) => input(0),
        "Mul" | "Div" => {
            let (left, right) = (input(0)?, input(1)?);
            if from_weights(body, index, right) {
                Some(left)
            } else if inner.op_type == "Mul" && from_weights(body, index, left) {
                Some(right)
            } else {
                None
            }
        }
        _ => None,
    }
}

/// Follows the stream from the result back to the source. At a sum it continues with the addend from which another
/// addend is computed; between sums, with the nearest value on which everything depends.
///
/// Returns the values from the source on. Empty when the search does not reach the source, or reaches it only through
/// the `f` of a block `x + f(x)`, so that the source is not the stream's.
pub fn walk(body: &Body, index: &GraphIndex, reached: &[bool], source: ValueId, result: ValueId) -> Vec<ValueId> {
    let mut values = vec![result];
    let mut at = result;
    while at != source {
        if enters_by_branch(body, index, reached, source, at) {
            return Vec::new();
        }
        let before = block_input(body, index, reached, source, at);
        let Some(next) = before.or_else(|| gathered(body, index, reached, source, at)) else { return Vec::new() };
        values.push(next);
        at = next;
    }
    values.reverse();
    values
}

fn depends_on_source(index: &GraphIndex, reached: &[bool], source: ValueId, value: ValueId) -> bool {
    value == source || index.node_of(value).is_some_and(|(node, _)| reached[node])
}

/// True for `x + f(x)` whose `x` is not computed from the source.
fn enters_by_branch(body: &Body, index: &GraphIndex, reached: &[bool], source: ValueId, value: ValueId) -> bool {
    let Some(operands) = index.node_of(value).and_then(|(node, _)| addends(body, node)) else { return false };
    let (flowing, other): (Vec<ValueId>, Vec<ValueId>) =
        operands.into_iter().take(ADDENDS).partition(|&id| depends_on_source(index, reached, source, id));
    let other: HashSet<ValueId> = other.into_iter().filter(|&id| !from_weights(body, index, id)).collect();
    !other.is_empty() && flowing.iter().any(|&id| !computed_from(body, index, id, &other).is_empty())
}

/// The `x` of `value = x + f(x)`.
fn block_input(body: &Body, index: &GraphIndex, reached: &[bool], source: ValueId, value: ValueId) -> Option<ValueId> {
    let (node, _) = index.node_of(value)?;
    let flows = |id: &ValueId| depends_on_source(index, reached, source, *id);
    let mut operands: Vec<ValueId> = addends(body, node)?.into_iter().filter(flows).collect();
    for _ in 0..DEPTH {
        if operands.len() < 2 || operands.len() > ADDENDS {
            return None;
        }
        // Each addend, and the values of which it is a copy or a multiple.
        let copies: Vec<Vec<ValueId>> = operands
            .iter()
            .map(|&operand| {
                let inner = |id: &ValueId| {
                    index.node_of(*id).and_then(|(node, _)| passed_through(body, index, node)).filter(flows)
                };
                std::iter::successors(Some(operand), inner).take(DEPTH).collect()
            })
            .collect();
        let known: HashSet<ValueId> = copies.iter().flatten().copied().collect();
        let met: Vec<HashSet<ValueId>> =
            operands.iter().map(|&operand| computed_from(body, index, operand, &known)).collect();
        for (number, own) in copies.iter().enumerate() {
            // When no addend is computed from another one, the sum adds a value from outside and is not a block.
            let others = || met.iter().enumerate().filter(|(other, _)| *other != number);
            if let Some(&carried) = own.iter().find(|id| others().all(|(_, met)| met.contains(id))) {
                return Some(carried);
            }
        }
        // Sums of sums: `(x + f(x)) + g(x)`.
        let mut wider: Vec<ValueId> = Vec::new();
        for &operand in &operands {
            let inner = index.node_of(operand).and_then(|(node, _)| addends(body, node));
            for id in inner.map_or(vec![operand], |inner| inner.into_iter().filter(flows).collect()) {
                if !wider.contains(&id) {
                    wider.push(id);
                }
            }
        }
        if wider == operands {
            return None;
        }
        operands = wider;
    }
    None
}

/// The values of `known` from which `value` is computed, `value` itself included.
fn computed_from(body: &Body, index: &GraphIndex, value: ValueId, known: &HashSet<ValueId>) -> HashSet<ValueId> {
    let place = |id: &ValueId| index.node_of(*id).map_or(0, |(node, _)| node + 1);
    // Nodes are in execution order: no node before the first known value depends on one.
    let first = known.iter().map(place).min().unwrap_or(0);
    let mut open = vec![value];
    let mut seen = HashSet::new();
    let mut met = HashSet::new();
    while let Some(value) = open.pop() {
        if known.contains(&value) {
            met.insert(value);
        }
        if let Some((node, _)) = index.node_of(value)
            && node + 1 > first
            && !body.nodes[node].reads_shape_only()
            && seen.insert(node)
        {
            open.extend(data_inputs(body, node));
        }
    }
    met
}

/// The nearest value before `value` through which every dependency on the source passes, or else the nearest sum of a
/// stream; other inputs of the nodes in between count as coming from outside.
fn gathered(body: &Body, index: &GraphIndex, reached: &[bool], source: ValueId, value: ValueId) -> Option<ValueId> {
    // Values ordered by the node that produces them; the source has no node.
    let place = |id: ValueId| (index.node_of(id).map_or(0, |(node, _)| node + 1), id.index(), id);
    let mut open = BTreeSet::from([place(value)]);
    let mut first = true;
    while first || open.len() > 1 {
        first = false;
        let (_, _, latest) = open.pop_last()?;
        let (node, _) = index.node_of(latest)?;
        if latest != value && block_input(body, index, reached, source, latest).is_some() {
            return Some(latest);
        }
        if body.nodes[node].reads_shape_only() {
            continue;
        }
        let inputs = data_inputs(body, node).into_iter();
        open.extend(inputs.filter(|&id| depends_on_source(index, reached, source, id)).map(place));
    }
    open.first().map(|&(_, _, id)| id)
}
