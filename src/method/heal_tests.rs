//! Maps in the measured graph against maps folded into the weights of graphs whose layers were removed.

use std::collections::BTreeMap;

use ndarray::Array2;

use super::compensation::{CompensationKind, GapChange};
use super::heal::HealMeter;
use super::loss::LossMeter;
use super::loss_tests::{HEAD_DIM, conversations_again, conversations_of, fixtures, loss_of, noise};
use super::switched::{Maps, Switched, open};
use crate::analysis::{self, Analysis};
use crate::base::{Cancel, Device, Error};
use crate::onnx;
use crate::rewrite::{MapOf, check_fold, drop_layers, fold_map, with_weights};
use crate::runtime::{Decoder, Runtime, SessionOptions, TensorValue};

/// Float32 graphs of the zoo that run by themselves.
pub fn graphs(runtime: &Runtime) -> Vec<(String, Analysis)> {
    let table = std::fs::read_to_string(fixtures().join("zoo/cases.tsv")).unwrap();
    let files = table.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let exact = files.filter(|fields| fields.get(2).is_none_or(|tolerance| *tolerance == "1e-4"));
    exact
        .filter_map(|fields| {
            let file = fields[0];
            let analysis = analysis::analyse(&onnx::load(&fixtures().join("zoo").join(file)).unwrap()).unwrap();
            let whole = drop_layers(&analysis, &[]).unwrap();
            let session = runtime.session_of(&whole, &SessionOptions::default()).unwrap();
            Decoder::new(session, HEAD_DIM).ok().map(|_| (file.to_string(), analysis))
        })
        .collect()
}

/// The graph without layers, with maps in its weights.
fn folded(
    analysis: &Analysis,
    removed: &[usize],
    changes: &BTreeMap<usize, Array2<f32>>,
) -> Result<crate::ir::Model, Error> {
    let mut model = drop_layers(analysis, removed)?;
    for (&layer, change) in changes {
        model = with_weights(&model, &fold_map(analysis, layer, change)?)?;
    }
    Ok(model)
}

/// Any map, not only a fitted one.
#[test]
fn a_map_beside_a_layer_is_the_map_in_its_weights() {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let mut same = 0;
    for (file, analysis) in graphs(&runtime) {
        let (decoder, restarts) = open(&runtime, &analysis, HEAD_DIM, Some(MapOf::Added)).unwrap();
        let conversations = conversations_of(&decoder, &[7, 5, 7]);
        let layers = analysis.map.layers.len();
        let switched = Switched::new(decoder, layers, file.clone(), restarts, Cancel::default());
        let mut meter = LossMeter::over(switched, conversations_again(&conversations)).unwrap();
        let width = meter.stream_width().unwrap();
        let change = |seed| {
            let values = noise(width * width, seed).into_iter().map(|value| 0.1 * value).collect();
            Array2::from_shape_vec((width, width), values).unwrap()
        };
        let changes = BTreeMap::from([(1, change(1)), (4, change(2))]);
        let plain = meter.loss(&[2, 5]).unwrap();
        let maps: Maps = changes
            .iter()
            .map(|(&layer, map)| (layer, TensorValue::new(&[width, width], map.iter().copied().collect()).unwrap()))
            .collect();
        let found = meter.loss_with(&[2, 5], &maps).unwrap();
        let want = loss_of(&runtime, &drop_layers(&analysis, &[2, 5]).unwrap(), &conversations);
        assert!((plain - want).abs() < 1e-5, "{file}: {plain}, expected {want}");
        same += 1;
        let want = loss_of(&runtime, &folded(&analysis, &[2, 5], &changes).unwrap(), &conversations);
        assert!((found - want).abs() < 3e-5, "{file}: {found}, expected {want}");
        assert!((found - plain).abs() > 1e-4, "{file}: the maps change nothing");
    }
    assert!(same >= 10, "{same} graphs");
}

/// Packed weights, and a layer whose output is no sum with products.
#[test]
fn maps_are_refused_where_no_weight_can_take_them() {
    for (file, want) in
        [("genai/qwen3_vl-int4-embeds/model.onnx", "MatMulNBits"), ("../streams/gemma4.onnx", "its output is")]
    {
        let analysis = analysis::analyse(&onnx::load(&fixtures().join("zoo").join(file)).unwrap()).unwrap();
        let error = check_fold(&analysis, 2).unwrap_err().to_string();
        assert!(error.contains("layer 2") && error.contains("cannot be folded") && error.contains(want), "{error}");
    }
}

/// The fit of the measured graph, folded into weights, gives the measured loss; it brings the stream closer to the dense
/// model's on conversations that it was not fitted on.
#[test]
fn a_fit_is_what_it_was_measured_as() {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let (mut same, mut fitted) = (0, 0);
    for (file, analysis) in graphs(&runtime) {
        let (decoder, restarts) = open(&runtime, &analysis, HEAD_DIM, Some(MapOf::Added)).unwrap();
        let conversations = conversations_of(&decoder, &[7, 5, 7]);
        let for_fits = conversations_of(&decoder, &[23; 24]);
        let layers = analysis.map.layers.len();
        let switched = Switched::new(decoder, layers, file.clone(), restarts, Cancel::default());
        let meter = LossMeter::over(switched, conversations_again(&conversations)).unwrap();
        let mut meter = HealMeter::over(meter, for_fits, (CompensationKind::Linear, 1)).unwrap();
        assert_eq!(meter.fit_tokens(), 24 * 23);
        for removed in [&[3][..], &[2, 4, 5], &[0]] {
            let (found, compensation) = meter.loss(removed).unwrap();
            let before: Vec<usize> = compensation.changes.keys().copied().collect();
            assert!(
                before.iter().all(|layer| removed.contains(&(layer + 1)) && !removed.contains(layer)),
                "{before:?}"
            );
            fitted += before.len();
            same += 1;
            let changes = compensation.changes.into_iter().map(|(layer, change)| match change {
                GapChange::Fold(map) => (layer, map),
                other => panic!("{other:?}"),
            });
            let want = loss_of(&runtime, &folded(&analysis, removed, &changes.collect()).unwrap(), &conversations);
            assert!((found - want).abs() < 1e-4, "{file} without {removed:?}: {found}, expected {want}");
        }
    }
    assert!(same >= 30 && fitted >= 12, "{same} losses, {fitted} fits");
}
