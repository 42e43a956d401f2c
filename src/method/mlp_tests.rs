//! Graphs without MLPs against graphs whose MLPs have weights of 0, and the losses that are measured without MLPs.

use ndarray::Array2;

use super::heal_tests::graphs;
use super::loss::LossMeter;
use super::loss_tests::{HEAD_DIM, conversations_again, conversations_of, loss_of};
use super::switched::{Switched, open};
use crate::analysis::{self, Analysis};
use crate::base::{Cancel, Device};
use crate::rewrite::{check_fold, drop_layers, drop_mlps, fold_map, with_weights};
use crate::runtime::Runtime;

#[test]
fn a_dropped_mlp_is_one_with_weights_of_zero() {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let (mut same, mut refused) = (0, 0);
    for (file, analysis) in graphs(&runtime) {
        let parts = match analysis::sublayers(&analysis) {
            Ok(parts) => parts,
            Err(error) => {
                assert!(
                    analysis.merged.is_some() && error.to_string().contains("attention and MLP"),
                    "{file}: {error}"
                );
                refused += 1;
                continue;
            }
        };
        if parts.mlps.iter().any(Result::is_err) || check_fold(&analysis, 1).is_err() {
            let error = drop_mlps(&analysis, &[1]);
            assert!(error.is_ok() || error.unwrap_err().to_string().contains("the MLP of layer 1"), "{file}");
            refused += 1;
            continue;
        }
        let (decoder, restarts) = open(&runtime, &analysis, HEAD_DIM, None).unwrap();
        let conversations = conversations_of(&decoder, &[7, 5, 7]);
        let plain = loss_of(&runtime, &drop_layers(&analysis, &[]).unwrap(), &conversations);
        let removed = [1, 4];
        let mut zero = drop_layers(&analysis, &[]).unwrap();
        for layer in removed {
            // Some graphs do not declare the width of their stream.
            let zeroed = |width: usize| fold_map(&analysis, layer, &(Array2::<f32>::eye(width) * -1.0)).ok();
            let weights = [16, 32, 48, 64, 128].into_iter().find_map(zeroed).expect("the width of the stream");
            zero = with_weights(&zero, &weights).unwrap();
        }
        let want = loss_of(&runtime, &zero, &conversations);
        assert!((want - plain).abs() > 1e-4, "{file}: the MLPs change nothing");
        let model = drop_mlps(&analysis, &removed).unwrap();
        let found = loss_of(&runtime, &model, &conversations);
        assert!((found - want).abs() < 1e-5, "{file}: {found}, expected {want}");
        // The layers are found again, without weights of an MLP.
        let again = analysis::analyse(&model).unwrap();
        assert_eq!(again.map.layers.len(), analysis.map.layers.len(), "{file}");
        let size = |analysis: &Analysis| analysis.map.layers[4].parameters(&analysis.model.graph.body);
        assert!(size(&again) < size(&analysis) && size(&again) > 0, "{file}");
        assert!(drop_mlps(&again, &[4]).unwrap_err().to_string().contains("the MLP of layer 4"), "{file}");

        let places: Vec<usize> = removed.iter().map(|&layer| *parts.mlps[layer].as_ref().unwrap()).collect();
        let cut = Analysis { map: parts.map.clone(), ..analysis.clone() };
        let (decoder, _) = open(&runtime, &cut, HEAD_DIM, None).unwrap();
        let switched = Switched::new(decoder, parts.map.layers.len(), file.clone(), restarts, Cancel::default());
        let mut meter = LossMeter::over(switched, conversations_again(&conversations)).unwrap();
        let measured = meter.loss(&places).unwrap();
        assert!((measured - want).abs() < 1e-5, "{file}: {measured}, expected {want}");
        same += 1;
    }
    assert!(same >= 8, "{same} graphs, {refused} refused");
}
