//! Cases of attention and rotary embeddings.

use interlace::ir::{AttributeKind, DataType};
use interlace::rewrite::{FUSED_ATTENTION, FUSED_SILU, INTERNAL_DOMAIN};

use super::Generator;
use super::case::{Builder, Case};
use super::source::{Source, count, encode, int64};

const MS: &str = "com.microsoft";
const FLOAT: DataType = DataType::Float;

/// A mask over keys in which each query sees the first key.
fn seen(s: &mut Source, shape: &[i64]) -> interlace::ir::Tensor {
    let columns = shape[shape.len() - 1] as usize;
    let values: Vec<f64> =
        (0..count(shape)).map(|at| if at % columns == 0 || s.chance(0.7) { 1.0 } else { 0.0 }).collect();
    encode(DataType::Bool, shape, &values)
}

/// A bool mask as numbers.
fn as_int32(mask: &interlace::ir::Tensor) -> interlace::ir::Tensor {
    let shape: Vec<i64> = mask.dims.iter().map(|&dim| dim as i64).collect();
    let values: Vec<f64> = mask.bytes().iter().map(|&byte| f64::from(byte)).collect();
    encode(DataType::Int32, &shape, &values)
}

/// Lengths of an attention: samples, queries, past, query heads, key-value heads, and widths.
struct Sizes {
    batch: i64,
    rows: i64,
    past: i64,
    heads: i64,
    groups: i64,
    width: i64,
}

fn sizes(s: &mut Source) -> Sizes {
    let groups = s.between(1, 2);
    let (batch, rows, past) = (s.between(1, 2), s.between(1, 5), if s.chance(0.5) { 0 } else { s.between(1, 5) });
    Sizes { batch, rows, past, heads: groups * s.between(1, 2), groups, width: s.pick(&[8, 16]) }
}

fn attention(s: &mut Source) -> Case {
    let Sizes { batch, rows, past, heads, groups, width } = sizes(s);
    let value_width = if s.chance(0.3) { 4 } else { width };
    let own = if past == 0 && s.chance(0.4) { s.between(1, 6) } else { rows };
    let total = past + own;
    let flat = s.chance(0.5);
    let shape = |heads: i64, steps: i64, width: i64| {
        if flat { vec![batch, steps, heads * width] } else { vec![batch, heads, steps, width] }
    };
    let mask = match s.below(4) {
        0 => Some(seen(s, &[rows, total])),
        1 => Some(s.floats(FLOAT, &[batch, 1, rows, total], -2.0, 2.0)),
        _ => None,
    };
    let mut single = s
        .single()
        .input(s.normal(&shape(heads, rows, width)))
        .input(s.normal(&shape(groups, own, width)))
        .input(s.normal(&shape(groups, own, value_width)))
        .maybe(mask);
    if past > 0 {
        single =
            single.input(s.normal(&[batch, groups, past, width])).input(s.normal(&[batch, groups, past, value_width]));
    }
    if flat {
        single = single.int("q_num_heads", heads).int("kv_num_heads", groups);
    }
    if s.chance(0.4) {
        single = single.int("is_causal", 1);
    }
    if s.chance(0.3) {
        single = single.float("scale", s.float(0.1, 0.8));
    }
    if s.chance(0.3) {
        single = single.float("softcap", s.float(0.5, 3.0));
    }
    single = single.output(FLOAT);
    if past > 0 {
        single = single.output(FLOAT).output(FLOAT);
    } else if s.version >= 24 && s.chance(0.4) {
        // The number of valid keys of each sample.
        single = single.absent().absent().input(s.ints(DataType::Int64, &[batch], 1, own));
    } else if s.chance(0.3) {
        // In mode 2 the masked scores are an output: the lowest float in ONNX Runtime, minus infinity in ONNX.
        let mode = s.pick(&[0, 1, 3]);
        single = single.unwanted().unwanted().output(FLOAT).int("qk_matmul_output_mode", mode);
    }
    let single = single.tolerance(1e-3);
    s.case(single)
}

fn with_projection(s: &mut Source) -> Case {
    let Sizes { batch, rows, past, heads, width, .. } = sizes(s);
    let (hidden, inner) = (s.between(2, 6), heads * width);
    let total = past + rows;
    let mask = match s.below(4) {
        0 => Some(s.ints(DataType::Int32, &[batch], 1, total)),
        1 => Some(as_int32(&seen(s, &[batch, total]))),
        _ => None,
    };
    let mask = mask.filter(|mask| mask.dims.len() == 2 || past == 0);
    let mut single = s
        .single()
        .input(s.normal(&[batch, rows, hidden]))
        .input(s.floats(FLOAT, &[hidden, 3 * inner], -0.5, 0.5))
        .input(s.floats(FLOAT, &[3 * inner], -0.5, 0.5))
        .maybe(mask)
        .int("num_heads", heads)
        .output(FLOAT)
        .tolerance(1e-3);
    single = match past > 0 {
        true => single.input(s.normal(&[2, batch, heads, past, width])).output(FLOAT),
        false => single.absent(),
    };
    if s.chance(0.3) {
        single = single.input(s.normal(&[batch, heads, rows, total]));
    }
    if s.chance(0.4) {
        single = single.int("unidirectional", 1);
    }
    if s.chance(0.3) {
        single = single.float("scale", s.float(0.1, 0.8));
    }
    s.case(single)
}

fn multi_head(s: &mut Source) -> Case {
    let Sizes { batch, rows, past, heads, width, .. } = sizes(s);
    let own = if past == 0 && s.chance(0.5) { s.between(1, 6) } else { rows };
    let (inner, total) = (heads * width, past + own);
    let bias = s.maybe(|s| s.normal(&[3 * inner]));
    let padding = match s.below(4) {
        0 if past == 0 => Some(s.ints(DataType::Int32, &[batch], 1, total)),
        1 => Some(as_int32(&seen(s, &[batch, total]))),
        _ => None,
    };
    let added = s.maybe(|s| s.normal(&[1, heads, rows, total]));
    let mut single = s
        .single()
        .input(s.normal(&[batch, rows, inner]))
        .input(s.normal(&[batch, own, inner]))
        .input(s.normal(&[batch, own, inner]))
        .maybe(bias)
        .maybe(padding)
        .maybe(added)
        .int("num_heads", heads)
        .output(FLOAT)
        .tolerance(1e-3);
    if past > 0 {
        single = single.input(s.normal(&[batch, heads, past, width])).input(s.normal(&[batch, heads, past, width]));
        single = single.output(FLOAT).output(FLOAT);
    }
    if own == rows && s.chance(0.4) {
        single = single.int("unidirectional", 1);
    }
    if s.chance(0.3) {
        single = single.float("scale", s.float(0.1, 0.8));
    }
    s.case(single)
}

fn grouped_query(s: &mut Source) -> Case {
    let Sizes { batch, rows, past, heads, groups, width } = sizes(s);
    // Several new steps after a past are supported for one sample only.
    let batch = if past > 0 && rows > 1 { 1 } else { batch };
    let (packed, total) = (s.chance(0.3), past + rows);
    let room = past + if past > 0 && s.chance(0.3) { s.between(0, 3) } else { 0 };
    let mut single = s.single();
    single = match packed {
        true => single.input(s.normal(&[batch, rows, (heads + 2 * groups) * width])).absent().absent(),
        false => single
            .input(s.normal(&[batch, rows, heads * width]))
            .input(s.normal(&[batch, rows, groups * width]))
            .input(s.normal(&[batch, rows, groups * width])),
    };
    let cache = [batch, groups, room, width];
    single = match past > 0 {
        true => single.input(s.normal(&cache)).input(s.normal(&cache)),
        false => single.absent().absent(),
    };
    // Samples of different lengths, one new step each.
    let uneven = past > 0 && rows == 1 && s.chance(0.4);
    let mut lengths: Vec<f64> =
        (0..batch).map(|_| if uneven { s.between(1, total - 1) as f64 } else { (total - 1) as f64 }).collect();
    lengths[0] = (total - 1) as f64;
    single =
        single.input(encode(DataType::Int32, &[batch], &lengths)).input(encode(DataType::Int32, &[], &[total as f64]));
    let rotary = s.chance(0.4);
    single = match rotary {
        true => single.input(s.floats(FLOAT, &[32, width / 2], -1.0, 1.0)).input(s.floats(
            FLOAT,
            &[32, width / 2],
            -1.0,
            1.0,
        )),
        false => single.absent().absent(),
    };
    if rotary {
        single = single.int("do_rotary", 1).int("rotary_interleaved", s.flag());
    }
    match s.below(4) {
        0 => single = single.absent().input(s.normal(&[batch, heads, rows, total])),
        1 => single = single.absent().absent().input(s.normal(&[heads])),
        _ => {}
    }
    single = single.int("num_heads", heads).int("kv_num_heads", groups);
    if s.chance(0.5) {
        single = single.int("local_window_size", s.between(1, total + 1));
    }
    if s.chance(0.3) {
        single = single.float("softcap", s.float(0.5, 3.0));
    }
    if s.chance(0.3) {
        single = single.float("scale", s.float(0.1, 0.8));
    }
    let single = single.output(FLOAT).output(FLOAT).output(FLOAT).tolerance(1e-3);
    s.case(single)
}

/// Lengths of a rotary embedding: samples, steps, heads, width, and half of the rotated width.
struct Turned {
    batch: i64,
    steps: i64,
    heads: i64,
    width: i64,
    half: i64,
}

fn turned(s: &mut Source) -> Turned {
    let half = s.pick(&[2, 4]);
    let width = 2 * half + if s.chance(0.3) { 8 } else { 0 };
    Turned { batch: s.between(1, 2), steps: s.between(1, 4), heads: s.between(1, 3), width, half }
}

fn caches(s: &mut Source, rows: i64, half: i64) -> [interlace::ir::Tensor; 2] {
    [s.floats(FLOAT, &[rows, half], -1.0, 1.0), s.floats(FLOAT, &[rows, half], -1.0, 1.0)]
}

fn standard_rotary(s: &mut Source) -> Case {
    let Turned { batch, steps, heads, width, half } = turned(s);
    let flat = s.chance(0.5);
    let x = if flat { vec![batch, steps, heads * width] } else { vec![batch, heads, steps, width] };
    let mut single = s.single().input(s.normal(&x));
    if s.chance(0.6) {
        let [cos, sin] = caches(s, 12, half);
        single = single.input(cos).input(sin).input(s.ints(DataType::Int64, &[batch, steps], 0, 11));
    } else {
        for _ in 0..2 {
            single = single.input(s.floats(FLOAT, &[batch, steps, half], -1.0, 1.0));
        }
    }
    if flat {
        single = single.int("num_heads", heads);
    }
    if width != 2 * half {
        single = single.int("rotary_embedding_dim", 2 * half);
    }
    if s.chance(0.6) {
        single = single.int("interleaved", s.flag());
    }
    let single = single.output(FLOAT);
    s.case(single)
}

fn rotary_of_microsoft(s: &mut Source) -> Case {
    let Turned { batch, steps, heads, width, half } = turned(s);
    let flat = s.chance(0.6) || width != 2 * half;
    let x = if flat { vec![batch, steps, heads * width] } else { vec![batch, heads, steps, width] };
    let [cos, sin] = caches(s, 12, half);
    let offset = int64(&[1], &[s.between(0, 8)]);
    let positions = if s.chance(0.3) { offset } else { s.ints(DataType::Int64, &[batch, steps], 0, 11) };
    let mut single = s.single().input(s.normal(&x)).input(positions).input(cos).input(sin).int("interleaved", s.flag());
    if width != 2 * half {
        single = single.int("rotary_embedding_dim", 2 * half).int("num_heads", heads);
    }
    let single = single.output(FLOAT);
    s.case(single)
}

fn sections(s: &mut Source) -> Case {
    let (batch, steps, heads) = (s.between(1, 2), s.between(1, 4), s.between(1, 3));
    let layout = s.flag();
    let sections = s.pick(&[[2, 1, 1], [2, 2, 2], [4, 2, 2]]);
    let half: i64 = sections.iter().sum();
    let [cos, sin] = caches(s, 12, half);
    let single = s
        .single()
        .input(s.normal(&[batch, steps, heads * 2 * half]))
        .input(s.ints(DataType::Int64, &[3, batch, steps], 0, 11))
        .input(cos)
        .input(sin)
        .int("num_heads", heads)
        .ints("mrope_section", &sections)
        .int("mrope_layout", layout)
        .output(FLOAT);
    s.case(single)
}

/// The separate operators that a fused node replaces.
pub fn in_parts(case: &mut Case, version: i64, write: impl FnOnce(&mut Builder)) {
    let mut builder = Builder::new(version);
    for (name, tensor) in &case.feeds {
        builder.input(name, tensor.dtype, None);
    }
    for (id, tensor) in &case.model.graph.body.initializers {
        builder.constant(case.model.graph.name(*id), tensor.clone());
    }
    builder.output("out0", FLOAT);
    write(&mut builder);
    case.reference = Some(builder.model);
}

fn fused_attention(s: &mut Source) -> Case {
    let Sizes { batch, rows, past, heads, width, .. } = sizes(s);
    let columns = rows + past;
    let transposed = s.flag();
    let scale = s.float(0.1, 0.8) as f32;
    let k = if transposed == 1 { [batch, heads, width, columns] } else { [batch, heads, columns, width] };
    let mask = s.maybe(|s| s.floats(FLOAT, &[batch, 1, rows, columns], -2.0, 2.0));
    let masked = mask.is_some();
    let single = s
        .single()
        .input(s.normal(&[batch, heads, rows, width]))
        .input(s.normal(&k))
        .input(s.normal(&[batch, heads, columns, width]))
        .maybe(mask)
        .float("scale", f64::from(scale))
        .int("transposed", transposed)
        .output(FLOAT)
        .tolerance(1e-3);
    let mut case = s.case(single);
    in_parts(&mut case, s.version, |b| {
        let mut push = |op: &str, inputs: &[&str], output: &str, attributes: Vec<(&str, AttributeKind)>| {
            let node = b.node(op, inputs, &[output], attributes);
            b.push(node);
        };
        let keys = if transposed == 1 { "in1" } else { "keys" };
        if transposed == 0 {
            push("Transpose", &["in1"], "keys", vec![("perm", AttributeKind::Ints(vec![0, 1, 3, 2]))]);
        }
        push("com.microsoft:FusedMatMul", &["in0", keys], "scaled", vec![("alpha", AttributeKind::Float(scale))]);
        let scores = if masked { "masked" } else { "scaled" };
        if masked {
            push("Add", &["scaled", "in3"], "masked", Vec::new());
        }
        push("Softmax", &[scores], "shares", vec![("axis", AttributeKind::Int(3))]);
        push("MatMul", &["shares", "in2"], "out0", Vec::new());
    });
    case
}

fn fused_silu(s: &mut Source) -> Case {
    let shape = s.any_shape(0, 4);
    let single = s.single().input(s.floats(FLOAT, &shape, -8.0, 8.0)).output(FLOAT);
    let mut case = s.case(single);
    in_parts(&mut case, s.version, |b| {
        let gate = b.node("Sigmoid", &["in0"], &["gate"], Vec::new());
        let out = b.node("Mul", &["in0", "gate"], &["out0"], Vec::new());
        b.push(gate);
        b.push(out);
    });
    case
}

pub const ROWS: &[Generator] = &[
    ("", "Attention", attention),
    (MS, "Attention", with_projection),
    (MS, "MultiHeadAttention", multi_head),
    (MS, "GroupQueryAttention", grouped_query),
    ("", "RotaryEmbedding", standard_rotary),
    (MS, "MRotaryEmbedding", sections),
    (MS, "RotaryEmbedding", rotary_of_microsoft),
    (INTERNAL_DOMAIN, FUSED_ATTENTION, fused_attention),
    (INTERNAL_DOMAIN, FUSED_SILU, fused_silu),
];
