//! Cases of constants, casts, and operators that rearrange, join, slice and repeat.

use interlace::ir::{AttributeKind, DataType};

use super::Generator;
use super::case::Case;
use super::source::{INTEGERS, Source, count, encode, int64, list};

/// Any type that ONNX Runtime can copy.
fn any_type(s: &mut Source) -> DataType {
    if s.chance(0.15) { DataType::Bool } else { s.number_type() }
}

fn constant(s: &mut Source) -> Case {
    let single = s.single();
    let newer = s.version >= 12;
    let single = match s.below(if newer { 5 } else { 1 }) {
        0 => {
            let (dtype, shape) = (any_type(s), s.any_shape(0, 3));
            single.set("value", AttributeKind::Tensor(s.numbers(dtype, &shape))).output(dtype)
        }
        1 => single.int("value_int", s.between(-9, 9)).output(DataType::Int64),
        2 => single.ints("value_ints", &[3, -1, 4]).output(DataType::Int64),
        3 => single.float("value_float", s.float(-2.0, 2.0)).output(DataType::Float),
        _ => single.set("value_floats", AttributeKind::Floats(vec![0.5, -1.25])).output(DataType::Float),
    };
    s.case(single)
}

fn constant_of_shape(s: &mut Source) -> Case {
    let shape = s.any_shape(0, 4);
    let single = s.single().input(list(&shape));
    if s.chance(0.3) {
        let single = single.output(DataType::Float);
        return s.case(single);
    }
    let dtype = any_type(s);
    let single = single.set("value", AttributeKind::Tensor(s.numbers(dtype, &[1]))).output(dtype);
    s.case(single)
}

fn eye(s: &mut Source) -> Case {
    let types = [DataType::Float, DataType::Double, DataType::Int32, DataType::Int64];
    let (own, other) = (s.pick(&types), s.pick(&types));
    let shape = s.shape(2, 2);
    let mut single = s.single().input(s.numbers(own, &shape));
    let asked = s.chance(0.5);
    if asked {
        single = single.int("dtype", other as i64);
    }
    if s.chance(0.6) {
        single = single.int("k", s.between(-4, 4));
    }
    let single = single.output(if asked { other } else { own });
    s.case(single)
}

fn expand(s: &mut Source) -> Case {
    let whole = s.any_shape(0, 4);
    let part = s.part_of(&whole);
    // The target may be the smaller shape, or leave axes unchanged.
    let target: Vec<i64> = match s.below(3) {
        0 => whole.iter().map(|&dim| if s.chance(0.3) { 1 } else { dim }).collect(),
        _ => whole.clone(),
    };
    let dtype = any_type(s);
    let single = s.single().input(s.numbers(dtype, &part)).input(list(&target)).output(dtype);
    s.case(single)
}

fn flatten(s: &mut Source) -> Case {
    let shape = s.any_shape(1, 4);
    let rank = shape.len() as i64;
    let axis = s.maybe(|s| s.between(if s.version < 11 { 0 } else { -rank }, rank));
    let dtype = s.float_type();
    let single = s.single().input(s.numbers(dtype, &shape)).maybe_int("axis", axis).output(dtype);
    s.case(single)
}

fn unchanged(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(0, 4));
    let single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
    s.case(single)
}

fn range(s: &mut Source) -> Case {
    let dtype = s.pick(&[DataType::Float, DataType::Double, DataType::Int16, DataType::Int32, DataType::Int64]);
    let float = dtype.is_float();
    let delta = if float { s.float(0.2, 1.7) } else { s.between(1, 4) as f64 };
    let delta = if s.chance(0.4) { -delta } else { delta };
    let end = |s: &mut Source| if float { s.float(-6.0, 6.0) } else { s.between(-9, 9) as f64 };
    let values = [end(s), end(s), delta].map(|value| encode(dtype, &[], &[value]));
    let [start, limit, delta] = values;
    let single = s.single().input(start).input(limit).input(delta).output(dtype);
    s.case(single)
}

fn reshape(s: &mut Source) -> Case {
    let shape = s.any_shape(0, 4);
    let zero = shape.contains(&0);
    // Adjacent axes are merged, and axes of 1 are inserted.
    let mut target: Vec<i64> = Vec::new();
    for &dim in &shape {
        match target.last_mut() {
            Some(last) if s.chance(0.4) => *last *= dim,
            _ => target.push(dim),
        }
        if s.chance(0.2) {
            target.push(1);
        }
    }
    let allow = s.version >= 14 && s.chance(0.3);
    if !allow {
        for (axis, dim) in target.iter_mut().enumerate() {
            if shape.get(axis) == Some(dim) && s.chance(0.3) {
                *dim = 0;
            }
        }
    }
    let rest: i64 = target.iter().product();
    if !target.is_empty() && s.chance(0.5) && !zero && (rest != 0 || !allow) {
        let axis = s.below(target.len());
        target[axis] = -1;
    }
    let dtype = any_type(s);
    let mut single = s.single().input(s.numbers(dtype, &shape)).input(list(&target)).output(dtype);
    if allow {
        single = single.int("allowzero", 1);
    }
    s.case(single)
}

fn shape_of(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(0, 4));
    let mut single = s.single().input(s.numbers(dtype, &shape)).output(DataType::Int64);
    if s.version >= 15 {
        let (start, end) = (s.maybe(|s| s.between(-5, 5)), s.maybe(|s| s.between(-5, 5)));
        single = single.maybe_int("start", start).maybe_int("end", end);
    }
    s.case(single)
}

fn size_of(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(0, 4));
    let single = s.single().input(s.numbers(dtype, &shape)).output(DataType::Int64);
    s.case(single)
}

fn squeeze(s: &mut Source) -> Case {
    let mut shape = s.any_shape(1, 4);
    for dim in &mut shape {
        if s.chance(0.5) {
            *dim = 1;
        }
    }
    let rank = shape.len() as i64;
    let ones: Vec<i64> = (0..rank).filter(|&axis| shape[axis as usize] == 1).collect();
    let mut axes: Vec<i64> = ones.into_iter().filter(|_| s.chance(0.6)).collect();
    if s.version >= 11 {
        axes.iter_mut().for_each(|axis| *axis -= if s.chance(0.4) { rank } else { 0 });
    }
    let dtype = any_type(s);
    let mut single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
    if !axes.is_empty() {
        single = if s.version >= 13 { single.input(list(&axes)) } else { single.ints("axes", &axes) };
    }
    s.case(single)
}

fn unsqueeze(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(0, 3));
    let extra = 1 + s.below(2);
    let rank = (shape.len() + extra) as i64;
    let mut axes: Vec<i64> = Vec::new();
    while axes.len() < extra {
        let axis = s.between(0, rank - 1);
        if !axes.contains(&axis) {
            axes.push(axis);
        }
    }
    if s.version >= 11 {
        axes.iter_mut().for_each(|axis| *axis -= if s.chance(0.4) { rank } else { 0 });
    }
    let single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
    let single = if s.version >= 13 { single.input(list(&axes)) } else { single.ints("axes", &axes) };
    s.case(single)
}

/// The numbers from 0 on, in random order.
pub fn shuffled(s: &mut Source, count: usize) -> Vec<i64> {
    let mut order: Vec<i64> = (0..count as i64).collect();
    for place in (1..count).rev() {
        order.swap(place, s.below(place + 1));
    }
    order
}

fn transpose(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(0, 4));
    let mut single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
    if s.chance(0.7) && !shape.is_empty() {
        single = single.ints("perm", &shuffled(s, shape.len()));
    }
    s.case(single)
}

fn concat(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.shape(1, 4));
    let axis = s.below(shape.len());
    let mut single = s.single().output(dtype);
    for _ in 0..s.between(1, 4) {
        let mut own = shape.clone();
        own[axis] = s.between(0, 4);
        single = single.input(s.numbers(dtype, &own));
    }
    let back = s.version >= 11 && s.chance(0.3);
    let axis = axis as i64 - if back { shape.len() as i64 } else { 0 };
    let single = single.int("axis", axis);
    s.case(single)
}

fn depth_to_space(s: &mut Source) -> Case {
    let block = s.between(1, 3);
    let shape = [s.between(1, 2), s.between(1, 3) * block * block, s.between(1, 3), s.between(1, 3)];
    let dtype = s.pick(&[DataType::Float, DataType::Double, DataType::Uint8]);
    let mut single = s.single().input(s.numbers(dtype, &shape)).int("blocksize", block).output(dtype);
    if s.version >= 11 && s.chance(0.7) {
        single = single.text("mode", s.pick(&["DCR", "CRD"]));
    }
    s.case(single)
}

fn space_to_depth(s: &mut Source) -> Case {
    let block = s.between(1, 3);
    let shape = [s.between(1, 2), s.between(1, 3), s.between(1, 3) * block, s.between(1, 3) * block];
    let dtype = s.pick(&[DataType::Float, DataType::Double]);
    let single = s.single().input(s.numbers(dtype, &shape)).int("blocksize", block).output(dtype);
    s.case(single)
}

fn dropout(s: &mut Source) -> Case {
    let (dtype, shape) = (s.pick(&[DataType::Float, DataType::Double]), s.any_shape(1, 3));
    let mut single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
    if s.version < 12 {
        single = single.float("ratio", s.float(0.0, 0.9));
    } else if s.chance(0.6) {
        single = single.input(s.floats(DataType::Float, &[], 0.0, 0.9));
        if s.chance(0.5) {
            single = single.input(encode(DataType::Bool, &[], &[0.0]));
        }
    }
    if s.chance(0.4) {
        single = single.output(if s.version >= 10 { DataType::Bool } else { dtype });
    }
    s.case(single)
}

fn pad(s: &mut Source) -> Case {
    let shape = s.shape(1, 4);
    let modes: &[&str] =
        if s.version >= 19 { &["constant", "reflect", "edge", "wrap"] } else { &["constant", "reflect", "edge"] };
    let mode = s.pick(modes);
    let axes: Option<Vec<i64>> = if s.version >= 18 { s.maybe(|s| s.axes(shape.len())) } else { None };
    let axes = axes.filter(|axes| !axes.is_empty());
    let rank = shape.len() as i64;
    let named: Vec<i64> = axes.clone().unwrap_or_else(|| (0..rank).collect());
    let size = |axis: i64| shape[axis.rem_euclid(rank) as usize];
    let mut one = |axis: i64| match mode {
        "constant" => s.between(-(size(axis) / 2), 3),
        "reflect" => s.between(0, size(axis) - 1),
        "wrap" => s.between(0, size(axis)),
        _ => s.between(0, 3),
    };
    let mut pads: Vec<i64> = named.iter().map(|&axis| one(axis)).collect();
    let behind: Vec<i64> = named.iter().map(|&axis| one(axis)).collect();
    pads.extend(behind);
    if s.version < 11 {
        let dtype = s.pick(&[DataType::Float, DataType::Double]);
        let mut single =
            s.single().input(s.numbers(dtype, &shape)).ints("pads", &pads).text("mode", mode).output(dtype);
        if s.chance(0.5) {
            single = single.float("value", s.float(-2.0, 2.0));
        }
        return s.case(single);
    }
    let dtype = if s.version < 13 { s.pick(&[DataType::Float, DataType::Double]) } else { any_type(s) };
    let value = s.maybe(|s| s.numbers(dtype, &[])).filter(|_| mode == "constant");
    let mut single = s.single().input(s.numbers(dtype, &shape)).input(list(&pads)).maybe(value).output(dtype);
    if let Some(axes) = axes {
        single = single.input(list(&axes));
    }
    if mode != "constant" || s.chance(0.3) {
        single = single.text("mode", mode);
    }
    s.case(single)
}

fn slice(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(1, 4));
    let axes = s.axes(shape.len());
    let named = axes.len();
    let all = s.chance(0.3) || named == 0;
    let count = if all { 1 + s.below(shape.len()) } else { named };
    let place = |s: &mut Source| match s.below(6) {
        0 => i64::MAX,
        1 => i64::from(i32::MIN),
        _ => s.between(-7, 7),
    };
    let starts: Vec<i64> = (0..count).map(|_| place(s)).collect();
    let ends: Vec<i64> = (0..count).map(|_| place(s)).collect();
    let mut single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
    if s.version < 10 {
        single = single.ints("starts", &starts).ints("ends", &ends);
        if !all {
            let rank = shape.len() as i64;
            single = single.ints("axes", &axes.iter().map(|axis| axis.rem_euclid(rank)).collect::<Vec<_>>());
        }
        return s.case(single);
    }
    single = single.input(list(&starts)).input(list(&ends));
    let steps: Option<Vec<i64>> = s.maybe(|s| (0..count).map(|_| s.pick(&[1, 2, 3, -1, -2, -3])).collect());
    single = single.maybe((!all).then(|| list(&axes))).maybe(steps.map(|steps| list(&steps)));
    s.case(single)
}

fn split(s: &mut Source) -> Case {
    let (dtype, mut shape) = (any_type(s), s.shape(1, 4));
    let axis = s.axis(shape.len());
    let at = axis.rem_euclid(shape.len() as i64) as usize;
    let parts = s.between(1, 4);
    let uneven = s.version >= 18 && s.chance(0.4);
    let sizes: Option<Vec<i64>> =
        if uneven { None } else { s.maybe(|s| (0..parts).map(|_| s.between(0, 3)).collect()) };
    shape[at] = match &sizes {
        Some(sizes) => sizes.iter().sum(),
        None if uneven => s.between(parts, 9),
        None => parts * s.between(1, 2),
    };
    let mut single = s.single().input(s.numbers(dtype, &shape)).int("axis", axis);
    single = match (&sizes, s.version >= 13) {
        (Some(sizes), true) => single.input(list(sizes)),
        (Some(sizes), false) => single.ints("split", sizes),
        (None, _) if s.version >= 18 => single.int("num_outputs", parts),
        (None, _) => single,
    };
    for _ in 0..parts {
        single = single.output(dtype);
    }
    s.case(single)
}

fn tile(s: &mut Source) -> Case {
    let (dtype, shape) = (any_type(s), s.any_shape(1, 4));
    let repeats: Vec<i64> = shape.iter().map(|_| s.pick(&[0, 1, 1, 2, 3])).collect();
    let single = s.single().input(s.numbers(dtype, &shape)).input(list(&repeats)).output(dtype);
    s.case(single)
}

fn trilu(s: &mut Source) -> Case {
    let dtype = s.pick(&[DataType::Float, DataType::Double, DataType::Int64, DataType::Bool]);
    let shape = s.any_shape(2, 4);
    let diagonal = s.maybe(|s| int64(&[], &[s.between(-5, 5)]));
    let upper = s.maybe(Source::flag);
    let single = s.single().input(s.numbers(dtype, &shape)).maybe(diagonal).maybe_int("upper", upper).output(dtype);
    s.case(single)
}

/// Numbers that every type can hold, except for the fraction and the sign.
fn castable(s: &mut Source, from: DataType, to: DataType, shape: &[i64]) -> interlace::ir::Tensor {
    let signed = from != DataType::Uint8 && to != DataType::Uint8 && from != DataType::Bool;
    let low = if signed { -100.0 } else { 0.0 };
    let values: Vec<f64> = (0..count(shape))
        .map(|_| match from {
            DataType::Bool => s.flag() as f64,
            from if from.is_float() && s.chance(0.1) && to == DataType::Bool => 0.0,
            from if from.is_float() => s.float(low, 100.0),
            _ => s.between(low as i64, 100) as f64,
        })
        .collect();
    encode(from, shape, &values)
}

fn cast_types(s: &mut Source) -> (DataType, DataType) {
    let all = [DataType::Bool, DataType::Float, DataType::Double, DataType::Float16];
    let mut one = || if s.chance(0.5) { s.pick(&all) } else { s.pick(INTEGERS) };
    (one(), one())
}

/// Only ONNX Runtime rounds to half precision.
fn cast_tolerance(from: DataType, to: DataType) -> f64 {
    if from == DataType::Float16 || to == DataType::Float16 { 4e-3 } else { 1e-6 }
}

fn cast(s: &mut Source) -> Case {
    let (from, to) = cast_types(s);
    let shape = s.any_shape(0, 3);
    let x = castable(s, from, to, &shape);
    let single = s.single().input(x).int("to", to as i64).output(to).tolerance(cast_tolerance(from, to));
    s.case(single)
}

fn cast_like(s: &mut Source) -> Case {
    let (from, to) = cast_types(s);
    let shape = s.any_shape(0, 3);
    let x = castable(s, from, to, &shape);
    let single = s.single().input(x).input(s.numbers(to, &[2])).output(to).tolerance(cast_tolerance(from, to));
    s.case(single)
}

pub const ROWS: &[Generator] = &[
    ("", "Constant", constant),
    ("", "ConstantOfShape", constant_of_shape),
    ("", "EyeLike", eye),
    ("", "Expand", expand),
    ("", "Flatten", flatten),
    ("", "Identity", unchanged),
    ("", "Range", range),
    ("", "Reshape", reshape),
    ("", "Shape", shape_of),
    ("", "Size", size_of),
    ("", "Squeeze", squeeze),
    ("", "Transpose", transpose),
    ("", "Unsqueeze", unsqueeze),
    ("", "Concat", concat),
    ("", "DepthToSpace", depth_to_space),
    ("", "Dropout", dropout),
    ("", "Pad", pad),
    ("", "Slice", slice),
    ("", "SpaceToDepth", space_to_depth),
    ("", "Split", split),
    ("", "Tile", tile),
    ("", "Trilu", trilu),
    ("", "Cast", cast),
    ("", "CastLike", cast_like),
];
