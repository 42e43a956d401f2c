//! Greedy selection by measured loss: repeatedly drops the layer whose removal raises the loss least.

use crate::base::{Error, Progress, Result};

use super::published;
use super::request::{Group, MeasureLosses, SelectionRequest};
use super::tiling::{Tiling, tile};

/// Every layer is a candidate if it can be dropped together with those already selected. Source: arXiv:2402.09025.
pub(super) fn sleb(request: &mut SelectionRequest, strategy: &str) -> Result<Vec<Group>> {
    let (usable, refusal) = (request.usable(), request.refusal);
    let chosen = greedy(request, strategy, &|removed| {
        let can_drop = |layer: &usize| {
            let all: Vec<usize> = removed.iter().copied().chain([*layer]).collect();
            refusal(&all).is_none()
        };
        (0..usable).filter(|layer| !removed.contains(layer)).filter(can_drop).collect()
    })?;
    let drop: Vec<usize> = chosen.iter().map(|&(layer, _)| layer).collect();
    let loss = |layer| chosen.iter().find(|&&(other, _)| other == layer).map(|&(_, loss)| loss);
    Ok(published::with_neighbours(request, &drop, loss))
}

/// Keeps the structure of INTERLACE: no two adjacent layers are dropped, and each dropped layer has a kept neighbour of
/// its own to finetune, followed by a frozen layer if there is room. Source: arXiv:2511.19676, section 3, with the
/// measured loss in place of similarities.
pub(super) fn interlace_loss(request: &mut SelectionRequest, strategy: &str) -> Result<Vec<Group>> {
    let usable = request.usable();
    let count = request.count;
    let free: Vec<bool> = (0..usable).map(|layer| request.can_drop(&[layer])).collect();
    let most = |removed: &[usize]| tile(&free, removed, true).map_or(0, |tiling| tiling.drops());
    if most(&[]) < count {
        return Ok(tile(&free, &[], true).map(Tiling::into_groups).unwrap_or_default());
    }
    let chosen = greedy(request, strategy, &|removed| {
        let fits = |&layer: &usize| {
            let trial: Vec<usize> = removed.iter().copied().chain([layer]).collect();
            !removed.contains(&layer) && most(&trial) >= count
        };
        (0..usable).filter(fits).collect()
    })?;
    let drop: Vec<usize> = chosen.iter().map(|&(layer, _)| layer).collect();
    let mut groups = tile(&free, &drop, false).map(Tiling::into_groups).unwrap_or_default();
    groups.sort_by_key(|group| drop.iter().position(|layer| group.drop.contains(layer)));
    for (group, &(_, loss)) in groups.iter_mut().zip(&chosen) {
        group.score = Some(loss);
    }
    Ok(groups)
}

/// Runs rounds of measurements. Returns the layers in the order of their removal, each with the loss after it.
fn greedy(
    request: &mut SelectionRequest,
    strategy: &str,
    candidates: &dyn Fn(&[usize]) -> Vec<usize>,
) -> Result<Vec<(usize, f64)>> {
    let Some(measure) = request.measure.take() else {
        return Err(Error::invalid(
            format!("strategy `{strategy}`"),
            "needs losses, and there is no calibration data to measure them on",
        )
        .remedy("name the data with `--data`"));
    };
    rounds(measure, request.count, candidates)
}

fn rounds(
    measure: &mut dyn MeasureLosses,
    count: usize,
    candidates: &dyn Fn(&[usize]) -> Vec<usize>,
) -> Result<Vec<(usize, f64)>> {
    let progress = Progress::new("measure", "forward passes", 0);
    let mut chosen: Vec<(usize, f64)> = Vec::new();
    let mut passes = 0;
    while chosen.len() < count {
        let mut removed: Vec<usize> = chosen.iter().map(|&(layer, _)| layer).collect();
        removed.sort_unstable();
        let layers = candidates(&removed);
        progress.set_total(passes + (layers.len() * (count - chosen.len())) as u64 * measure.passes());
        if layers.is_empty() {
            break;
        }
        let losses = measure.losses(&removed, &layers, &progress)?;
        passes += layers.len() as u64 * measure.passes();
        if let Some((layer, loss)) = layers.iter().zip(&losses).find(|(_, loss)| loss.is_nan()) {
            return Err(Error::invalid(format!("loss without layers {removed:?} and {layer}"), format!("is {loss}"))
                .remedy("check the model with `interlace verify`, or take other calibration samples"));
        }
        // `min_by` returns the first of equal values, which is the lower index.
        let best = layers.into_iter().zip(losses).min_by(|a, b| a.1.total_cmp(&b.1));
        let Some(best) = best else { break };
        progress.note(format!("loss {:.4} without {} layers", best.1, chosen.len() + 1));
        chosen.push(best);
    }
    Ok(chosen)
}
