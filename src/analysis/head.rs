//! Finds the value from which a decoder's head computes each position independently.

use std::collections::HashSet;

use crate::ir::{Body, Graph, GraphIndex, Node, ValueId, captured};

use super::products::product;

/// Operators that treat each position independently when their other inputs are constants.
const POSITION_WISE: &[&str] = &["Cast", "Identity", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"];

/// The input of the head: from this value, the logits follow by a product with a constant and position-wise operators
/// alone, so the head can run at selected positions only. Returns the logits themselves when the head has another form.
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

/// The weight of the product that gives the logits, as it is or transposed or cast before the product; `None` where the head
/// is no product with such a weight.
pub fn head_weight(graph: &Graph, logits: ValueId) -> Option<ValueId> {
    let index = GraphIndex::new(graph);
    let node = |id: ValueId| index.node_of(id).and_then(|(number, _)| graph.body.nodes.get(number));
    let input = head_input(graph, logits);
    let mut product = None;
    let mut at = logits;
    while at != input && product.is_none() {
        let last = node(at)?;
        let reads_input = last.present_inputs().any(|id| id == input);
        let constants = constants(&graph.body);
        at = last.present_inputs().find(|id| !constants.contains(id))?;
        product = reads_input.then_some(last);
    }
    let mut weight = product?.present_inputs().find(|id| *id != input)?;
    while graph.body.initializer(weight).is_none() {
        let before = node(weight).filter(|node| matches!(node.op_type.as_str(), "Transpose" | "Cast" | "Identity"))?;
        weight = before.present_inputs().next()?;
    }
    Some(weight)
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
