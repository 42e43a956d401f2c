//! Checks every differentiable row against central differences in f64. A row without a case is an error.

use std::collections::HashSet;

use tch::{Kind, Tensor};

use crate::ir::{self, AttributeKind, Node, Value, ValueId};
use crate::rewrite::{FUSED_ATTENTION, FUSED_SILU, INTERNAL_DOMAIN};

use super::operator::LATEST_OPSET;
use super::options::Options;
use super::program::Program;
use super::table::operators;

/// One input of a case.
enum In {
    /// Random f64 numbers in a range, whose gradient is checked.
    Vary(&'static [i64], f64, f64),
    /// Random f64 numbers whose gradient is not checked (masks, statistics).
    Fixed(&'static [i64], f64, f64),
    /// An integer constant.
    Ints(&'static [u64], &'static [i64]),
    /// An int32 constant.
    Int32s(&'static [u64], &'static [i32]),
    /// A bool constant.
    Bools(&'static [u64], &'static [u8]),
    /// An omitted input.
    Absent,
}

struct Case {
    domain: &'static str,
    op: &'static str,
    version: i64,
    inputs: Vec<In>,
    outputs: usize,
    attributes: Vec<(&'static str, AttributeKind)>,
}

fn case(op: &'static str, inputs: Vec<In>) -> Case {
    Case { domain: "", op, version: LATEST_OPSET, inputs, outputs: 1, attributes: Vec::new() }
}

impl Case {
    fn of(mut self, domain: &'static str) -> Self {
        self.domain = domain;
        self.version = 1;
        self
    }
    fn at(mut self, version: i64) -> Self {
        self.version = version;
        self
    }
    fn outputs(mut self, count: usize) -> Self {
        self.outputs = count;
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
}

const MS: &str = "com.microsoft";
const SHAPE: &[i64] = &[2, 3, 4];

fn any() -> In {
    In::Vary(SHAPE, -1.5, 1.5)
}
fn positive() -> In {
    In::Vary(SHAPE, 0.4, 2.0)
}

// A table with one row per case.
#[allow(clippy::too_many_lines)]
fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for op in
        ["Atan", "Asinh", "Cos", "Cosh", "Erf", "Exp", "Neg", "Sin", "Sinh", "Sigmoid", "Tanh", "Identity", "Flatten"]
    {
        all.push(case(op, vec![any()]));
    }
    for op in [
        "Elu",
        "Selu",
        "Celu",
        "LeakyRelu",
        "Relu",
        "Softplus",
        "Softsign",
        "Mish",
        "HardSwish",
        "Gelu",
        "Abs",
        "ThresholdedRelu",
    ] {
        all.push(case(op, vec![any()]));
    }
    for op in ["Acos", "Asin", "Atanh", "Tan"] {
        all.push(case(op, vec![In::Vary(SHAPE, -0.9, 0.9)]));
    }
    for op in ["Log", "Sqrt", "Reciprocal"] {
        all.push(case(op, vec![positive()]));
    }
    all.push(case("Acosh", vec![In::Vary(SHAPE, 1.2, 3.0)]));
    all.push(case("Celu", vec![any()]).float("alpha", 0.7));
    all.push(case("Gelu", vec![any()]).text("approximate", "tanh"));
    all.push(case("HardSigmoid", vec![In::Vary(SHAPE, -4.0, 4.0)]));
    all.push(case("Swish", vec![any()]).float("alpha", 1.3));
    all.push(case("PRelu", vec![any(), In::Vary(&[4], 0.1, 0.5)]));
    for op in ["Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean"] {
        all.push(case(op, vec![any(), In::Vary(&[3, 1], -1.5, 1.5)]));
    }
    all.push(case("Div", vec![any(), In::Vary(&[4], 0.5, 2.0)]));
    all.push(case("Pow", vec![positive(), In::Vary(&[4], -1.0, 2.0)]));
    all.push(case("Pow", vec![any(), In::Ints(&[], &[3])]));
    all.push(case("Clip", vec![any(), In::Fixed(&[], -0.8, -0.7), In::Fixed(&[], 0.7, 0.8)]));
    all.push(case("Clip", vec![any()]).at(6).float("min", -0.5).float("max", 0.5));
    all.push(case("BiasAdd", vec![any(), In::Vary(&[4], -1.0, 1.0), any()]).of(MS));
    all.push(case("Where", vec![In::Bools(&[3, 1], &[1, 0, 1]), any(), In::Vary(&[4], -1.0, 1.0)]));
    all.push(case("Softmax", vec![any()]).int("axis", 1));
    all.push(case("Softmax", vec![any()]).at(11));
    all.push(case("LogSoftmax", vec![any()]));
    all.push(case("BiasGelu", vec![any(), In::Vary(&[4], -1.0, 1.0)]).of(MS));
    all.push(case("FastGelu", vec![any(), In::Vary(&[4], -1.0, 1.0)]).of(MS));
    all.push(case("Gelu", vec![any()]).of(MS));
    all.push(case("QuickGelu", vec![any()]).of(MS));
    all.push(case(FUSED_SILU, vec![any()]).of(INTERNAL_DOMAIN));
    all.push(case("Cast", vec![any()]).int("to", 11));
    all.push(case("CastLike", vec![any(), In::Fixed(&[1], 0.0, 1.0)]));

    all.push(case("MatMul", vec![any(), In::Vary(&[4, 5], -1.0, 1.0)]));
    all.push(case("MatMul", vec![In::Vary(&[2, 1, 3, 4], -1.0, 1.0), In::Vary(&[2, 4, 2], -1.0, 1.0)]));
    let gemm = || vec![In::Vary(&[4, 3], -1.0, 1.0), In::Vary(&[5, 4], -1.0, 1.0), In::Vary(&[5], -1.0, 1.0)];
    all.push(case("Gemm", gemm()).int("transA", 1).int("transB", 1).float("alpha", 0.5).float("beta", 2.0));
    all.push(case("Gemm", gemm()).int("transA", 1).int("transB", 1));
    all.push(case("FusedGemm", gemm()).of(MS).int("transA", 1).int("transB", 1).text("activation", "Tanh"));
    all.push(
        case("FusedMatMul", vec![any(), In::Vary(&[2, 5, 4], -1.0, 1.0)]).of(MS).int("transB", 1).float("alpha", 0.3),
    );
    all.push(case("Einsum", vec![any(), In::Vary(&[4, 5], -1.0, 1.0)]).text("equation", "bij, jk -> bik"));
    // Two weights of four numbers in one block each; the rest of a block is not read.
    let packed = In::Ints(&[2, 1, 8], &[0x2f, 0x91, 0, 0, 0, 0, 0, 0, 0x4c, 0xa7, 0, 0, 0, 0, 0, 0]);
    all.push(
        case("MatMulNBits", vec![any(), packed, In::Fixed(&[2, 1], 0.1, 0.4)])
            .of(MS)
            .int("K", 4)
            .int("N", 2)
            .int("bits", 4)
            .int("block_size", 16),
    );
    let image = || In::Vary(&[1, 4, 5, 6], -1.0, 1.0);
    all.push(
        case("Conv", vec![image(), In::Vary(&[6, 2, 3, 3], -1.0, 1.0), In::Vary(&[6], -1.0, 1.0)])
            .int("group", 2)
            .ints("pads", &[1, 0, 1, 2])
            .ints("strides", &[2, 1]),
    );
    all.push(case("ConvTranspose", vec![image(), In::Vary(&[4, 2, 3, 3], -1.0, 1.0)]).ints("strides", &[2, 2]));
    all.push(case("AveragePool", vec![image()]).ints("kernel_shape", &[2, 2]).ints("pads", &[1, 1, 0, 0]));
    all.push(case("MaxPool", vec![image()]).ints("kernel_shape", &[2, 2]).ints("strides", &[2, 2]));
    all.push(case("GlobalAveragePool", vec![image()]));
    all.push(case("GlobalMaxPool", vec![image()]));
    for (mode, padding) in [("linear", "zeros"), ("cubic", "border"), ("linear", "reflection")] {
        let grid = In::Vary(&[1, 3, 2, 2], -1.3, 1.3);
        all.push(case("GridSample", vec![image(), grid]).text("mode", mode).text("padding_mode", padding));
    }
    let nearest = vec![image(), In::Fixed(&[1, 3, 2, 2], -1.3, 1.3)];
    all.push(case("GridSample", nearest).text("mode", "nearest").int("align_corners", 1));
    for mode in ["nearest", "linear", "cubic"] {
        let sizes = In::Ints(&[4], &[1, 4, 3, 9]);
        all.push(case("Resize", vec![image(), In::Absent, In::Absent, sizes]).text("mode", mode));
    }

    for op in [
        "ReduceSum",
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSumExp",
    ] {
        all.push(case(op, vec![any(), In::Ints(&[2], &[-1, 0])]).int("keepdims", 0));
    }
    all.push(case("ReduceLogSum", vec![positive(), In::Ints(&[1], &[1])]));
    all.push(case("ReduceProd", vec![positive(), In::Ints(&[2], &[0, 2])]));
    all.push(case("ReduceMean", vec![any()]).at(13).ints("axes", &[1]));
    all.push(case("CumSum", vec![any(), In::Ints(&[], &[1])]).int("exclusive", 1).int("reverse", 1));

    let vector = || In::Vary(&[4], 0.5, 1.5);
    all.push(case("LayerNormalization", vec![any(), vector(), vector()]));
    // The statistics are doubles, which are compared, by a stash type of double.
    all.push(case("LayerNormalization", vec![any(), vector()]).int("stash_type", 11).outputs(3));
    all.push(case("RMSNormalization", vec![any(), vector()]));
    all.push(case("SimplifiedLayerNormalization", vec![any(), vector()]).outputs(2));
    all.push(case("SimplifiedLayerNormalization", vec![any(), vector()]).of(MS));
    all.push(case("SkipSimplifiedLayerNormalization", vec![any(), any(), vector(), vector()]).of(MS));
    all.push(case("SkipLayerNormalization", vec![any(), any(), vector(), vector(), vector()]).of(MS));
    let channel = || In::Vary(&[4], 0.5, 1.5);
    all.push(case("BatchNormalization", vec![image(), channel(), channel(), channel(), channel()]));
    all.push(case("InstanceNormalization", vec![image(), channel(), channel()]));
    all.push(case("GroupNormalization", vec![image(), channel(), channel()]).int("num_groups", 2));
    all.push(
        case("GroupNormalization", vec![image(), In::Vary(&[2], 0.5, 1.5), In::Vary(&[2], 0.5, 1.5)])
            .at(18)
            .int("num_groups", 2),
    );
    all.push(case("LpNormalization", vec![any()]).int("axis", 1));

    all.push(case("Reshape", vec![any(), In::Ints(&[2], &[0, -1])]));
    all.push(case("Expand", vec![In::Vary(&[3, 1], -1.0, 1.0), In::Ints(&[3], &[2, 1, 4])]));
    all.push(case("Squeeze", vec![In::Vary(&[2, 1, 3], -1.0, 1.0), In::Ints(&[1], &[1])]));
    all.push(case("Unsqueeze", vec![any(), In::Ints(&[2], &[0, -1])]));
    all.push(case("Transpose", vec![any()]).ints("perm", &[2, 0, 1]));
    all.push(case("Concat", vec![any(), In::Vary(&[2, 1, 4], -1.0, 1.0)]).int("axis", 1));
    all.push(case("Split", vec![any(), In::Ints(&[2], &[1, 3])]).int("axis", 2).outputs(2));
    all.push(case(
        "Slice",
        vec![
            any(),
            In::Ints(&[2], &[-1, 1]),
            In::Ints(&[2], &[-100, 9]),
            In::Ints(&[2], &[2, 1]),
            In::Ints(&[2], &[-2, 1]),
        ],
    ));
    all.push(case("Pad", vec![any(), In::Ints(&[6], &[0, 1, -1, 1, 0, 2]), In::Absent]));
    all.push(case("Pad", vec![any(), In::Ints(&[6], &[0, 1, 2, 0, 0, 1]), In::Absent]).text("mode", "reflect"));
    all.push(case("Tile", vec![any(), In::Ints(&[3], &[2, 1, 3])]));
    all.push(case("Trilu", vec![any(), In::Ints(&[], &[1])]).int("upper", 0));
    all.push(case("Dropout", vec![any()]));
    all.push(case("DepthToSpace", vec![image()]).int("blocksize", 2));
    all.push(case("SpaceToDepth", vec![In::Vary(&[1, 2, 4, 6], -1.0, 1.0)]).int("blocksize", 2));

    all.push(case("Gather", vec![any(), In::Ints(&[2, 2], &[0, -1, 2, 0])]).int("axis", 1));
    all.push(case("Gather", vec![any(), In::Ints(&[], &[-1])]).int("axis", 2));
    all.push(case("GatherElements", vec![any(), In::Ints(&[2, 1, 4], &[0, 2, 1, -1, 2, 0, 0, 1])]).int("axis", 1));
    all.push(case("GatherND", vec![any(), In::Ints(&[2, 2, 1], &[0, 2, -1, 1])]).int("batch_dims", 1));
    all.push(case("Compress", vec![any(), In::Bools(&[3], &[1, 0, 1])]).int("axis", 1));
    all.push(case("TopK", vec![any(), In::Ints(&[1], &[2])]).int("axis", 1));
    let elements = || In::Ints(&[2, 1, 4], &[0, 2, 1, -1, 2, 0, 0, 1]);
    all.push(case("Scatter", vec![any(), elements(), In::Vary(&[2, 1, 4], -1.0, 1.0)]).at(10).int("axis", 1));
    for reduction in ["none", "add", "mul", "max"] {
        let inputs = vec![positive(), elements(), In::Vary(&[2, 1, 4], 0.5, 2.5)];
        all.push(case("ScatterElements", inputs).int("axis", 1).text("reduction", reduction));
    }
    let tuples = || In::Ints(&[2, 2], &[0, 1, 1, -1]);
    all.push(case("ScatterND", vec![any(), tuples(), In::Vary(&[2, 4], -1.0, 1.0)]));
    all.push(case("ScatterND", vec![any(), tuples(), In::Vary(&[2, 4], -1.0, 1.0)]).text("reduction", "add"));
    all.push(case(
        "TensorScatter",
        vec![In::Vary(&[2, 2, 5, 3], -1.0, 1.0), In::Vary(&[2, 2, 2, 3], -1.0, 1.0), In::Ints(&[2], &[3, 0])],
    ));

    let heads = |heads: &'static [i64]| In::Vary(heads, -1.0, 1.0);
    let qkv = || vec![heads(&[2, 4, 3, 4]), heads(&[2, 2, 3, 4]), heads(&[2, 2, 3, 4])];
    all.push(case("Attention", qkv()).at(24).int("is_causal", 1));
    let mut cached = vec![heads(&[2, 3, 8]), heads(&[2, 3, 4]), heads(&[2, 3, 4]), In::Vary(&[3, 5], -1.0, 1.0)];
    cached.extend([heads(&[2, 1, 2, 4]), heads(&[2, 1, 2, 4])]);
    all.push(
        case("Attention", cached)
            .at(23)
            .int("q_num_heads", 2)
            .int("kv_num_heads", 1)
            .int("is_causal", 1)
            .float("softcap", 2.0)
            .outputs(3),
    );
    let mut grouped = vec![heads(&[2, 4, 3, 4]), heads(&[2, 2, 3, 4]), heads(&[2, 2, 3, 5])];
    grouped.push(In::Fixed(&[2, 1, 3, 3], -2.0, 0.0));
    grouped.extend([In::Ints(&[5], &[2, 2, 2, 3, 4]), In::Ints(&[4], &[2, 4, 3, 4])]);
    grouped.extend([In::Ints(&[5], &[2, 2, 2, 3, 5]), In::Ints(&[4], &[2, 4, 3, 5])]);
    all.push(case(FUSED_ATTENTION, grouped).of(INTERNAL_DOMAIN).float("scale", 0.5));
    let plain = vec![heads(&[2, 4, 3, 4]), heads(&[2, 4, 4, 3]), heads(&[2, 4, 3, 5])];
    all.push(case(FUSED_ATTENTION, plain).of(INTERNAL_DOMAIN).float("scale", 0.5).int("transposed", 1));
    let flat = |steps: &'static [i64]| In::Vary(steps, -1.0, 1.0);
    let mha = vec![
        flat(&[2, 3, 8]),
        flat(&[2, 3, 8]),
        flat(&[2, 3, 8]),
        In::Vary(&[24], -1.0, 1.0),
        In::Int32s(&[2, 3], &[1, 1, 0, 1, 1, 1]),
    ];
    all.push(case("MultiHeadAttention", mha).of(MS).int("num_heads", 2));
    let projected = vec![
        flat(&[2, 3, 6]),
        flat(&[6, 20]),
        flat(&[20]),
        In::Int32s(&[2, 3], &[1, 1, 0, 1, 1, 1]),
        In::Absent,
        flat(&[1, 2, 3, 3]),
    ];
    all.push(case("Attention", projected).of(MS).int("num_heads", 2).ints("qkv_hidden_sizes", &[8, 8, 4]));
    let continued = vec![flat(&[2, 3, 6]), flat(&[6, 24]), In::Absent, In::Absent, flat(&[2, 2, 2, 1, 4])];
    all.push(case("Attention", continued).of(MS).int("num_heads", 2).int("unidirectional", 1).outputs(2));
    let angle = |shape: &'static [i64]| In::Vary(shape, -1.0, 1.0);
    all.push(case(
        "RotaryEmbedding",
        vec![heads(&[1, 2, 3, 4]), angle(&[5, 2]), angle(&[5, 2]), In::Ints(&[1, 3], &[0, 4, 2])],
    ));
    all.push(
        case("RotaryEmbedding", vec![flat(&[1, 3, 8]), angle(&[1, 3, 1]), angle(&[1, 3, 1])])
            .int("num_heads", 2)
            .int("rotary_embedding_dim", 2)
            .int("interleaved", 1),
    );
    all.push(
        case("RotaryEmbedding", vec![flat(&[1, 3, 8]), In::Ints(&[1], &[2]), angle(&[5, 2]), angle(&[5, 2])]).of(MS),
    );
    all.push(case("Attention", qkv()).at(25).int("left_window_size", 1).int("right_window_size", 1));
    for (rule, decays, corrects) in
        [("linear", false, false), ("gated", true, false), ("delta", false, true), ("gated_delta", true, true)]
    {
        let mut inputs = vec![flat(&[2, 3, 4]), flat(&[2, 3, 4]), flat(&[2, 3, 12]), flat(&[2, 4, 2, 3])];
        inputs.push(if decays { In::Vary(&[2, 3, 4], -1.0, -0.1) } else { In::Absent });
        inputs.push(if corrects { In::Vary(&[2, 3, 4], 0.1, 0.9) } else { In::Absent });
        all.push(
            case("LinearAttention", inputs)
                .of(MS)
                .int("q_num_heads", 2)
                .int("kv_num_heads", 4)
                .text("update_rule", rule)
                .outputs(2),
        );
    }
    let short = vec![flat(&[2, 4, 3]), flat(&[4, 1, 3]), flat(&[4]), flat(&[2, 4, 2])];
    all.push(case("CausalConvWithState", short).of(MS).text("activation", "silu").outputs(2));
    let router = || In::Vary(&[3, 4], -1.5, 1.5);
    let halves = vec![flat(&[3, 4]), router(), flat(&[4, 10, 4]), flat(&[4, 10]), flat(&[4, 4, 5]), flat(&[4, 4])];
    all.push(
        case("MoE", halves)
            .of(MS)
            .int("k", 2)
            .int("normalize_routing_weights", 1)
            .int("swiglu_fusion", 2)
            .float("activation_alpha", 1.7)
            .float("activation_beta", 1.0)
            .float("swiglu_limit", 0.9)
            .text("activation_type", "swiglu"),
    );
    let apart = vec![
        flat(&[1, 3, 4]),
        router(),
        flat(&[4, 5, 4]),
        In::Absent,
        flat(&[4, 4, 5]),
        In::Absent,
        flat(&[4, 5, 4]),
        flat(&[4, 5]),
    ];
    all.push(case("MoE", apart).of(MS).int("k", 2).text("activation_type", "silu"));
    let streams = In::Ints(&[3, 1, 2], &[0, 1, 2, 3, 4, 0]);
    all.push(
        case("MRotaryEmbedding", vec![flat(&[1, 2, 12]), streams, angle(&[5, 3]), angle(&[5, 3])])
            .of(MS)
            .ints("mrope_section", &[1, 1, 1]),
    );
    let mut gqa =
        vec![flat(&[2, 3, 8]), flat(&[2, 3, 4]), flat(&[2, 3, 4]), heads(&[2, 1, 2, 4]), heads(&[2, 1, 2, 4])];
    gqa.extend([In::Int32s(&[2], &[4, 3]), In::Int32s(&[], &[5]), angle(&[8, 2]), angle(&[8, 2])]);
    all.push(
        case("GroupQueryAttention", gqa)
            .of(MS)
            .int("num_heads", 2)
            .int("kv_num_heads", 1)
            .int("do_rotary", 1)
            .int("local_window_size", 2)
            .outputs(3),
    );
    let packed = vec![
        flat(&[1, 3, 16]),
        In::Absent,
        In::Absent,
        In::Absent,
        In::Absent,
        In::Int32s(&[1], &[2]),
        In::Int32s(&[], &[3]),
    ];
    all.push(
        case("GroupQueryAttention", packed)
            .of(MS)
            .int("num_heads", 2)
            .int("kv_num_heads", 1)
            .int("smooth_softmax", 1)
            .float("softcap", 1.5),
    );
    all
}

/// Deterministic pseudo-random numbers, spaced so that no kink falls inside a difference step.
fn numbers(count: usize, low: f64, high: f64, seed: usize) -> Vec<f64> {
    (0..count)
        .map(|i| low + (high - low) * (((i * 7919 + seed * 104_729 + 37) as f64 * 0.618_033_988_749_895).fract()))
        .collect()
}

fn model(case: &Case) -> (ir::Model, Vec<ValueId>, Vec<ValueId>) {
    let mut model = ir::Model { ir_version: 10, ..Default::default() };
    model.opset_imports.insert(case.domain.to_string(), case.version);
    let graph = &mut model.graph;
    let mut node =
        Node { op_type: case.op.into(), domain: case.domain.into(), name: "node".into(), ..Default::default() };
    let mut varied = Vec::new();
    for (number, input) in case.inputs.iter().enumerate() {
        if matches!(input, In::Absent) {
            node.inputs.push(None);
            continue;
        }
        let id = graph.add_value(Value { name: format!("in{number}"), ..Default::default() });
        node.inputs.push(Some(id));
        let bytes_of_f64 = |shape: &[i64], values: &[f64]| {
            let dims: Vec<u64> = shape.iter().map(|&dim| dim as u64).collect();
            ir::Tensor::from_bytes(
                ir::DataType::Double,
                &dims,
                values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>(),
            )
        };
        match input {
            In::Vary(..) => {
                graph.body.inputs.push(id);
                varied.push(id);
            }
            In::Fixed(shape, low, high) => {
                let values = numbers(shape.iter().product::<i64>() as usize, *low, *high, number);
                graph.body.initializers.push((id, bytes_of_f64(shape, &values)));
            }
            In::Ints(dims, values) => graph.body.initializers.push((id, ir::Tensor::from_i64(dims, values))),
            In::Int32s(dims, values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                graph.body.initializers.push((id, ir::Tensor::from_bytes(ir::DataType::Int32, dims, bytes)));
            }
            In::Bools(dims, values) => {
                graph.body.initializers.push((id, ir::Tensor::from_bytes(ir::DataType::Bool, dims, values.to_vec())));
            }
            In::Absent => {}
        }
    }
    for number in 0..case.outputs {
        let id = graph.add_value(Value { name: format!("out{number}"), ..Default::default() });
        node.outputs.push(Some(id));
        graph.body.outputs.push(id);
    }
    node.attributes = case.attributes.iter().map(|(name, kind)| (name.to_string(), kind.clone().into())).collect();
    graph.body.nodes.push(node);
    let outputs = model.graph.body.outputs.clone();
    (model, varied, outputs)
}

/// A weighted sum of all floating-point outputs, with a different weight for every element.
fn loss(program: &Program, feeds: &[(ValueId, Tensor)], outputs: &[ValueId]) -> Tensor {
    let mut total = Tensor::zeros([], (Kind::Double, tch::Device::Cpu));
    for (number, output) in program.run(feeds, outputs).expect("run").iter().enumerate() {
        if output.kind() == Kind::Double {
            let weights = Tensor::from_slice(&numbers(output.numel(), -1.0, 1.0, 91 + number)).reshape(output.size());
            total += (output * weights).sum(Kind::Double);
        }
    }
    total
}

#[test]
fn gradients_agree_with_central_differences() {
    const STEP: f64 = 1e-5;
    const DIRECTIONS: usize = 4;
    tch::set_num_threads(1);
    for case in cases() {
        let name = format!("{}.{}-{}", case.domain, case.op, case.version);
        let (model, varied, outputs) = model(&case);
        let program = Program::compile(&model, &Options::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let values: Vec<(Vec<i64>, Vec<f64>)> = case
            .inputs
            .iter()
            .enumerate()
            .filter_map(|(number, input)| match input {
                In::Vary(shape, low, high) => {
                    Some((shape.to_vec(), numbers(shape.iter().product::<i64>() as usize, *low, *high, number)))
                }
                _ => None,
            })
            .collect();
        let feeds = |values: &[(Vec<i64>, Vec<f64>)], grad: bool| -> Vec<(ValueId, Tensor)> {
            let tensors =
                values.iter().map(|(shape, data)| Tensor::from_slice(data).reshape(shape).set_requires_grad(grad));
            varied.iter().copied().zip(tensors).collect()
        };
        let with_gradient = feeds(&values, true);
        loss(&program, &with_gradient, &outputs).backward();
        for (number, (_, tensor)) in with_gradient.iter().enumerate() {
            let gradient = tensor.grad();
            assert!(gradient.defined(), "{name}: no gradient for varied input {number}");
            let gradient = Vec::<f64>::try_from(gradient.reshape([-1])).expect("gradient");
            for direction in 0..DIRECTIONS {
                let along = numbers(gradient.len(), -1.0, 1.0, 300 + direction);
                let at = |step: f64| {
                    let mut moved = values.clone();
                    for (value, part) in moved[number].1.iter_mut().zip(&along) {
                        *value += step * part;
                    }
                    loss(&program, &feeds(&moved, false), &outputs).double_value(&[])
                };
                let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                let found: f64 = gradient.iter().zip(&along).map(|(slope, part)| slope * part).sum();
                let error = (found - expected).abs() / (1.0 + expected.abs());
                assert!(
                    error < 1e-7,
                    "{name}: input {number}, direction {direction}: found {found}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn every_differentiable_row_has_a_case() {
    // Other tests check control flow on whole graphs.
    let elsewhere = [("", "If"), ("", "Loop"), ("", "Scan")];
    let covered: HashSet<(&str, &str)> = cases().iter().map(|case| (case.domain, case.op)).chain(elsewhere).collect();
    let bare: Vec<String> = operators()
        .iter()
        .filter(|row| row.differentiable && !covered.contains(&(row.domain, row.op_type)))
        .map(|row| format!("{}.{}", row.domain, row.op_type))
        .collect();
    assert!(bare.is_empty(), "rows without a gradient case: {bare:?}");
}
