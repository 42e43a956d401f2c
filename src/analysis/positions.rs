//! Finds the positions for which a decoder computes logits: all, or a selection.

use std::collections::HashSet;

use crate::ir::{Dim, Graph, GraphIndex, Node, ValueId, captured};

use super::Analysis;
use super::dataflow::constant_tensor;

/// Inputs with which the caller requests fewer positions.
const ASKED_BY: &[&str] = &["num_logits_to_keep", "logits_to_keep"];
/// The axis of positions in a stream `[batch, positions, width]`.
const POSITIONS: i64 = 1;

impl Analysis {
    /// The reason why the graph computes logits for some positions only: a node, or the declared shape of the logits.
    /// `None` when every position has logits, or when an input lets the caller choose.
    pub fn picks_positions(&self) -> Option<String> {
        let graph = &self.model.graph;
        let last = self.map.layers.last()?.output;
        let behind = descendants(graph, &[last]);
        let asked: Vec<ValueId> =
            graph.body.inputs.iter().copied().filter(|id| ASKED_BY.contains(&graph.name(*id))).collect();
        let asked = descendants(graph, &asked);
        let needed = ancestors(graph, self.map.result);
        let picks = |node: &&Node| {
            let data = node.inputs.first().copied().flatten();
            data.is_some_and(|id| behind.contains(&id))
                && node.present_outputs().any(|id| needed.contains(&id))
                && !node.present_inputs().any(|id| asked.contains(&id))
                && picks_on_positions(graph, node)
        };
        if let Some(node) = graph.body.nodes.iter().find(picks) {
            return Some(format!("node `{}` ({}) picks positions out", node.name, node.op()));
        }
        // The declared shape may describe a selection that the caller's input makes.
        if !asked.is_empty() {
            return None;
        }
        let shape = |id: ValueId| graph.value(id).ty.as_ref().and_then(|ty| ty.shape());
        let one = |id: ValueId| shape(id).and_then(|dims| dims.get(POSITIONS as usize)) == Some(&Dim::Known(1));
        let tokens =
            graph.body.inputs.iter().copied().find(|id| ["input_ids", "inputs_embeds"].contains(&graph.name(*id)));
        let declared = shape(self.map.result)?;
        let fewer = declared.len() == 2 || (declared.len() == 3 && one(self.map.result));
        (fewer && tokens.is_some_and(|id| !one(id)))
            .then(|| format!("the logits `{}` are declared with one position", graph.name(self.map.result)))
    }
}

/// True for an operator that selects some of the stream's positions.
fn picks_on_positions(graph: &Graph, node: &Node) -> bool {
    let constant = |place: usize| {
        let id = node.inputs.get(place).copied().flatten()?;
        constant_of(graph, id)
    };
    let axis = node.attribute("axis").and_then(|axis| axis.as_int()).unwrap_or(0);
    match node.op_type.as_str() {
        _ if !node.domain.is_empty() => false,
        "GatherND" => true,
        "Gather" | "GatherElements" | "Compress" | "Split" => axis == POSITIONS || axis == POSITIONS - 3,
        "Slice" => {
            let (starts, ends) = match node.attribute("starts") {
                Some(_) => (ints(node, "starts"), ints(node, "ends")),
                None => (constant(1), constant(2)),
            };
            let axes = ints(node, "axes").or_else(|| constant(3));
            let count = starts.as_ref().map_or(1, Vec::len);
            let axes = axes.unwrap_or_else(|| (0..count as i64).collect());
            let place = axes.iter().position(|axis| *axis == POSITIONS || *axis == POSITIONS - 3);
            // A slice from the first position to the end selects all of them.
            place.is_some_and(|place| {
                let at = |list: &Option<Vec<i64>>| list.as_ref().and_then(|list| list.get(place).copied());
                at(&starts) != Some(0) || at(&ends).is_none_or(|end| end < i64::from(i32::MAX))
            })
        }
        _ => false,
    }
}

fn ints(node: &Node, name: &str) -> Option<Vec<i64>> {
    node.attribute(name).and_then(|attribute| attribute.as_ints()).map(<[i64]>::to_vec)
}

/// The integers of an initializer or a `Constant` node.
fn constant_of(graph: &Graph, id: ValueId) -> Option<Vec<i64>> {
    constant_tensor(&graph.body, &GraphIndex::new(graph), id)?.to_i64s()
}

/// Values computed from the content of these.
fn descendants(graph: &Graph, from: &[ValueId]) -> HashSet<ValueId> {
    let mut found: HashSet<ValueId> = from.iter().copied().collect();
    for node in graph.body.nodes.iter().filter(|node| !node.reads_shape_only()) {
        let mut read = node.present_inputs().chain(node.bodies().flat_map(captured));
        if read.any(|id| found.contains(&id)) {
            found.extend(node.present_outputs());
        }
    }
    found
}

/// Values from which this one is computed, itself included.
fn ancestors(graph: &Graph, of: ValueId) -> HashSet<ValueId> {
    let mut found = HashSet::from([of]);
    for node in graph.body.nodes.iter().rev() {
        if node.present_outputs().any(|id| found.contains(&id)) {
            found.extend(node.present_inputs().chain(node.bodies().flat_map(captured)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::analysis::{analyse, head_input};
    use crate::ir::{AttributeKind, Model, Tensor, Value};

    fn llama() -> Model {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/optimum/llama-with-past/model.onnx");
        crate::onnx::load(&path).unwrap()
    }

    /// The decoder with one more node before its head: operator, attribute `axis` if any, and int64 inputs after the
    /// stream.
    fn with_node(op: &str, axis: Option<i64>, others: &[&[i64]]) -> Option<String> {
        let mut model = llama();
        let result = analyse(&model).unwrap().map.result;
        let graph = &mut model.graph;
        let all = head_input(graph, result);
        let mut value = |name: String| graph.add_value(Value { name, ..Value::default() });
        let output = value("test.output".into());
        let inputs: Vec<ValueId> = (0..others.len()).map(|number| value(format!("test.{number}"))).collect();
        for node in &mut graph.body.nodes {
            node.inputs.iter_mut().filter(|id| **id == Some(all)).for_each(|id| *id = Some(output));
        }
        for (id, numbers) in inputs.iter().zip(others) {
            graph.body.initializers.push((*id, Tensor::from_i64(&[numbers.len() as u64], numbers)));
        }
        let attributes = axis.map(|axis| ("axis".to_string(), AttributeKind::Int(axis).into())).into_iter().collect();
        let node = Node {
            op_type: op.into(),
            name: "picker".into(),
            inputs: std::iter::once(all).chain(inputs).map(Some).collect(),
            outputs: vec![Some(output)],
            attributes,
            ..Node::default()
        };
        let at = graph.body.nodes.iter().position(|node| node.inputs.contains(&Some(output))).unwrap();
        graph.body.nodes.insert(at, node);
        analyse(&model).unwrap().picks_positions()
    }

    #[test]
    fn a_head_that_selects_positions_is_recognised() {
        assert_eq!(analyse(&llama()).unwrap().picks_positions(), None);
        let whole = &[i64::MAX][..];
        type Case<'a> = (&'a str, Option<i64>, &'a [&'a [i64]], bool);
        let cases: [Case; 7] = [
            ("Gather", Some(1), &[&[-1]], true),
            ("Gather", Some(-2), &[&[-1]], true),
            ("Gather", Some(2), &[&[0, 1]], false),
            ("Slice", None, &[&[-1], whole, &[1]], true),
            ("Slice", None, &[&[0], whole, &[1]], false),
            ("Slice", None, &[&[0], &[32], &[2]], false),
            ("GatherND", None, &[&[0, 1]], true),
        ];
        for (op, axis, others, picks) in cases {
            let found = with_node(op, axis, others);
            assert_eq!(found.is_some(), picks, "{op} {others:?}: {found:?}");
            assert!(found.is_none_or(|found| found.contains("`picker`")));
        }
    }

    #[test]
    fn one_declared_position_means_selection_unless_an_input_decides() {
        let mut model = llama();
        let logits = model.graph.body.outputs[0];
        if let Some(crate::ir::ValueType::Tensor { shape: Some(shape), .. }) =
            &mut model.graph.values[logits.index()].ty
        {
            shape[1] = Dim::Known(1);
        }
        let found = analyse(&model).unwrap().picks_positions();
        assert!(found.is_some_and(|found| found.contains("declared with one position")));
        let keep = model.graph.add_value(Value { name: "num_logits_to_keep".into(), ..Value::default() });
        model.graph.body.inputs.push(keep);
        assert_eq!(analyse(&model).unwrap().picks_positions(), None);
    }
}
