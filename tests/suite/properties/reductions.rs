//! Cases of reductions over axes and of normalisation.

use interlace::ir::{self, DataType};

use super::Generator;
use super::case::{Builder, Case};
use super::source::{Source, count, list};

const MS: &str = "com.microsoft";

/// How the numbers of a reduction are drawn.
#[derive(Clone, Copy, PartialEq)]
enum Numbers {
    Any,
    /// From 0.3 to 2, for products and logarithms.
    Small,
}

/// `input_since` is the version from which the axes are an input; `plain` reductions may return the input unchanged.
fn reduce(s: &mut Source, input_since: i64, plain: bool, numbers: Numbers, types: &[DataType]) -> Case {
    let dtype = s.pick(types);
    let shape = s.shape(0, 4);
    let x = match numbers {
        Numbers::Any => s.numbers(dtype, &shape),
        Numbers::Small if dtype.is_float() => s.floats(dtype, &shape, 0.3, 2.0),
        // ONNX Runtime saturates integer products that overflow; in LibTorch they wrap around.
        Numbers::Small => {
            s.ints(dtype, &shape, if count(&shape) > 30 { 1 } else { -2 }, if count(&shape) > 30 { 1 } else { 2 })
        }
    };
    let mut axes = s.axes(shape.len());
    if s.version < 11 {
        axes = axes.iter().map(|axis| axis.rem_euclid(shape.len().max(1) as i64)).collect();
    }
    let keep = s.maybe(Source::flag);
    let mut single = s.single().input(x).maybe_int("keepdims", keep).output(dtype);
    let by_input = s.version >= input_since;
    let named = !axes.is_empty() && s.chance(0.8);
    if named {
        single = if by_input { single.input(list(&axes)) } else { single.ints("axes", &axes) };
    } else if by_input {
        // Every axis, or none.
        if s.chance(0.5) {
            single = single.input(list(&[]));
        }
        if plain && s.chance(0.5) {
            single = single.int("noop_with_empty_axes", 1);
        }
    }
    s.case(single)
}

const NUMBERS: &[DataType] =
    &[DataType::Float, DataType::Float, DataType::Double, DataType::Int32, DataType::Int64, DataType::Float16];
const ORDERED: &[DataType] =
    &[DataType::Float, DataType::Double, DataType::Int32, DataType::Int64, DataType::Int8, DataType::Uint8];
const REAL: &[DataType] = &[DataType::Float, DataType::Float, DataType::Double];

fn small(s: &mut Source, shape: &[i64], dtype: DataType) -> ir::Tensor {
    s.floats(dtype, shape, 0.3, 1.7)
}

fn epsilon(s: &mut Source) -> f64 {
    s.pick(&[1e-5, 1e-3, 1e-2])
}

/// `[N, C, ..]` with values that vary along the axes after the channels.
fn image(s: &mut Source, dtype: DataType, least: usize) -> (Vec<i64>, ir::Tensor) {
    let mut shape = vec![s.between(1, 3), s.between(1, 4)];
    for _ in 0..least + s.below(2) {
        shape.push(s.between(2, 5));
    }
    let x = s.floats(dtype, &shape, -3.0, 3.0);
    (shape, x)
}

fn batch_normalization(s: &mut Source) -> Case {
    let dtype = s.pick(REAL);
    let (shape, x) = image(s, dtype, 0);
    let channel = [shape[1]];
    let mut single = s
        .single()
        .input(x)
        .input(s.floats(dtype, &channel, -2.0, 2.0))
        .input(s.floats(dtype, &channel, -2.0, 2.0))
        .input(s.floats(dtype, &channel, -2.0, 2.0))
        .input(small(s, &channel, dtype))
        .output(dtype);
    if s.chance(0.6) {
        single = single.float("epsilon", epsilon(s));
    }
    if s.chance(0.3) {
        single = single.float("momentum", 0.8);
    }
    s.case(single)
}

fn group_normalization(s: &mut Source) -> Case {
    let (groups, per_group) = (s.between(1, 3), s.between(1, 3));
    let channels = groups * per_group;
    let shape = [s.between(1, 2), channels, s.between(2, 4), s.between(2, 4)];
    let own = if s.version >= 21 { channels } else { groups };
    let mut single = s
        .single()
        .input(s.normal(&shape))
        .input(s.normal(&[own]))
        .input(s.normal(&[own]))
        .int("num_groups", groups)
        .output(DataType::Float)
        .tolerance(1e-3);
    if s.chance(0.6) {
        single = single.float("epsilon", epsilon(s));
    }
    s.case(single)
}

fn instance_normalization(s: &mut Source) -> Case {
    let (shape, x) = image(s, DataType::Float, 1);
    let single = s.single().input(x).input(s.normal(&shape[1..2])).input(s.normal(&shape[1..2]));
    let single = single.float("epsilon", epsilon(s)).output(DataType::Float).tolerance(1e-3);
    s.case(single)
}

fn layer_normalization(s: &mut Source) -> Case {
    let dtype = s.pick(&[DataType::Float, DataType::Float, DataType::Double, DataType::Float16]);
    let mut shape = s.shape(1, 4);
    let rank = shape.len();
    shape[rank - 1] = s.between(2, 6);
    let axis = s.maybe(|s| s.axis(rank));
    let at = axis.unwrap_or(-1).rem_euclid(rank as i64) as usize;
    let bias = s.maybe(|s| s.floats(dtype, &shape[at..], -2.0, 2.0));
    let mut single = s
        .single()
        .input(s.floats(dtype, &shape, -3.0, 3.0))
        .input(s.floats(dtype, &shape[at..], -2.0, 2.0))
        .maybe(bias)
        .maybe_int("axis", axis)
        .float("epsilon", epsilon(s))
        .output(dtype)
        .tolerance(if dtype == DataType::Float16 { 2e-2 } else { 1e-3 });
    if dtype != DataType::Float16 && s.chance(0.4) {
        // The default stash type makes the statistics of double inputs floats too.
        single = single.output(DataType::Float);
        if s.chance(0.6) {
            single = single.output(DataType::Float);
        }
    }
    s.case(single)
}

/// RMS normalisation under one of its names.
fn rms(s: &mut Source, statistics: bool) -> Case {
    let mut shape = s.shape(1, 4);
    let rank = shape.len();
    shape[rank - 1] = s.between(2, 6);
    let axis = s.maybe(|s| s.axis(rank));
    let at = axis.unwrap_or(-1).rem_euclid(rank as i64) as usize;
    let mut single = s
        .single()
        .input(s.floats(DataType::Float, &shape, -3.0, 3.0))
        .input(s.normal(&shape[at..]))
        .maybe_int("axis", axis)
        .output(DataType::Float);
    if s.chance(0.6) {
        single = single.float("epsilon", epsilon(s));
    }
    if statistics && s.chance(0.4) {
        single = single.output(DataType::Float);
    }
    s.case(single)
}

/// ONNX Runtime supports the operator in the default domain only.
fn rms_of_microsoft(s: &mut Source) -> Case {
    let mut case = rms(s, true);
    let mut reference: ir::Model = case.model.clone();
    reference.graph.body.nodes[0].domain.clear();
    case.reference = Some(reference);
    case
}

fn lp_normalization(s: &mut Source) -> Case {
    let dtype = s.pick(REAL);
    let shape = s.shape(1, 4);
    let (axis, order) = (s.maybe(|s| s.axis(shape.len())), s.maybe(|s| s.between(1, 2)));
    let single = s.single().input(s.numbers(dtype, &shape)).maybe_int("axis", axis).maybe_int("p", order).output(dtype);
    s.case(single)
}

fn skip_layer(s: &mut Source) -> Case {
    let shape = [s.between(1, 3), s.between(1, 4), s.between(2, 8)];
    let width = &shape[2..];
    let (beta, bias) = (s.maybe(|s| s.normal(width)), s.maybe(|s| s.normal(width)));
    let mut single = s
        .single()
        .input(s.normal(&shape))
        .input(s.normal(&shape))
        .input(s.normal(width))
        .maybe(beta)
        .maybe(bias)
        .float("epsilon", epsilon(s))
        .output(DataType::Float)
        .tolerance(1e-3);
    if s.chance(0.5) {
        single = single.unwanted().unwanted().output(DataType::Float);
    }
    s.case(single)
}

fn skip_rms(s: &mut Source) -> Case {
    let shape = [s.between(1, 3), s.between(1, 4), s.between(2, 8)];
    let width = &shape[2..];
    let bias = s.maybe(|s| s.normal(width));
    let mut single = s
        .single()
        .input(s.normal(&shape))
        .input(s.normal(&shape))
        .input(s.normal(width))
        .maybe(bias)
        .float("epsilon", epsilon(s))
        .output(DataType::Float);
    if s.chance(0.5) {
        single = single.unwanted().unwanted().output(DataType::Float);
    }
    s.case(single)
}

/// X + bias + skip: ONNX Runtime has no CPU kernel for it.
fn bias_add(s: &mut Source) -> Case {
    let shape = [s.between(1, 2), s.between(1, 4), s.between(1, 6)];
    let single = s.single().input(s.normal(&shape)).input(s.normal(&shape[2..])).input(s.normal(&shape));
    let mut case = single.output(DataType::Float).case(|| false);
    let mut plain = Builder::new(s.version);
    for (name, tensor) in &case.feeds {
        plain.input(name, tensor.dtype, None);
    }
    plain.output("out0", DataType::Float);
    let first = plain.node("Add", &["in0", "in1"], &["sum"], Vec::new());
    let second = plain.node("Add", &["sum", "in2"], &["out0"], Vec::new());
    plain.push(first);
    plain.push(second);
    case.reference = Some(plain.model);
    case
}

pub const ROWS: &[Generator] = &[
    ("", "ReduceL1", |s| reduce(s, 18, false, Numbers::Any, NUMBERS)),
    ("", "ReduceL2", |s| reduce(s, 18, false, Numbers::Any, REAL)),
    ("", "ReduceLogSum", |s| reduce(s, 18, false, Numbers::Small, REAL)),
    ("", "ReduceLogSumExp", |s| reduce(s, 18, false, Numbers::Any, REAL)),
    ("", "ReduceMax", |s| reduce(s, 18, true, Numbers::Any, ORDERED)),
    ("", "ReduceMean", |s| reduce(s, 18, true, Numbers::Any, REAL)),
    ("", "ReduceMin", |s| reduce(s, 18, true, Numbers::Any, ORDERED)),
    ("", "ReduceProd", |s| reduce(s, 18, true, Numbers::Small, NUMBERS)),
    ("", "ReduceSum", |s| reduce(s, 13, true, Numbers::Any, NUMBERS)),
    ("", "ReduceSumSquare", |s| reduce(s, 18, false, Numbers::Any, NUMBERS)),
    ("", "BatchNormalization", batch_normalization),
    ("", "GroupNormalization", group_normalization),
    ("", "InstanceNormalization", instance_normalization),
    ("", "LayerNormalization", layer_normalization),
    ("", "LpNormalization", lp_normalization),
    ("", "RMSNormalization", |s| rms(s, false)),
    ("", "SimplifiedLayerNormalization", |s| rms(s, true)),
    (MS, "SimplifiedLayerNormalization", rms_of_microsoft),
    (MS, "SkipLayerNormalization", skip_layer),
    (MS, "SkipSimplifiedLayerNormalization", skip_rms),
    (MS, "BiasAdd", bias_add),
];
