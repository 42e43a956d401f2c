//! The most similar weight of the other side, for what has no match.

use crate::base::Result;
use crate::checkpoint::{Checkpoint, floats};
use crate::ir::Tensor;
use crate::quantised::WeightLayout;

use super::part::{ModelPart, weights_of};
use super::table::{GraftTable, Nearest};

/// The most candidates of one size that are compared.
const MOST_CANDIDATES: usize = 64;

/// Names the nearest weight of everything without a match.
///
/// Errors: as [`floats`].
pub fn fill(table: &mut GraftTable, parts: &[ModelPart], base: &Checkpoint) -> Result<()> {
    let weight = |component: &str, name: &str| {
        let part = parts.iter().find(|part| part.file == component)?;
        let graph = &part.model.graph;
        weights_of(&graph.body).into_iter().find(|(id, _)| graph.name(*id) == name).map(|(_, tensor)| tensor)
    };
    for kept in &mut table.kept {
        let found = kept.component.as_deref().and_then(|component| weight(component, &kept.name));
        let Some(tensor) = found.filter(|tensor| tensor.dtype.is_float()) else { continue };
        kept.nearest = nearest(tensor, base.tensors().iter().map(|(name, other)| (name.as_str(), other)))?;
    }
    let matched = |name: &str| table.weights.iter().any(|weight| weight.initializer == name);
    let free: Vec<(&str, &Tensor)> = parts
        .iter()
        .flat_map(|part| {
            weights_of(&part.model.graph.body).into_iter().map(|(id, tensor)| (part.model.graph.name(id), tensor))
        })
        .filter(|(name, tensor)| tensor.dtype.is_float() && !matched(name))
        .collect();
    for homeless in &mut table.homeless {
        let Some(tensor) = base.tensors().get(&homeless.name).filter(|tensor| tensor.dtype.is_float()) else {
            continue;
        };
        homeless.nearest = nearest(tensor, free.iter().copied())?;
    }
    Ok(())
}

fn nearest<'a>(tensor: &Tensor, others: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Result<Option<Nearest>> {
    let same_size = |other: &Tensor| other.dtype.is_float() && other.element_count() == tensor.element_count();
    let wanted = floats(tensor)?;
    let norm = wanted.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt();
    let mut best: Option<Nearest> = None;
    for (name, other) in others.filter(|(_, other)| same_size(other)).take(MOST_CANDIDATES) {
        let plain = floats(other)?;
        let mut difference = distance(&wanted, &plain);
        if other.dims.len() > 1 {
            let turned = Tensor::from_bytes(other.dtype, &other.dims, WeightLayout::Columns.rows(other));
            difference = difference.min(distance(&wanted, &floats(&turned)?));
        }
        let difference = if norm > 0.0 { difference / norm } else { difference };
        if difference.is_finite() && best.as_ref().is_none_or(|best| difference < best.difference) {
            best = Some(Nearest { name: name.to_string(), difference });
        }
    }
    Ok(best)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}
