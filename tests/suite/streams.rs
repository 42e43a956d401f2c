//! Networks with an unusual residual stream: pruned graphs compared with the same pruned networks in PyTorch.
//!
//! `fixtures/streams` holds each graph, without names except for its inputs and outputs, and an npz: inputs as
//! `in.NAME`, and for each set of deleted layers `drop_A_B.OUTPUT`. `scripts/zoo/streams.py` creates them.

use std::collections::HashMap;
use std::path::Path;

use interlace::analysis::{Analysis, analyse};
use interlace::base::Device;
use interlace::ir::{DataType, Model};
use interlace::onnx;
use interlace::rewrite::{KEEP_INPUT, LOSS_OUTPUT, ROWS_INPUT, TARGETS_INPUT, bypass_layers, drop_layers};
use interlace::runtime::{Runtime, SessionOptions, TensorValue};

use super::cli::{interlace, stderr, stdout};

type Arrays = HashMap<String, tch::Tensor>;

pub fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/streams")
}

pub fn network(name: &str) -> (Analysis, Arrays) {
    let model = onnx::load(&folder().join(format!("{name}.onnx"))).unwrap();
    let arrays = tch::Tensor::read_npz(folder().join(format!("{name}.npz"))).unwrap();
    let analysis = analyse(&model).unwrap_or_else(|error| panic!("{name}: {error}"));
    (analysis, arrays.into_iter().collect())
}

pub fn fed(tensor: &tch::Tensor, dtype: DataType) -> TensorValue {
    let shape: Vec<usize> = tensor.size().iter().map(|&dim| dim as usize).collect();
    let flat = tensor.contiguous().view([-1]);
    match dtype {
        DataType::Float => TensorValue::from_f32(dtype, &shape, Vec::<f32>::try_from(flat).unwrap()).unwrap(),
        _ => TensorValue::from_i64(dtype, &shape, Vec::<i64>::try_from(flat).unwrap()).unwrap(),
    }
}

/// Runs the model on the recorded inputs and compares every output of `prefix` to 1e-4.
fn check_outputs(name: &str, model: &Model, arrays: &Arrays, prefix: &str) {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let mut session = runtime.session_of(model, &SessionOptions::default()).unwrap();
    let ports = session.inputs().to_vec();
    let feeds: Vec<(String, TensorValue)> = ports
        .into_iter()
        .map(|port| (port.name.clone(), fed(&arrays[&format!("in.{}", port.name)], port.dtype)))
        .collect();
    let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let outputs = session.run(&feeds, None).unwrap();
    let start = format!("{prefix}.");
    let mut want: Vec<&str> = arrays.keys().filter_map(|key| key.strip_prefix(&start)).collect();
    let mut found: Vec<&str> = outputs.iter().map(|(name, _)| name).collect();
    want.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, want, "{name} {prefix}");
    for (output, tensor) in outputs.iter() {
        let expected = &arrays[&format!("{start}{output}")];
        let found = tch::Tensor::from_slice(&tensor.to_f32().unwrap()).reshape(expected.size());
        let far = (found - expected).abs().max().double_value(&[]);
        assert!(far <= 1e-4, "{name} {prefix}: `{output}` differs by {far:e}");
    }
}

/// Compares every recorded set of deleted layers.
fn compare(name: &str, layers: usize) -> Analysis {
    let (analysis, arrays) = network(name);
    assert_eq!(analysis.map.layers.len(), layers, "{name}");
    let mut prefixes: Vec<&str> = arrays.keys().filter_map(|key| key.split('.').next()).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let mut compared = 0;
    for prefix in prefixes {
        let drop: Vec<usize> = match prefix.strip_prefix("drop_") {
            Some(list) => list.split('_').map(|layer| layer.parse().unwrap()).collect(),
            None if prefix == "nodrop" => Vec::new(),
            None => continue,
        };
        let pruned = drop_layers(&analysis, &drop).unwrap_or_else(|error| panic!("{name} {prefix}: {error}"));
        check_outputs(name, &pruned, &arrays, prefix);
        // A single layer has no repetition, so it is not found.
        if layers - drop.len() > 1 {
            let found = analyse(&pruned).unwrap_or_else(|error| panic!("{name} {prefix}: {error}"));
            assert_eq!(found.map.layers.len(), layers - drop.len(), "{name} {prefix}");
        }
        compared += 1;
    }
    assert!(compared >= 3, "{name}: {compared}");
    analysis
}

fn kinds(analysis: &Analysis) -> Vec<&str> {
    analysis.map.layers.iter().map(|layer| layer.kind.as_str()).collect()
}

#[test]
fn a_norm_after_the_residual_sum_is_dropped_with_its_layer() {
    for name in ["opt", "bert"] {
        let analysis = compare(name, 4);
        assert!(analysis.map.glue.is_empty(), "{name}: {:?}", analysis.map.glue);
        // A layer has the weights and biases of two norms and of six projections.
        let counts: Vec<usize> = analysis.map.layers.iter().map(|layer| layer.weights.len()).collect();
        assert!(counts.iter().all(|&count| count >= 16), "{name}: {counts:?}");
    }
}

#[test]
fn cross_attention_layers_have_a_kind_of_their_own() {
    let analysis = compare("mllama", 6);
    let (own, cross) = ("attention + mlp", "cross-attention + mlp");
    assert_eq!(kinds(&analysis), [own, own, cross, own, cross, own]);
    // The input of the other sequence is removed with the last layer that reads it.
    let input = |model: &Model| model.graph.input("cross_attention_states").is_some();
    assert!(input(&drop_layers(&analysis, &[2]).unwrap()));
    assert!(!input(&drop_layers(&analysis, &[2, 4]).unwrap()));
}

#[test]
fn layers_that_share_keys_and_scale_the_stream_are_found() {
    // The layers of Gemma 3n predict all of their streams before the attention.
    for (name, kind) in [("gemma4", "attention + mlp"), ("gemma3n", "mlp + attention + mlp")] {
        let analysis = compare(name, 6);
        assert!(kinds(&analysis).iter().all(|found| *found == kind), "{:?}", kinds(&analysis));
        assert!(analysis.map.glue.is_empty(), "{:?}", analysis.map.glue);
        producers_stay(&analysis);
    }
}

/// Layers 2 and 3 compute the keys that 4 and 5 read.
fn producers_stay(analysis: &Analysis) {
    for (producer, reader) in [(2, 4), (3, 5)] {
        let message = drop_layers(analysis, &[producer]).unwrap_err().to_string();
        assert!(
            message.contains(&format!("layer {producer}:")) && message.contains(&format!("layer {reader}")),
            "{message}"
        );
        drop_layers(analysis, &[producer, reader]).unwrap();
    }
}

#[test]
fn a_full_list_of_hidden_states_matches_the_smaller_network() {
    let analysis = compare("llama_states", 4);
    let graph = &analysis.model.graph;
    let taps: Vec<(&str, &[usize])> =
        analysis.map.taps.iter().map(|tap| (graph.name(tap.output), tap.places.as_slice())).collect();
    let names: Vec<String> = (0..5).map(|number| format!("hidden_states.{number}")).collect();
    let want: Vec<(&str, Vec<usize>)> =
        names.iter().enumerate().map(|(place, name)| (name.as_str(), vec![place])).collect();
    assert_eq!(taps, want.iter().map(|(name, places)| (*name, places.as_slice())).collect::<Vec<_>>());
    assert!(analysis.map.layers.iter().all(|layer| layer.ports.is_empty()));
}

/// A graph with a vision tower and a language model of the same width: each is pruned separately.
#[test]
fn two_towers_in_one_graph_are_pruned_separately() {
    let analysis = compare("llava", 3);
    let vision = analysis.clone().into_vision().expect("a vision tower");
    assert_eq!(vision.map.layers.len(), 4);
    let (_, arrays) = network("llava");
    for (drop, prefix) in [(vec![1], "vision_drop_1"), (vec![0, 3], "vision_drop_0_3")] {
        let pruned = drop_layers(&vision, &drop).unwrap();
        check_outputs("llava", &pruned, &arrays, prefix);
        let found = analyse(&pruned).unwrap();
        assert_eq!(found.map.layers.len(), 3, "{prefix}");
        assert_eq!(found.vision.map(|map| map.layers.len()), Some(4 - drop.len()), "{prefix}");
    }
}

/// Outputs that tap the stream: name, places, and layers whose inside they show.
fn taps(analysis: &Analysis) -> Vec<(&str, &[usize], &[usize])> {
    let graph = &analysis.model.graph;
    analysis.map.taps.iter().map(|tap| (graph.name(tap.output), &tap.places[..], &tap.inside[..])).collect()
}

#[test]
fn taps_are_found_with_their_places_in_the_stream() {
    let analysis = compare("llama_taps", 4);
    let want: [(&str, &[usize], &[usize]); 5] = [
        ("last_hidden_state", &[4], &[]),
        ("aux_hidden_states", &[1, 2, 4], &[]),
        ("hidden_states_1", &[1], &[]),
        ("hidden_states_3", &[3], &[]),
        ("attentions.2", &[], &[2]),
    ];
    assert_eq!(taps(&analysis), want);
    assert!(analysis.map.layers.iter().all(|layer| layer.ports.is_empty()));
    let message = drop_layers(&analysis, &[2]).unwrap_err().to_string();
    assert!(message.contains("layer 2") && message.contains("output `attentions.2`"), "{message}");

    let analysis = compare("clip_taps", 4);
    assert_eq!(taps(&analysis), [("hidden_states_1", &[1][..], &[][..]), ("hidden_states_3", &[3], &[])]);
}

#[test]
fn taps_and_both_towers_are_printed_and_pruned_by_name() {
    let graph = |name: &str| folder().join(format!("{name}.onnx")).to_str().unwrap().to_string();
    let work = tempfile::tempdir().unwrap();
    let shown = interlace(work.path(), &["inspect", &graph("llama_taps"), "-q"]);
    let text = stdout(&shown);
    for line in [
        "output aux_hidden_states taps the stream before layers 1-2 and the stream behind the last layer",
        "output hidden_states_3 taps the stream before layer 3",
        "output attentions.2 taps the inside of layer 2",
    ] {
        assert!(text.contains(line), "{text}{}", stderr(&shown));
    }
    let shown = interlace(work.path(), &["inspect", &graph("llama_taps"), "--json", "-q"]);
    let found: serde_json::Value = serde_json::from_str(&stdout(&shown)).unwrap();
    assert_eq!(found["taps"][1]["before"], serde_json::json!([1, 2, 4]), "{}", found["taps"]);

    let shown = stdout(&interlace(work.path(), &["inspect", &graph("llava"), "-q"]));
    assert!(shown.contains("decoder: 3 layers") && shown.contains("vision encoder: 4 layers"), "{shown}");
    let (_, arrays) = network("llava");
    for (name, component, drop, prefix) in
        [("vision", "vision_encoder", "0,3", "vision_drop_0_3"), ("text", "decoder", "1", "drop_1")]
    {
        let out = work.path().join(name);
        let arguments =
            ["prune", &graph("llava"), "--component", component, "--drop", drop, "-o", out.to_str().unwrap(), "-q"];
        let output = interlace(work.path(), &arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        check_outputs("llava", &onnx::load(&out.join("llava.onnx")).unwrap(), &arrays, prefix);
    }
    let out = work.path().join("none");
    let output = interlace(
        work.path(),
        &["prune", &graph("opt"), "--component", "vision_encoder", "--drop", "1", "-o", out.to_str().unwrap(), "-q"],
    );
    assert!(stderr(&output).contains("has one tower"), "{}", stderr(&output));
    assert!(!out.exists());
}

/// Layers bypassed by a flag give the losses of the network without them.
#[test]
fn bypassed_layers_give_the_losses_of_deleted_layers() {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    for (name, prefixes) in
        [("opt", ["drop_1", "drop_0_2"]), ("gemma4", ["drop_4", "drop_0_1"]), ("gemma3n", ["drop_1", "drop_0"])]
    {
        let (analysis, arrays) = network(name);
        let bypass = bypass_layers(&analysis).unwrap();
        // These layers read values of other layers beside the stream, so no run can start at a later layer.
        assert!(!bypass.restarts, "{name}");
        let mut session = runtime.session_of(&bypass.model, &SessionOptions::default()).unwrap();
        for prefix in prefixes {
            let drop: Vec<usize> = prefix.split('_').skip(1).map(|layer| layer.parse().unwrap()).collect();
            let logits = arrays[&format!("{prefix}.logits")].squeeze_dim(0);
            let (tokens, vocabulary) = logits.size2().unwrap();
            let targets: Vec<i64> = (0..tokens).map(|token| token % vocabulary).collect();
            let want = -logits.log_softmax(-1, tch::Kind::Float).gather(
                1,
                &tch::Tensor::from_slice(&targets).unsqueeze(1),
                false,
            );
            let kept: Vec<i64> =
                (0..analysis.map.layers.len()).map(|layer| i64::from(!drop.contains(&layer))).collect();
            let rows: Vec<i64> = (0..tokens).flat_map(|token| [0, token]).collect();
            let integers = |dtype, shape: &[usize], values| TensorValue::from_i64(dtype, shape, values).unwrap();
            let feeds: Vec<(String, TensorValue)> = session
                .inputs()
                .iter()
                .map(|port| {
                    let tensor = match port.name.as_str() {
                        KEEP_INPUT => integers(DataType::Bool, &[kept.len()], kept.clone()),
                        ROWS_INPUT => integers(DataType::Int64, &[1, tokens as usize, 2], rows.clone()),
                        TARGETS_INPUT => integers(DataType::Int64, &[1, tokens as usize, 1], targets.clone()),
                        given => fed(&arrays[&format!("in.{given}")], port.dtype),
                    };
                    (port.name.clone(), tensor)
                })
                .collect();
            let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
            let outputs = session.run(&feeds, None).unwrap();
            let found = outputs.get(LOSS_OUTPUT).unwrap().to_f32().unwrap();
            let far = (tch::Tensor::from_slice(&found) - want.view([-1])).abs().max().double_value(&[]);
            assert!(far <= 1e-4, "{name} {prefix}: {far:e}");
        }
    }
}
