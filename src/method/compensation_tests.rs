//! Closed forms against numpy, and graphs with added nodes against the maps that were measured.

use ndarray::{Array2, array};

use super::compensation::*;
use super::heal::HealMeter;
use super::heal_tests::graphs;
use super::loss::LossMeter;
use super::loss_tests::{HEAD_DIM, conversations_again, conversations_of, loss_of};
use super::switched::{Switched, open};
use crate::analysis;
use crate::base::{Cancel, Device};
use crate::rewrite::{Behind, change_behind, drop_layers};
use crate::runtime::Runtime;

/// `((7 i + 3 j + i j + k i^2) mod 11) / 10 - 0.5`.
fn pattern(rows: usize, k: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, 4), |(i, j)| ((7 * i + 3 * j + i * j + k * i * i) % 11) as f32 / 10.0 - 0.5)
}

/// The rows `from..to` of a stream and of a dense one, as sequences of ten.
fn rows(from: usize, to: usize) -> GapRows {
    let read = pattern(40, 1);
    let target = pattern(40, 2) * 1.5 + &(&read * 0.3) + 0.1;
    let part = |of: &Array2<f32>| of.slice(ndarray::s![from..to, ..]).to_owned();
    GapRows { read: part(&read), rest: part(&(&target - &read)), target: part(&target), sequences: (to - from) / 10 }
}

fn solved(kind: CompensationKind, rank: usize) -> GapChange {
    let mut fit = (CompensationRow::of_kind(kind).fit)(4, rank);
    fit.add(rows(0, 30), false);
    fit.add(rows(30, 40), true);
    fit.solve().unwrap().expect("a solution")
}

fn assert_near(found: &Array2<f32>, want: &Array2<f32>) {
    let worst = (found - want).iter().fold(0.0f32, |worst, value| worst.max(value.abs()));
    assert!(worst < 2e-5, "{worst}: {found}");
}

#[test]
fn rows_of_the_table_are_in_the_order_of_their_kinds() {
    for row in COMPENSATIONS {
        assert_eq!(CompensationRow::of_kind(row.kind).name, row.name);
        assert_eq!(CompensationRow::named(row.name).unwrap().kind, row.kind);
        assert_eq!(serde_json::to_value(row.kind).unwrap(), row.name);
    }
}

/// Values by numpy: `(abs(target).mean(1) / abs(read).mean(1)).mean()` over 4 sequences of 10 tokens.
#[test]
fn the_scalar_is_numpys_mean_ratio_of_magnitudes() {
    let GapChange::Scale(factor) = solved(CompensationKind::Scalar, 1) else { panic!("no factor") };
    assert!((factor - 1.477_930_560).abs() < 1e-6, "{factor}");
}

/// Values by numpy: `linalg.solve`, `linalg.eigh` of `D^T B`, the ridge of 0.1 by the rows held out.
#[test]
fn bridges_are_numpys_reduced_rank_regressions() {
    let full = array![
        [-0.539149f32, 0.060076, -0.248937, -0.7025],
        [-0.219973, -0.683606, -0.559533, -0.704551],
        [0.150429, -0.146146, -0.691042, 0.610491],
        [0.409306, -0.558563, 0.073648, -0.235787]
    ];
    let two = array![
        [-0.526296f32, 0.036706, -0.49793, -0.435026],
        [-0.179125, -0.66093, -0.647245, -0.65166],
        [0.06327, -0.129037, -0.028557, -0.040899],
        [0.390268, -0.58895, -0.029298, -0.097486]
    ];
    let one = array![
        [-0.147418f32, -0.331344, -0.381845, -0.377327],
        [-0.259371, -0.582977, -0.671831, -0.663881],
        [-0.020992, -0.047183, -0.054374, -0.053731],
        [-0.065185, -0.146514, -0.168845, -0.166847]
    ];
    for (rank, want) in [(1, one), (2, two), (4, full.clone()), (9, full.clone())] {
        let change = solved(CompensationKind::Bridge, rank);
        assert_near(&change.map(4), &want);
        assert_eq!(change.parameters(), 2 * 4 * rank.min(4) as u64);
    }
    let GapChange::Fold(map) = solved(CompensationKind::Linear, 1) else { panic!("no map") };
    assert_near(&map, &full);
}

/// What was measured in the graph with switches is what the pruned graph with added nodes computes, and its layers are found
/// again: a bridge is part of the layer before it.
#[test]
fn added_nodes_compute_what_was_measured() {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let (mut same, mut changed) = (0, 0);
    for (file, analysis) in graphs(&runtime) {
        for kind in [CompensationKind::Scalar, CompensationKind::Bridge] {
            let of = CompensationRow::of_kind(kind).of;
            let (decoder, restarts) = open(&runtime, &analysis, HEAD_DIM, Some(of)).unwrap();
            let conversations = conversations_of(&decoder, &[7, 5, 7]);
            let for_fits = conversations_of(&decoder, &[23; 8]);
            let layers = analysis.map.layers.len();
            let switched = Switched::new(decoder, layers, file.clone(), restarts, Cancel::default());
            let meter = LossMeter::over(switched, conversations_again(&conversations)).unwrap();
            let mut meter = HealMeter::over(meter, for_fits, (kind, 3)).unwrap();
            let removed = [2, 4, 5];
            let (found, compensation) = meter.loss(&removed).unwrap();
            let now = |layer: usize| layer - removed.iter().filter(|gone| **gone < layer).count();
            let changes = compensation.changes.iter().map(|(&layer, change)| {
                let behind = match change {
                    GapChange::Scale(factor) => Behind::Scale(*factor),
                    GapChange::Bridge { down, up } => Behind::Bridge { down, up },
                    GapChange::Fold(_) => panic!("a folded map"),
                };
                (now(layer), behind)
            });
            let changes: Vec<(usize, Behind)> = changes.collect();
            let pruned = drop_layers(&analysis, &removed).unwrap();
            if analysis.merged.is_some() {
                let error = change_behind(&pruned, &[(1, Behind::Scale(2.0))]).unwrap_err().to_string();
                assert!(error.contains("two branches"), "{error}");
                continue;
            }
            let model = change_behind(&pruned, &changes).unwrap();
            let want = loss_of(&runtime, &model, &conversations);
            assert!((found - want).abs() < 1e-4, "{file}, {kind:?}: {found}, expected {want}");
            let again = analysis::analyse(&model).unwrap();
            let plain = analysis::analyse(&pruned).unwrap();
            assert_eq!(again.map.layers.len(), plain.map.layers.len(), "{file}, {kind:?}");
            let size = |analysis: &analysis::Analysis, layer: usize| {
                analysis.map.layers[layer].parameters(&analysis.model.graph.body)
            };
            for ((layer, _), change) in changes.iter().zip(compensation.changes.values()) {
                let more = if kind == CompensationKind::Bridge { change.parameters() } else { 0 };
                assert_eq!(size(&again, *layer), size(&plain, *layer) + more, "{file}, layer {layer}");
            }
            same += 1;
            changed += changes.len();
        }
    }
    assert!(same >= 20 && changed >= 8, "{same} losses, {changed} changes");
}
