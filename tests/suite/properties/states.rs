//! Cases of sub-graphs, stateful layers, and mixtures of experts.

use interlace::ir::{AttributeKind, DataType};

use super::Generator;
use super::case::{Builder, Case};
use super::source::{Source, encode, int64};

const MS: &str = "com.microsoft";
const FLOAT: DataType = DataType::Float;

fn finish(builder: Builder, feeds: Vec<(String, interlace::ir::Tensor)>) -> Case {
    Case { model: builder.model, feeds, reference: None, tolerance: 1e-4, steps: 0 }
}

/// A fed input.
fn feed(
    builder: &mut Builder,
    feeds: &mut Vec<(String, interlace::ir::Tensor)>,
    name: &str,
    tensor: interlace::ir::Tensor,
) {
    let shape: Vec<i64> = tensor.dims.iter().map(|&dim| dim as i64).collect();
    builder.input(name, tensor.dtype, Some(&shape));
    feeds.push((name.into(), tensor));
}

/// Branches that read a value of the outer graph.
fn branch(s: &mut Source) -> Case {
    let mut b = Builder::new(s.version);
    let mut feeds = Vec::new();
    let shape = s.any_shape(0, 3);
    let condition: &[i64] = if s.chance(0.5) { &[] } else { &[1] };
    feed(&mut b, &mut feeds, "condition", encode(DataType::Bool, condition, &[s.flag() as f64]));
    feed(&mut b, &mut feeds, "x", s.normal(&shape));
    let mut body = |op: &str, name: &str| {
        let node = b.node(op, &["x", "x"], &[name], Vec::new());
        b.typed(name, FLOAT, None);
        b.body(&[], &[name], vec![node])
    };
    let (first, second) = (body("Add", "sum"), body("Mul", "square"));
    let attributes = vec![("then_branch", AttributeKind::Graph(first)), ("else_branch", AttributeKind::Graph(second))];
    let node = b.node("If", &["condition"], &["y"], attributes);
    b.output("y", FLOAT);
    b.push(node);
    finish(b, feeds)
}

/// A loop that adds, outputs the intermediate sums, and may stop early. Often it has no iterations.
fn looped(s: &mut Source) -> Case {
    let mut b = Builder::new(s.version);
    let mut feeds = Vec::new();
    let dtype = s.pick(&[FLOAT, DataType::Int64, DataType::Int32]);
    let shape = s.shape(0, 2);
    let trips = s.pick(&[0, 0, 1, 2, 4]);
    let counted = s.chance(0.8);
    if counted {
        feed(&mut b, &mut feeds, "trips", int64(&[], &[trips]));
    }
    let conditional = !counted || s.chance(0.5);
    if conditional {
        let runs = if s.chance(0.7) { 1.0 } else { 0.0 };
        feed(&mut b, &mut feeds, "start", encode(DataType::Bool, &[], &[runs]));
    }
    feed(&mut b, &mut feeds, "x", s.numbers(dtype, &shape));
    feed(&mut b, &mut feeds, "w", s.numbers(dtype, &shape));
    b.constant("limit", int64(&[], &[s.between(0, 3)]));
    b.typed("turn", DataType::Int64, Some(&[]));
    b.typed("going", DataType::Bool, Some(&[]));
    b.typed("state", dtype, Some(&shape));
    let nodes = vec![
        b.node("Less", &["turn", "limit"], &["goes_on"], Vec::new()),
        b.node("Add", &["state", "w"], &["next"], Vec::new()),
        b.node("Mul", &["next", "w"], &["seen"], Vec::new()),
    ];
    b.typed("goes_on", DataType::Bool, None);
    b.typed("next", dtype, None);
    b.typed("seen", dtype, Some(&shape));
    let body = b.body(&["turn", "going", "state"], &["goes_on", "next", "seen"], nodes);
    let inputs = [if counted { "trips" } else { "" }, if conditional { "start" } else { "" }, "x"];
    let node = b.node("Loop", &inputs, &["last", "all"], vec![("body", AttributeKind::Graph(body))]);
    b.output("last", dtype);
    b.output("all", dtype);
    b.push(node);
    finish(b, feeds)
}

/// A running sum over slices, along any axis and in either direction.
fn scan(s: &mut Source) -> Case {
    let mut b = Builder::new(s.version);
    let mut feeds = Vec::new();
    let shape = s.shape(1, 3);
    let axis = s.below(shape.len());
    let mut slice = shape.clone();
    slice.remove(axis);
    feed(&mut b, &mut feeds, "start", s.normal(&slice));
    feed(&mut b, &mut feeds, "x", s.normal(&shape));
    b.typed("state", FLOAT, Some(&slice));
    b.typed("one", FLOAT, Some(&slice));
    let nodes = vec![
        b.node("Add", &["state", "one"], &["next"], Vec::new()),
        b.node("Mul", &["next", "one"], &["seen"], Vec::new()),
    ];
    b.typed("next", FLOAT, Some(&slice));
    b.typed("seen", FLOAT, Some(&slice));
    let body = b.body(&["state", "one"], &["next", "seen"], nodes);
    let mut attributes = vec![("body", AttributeKind::Graph(body)), ("num_scan_inputs", AttributeKind::Int(1))];
    let rank = shape.len() as i64;
    let back = if s.version >= 11 && s.chance(0.3) { rank } else { 0 };
    attributes.push(("scan_input_axes", AttributeKind::Ints(vec![axis as i64 - back])));
    if s.chance(0.5) {
        attributes.push(("scan_input_directions", AttributeKind::Ints(vec![s.flag()])));
    }
    if s.chance(0.5) {
        attributes.push(("scan_output_axes", AttributeKind::Ints(vec![s.between(0, rank - 1)])));
    }
    if s.chance(0.5) {
        attributes.push(("scan_output_directions", AttributeKind::Ints(vec![s.flag()])));
    }
    let node = b.node("Scan", &["start", "x"], &["last", "all"], attributes);
    b.output("last", FLOAT);
    b.output("all", FLOAT);
    b.push(node);
    finish(b, feeds)
}

fn causal_convolution(s: &mut Source) -> Case {
    let (batch, channels, steps, kernel) = (s.between(1, 2), s.between(1, 6), s.between(1, 6), s.between(1, 4));
    let bias = s.maybe(|s| s.normal(&[channels]));
    let past = s.maybe(|s| s.normal(&[batch, channels, kernel - 1]));
    let mut single = s
        .single()
        .input(s.normal(&[batch, channels, steps]))
        .input(s.normal(&[channels, 1, kernel]))
        .maybe(bias)
        .maybe(past)
        .output(FLOAT)
        .output(FLOAT);
    if s.chance(0.7) {
        single = single.text("activation", s.pick(&["none", "silu", "swish"]));
    }
    s.case(single)
}

fn linear_attention(s: &mut Source) -> Case {
    let (rule, decays, corrects) = s.pick(&[
        ("linear", false, false),
        ("gated", true, false),
        ("delta", false, true),
        ("gated_delta", true, true),
    ]);
    let (q_heads, k_heads, heads) = s.pick(&[(2, 2, 4), (4, 2, 2), (4, 4, 4), (2, 2, 2)]);
    let (batch, steps, width) = (s.between(1, 2), s.between(1, 4), 8);
    let small = |s: &mut Source, shape: &[i64]| s.floats(FLOAT, shape, -0.6, 0.6);
    let past = s.maybe(|s| small(s, &[batch, heads, width, width]));
    let decay = decays.then(|| s.floats(FLOAT, &[batch, steps, heads], -1.0, 0.0));
    let beta = corrects.then(|| s.floats(FLOAT, &[batch, steps, heads], 0.0, 1.0));
    let single = s
        .single()
        .input(small(s, &[batch, steps, q_heads * width]))
        .input(small(s, &[batch, steps, k_heads * width]))
        .input(small(s, &[batch, steps, heads * width]))
        .maybe(past)
        .maybe(decay)
        .maybe(beta)
        .int("q_num_heads", q_heads)
        .int("kv_num_heads", heads)
        .text("update_rule", rule)
        .output(FLOAT)
        .output(FLOAT);
    s.case(single)
}

fn experts(s: &mut Source) -> Case {
    let (experts, width, inner, tokens) = (s.between(2, 5), s.between(2, 8), s.between(2, 8), s.between(1, 6));
    let fused = s.chance(0.3);
    let activation = if fused { "swiglu" } else { s.pick(&["relu", "gelu", "silu", "identity"]) };
    let rows = if fused { 2 * inner } else { inner };
    let (first, second) = (s.maybe(|s| s.normal(&[experts, rows])), s.maybe(|s| s.normal(&[experts, width])));
    let mut single = s
        .single()
        .input(s.normal(&[tokens, width]))
        .input(s.floats(FLOAT, &[tokens, experts], -3.0, 3.0))
        .input(s.floats(FLOAT, &[experts, rows, width], -0.7, 0.7))
        .maybe(first)
        .input(s.floats(FLOAT, &[experts, width, inner], -0.7, 0.7))
        .maybe(second)
        .int("k", s.between(1, 2))
        .text("activation_type", activation)
        .output(FLOAT)
        .tolerance(1e-3);
    if fused {
        single = single.int("swiglu_fusion", 1).float("activation_alpha", 1.702).float("activation_beta", 1.0);
        if s.chance(0.5) {
            single = single.float("swiglu_limit", s.float(0.5, 3.0));
        }
    }
    if s.chance(0.5) {
        single = single.int("normalize_routing_weights", s.flag());
    }
    s.case(single)
}

fn quantised_experts(s: &mut Source) -> Case {
    let bits = s.pick(&[4, 8]);
    let block = s.pick(&[None, None, Some(16), Some(32)]);
    let (experts, width, inner, tokens) = (4, 64, 32, s.between(1, 6));
    let pack = 8 / bits;
    let weight =
        |s: &mut Source, rows: i64, width: i64| s.ints(DataType::Uint8, &[experts, rows, width / pack], 0, 255);
    let scale = |s: &mut Source, rows: i64, width: i64| {
        let most = 0.3 / (1i64 << bits) as f64;
        match block {
            None => s.floats(FLOAT, &[experts, rows], 0.0, most),
            Some(block) => s.floats(FLOAT, &[experts, rows, width / block], 0.0, most),
        }
    };
    let bias = s.maybe(|s| s.normal(&[experts, inner]));
    let mut single = s
        .single()
        .input(s.normal(&[tokens, width]))
        .input(s.floats(FLOAT, &[tokens, experts], -3.0, 3.0))
        .fixed(weight(s, inner, width))
        .fixed(scale(s, inner, width))
        .maybe(bias)
        .fixed(weight(s, width, inner))
        .fixed(scale(s, width, inner))
        .int("k", s.between(1, 2))
        .int("expert_weight_bits", bits)
        .text("activation_type", s.pick(&["silu", "relu", "gelu", "identity"]))
        .output(FLOAT)
        .tolerance(1e-3);
    if let Some(block) = block {
        single = single.int("block_size", block);
    }
    s.case(single)
}

pub const ROWS: &[Generator] = &[
    ("", "If", branch),
    ("", "Loop", looped),
    ("", "Scan", scan),
    (MS, "CausalConvWithState", causal_convolution),
    (MS, "LinearAttention", linear_attention),
    (MS, "MoE", experts),
    (MS, "QMoE", quantised_experts),
];
