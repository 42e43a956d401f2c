//! The interpreter computes what ONNX Runtime computes, on exported graphs and operator by operator.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use interlace::base::Device;
use interlace::ir::{self, AttributeKind, DataType, Dim, Node, Value, ValueId, ValueType};
use interlace::runtime::{Optimisation, Runtime, Session, SessionOptions, Tensor as OrtTensor};
use interlace::{onnx, torch};
use tch::{Kind, Tensor};

const ONE_THREAD: SessionOptions = SessionOptions { threads: Some(1), optimisation: Optimisation::All };

/// A tensor for ONNX Runtime with the same content.
fn to_runtime(tensor: &Tensor) -> OrtTensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&dim| dim as usize).collect();
    let flat = tensor.contiguous().reshape([-1]);
    let dtype = torch::data_type_of(tensor.kind()).expect("element type");
    if tensor.numel() == 0 {
        return OrtTensor::empty(dtype, &shape).expect("empty tensor");
    }
    let made = match dtype {
        DataType::Float | DataType::Float16 | DataType::Bfloat16 => {
            OrtTensor::from_f32(dtype, &shape, Vec::try_from(flat.to_kind(Kind::Float)).expect("numbers"))
        }
        DataType::Uint8 => OrtTensor::new(&shape, Vec::<u8>::try_from(flat).expect("numbers")),
        DataType::Int8 => OrtTensor::new(&shape, Vec::<i8>::try_from(flat).expect("numbers")),
        _ => OrtTensor::from_i64(dtype, &shape, Vec::try_from(flat.to_kind(Kind::Int64)).expect("numbers")),
    };
    made.expect("tensor")
}

/// The content as f64, whatever the type.
fn from_runtime(tensor: &OrtTensor) -> Tensor {
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

/// Largest difference between results of the two engines, the infinities that both have left out.
fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
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

/// The past that a present becomes, by the naming patterns of the exporters.
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

fn run_runtime(session: &mut Session, feeds: &[(String, ValueId, Tensor)]) -> HashMap<String, Tensor> {
    let tensors: Vec<(&str, OrtTensor)> =
        feeds.iter().map(|(name, _, tensor)| (name.as_str(), to_runtime(tensor))).collect();
    let tensors: Vec<(&str, &OrtTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let outputs = session.run(&tensors, None).expect("ONNX Runtime");
    outputs.iter().map(|(name, tensor)| (name.to_string(), from_runtime(tensor))).collect()
}

fn run_torch(program: &torch::Program, feeds: &[(String, ValueId, Tensor)]) -> HashMap<String, Tensor> {
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

/// Decoders in prefill and in one step with cache.
#[test]
fn exported_decoders_agree_with_onnx_runtime() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::set_num_threads(1);
    for (file, expected, tolerance) in [
        ("model/onnx/decoder_model_merged.onnx", "expected/nodrop.npz", 1e-4),
        ("zoo/ts17/smolvlm/decoder_model_merged.onnx", "zoo/expected/smolvlm.nodrop.npz", 1e-4),
        ("zoo/ts17/qwen3_vl/decoder_model_merged.onnx", "zoo/expected/qwen3_vl.nodrop.npz", 1e-4),
        ("zoo/dyn18/llama-ids/model.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/dyn18/qwen2_vl/decoder_model_merged.onnx", "zoo/expected/qwen2_vl.nodrop.npz", 1e-4),
        ("zoo/dyn23/qwen3_vl/decoder_model_merged.onnx", "zoo/expected/qwen3_vl.nodrop.npz", 1e-4),
        ("zoo/genai/llama-fp32-embeds/model.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/genai/qwen3_vl-fp32-embeds/model.onnx", "zoo/expected/qwen3_vl.nodrop.npz", 1e-4),
        ("zoo/hfexp/llama-cpu/decode.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/mobius/qwen3_vl/decoder/model.onnx", "zoo/expected/qwen3_vl.nodrop.npz", 1e-4),
        ("zoo/optimum/llama-O2/model.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/optimum/llama-with-past/model.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/post/llama-ts17__noname.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/post/llama-ts17__int8.onnx", "zoo/expected/llama.nodrop.npz", 1e-4),
        ("zoo/post/smolvlm-ts17__slim.onnx", "zoo/expected/smolvlm.nodrop.npz", 1e-4),
        // Half precision: 11 bits of mantissa over values of order 1, eight layers deep.
        ("zoo/post/qwen3_vl-ts17__fp16.onnx", "zoo/expected/qwen3_vl.nodrop.npz", 5e-3),
    ] {
        let path = fixture(file);
        let model = onnx::load(&path).expect(file);
        let data: HashMap<String, Tensor> = Tensor::read_npz(fixture(expected)).expect(expected).into_iter().collect();
        let program = torch::Program::compile(&model, &torch::Options::default()).expect(file);
        let mut session = runtime.session(&path, &ONE_THREAD).expect(file);
        let prefill = feeds(&model, &data, "in", &HashMap::new());
        let ours = run_torch(&program, &prefill);
        compare(file, "prefill", &ours, &run_runtime(&mut session, &prefill), tolerance);
        let past: HashMap<String, Tensor> =
            ours.iter().map(|(name, tensor)| (past_name(name), tensor.shallow_clone())).collect();
        let decode = feeds(&model, &data, "in2", &past);
        compare(file, "decode", &run_torch(&program, &decode), &run_runtime(&mut session, &decode), tolerance);
        // Again, now with what was kept for these shapes.
        compare(file, "prefill again", &run_torch(&program, &prefill), &ours_as_f64(&ours), 0.0);
    }
}

fn ours_as_f64(ours: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    ours.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Double))).collect()
}

/// The gradients of one network's weights do not depend on how it was exported: plain operators, dynamo's, Optimum's,
/// and ONNX Runtime's fused ones.
#[test]
fn gradients_agree_across_exporters() {
    tch::set_num_threads(1);
    let data: HashMap<String, Tensor> =
        Tensor::read_npz(fixture("zoo/expected/llama.nodrop.npz")).expect("expected values").into_iter().collect();
    let files = [
        "dyn18/llama-ids/model.onnx",
        "optimum/llama-with-past/model.onnx",
        "optimum/llama-O2/model.onnx",
        "genai/llama-fp32-embeds/model.onnx",
        "hfexp/llama-cpu/decode.onnx",
    ];
    // Gradients by the content of the weight, for matrices that no other weight equals.
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
        assert!(number == 0 || compared >= 16, "{file}: only {compared} weights are those of the other exports");
    }
}

/// The shipped model's vision encoder and embeddings.
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

/// One operator in a graph of its own.
struct Single {
    op: &'static str,
    attributes: Vec<(&'static str, AttributeKind)>,
    inputs: Vec<Option<Tensor>>,
    outputs: usize,
    /// Element type that ONNX asks of each output.
    dtype: DataType,
}

fn single(op: &'static str, inputs: Vec<Option<Tensor>>, outputs: usize) -> Single {
    Single { op, attributes: Vec::new(), inputs, outputs, dtype: DataType::Float }
}

impl Single {
    fn int(mut self, name: &'static str, value: i64) -> Self {
        self.attributes.push((name, AttributeKind::Int(value)));
        self
    }

    fn float(mut self, name: &'static str, value: f32) -> Self {
        self.attributes.push((name, AttributeKind::Float(value)));
        self
    }

    fn text(mut self, name: &'static str, value: &str) -> Self {
        self.attributes.push((name, AttributeKind::String(value.as_bytes().to_vec())));
        self
    }

    fn ints(mut self, name: &'static str, values: &[i64]) -> Self {
        self.attributes.push((name, AttributeKind::Ints(values.to_vec())));
        self
    }

    fn model(&self) -> ir::Model {
        let mut model = ir::Model { ir_version: 10, ..Default::default() };
        model.opset_imports.insert(String::new(), 21);
        model.opset_imports.insert("com.microsoft".into(), 1);
        let graph = &mut model.graph;
        graph.body.name = "single".into();
        let mut node =
            Node { op_type: self.op.into(), domain: "com.microsoft".into(), name: "node".into(), ..Default::default() };
        for (number, input) in self.inputs.iter().enumerate() {
            node.inputs.push(input.as_ref().map(|tensor| {
                let shape = tensor.size().iter().map(|&dim| Dim::Known(dim)).collect();
                let dtype = torch::data_type_of(tensor.kind()).expect("element type");
                let ty = Some(ValueType::Tensor { dtype, shape: Some(shape) });
                let id = graph.add_value(Value { name: format!("in{number}"), ty, ..Default::default() });
                graph.body.inputs.push(id);
                id
            }));
        }
        for number in 0..self.outputs {
            let ty = Some(ValueType::Tensor { dtype: self.dtype, shape: None });
            let id = graph.add_value(Value { name: format!("out{number}"), ty, ..Default::default() });
            graph.body.outputs.push(id);
            node.outputs.push(Some(id));
        }
        node.attributes = self.attributes.iter().map(|(name, kind)| (name.to_string(), kind.clone().into())).collect();
        graph.body.nodes.push(node);
        model
    }
}

fn normal(shape: &[i64]) -> Option<Tensor> {
    Some(Tensor::randn(shape, tch::kind::FLOAT_CPU))
}

fn int32(values: &[i32]) -> Option<Tensor> {
    Some(Tensor::from_slice(values))
}

fn int64(shape: &[i64], values: &[i64]) -> Option<Tensor> {
    Some(Tensor::from_slice(values).reshape(shape))
}

/// Query, key, value, past key, past value, seqlens_k and total length of a grouped-query attention with 4 heads over 2.
fn gqa(batch: i64, steps: i64, past: i64, packed: bool) -> Vec<Option<Tensor>> {
    let total = (steps + past) as i32;
    let (query, key) =
        if packed { (normal(&[batch, steps, 8 * 16]), false) } else { (normal(&[batch, steps, 4 * 16]), true) };
    let kv = || if key { normal(&[batch, steps, 2 * 16]) } else { None };
    let cache = || normal(&[batch, 2, past, 16]);
    let lengths = vec![total - 1; batch as usize];
    vec![query, kv(), kv(), cache(), cache(), int32(&lengths), Some(Tensor::from(total))]
}

fn grouped(inputs: Vec<Option<Tensor>>) -> Single {
    single("GroupQueryAttention", inputs, 3).int("num_heads", 4).int("kv_num_heads", 2)
}

/// The forms of ONNX Runtime's own operators.
fn singles() -> Vec<Single> {
    let caches = || vec![normal(&[32, 4]), normal(&[32, 4])];
    let with = |mut inputs: Vec<Option<Tensor>>, more: Vec<Option<Tensor>>| {
        inputs.extend(more);
        inputs
    };
    let wide = || vec![normal(&[32, 8]), normal(&[32, 8])];
    let mut all = Vec::new();
    for packed in [false, true] {
        for (batch, steps, past) in [(2, 5, 0), (1, 1, 6), (1, 3, 4)] {
            all.push(grouped(gqa(batch, steps, past, packed)));
            all.push(grouped(gqa(batch, steps, past, packed)).int("local_window_size", 2));
            all.push(grouped(gqa(batch, steps, past, packed)).float("softcap", 0.7).float("scale", 0.5));
            all.push(grouped(gqa(batch, steps, past, packed)).int("smooth_softmax", 1));
            for interleaved in [0, 1] {
                let inputs = with(gqa(batch, steps, past, packed), wide());
                all.push(grouped(inputs).int("do_rotary", 1).int("rotary_interleaved", interleaved));
            }
            let bias = normal(&[batch, 4, steps, steps + past]);
            all.push(grouped(with(gqa(batch, steps, past, packed), vec![None, None, None, bias])));
            let sink = normal(&[4]);
            all.push(grouped(with(gqa(batch, steps, past, packed), vec![None, None, None, None, sink])));
        }
    }
    // A cache with room to spare, and samples of different lengths.
    let mut roomy = gqa(2, 1, 9, false);
    roomy[5] = int32(&[6, 3]);
    roomy[6] = Some(Tensor::from(7i32));
    all.push(grouped(with(roomy, wide())).int("do_rotary", 1));

    for interleaved in [0, 1] {
        let positions = || int64(&[2, 3], &[0, 1, 2, 7, 8, 9]);
        all.push(
            single("RotaryEmbedding", with(vec![normal(&[2, 3, 24]), positions()], caches()), 1)
                .int("interleaved", interleaved),
        );
        all.push(
            single("RotaryEmbedding", with(vec![normal(&[2, 3, 3, 8]), positions()], caches()), 1)
                .int("interleaved", interleaved),
        );
        let partial = vec![normal(&[2, 3, 24]), positions(), normal(&[32, 2]), normal(&[32, 2])];
        all.push(
            single("RotaryEmbedding", partial, 1)
                .int("interleaved", interleaved)
                .int("num_heads", 3)
                .int("rotary_embedding_dim", 4),
        );
    }
    let offset = with(vec![normal(&[2, 3, 24]), int64(&[1], &[4])], caches());
    all.push(single("RotaryEmbedding", offset, 1));

    let hidden = || normal(&[2, 3, 16]);
    let vector = || normal(&[16]);
    all.push(
        single("SkipSimplifiedLayerNormalization", vec![hidden(), hidden(), vector(), vector()], 1)
            .float("epsilon", 1e-5),
    );
    all.push(single("SkipSimplifiedLayerNormalization", vec![hidden(), hidden(), vector()], 1).float("epsilon", 1e-6));
    let skip = vec![hidden(), hidden(), vector(), vector(), vector()];
    all.push(single("SkipLayerNormalization", skip, 1).float("epsilon", 1e-5));
    all.push(single("BiasGelu", vec![hidden(), vector()], 1));
    all.push(single("FastGelu", vec![hidden(), vector()], 1));
    all.push(single("FastGelu", vec![hidden()], 1));
    all.push(single("Gelu", vec![hidden()], 1));
    all.push(single("QuickGelu", vec![hidden()], 1).float("alpha", 1.3));
    all.push(single("QuickGelu", vec![hidden()], 1));
    for (a, b, left, right) in
        [([2, 3, 4], [2, 4, 5], 0, 0), ([2, 4, 3], [2, 5, 4], 1, 1), ([2, 3, 4], [2, 5, 4], 0, 1)]
    {
        all.push(
            single("FusedMatMul", vec![normal(&a), normal(&b)], 1)
                .int("transA", left)
                .int("transB", right)
                .float("alpha", 0.25),
        );
    }
    let batches = vec![normal(&[3, 2, 4]), normal(&[2, 4, 5])];
    all.push(single("FusedMatMul", batches, 1).int("transBatchA", 1));
    let mha = || vec![normal(&[2, 3, 16]), normal(&[2, 5, 16]), normal(&[2, 5, 16])];
    all.push(single("MultiHeadAttention", mha(), 1).int("num_heads", 2));
    all.push(single("MultiHeadAttention", with(mha(), vec![normal(&[48])]), 1).int("num_heads", 2).float("scale", 0.3));
    let padding = Some(Tensor::from_slice(&[1i32, 1, 0, 0, 1, 1, 1, 1, 1, 0]).reshape([2, 5]));
    all.push(single("MultiHeadAttention", with(mha(), vec![None, padding]), 1).int("num_heads", 2));
    let bias = normal(&[1, 2, 3, 5]);
    all.push(single("MultiHeadAttention", with(mha(), vec![None, None, bias]), 1).int("num_heads", 2));
    let own = vec![
        normal(&[2, 3, 16]),
        normal(&[2, 3, 16]),
        normal(&[2, 3, 16]),
        None,
        None,
        None,
        normal(&[2, 2, 4, 8]),
        normal(&[2, 2, 4, 8]),
    ];
    all.push(single("MultiHeadAttention", own, 3).int("num_heads", 2).int("unidirectional", 1));
    let bytes = |shape: &[i64]| Some(Tensor::randint(256, shape, (Kind::Uint8, tch::Device::Cpu)));
    let scales = || Some(Tensor::rand([5, 2], tch::kind::FLOAT_CPU) * 0.01);
    for (bits, packed) in [(4i64, 16i64), (8, 32)] {
        let zero = |columns: i64| bytes(&[5, columns * bits / 8]);
        let of = |inputs| single("MatMulNBits", inputs, 1).int("bits", bits).int("block_size", 32).int("N", 5);
        let weight = || vec![normal(&[2, 3, 64]), bytes(&[5, 2, packed]), scales()];
        all.push(of(weight()).int("K", 64));
        all.push(of(with(weight(), vec![zero(2)])).int("K", 64));
        all.push(of(with(weight(), vec![None, None, normal(&[5])])).int("K", 64));
        let rows = || vec![bytes(&[5, 2 * packed]), int64(&[2, 2], &[4, 0, -1, 3]), scales()];
        let of = |inputs| single("GatherBlockQuantized", inputs, 1).int("bits", bits).int("block_size", 32);
        all.push(of(rows()));
        all.push(of(with(rows(), vec![zero(2)])));
    }
    let positions = || int64(&[3, 1, 4], &[0, 1, 2, 3, 0, 0, 5, 6, 1, 9, 4, 2]);
    for layout in [0, 1] {
        let inputs = vec![normal(&[1, 4, 24]), positions(), normal(&[16, 6]), normal(&[16, 6])];
        all.push(
            single("MRotaryEmbedding", inputs, 1)
                .int("num_heads", 2)
                .ints("mrope_section", &[2, 2, 2])
                .int("mrope_layout", layout),
        );
        let inputs = vec![normal(&[1, 4, 36]), positions(), normal(&[16, 9]), normal(&[16, 9])];
        all.push(
            single("MRotaryEmbedding", inputs, 1)
                .int("num_heads", 2)
                .ints("mrope_section", &[5, 2, 2])
                .int("mrope_layout", layout),
        );
    }
    for (rule, decays, corrects) in
        [("linear", false, false), ("gated", true, false), ("delta", false, true), ("gated_delta", true, true)]
    {
        let small = |shape: &[i64]| normal(shape).map(|tensor| tensor * 0.3);
        for (q_heads, k_heads, heads) in [(2, 2, 4), (4, 2, 2), (4, 4, 4)] {
            let decay = if decays { small(&[2, 3, heads]).map(|g| -g.abs()) } else { None };
            let beta = if corrects { small(&[2, 3, heads]).map(|b| b.sigmoid()) } else { None };
            let operands = vec![small(&[2, 3, q_heads * 8]), small(&[2, 3, k_heads * 8]), small(&[2, 3, heads * 8])];
            let inputs = with(operands, vec![small(&[2, heads, 8, 8]), decay, beta]);
            all.push(
                single("LinearAttention", inputs, 2)
                    .int("q_num_heads", q_heads)
                    .int("kv_num_heads", heads)
                    .text("update_rule", rule),
            );
        }
    }
    for activation in ["none", "silu"] {
        let inputs = vec![normal(&[2, 8, 5]), normal(&[8, 1, 4]), normal(&[8]), normal(&[2, 8, 3])];
        all.push(single("CausalConvWithState", inputs, 2).text("activation", activation));
    }
    let router = || normal(&[6, 4]);
    for activation in ["relu", "gelu", "silu", "identity"] {
        let inputs = vec![normal(&[2, 3, 8]), router(), normal(&[4, 16, 8]), normal(&[4, 16]), normal(&[4, 8, 16])];
        all.push(single("MoE", inputs, 1).int("k", 2).text("activation_type", activation));
    }
    let fused =
        vec![normal(&[6, 8]), router(), normal(&[4, 32, 8]), normal(&[4, 32]), normal(&[4, 8, 16]), normal(&[4, 8])];
    all.push(
        single("MoE", fused, 1)
            .int("k", 2)
            .int("normalize_routing_weights", 1)
            .int("swiglu_fusion", 1)
            .float("activation_alpha", 1.702)
            .float("activation_beta", 1.0)
            .float("swiglu_limit", 0.8)
            .text("activation_type", "swiglu"),
    );
    all
}

#[test]
fn operators_of_onnx_runtime_agree_with_it() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::set_num_threads(1);
    tch::manual_seed(7);
    for (number, case) in singles().iter().enumerate() {
        let model = case.model();
        let shapes: Vec<Vec<i64>> = case.inputs.iter().flatten().map(Tensor::size).collect();
        let name = format!("case {number}, {} {:?} over {shapes:?}", case.op, case.attributes);
        let program =
            torch::Program::compile(&model, &torch::Options::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut session = runtime.session_of(&model, &ONE_THREAD).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tensors = case.inputs.iter().flatten();
        let feeds: Vec<(String, ValueId, Tensor)> = program
            .inputs()
            .iter()
            .zip(tensors)
            .map(|(&id, tensor)| (program.name(id).to_string(), id, tensor.shallow_clone()))
            .collect();
        let theirs = run_runtime(&mut session, &feeds);
        for (output, result) in run_torch(&program, &feeds) {
            let worst = difference(&result, &theirs[&output]);
            assert!(worst <= 1e-4, "{name}: `{output}` differs by {worst:e}");
        }
    }
}
