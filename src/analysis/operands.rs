//! Content of a layer's cache (keys, values, states), determined from its readers.

use std::collections::HashSet;

use crate::ir::{Body, GraphIndex, ValueId};

use super::kinds::is_attention;
use super::products::product;

/// Operators between a key, a value or the last inputs of a convolution and the operator that reads them.
const MOVES: &[&str] = &[
    "Cast",
    "Identity",
    "Transpose",
    "Reshape",
    "Expand",
    "Tile",
    "Unsqueeze",
    "Squeeze",
    "Concat",
    "Pad",
    "Slice",
    "Mul",
    "QuantizeLinear",
    "DequantizeLinear",
];
const CONVOLUTIONS: &[&str] = &["Conv", "QLinearConv", "ConvInteger", "FusedConv", "NhwcFusedConv"];

/// Outputs of nodes on `path` that hold keys or values of its attention, or the inputs of its convolution.
pub fn cached(body: &Body, index: &GraphIndex, path: &[usize]) -> HashSet<ValueId> {
    let mut open: Vec<ValueId> = Vec::new();
    for &number in path {
        let node = &body.nodes[number];
        let input = |position: usize| node.inputs.get(position).copied().flatten();
        if is_attention(node) {
            open.extend([input(1), input(2)].into_iter().flatten());
        } else if node.op_type == "Softmax" {
            open.extend(score_keys(body, index, path, number));
        } else if CONVOLUTIONS.contains(&node.op_type.as_str()) {
            open.extend(input(0));
        } else if let Some([left, right]) = product(node).and_then(|row| row.factors(node))
            && comes_from_softmax(body, index, path, left)
        {
            open.push(right);
        }
    }
    let mut found = HashSet::new();
    while let Some(value) = open.pop() {
        if !found.insert(value) {
            continue;
        }
        if let Some(number) = on_path(index, path, value)
            && MOVES.contains(&body.nodes[number].op_type.as_str())
        {
            open.extend(body.nodes[number].present_inputs());
        }
    }
    found.retain(|&value| on_path(index, path, value).is_some());
    found
}

fn on_path(index: &GraphIndex, path: &[usize], value: ValueId) -> Option<usize> {
    index.node_of(value).map(|(node, _)| node).filter(|node| path.binary_search(node).is_ok())
}

/// The second operands of the products before a softmax.
fn score_keys(body: &Body, index: &GraphIndex, path: &[usize], softmax: usize) -> Vec<ValueId> {
    let mut open: Vec<ValueId> = body.nodes[softmax].inputs.first().copied().flatten().into_iter().collect();
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    while let Some(value) = open.pop() {
        let Some(number) = on_path(index, path, value).filter(|&number| seen.insert(number)) else { continue };
        match product(&body.nodes[number]).and_then(|row| row.factors(&body.nodes[number])) {
            Some([_, key]) => found.push(key),
            None => open.extend(body.nodes[number].present_inputs()),
        }
    }
    found
}

/// True when `value` is computed from a softmax's result without another product.
fn comes_from_softmax(body: &Body, index: &GraphIndex, path: &[usize], value: ValueId) -> bool {
    let mut open = vec![value];
    let mut seen = HashSet::new();
    while let Some(value) = open.pop() {
        let Some(number) = on_path(index, path, value).filter(|&number| seen.insert(number)) else { continue };
        let node = &body.nodes[number];
        if node.op_type == "Softmax" {
            return true;
        }
        if product(node).is_none() {
            open.extend(node.present_inputs());
        }
    }
    false
}
