//! Selectors from other publications, and the user's own list. They select only the layers to drop; the neighbours of
//! those are finetuned.

use std::f64::consts::PI;

use crate::base::{Error, Result};

use super::request::{Group, SelectionRequest};

/// The `count` droppable layers with the highest `sim_1`. Source: arXiv:2403.03853, Block Influence.
pub(super) fn shortgpt(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let drop: Vec<usize> =
        request.ranked(1).into_iter().filter(|&layer| request.can_drop(&[layer])).take(request.count).collect();
    Ok(with_neighbours(request, &drop, |layer| Some(1.0 - request.sim(1, layer))))
}

/// The block of `count` layers with the smallest `arccos(sim) / pi` across it. Source: arXiv:2403.17887, equation 5.
pub(super) fn angular(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let block = |start: usize| (start..start + request.count).collect::<Vec<usize>>();
    let best = request.ranked(request.count).into_iter().find(|&start| request.can_drop(&block(start)));
    let Some(start) = best else { return Ok(Vec::new()) };
    let angle = request.sim(request.count, start).clamp(-1.0, 1.0).acos() / PI;
    let drop = block(start);
    Ok(with_neighbours(request, &drop, |layer| (layer == start).then_some(angle)))
}

/// The layers that the user listed.
pub(super) fn explicit(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let drop = super::super::check_layers(request.layers, request.num_layers)?;
    if drop.len() != request.count {
        return Err(Error::invalid(
            "strategy `explicit`",
            format!("{} layers named, {} to drop", drop.len(), request.count),
        ));
    }
    Ok(with_neighbours(request, &drop, |_| None))
}

/// One group per dropped layer, in the given order, with a layer to finetune: the nearest kept layer after it that is
/// in no other group, otherwise the nearest before it; none if all kept layers are in other groups.
pub(super) fn with_neighbours(
    request: &SelectionRequest,
    drop: &[usize],
    score: impl Fn(usize) -> Option<f64>,
) -> Vec<Group> {
    let mut free: Vec<bool> = (0..request.usable()).map(|layer| !drop.contains(&layer)).collect();
    let mut groups: Vec<Group> = Vec::new();
    let mut ascending = drop.to_vec();
    ascending.sort_unstable();
    for layer in ascending {
        let after = free.iter().enumerate().skip(layer).find(|(_, free)| **free);
        let partner = after.or_else(|| free.iter().enumerate().take(layer).rfind(|(_, free)| **free));
        let finetune: Vec<usize> = partner.map(|(index, _)| index).into_iter().collect();
        for &index in &finetune {
            free[index] = false;
        }
        groups.push(Group { drop: vec![layer], finetune, anchor: None, score: score(layer) });
    }
    groups.sort_by_key(|group| drop.iter().position(|layer| group.drop.contains(layer)));
    groups
}
