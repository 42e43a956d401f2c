//! Removes MLPs from a graph and leaves the attention of their layers.

use crate::analysis::{Analysis, sublayers};
use crate::base::{Error, Result};
use crate::ir::Model;

use super::removal::without_layers;
use super::tidy;

/// The model without the MLPs of these layers: each becomes the identity, as if its weights were 0. Layers keep their numbers,
/// caches and configs. Source: FinerCut, arXiv:2405.18218.
///
/// Errors: `Error::Invalid` when a layer does not exist; `Error::Unsupported` when a layer has no MLP of its own, or as
/// `drop_layers`.
pub fn drop_mlps(analysis: &Analysis, layers: &[usize]) -> Result<Model> {
    let parts = sublayers(analysis)?;
    let mut dropped = Vec::with_capacity(layers.len());
    for &layer in layers {
        let subject = format!("the MLP of layer {layer}");
        let found = parts.mlps.get(layer).ok_or_else(|| {
            Error::invalid(&subject, format!("does not exist: the layers are 0 to {}", parts.mlps.len() - 1))
        })?;
        let place = found.as_ref().map_err(|reason| {
            Error::unsupported(subject, format!("cannot be dropped alone: {reason}")).remedy("drop whole layers")
        })?;
        dropped.push(*place);
    }
    dropped.sort_unstable();
    let kept: Vec<usize> = (0..parts.map.layers.len()).filter(|part| !dropped.contains(part)).collect();
    let mut model = without_layers(&analysis.model, &parts.map, &dropped, &kept, &[]).map_err(|error| {
        let list = layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        Error::unsupported(format!("the MLPs of layers {list}"), format!("cannot be dropped alone: {error}"))
            .remedy("drop whole layers")
    })?;
    tidy::finish(&mut model)?;
    Ok(model)
}
