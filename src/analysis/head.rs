//! Finds the value from which a decoder's head computes each position independently.

use std::collections::HashSet;

use crate::ir::{Attribute, Body, Graph, GraphIndex, Node, ValueId, captured};

use super::dataflow::constant_tensor;
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

/// The first of `candidates` from which each position of the logits is computed from the same position alone, so that the
/// graph from there on can run at selected positions only: by products with constants, norms of each row and
/// elementwise operators. `None` when there is no such candidate.
pub fn position_wise_from(graph: &Graph, candidates: &[ValueId], logits: ValueId) -> Option<ValueId> {
    let index = GraphIndex::new(graph);
    let constants = constants(&graph.body);
    candidates.iter().copied().find(|&from| {
        let mut seen = HashSet::from([from]);
        let mut pending = vec![logits];
        while let Some(id) = pending.pop() {
            if !seen.insert(id) {
                continue;
            }
            let Some(node) = index.node_of(id).and_then(|(number, _)| graph.body.nodes.get(number)) else {
                return false;
            };
            if !works_by_row(&graph.body, &index, node, &constants) {
                return false;
            }
            pending.extend(node.present_inputs().filter(|id| !constants.contains(id)));
        }
        true
    })
}

/// Operators that compute each element from the same element of their inputs, where constants are broadcast.
const ELEMENTWISE: &[&str] = &[
    "Cast",
    "Identity",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Neg",
    "Exp",
    "Tanh",
    "Sigmoid",
    "Clip",
    "Relu",
    "Erf",
    "Gelu",
    "FastGelu",
    "QuickGelu",
    "BiasGelu",
    "Swish",
    "HardSwish",
];

/// Operators that normalise each row over its last axis, which is their default axis.
const ROW_NORMS: &[&str] = &["LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"];

/// True when each row of the node's results, along the last axis, depends on the same row of its inputs alone.
fn works_by_row(body: &Body, index: &GraphIndex, node: &Node, constants: &HashSet<ValueId>) -> bool {
    let op = node.op_type.as_str();
    let constant = |id: &ValueId| constants.contains(id);
    if node.bodies().next().is_some() {
        return false;
    }
    if let Some(row) = product(node) {
        return row.by_row(node)
            && row.factors(node).is_some_and(|[left, right]| !constant(&left) && constant(&right))
            && node.present_inputs().filter(|id| !constant(id)).count() == 1;
    }
    if ROW_NORMS.contains(&op) {
        let axis = node.attribute("axis").and_then(Attribute::as_int).unwrap_or(-1);
        return axis == -1 && node.present_inputs().skip(1).all(|id| constant(&id));
    }
    if op == "ReduceMean" {
        let keeps = node.attribute("keepdims").and_then(Attribute::as_int).unwrap_or(1) == 1;
        let by_input = node.inputs.get(1).copied().flatten();
        let by_input = by_input.and_then(|id| constant_tensor(body, index, id)?.to_i64s());
        let axes = node.attribute("axes").and_then(|axes| axes.as_ints().map(<[i64]>::to_vec)).or(by_input);
        return keeps && axes.as_deref() == Some(&[-1]);
    }
    // A constant with more than one row could differ from position to position.
    let one_row = |id: ValueId| {
        constant_tensor(body, index, id).is_some_and(|tensor| tensor.dims.iter().rev().skip(1).all(|&size| size == 1))
    };
    ELEMENTWISE.contains(&op) && node.present_inputs().all(|id| !constant(&id) || one_row(id))
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::analysis::analyse;
    use crate::ir::{Model, Tensor, Value};

    fn load(path: &str) -> Model {
        crate::onnx::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)).unwrap()
    }

    /// The last layer's values of the stream between its blocks, then the stream after it.
    fn places(model: &Model) -> (Model, Vec<ValueId>, ValueId) {
        let analysis = analyse(model).unwrap();
        let last = analysis.map.layers.last().unwrap();
        let places = last.sums.iter().copied().chain([last.output]).collect();
        (analysis.model, places, analysis.map.result)
    }

    #[test]
    fn the_mlp_of_the_last_layer_and_the_head_work_by_position() {
        for path in ["model/onnx/decoder_model_merged.onnx", "zoo/optimum/llama-with-past/model.onnx"] {
            let (model, places, logits) = places(&load(path));
            assert_eq!(position_wise_from(&model.graph, &places, logits), Some(places[0]), "{path}");
            // The layer's attention mixes positions.
            let input = analyse(&model).unwrap().map.layers.last().unwrap().input;
            assert_eq!(position_wise_from(&model.graph, &[input], logits), None, "{path}");
        }
    }

    #[test]
    fn a_constant_for_each_position_is_not_position_wise() {
        for (dims, wise) in [(vec![1, 1, 4], true), (vec![4], true), (vec![], true), (vec![1, 3, 4], false)] {
            let (mut model, places, logits) = places(&load("zoo/optimum/llama-with-past/model.onnx"));
            let graph = &mut model.graph;
            let last = *places.last().unwrap();
            let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
            let (added, sum) = (value("test.added"), value("test.sum"));
            let count: u64 = dims.iter().product();
            graph.body.initializers.push((added, Tensor::from_f32(&dims, &vec![0.5; count as usize])));
            for node in &mut graph.body.nodes {
                node.inputs.iter_mut().filter(|id| **id == Some(last)).for_each(|id| *id = Some(sum));
            }
            let at = graph.body.nodes.iter().position(|node| node.inputs.contains(&Some(sum))).unwrap();
            let node = Node {
                op_type: "Add".into(),
                inputs: vec![Some(last), Some(added)],
                outputs: vec![Some(sum)],
                ..Node::default()
            };
            graph.body.nodes.insert(at, node);
            let found = position_wise_from(graph, &[last], logits);
            assert_eq!(found, wise.then_some(last), "{dims:?}");
        }
    }
}
