use std::collections::BTreeMap;

use proptest::prelude::{Just, any, prop, prop_assert, prop_assert_eq, proptest};
use proptest::strategy::Strategy as Values;

use super::*;
use crate::base::Progress;
use crate::method::scores::Similarities;

/// 10 layers, the last protected: sim_1 has 9 entries, sim_2 8, sim_3 7.
fn example() -> Similarities {
    BTreeMap::from([
        (1, vec![0.10, 0.80, 0.90, 0.70, 0.60, 0.95, 0.50, 0.85, 0.40]),
        (2, vec![0.20, 0.75, 0.65, 0.60, 0.70, 0.55, 0.50, 0.45]),
        (3, vec![0.05, 0.60, 0.50, 0.70, 0.40, 0.65, 0.55]),
        (4, vec![0.30, 0.20, 0.50, 0.40, 0.10, 0.35]),
    ])
}

fn request<'a>(similarities: &'a Similarities, count: usize) -> SelectionRequest<'a, 'a> {
    let (seed, layers) = (42, &[]);
    SelectionRequest {
        num_layers: 10,
        count,
        include_last: false,
        as_released: false,
        beyond_structure: false,
        refusal: &all_may_go,
        similarities,
        seed,
        layers,
        measure: None,
    }
}

fn all_may_go(_: &[usize]) -> Option<String> {
    None
}

fn select(name: &str, count: usize) -> Result<Vec<Group>> {
    let similarities = example();
    Strategy::named(name)?.select(&mut request(&similarities, count))
}

fn shape(groups: &[Group]) -> Vec<(Vec<usize>, Vec<usize>, Option<usize>)> {
    groups.iter().map(|group| (group.drop.clone(), group.finetune.clone(), group.anchor)).collect()
}

/// Triplets by sim_3: 3 (0.70), 5 overlaps, 1 overlaps, 6 (0.55), 2, 4 overlap, 0 (0.05).
/// 3..6: sim_1 is 0.70 and 0.60, so 3 is dropped. 6..9: 0.50 and 0.85, so 7. 0..3: 0.10 and 0.80, so 1.
#[test]
fn interlace_takes_the_best_triplets_that_do_not_overlap() {
    let want = vec![(vec![3], vec![4], Some(5)), (vec![7], vec![6], Some(8)), (vec![1], vec![0], Some(2))];
    assert_eq!(shape(&select("interlace", 3).unwrap()), want);
    assert_eq!(shape(&select("interlace", 2).unwrap()), want[..2]);
}

/// Layer 3 cannot be dropped alone, and layer 7 cannot be dropped without 8.
fn without_three(layers: &[usize]) -> Option<String> {
    let refused = |layer: usize| layers.contains(&layer) && !(layer == 7 && layers.contains(&8));
    (refused(3) || refused(7)).then(|| "layer 3: its keys are read by layer 9".to_string())
}

#[test]
fn layers_that_cannot_be_dropped_are_never_chosen() {
    let similarities = example();
    let mut chosen = 0;
    for strategy in STRATEGIES.iter().filter(|strategy| strategy.name != "explicit") {
        for count in 1..=4 {
            for seed in 0..8 {
                let loss = |removed: &[usize]| -removed.iter().map(|&layer| layer as f64).sum::<f64>();
                let mut measure = Formula { loss, calls: 0 };
                let asked = request(&similarities, count);
                let mut asked =
                    SelectionRequest { refusal: &without_three, seed, measure: Some(&mut measure), ..asked };
                let Ok(groups) = strategy.select(&mut asked) else { continue };
                let mut drop: Vec<usize> = groups.iter().flat_map(|group| group.drop.iter().copied()).collect();
                drop.sort_unstable();
                assert_eq!(drop.len(), count, "{}", strategy.name);
                assert_eq!(without_three(&drop), None, "{}: {drop:?}", strategy.name);
                chosen += 1;
            }
        }
    }
    assert!(chosen >= 64, "only {chosen} choices");
    // The triplet at 3 drops 4 instead of 3, the one at 6 drops 6.
    let mut asked = SelectionRequest { refusal: &without_three, ..request(&similarities, 3) };
    let groups = Strategy::named("interlace").unwrap().select(&mut asked).unwrap();
    let want = vec![(vec![4], vec![3], Some(5)), (vec![6], vec![7], Some(8)), (vec![1], vec![0], Some(2))];
    assert_eq!(shape(&groups), want);
    let mut asked = SelectionRequest { refusal: &without_three, ..request(&similarities, 8) };
    let error = Strategy::named("shortgpt").unwrap().select(&mut asked).unwrap_err().to_string();
    assert!(error.contains("7 at most (layers 3, 7 cannot be dropped: layer 3: its keys"), "{error}");
}

/// After the three triplets only the protected layer 9 is left.
#[test]
fn the_error_for_too_many_layers_gives_the_maximum() {
    let error = select("interlace", 4).unwrap_err().to_string();
    assert_eq!(
        error,
        "strategy `interlace`: cannot drop 4 of 10 layers, 3 at most; ask for fewer, go on with single layers by \
         `--beyond-structure`, or choose another strategy"
    );
}

/// The triplets at 2 and 5 leave layers 0, 1 and 8. The pair at 0 follows, then nothing fits.
#[test]
fn pairs_follow_when_triplets_run_out() {
    let mut similarities = example();
    similarities.insert(3, vec![0.0, 0.0, 0.9, 0.0, 0.0, 0.8, 0.0]);
    let strategy = Strategy::named("interlace").unwrap();
    let groups = strategy.select(&mut request(&similarities, 3)).unwrap();
    let want = vec![(vec![2], vec![3], Some(4)), (vec![5], vec![6], Some(7)), (vec![1], vec![0], None)];
    assert_eq!(shape(&groups), want);
    assert_eq!(groups[2].score, Some(0.20));
    let error = strategy.select(&mut request(&similarities, 4)).unwrap_err().to_string();
    assert!(error.contains("3 at most"), "{error}");
}

#[test]
fn ties_are_broken_by_the_lower_index() {
    let flat: Similarities = (1..=3).map(|size| (size, vec![0.5; 10 - size])).collect();
    let groups = Strategy::named("interlace").unwrap().select(&mut request(&flat, 3)).unwrap();
    assert_eq!(
        shape(&groups),
        vec![(vec![0], vec![1], Some(2)), (vec![3], vec![4], Some(5)), (vec![6], vec![7], Some(8))]
    );
}

/// In the released code only `interlace` takes pairs after its triplets.
#[test]
fn interlace_oa_takes_no_pairs_after_its_triplets() {
    let mut similarities = example();
    similarities.insert(3, vec![0.0, 0.0, 0.9, 0.0, 0.0, 0.8, 0.0]);
    let strategy = Strategy::named("interlace-oa").unwrap();
    let error = strategy.select(&mut request(&similarities, 3)).unwrap_err().to_string();
    assert!(error.contains("2 at most") && error.contains("--beyond-structure"), "{error}");
    let mut asked = SelectionRequest { beyond_structure: true, ..request(&similarities, 3) };
    let want = vec![(vec![2], vec![3], Some(4)), (vec![5], vec![6], Some(7)), (vec![0], vec![1], None)];
    assert_eq!(shape(&strategy.select(&mut asked).unwrap()), want);
}

/// After the three triplets at 3, 6 and 0, the anchors 5 (0.95), 2 (0.90) and 8 (0.40) are dropped in order of sim_1.
/// Finetuned layers are kept.
#[test]
fn beyond_structure_drops_frozen_layers_one_by_one() {
    let similarities = example();
    let strategy = Strategy::named("interlace").unwrap();
    let select = |count| {
        let mut asked = SelectionRequest { beyond_structure: true, ..request(&similarities, count) };
        strategy.select(&mut asked)
    };
    let structure = [(vec![3], vec![4], None), (vec![7], vec![6], Some(8)), (vec![1], vec![0], None)];
    let want = [&structure[..], &[(vec![5], vec![], None), (vec![2], vec![], None)]].concat();
    let groups = select(5).unwrap();
    assert_eq!(shape(&groups), want);
    assert_eq!((groups[3].score, groups[4].score), (Some(0.95), Some(0.90)));
    // At most 6 of 10: the finetuned layers and the protected one are kept.
    assert_eq!(select(6).unwrap()[5].drop, [8]);
    assert!(select(7).unwrap_err().to_string().contains("6 at most"));
    assert_eq!(
        select(3).unwrap(),
        Strategy::named("interlace").unwrap().select(&mut request(&similarities, 3)).unwrap()
    );
    let mut asked = SelectionRequest { beyond_structure: true, ..request(&similarities, 2) };
    let error = Strategy::named("shortgpt").unwrap().select(&mut asked).unwrap_err().to_string();
    assert!(error.contains("has no `--beyond-structure`; use it with one of interlace, interlace-oa"), "{error}");
}

/// In the released code, `interlace-tn` may drop the last but one layer and then finetunes the last, `random` draws
/// from all layers, and a block with its finetuned layers may end at the last layer.
#[test]
fn as_released_lets_the_ablations_use_the_last_layer() {
    let mut similarities = example();
    similarities.insert(1, vec![0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9]);
    let first = |name: &str, count: usize, as_released: bool| {
        let mut asked = SelectionRequest { as_released, ..request(&similarities, count) };
        shape(&Strategy::named(name).unwrap().select(&mut asked).unwrap())[0].clone()
    };
    assert_eq!(first("interlace-tn", 1, true), (vec![8], vec![9], None));
    assert_eq!(first("interlace-tn", 1, false), (vec![0], vec![1], None));
    assert_eq!(first("consecutive", 1, true), (vec![8], vec![9], None));
    assert_eq!(first("consecutive", 5, true), ((0..5).collect(), (5..10).collect(), None));
    let random = |as_released: bool| {
        (0..40).any(|seed| {
            let mut asked = SelectionRequest { as_released, seed, ..request(&similarities, 2) };
            let groups = Strategy::named("random").unwrap().select(&mut asked).unwrap();
            groups[0].drop.contains(&9) || groups[0].finetune.contains(&9)
        })
    };
    assert_eq!((random(true), random(false)), (true, false));
    let mut asked = SelectionRequest { as_released: true, ..request(&similarities, 2) };
    let error = Strategy::named("interlace").unwrap().select(&mut asked).unwrap_err().to_string();
    assert!(error.contains("has no `--as-released`; use it with one of interlace-tn, consecutive, random"), "{error}");
}

#[test]
fn interlace_oa_drops_the_first_layer_of_each_triplet() {
    let want = vec![(vec![3], vec![4], Some(5)), (vec![6], vec![7], Some(8)), (vec![0], vec![1], Some(2))];
    assert_eq!(shape(&select("interlace-oa", 3).unwrap()), want);
}

/// sim_1 in order: 5 (finetunes 6), 2 (3), 7 (8), 1 (its successor 2 is taken), 3 and 4 (5 is taken) ... 0 (1).
#[test]
fn interlace_tn_finetunes_the_layer_after_each_dropped_layer() {
    let want =
        vec![(vec![5], vec![6], None), (vec![2], vec![3], None), (vec![7], vec![8], None), (vec![0], vec![1], None)];
    assert_eq!(shape(&select("interlace-tn", 4).unwrap()), want);
}

/// The best sim_1 is layer 5, where 2 + 2 layers fit (5..9); for 3 + 3 layers the best start that fits is 2.
#[test]
fn consecutive_drops_one_block_that_fits() {
    assert_eq!(shape(&select("consecutive", 2).unwrap()), vec![(vec![5, 6], vec![7, 8], None)]);
    assert_eq!(shape(&select("consecutive", 3).unwrap()), vec![(vec![2, 3, 4], vec![5, 6, 7], None)]);
    assert!(select("consecutive", 5).unwrap_err().to_string().contains("4 at most"));
}

/// sim_1 in order: 5, 2, 7, 1. Finetuned layers: 3 for 1 (2 is dropped), 4 for 2, 6 for 5, 8 for 7.
#[test]
fn shortgpt_drops_the_least_influential_layers() {
    let groups = select("shortgpt", 4).unwrap();
    let want =
        vec![(vec![5], vec![6], None), (vec![2], vec![4], None), (vec![7], vec![8], None), (vec![1], vec![3], None)];
    assert_eq!(shape(&groups), want);
    assert!((groups[0].score.unwrap() - 0.05).abs() < 1e-12);
}

/// sim_4 is highest at 2: arccos(0.5) is pi / 3. Layers 6, 7, 8 follow the block, layer 1 is the nearest before it.
#[test]
fn angular_drops_the_block_with_the_smallest_angular_distance() {
    let groups = select("angular", 4).unwrap();
    assert_eq!(groups.iter().flat_map(|group| group.drop.clone()).collect::<Vec<_>>(), vec![2, 3, 4, 5]);
    assert_eq!(groups.iter().flat_map(|group| group.finetune.clone()).collect::<Vec<_>>(), vec![6, 7, 8, 1]);
    assert!((groups[0].score.unwrap() - 1.0 / 3.0).abs() < 1e-12);
    let error = select("angular", 5).unwrap_err().to_string();
    assert!(error.contains("sim_5") && error.contains("--packs 1,2,3,5"), "{error}");
}

/// Losses by a formula over the removed layers (ascending).
struct Formula<F> {
    loss: F,
    calls: usize,
}

impl<F: Fn(&[usize]) -> f64> MeasureLosses for Formula<F> {
    fn passes(&self) -> u64 {
        1
    }

    fn losses(&mut self, removed: &[usize], candidates: &[usize], _: &Progress) -> Result<Vec<f64>> {
        self.calls += candidates.len();
        let trial = |layer: &usize| {
            let mut trial = [removed, &[*layer]].concat();
            trial.sort_unstable();
            (self.loss)(&trial)
        };
        Ok(candidates.iter().map(trial).collect())
    }
}

/// The sum of the layers' costs, plus 1 when both 1 and 2 are removed.
fn costs(removed: &[usize]) -> f64 {
    let costs = [0.9, 0.1, 0.2, 0.5, 0.3, 0.9, 0.9, 0.9, 0.9, 0.0];
    let both = removed.contains(&1) && removed.contains(&2);
    removed.iter().map(|&layer| costs[layer]).sum::<f64>() + if both { 1.0 } else { 0.0 }
}

#[test]
fn sleb_measures_losses_again_after_each_removal() {
    let similarities = Similarities::new();
    let mut measure = Formula { loss: costs, calls: 0 };
    let mut asked = SelectionRequest { measure: Some(&mut measure), ..request(&similarities, 2) };
    let groups = Strategy::named("sleb").unwrap().select(&mut asked).unwrap();
    assert_eq!(shape(&groups), vec![(vec![1], vec![2], None), (vec![4], vec![5], None)]);
    assert_eq!(groups[1].score, Some(0.4));
    assert_eq!(measure.calls, 9 + 8);
}

/// Costs ascend as 1 (0.1), 2 (0.2), 4 (0.3), 3 (0.5). Dropping 1 excludes its neighbours 0 and 2;
/// dropping 4 excludes 3 and 5.
#[test]
fn interlace_loss_keeps_the_neighbours_of_dropped_layers() {
    let similarities = Similarities::new();
    let mut measure = Formula { loss: costs, calls: 0 };
    let mut asked = SelectionRequest { measure: Some(&mut measure), ..request(&similarities, 3) };
    let groups = Strategy::named("interlace-loss").unwrap().select(&mut asked).unwrap();
    // 6, 7 and 8 have equal costs, so the lower index is dropped. The finetuned layers are on the sides
    // that leave room for anchors.
    let want = vec![(vec![1], vec![0], Some(2)), (vec![4], vec![3], Some(5)), (vec![6], vec![7], Some(8))];
    assert_eq!(shape(&groups), want);
    assert_eq!(groups[1].score, Some(0.4));
    assert_eq!(measure.calls, 9 + 6 + 3);
}

/// Seven dropped layers fit into fifteen only as adjacent pairs with one layer left, so no choice may waste a layer.
#[test]
fn interlace_loss_leaves_room_for_the_remaining_drops() {
    let similarities = Similarities::new();
    let mut measure =
        Formula { loss: |removed: &[usize]| removed.iter().map(|&x| (x as f64 - 7.2).abs()).sum(), calls: 0 };
    let asked = request(&similarities, 7);
    let mut asked = SelectionRequest { num_layers: 16, measure: Some(&mut measure), ..asked };
    let groups = Strategy::named("interlace-loss").unwrap().select(&mut asked).unwrap();
    assert_eq!(groups.len(), 7);
    let mut measure = Formula { loss: costs, calls: 0 };
    let mut asked = SelectionRequest { num_layers: 10, measure: Some(&mut measure), ..request(&similarities, 5) };
    let error = Strategy::named("interlace-loss").unwrap().select(&mut asked).unwrap_err().to_string();
    assert!(error.contains("4 at most") && measure.calls == 0, "{error}");
}

#[test]
fn sleb_without_data_is_an_error() {
    assert!(select("sleb", 2).unwrap_err().to_string().contains("--data"));
}

#[test]
fn explicit_drops_the_named_layers_and_finetunes_their_neighbours() {
    let similarities = Similarities::new();
    let mut request = request(&similarities, 3);
    request.layers = &[8, 2, 3];
    let groups = Strategy::named("explicit").unwrap().select(&mut request).unwrap();
    assert_eq!(shape(&groups), vec![(vec![2], vec![4], None), (vec![3], vec![5], None), (vec![8], vec![7], None)]);
}

#[test]
fn invalid_layer_lists_are_refused() {
    use crate::method::check_layers;
    assert_eq!(check_layers(&[5, 2], 10).unwrap(), vec![2, 5]);
    let cases: [(&[usize], &str); 4] = [
        (&[], "list of layers: is empty; name at least one layer"),
        (&[2, 2], "layer 2: is named twice; name each layer once"),
        (&[10], "layer 10: the model has 10 layers, 0 to 9; name layers that exist; `interlace inspect` lists them"),
        (
            &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            "list of layers: names all 10 layers, at least one must stay; name fewer layers",
        ),
    ];
    for (layers, want) in cases {
        assert_eq!(check_layers(layers, 10).unwrap_err().to_string(), want);
    }
}

#[test]
fn drop_counts_are_floored_without_rounding_error() {
    let cases = [(0.25, 16, 4), (0.25, 18, 4), (0.3, 10, 3), (0.1, 30, 3), (0.25, 36, 9), (0.99, 4, 3)];
    for (ratio, layers, want) in cases {
        assert_eq!(drop_count(ratio, layers).unwrap(), want, "{ratio} of {layers}");
    }
    let range = "must be between 0 and 1, both excluded";
    for (bad, want) in [
        (0.0, range),
        (1.0, range),
        (-0.5, range),
        (f64::NAN, range),
        (0.05, "of 16 layers is less than one layer, the least is 0.0625"),
    ] {
        let error = drop_count(bad, 16).unwrap_err().to_string();
        assert!(error.starts_with(&format!("drop ratio {bad}: {want}")), "{error}");
    }
}

#[test]
fn the_error_for_an_unknown_strategy_lists_the_known_ones() {
    let error = Strategy::named("magic").err().unwrap().to_string();
    assert!(STRATEGIES.iter().all(|strategy| error.contains(strategy.name)), "{error}");
}

#[test]
fn dropping_no_layers_or_too_many_layers_is_an_error() {
    assert!(select("interlace", 0).unwrap_err().to_string().starts_with("number of layers to drop: is 0"));
    assert!(select("random", 10).unwrap_err().to_string().contains("9 at most"));
}

/// Similarities of a network of 4 to 40 layers, and a number of layers to drop.
fn networks() -> impl Values<Value = (usize, usize, Similarities)> {
    (4usize..40).prop_flat_map(|layers| {
        let packs = (1..=layers).map(|size| prop::collection::vec(-1.0f64..1.0, layers.saturating_sub(size)));
        let similarities = packs
            .collect::<Vec<_>>()
            .prop_map(|packs| packs.into_iter().enumerate().map(|(index, pack)| (index + 1, pack)).collect());
        (Just(layers), 1..layers, similarities)
    })
}

proptest! {
    #[test]
    fn every_strategy_is_deterministic_and_gives_a_valid_plan((num_layers, count, similarities) in networks(), seed in any::<u64>()) {
        for strategy in STRATEGIES {
            let run = || {
                let loss = |removed: &[usize]| removed.iter().map(|&layer| (layer as f64).sin()).sum();
                let mut measure = Formula { loss, calls: 0 };
                let named: Vec<usize> = (0..count).map(|index| (index * 7 + seed as usize % 7) % num_layers).collect();
                let mut request = SelectionRequest {
                    num_layers, count, include_last: false, as_released: false, beyond_structure: false, refusal: &all_may_go, similarities: &similarities, seed,
                    layers: &named, measure: Some(&mut measure),
                };
                strategy.select(&mut request).ok()
            };
            let groups = run();
            prop_assert_eq!(&groups, &run(), "{} is not deterministic", strategy.name);
            let Some(groups) = groups else { continue };
            let drop: Vec<usize> = groups.iter().flat_map(|group| group.drop.clone()).collect();
            prop_assert_eq!(drop.len(), count, "{}", strategy.name);
            // `Plan::new` rejects a layer with two roles or outside the model.
            let head = crate::base::Provenance::new(1, BTreeMap::new(), &()).unwrap();
            let plan = crate::method::Plan::new(head, strategy.name, strategy.drops, num_layers, groups.clone()).unwrap();
            prop_assert_eq!(plan.drop.len(), count);
            prop_assert!(strategy.name == "explicit" || !drop.contains(&(num_layers - 1)), "{}", strategy.name);
            prop_assert!(!plan.finetune.contains(&(num_layers - 1)), "{}", strategy.name);
            if strategy.name.starts_with("interlace") {
                for group in &groups {
                    prop_assert_eq!(group.drop[0].abs_diff(group.finetune[0]), 1);
                    prop_assert!(group.anchor.is_none_or(|anchor| anchor == group.drop[0].max(group.finetune[0]) + 1));
                }
            }
        }
    }

    #[test]
    fn indices_in_the_pruned_model_skip_the_dropped_layers((num_layers, count, similarities) in networks()) {
        let mut request = SelectionRequest {
            num_layers, count, include_last: false, as_released: false, beyond_structure: false, refusal: &all_may_go, similarities: &similarities, seed: 1,
            layers: &[], measure: None,
        };
        if let Ok(groups) = Strategy::named("random").unwrap().select(&mut request) {
            let head = crate::base::Provenance::new(1, BTreeMap::new(), &()).unwrap();
            let plan = crate::method::Plan::new(head, "random", crate::method::Part::Layer, num_layers, groups).unwrap();
            let kept: Vec<usize> = (0..num_layers).filter(|layer| !plan.drop.contains(layer)).collect();
            let back: Vec<usize> = plan.finetune_pruned.iter().map(|&index| kept[index]).collect();
            prop_assert_eq!(back, plan.finetune);
        }
    }
}
