//! Finds the value from which on a decoder's head computes each position independently.

use std::collections::HashSet;

use crate::ir::{Body, Graph, GraphIndex, Node, ValueId, captured};

use super::products::product;

/// Operators that look at each position by itself when their other inputs are constants.
const POSITION_WISE: &[&str] = &["Cast", "Identity", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"];

/// The value behind which the logits come from a product with a constant and position-wise operators alone, so that it
/// need only be run at the positions that are asked for; the logits themselves where the head is no such product.
pub fn head_input(graph: &Graph, logits: ValueId) -> ValueId {
    let index = GraphIndex::new(graph);
    let constants = constants(&graph.body);
    let mut at = logits;
    loop {
        let Some(node) = index.node_of(at).and_then(|(number, _)| graph.body.nodes.get(number)) else {
            return logits;
        };
        let mut flowing = node.present_inputs().filter(|id| !constants.contains(id));
        let (Some(input), None) = (flowing.next(), flowing.next()) else {
            return logits;
        };
        let op = node.op_type.as_str();
        if product(node).is_some_and(|row| row.by_row(node)) && node.inputs.first().copied().flatten() == Some(input) {
            return input;
        }
        if !POSITION_WISE.contains(&op) || node.bodies().next().is_some() {
            return logits;
        }
        at = input;
    }
}

/// Initializers and what is computed from nothing else.
fn constants(body: &Body) -> HashSet<ValueId> {
    let inputs: HashSet<ValueId> = body.inputs.iter().copied().collect();
    let mut constants: HashSet<ValueId> =
        body.initializers.iter().map(|(id, _)| *id).filter(|id| !inputs.contains(id)).collect();
    let reads = |node: &Node| node.present_inputs().chain(node.bodies().flat_map(captured)).collect::<Vec<_>>();
    for node in &body.nodes {
        if reads(node).iter().all(|id| constants.contains(id)) {
            constants.extend(node.present_outputs());
        }
    }
    constants
}
