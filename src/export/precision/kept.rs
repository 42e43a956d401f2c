//! Which nodes of a half-precision graph stay in f32.

use std::collections::{HashMap, HashSet};

use crate::ir::{Body, DataType, GraphIndex, Node, ValueId};

/// Operators that stay in f32, with the reason.
const KEPT: &[(&str, &str)] = &[
    ("CumSum", SUMS),
    ("DynamicQuantizeLinear", ONLY),
    ("Exp", SUMS),
    ("Log", SUMS),
    ("MelWeightMatrix", ONLY),
    ("Pow", SUMS),
    ("RandomNormal", ONLY),
    ("RandomUniform", ONLY),
    ("Range", ONLY),
    ("Reciprocal", SUMS),
    ("ReduceL2", SUMS),
    ("ReduceLogSumExp", SUMS),
    ("ReduceMean", SUMS),
    ("ReduceProd", SUMS),
    ("ReduceSum", SUMS),
    ("ReduceSumSquare", SUMS),
    ("Resize", ONLY),
    ("Sqrt", SUMS),
    ("Upsample", ONLY),
];
const SUMS: &str = "squares, sums and their roots leave the range of half precision";
const ONLY: &str = "takes some of its inputs in float32 only";
const POSITIONS: &str = "computed from positions, shapes and masks alone, where half precision miscounts";
const BETWEEN: &str = "between operators that stay in float32";
/// Operators that follow their neighbours when those stay.
const ELEMENTWISE: &[&str] = &["Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Sub"];

/// Nodes that stay in f32, by their first output.
pub(super) type KeptNode = HashMap<ValueId, &'static str>;

/// The nodes of a graph that stay in f32.
pub(super) fn kept_nodes(body: &Body, types: &HashMap<ValueId, DataType>) -> KeptNode {
    let (mut active, mut kept) = (HashSet::new(), KeptNode::new());
    mark(body, types, &mut active, true);
    choose(body, types, &active, &mut kept);
    kept
}

/// Values that depend on activations: on float inputs, and on rows of float tables.
fn mark(body: &Body, types: &HashMap<ValueId, DataType>, active: &mut HashSet<ValueId>, top: bool) {
    let is_float = |id: &ValueId| types.get(id) == Some(&DataType::Float);
    active.extend(body.inputs.iter().filter(|id| is_float(id) || !top).copied());
    let tables: HashSet<ValueId> =
        body.initializers.iter().filter(|(_, tensor)| tensor.dims.len() > 1).map(|(id, _)| *id).collect();
    for node in &body.nodes {
        for inner in node.bodies() {
            mark(inner, types, active, false);
        }
        let looks_up = node.op_type.starts_with("Gather") && node.inputs.iter().flatten().any(|id| tables.contains(id));
        let inside = node.bodies().any(|inner| inner.outputs.iter().any(|id| active.contains(id)));
        let depends = node.present_inputs().any(|id| active.contains(&id)) && !node.reads_shape_only();
        if depends
            || inside
            || looks_up && node.present_outputs().any(|id| is_float(&id) || node.domain == "com.microsoft")
        {
            active.extend(node.present_outputs());
        }
    }
}

fn choose(body: &Body, types: &HashMap<ValueId, DataType>, active: &HashSet<ValueId>, kept: &mut KeptNode) {
    let is_float = |id: ValueId| types.get(&id) == Some(&DataType::Float);
    let first = |node: &Node| node.present_outputs().next();
    for node in &body.nodes {
        let Some(output) = first(node) else { continue };
        if node.bodies().next().is_some() {
            node.bodies().for_each(|inner| choose(inner, types, active, kept));
            continue;
        }
        // Its weights are in f16 already.
        let has_half = node.present_inputs().any(|id| types.get(&id) == Some(&DataType::Float16));
        let touches_floats = node.present_inputs().chain(node.present_outputs()).any(is_float);
        let square = node.op_type == "Mul" && node.inputs.first() == node.inputs.get(1);
        let by_name =
            KEPT.iter().find(|(name, _)| *name == node.op_type && node.domain.is_empty()).map(|(_, why)| *why);
        let reason = match () {
            () if !touches_floats || has_half || node.reads_shape_only() => None,
            // A sequence cannot be cast.
            () if node.op_type == "Constant" || node.op_type.contains("Sequence") => None,
            () if !node.present_outputs().any(|id| active.contains(&id)) => Some(POSITIONS),
            () if square => Some(SUMS),
            () => by_name,
        };
        kept.extend(reason.map(|reason| (output, reason)));
    }
    // Two rounds reach the addition of an epsilon and what surrounds it.
    for _ in 0..2 {
        let index = GraphIndex::of_body(body);
        let node_is_kept =
            |number: usize, kept: &KeptNode| first(&body.nodes[number]).is_some_and(|id| kept.contains_key(&id));
        let between = |node: &&Node| {
            let made = |id: ValueId| match index.node_of(id) {
                Some((maker, _)) => node_is_kept(maker, kept) || body.nodes[maker].op_type == "Constant",
                None => index.is_initializer(id),
            };
            let read = |id: ValueId| {
                index.output_position(id).is_none()
                    && index.uses(id).iter().all(|used| used.input.is_some() && node_is_kept(used.node, kept))
            };
            ELEMENTWISE.contains(&node.op_type.as_str())
                && node.present_inputs().all(made)
                && node.present_outputs().all(read)
        };
        let found = body.nodes.iter().filter(between).filter_map(first).filter(|id| !kept.contains_key(id));
        let found: Vec<ValueId> = found.collect();
        kept.extend(found.into_iter().map(|id| (id, BETWEEN)));
    }
}
