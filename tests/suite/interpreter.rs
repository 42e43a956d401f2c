//! The interpreter gives the results of ONNX Runtime on exported graphs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use interlace::analysis::analyse;
use interlace::base::Device;
use interlace::ir::{self, AttributeKind, DataType, Dim, Node, Value, ValueId, ValueType};
use interlace::rewrite::{drop_layers, widened};
use interlace::runtime::{Optimisation, Runtime, Session, SessionOptions, TensorValue};
use interlace::{onnx, torch};
use tch::{Kind, Tensor};

pub const ONE_THREAD: SessionOptions =
    SessionOptions { threads: Some(1), optimisation: Optimisation::All, exact_products: false, memory_limit: None };

/// A tensor for ONNX Runtime with the same content.
fn to_runtime(tensor: &Tensor) -> TensorValue {
    let shape: Vec<usize> = tensor.size().iter().map(|&dim| dim as usize).collect();
    let flat = tensor.contiguous().reshape([-1]);
    let dtype = torch::data_type_of(tensor.kind()).expect("element type");
    if tensor.numel() == 0 {
        return TensorValue::empty(dtype, &shape).expect("empty tensor");
    }
    let made = match dtype {
        DataType::Float | DataType::Float16 | DataType::Bfloat16 => {
            TensorValue::from_f32(dtype, &shape, Vec::try_from(flat.to_kind(Kind::Float)).expect("numbers"))
        }
        DataType::Uint8 => TensorValue::new(&shape, Vec::<u8>::try_from(flat).expect("numbers")),
        DataType::Int8 => TensorValue::new(&shape, Vec::<i8>::try_from(flat).expect("numbers")),
        _ => TensorValue::from_i64(dtype, &shape, Vec::try_from(flat.to_kind(Kind::Int64)).expect("numbers")),
    };
    made.expect("tensor")
}

/// The content as f64, for any type.
fn from_runtime(tensor: &TensorValue) -> Tensor {
    let shape: Vec<i64> = tensor.shape().iter().map(|&dim| dim as i64).collect();
    let flat = match tensor.dtype().expect("element type") {
        DataType::Int64 => Tensor::from_slice(tensor.data::<i64>().expect("numbers")),
        DataType::Int32 => Tensor::from_slice(tensor.data::<i32>().expect("numbers")),
        DataType::Uint8 => Tensor::from_slice(tensor.data::<u8>().expect("numbers")),
        DataType::Int8 => Tensor::from_slice(tensor.data::<i8>().expect("numbers")),
        DataType::Bool => Tensor::from_slice(tensor.data::<bool>().expect("numbers")),
        _ => Tensor::from_slice(&tensor.to_f32().expect("numbers")),
    };
    flat.to_kind(Kind::Double).reshape(&shape)
}

/// Largest difference between the results of the two engines. Infinities that are equal in both are ignored.
pub fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size(), "shapes differ");
    if ours.numel() == 0 {
        return 0.0;
    }
    let ours = ours.detach().to_kind(Kind::Double);
    let same = ours.eq_tensor(theirs);
    (ours - theirs).abs().masked_fill(&same, 0.0).max().double_value(&[])
}

pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// Inputs of one step: from the file, from the step before, or an empty cache.
pub fn feeds(
    model: &ir::Model,
    data: &HashMap<String, Tensor>,
    step: &str,
    past: &HashMap<String, Tensor>,
) -> Vec<(String, ValueId, Tensor)> {
    let graph = &model.graph;
    let cache = data["exp.present.0.key"].size();
    let inputs = graph.body.inputs.iter().filter(|id| graph.body.initializer(**id).is_none());
    inputs
        .map(|&id| {
            let name = graph.name(id);
            let ty = graph.value(id).ty.as_ref().expect("declared type");
            let kind = torch::kind_of(ty.dtype().expect("dense")).expect("element type");
            let shape = ty.shape().expect("declared shape");
            let given = data.get(&format!("{step}.{name}")).or_else(|| past.get(name)).map(Tensor::shallow_clone);
            let mut tensor = given.unwrap_or_else(|| match name {
                "cache_position" => data[&format!("{step}.position_ids")].reshape([-1]),
                _ => {
                    let size = |(axis, dim): (usize, &Dim)| match dim {
                        Dim::Known(size) if *size > 0 || axis == 2 => *size,
                        _ if axis == 2 => 0,
                        _ => cache[axis],
                    };
                    Tensor::zeros(shape.iter().enumerate().map(size).collect::<Vec<i64>>(), (kind, tch::Device::Cpu))
                }
            });
            if name == "position_ids" && shape.len() == 2 && tensor.dim() == 3 {
                tensor = tensor.select(0, 0);
            }
            (name.to_string(), id, tensor.to_kind(kind))
        })
        .collect()
}

/// Name of the past input for a present output, by the naming patterns of the exporters.
fn past_name(present: &str) -> String {
    if let Some(rest) = present.strip_prefix("output.") {
        return format!("input.{rest}");
    }
    if let Some(rest) = present.strip_prefix("updated_") {
        return rest.to_string();
    }
    match present.split_once('.') {
        Some((_, rest)) => format!("past_key_values.{rest}"),
        None => present.to_string(),
    }
}

pub fn run_runtime(session: &mut Session, feeds: &[(String, ValueId, Tensor)]) -> HashMap<String, Tensor> {
    let tensors: Vec<(&str, TensorValue)> =
        feeds.iter().map(|(name, _, tensor)| (name.as_str(), to_runtime(tensor))).collect();
    let tensors: Vec<(&str, &TensorValue)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let outputs = session.run(&tensors, None).expect("ONNX Runtime");
    outputs.iter().map(|(name, tensor)| (name.to_string(), from_runtime(tensor))).collect()
}

pub fn run_torch(program: &torch::Program, feeds: &[(String, ValueId, Tensor)]) -> HashMap<String, Tensor> {
    let inputs: Vec<(ValueId, Tensor)> = feeds.iter().map(|(_, id, tensor)| (*id, tensor.shallow_clone())).collect();
    let results = tch::no_grad(|| program.run(&inputs, program.outputs())).expect("interpreter");
    program.outputs().iter().map(|&id| program.name(id).to_string()).zip(results).collect()
}

fn compare(file: &str, step: &str, ours: &HashMap<String, Tensor>, theirs: &HashMap<String, Tensor>, tolerance: f64) {
    assert_eq!(ours.len(), theirs.len(), "{file}: outputs differ");
    for (name, result) in ours {
        let worst = difference(result, &theirs[name]);
        assert!(worst <= tolerance, "{file}: {step}: `{name}` differs by {worst:e}, {tolerance:e} allowed");
    }
}

/// Decoders for prefill and one cached step, with the file of their inputs.
const DECODERS: &[(&str, &str)] = &[
    ("model/onnx/decoder_model_merged.onnx", "expected/nodrop.npz"),
    ("zoo/smolvlm/ts17.onnx", "zoo/expected/smolvlm.nodrop.npz"),
    ("zoo/qwen3_vl/ts17.onnx", "zoo/expected/qwen3_vl.nodrop.npz"),
    ("zoo/llama/dyn18-ids.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/dyn18/qwen2_vl/decoder_model_merged.onnx", "zoo/expected/qwen2_vl.nodrop.npz"),
    ("zoo/qwen3_vl/dyn23.onnx", "zoo/expected/qwen3_vl.nodrop.npz"),
    ("zoo/genai/llama-fp32-embeds/model.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/genai/qwen3_vl-fp32-embeds/model.onnx", "zoo/expected/qwen3_vl.nodrop.npz"),
    ("zoo/hfexp/llama-cpu/decode.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/hfexp/llama-cpu/prefill.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/qwen3_vl/mobius.onnx", "zoo/expected/qwen3_vl.nodrop.npz"),
    ("zoo/llama/optimum-O2.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/optimum/llama-with-past/model.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/llama/ts17-noname.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/post/llama-ts17__int8.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/post/llama-ts17__qdq.onnx", "zoo/expected/llama.nodrop.npz"),
    ("zoo/smolvlm/ts17-slim.onnx", "zoo/expected/smolvlm.nodrop.npz"),
    ("zoo/post/qwen3_vl-ts17__fp16.onnx", "zoo/expected/qwen3_vl.nodrop.npz"),
];

/// 4-bit decoders: folder and network.
const IN_4_BITS: &[(&str, &str)] = &[("genai/qwen3_vl-int4-embeds", "qwen3_vl"), ("genai/llama-int4-shared", "llama")];

#[test]
fn exported_decoders_agree_with_onnx_runtime() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::set_num_threads(1);
    for (file, expected) in DECODERS {
        let path = fixture(file);
        let model = onnx::load(&path).expect(file);
        let data: HashMap<String, Tensor> = Tensor::read_npz(fixture(expected)).expect(expected).into_iter().collect();
        let program = torch::Program::compile(&model, &torch::Options::default()).expect(file);
        // The interpreter computes half precision in f32, so ONNX Runtime gets the model in f32 too.
        match widened(&model) {
            None => {
                let mut session = runtime.session(&path, &ONE_THREAD).expect(file);
                both_steps(file, &model, &program, &mut session, &data, 1e-4);
            }
            Some(wide) => {
                let mut session = runtime.session_of(&wide, &ONE_THREAD).expect(file);
                both_steps(file, &wide, &program, &mut session, &data, 1e-4);
            }
        }
    }
}

/// The tables of this file list every graph of the zoo.
#[test]
fn every_graph_of_the_zoo_is_in_the_tables_of_decoders() {
    let root = fixture("zoo");
    let mut known: Vec<PathBuf> = DECODERS.iter().map(|(file, _)| fixture(file)).collect();
    known.extend(IN_4_BITS.iter().map(|(folder, _)| root.join(folder).join("model.onnx")));
    let mut open = vec![root];
    let mut found = 0;
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("zoo") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "onnx") {
                assert!(known.contains(&path), "{} is in no table", path.display());
                found += 1;
            }
        }
    }
    assert!(found >= 18, "{found} graphs");
}

/// Compares prefill and one step with the cache of the prefill.
fn both_steps(
    file: &str,
    model: &ir::Model,
    program: &torch::Program,
    session: &mut Session,
    data: &HashMap<String, Tensor>,
    tolerance: f64,
) {
    let prefill = feeds(model, data, "in", &HashMap::new());
    let ours = run_torch(program, &prefill);
    compare(file, "prefill", &ours, &run_runtime(session, &prefill), tolerance);
    let past: HashMap<String, Tensor> =
        ours.iter().map(|(name, tensor)| (past_name(name), tensor.shallow_clone())).collect();
    let decode = feeds(model, data, "in2", &past);
    compare(file, "decode", &run_torch(program, &decode), &run_runtime(session, &decode), tolerance);
    // Run again, now with the values that are cached for these shapes.
    compare(file, "prefill again", &run_torch(program, &prefill), &ours_as_f64(&ours), 0.0);
}

fn ours_as_f64(ours: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    ours.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Double))).collect()
}

/// The gradients of one network's weights do not depend on its export: plain operators, the dynamo exporter, Optimum,
/// and operators fused by ONNX Runtime.
#[test]
fn gradients_agree_across_exporters() {
    tch::set_num_threads(1);
    let data: HashMap<String, Tensor> =
        Tensor::read_npz(fixture("zoo/expected/llama.nodrop.npz")).expect("expected values").into_iter().collect();
    let files = [
        "llama/dyn18-ids.onnx",
        "optimum/llama-with-past/model.onnx",
        "llama/optimum-O2.onnx",
        "genai/llama-fp32-embeds/model.onnx",
        "hfexp/llama-cpu/decode.onnx",
    ];
    // Gradients by the content of the weight, for matrices with unique content.
    let mut known: HashMap<Vec<u8>, Tensor> = HashMap::new();
    for (number, file) in files.into_iter().enumerate() {
        let model = onnx::load(&fixture("zoo").join(file)).expect(file);
        let matrices = model.graph.body.initializers.iter().filter(|(_, t)| t.dims == [64, 128] || t.dims == [64, 64]);
        let chosen: Vec<ValueId> = matrices.map(|(id, _)| *id).collect();
        let options = torch::Options { trainable: chosen.clone(), ..Default::default() };
        let program = torch::Program::compile(&model, &options).expect(file);
        let inputs: Vec<(ValueId, Tensor)> =
            feeds(&model, &data, "in", &HashMap::new()).into_iter().map(|(_, id, tensor)| (id, tensor)).collect();
        let logits = program.run(&inputs, &[program.value("logits").expect("logits")]).expect(file).remove(0);
        let weights = Tensor::arange(logits.numel() as i64, tch::kind::FLOAT_CPU).sin().reshape(logits.size());
        (logits * weights).sum(Kind::Float).backward();
        let mut compared = 0;
        for parameter in program.parameters() {
            let content = model.graph.body.initializer(parameter.id).expect("weight").bytes().to_vec();
            let gradient = parameter.tensor.grad();
            if let Some(other) = known.get(&content) {
                let scale = 1.0 + other.abs().max().double_value(&[]);
                let worst = (&gradient - other).abs().max().double_value(&[]) / scale;
                assert!(worst < 1e-5, "{file}: the gradient of `{}` differs by {worst:e}", parameter.name);
                compared += 1;
            }
            known.insert(content, gradient);
        }
        assert!(number == 0 || compared >= 16, "{file}: only {compared} weights equal those of the other exports");
    }
}

/// The vision encoder and the embeddings of the shipped model.
#[test]
fn other_components_agree_with_onnx_runtime() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::set_num_threads(1);
    tch::manual_seed(3);
    let random = |shape: &[i64]| Tensor::randn(shape, tch::kind::FLOAT_CPU);
    let ids = Tensor::from_slice(&[5i64, 0, 17, 3]).reshape([2, 2]);
    let shown = Tensor::ones([2, 1, 64, 64], (Kind::Bool, tch::Device::Cpu));
    let cases = [
        ("vision_encoder.onnx", vec![("pixel_values", random(&[2, 1, 3, 64, 64])), ("pixel_attention_mask", shown)]),
        ("embed_tokens.onnx", vec![("input_ids", ids)]),
    ];
    for (file, inputs) in cases {
        let path = fixture("model/onnx").join(file);
        let model = onnx::load(&path).expect(file);
        let program = torch::Program::compile(&model, &torch::Options::default()).expect(file);
        let mut session = runtime.session(&path, &ONE_THREAD).expect(file);
        let feeds: Vec<(String, ValueId, Tensor)> = inputs
            .iter()
            .map(|(name, tensor)| (name.to_string(), program.value(name).expect(name), tensor.shallow_clone()))
            .collect();
        compare(file, "once", &run_torch(&program, &feeds), &run_runtime(&mut session, &feeds), 1e-4);
    }
}

/// A 4-bit decoder, dense and without layers 2 and 5. ONNX Runtime has to compute the products in f32, because by
/// default it rounds the activations to 8 bits.
#[test]
fn a_decoder_in_4_bits_agrees_with_onnx_runtime() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::set_num_threads(1);
    for (file, network) in IN_4_BITS {
        let mut dense = onnx::load(&fixture("zoo").join(file).join("model.onnx")).expect(file);
        let products = dense.graph.body.nodes.iter_mut().filter(|node| node.op_type == "MatMulNBits");
        for (_, attribute) in
            products.flat_map(|node| &mut node.attributes).filter(|(name, _)| name == "accuracy_level")
        {
            attribute.kind = AttributeKind::Int(1);
        }
        let pruned = drop_layers(&analyse(&dense).expect(file), &[2, 5]).expect(file);
        let data = fixture(&format!("zoo/expected/{network}.nodrop.npz"));
        let data: HashMap<String, Tensor> = Tensor::read_npz(data).expect(file).into_iter().collect();
        for model in [dense, pruned] {
            let program = torch::Program::compile(&model, &torch::Options::default()).expect(file);
            let mut session = runtime.session_of(&model, &ONE_THREAD).expect(file);
            both_steps(file, &model, &program, &mut session, &data, 1e-4);
        }
    }
}

/// Rounds the sums that skip norms output to half precision, as half-precision exports do around f32 norms.
fn with_half_stream(model: &ir::Model) -> ir::Model {
    let mut model = model.clone();
    let mut position = 0;
    while position < model.graph.body.nodes.len() {
        let node = &model.graph.body.nodes[position];
        position += 1;
        let sum = node.outputs.get(3).copied().flatten();
        let Some(sum) = sum.filter(|_| node.op_type == "SkipSimplifiedLayerNormalization") else { continue };
        let source = model.graph.value(sum).clone();
        let mut cast = |name: &str, dtype: DataType, input| {
            let ty = Some(ValueType::Tensor { dtype, shape: None });
            let name = format!("{}/{name}", source.name);
            let output = model.graph.add_value(Value { name: name.clone(), ty, ..Default::default() });
            let to = ("to".to_string(), AttributeKind::Int(dtype as i64).into());
            let (inputs, outputs) = (vec![Some(input)], vec![Some(output)]);
            (Node { op_type: "Cast".into(), name, inputs, outputs, attributes: vec![to], ..Default::default() }, output)
        };
        let (down, half) = cast("half", DataType::Float16, sum);
        let (up, wide) = cast("wide", DataType::Float, half);
        for input in model.graph.body.nodes[position..].iter_mut().flat_map(|node| &mut node.inputs) {
            if *input == Some(sum) {
                *input = Some(wide);
            }
        }
        model.graph.body.nodes.splice(position..position, [down, up]);
        position += 2;
    }
    model
}

/// A half-precision stream around f32 norms: a dropped layer adds no rounding, and its skip norm stays fused.
#[test]
fn a_dropped_layer_does_not_round_the_stream() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let dense = onnx::load(&fixture("zoo/genai/llama-fp32-embeds/model.onnx")).expect("model");
    let data = Tensor::read_npz(fixture("zoo/expected/llama.nodrop.npz")).expect("expected values");
    // The embeddings are already in half precision, so rounding them again changes nothing.
    let halved = |tensor: Tensor| if tensor.is_floating_point() { tensor.to_kind(Kind::Half) } else { tensor };
    let data: HashMap<String, Tensor> = data.into_iter().map(|(name, tensor)| (name, halved(tensor))).collect();
    let logits = |model: &ir::Model| {
        let mut session = runtime.session_of(model, &ONE_THREAD).expect("session");
        run_runtime(&mut session, &feeds(model, &data, "in", &HashMap::new())).remove("logits").expect("logits")
    };
    let dropped =
        |model: &ir::Model, layers: &[usize]| drop_layers(&analyse(model).expect("layers"), layers).expect("pruned");
    let fused = |model: &ir::Model| {
        model.graph.body.nodes.iter().filter(|node| node.op_type == "SkipSimplifiedLayerNormalization").count()
    };
    for layers in [&[2, 5][..], &[0, 7], &[3]] {
        let (want, found) = (with_half_stream(&dropped(&dense, layers)), dropped(&with_half_stream(&dense), layers));
        assert_eq!(fused(&found), fused(&want), "{layers:?}");
        assert_eq!(difference(&logits(&found), &logits(&want)), 0.0, "{layers:?}");
    }
    assert!(difference(&logits(&with_half_stream(&dense)), &logits(&dense)) > 1e-4, "nothing was rounded");
}
