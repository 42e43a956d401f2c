//! Trained floats in a graph of quantised weights: as floats, or in the stored form again.

use std::collections::HashSet;

use crate::base::{Error, Result};
use crate::checkpoint::{floats, from_floats};
use crate::ir::{Body, GraphIndex, Model, Tensor, ValueId};

use super::products::{Activations, Form, QuantisedWeight, float_products, place_floats, transposed};

/// The model with float products in place of those of the weights, each with its trained floats in the order of
/// [`QuantisedWeight::dims`] and in the type in which the graph computes.
///
/// Errors: `Error::Invalid` when the model is not the one in which the weights were found.
pub fn with_floats(model: &Model, trained: &[(&QuantisedWeight, Tensor)]) -> Result<Model> {
    let mut model = model.clone();
    let results: HashSet<ValueId> = trained.iter().flat_map(|(weight, _)| weight.products.iter().copied()).collect();
    let types: Vec<_> = trained.iter().map(|(weight, _)| weight.form.float_type(&model.graph.body)).collect();
    let found = float_products(&mut model, Activations::Exact, &|id| results.contains(&id));
    for ((weight, tensor), dtype) in trained.iter().zip(types) {
        let Some(own) = found.iter().find(|own| own.form == weight.form) else {
            let name = weight.form.parts().first().map_or("", |&id| model.graph.name(id));
            return Err(Error::invalid(format!("initializer `{name}`"), "was trained and is not in the model"));
        };
        let floats = Tensor::from_bytes(dtype, &own.dims, from_floats(dtype, &floats(tensor)?)?);
        place_floats(&mut model.graph.body, own.weight, floats);
    }
    Ok(model)
}

/// New content of a weight's initializers: trained floats, in the order of [`QuantisedWeight::dims`], by the graph's own bits,
/// blocks, range and zero points.
///
/// Errors: `Error::Unsupported` when the zero points cannot be stored, or another node reads an initializer that would change.
pub fn requantised(model: &Model, weight: &QuantisedWeight, trained: &Tensor) -> Result<Vec<(ValueId, Tensor)>> {
    let body = &model.graph.body;
    let values = floats(trained)?;
    let name = |id: ValueId| model.graph.name(id);
    let refused = |id: ValueId, problem: &str| {
        Error::unsupported(format!("quantised weight `{}`", name(id)), problem.to_string())
            .remedy("write the trained weights as floats with `--write-trained float`")
    };
    let parts: Vec<(ValueId, Vec<u8>)> = match &weight.form {
        Form::Blocks(blocks) => {
            let packed = blocks.quantise(&transposed(&values, blocks.rows), blocks.own_scheme(), body)?;
            let zeros = blocks.zeros.zip(packed.zeros);
            [(blocks.numbers, packed.numbers), (blocks.scales, packed.scales)].into_iter().chain(zeros).collect()
        }
        Form::Channels(channels) => {
            let range = channels.own_range(body);
            let range =
                range.ok_or_else(|| refused(channels.numbers, "has a zero point other than 0 and no input for it"))?;
            channels.quantise(&channels.rows_of(&values)?, range)?
        }
    };
    let index = GraphIndex::new(&model.graph);
    let mut changed = Vec::new();
    for (id, bytes) in parts {
        let Some(old) = body.initializer(id).filter(|old| old.bytes() != bytes) else { continue };
        if index.uses(id).len() > readers(body, weight) {
            return Err(refused(id, "is read by other nodes, which must not change"));
        }
        changed.push((id, Tensor::from_bytes(old.dtype, &old.dims, bytes)));
    }
    Ok(changed)
}

/// Nodes that may read each initializer of a weight: its products, or the one node that makes floats of it.
fn readers(body: &Body, weight: &QuantisedWeight) -> usize {
    let makes_floats = body.nodes.iter().any(|node| node.present_outputs().any(|id| id == weight.weight));
    if makes_floats { 1 } else { weight.products.len() }
}
