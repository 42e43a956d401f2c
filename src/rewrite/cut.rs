//! Extracts a part of a graph.

use std::collections::HashSet;

use crate::base::{Error, Result};
use crate::ir::{GraphIndex, Model, ValueId};

use super::tidy;

/// The part of a model that computes `outputs` from `inputs` and from the other model inputs that it
/// needs. Values keep their names.
///
/// Errors: `Error::Invalid` when an output cannot be computed or is listed twice.
pub fn extract(model: &Model, inputs: &[ValueId], outputs: &[ValueId]) -> Result<Model> {
    let mut part = model.clone();
    let body = &mut part.graph.body;
    let given: HashSet<ValueId> = inputs.iter().copied().collect();
    let index = GraphIndex::of_body(body);
    for &id in outputs {
        if index.producer(id).is_none() {
            return Err(Error::invalid(format!("value `{}`", model.graph.name(id)), "is not made by this graph"));
        }
    }
    for node in &mut body.nodes {
        for output in &mut node.outputs {
            if output.is_some_and(|id| given.contains(&id)) {
                *output = None;
            }
        }
    }
    body.nodes.retain(|node| node.outputs.iter().any(Option::is_some));
    body.outputs = outputs.to_vec();
    let known: HashSet<ValueId> = body.inputs.iter().copied().collect();
    body.inputs.extend(inputs.iter().copied().filter(|id| !known.contains(id)));
    tidy::remove_dead_code(body);
    let index = GraphIndex::of_body(body);
    let kept: Vec<ValueId> = body
        .inputs
        .iter()
        .copied()
        .filter(|&id| given.contains(&id) || !index.uses(id).is_empty() || outputs.contains(&id))
        .collect();
    body.inputs = kept;
    tidy::finish(&mut part)?;
    Ok(part)
}
