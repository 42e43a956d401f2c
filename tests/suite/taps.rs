//! Outputs that show the residual stream, and layers that cannot be dropped: renamed, moved or refused, with a message.

use std::path::Path;

use interlace::analysis::{Analysis, analyse};
use interlace::base::Device;
use interlace::bundle::{Bundle, Record, RecordedStep, Tower};
use interlace::ir::{Graph, Model, Node, Tensor as Weight, Value, ValueId};
use interlace::onnx::{self, Storage};
use interlace::pipeline::steps::{self, Drop, HowMany, PlanSettings, PlannedModel};
use interlace::rewrite::{drop_layers, tap_changes};
use interlace::runtime::{Runtime, SessionOptions};

use super::cli::{interlace, stderr, stdout};
use super::streams::{fed, folder, network};

fn output(model: &Model, name: &str) -> ValueId {
    *model.graph.body.outputs.iter().find(|id| model.graph.name(**id) == name).unwrap()
}

/// The network with the logits and the streams at these places as outputs, under these names.
fn showing(outputs: &[(usize, &str)]) -> Model {
    let mut model = onnx::load(&folder().join("llama_states.onnx")).unwrap();
    let shown: Vec<ValueId> =
        outputs.iter().map(|(place, _)| output(&model, &format!("hidden_states.{place}"))).collect();
    for number in 0..5 {
        let id = output(&model, &format!("hidden_states.{number}"));
        model.graph.values[id.index()].name = format!("inner_{number}");
    }
    for (id, (_, name)) in shown.iter().zip(outputs) {
        model.graph.values[id.index()].name = name.to_string();
    }
    let body = &mut model.graph.body;
    body.outputs.truncate(1);
    body.outputs.extend(shown);
    model
}

/// Every output except the logits equals the recorded state of this number, with layer 1 of 4 dropped.
fn check_outputs(model: &Model, outputs: &[(&str, usize)]) {
    let (_, arrays) = network("llama_states");
    let mut session = Runtime::new(Device::Cpu).unwrap().session_of(model, &SessionOptions::default()).unwrap();
    let ports = session.inputs().to_vec();
    let feeds: Vec<_> =
        ports.iter().map(|port| (port.name.as_str(), fed(&arrays[&format!("in.{}", port.name)], port.dtype))).collect();
    let feeds: Vec<_> = feeds.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let found = session.run(&feeds, None).unwrap();
    let names: Vec<&str> = found.iter().map(|(name, _)| name).filter(|name| *name != "logits").collect();
    assert_eq!(names, outputs.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for (name, state) in outputs {
        let want = &arrays[&format!("drop_1.hidden_states.{state}")];
        let tensor = tch::Tensor::from_slice(&found.get(name).unwrap().to_f32().unwrap()).reshape(want.size());
        let far = (tensor - want).abs().max().double_value(&[]);
        assert!(far <= 1e-4, "{name}: {far:e}");
    }
}

type Change<'a> = (&'a str, Option<&'a str>, &'a [usize], &'a [usize]);

fn changes(analysis: &Analysis, want: &[Change]) {
    let found = tap_changes(analysis, &[1]);
    let found: Vec<Change> = found
        .iter()
        .map(|tap| (tap.output.as_str(), tap.output_now.as_deref(), &tap.before[..], &tap.before_now[..]))
        .collect();
    assert_eq!(found, want);
}

/// Equal the lists of the network without layer 1 in PyTorch, whose states are 0 to 3.
#[test]
fn lists_with_one_output_per_layer_match_the_smaller_network() {
    let pruned = |outputs: &[(usize, &str)]| drop_layers(&analyse(&showing(outputs)).unwrap(), &[1]).unwrap();
    // Without the embeddings; without the last state; numbered by the layer of the state; in any order.
    check_outputs(&pruned(&[(1, "h.1"), (2, "h.2"), (3, "h.3"), (4, "h.4")]), &[("h.1", 1), ("h.2", 2), ("h.3", 3)]);
    check_outputs(&pruned(&[(0, "h0"), (1, "h1"), (2, "h2"), (3, "h3")]), &[("h0", 0), ("h1", 1), ("h2", 2)]);
    check_outputs(&pruned(&[(1, "b/0"), (2, "b/1"), (3, "b/2"), (4, "b/3")]), &[("b/0", 1), ("b/1", 2), ("b/2", 3)]);
    check_outputs(&pruned(&[(4, "h.4"), (3, "h.3"), (1, "h.1"), (2, "h.2")]), &[("h.3", 3), ("h.2", 2), ("h.1", 1)]);

    // With leading zeros.
    check_outputs(&pruned(&[(0, "h00"), (1, "h01"), (2, "h02"), (3, "h03")]), &[("h00", 0), ("h01", 1), ("h02", 2)]);

    let analysis = analyse(&showing(&[(1, "b/0"), (2, "b/1"), (3, "b/2"), (4, "b/3")])).unwrap();
    let want: [Change; 3] =
        [("b/1", None, &[2], &[]), ("b/2", Some("b/1"), &[3], &[2]), ("b/3", Some("b/2"), &[4], &[3])];
    changes(&analysis, &want);
}

/// States of some places keep their names, and the new places are reported.
#[test]
fn outputs_of_an_incomplete_list_keep_their_names() {
    for names in [["h.1", "h.3"], ["h.2", "h.3"], ["a", "b"]] {
        let places = if names[0] == "h.2" { [2, 3] } else { [1, 3] };
        let analysis = analyse(&showing(&[(places[0], names[0]), (places[1], names[1])])).unwrap();
        let pruned = drop_layers(&analysis, &[1]).unwrap();
        check_outputs(&pruned, &[(names[0], 1), (names[1], 2)]);
        let first: Change = (names[0], Some(names[0]), &[2], &[1]);
        let second: Change = (names[1], Some(names[1]), &[3], &[2]);
        let moved = if places[0] == 2 { vec![first, second] } else { vec![second] };
        changes(&analysis, &moved);
    }
}

#[test]
fn prune_reports_which_outputs_moved() {
    let work = tempfile::tempdir().unwrap();
    let graph = |name: &str, outputs: &[(usize, &str)]| {
        onnx::save(&showing(outputs), &work.path().join(name), &Storage::Inline).unwrap();
    };
    graph("taps.onnx", &[(1, "h_1"), (3, "h_3")]);
    graph("list.onnx", &[(0, "h.0"), (1, "h.1"), (2, "h.2"), (3, "h.3"), (4, "h.4")]);
    for (name, line) in [
        ("taps", "output h_3 keeps its name: the stream before layer 3, which it shows, is now before layer 2\n"),
        ("list", "output h.1 went with its layer\n"),
        ("list", "output h.4 is now h.3\n"),
    ] {
        let _ = std::fs::remove_dir_all(work.path().join("out"));
        let file = format!("{name}.onnx");
        let shown = interlace(work.path(), &["prune", &file, "--drop", "1", "-o", "out", "-q"]);
        assert!(stdout(&shown).contains(line), "{}{}", stdout(&shown), stderr(&shown));
    }
    let _ = std::fs::remove_dir_all(work.path().join("out"));
    let shown = interlace(work.path(), &["prune", "taps.onnx", "--drop", "1", "-o", "out", "-q", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&stdout(&shown)).unwrap();
    let want = serde_json::json!([{"output": "h_3", "output_now": "h_3", "before": [3], "before_now": [2]}]);
    assert_eq!(found["taps"], want);
    let record = std::fs::read(work.path().join("out/interlace.json")).unwrap();
    let record: Record = serde_json::from_slice(&record).unwrap();
    let Some(RecordedStep::Prune { taps, .. }) = record.history.last() else { panic!("no step") };
    assert_eq!(serde_json::to_value(taps).unwrap(), want);
}

/// As in exports of Whisper's encoders: keys and values for each decoder layer, beside the states.
fn with_keys_for_a_decoder(model: &mut Model) {
    let graph = &mut model.graph;
    let states = graph.body.outputs[0];
    let value = |graph: &mut Graph, name: String| graph.add_value(Value { name, ..Value::default() });
    let node = |op: &str, inputs: [ValueId; 2], output: ValueId| Node {
        op_type: op.into(),
        inputs: inputs.map(Some).to_vec(),
        outputs: vec![Some(output)],
        ..Node::default()
    };
    graph.body.outputs.truncate(1);
    for layer in 0..2 {
        let [weight, key] = ["w", "present_key_cross"].map(|name| value(graph, format!("{name}_{layer}")));
        let [made, bias] = ["made", "bias"].map(|name| value(graph, format!("{name}_{layer}")));
        let present = value(graph, format!("present_value_cross_{layer}"));
        graph.body.initializers.push((weight, Weight::from_f32(&[16, 16], &[0.5; 256])));
        graph.body.initializers.push((bias, Weight::from_f32(&[16], &[0.25; 16])));
        graph.body.nodes.push(node("MatMul", [states, weight], key));
        graph.body.nodes.push(node("MatMul", [states, weight], made));
        graph.body.nodes.push(node("Add", [made, bias], present));
        graph.body.outputs.extend([key, present]);
    }
}

#[test]
fn all_keys_computed_from_encoder_states_are_taps() {
    let mut model = onnx::load(&folder().join("bert.onnx")).unwrap();
    with_keys_for_a_decoder(&mut model);
    let analysis = analyse(&model).unwrap();
    let name = |id: ValueId| analysis.model.graph.name(id);
    assert_eq!((analysis.map.layers.len(), name(analysis.map.result)), (4, "last_hidden_state"));
    let taps: Vec<(&str, &[usize])> = analysis.map.taps.iter().map(|tap| (name(tap.output), &tap.places[..])).collect();
    let names = ["present_key_cross_0", "present_value_cross_0", "present_key_cross_1", "present_value_cross_1"];
    assert_eq!(taps, names.map(|name| (name, &[4][..])));
    assert_eq!(drop_layers(&analysis, &[3]).unwrap().graph.body.outputs.len(), 5);

    let work = tempfile::tempdir().unwrap();
    onnx::save(&model, &work.path().join("encoder.onnx"), &Storage::Inline).unwrap();
    let shown = stdout(&interlace(work.path(), &["inspect", "encoder.onnx", "-q"]));
    for line in names.map(|name| format!("output {name} taps the stream behind the last layer")) {
        assert!(shown.contains(&line), "{shown}");
    }
    assert!(shown.contains("output last_hidden_state is what the layers lead to"), "{shown}");
}

fn settings(strategy: &str, how_many: HowMany, seed: u64) -> PlanSettings {
    PlanSettings {
        strategy: strategy.into(),
        how_many,
        seed,
        samples: None,
        fit_tokens: None,
        data: None,
        modality_weights: None,
        as_released: false,
        beyond_structure: false,
    }
}

/// Layers that other layers read, or whose inside is an output, are no candidates of a plan. `prune` accepts every
/// plan.
#[test]
fn plans_contain_only_layers_that_can_be_dropped() {
    let work = tempfile::tempdir().unwrap();
    for (name, fixed, reason) in [
        ("gemma4", &[2, 3][..], "layer 4"),
        ("gemma3n", &[2, 3], "layer 4"),
        ("llama_taps", &[2], "output `attentions.2`"),
    ] {
        let path = folder().join(format!("{name}.onnx"));
        let bundle = Bundle::open(&path).unwrap();
        let model = PlannedModel::of(&bundle).unwrap();
        let most = model.num_layers - 1 - fixed.len();
        for seed in 0..12 {
            let plan = steps::plan(&model, None, &settings("random", HowMany::DropCount(most), seed), None).unwrap();
            assert!(plan.drop.iter().all(|layer| !fixed.contains(layer)), "{name}: {:?}", plan.drop);
            let drop = Drop::Layers { tower: Tower::Text, layers: &plan.drop };
            let out = work.path().join(format!("{name}-{seed}"));
            steps::prune(&bundle, &drop, Default::default(), None, &out).unwrap();
        }
        let more = settings("random", HowMany::DropCount(most + 1), 1);
        let error = steps::plan(&model, None, &more, None).unwrap_err().to_string();
        assert!(error.contains(&format!("{most} at most")) && error.contains(reason), "{error}");
        // Layers that the user names are refused with the message of `prune`.
        let named = settings("explicit", HowMany::Drop(vec![fixed[0]]), 1);
        let error = steps::plan(&model, None, &named, None).unwrap_err().to_string();
        assert!(error.contains(&format!("layer {}", fixed[0])) && error.contains(reason), "{error}");
        inspected(&path, fixed, reason);
    }
    let bundle = Bundle::open(&folder().join("gemma4.onnx")).unwrap();
    let model = PlannedModel::of(&bundle).unwrap();
    let both = settings("explicit", HowMany::Drop(vec![2, 4]), 1);
    assert_eq!(steps::plan(&model, None, &both, None).unwrap().drop, [2, 4]);
}

fn inspected(path: &Path, fixed: &[usize], reason: &str) {
    let found = steps::inspect(&Bundle::open(path).unwrap()).unwrap();
    let refused: Vec<usize> =
        found.layers.iter().filter(|layer| layer.refusal.is_some()).map(|layer| layer.index).collect();
    assert_eq!(refused, fixed);
    let shown = stdout(&interlace(path.parent().unwrap(), &["inspect", path.to_str().unwrap(), "-q"]));
    let line = format!("layer {} cannot be dropped by itself: ", fixed[0]);
    assert!(shown.lines().any(|text| text.contains(&line) && text.contains(reason)), "{shown}");
}
