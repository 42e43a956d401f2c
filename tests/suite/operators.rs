//! Each contrib operator of ONNX Runtime in a graph of its own, and standard operators that no exported graph of the
//! tests contains: the interpreter gives the results of ONNX Runtime.

use std::collections::{BTreeMap, BTreeSet};

use interlace::base::Device;
use interlace::ir::{self, AttributeKind, DataType, Dim, Node, Value, ValueId, ValueType};
use interlace::rewrite::{standard_operators, standardised};
use interlace::runtime::Runtime;
use interlace::torch;
use tch::{Kind, Tensor};

use super::interpreter::{ONE_THREAD, difference, run_runtime, run_torch};

/// One operator in a graph of its own.
struct Single {
    domain: &'static str,
    op: &'static str,
    attributes: Vec<(&'static str, AttributeKind)>,
    inputs: Vec<Option<Tensor>>,
    outputs: usize,
    /// Element type that ONNX requires of each output.
    dtype: DataType,
}

fn single(op: &'static str, inputs: Vec<Option<Tensor>>, outputs: usize) -> Single {
    Single { domain: "com.microsoft", op, attributes: Vec::new(), inputs, outputs, dtype: DataType::Float }
}

impl Single {
    fn standard(mut self) -> Self {
        self.domain = "";
        self
    }

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
            Node { op_type: self.op.into(), domain: self.domain.into(), name: "node".into(), ..Default::default() };
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

/// Query, key, value, past key, past value, seqlens_k and total length of a grouped-query attention with 4 query heads
/// and 2 key-value heads.
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

/// The variants of ONNX Runtime's contrib operators.
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
    // A cache longer than its content, and samples of different lengths.
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
    all.extend(quantised_experts());
    all.extend(projections());
    all.extend(samples());
    all.extend(integer_convolutions());
    all
}

/// 4-bit and 8-bit experts with a scale per row or per block, with and without zero points.
fn quantised_experts() -> Vec<Single> {
    let bytes = |shape: &[i64]| Some(Tensor::randint(256, shape, (Kind::Uint8, tch::Device::Cpu)));
    let mut all = Vec::new();
    for (bits, block, zeros) in [
        (4, None, false),
        (8, None, false),
        (4, Some(16), false),
        (8, Some(32), false),
        (4, Some(16), true),
        (8, None, true),
    ] {
        // In both cases weights of about 0.1; width 64, inner width 32.
        let scales = |shape: &[i64]| Some(Tensor::rand(shape, tch::kind::FLOAT_CPU) * 0.3 / (1 << bits) as f64);
        let pack = 8 / bits;
        let blocks = |width: i64| block.map(|block: i64| width / block);
        let scale = |rows: i64, width: i64| match blocks(width) {
            None => scales(&[4, rows]),
            Some(blocks) => scales(&[4, rows, blocks]),
        };
        let zero = |rows: i64, width: i64| match blocks(width) {
            _ if !zeros => None,
            None => bytes(&[4, rows / pack]),
            Some(blocks) => bytes(&[4, rows, blocks / pack]),
        };
        let weight = |rows: i64, width: i64| bytes(&[4, rows, width / pack]);
        let of = |inputs: Vec<Option<Tensor>>| {
            let case = single("QMoE", inputs, 1).int("k", 2).int("expert_weight_bits", bits);
            match block {
                Some(block) => case.int("block_size", block),
                None => case,
            }
        };
        let mut plain = vec![normal(&[2, 3, 64]), normal(&[6, 4]), weight(32, 64), scale(32, 64), normal(&[4, 32])];
        plain.extend([weight(64, 32), scale(64, 32), None, None, None, None, zero(32, 64), zero(64, 32)]);
        all.push(of(plain).text("activation_type", "silu"));
        let mut mixed = vec![normal(&[6, 64]), normal(&[6, 4]), weight(32, 64), scale(32, 64), None];
        mixed.extend([weight(64, 32), scale(64, 32), None, None, None, None, zero(32, 64), zero(64, 32), None]);
        mixed.push(normal(&[6, 4]).map(|share| share.abs()));
        all.push(of(mixed).int("normalize_routing_weights", i64::from(zeros)).text("activation_type", "gelu"));
        let mut gated = vec![normal(&[6, 64]), normal(&[6, 4]), weight(64, 64), scale(64, 64), normal(&[4, 64])];
        gated.extend([weight(64, 32), scale(64, 32), normal(&[4, 64]), None, None, None, zero(64, 64), zero(64, 32)]);
        all.push(
            of(gated)
                .int("normalize_routing_weights", 1)
                .int("swiglu_fusion", 1)
                .float("activation_alpha", 1.702)
                .float("activation_beta", 1.0)
                .float("swiglu_limit", 7.0)
                .text("activation_type", "swiglu"),
        );
    }
    all
}

/// Attention with one weight for the query, key and value projections.
fn projections() -> Vec<Single> {
    let x = || normal(&[2, 3, 8]);
    let of = |inputs, outputs| single("Attention", inputs, outputs).int("num_heads", 2);
    let masked = |mask| vec![x(), normal(&[8, 24]), normal(&[24]), mask];
    let mut all = vec![of(masked(None), 1), of(masked(None), 1).int("unidirectional", 1).float("scale", 0.3)];
    all.push(of(masked(int32(&[2, 3])), 1));
    all.push(of(masked(int32(&[3, 2, 1, 0])), 1));
    all.push(of(masked(int32(&[0, 1, 1, 1, 1, 1]).map(|mask| mask.reshape([2, 3]))), 1).int("unidirectional", 1));
    let whole = [1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1];
    all.push(of(masked(int32(&whole).map(|mask| mask.reshape([2, 3, 3]))), 1).float("mask_filter_value", -100.0));
    all.push(of(vec![x(), normal(&[8, 20]), normal(&[20])], 1).ints("qkv_hidden_sizes", &[8, 8, 4]));
    let mut biased = masked(None);
    biased.extend([None, normal(&[1, 2, 3, 3])]);
    all.push(of(biased, 1));
    let mut continued = masked(None);
    continued.push(normal(&[2, 2, 2, 4, 4]));
    all.push(of(continued, 2).int("unidirectional", 1));
    let mut padded = masked(int32(&[1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]).map(|mask| mask.reshape([2, 7])));
    padded.push(normal(&[2, 2, 2, 4, 4]));
    all.push(of(padded, 2).int("unidirectional", 1));
    all
}

/// Sampling at grid positions, some of them outside the input.
fn samples() -> Vec<Single> {
    let mut all = Vec::new();
    for mode in ["linear", "nearest", "cubic"] {
        for padding in ["zeros", "border", "reflection"] {
            for corners in [0, 1] {
                let inputs = vec![normal(&[2, 3, 5, 4]), normal(&[2, 3, 6, 2])];
                let case = single("GridSample", inputs, 1).standard();
                all.push(case.text("mode", mode).text("padding_mode", padding).int("align_corners", corners));
            }
        }
    }
    let volume = single("GridSample", vec![normal(&[1, 2, 3, 4, 5]), normal(&[1, 2, 3, 4, 3])], 1);
    all.push(volume.standard().text("padding_mode", "border"));
    all
}

/// Convolutions of 8-bit integers, with and without zero points. Padding has the value of the zero point.
fn integer_convolutions() -> Vec<Single> {
    let bytes = |shape: &[i64]| Some(Tensor::randint(256, shape, (Kind::Uint8, tch::Device::Cpu)));
    let zero = |value: u8| Some(Tensor::from_slice(&[value]).reshape([0i64; 0]));
    let of = |inputs| {
        let mut case = single("ConvInteger", inputs, 1).standard();
        case.dtype = DataType::Int32;
        case
    };
    let picture = || vec![bytes(&[2, 4, 6, 5]), bytes(&[6, 4, 3, 2])];
    let with = |zeros: Vec<Option<Tensor>>| picture().into_iter().chain(zeros).collect();
    vec![
        of(picture()),
        of(with(vec![zero(131)])).ints("pads", &[1, 1, 1, 1]),
        of(with(vec![zero(131), zero(7)])).ints("pads", &[2, 0, 1, 1]).ints("strides", &[2, 1]),
        of(with(vec![None, zero(128)])).text("auto_pad", "SAME_UPPER").ints("strides", &[1, 2]),
        of(with(vec![zero(3), zero(250)])).ints("dilations", &[2, 1]),
        of(vec![bytes(&[1, 4, 7]), bytes(&[4, 2, 3]), zero(9), zero(120)]).int("group", 2),
    ]
}

#[test]
fn operators_agree_with_onnx_runtime() {
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
        let ours = run_torch(&program, &feeds);
        assert!(!ours.is_empty() && ours.len() == theirs.len(), "{name}: {} outputs", ours.len());
        for (output, result) in ours {
            let worst = difference(&result, &theirs[&output]);
            assert!(worst <= 1e-4, "{name}: `{output}` differs by {worst:e}");
        }
    }
}

/// The graph with the tables of rotations as weights, as exporters write them.
fn with_weights(case: &Single) -> ir::Model {
    let mut model = case.model();
    let inputs = model.graph.body.inputs.clone();
    for (id, tensor) in inputs.iter().zip(case.inputs.iter().flatten()).skip(2) {
        if case.op == "RotaryEmbedding" {
            model.graph.body.inputs.retain(|other| other != id);
            let values: Vec<f32> = tensor.flatten(0, -1).try_into().expect("floats");
            let dims: Vec<u64> = tensor.size().iter().map(|&size| size as u64).collect();
            model.graph.body.initializers.push((*id, ir::Tensor::from_f32(&dims, &values)));
        }
    }
    model
}

/// `export --standard-ops`: the operators that it rewrites give in ONNX Runtime what they gave before. Forms that it does not write
/// are refused, and the error says which form it is.
#[test]
fn standard_forms_of_contrib_operators_agree_with_onnx_runtime() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::manual_seed(11);
    let (mut written, mut refused) = (BTreeMap::new(), BTreeSet::new());
    for case in singles().iter().filter(|case| standardised().contains(&case.op)) {
        let model = with_weights(case);
        let plain = match standard_operators(&model) {
            Ok(plain) => plain,
            Err(error) => {
                refused.insert((case.op, error.to_string()));
                continue;
            }
        };
        *written.entry(case.op).or_insert(0) += 1;
        assert!(plain.graph.body.nodes.iter().all(|node| node.domain.is_empty()), "{}", case.op);
        // Weights come last.
        let inputs = model.graph.body.inputs.iter().zip(case.inputs.iter().flatten());
        let feeds: Vec<(String, ValueId, Tensor)> =
            inputs.map(|(&id, tensor)| (model.graph.name(id).to_string(), id, tensor.shallow_clone())).collect();
        let [before, after] = [&model, &plain].map(|model| {
            let mut session = runtime.session_of(model, &ONE_THREAD).unwrap_or_else(|e| panic!("{}: {e}", case.op));
            run_runtime(&mut session, &feeds)
        });
        assert!(!before.is_empty() && before.len() == after.len(), "{}", case.op);
        for (output, wanted) in &before {
            let (worst, largest) = (difference(&after[output], wanted), wanted.abs().max().double_value(&[]).max(1.0));
            assert!(worst <= 1e-5 * largest, "{} {:?}: {worst:e} of {largest}", case.op, case.attributes);
        }
    }
    let count = |op: &str| written.get(op).copied().unwrap_or(0);
    let counts =
        ["RotaryEmbedding", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "FusedMatMul"].map(count);
    assert_eq!(counts, [4, 2, 1, 3], "{written:?} {refused:?}");
    let of = |wanted: &str| -> Vec<&str> {
        refused.iter().filter(|(op, _)| *op == wanted).map(|(_, error)| error.as_str()).collect()
    };
    let (turns, moves) = (of("RotaryEmbedding"), of("FusedMatMul"));
    assert!(turns.len() == 2 && turns.iter().any(|error| error.contains("a part of each head")), "{turns:?}");
    assert!(turns.iter().any(|error| error.contains("positions that are not listed")), "{turns:?}");
    assert!(moves.len() == 1 && moves[0].contains("moves the first axis"), "{moves:?}");
}
