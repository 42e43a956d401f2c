//! Puts skip-norm fusions back that the analysis took apart.

use std::collections::HashSet;

use crate::analysis::{FUSED_MARK, FUSED_OUTPUTS, FusedNorm};
use crate::ir::{Attribute, GraphIndex, Model, Node, Value, ValueId};

/// Joins every marked norm with the marked addition before it. A norm whose addition is gone (the first layer was
/// dropped, so it stands on the embeddings) stays a plain norm.
pub fn fuse_skip_norms(model: &mut Model) {
    let body = &model.graph.body;
    let index = GraphIndex::of_body(body);
    let mut taken: HashSet<usize> = HashSet::new();
    let mut replaced: Vec<(usize, usize, Node, Vec<String>)> = Vec::new();
    for (number, norm) in body.nodes.iter().enumerate() {
        let Some(row) = mark(norm).filter(|_| norm.op_type != "Add") else { continue };
        let Some((adding, _)) = norm.inputs.first().copied().flatten().and_then(|sum| index.node_of(sum)) else {
            continue;
        };
        let add = &body.nodes[adding];
        if add.op_type != "Add" || mark(add).is_none_or(|other| other.fused != row.fused) || !taken.insert(adding) {
            continue;
        }
        let (Some(Some(left)), Some(Some(right))) = (add.inputs.first().copied(), add.inputs.get(1).copied()) else {
            continue;
        };
        // With a bias the marked addition is the second of two.
        let partial = index.node_of(left).filter(|&(node, _)| {
            let node = &body.nodes[node];
            node.op_type == "Add" && node.name.ends_with("/add") && index.uses(left).len() == 1
        });
        let (first, second, bias) = match partial {
            // The sum under the bias is gone: what is left adds a bias to the stream, which no fused norm does.
            None if add.name.ends_with("/add_bias") => continue,
            Some((node, _)) if add.name.ends_with("/add_bias") => {
                let inner = &body.nodes[node];
                let (Some(a), Some(b)) =
                    (inner.inputs.first().copied().flatten(), inner.inputs.get(1).copied().flatten())
                else {
                    continue;
                };
                (a, b, Some(right))
            }
            _ => (left, right, None),
        };
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
        let fused = Node {
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
        replaced.push((number, adding, fused, names));
    }
    let mut gone = HashSet::new();
    for (norm, add, mut fused, names) in replaced {
        // Statistics that nobody reads come back under their names.
        for (position, name) in (1..).zip(names).take(2).filter(|(_, name)| !name.is_empty()) {
            if fused.outputs.len() <= position {
                fused.outputs.resize(position + 1, None);
            }
            fused.outputs[position] = Some(model.graph.add_value(Value { name, ..Value::default() }));
        }
        model.graph.body.nodes[norm] = fused;
        gone.insert(add);
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

fn mark(node: &Node) -> Option<&'static FusedNorm> {
    let (_, name) = node.metadata.iter().find(|(key, _)| key == FUSED_MARK)?;
    FusedNorm::by_name(name.rsplit('.').next()?)
}

fn without_mark(node: &Node) -> Vec<(String, String)> {
    node.metadata.iter().filter(|(key, _)| key != FUSED_MARK && key != FUSED_OUTPUTS).cloned().collect()
}

/// Names of the fused node's outputs from the second on, as the analysis kept them.
fn output_names(norm: &Node) -> Vec<String> {
    let kept = norm.metadata.iter().find(|(key, _)| key == FUSED_OUTPUTS);
    kept.map(|(_, names)| names.lines().map(str::to_string).collect()).unwrap_or_default()
}
