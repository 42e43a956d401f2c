//! Cases of gathering, scattering, searching and counting.

use interlace::ir::{self, DataType};

use super::Generator;
use super::case::Case;
use super::shapes::shuffled;
use super::source::{Source, count, encode, int64, list};

/// Indices into an axis, counted from either end since version 11.
fn indices(s: &mut Source, shape: &[i64], size: i64) -> ir::Tensor {
    let dtype = s.pick(&[DataType::Int64, DataType::Int32]);
    let low = if s.version >= 11 { -size } else { 0 };
    s.ints(dtype, shape, low, size - 1)
}

fn arg(s: &mut Source) -> Case {
    let dtype =
        s.pick(&[DataType::Float, DataType::Float, DataType::Double, DataType::Int32, DataType::Int8, DataType::Uint8]);
    let shape = s.shape(1, 4);
    let axis = s.maybe(|s| if s.version < 11 { s.below(shape.len()) as i64 } else { s.axis(shape.len()) });
    let (keep, last) = (s.maybe(Source::flag), s.maybe(Source::flag).filter(|_| s.version >= 12));
    let single = s
        .single()
        .input(s.numbers(dtype, &shape))
        .maybe_int("axis", axis)
        .maybe_int("keepdims", keep)
        .maybe_int("select_last_index", last)
        .output(DataType::Int64);
    s.case(single)
}

fn compress(s: &mut Source) -> Case {
    let (dtype, shape) = (s.number_type(), s.shape(1, 4));
    let axis = s.maybe(|s| if s.version < 11 { s.below(shape.len()) as i64 } else { s.axis(shape.len()) });
    let length = match axis {
        Some(axis) => shape[axis.rem_euclid(shape.len() as i64) as usize],
        None => count(&shape) as i64,
    };
    let own = s.between(1, length);
    let single =
        s.single().input(s.numbers(dtype, &shape)).input(s.bools(&[own])).maybe_int("axis", axis).output(dtype);
    s.case(single)
}

fn cum_sum(s: &mut Source) -> Case {
    let dtype = s.pick(&[DataType::Float, DataType::Double, DataType::Int32, DataType::Int64]);
    let shape = s.any_shape(1, 4);
    let kind = s.pick(&[DataType::Int32, DataType::Int64]);
    let axis = encode(kind, &[], &[s.axis(shape.len()) as f64]);
    let (exclusive, reverse) = (s.maybe(Source::flag), s.maybe(Source::flag));
    let single = s
        .single()
        .input(s.numbers(dtype, &shape))
        .input(axis)
        .maybe_int("exclusive", exclusive)
        .maybe_int("reverse", reverse)
        .output(dtype);
    s.case(single)
}

fn gather(s: &mut Source) -> Case {
    let (dtype, shape) = (s.number_type(), s.shape(1, 4));
    let axis = s.axis(shape.len());
    let size = shape[axis.rem_euclid(shape.len() as i64) as usize];
    let own = s.any_shape(0, 3);
    let single =
        s.single().input(s.numbers(dtype, &shape)).input(indices(s, &own, size)).int("axis", axis).output(dtype);
    s.case(single)
}

fn gather_elements(s: &mut Source) -> Case {
    let (dtype, shape) = (s.number_type(), s.shape(1, 4));
    let axis = s.axis(shape.len());
    let at = axis.rem_euclid(shape.len() as i64) as usize;
    let own: Vec<i64> = shape
        .iter()
        .enumerate()
        .map(|(place, &dim)| if place == at { s.between(1, 5) } else { s.between(1, dim) })
        .collect();
    let single =
        s.single().input(s.numbers(dtype, &shape)).input(indices(s, &own, shape[at])).int("axis", axis).output(dtype);
    s.case(single)
}

fn gather_nd(s: &mut Source) -> Case {
    let (dtype, shape) = (s.number_type(), s.shape(1, 4));
    let batch = if s.version >= 12 { s.below(shape.len()) } else { 0 };
    let depth = 1 + s.below(shape.len() - batch);
    let mut own = shape[..batch].to_vec();
    own.extend(s.shape(0, 2));
    let tuples = count(&own);
    let mut values = Vec::new();
    for _ in 0..tuples {
        for axis in 0..depth {
            let size = shape[batch + axis];
            values.push(s.between(-size, size - 1));
        }
    }
    own.push(depth as i64);
    let mut single = s.single().input(s.numbers(dtype, &shape)).input(int64(&own, &values)).output(dtype);
    if batch > 0 {
        single = single.int("batch_dims", batch as i64);
    }
    s.case(single)
}

fn non_zero(s: &mut Source) -> Case {
    let dtype = s.pick(&[DataType::Float, DataType::Int32, DataType::Int64, DataType::Uint8, DataType::Bool]);
    let shape = s.any_shape(1, 4);
    let values: Vec<f64> = (0..count(&shape)).map(|_| s.pick(&[0.0, 0.0, 1.0, 1.0])).collect();
    let single = s.single().input(encode(dtype, &shape, &values)).output(DataType::Int64);
    s.case(single)
}

fn one_hot(s: &mut Source) -> Case {
    let (int, long, float) = (DataType::Int32, DataType::Int64, DataType::Float);
    // Types of indices, depth and values: the combinations that ONNX Runtime supports.
    let (own, deep, dtype) = s.pick(&[
        (long, long, long),
        (float, long, long),
        (long, long, float),
        (int, int, float),
        (float, float, float),
        (long, int, float),
    ]);
    let shape = s.any_shape(1, 3);
    let depth = s.between(1, 5);
    let axis = s.maybe(|s| s.axis(shape.len() + 1));
    let depth_shape: &[i64] = if s.chance(0.5) { &[] } else { &[1] };
    // Also outside the depth on both sides.
    let index = s.ints(own, &shape, -depth - 2, depth + 1);
    let single = s
        .single()
        .input(index)
        .input(encode(deep, depth_shape, &[depth as f64]))
        .input(s.numbers(dtype, &[2]))
        .maybe_int("axis", axis)
        .output(dtype);
    s.case(single)
}

fn top_k(s: &mut Source) -> Case {
    let dtype = s.pick(&[DataType::Float, DataType::Float, DataType::Double, DataType::Int32, DataType::Int64]);
    let dtype = if s.version < 11 { DataType::Float } else { dtype };
    let shape = s.shape(1, 4);
    let axis = s.axis(shape.len());
    let axis = if s.version < 11 { axis.rem_euclid(shape.len() as i64) } else { axis };
    let size = shape[axis.rem_euclid(shape.len() as i64) as usize];
    let count = s.between(0, size);
    let mut single = s.single().input(s.numbers(dtype, &shape)).input(list(&[count])).int("axis", axis);
    if s.version >= 11 {
        single = single.int("largest", s.flag()).int("sorted", 1);
    }
    let single = single.output(dtype).output(DataType::Int64);
    s.case(single)
}

/// The type of the scattered values, and the reduction.
fn scattered(s: &mut Source) -> (DataType, Option<&'static str>) {
    let reductions: &[&str] = match s.version {
        18.. => &["none", "add", "mul", "max", "min"],
        16.. => &["none", "add", "mul"],
        _ => return (s.number_type(), None),
    };
    let reduction = s.maybe(|s| s.pick(reductions));
    let dtype = s.pick(&[DataType::Float, DataType::Double, DataType::Int32, DataType::Int64, DataType::Float16]);
    (dtype, reduction)
}

fn scatter_elements(s: &mut Source) -> Case {
    let (dtype, reduction) = scattered(s);
    let shape = s.shape(1, 4);
    let axis = if s.version < 11 { s.below(shape.len()) as i64 } else { s.axis(shape.len()) };
    let at = axis.rem_euclid(shape.len() as i64) as usize;
    let repeats = reduction.is_some_and(|reduction| reduction != "none");
    let mut own: Vec<i64> = shape.iter().map(|&dim| s.between(1, dim)).collect();
    if repeats {
        own[at] = s.between(1, 6);
    }
    // Without a reduction each place is written once.
    let order = shuffled(s, shape[at] as usize);
    let inner: usize = count(&own[at + 1..]);
    let values: Vec<f64> = (0..count(&own))
        .map(|place| {
            let along = place / inner % own[at] as usize;
            let index = if repeats { s.between(0, shape[at] - 1) } else { order[along] };
            let index = if s.version >= 11 && s.chance(0.3) { index - shape[at] } else { index };
            index as f64
        })
        .collect();
    let index_type = s.pick(&[DataType::Int64, DataType::Int32]);
    let index = encode(index_type, &own, &values);
    let mut single =
        s.single().input(s.numbers(dtype, &shape)).input(index).input(s.numbers(dtype, &own)).int("axis", axis);
    if let Some(reduction) = reduction {
        single = single.text("reduction", reduction);
    }
    let single = single.output(dtype);
    s.case(single)
}

fn scatter_nd(s: &mut Source) -> Case {
    let (dtype, reduction) = scattered(s);
    let shape = s.shape(1, 4);
    let depth = 1 + s.below(shape.len());
    let places = count(&shape[..depth]);
    let repeats = reduction.is_some_and(|reduction| reduction != "none");
    let tuples = if repeats { 1 + s.below(6) } else { 1 + s.below(places) };
    let chosen: Vec<i64> = match repeats {
        true => (0..tuples).map(|_| s.below(places) as i64).collect(),
        false => shuffled(s, places)[..tuples].to_vec(),
    };
    let mut values = Vec::new();
    for mut place in chosen {
        let mut one = Vec::new();
        for axis in (0..depth).rev() {
            let index = place % shape[axis];
            one.push(if s.chance(0.3) { index - shape[axis] } else { index });
            place /= shape[axis];
        }
        values.extend(one.into_iter().rev());
    }
    let mut own = vec![tuples as i64];
    own.extend(&shape[depth..]);
    let mut single = s
        .single()
        .input(s.numbers(dtype, &shape))
        .input(int64(&[tuples as i64, depth as i64], &values))
        .input(s.numbers(dtype, &own));
    if let Some(reduction) = reduction {
        single = single.text("reduction", reduction);
    }
    let single = single.output(dtype);
    s.case(single)
}

fn tensor_scatter(s: &mut Source) -> Case {
    let shape = [s.between(1, 3), s.between(1, 2), s.between(2, 6), s.between(1, 4)];
    let steps = s.between(1, shape[2]);
    let circular = s.chance(0.5);
    let mut update = shape;
    update[2] = steps;
    let most = if circular { shape[2] - 1 } else { shape[2] - steps };
    let starts = s.maybe(|s| s.ints(DataType::Int64, &[shape[0]], 0, most));
    let mut single = s.single().input(s.normal(&shape)).input(s.normal(&update)).maybe(starts);
    if circular || s.chance(0.5) {
        single = single.text("mode", if circular { "circular" } else { "linear" });
    }
    if s.chance(0.5) {
        single = single.int("axis", -2);
    }
    let single = single.output(DataType::Float);
    s.case(single)
}

pub const ROWS: &[Generator] = &[
    ("", "ArgMax", arg),
    ("", "ArgMin", arg),
    ("", "Compress", compress),
    ("", "CumSum", cum_sum),
    ("", "Gather", gather),
    ("", "GatherElements", gather_elements),
    ("", "GatherND", gather_nd),
    ("", "NonZero", non_zero),
    ("", "OneHot", one_hot),
    ("", "TopK", top_k),
    ("", "Scatter", scatter_elements),
    ("", "ScatterElements", scatter_elements),
    ("", "ScatterND", scatter_nd),
    ("", "TensorScatter", tensor_scatter),
];
