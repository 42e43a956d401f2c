//! `verify` passes valid models and names what is wrong in others.

use std::path::{Path, PathBuf};

use interlace::base::{Cancel, Device};
use interlace::bundle::ModelSource;
use interlace::eval::{CheckStatus, VerifyReport, verify, verify_on};
use interlace::ir::{self, AttributeKind, DataType, Dim, Node, Value, ValueType};
use interlace::onnx;
use interlace::runtime::{Runtime, SessionOptions, TensorValue};

fn zoo(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(file)
}

fn report(path: &Path) -> VerifyReport {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    verify(&path.into(), None, &runtime, &Cancel::default()).expect("a report")
}

fn status(report: &VerifyReport, name: &str, subject: &str) -> CheckStatus {
    let check = report.checks.iter().find(|check| check.name == name && check.subject.contains(subject));
    check.unwrap_or_else(|| panic!("no check `{name}` of `{subject}` in {:#?}", report.checks)).status
}

fn copy_of(folder: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().expect("folder");
    for entry in std::fs::read_dir(zoo(folder)).expect("zoo") {
        let path = entry.expect("entry").path();
        std::fs::write(target.path().join(path.file_name().expect("name")), std::fs::read(&path).expect("read"))
            .expect("write");
    }
    target
}

/// An Optimum folder with the graph of its second optimisation level.
fn optimised() -> tempfile::TempDir {
    let folder = copy_of("optimum/llama-with-past");
    for (source, name) in [("llama/optimum-O2.onnx", "model.onnx"), ("llama/weights.data", "weights.data")] {
        std::fs::copy(zoo(source), folder.path().join(name)).expect("copy");
    }
    folder
}

#[test]
fn a_sound_model_passes_every_check() {
    let folder = optimised();
    let report = report(folder.path());
    assert!(report.passed, "{:#?}", report.checks);
    for name in ["loads in ONNX Runtime", "plans in tract", "cached step equals longer prefill", "interpreter"] {
        assert_eq!(status(&report, name, "model.onnx"), CheckStatus::Passed, "{name}");
    }
    assert_eq!(status(&report, "config and graph", "num_hidden_layers"), CheckStatus::Passed);
    assert_eq!(status(&report, "config and graph", "head_dim"), CheckStatus::Passed);
    let compared: Vec<_> = report.checks.iter().filter(|check| check.tolerance.is_some()).collect();
    assert!(!compared.is_empty(), "{:#?}", report.checks);
    for check in compared {
        assert!(check.difference <= Some(1e-4), "{check:?}");
    }
}

#[test]
fn the_shipped_model_passes_every_check_that_tract_allows() {
    let report = report(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model"));
    assert!(report.passed, "{:#?}", report.checks);
    for part in ["vision_encoder", "embed_tokens", "decoder"] {
        assert_eq!(status(&report, "loads in ONNX Runtime", part), CheckStatus::Passed, "{part}");
        assert_eq!(status(&report, "interpreter", part), CheckStatus::Passed, "{part}");
    }
    assert_eq!(status(&report, "plans in tract", "decoder"), CheckStatus::Passed);
    assert_eq!(status(&report, "cached step equals longer prefill", "decoder"), CheckStatus::Passed);
    assert_eq!(status(&report, "picture and prompt", ""), CheckStatus::Passed);
}

#[test]
fn an_unavailable_check_is_reported_and_fails_nothing() {
    let folder = copy_of("genai/qwen3_vl-int4-embeds");
    let config = std::fs::read(zoo("genai/qwen3_vl-fp32-embeds/genai_config.json")).expect("config");
    std::fs::write(folder.path().join("genai_config.json"), config).expect("write");
    let fused = report(folder.path());
    assert!(fused.passed, "{:#?}", fused.checks);
    assert_eq!(status(&fused, "plans in tract", "model.onnx"), CheckStatus::Unavailable);
    let interpreter = fused.checks.iter().find(|check| check.name == "interpreter").expect("interpreter");
    assert!(interpreter.status == CheckStatus::Passed && interpreter.tolerance == Some(1e-4), "{interpreter:?}");
    assert!(interpreter.detail.contains("asked to compute in f32"), "{interpreter:?}");
    assert_eq!(status(&fused, "cached step equals longer prefill", "model.onnx"), CheckStatus::Passed);
    let tract = fused.checks.iter().find(|check| check.name == "plans in tract").expect("tract");
    assert!(tract.detail.contains("MRotaryEmbedding"), "{tract:?}");
    let quantised = report(&zoo("post/llama-ts17__int8.onnx"));
    let cached = quantised.checks.iter().find(|check| check.name.starts_with("cached step")).expect("cached step");
    assert!(cached.detail.contains("DynamicQuantizeLinear"), "{cached:?}");
}

/// Half precision is compared in f32 in both engines, and the effect of rounding is reported separately.
#[test]
fn half_precision_is_compared_in_f32() {
    let file = zoo("post/qwen3_vl-ts17__fp16.onnx");
    let sound = report(&file);
    assert!(sound.passed, "{:#?}", sound.checks);
    let check = |report: &VerifyReport, name: &str| {
        report.checks.iter().find(|check| check.name == name).cloned().unwrap_or_else(|| panic!("no check `{name}`"))
    };
    for name in ["interpreter", "cached step equals longer prefill"] {
        let check = check(&sound, name);
        assert!(check.tolerance == Some(1e-4) && check.difference <= Some(1e-5), "{check:?}");
    }
    let rounding = check(&sound, "rounding to 16 bits");
    assert!(rounding.difference > Some(1e-4) && rounding.difference <= Some(5e-3), "{rounding:?}");
    assert!(rounding.tolerance <= Some(0.05), "{rounding:?}");

    // Logits too large for f16: finite in f32, infinite in the file as it is.
    let mut model = onnx::load(&file).expect("model");
    let graph = &mut model.graph;
    let logits = graph.body.outputs[0];
    let ty = Some(ValueType::Tensor { dtype: DataType::Float16, shape: None });
    let [small, scale] = ["small", "scale"]
        .map(|name| graph.add_value(Value { name: name.into(), ty: ty.clone(), ..Default::default() }));
    let head = graph.body.nodes.iter_mut().find(|node| node.outputs.contains(&Some(logits))).expect("head");
    head.outputs = vec![Some(small)];
    let large = half::f16::from_f32(6e4).to_le_bytes().to_vec();
    graph.body.initializers.push((scale, ir::Tensor::from_bytes(DataType::Float16, &[1], large)));
    let (inputs, outputs) = (vec![Some(small), Some(scale)], vec![Some(logits)]);
    graph.body.nodes.push(Node { op_type: "Mul".into(), inputs, outputs, ..Default::default() });
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("model.onnx");
    onnx::save(&model, &path, &onnx::Storage::Inline).expect("save");
    let broken = check(&report(&path), "rounding to 16 bits");
    assert!(broken.status == CheckStatus::Failed && broken.difference == Some(f64::INFINITY), "{broken:?}");
}

#[test]
fn a_config_that_disagrees_with_its_graph_fails() {
    let folder = copy_of("optimum/llama-with-past");
    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).expect("config");
    std::fs::write(&path, config.replace("\"num_hidden_layers\": 8", "\"num_hidden_layers\": 7")).expect("write");
    let report = report(folder.path());
    assert!(!report.passed);
    let check = report.checks.iter().find(|check| check.subject.starts_with("num_hidden_layers")).expect("layers");
    assert_eq!(check.status, CheckStatus::Failed);
    assert!(check.detail.contains('7') && check.detail.contains('8'), "{check:?}");
}

#[test]
fn a_truncated_file_fails() {
    let folder = copy_of("optimum/llama-with-past");
    let path = folder.path().join("model.onnx");
    let bytes = std::fs::read(&path).expect("model");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("write");
    let report = report(folder.path());
    assert!(!report.passed);
    assert!(report.checks.iter().any(|check| check.status == CheckStatus::Failed && check.subject == "model.onnx"));
}

#[test]
fn any_graph_can_be_checked_on_given_inputs() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let folder = tempfile::tempdir().expect("folder");
    let graph = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model/onnx/embed_tokens.onnx");
    let given = |arrays: &[(&str, tch::Tensor)]| {
        let path = folder.path().join("inputs.npz");
        tch::Tensor::write_npz(arrays, &path).expect("write");
        verify_on(&ModelSource::new(&graph, None), &path, &runtime)
    };
    let ids = || tch::Tensor::from_slice(&[3i64, 1, 4]).reshape([1, 3]);
    let report = given(&[("input_ids", ids())]).expect("a report");
    assert!(report.passed && report.checks.len() == 1, "{report:#?}");
    assert!(report.checks[0].difference <= Some(1e-4) && report.checks[0].tolerance == Some(1e-4), "{report:#?}");
    assert_eq!(report.provenance.inputs.len(), 2);
    for (arrays, problem) in [
        (vec![], "lacks an array for input `input_ids`"),
        (vec![("input_ids", ids()), ("other", ids())], "`other` is not an input"),
        (vec![("input_ids", ids().to_kind(tch::Kind::Float))], "`input_ids` is of float"),
    ] {
        let error = given(&arrays).expect_err(problem).to_string();
        assert!(error.contains(problem), "{error}");
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let error = verify_on(&ModelSource::new(&folder, None), &graph, &runtime).expect_err("a folder").to_string();
    assert!(error.contains("several graphs"), "{error}");
    assert!(
        verify_on(&ModelSource::new(&graph, None), &graph, &runtime)
            .expect_err("no npz")
            .to_string()
            .contains("not an .npz file")
    );
}

/// A product with a 4-bit weight that `DequantizeLinear` unpacks.
fn unpacked_product() -> ir::Model {
    let mut model = ir::Model { ir_version: 10, ..Default::default() };
    model.opset_imports.insert(String::new(), 21);
    let graph = &mut model.graph;
    graph.body.name = "product".into();
    let ty = |sizes: [i64; 2]| {
        Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(sizes.map(Dim::Known).to_vec()) })
    };
    let mut value = |name: &str, ty| graph.add_value(Value { name: name.into(), ty, ..Default::default() });
    let [x, y] = [value("x", ty([2, 64])), value("y", ty([2, 32]))];
    let [packed, scales, weight] = ["packed", "scales", "weight"].map(|name| value(name, None));
    let codes: Vec<u8> = (0..64 * 32 / 2u32).map(|index| (index * 89 % 251) as u8).collect();
    let steps: Vec<f32> = (0..2 * 32u16).map(|index| 0.1 + 0.001 * f32::from(index)).collect();
    graph.body.initializers.push((packed, ir::Tensor::from_bytes(DataType::Int4, &[64, 32], codes)));
    graph.body.initializers.push((scales, ir::Tensor::from_f32(&[2, 32], &steps)));
    let node = |op: &str, inputs: [ir::ValueId; 2], output| Node {
        op_type: op.into(),
        name: op.into(),
        inputs: inputs.map(Some).to_vec(),
        outputs: vec![Some(output)],
        ..Default::default()
    };
    let mut unpack = node("DequantizeLinear", [packed, scales], weight);
    unpack.attributes =
        [("axis", 0), ("block_size", 32)].map(|(name, value)| (name.into(), AttributeKind::Int(value).into())).to_vec();
    graph.body.nodes = vec![unpack, node("MatMul", [x, weight], y)];
    graph.body.inputs = vec![x];
    graph.body.outputs = vec![y];
    model
}

fn integer_product(codes: &[i8]) -> ir::Model {
    let mut model = ir::Model { ir_version: 8, ..Default::default() };
    model.opset_imports.insert(String::new(), 17);
    let graph = &mut model.graph;
    let ty = |sizes: [i64; 2]| {
        Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(sizes.map(Dim::Known).to_vec()) })
    };
    let width = codes.len() as i64;
    let mut value = |name: &str, ty| graph.add_value(Value { name: name.into(), ty, ..Default::default() });
    let [x, y] = [value("x", ty([2, width])), value("y", ty([2, 1]))];
    let [weight, rounded, scale, zero, sum, float] =
        ["weight", "rounded", "scale", "zero", "sum", "float"].map(|name| value(name, None));
    let bytes: Vec<u8> = codes.iter().map(|code| code.to_le_bytes()[0]).collect();
    graph.body.initializers.push((weight, ir::Tensor::from_bytes(DataType::Int8, &[width as u64, 1], bytes)));
    let node = |op: &str, inputs: &[ir::ValueId], outputs: &[ir::ValueId]| Node {
        op_type: op.into(),
        name: op.into(),
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: outputs.iter().copied().map(Some).collect(),
        ..Default::default()
    };
    let mut cast = node("Cast", &[sum], &[float]);
    cast.attributes = vec![("to".into(), AttributeKind::Int(DataType::Float as i64).into())];
    let mut product = node("MatMulInteger", &[rounded, weight, zero], &[sum]);
    product.inputs = vec![Some(rounded), Some(weight), Some(zero)];
    graph.body.nodes = vec![
        node("DynamicQuantizeLinear", &[x], &[rounded, scale, zero]),
        product,
        cast,
        node("Mul", &[float, scale], &[y]),
    ];
    graph.body.inputs = vec![x];
    graph.body.outputs = vec![y];
    model
}

/// Sums of products of unsigned and signed 8-bit numbers exceed 16 bits, where processors without VNNI saturate.
#[test]
fn integer_products_of_8_bits_are_compared_with_exact_sums() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let folder = tempfile::tempdir().expect("folder");
    let [graph, inputs] = ["product.onnx", "inputs.npz"].map(|name| folder.path().join(name));
    onnx::save(&integer_product(&[127; 64]), &graph, &onnx::Storage::Inline).expect("save");
    let x = tch::Tensor::linspace(0.0, 1.0, 128, tch::kind::FLOAT_CPU).reshape([2, 64]);
    tch::Tensor::write_npz(&[("x", &x)], &inputs).expect("write");
    let report = verify_on(&ModelSource::new(&graph, None), &inputs, &runtime).expect("a report");
    assert!(report.passed, "{report:#?}");
    assert_eq!(report.checks[0].tolerance, Some(1e-4), "{report:#?}");
}

#[test]
fn logits_under_another_name_are_a_problem() {
    let folder = copy_of("optimum/llama-with-past");
    let path = folder.path().join("model.onnx");
    let mut model = onnx::load(&path).expect("model");
    assert_eq!(status(&report(folder.path()), "output names", "model.onnx"), CheckStatus::Passed);
    let logits = model.graph.body.outputs[0];
    model.graph.values[logits.index()].name = "logits_Q4".into();
    let renamed = folder.path().join("renamed.onnx");
    onnx::save(&model, &renamed, &onnx::Storage::Inline).expect("save");
    drop(model);
    // A single graph too: nobody chooses such a name for logits on purpose.
    let alone = report(&renamed);
    assert!(!alone.passed && status(&alone, "output names", "renamed.onnx") == CheckStatus::Failed);
    std::fs::rename(renamed, path).expect("rename");
    let report = report(folder.path());
    assert!(!report.passed);
    let check = report.checks.iter().find(|check| check.name == "output names").expect("names");
    assert!(check.detail.contains("`logits_Q4`") && check.detail.contains("look for `logits`"), "{check:?}");
}

/// GenAI's embedding component takes the image features that it merges into the prompt.
fn embedding(vocabulary: u64, width: u64, image_token: i64) -> ir::Model {
    let mut model = ir::Model { ir_version: 8, ..Default::default() };
    model.opset_imports.insert(String::new(), 17);
    let graph = &mut model.graph;
    let ty = |dtype, dims: &[Option<i64>]| {
        let dims = dims.iter().map(|dim| dim.map_or(Dim::Unknown, Dim::Known)).collect();
        Some(ValueType::Tensor { dtype, shape: Some(dims) })
    };
    let wide = Some(width as i64);
    let mut value = |name: &str, ty| graph.add_value(Value { name: name.into(), ty, ..Default::default() });
    let ids = value("input_ids", ty(DataType::Int64, &[Some(1), None]));
    let features = value("image_features", ty(DataType::Float, &[None, wide]));
    let embeds = value("inputs_embeds", ty(DataType::Float, &[Some(1), None, wide]));
    let [table, token, plain, mask, places, indices] =
        ["table", "token", "plain", "mask", "places", "indices"].map(|name| value(name, None));
    let numbers: Vec<f32> = (0..vocabulary * width).map(|number| number as f32 / 100.0).collect();
    graph.body.initializers.push((table, ir::Tensor::from_f32(&[vocabulary, width], &numbers)));
    graph.body.initializers.push((token, ir::Tensor::from_i64(&[], &[image_token])));
    let node = |op: &str, inputs: &[ir::ValueId], output| Node {
        op_type: op.into(),
        name: op.into(),
        inputs: inputs.iter().copied().map(Some).collect(),
        outputs: vec![Some(output)],
        ..Default::default()
    };
    let mut turn = node("Transpose", &[places], indices);
    turn.attributes = vec![("perm".into(), AttributeKind::Ints(vec![1, 0]).into())];
    graph.body.nodes = vec![
        node("Gather", &[table, ids], plain),
        node("Equal", &[ids, token], mask),
        node("NonZero", &[mask], places),
        turn,
        node("ScatterND", &[plain, indices, features], embeds),
    ];
    graph.body.inputs = vec![ids, features];
    graph.body.outputs = vec![embeds];
    model
}

#[test]
fn an_embedding_that_takes_image_features_is_run_with_them() {
    let folder = copy_of("genai/qwen3_vl-fp32-embeds");
    let path = folder.path().join("genai_config.json");
    let text = std::fs::read_to_string(&path).expect("config");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let model = &mut config["model"];
    let (vocabulary, width) = (model["vocab_size"].as_u64(), model["decoder"]["hidden_size"].as_u64());
    let (vocabulary, width) = (vocabulary.expect("vocab_size"), width.expect("hidden_size"));
    model["embedding"] = serde_json::json!({"filename": "embedding.onnx"});
    model["image_token_id"] = 5.into();
    std::fs::write(&path, config.to_string()).expect("write");
    let target = folder.path().join("embedding.onnx");
    onnx::save(&embedding(vocabulary, width, 5), &target, &onnx::Storage::Inline).expect("save");
    let report = report(folder.path());
    assert!(report.passed, "{:#?}", report.checks);
    assert_eq!(status(&report, "interpreter", "embedding.onnx"), CheckStatus::Passed);
    assert_eq!(status(&report, "interpreter", "model.onnx"), CheckStatus::Passed);
}

#[test]
fn products_with_unpacked_4_bit_weights_are_compared_in_f32() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let folder = tempfile::tempdir().expect("folder");
    let [graph, inputs] = ["product.onnx", "inputs.npz"].map(|name| folder.path().join(name));
    onnx::save(&unpacked_product(), &graph, &onnx::Storage::Inline).expect("save");
    let x = tch::Tensor::arange(128, tch::kind::FLOAT_CPU).sin().reshape([2, 64]);
    tch::Tensor::write_npz(&[("x", &x)], &inputs).expect("write");
    let report = verify_on(&ModelSource::new(&graph, None), &inputs, &runtime).expect("a report");
    assert!(report.passed && report.checks[0].difference <= Some(1e-4), "{report:#?}");

    // The result of the check if ONNX Runtime used its default precision.
    let x = TensorValue::from_f32(DataType::Float, &[2, 64], Vec::<f32>::try_from(x.flatten(0, -1)).expect("floats"));
    let x = x.expect("tensor");
    let product = |options: &SessionOptions| {
        let mut session = runtime.session(&graph, options).expect("session");
        session.run(&[("x", &x)], None).expect("run").take("y").expect("y").to_f32().expect("floats").into_owned()
    };
    let exact = product(&SessionOptions { exact_products: true, ..SessionOptions::default() });
    let left = product(&SessionOptions::default());
    assert!(exact.iter().zip(&left).any(|(a, b)| (a - b).abs() > 1e-3), "{exact:?} {left:?}");
}
