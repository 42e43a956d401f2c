//! Restores the skip-norm fusions that the analysis split.

use std::collections::HashSet;

use crate::analysis::{FUSED_MARK, FUSED_OUTPUTS, FusedNorm};
use crate::ir::{Attribute, Body, GraphIndex, Model, Node, Value, ValueId};

/// A marked norm merged with the addition before it.
struct Joined {
    /// Position of the norm among the nodes.
    norm: usize,
    /// Position of the addition among the nodes.
    addition: usize,
    /// The fused node.
    node: Node,
    /// Names of the fused node's outputs from the second on.
    names: Vec<String>,
}

/// Merges every marked norm with the marked addition before it. A norm without an addition stays a plain norm; this
/// happens when the first layer was dropped and the norm reads the embeddings.
pub fn fuse_skip_norms(model: &mut Model) {
    let mut gone = HashSet::new();
    for Joined { norm, addition, mut node, names } in joined_norms(&model.graph.body) {
        // Unread statistics keep the names that they had.
        for (position, name) in (1..).zip(names).take(2).filter(|(_, name)| !name.is_empty()) {
            if node.outputs.len() <= position {
                node.outputs.resize(position + 1, None);
            }
            node.outputs[position] = Some(model.graph.add_value(Value { name, ..Value::default() }));
        }
        model.graph.body.nodes[norm] = node;
        gone.insert(addition);
    }
    let body = &mut model.graph.body;
    let mut number = 0;
    body.nodes.retain(|_| {
        number += 1;
        !gone.contains(&(number - 1))
    });
    for node in &mut body.nodes {
        node.metadata = without_mark(node);
    }
}

fn joined_norms(body: &Body) -> Vec<Joined> {
    let index = GraphIndex::of_body(body);
    let mut taken: HashSet<usize> = HashSet::new();
    let mut joined = Vec::new();
    for (number, norm) in body.nodes.iter().enumerate() {
        let Some(row) = mark(norm).filter(|_| norm.op_type != "Add") else { continue };
        let Some((adding, _)) = norm.inputs.first().copied().flatten().and_then(|sum| index.node_of(sum)) else {
            continue;
        };
        let add = &body.nodes[adding];
        if add.op_type != "Add" || mark(add).is_none_or(|other| other.fused != row.fused) || !taken.insert(adding) {
            continue;
        }
        let Some((first, second, bias)) = addends(body, &index, add) else { continue };
        let mut inputs = vec![Some(first), Some(second)];
        inputs.extend(norm.inputs.iter().skip(1).copied());
        if let Some(bias) = bias {
            inputs.resize(row.bias_input, None);
            inputs.push(Some(bias));
        }
        let sum: Option<ValueId> = add.outputs.first().copied().flatten();
        let normed = norm.outputs.first().copied().flatten();
        let only_reader = |id: ValueId| index.uses(id).len() == 1 && index.output_position(id).is_none();
        let names = output_names(norm);
        let had_sum = names.get(2).is_some_and(|name| !name.is_empty());
        let outputs = match sum {
            Some(id) if had_sum || !only_reader(id) => vec![normed, None, None, Some(id)],
            _ => vec![normed],
        };
        let node = Node {
            name: norm.name.clone(),
            op_type: row.fused.into(),
            domain: "com.microsoft".into(),
            inputs,
            outputs,
            attributes: norm
                .attributes
                .iter()
                .filter(|(key, _)| key == "epsilon")
                .cloned()
                .collect::<Vec<(String, Attribute)>>(),
            doc_string: norm.doc_string.clone(),
            metadata: without_mark(norm),
            ..Node::default()
        };
        joined.push(Joined { norm: number, addition: adding, node, names });
    }
    joined
}

/// The two addends of a fused norm and its bias. `None` when a dropped layer removed the sum to which the bias was
/// added: no fused norm adds a bias to the stream.
fn addends(body: &Body, index: &GraphIndex, add: &Node) -> Option<(ValueId, ValueId, Option<ValueId>)> {
    let input = |node: &Node, number: usize| node.inputs.get(number).copied().flatten();
    let (left, right) = (input(add, 0)?, input(add, 1)?);
    if !add.name.ends_with("/add_bias") {
        return Some((left, right, None));
    }
    // With a bias the marked addition is the second of two additions.
    let (number, _) = index.node_of(left)?;
    let inner = &body.nodes[number];
    if inner.op_type != "Add" || !inner.name.ends_with("/add") || index.uses(left).len() != 1 {
        return None;
    }
    Some((input(inner, 0)?, input(inner, 1)?, Some(right)))
}

fn mark(node: &Node) -> Option<&'static FusedNorm> {
    let (_, name) = node.metadata.iter().find(|(key, _)| key == FUSED_MARK)?;
    FusedNorm::by_name(name.rsplit('.').next()?)
}

fn without_mark(node: &Node) -> Vec<(String, String)> {
    node.metadata.iter().filter(|(key, _)| key != FUSED_MARK && key != FUSED_OUTPUTS).cloned().collect()
}

/// Names of the fused node's outputs from the second on, as recorded by the analysis.
fn output_names(norm: &Node) -> Vec<String> {
    let kept = norm.metadata.iter().find(|(key, _)| key == FUSED_OUTPUTS);
    kept.map(|(_, names)| names.lines().map(str::to_string).collect()).unwrap_or_default()
}
