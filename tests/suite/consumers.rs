//! Exports whose graphs are changed for one consumer compute what the model computes.

use std::path::Path;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::eval::{Check, CheckStatus, DeviceLimits, VerifyReport, verify};
use interlace::export::{Export, ExportSettings, export, target_named};
use interlace::ir::{AttributeKind, Body, DataType, Model, Node, Value};
use interlace::onnx::{self, Storage};
use interlace::rewrite::{casts_wide_positions, narrow_positions};
use interlace::runtime::{Port, Runtime, SessionOptions};

use super::families::{Family, check_prompts};

fn model() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")
}

fn to(target: &str, model: &Path, out: &Path) -> interlace::base::Result<Export> {
    let bundle = Bundle::open(model).expect("bundle");
    export(&bundle, target_named(target).expect("a target"), &ExportSettings::default(), out, &Cancel::default())
}

fn checks(folder: &Path) -> Vec<Check> {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let report = verify(&folder.into(), None, &runtime, &Cancel::default()).expect("a report");
    assert!(report.passed, "{:#?}", report.checks);
    report.checks
}

#[test]
fn a_single_file_holds_all_weights_of_its_component() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let written = to("single-file", &model(), &out).expect("export");
    let source = Bundle::open(&model()).expect("bundle");
    assert_eq!(written.models.len(), source.components().len());
    assert!(source.components().iter().any(|component| !component.external.is_empty()));
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    for component in source.components() {
        // Nothing lies beside the copy.
        let alone = tempfile::tempdir().expect("folder");
        let copy = alone.path().join("model.onnx");
        std::fs::copy(out.join(&component.file), &copy).expect("copy");
        runtime.session(&copy, &SessionOptions::default()).expect("session");
        let bytes = |path: &Path| onnx::load(path).expect("model").graph.body.weight_bytes();
        assert_eq!(bytes(&copy), bytes(&source.path_of(component)), "{}", component.file);
    }
    checks(&out);
}

#[test]
fn tract_computes_what_onnx_runtime_computes() {
    let folder = tempfile::tempdir().expect("folder");
    let pruned = folder.path().join("pruned");
    let run = super::cli::interlace(
        folder.path(),
        &["prune", &model().to_string_lossy(), "--drop", "3,6,8,13", "-o", &pruned.to_string_lossy(), "-q"],
    );
    assert!(run.status.success(), "{}", super::cli::stderr(&run));
    for (number, source) in [model(), pruned].iter().enumerate() {
        let out = folder.path().join(number.to_string());
        to("tract", source, &out).expect("export");
        let checks = checks(&out);
        let of = |file: &str| {
            let found = checks.iter().find(|check| check.name == "agrees in tract" && check.subject.contains(file));
            found.unwrap_or_else(|| panic!("no run of {file} in {checks:#?}"))
        };
        for file in ["decoder_model_merged", "embed_tokens"] {
            let check = of(file);
            assert_eq!(check.status, CheckStatus::Passed, "{check:?}");
            assert!(check.difference.is_some_and(|apart| apart <= 1e-3), "{check:?}");
        }
        // tract compares no Bools.
        assert_eq!(of("vision_encoder").status, CheckStatus::Unavailable);
    }
}

fn on_webgpu(folder: &Path, max_buffer: Option<u64>) -> VerifyReport {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let limits = DeviceLimits::new(max_buffer, true);
    verify(&folder.into(), limits, &runtime, &Cancel::default()).expect("a report")
}

#[test]
fn a_webgpu_folder_passes_the_checks_that_the_model_fails() {
    let folder = tempfile::tempdir().expect("folder");
    let dense = on_webgpu(&model(), None);
    let of = |report: &VerifyReport, name: &str| -> Vec<Check> {
        report.checks.iter().filter(|check| check.name == name).cloned().collect()
    };
    let positions = of(&dense, "webgpu positions");
    assert_eq!((dense.passed, positions.len(), positions[0].status), (false, 1, CheckStatus::Failed));
    assert!(positions[0].detail.contains("--to webgpu"), "{positions:?}");

    let out = folder.path().join("out");
    let written = to("webgpu", &model(), &out).expect("export");
    assert_eq!(
        (written.target.as_str(), written.provenance.settings["max_buffer_bytes"].as_u64()),
        ("webgpu", Some(1_000_000_000))
    );
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("config.json")).expect("a config")).expect("JSON");
    assert_eq!(config["transformers.js_config"]["device"], "webgpu");
    let report = on_webgpu(&out, None);
    assert!(report.passed, "{:#?}", report.checks);
    assert_eq!(of(&report, "webgpu positions")[0].status, CheckStatus::Passed);
    assert!(of(&report, "buffers").iter().all(|check| check.detail.contains("every WebGPU device")));
    // The scores of 4 heads take 4 x 4 bytes for each pair of tokens.
    let activations = |report: &VerifyReport, file: &str| {
        let found = of(report, "buffers of activations").into_iter().find(|check| check.subject.contains(file));
        found.unwrap_or_else(|| panic!("no measurement of {file} in {:#?}", report.checks))
    };
    let [vision, decoder] = ["vision_encoder", "decoder_model_merged"].map(|file| activations(&report, file));
    assert!(decoder.detail.contains("a prompt of 7905 tokens fit into 1.00 GB"), "{decoder:?}");
    // The first product of an MLP gives 384 numbers of 4 bytes for each of 64 patches.
    assert!(vision.detail.contains("[1, 1, 3, 64, 64]") && vision.detail.contains("98.3 kB"), "{vision:?}");

    // The largest weight has more bytes than this buffer.
    const LIMIT: u64 = 100_000;
    assert!(!on_webgpu(&out, Some(LIMIT)).passed);
    let small = folder.path().join("small");
    let settings = ExportSettings { max_buffer_bytes: Some(LIMIT), ..ExportSettings::default() };
    let bundle = Bundle::open(&model()).expect("bundle");
    let target = target_named("webgpu").expect("a target");
    let tight = export(&bundle, target, &settings, &small, &Cancel::default()).expect("export");
    let report = on_webgpu(&small, Some(LIMIT));
    assert!(report.passed, "{:#?}", report.checks);
    // The export says of itself what `verify` finds, and notes prompts that the model takes and the buffers do not.
    for (written, report) in [(&written, &on_webgpu(&out, None)), (&tight, &report)] {
        let mut found = of(report, "buffers of activations");
        found.retain(|check| check.status != CheckStatus::Unavailable);
        assert_eq!(written.buffers, found);
    }
    let noted = |written: &Export| -> Vec<String> {
        written.notes.iter().filter(|note| note.contains("fit into")).cloned().collect()
    };
    assert!(noted(&written).is_empty(), "the context of 2048 tokens fits: {:?}", written.notes);
    let [note] = &noted(&tight)[..] else { panic!("{:?}", tight.notes) };
    for part in ["decoder_model_merged.onnx", "`logits`", "at most 29 tokens", "allows 2048", "chunked prefill"] {
        assert!(note.contains(part), "{note}");
    }
    let recorded = std::fs::read(small.join("interlace-export.json")).expect("a record");
    let recorded: Export = serde_json::from_slice(&recorded).expect("JSON");
    assert_eq!((recorded.notes, recorded.buffers), (tight.notes, tight.buffers));
    // 4 bytes for each of 839 tokens of the vocabulary.
    let decoder = activations(&report, "decoder_model_merged").detail;
    assert!(decoder.contains("a prompt of 29 tokens fit") && decoder.contains("`logits`"), "{decoder}");
    let vision = activations(&on_webgpu(&small, Some(98_303)), "vision_encoder");
    assert!(vision.status == CheckStatus::Failed && vision.detail.contains("gelu"), "{vision:?}");
}

/// The logits of a head that is a graph of its own count, and what is not measured is named.
#[test]
fn the_logits_of_a_separate_head_are_measured() {
    let family = Family::open("janus", "janus");
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let of = |limit: u64, file: &str| {
        let limits = DeviceLimits::new(Some(limit), false);
        let model = family.here().join("janus");
        let report = verify(&model.as_path().into(), limits, &runtime, &Cancel::default()).expect("a report");
        let found =
            report.checks.iter().find(|check| check.name == "buffers of activations" && check.subject.contains(file));
        found.unwrap_or_else(|| panic!("no measurement of {file} in {:#?}", report.checks)).clone()
    };
    // 4 bytes for each of 326 tokens of the vocabulary.
    let head = of(100_000, "lm_head");
    assert_eq!(head.status, CheckStatus::Passed, "{head:?}");
    assert!(head.detail.contains("a prompt of 76 tokens fit") && head.detail.contains("`logits`"), "{head:?}");
    assert_eq!(of(1_303, "lm_head").status, CheckStatus::Failed);
    let embed = of(100_000, "prepare_inputs_embeds");
    assert!(embed.status == CheckStatus::Unavailable && embed.detail.contains("is not measured"), "{embed:?}");
}

/// The shipped model's decoder, changed, in a folder of its own.
fn changed(folder: &Path, change: fn(&mut Model)) -> std::path::PathBuf {
    let copy = folder.join("changed");
    super::tensors::copy_folder(&model(), &copy);
    let path = copy.join("onnx/decoder_model_merged.onnx");
    let mut decoder = onnx::load(&model().join("onnx/decoder_model_merged.onnx")).expect("a decoder");
    change(&mut decoder);
    let storage = Storage::External { file_name: "decoder_model_merged.onnx_data".into(), chunk_bytes: None };
    std::fs::remove_file(copy.join("onnx/decoder_model_merged.onnx_data")).expect("removed");
    onnx::save(&decoder, &path, &storage).expect("saved");
    copy
}

/// Reads the positions through a sum, which is not moved behind a cast.
fn summed_positions(model: &mut Model) {
    let graph = &mut model.graph;
    let positions = graph.input("position_ids").expect("positions");
    let sum = graph.add_value(Value { name: "sum".into(), ..Value::default() });
    for input in graph.body.nodes.iter_mut().flat_map(|node| &mut node.inputs) {
        if *input == Some(positions) {
            *input = Some(sum);
        }
    }
    let node = Node {
        op_type: "Add".into(),
        inputs: vec![Some(positions), Some(positions)],
        outputs: vec![Some(sum)],
        ..Node::default()
    };
    graph.body.nodes.insert(0, node);
}

/// Casts a weight from bfloat16.
fn in_bfloat16(model: &mut Model) {
    let graph = &mut model.graph;
    let at = graph.body.initializers.iter().position(|(_, tensor)| tensor.dtype == DataType::Float).expect("floats");
    let (id, tensor) = graph.body.initializers[at].clone();
    let narrow = graph.add_value(Value { name: "narrow".into(), ..Value::default() });
    let numbers = tensor.to_f64s().expect("floats");
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| (((*x as f32).to_bits() >> 16) as u16).to_le_bytes()).collect();
    let half = interlace::ir::Tensor::from_bytes(DataType::Bfloat16, &tensor.dims, bytes);
    graph.body.initializers[at] = (narrow, half);
    let to = (String::from("to"), AttributeKind::Int(DataType::Float as i64).into());
    let node = Node {
        op_type: "Cast".into(),
        inputs: vec![Some(narrow)],
        outputs: vec![Some(id)],
        attributes: vec![to],
        ..Node::default()
    };
    graph.body.nodes.insert(0, node);
}

/// Moves the scores of a layer into a branch of an `If`, where they are doubled and halved.
fn scores_in_a_branch(model: &mut Model) {
    let graph = &mut model.graph;
    let mut value = |name: &str| graph.add_value(Value { name: name.into(), ..Value::default() });
    let [scores, doubled, chosen, other, condition] =
        ["scores", "doubled", "chosen", "other", "condition"].map(&mut value);
    let constants = [("starts", 0), ("ends", 4), ("axes", 1)].map(|(name, number)| (value(name), number));
    let node = |op: &str, inputs: &[interlace::ir::ValueId], output, attributes: Vec<(&str, AttributeKind)>| Node {
        op_type: op.into(),
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: vec![Some(output)],
        attributes: attributes.into_iter().map(|(name, kind)| (name.to_string(), kind.into())).collect(),
        ..Node::default()
    };
    let body = |outputs: Vec<interlace::ir::ValueId>, nodes| {
        AttributeKind::Graph(Body { name: "branch".into(), outputs, nodes, ..Body::default() })
    };
    let at = graph.body.nodes.iter().position(|node| node.op_type == "Softmax").expect("scores");
    let (mut inside, result) = (graph.body.nodes[at].clone(), graph.body.nodes[at].outputs[0].expect("a result"));
    let unscaled = inside.inputs[0].expect("an input");
    inside.outputs = vec![Some(scores)];
    let mut then = vec![inside, node("Concat", &[scores, scores], doubled, vec![("axis", AttributeKind::Int(1))])];
    for (id, number) in constants {
        let tensor = AttributeKind::Tensor(interlace::ir::Tensor::from_i64(&[1], &[number]));
        then.push(node("Constant", &[], id, vec![("value", tensor)]));
    }
    let [starts, ends, axes] = constants.map(|(id, _)| id);
    then.push(node("Slice", &[doubled, starts, ends, axes], chosen, vec![]));
    let otherwise = vec![node("Identity", &[unscaled], other, vec![])];
    let branches = vec![("then_branch", body(vec![chosen], then)), ("else_branch", body(vec![other], otherwise))];
    graph.body.nodes[at] = Node { name: "choice".into(), ..node("If", &[condition], result, branches) };
    let always = interlace::ir::Tensor::from_bytes(DataType::Bool, &[], vec![1]);
    graph.body.initializers.push((condition, always));
}

/// A value inside of a body counts, and the branch that is not taken is no value of the prompt.
#[test]
fn values_inside_of_bodies_are_measured() {
    let folder = tempfile::tempdir().expect("folder");
    let source = changed(folder.path(), scores_in_a_branch);
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let limits = DeviceLimits::new(Some(1_000_000_000), false);
    let report = verify(&source.as_path().into(), limits, &runtime, &Cancel::default()).expect("a report");
    let found = report.checks.iter().filter(|check| check.name == "buffers of activations");
    let found = found.into_iter().find(|check| check.subject.contains("decoder")).expect("a measurement");
    // 8 heads' scores of 4 bytes for each pair of tokens.
    assert_eq!((found.status, found.longest_prompt), (CheckStatus::Passed, Some(5590)), "{found:?}");
    assert!(found.detail.contains("`doubled` of Concat in node `choice` (If) does not"), "{found:?}");
    assert!(found.detail.ends_with("1 value of a branch that was not taken is not measured"), "{found:?}");
}

#[test]
fn graphs_that_webgpu_computes_wrongly_or_not_at_all_are_refused() {
    for (change, why) in [(summed_positions as fn(&mut Model), "position_ids"), (in_bfloat16, "bfloat16")] {
        let folder = tempfile::tempdir().expect("folder");
        let source = changed(folder.path(), change);
        let out = folder.path().join("out");
        to("transformers-js", &source, &folder.path().join("js")).expect("another target takes it");
        let error = to("webgpu", &source, &out).unwrap_err().to_string();
        assert!(
            error.contains(why) && error.contains("decoder_model_merged.onnx") && error.contains("WebGPU"),
            "{error}"
        );
        assert!(!out.exists());
        let report = on_webgpu(&source, None);
        let failed: Vec<&Check> = report.checks.iter().filter(|check| check.status == CheckStatus::Failed).collect();
        let half =
            failed.iter().any(|check| check.name == "webgpu types" && check.detail.contains("initializer `narrow`"));
        assert_eq!(half, why == "bfloat16", "{failed:#?}");
    }
}

/// Decoders of all families that transformers.js runs.
#[test]
fn positions_of_every_family_are_narrowed() {
    for archive in [
        "gemma3",
        "gemma3n",
        "gemma4",
        "glm_ocr",
        "idefics3",
        "lfm2_vl",
        "llava",
        "llava_onevision",
        "mistral3",
        "moondream",
        "paligemma",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    ] {
        let family = Family::open(archive, archive);
        let bundle = Bundle::open(&family.here().join(archive)).expect("a model");
        let decoder = bundle.component(interlace::bundle::Role::Decoder).expect("a decoder");
        let mut decoder = onnx::load(&bundle.path_of(decoder)).expect("a graph");
        narrow_positions(&mut decoder);
        assert!(!casts_wide_positions(&decoder), "{archive}");
    }
}

/// transformers.js feeds the decoder `inputs_embeds`, mask, positions and caches, and takes one output of the vision encoder.
#[test]
fn deepstack_features_reach_a_decoder_that_is_fed_embeddings_alone() {
    let family = Family::open("qwen3_vl", "qwen3_vl");
    let here = family.here();
    family.run(&["prune", "qwen3_vl", "--drop", "1,4", "--deepstack", "shift", "-o", "pruned", "-q"]);
    for (source, out, key) in
        [("qwen3_vl", "js", "dense"), ("qwen3_vl_packed", "js-packed", "dense"), ("pruned", "js-pruned", "pruned")]
    {
        let out = here.join(out);
        let written = to("transformers-js", &here.join(source), &out).expect("export");
        assert!(written.notes.iter().any(|note| note.contains("packed")), "{:?}", written.notes);
        let graph = |file: &str| onnx::load(&out.join(file)).expect("model").graph;
        let width = |file: &str, name: &str| {
            let graph = graph(file);
            let id = graph.output(name).or_else(|| graph.input(name)).expect("a value");
            Port::of_value(&graph, id).and_then(|port| port.width())
        };
        let vision = graph("onnx/vision_encoder.onnx");
        assert_eq!(vision.body.outputs.len(), 1);
        let embeds = width("onnx/embed_tokens.onnx", "inputs_embeds");
        assert_eq!(embeds, width("onnx/decoder_model_merged.onnx", "inputs_embeds"), "{source}");
        assert_eq!(embeds, width("onnx/vision_encoder.onnx", "image_features"), "{source}");
        check_prompts(&family, &out, key);
    }
    // A mask of places is not among what it feeds.
    let error = to("transformers-js", &here.join("qwen3_vl_masked"), &here.join("masked")).unwrap_err().to_string();
    assert!(error.contains("deepstack_features_0") && error.contains("inputs_embeds"), "{error}");
}

/// ONNX Runtime GenAI feeds the decoder what its embedding gives, of the width that its config names.
#[test]
fn deepstack_features_are_packed_for_genai() {
    let family = Family::open("qwen3_vl", "qwen3_vl");
    let here = family.here();
    family.run(&["prune", "qwen3_vl", "--drop", "1,4", "--deepstack", "shift", "-o", "pruned", "-q"]);
    for (source, out, key) in [
        ("qwen3_vl", "genai", "dense"),
        ("qwen3_vl_packed", "genai-packed", "dense"),
        ("pruned", "genai-pruned", "pruned"),
    ] {
        let out = here.join(out);
        let written = to("genai", &here.join(source), &out).expect("export");
        assert!(written.notes.iter().any(|note| note.contains("packed")), "{:?}", written.notes);
        let config = std::fs::read(out.join("genai_config.json")).expect("a config");
        let config: serde_json::Value = serde_json::from_slice(&config).expect("JSON");
        // Three levels behind embeddings of 32 columns.
        assert_eq!(config["model"]["decoder"]["hidden_size"], 128, "{source}");
        assert_eq!(config["model"]["type"], "qwen3_vl", "{source}");
        check_prompts(&family, &out, key);
    }
    let error = to("genai", &here.join("qwen3_vl_masked"), &here.join("masked")).unwrap_err().to_string();
    assert!(error.contains("deepstack_features_0") && error.contains("inputs_embeds"), "{error}");
}
