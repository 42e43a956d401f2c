//! The output of `export` is accepted by its target.

use std::path::{Path, PathBuf};

use interlace::base::{Cancel, Device, sha256_bytes};
use interlace::bundle::Bundle;
use interlace::export::triton::Serving;
use interlace::export::{Export, ExportSettings, export, target_named};
use interlace::ir::{DataType, Dim, Node, Value, ValueType};
use interlace::onnx;
use interlace::runtime::{Runtime, SessionOptions, TensorValue};

use super::cli::{interlace, stderr};

fn written(target: &str, bundle: &Bundle, settings: &ExportSettings, out: &Path) -> interlace::base::Result<Export> {
    export(bundle, target_named(target).expect("a target"), settings, out, &Cancel::default())
}

fn zoo(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(file)
}

/// A decoder whose logits are multiplied by the scalar input `scale`, with the scalar output `total`.
fn with_scalars(folder: &Path) -> PathBuf {
    let mut model = onnx::load(&zoo("optimum/llama-with-past/model.onnx")).expect("model");
    let graph = &mut model.graph;
    let scalar = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(Vec::new()) });
    let mut value = |name: &str, ty| graph.add_value(Value { name: name.into(), ty, ..Value::default() });
    let (scale, total) = (value("scale", scalar.clone()), value("total", scalar));
    let plain = value("plain", None);
    let logits = graph.body.outputs[0];
    let head = graph.body.nodes.iter_mut().find(|node| node.outputs.contains(&Some(logits))).expect("head");
    head.outputs.iter_mut().filter(|id| **id == Some(logits)).for_each(|id| *id = Some(plain));
    let node = |op: &str, inputs: Vec<_>, output| Node {
        op_type: op.into(),
        name: op.into(),
        inputs,
        outputs: vec![Some(output)],
        ..Node::default()
    };
    graph.body.nodes.push(node("Mul", vec![Some(plain), Some(scale)], logits));
    let mut sum = node("ReduceSum", vec![Some(logits)], total);
    sum.attributes.push(("keepdims".into(), interlace::ir::AttributeKind::Int(0).into()));
    graph.body.nodes.push(sum);
    graph.body.inputs.push(scale);
    graph.body.outputs.push(total);
    let path = folder.join("model.onnx");
    onnx::save(&model, &path, &onnx::Storage::Inline).expect("save");
    path
}

#[test]
fn scalars_exported_to_triton_get_an_axis_and_keep_their_values() {
    let folder = tempfile::tempdir().expect("folder");
    let path = with_scalars(folder.path());
    let out = folder.path().join("repository");
    let written = to("triton", &path, &ExportSettings::default(), &out).expect("export");
    assert_eq!(written.models["model"].reshaped, ["scale", "total"]);
    let config = std::fs::read_to_string(out.join("model/config.pbtxt")).expect("config");
    assert!(!config.contains("reshape") && config.contains("name: \"scale\""), "{config}");

    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let run = |path: &Path, shape: &[usize]| {
        let mut session = runtime.session(path, &SessionOptions::default()).expect("session");
        let feeds: Vec<(String, TensorValue)> = session
            .inputs()
            .iter()
            .map(|port| {
                let size = |axis: usize, dim: &Dim| match (dim, axis, port.name.starts_with("past")) {
                    (Dim::Known(size), ..) => *size as usize,
                    (_, 2, true) => 0,
                    (_, 1, false) => 3,
                    _ => 1,
                };
                let sizes: Vec<usize> = port.shape.iter().enumerate().map(|(axis, dim)| size(axis, dim)).collect();
                let count: usize = sizes.iter().product();
                let tensor = match (port.name.as_str(), port.dtype) {
                    ("scale", _) => TensorValue::from_f32(DataType::Float, shape, vec![0.5]),
                    (_, dtype) if count == 0 => TensorValue::empty(dtype, &sizes),
                    (_, dtype @ DataType::Int64) => TensorValue::from_i64(dtype, &sizes, vec![1; count]),
                    (_, dtype) => TensorValue::from_f32(dtype, &sizes, vec![0.0; count]),
                };
                (port.name.clone(), tensor.expect("tensor"))
            })
            .collect();
        let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = session.run(&feeds, Some(&["logits", "total"])).expect("run");
        let total = outputs.get("total").expect("total");
        (
            total.shape(),
            total.to_f32().expect("f32").to_vec(),
            outputs.get("logits").expect("logits").to_ir().expect("ir"),
        )
    };
    let (scalar, before, logits) = run(&path, &[]);
    let (axis, after, exported) = run(&out.join("model/1/model.onnx"), &[1]);
    assert_eq!((scalar, axis), (vec![], vec![1]));
    assert!(before == after && before[0] != 0.0, "{before:?} {after:?}");
    assert_eq!(logits.bytes(), exported.bytes());
}

fn to_transformers_js(model: &Path, out: &Path) -> interlace::base::Result<Export> {
    to("transformers-js", model, &ExportSettings::default(), out)
}

fn json(path: PathBuf) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn a_transformers_js_export_has_its_configs_in_the_expected_places() {
    let folder = tempfile::tempdir().expect("folder");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let out = folder.path().join("out");
    let written = to_transformers_js(&model, &out).expect("export");
    assert_eq!(
        written.models.keys().collect::<Vec<_>>(),
        ["decoder_model_merged.onnx", "embed_tokens.onnx", "vision_encoder.onnx"]
    );
    let preprocessor = json(out.join("preprocessor_config.json"));
    assert_eq!(preprocessor["processor_class"], "Idefics3Processor");
    assert_eq!(preprocessor["image_processor_type"], "Idefics3ImageProcessor");
    let tokenizer = json(out.join("tokenizer_config.json"));
    let template = std::fs::read_to_string(model.join("chat_template.jinja")).expect("a template");
    assert_eq!(tokenizer["chat_template"], template.as_str());
    assert_eq!(tokenizer["tokenizer_class"], "PreTrainedTokenizerFast");
    let chunks = json(out.join("config.json"))["transformers.js_config"]["use_external_data_format"].clone();
    assert_eq!(chunks, serde_json::json!({"decoder_model_merged.onnx": 1}));
    assert!(out.join("onnx/decoder_model_merged.onnx_data").is_file());
    let again = Bundle::open(&out).expect("the folder is a model again");
    assert_eq!(again.components().len(), 3);
}

#[test]
fn data_files_are_at_most_as_large_as_shard_size_says() {
    let folder = tempfile::tempdir().expect("folder");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let bundle = Bundle::open(&model).expect("bundle");
    const LIMIT: u64 = 1_500_000;
    for target in ["transformers-js", "webgpu", "openvino", "genai"] {
        let out = folder.path().join(target);
        let settings = ExportSettings { shard_bytes: Some(LIMIT), ..ExportSettings::default() };
        written(target, &bundle, &settings, &out).expect("export");
        let again = Bundle::open(&out).expect("the folder is a model again");
        let mut split = 0;
        for component in again.components() {
            for file in &component.external {
                let size = std::fs::metadata(again.root().join(file)).expect("a data file").len();
                assert!(size <= LIMIT, "{target}: {file} has {size} bytes");
            }
            split += usize::from(component.external.len() > 1);
        }
        assert!(split >= 2, "{target}: {split} components have several data files");
        let counts = json(out.join("config.json"))["transformers.js_config"]["use_external_data_format"].clone();
        if target != "genai" {
            let decoder = again.component(interlace::bundle::Role::Decoder).expect("a decoder");
            assert_eq!(counts["decoder_model_merged.onnx"], decoder.external.len(), "{target}");
        }
        interlace::onnx::load(&again.path_of(&again.components()[0])).expect("a graph");
    }
    let settings = ExportSettings { shard_bytes: Some(100_000), ..ExportSettings::default() };
    let out = folder.path().join("small");
    let error = written("openvino", &bundle, &settings, &out).unwrap_err().to_string();
    assert!(error.contains("--max-buffer") && error.contains("100 kB"), "{error}");
    assert!(!out.exists());
}

const CARD: &str =
    "---\nlicense: apache-2.0\nmodel-index:\n- name: dense\n  results: 99.8\n---\n# Dense\n99.8 % accuracy\n";

/// The shipped model with a card and a licence, pruned; and a report about it.
fn documented(here: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    for file in ["onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx_data", "onnx/embed_tokens.onnx"]
        .into_iter()
        .chain(["onnx/vision_encoder.onnx", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
        .chain(["config.json", "chat_template.jinja", "generation_config.json"])
    {
        let target = here.join("models--org--dense/snapshots/abc").join(file);
        std::fs::create_dir_all(target.parent().expect("folder")).expect("folder");
        std::fs::copy(source.join(file), target).expect("copy");
    }
    let dense = here.join("models--org--dense/snapshots/abc");
    std::fs::write(dense.join("README.md"), CARD).expect("card");
    std::fs::write(dense.join("LICENSE"), "the licence").expect("licence");
    // Another tool's file of this name says nothing of an export.
    std::fs::write(dense.join("manifest.json"), "{\"name\": \"an app\"}").expect("manifest");
    let run = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    };
    run(&["prune", "models--org--dense/snapshots/abc", "--drop", "3,6,8,13", "-o", "pruned", "-q"]);
    let bench = source.parent().expect("fixtures").join("data/bench-small.tsv");
    let data = ["--data", bench.to_str().expect("path"), "--limit", "8", "-q"];
    let models = ["eval", "pruned", "--baseline", "models--org--dense/snapshots/abc", "-o", "report.json"];
    run(&[&models[..], &data].concat());
    run(&[&["eval", "models--org--dense/snapshots/abc", "-o", "dense.json"][..], &data].concat());
}

#[test]
fn an_export_has_a_card_and_a_manifest_that_verify_checks() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    documented(here);
    assert!(here.join("pruned/manifest.json").is_file(), "another tool's file is carried along");
    let code = |arguments: &[&str]| interlace(here, arguments).status.code();
    let export = |target: &str, out: &str, report: &str| {
        interlace(here, &["export", "pruned", "--to", target, "-o", out, "--report", report, "-q"])
    };
    let wrong = export("triton", "out", "dense.json");
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("report of another model"), "{}", stderr(&wrong));
    for target in ["transformers-js", "triton"] {
        let output = export(target, target, "report.json");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let out = here.join(target);
        let manifest = json(out.join("manifest.json"));
        assert_eq!(manifest["target"], target);
        assert_eq!(manifest["history"][0]["dropped"], serde_json::json!([3, 6, 8, 13]));
        assert_eq!(manifest["licences"], serde_json::json!(["LICENSE"]));
        assert_eq!(std::fs::read_to_string(out.join("LICENSE")).expect("licence"), "the licence");
        let report = json(here.join("report.json"));
        assert_eq!(manifest["scores"][0]["after"], report["model"]["score"]);
        assert_eq!(manifest["scores"][0]["before"], report["baseline"]["score"]);
        assert_eq!(manifest["inputs"]["model"], report["inputs"]["model"]);
        assert!(manifest["inputs"]["report bench-small"].is_string(), "{manifest}");
        let licence = &manifest["files"]["LICENSE"];
        assert_eq!(licence["size_bytes"], 11);
        assert_eq!(licence["sha256"].as_str(), Some(sha256_bytes(b"the licence").as_str()));

        let card = std::fs::read_to_string(out.join("README.md")).expect("card");
        assert!(card.starts_with("---\nlicense: apache-2.0\nbase_model: org/dense\n"), "{card}");
        assert!(card.contains("\n    ...D..D.D....D..\n"), "{card}");
        assert!(
            card.contains("4 of 16 layers of the language model removed") && card.contains("| bench-small | 8 |"),
            "{card}"
        );
        assert!(!card.contains("99.8") && !card.contains("model-index"), "{card}");

        assert_eq!(code(&["verify", target, "-q"]), Some(0));
        std::fs::write(out.join("LICENSE"), "the Licence").expect("changed");
        let failed = interlace(here, &["verify", target, "-q"]);
        assert_eq!(failed.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&failed.stdout).contains("`LICENSE` has other content"));
        std::fs::write(out.join("more.txt"), "x").expect("added");
        std::fs::remove_file(out.join("LICENSE")).expect("removed");
        let failed = interlace(here, &["verify", target, "-q"]);
        let text = String::from_utf8_lossy(&failed.stdout).into_owned();
        assert!(text.contains("`LICENSE` is missing") && text.contains("`more.txt` is not listed"), "{text}");
    }
    // The records of an export do not outlive a change of the model.
    assert_eq!(code(&["prune", "transformers-js", "--drop", "1", "-o", "again", "-q"]), Some(0));
    assert!(!here.join("again/manifest.json").exists() && !here.join("again/interlace-export.json").exists());
}

#[test]
fn a_model_that_transformers_js_cannot_run_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("folder");
    let model = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
        let target = folder.path().join(name);
        std::fs::create_dir_all(target.join("onnx")).expect("folder");
        for file in ["onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx_data", "onnx/embed_tokens.onnx"]
            .into_iter()
            .chain(["onnx/vision_encoder.onnx", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
        {
            std::fs::copy(source.join(file), target.join(file)).expect("copy");
        }
        let mut config = json(source.join("config.json"));
        change(&mut config);
        std::fs::write(target.join("config.json"), config.to_string()).expect("write");
        target
    };
    let foreign = model("foreign", &|config| config["model_type"] = "pixel_poet".into());
    let error = to_transformers_js(&foreign, &folder.path().join("a")).unwrap_err().to_string();
    assert!(error.contains("pixel_poet") && error.contains("no class"), "{error}");

    // Without `processor_config.json` the class is in the other two. If they lack it too, it is unknown.
    let nameless = model("nameless", &|_| ());
    assert!(to_transformers_js(&nameless, &folder.path().join("b")).is_ok());
    for file in ["tokenizer_config.json", "preprocessor_config.json"].map(|file| nameless.join(file)) {
        let mut object = json(file.clone());
        object.as_object_mut().expect("an object").remove("processor_class");
        std::fs::write(&file, object.to_string()).expect("write");
    }
    let error = to_transformers_js(&nameless, &folder.path().join("c")).unwrap_err().to_string();
    assert!(error.contains("processor_class") && error.contains("preprocessor_config.json"), "{error}");
    assert!(!folder.path().join("c").exists());
}

pub fn to(target: &str, model: &Path, settings: &ExportSettings, out: &Path) -> interlace::base::Result<Export> {
    written(target, &Bundle::open(model).expect("bundle"), settings, out)
}

/// Outputs of a decoder for a prompt of 7 tokens, and for one more behind them; of float32.
fn prompt_and_step(path: &Path) -> Vec<(String, Vec<f32>)> {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let mut session = runtime.session(path, &SessionOptions::default()).expect("session");
    let ports = session.inputs().to_vec();
    let mut caches: Vec<(String, TensorValue)> = Vec::new();
    let mut found = Vec::new();
    for (past, steps) in [(0usize, 7usize), (7, 1)] {
        let mut feeds = Vec::new();
        for port in &ports {
            let numbers: Vec<i64> = (past..past + steps).map(|place| (place as i64 * 37 + 5) % 600).collect();
            let tensor = match port.name.as_str() {
                "input_ids" => TensorValue::from_i64(port.dtype, &[1, steps], numbers),
                "attention_mask" => TensorValue::from_i64(port.dtype, &[1, past + steps], vec![1; past + steps]),
                "position_ids" => TensorValue::from_i64(
                    port.dtype,
                    &[1, steps],
                    (past..past + steps).map(|place| place as i64).collect(),
                ),
                name => match caches.iter().position(|(own, _)| own == name) {
                    Some(place) => Ok(caches.swap_remove(place).1),
                    None => {
                        let size = |axis| port.fixed_size(axis).expect("a size");
                        TensorValue::empty(port.dtype, &[1, size(1), 0, size(3)])
                    }
                },
            };
            feeds.push((port.name.clone(), tensor.expect("tensor")));
        }
        let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = session.run(&feeds, None).expect("run");
        for port in session.outputs().to_vec() {
            let tensor = outputs.get(&port.name).expect("output");
            let values = tensor.to_f32().expect("f32").to_vec();
            if let Some(name) = port.name.strip_prefix("present") {
                let copy = TensorValue::from_f32(port.dtype, &tensor.shape(), values.clone()).expect("tensor");
                caches.push((format!("past_key_values{name}"), copy));
            }
            found.push((port.name.clone(), values));
        }
    }
    found
}

#[test]
fn standard_operators_give_what_those_of_onnx_runtime_give() {
    let folder = tempfile::tempdir().expect("folder");
    let settings = ExportSettings { standard_ops: true, ..ExportSettings::default() };
    for (number, file) in ["llama/optimum-O2.onnx", "genai/llama-int4-shared/model.onnx"].into_iter().enumerate() {
        let out = folder.path().join(number.to_string());
        let written = to("openvino", &zoo(file), &settings, &out).expect("export");
        let path = out.join(written.models.keys().next().expect("a model"));
        let model = onnx::load(&path).expect("model");
        assert!(model.opset_imports.keys().all(String::is_empty), "{:?}", model.opset_imports);
        let own = model.graph.body.nodes.iter().find(|node| node.op_type == "SimplifiedLayerNormalization");
        assert!(own.is_none() && model.graph.body.nodes.iter().all(|node| node.domain.is_empty()), "{own:?}");
        // With `accuracy_level` 4 ONNX Runtime would round the activations of MatMulNBits to 8 bits.
        let exact = folder.path().join(format!("exact{number}.onnx"));
        let mut model = onnx::load(&zoo(file)).expect("model");
        for node in &mut model.graph.body.nodes {
            node.attributes.retain(|(name, _)| name != "accuracy_level");
        }
        onnx::save(&model, &exact, &onnx::Storage::Inline).expect("save");
        let (wanted, found) = (prompt_and_step(&exact), prompt_and_step(&path));
        assert_eq!(wanted.len(), found.len());
        for ((name, wanted), (other, found)) in wanted.iter().zip(&found) {
            assert_eq!((name, wanted.len()), (other, found.len()));
            let apart = wanted.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            let largest = wanted.iter().map(|value| value.abs()).fold(1f32, f32::max);
            assert!(apart <= 1e-5 * largest, "{file}, {name}: {apart} of {largest}");
        }
    }
}

#[test]
fn large_tables_and_heads_are_split_and_compute_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    const LIMIT: u64 = 50_000;
    let settings = ExportSettings { max_buffer_bytes: Some(LIMIT), ..ExportSettings::default() };
    let (file, out) = (zoo("optimum/llama-with-past/model.onnx"), folder.path().join("out"));
    let written = to("openvino", &file, &settings, &out).expect("export");
    let path = out.join(written.models.keys().next().expect("a model"));
    let sizes = |path: &Path| -> Vec<u64> {
        let model = onnx::load(path).expect("model");
        model.graph.body.initializers.iter().map(|(_, tensor)| tensor.byte_len()).collect()
    };
    assert_eq!(sizes(&file).iter().filter(|&&size| size > LIMIT).count(), 2);
    assert!(sizes(&path).iter().all(|&size| size <= LIMIT));
    for ((name, wanted), (other, found)) in prompt_and_step(&file).iter().zip(&prompt_and_step(&path)) {
        assert_eq!((name, wanted.len()), (other, found.len()));
        let apart = wanted.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(apart <= 1e-6, "{name}: {apart}");
    }

    let shared =
        to("openvino", &zoo("genai/llama-int4-shared/model.onnx"), &settings_of(17_000), &folder.path().join("b"));
    let error = shared.unwrap_err().to_string();
    assert!(error.contains("lm_head.MatMul.weight_Q4G32") && error.contains("--max-buffer"), "{error}");
    let error = to("openvino", &file, &settings_of(100), &folder.path().join("c")).unwrap_err().to_string();
    assert!(error.contains("below a row") || error.contains("cannot read it in parts"), "{error}");
}

fn settings_of(max_buffer: u64) -> ExportSettings {
    ExportSettings { max_buffer_bytes: Some(max_buffer), ..ExportSettings::default() }
}

/// The packed product of a head in parts, with its scales and zero points.
#[test]
fn a_packed_head_is_split_and_computes_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let packed = folder.path().join("packed");
    let run = super::cli::interlace(
        folder.path(),
        &[
            "export",
            &file.to_string_lossy(),
            "--precision",
            "int4",
            "--zero-points",
            "-o",
            &packed.to_string_lossy(),
            "-q",
        ],
    );
    assert!(run.status.success(), "{}", super::cli::stderr(&run));
    let decoder = packed.join("onnx/decoder_model_merged_q4.onnx");
    let out = folder.path().join("out");
    let written = to("openvino", &decoder, &settings_of(40_000), &out).expect("export");
    let out = out.join(written.models.keys().next().expect("a model"));
    let (whole, split) = (onnx::load(&decoder).expect("model"), onnx::load(&out).expect("model"));
    let products = |model: &interlace::ir::Model| {
        model.graph.body.nodes.iter().filter(|node| node.op_type == "MatMulNBits").count()
    };
    assert!(products(&split) > products(&whole), "{} of {}", products(&split), products(&whole));
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let logits = |path: &Path| {
        let mut session = runtime.session(path, &SessionOptions::default()).expect("session");
        let mut feeds = Vec::new();
        for port in session.inputs().to_vec() {
            let shape: Vec<usize> = (0..port.rank())
                .map(|axis| {
                    port.fixed_size(axis).unwrap_or(match (port.rank(), axis) {
                        (_, 0) => 1,
                        (4, 2) => 0,
                        _ => 5,
                    })
                })
                .collect();
            let count: usize = shape.iter().product();
            let numbers = |number: usize| ((number * 37 % 101) as f32 - 50.0) / 50.0;
            let tensor = match port.name.as_str() {
                "attention_mask" => TensorValue::from_i64(port.dtype, &shape, vec![1; count]),
                "position_ids" => TensorValue::from_i64(port.dtype, &shape, (0..count as i64).collect()),
                _ => TensorValue::from_f32(port.dtype, &shape, (0..count).map(numbers).collect()),
            };
            feeds.push((port.name.clone(), tensor.expect("tensor")));
        }
        let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = session.run(&feeds, Some(&["logits"])).expect("run");
        outputs.get("logits").expect("logits").to_f32().expect("floats").to_vec()
    };
    let (wanted, found) = (logits(&decoder), logits(&out));
    assert_eq!(wanted.len(), found.len());
    let apart = wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(apart <= 1e-5, "{apart}");
}

#[test]
fn an_operator_without_a_standard_form_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let settings = ExportSettings { standard_ops: true, ..ExportSettings::default() };
    let error = to("openvino", &zoo("genai/qwen3_vl-int4-embeds/model.onnx"), &settings, &out).unwrap_err().to_string();
    assert!(error.contains("MRotaryEmbedding") && error.contains("standard operators"), "{error}");
    assert!(!out.exists());
}

#[test]
fn an_operator_set_is_raised_and_never_lowered() {
    let folder = tempfile::tempdir().expect("folder");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let settings = |opset| ExportSettings { opset: Some(opset), ..ExportSettings::default() };
    let out = folder.path().join("out");
    to("openvino", &model, &settings(21), &out).expect("export");
    let raised = onnx::load(&out.join("onnx/embed_tokens.onnx")).expect("model");
    assert_eq!(raised.opset_imports[""], 21);
    let error = to("openvino", &model, &settings(13), &folder.path().join("low")).unwrap_err().to_string();
    assert!(error.contains("none is lowered"), "{error}");
}

#[test]
fn a_tract_export_notes_no_types_of_inner_values() {
    let folder = tempfile::tempdir().expect("folder");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let out = folder.path().join("out");
    to("tract", &model, &ExportSettings::default(), &out).expect("export");
    let written = onnx::load(&out.join("onnx/decoder_model_merged.onnx")).expect("model");
    let body = &written.graph.body;
    let typed = body.nodes.iter().flat_map(|node| node.present_outputs());
    let typed = typed.filter(|id| !body.outputs.contains(id) && written.graph.value(*id).ty.is_some()).count();
    assert_eq!(typed, 0);
}

#[test]
fn a_genai_export_names_caches_by_layer_and_answers_as_the_model() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let model = model.to_str().expect("a path");
    let run = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    run(&["prune", model, "--drop", "3,6,8,13", "-o", "pruned", "-q"]);
    run(&["export", "pruned", "--to", "genai", "-o", "out", "-q"]);
    let config = json(here.join("out/genai_config.json"));
    assert_eq!(config["model"]["decoder"]["num_hidden_layers"], 12);
    assert_eq!(config["model"]["type"], "gemma3");
    assert_eq!(config["model"]["embedding"]["filename"], "embedding.onnx");
    let decoder = onnx::load(&here.join("out/model.onnx")).expect("model");
    let names: Vec<&str> = decoder.graph.body.inputs.iter().map(|id| decoder.graph.name(*id)).collect();
    assert!(names.contains(&"past_key_values.11.value") && !names.contains(&"past_key_values.12.key"), "{names:?}");
    let again = Bundle::open(&here.join("out")).expect("the folder is a model again");
    assert_eq!(again.components().len(), 3);
    let bench = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/bench-small.tsv");
    let bench = bench.to_str().expect("a path");
    for name in ["pruned", "out"] {
        let predictions = format!("{name}.jsonl");
        let report = format!("{name}.json");
        let eval = ["eval", name, "--baseline", name, "--data", bench, "--limit", "6", "-q"];
        run(&[&eval[..], &["--predictions", &predictions, "-o", &report]].concat());
    }
    let read = |name: &str| std::fs::read_to_string(here.join(name)).expect("predictions");
    assert_eq!(read("pruned.jsonl"), read("out.jsonl"));
    let verified = run(&["verify", "out"]);
    assert!(verified.contains("embedding.onnx") && !verified.contains("FAILED"), "{verified}");
}

#[test]
fn models_that_genai_does_not_take_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("folder");
    for (number, model) in ["genai/llama-fp32-embeds", "genai/qwen3_vl-fp32-embeds"].into_iter().enumerate() {
        let out = folder.path().join(number.to_string());
        let error = to("genai", &zoo(model), &ExportSettings::default(), &out).unwrap_err().to_string();
        assert!(error.contains("only with a vision encoder"), "{model}: {error}");
        assert!(!out.exists());
    }
}

/// Triton's ONNX Runtime back end refuses an output whose sizes in the configuration are not those of the loaded graph.
pub fn check_sizes_of_outputs(repository: &Path) {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let mut checked = 0;
    for entry in std::fs::read_dir(repository).expect("a repository") {
        let folder = entry.expect("an entry").path();
        let graph = folder.join("1/model.onnx");
        if !graph.is_file() {
            continue;
        }
        let config = std::fs::read_to_string(folder.join("config.pbtxt")).expect("config");
        let batch = if config.contains("max_batch_size") { "-1, " } else { "" };
        let (_, outputs) = config.split_once("\noutput: [").expect("outputs");
        for port in runtime.session(&graph, &SessionOptions::default()).expect("a session").outputs() {
            let (_, own) = outputs.split_once(&format!("name: \"{}\"", port.name)).expect("the output");
            let (_, dims) = own.split_once("dims: [").expect("sizes");
            let configured = format!("{batch}{}", dims.split_once(']').expect("an end").0);
            let found = port.shape.iter().map(|dim| if let Dim::Known(size) = dim { *size } else { -1 }.to_string());
            let found = found.collect::<Vec<_>>().join(", ");
            assert_eq!(configured, found, "{}: output {}", folder.display(), port.name);
            checked += 1;
        }
    }
    assert!(checked > 3, "{checked} outputs");
}

#[test]
fn a_triton_repository_answers_whole_requests() {
    let folder = tempfile::tempdir().expect("folder");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let serving = Serving { batch_delay_us: Some(100), instances: Some(2), warm_up: true, ..Serving::default() };
    let settings = ExportSettings { serving, ..ExportSettings::default() };
    let out = folder.path().join("out");
    let written = to("triton", &model, &settings, &out).expect("export");
    assert!(written.models.contains_key("generate") && written.models.contains_key("merge_embeddings"));
    check_sizes_of_outputs(&out);
    let config = |name: &str| std::fs::read_to_string(out.join(name).join("config.pbtxt")).expect("config");
    let prefill = config("prefill");
    assert!(prefill.contains("platform: \"ensemble\"") && out.join("prefill/1").is_dir(), "{prefill}");
    let stream = config("generate_stream");
    assert!(stream.contains("decoupled: true") && stream.contains("backend: \"python\""), "{stream}");
    assert!(written.files.contains_key("generate_stream/1/model.py"));
    let embedding = config("embed_tokens");
    assert!(embedding.contains("max_queue_delay_microseconds: 100") && embedding.contains("zero_data: true"));
    assert!(embedding.contains("count: 2") && !config("generate").contains("model_warmup"));
    assert!(written.notes.iter().any(|note| note.contains("`generate` is not warmed up")), "{:?}", written.notes);
    // A decoder without pictures gets the components and the whole graph, and the notes say why there is no more.
    let text = to("triton", &zoo("optimum/llama-with-past"), &ExportSettings::default(), &folder.path().join("text"));
    let text = text.expect("export");
    assert!(text.models.contains_key("generate") && !text.models.contains_key("merge_embeddings"));
    assert!(text.notes.iter().any(|note| note.contains("prefill")), "{:?}", text.notes);
}
