//! INTERLACE and its ablations. Source: arXiv:2511.19676, sections 3 and 4.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::base::Result;

use super::request::{Group, SelectionRequest};

/// Triplets, then pairs. Of the first two layers of a pack, drops the one with the higher `sim_1`, or the one that can
/// be dropped if only one can.
pub(super) fn interlace(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    Ok(packs(request, &[3, 2], |request, start| {
        let (better, other) =
            if request.sim(1, start + 1) > request.sim(1, start) { (start + 1, start) } else { (start, start + 1) };
        if request.can_drop(&[better]) { (better, other) } else { (other, better) }
    }))
}

/// Triplets, then pairs. Drops the first layer of each.
pub(super) fn order_as_is(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let sizes: &[usize] = if request.beyond_structure { &[3, 2] } else { &[3] };
    Ok(packs(request, sizes, |_, start| (start, start + 1)))
}

/// Packs of `sizes`, one size after the other. `choose` gives (drop, finetune) out of the first two layers of a pack.
fn packs(
    request: &SelectionRequest,
    sizes: &[usize],
    choose: impl Fn(&SelectionRequest, usize) -> (usize, usize),
) -> Vec<Group> {
    let mut assigned = vec![false; request.num_layers];
    let mut groups = Vec::new();
    for &size in sizes {
        for start in request.ranked(size) {
            if groups.len() == request.count {
                return groups;
            }
            let pack = &mut assigned[start..start + size];
            let (drop, finetune) = choose(request, start);
            if pack.contains(&true) || !request.can_drop(&[drop]) {
                continue;
            }
            pack.fill(true);
            groups.push(Group {
                drop: vec![drop],
                finetune: vec![finetune],
                anchor: (size == 3).then_some(start + 2),
                score: Some(request.sim(size, start)),
            });
        }
    }
    beyond(request, &mut groups);
    groups
}

/// Where packs have run out and the user lets the strategy go on: frozen layers by `sim_1`, anchors among them, each as a
/// group without a layer to finetune.
fn beyond(request: &SelectionRequest, groups: &mut Vec<Group>) {
    if !request.beyond_structure {
        return;
    }
    for layer in request.ranked(1) {
        if groups.len() >= request.count {
            return;
        }
        let dropped: Vec<usize> = groups.iter().flat_map(|group| group.drop.iter().copied()).chain([layer]).collect();
        let taken = groups.iter().any(|group| group.drop.contains(&layer) || group.finetune.contains(&layer));
        if taken || !request.can_drop(&dropped) {
            continue;
        }
        for group in groups.iter_mut().filter(|group| group.anchor == Some(layer)) {
            group.anchor = None;
        }
        let score = Some(request.sim(1, layer));
        groups.push(Group { drop: vec![layer], finetune: Vec::new(), anchor: None, score });
    }
}

/// Single layers by `sim_1`, each with the next layer to finetune.
pub(super) fn with_next_layer(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let mut assigned = vec![false; request.num_layers];
    let mut groups = Vec::new();
    for layer in request.ranked(1) {
        if groups.len() == request.count {
            break;
        }
        let taken = layer + 1 >= request.reach() || assigned[layer] || assigned[layer + 1];
        if taken || !request.can_drop(&[layer]) {
            continue;
        }
        assigned[layer..=layer + 1].fill(true);
        groups.push(Group {
            drop: vec![layer],
            finetune: vec![layer + 1],
            anchor: None,
            score: Some(request.sim(1, layer)),
        });
    }
    beyond(request, &mut groups);
    Ok(groups)
}

/// One block of `count` layers with the best `sim_1` among the starts where block and finetuned layers both fit.
pub(super) fn consecutive(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let count = request.count.min(request.reach() / 2);
    let block = |start: usize| (start..start + count).collect::<Vec<usize>>();
    let fits = |start: &usize| start + 2 * count <= request.reach() && request.can_drop(&block(*start));
    Ok(request
        .ranked(1)
        .into_iter()
        .find(fits)
        .map(|start| Group {
            drop: block(start),
            finetune: (start + count..start + 2 * count).collect(),
            anchor: None,
            score: Some(request.sim(1, start)),
        })
        .into_iter()
        .collect())
}

/// `count` droppable layers to drop and `count` others to finetune, both drawn uniformly.
pub(super) fn random(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let mut layers: Vec<usize> = (0..request.reach()).collect();
    layers.shuffle(&mut ChaCha8Rng::seed_from_u64(request.seed));
    let drop: Vec<usize> =
        layers.iter().copied().filter(|&layer| request.can_drop(&[layer])).take(request.count).collect();
    let rest: Vec<usize> = layers.into_iter().filter(|layer| !drop.contains(layer)).collect();
    let sorted = |layers: &[usize]| {
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        layers
    };
    let finetune = sorted(&rest[..request.count.min(rest.len())]);
    Ok(vec![Group { drop: sorted(&drop), finetune, anchor: None, score: None }])
}
