//! INTERLACE and its ablations. Source: arXiv:2511.19676, sections 3 and 4.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::base::Result;

use super::request::{Group, SelectionRequest};

/// Triplets, then pairs; drops the one of the first two layers with the higher `sim_1`.
pub(super) fn interlace(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    Ok(packs(request, |request, start| {
        if request.sim(1, start + 1) > request.sim(1, start) { (start + 1, start) } else { (start, start + 1) }
    }))
}

/// Triplets, then pairs; drops the first layer.
pub(super) fn order_as_is(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    Ok(packs(request, |_, start| (start, start + 1)))
}

/// `choose` gives (drop, finetune) out of the first two layers of a pack.
fn packs(request: &SelectionRequest, choose: impl Fn(&SelectionRequest, usize) -> (usize, usize)) -> Vec<Group> {
    let mut assigned = vec![false; request.num_layers];
    let mut groups = Vec::new();
    for size in [3, 2] {
        for start in request.ranked(size) {
            if groups.len() == request.count {
                return groups;
            }
            let pack = &mut assigned[start..start + size];
            if pack.contains(&true) {
                continue;
            }
            pack.fill(true);
            let (drop, finetune) = choose(request, start);
            groups.push(Group {
                drop: vec![drop],
                finetune: vec![finetune],
                anchor: (size == 3).then_some(start + 2),
                score: Some(request.sim(size, start)),
            });
        }
    }
    groups
}

/// Single layers by `sim_1`, each with the next layer to finetune.
pub(super) fn then_next(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let mut assigned = vec![false; request.num_layers];
    let mut groups = Vec::new();
    for layer in request.ranked(1) {
        if groups.len() == request.count {
            break;
        }
        if layer + 1 >= request.usable() || assigned[layer] || assigned[layer + 1] {
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
    Ok(groups)
}

/// One block of `count` layers from the best `sim_1` for which block and finetune layers both fit.
pub(super) fn consecutive(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let count = request.count.min(request.usable() / 2);
    let fits = |start: &usize| start + 2 * count <= request.usable();
    Ok(request
        .ranked(1)
        .into_iter()
        .find(fits)
        .map(|start| Group {
            drop: (start..start + count).collect(),
            finetune: (start + count..start + 2 * count).collect(),
            anchor: None,
            score: Some(request.sim(1, start)),
        })
        .into_iter()
        .collect())
}

/// `count` layers to drop and `count` others to finetune, both drawn uniformly.
pub(super) fn random(request: &mut SelectionRequest) -> Result<Vec<Group>> {
    let mut layers: Vec<usize> = (0..request.usable()).collect();
    layers.shuffle(&mut ChaCha8Rng::seed_from_u64(request.seed));
    let (drop, rest) = layers.split_at(request.count.min(layers.len()));
    let sorted = |layers: &[usize]| {
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        layers
    };
    let finetune = sorted(&rest[..request.count.min(rest.len())]);
    Ok(vec![Group { drop: sorted(drop), finetune, anchor: None, score: None }])
}
