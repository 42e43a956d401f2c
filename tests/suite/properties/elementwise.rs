//! Cases of arithmetic, comparison, selection and activation, element by element.

use interlace::ir::DataType;

use super::Generator;
use super::case::Case;
use super::source::{INTEGERS, Source};

const MS: &str = "com.microsoft";

/// One float tensor in a range.
fn unary(s: &mut Source, low: f64, high: f64) -> Case {
    let (dtype, shape) = (s.float_type(), s.any_shape(0, 4));
    let x = s.floats(dtype, &shape, low, high);
    let single = s.single().input(x).output(dtype);
    s.case(single)
}

/// As `unary`, with infinities and NaN.
fn unary_with_specials(s: &mut Source) -> Case {
    let shape = s.shape(1, 3);
    let x = specials(s, &shape);
    let single = s.single().input(x).output(DataType::Bool);
    s.case(single)
}

fn specials(s: &mut Source, shape: &[i64]) -> interlace::ir::Tensor {
    let list = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 1.5, -2.0];
    let dtype = s.float_type();
    let values: Vec<f64> = (0..super::source::count(shape)).map(|_| s.pick(&list)).collect();
    super::source::encode(dtype, shape, &values)
}

/// One tensor of any number type.
fn unary_number(s: &mut Source) -> Case {
    let (dtype, shape) = (s.number_type(), s.any_shape(0, 4));
    let x = s.numbers(dtype, &shape);
    let single = s.single().input(x).output(dtype);
    s.case(single)
}

/// One optional float attribute.
fn with_alpha(s: &mut Source, name: &'static str, low: f64, high: f64) -> Case {
    let (dtype, shape) = (s.float_type(), s.any_shape(0, 4));
    let x = s.floats(dtype, &shape, -6.0, 6.0);
    let mut single = s.single().input(x).output(dtype);
    if s.chance(0.7) {
        single = single.float(name, s.float(low, high));
    }
    s.case(single)
}

/// Two shapes that broadcast, in either order.
fn pair(s: &mut Source) -> (Vec<i64>, Vec<i64>) {
    let whole = s.any_shape(0, 4);
    let part = s.part_of(&whole);
    if s.chance(0.5) { (whole, part) } else { (part, whole) }
}

fn binary(s: &mut Source, dtype: DataType, output: DataType) -> Case {
    let (left, right) = pair(s);
    let (a, b) = (s.numbers(dtype, &left), s.numbers(dtype, &right));
    let single = s.single().input(a).input(b).output(output);
    s.case(single)
}

fn arithmetic(s: &mut Source) -> Case {
    let dtype = s.number_type();
    binary(s, dtype, dtype)
}

fn comparison(s: &mut Source) -> Case {
    let dtype = s.number_type();
    binary(s, dtype, DataType::Bool)
}

fn equality(s: &mut Source) -> Case {
    let dtype = if s.chance(0.2) { DataType::Bool } else { s.number_type() };
    binary(s, dtype, DataType::Bool)
}

fn boolean(s: &mut Source) -> Case {
    binary(s, DataType::Bool, DataType::Bool)
}

fn bitwise(s: &mut Source) -> Case {
    let dtype = s.pick(INTEGERS);
    binary(s, dtype, dtype)
}

/// No divisor is 0.
fn divisors(s: &mut Source, dtype: DataType, shape: &[i64]) -> interlace::ir::Tensor {
    let values: Vec<f64> = (0..super::source::count(shape))
        .map(|_| {
            let value = if dtype.is_float() { s.float(0.3, 4.0) } else { s.between(1, 6) as f64 };
            if dtype != DataType::Uint8 && s.chance(0.5) { -value } else { value }
        })
        .collect();
    super::source::encode(dtype, shape, &values)
}

fn division(s: &mut Source) -> Case {
    let dtype = s.number_type();
    let (left, right) = pair(s);
    let (a, b) = (s.numbers(dtype, &left), divisors(s, dtype, &right));
    let single = s.single().input(a).input(b).output(dtype);
    s.case(single)
}

fn modulo(s: &mut Source) -> Case {
    let dtype = s.number_type();
    let (left, right) = pair(s);
    let (a, b) = (s.numbers(dtype, &left), divisors(s, dtype, &right));
    let fmod = if dtype.is_float() { 1 } else { s.flag() };
    let single = s.single().input(a).input(b).int("fmod", fmod).output(dtype);
    s.case(single)
}

/// One to four tensors of one type that broadcast.
fn several(s: &mut Source, dtype: DataType) -> Case {
    let shape = s.shape(0, 4);
    let mut single = s.single().output(dtype);
    for _ in 0..s.between(1, 4) {
        let part = s.part_of(&shape);
        single = single.input(s.numbers(dtype, &part));
    }
    s.case(single)
}

fn extremes(s: &mut Source) -> Case {
    let dtype = s.number_type();
    several(s, dtype)
}

fn sums(s: &mut Source) -> Case {
    let dtype = s.float_type();
    several(s, dtype)
}

/// A negative base has an integer exponent.
fn power(s: &mut Source) -> Case {
    let (left, right) = pair(s);
    let base = s.pick(&[DataType::Float, DataType::Double, DataType::Int32, DataType::Int64, DataType::Float16]);
    let exponent = s.pick(&[DataType::Float, DataType::Int32, DataType::Int64, DataType::Double]);
    let exponent = if s.version < 12 { base } else { exponent };
    let (low, high) = if base.is_float() { (0.2, 3.0) } else { (1.0, 5.0) };
    let x = match base.is_float() {
        true => s.floats(base, &left, low, high),
        false => s.ints(base, &left, -4, 4),
    };
    let y = match (base.is_float(), exponent.is_float()) {
        (true, true) => s.floats(exponent, &right, -2.0, 3.0),
        (true, false) => s.ints(exponent, &right, -2, 3),
        (false, true) => s.ints(exponent, &right, 0, 3),
        (false, false) => s.ints(exponent, &right, 0, 4),
    };
    let single = s.single().input(x).input(y).output(base);
    s.case(single)
}

fn clip(s: &mut Source) -> Case {
    let shape = s.any_shape(0, 4);
    if s.version < 11 {
        let dtype = DataType::Float;
        let mut single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
        if s.chance(0.7) {
            single = single.float("min", s.float(-2.0, 0.0));
        }
        if s.chance(0.7) {
            single = single.float("max", s.float(0.0, 2.0));
        }
        return s.case(single);
    }
    let dtype = if s.version < 12 { DataType::Float } else { s.number_type() };
    let low = s.maybe(|s| s.numbers(dtype, &[]));
    let high = s.maybe(|s| s.numbers(dtype, &[]));
    let single = s.single().input(s.numbers(dtype, &shape)).maybe(low).maybe(high).output(dtype);
    s.case(single)
}

fn shift(s: &mut Source) -> Case {
    let (left, right) = pair(s);
    let (x, by) = (s.ints(DataType::Uint8, &left, 0, 255), s.ints(DataType::Uint8, &right, 0, 7));
    let direction = s.pick(&["LEFT", "RIGHT"]);
    let single = s.single().input(x).input(by).text("direction", direction).output(DataType::Uint8);
    s.case(single)
}

fn is_inf(s: &mut Source) -> Case {
    let shape = s.shape(0, 3);
    let x = specials(s, &shape);
    let mut single = s.single().input(x).output(DataType::Bool);
    if s.chance(0.7) {
        single = single.int("detect_negative", s.flag()).int("detect_positive", s.flag());
    }
    s.case(single)
}

fn select(s: &mut Source) -> Case {
    let dtype = s.number_type();
    let shape = s.any_shape(0, 4);
    let parts = [s.part_of(&shape), s.part_of(&shape), s.part_of(&shape)];
    let single = s
        .single()
        .input(s.bools(&parts[0]))
        .input(s.numbers(dtype, &parts[1]))
        .input(s.numbers(dtype, &parts[2]))
        .output(dtype);
    s.case(single)
}

fn softmax(s: &mut Source) -> Case {
    let (dtype, shape) = (s.float_type(), s.shape(1, 4));
    let x = s.floats(dtype, &shape, -8.0, 8.0);
    let axis = s.maybe(|s| s.axis(shape.len()));
    // Before version 13 the axis is 1 by default.
    let axis = if s.version < 13 && shape.len() < 2 { Some(axis.unwrap_or(0)) } else { axis };
    let single = s.single().input(x).maybe_int("axis", axis).output(dtype);
    s.case(single)
}

fn prelu(s: &mut Source) -> Case {
    let (dtype, shape) = (s.float_type(), s.shape(1, 4));
    let part = s.part_of(&shape);
    let single = s.single().input(s.numbers(dtype, &shape)).input(s.floats(dtype, &part, -0.5, 0.9)).output(dtype);
    s.case(single)
}

fn gelu(s: &mut Source) -> Case {
    let (dtype, shape) = (s.float_type(), s.any_shape(0, 4));
    let mut single = s.single().input(s.floats(dtype, &shape, -6.0, 6.0)).output(dtype);
    if s.chance(0.7) {
        single = single.text("approximate", s.pick(&["none", "tanh"]));
    }
    s.case(single)
}

/// Two optional float attributes.
fn with_two(s: &mut Source, names: [&'static str; 2]) -> Case {
    let (dtype, shape) = (s.float_type(), s.any_shape(0, 4));
    let mut single = s.single().input(s.floats(dtype, &shape, -6.0, 6.0)).output(dtype);
    for name in names {
        if s.chance(0.6) {
            single = single.float(name, s.float(0.1, 1.5));
        }
    }
    s.case(single)
}

/// A tensor and a bias over its last axis.
fn with_bias(s: &mut Source, always: bool) -> Case {
    let shape = s.shape(1, 4);
    let width = &shape[shape.len() - 1..];
    let mut single = s.single().input(s.floats(DataType::Float, &shape, -6.0, 6.0)).output(DataType::Float);
    if always || s.chance(0.5) {
        single = single.input(s.normal(width));
    }
    s.case(single)
}

pub const ROWS: &[Generator] = &[
    ("", "Abs", unary_number),
    ("", "Acos", |s| unary(s, -1.0, 1.0)),
    ("", "Acosh", |s| unary(s, 1.0, 9.0)),
    ("", "Add", arithmetic),
    ("", "Asin", |s| unary(s, -1.0, 1.0)),
    ("", "Asinh", |s| unary(s, -5.0, 5.0)),
    ("", "Atan", |s| unary(s, -5.0, 5.0)),
    ("", "Atanh", |s| unary(s, -0.95, 0.95)),
    ("", "Ceil", |s| unary(s, -5.0, 5.0)),
    ("", "Clip", clip),
    ("", "Cos", |s| unary(s, -9.0, 9.0)),
    ("", "Cosh", |s| unary(s, -3.0, 3.0)),
    ("", "Div", division),
    ("", "Erf", |s| unary(s, -4.0, 4.0)),
    ("", "Exp", |s| unary(s, -5.0, 5.0)),
    ("", "Floor", |s| unary(s, -5.0, 5.0)),
    ("", "Log", |s| unary(s, 0.01, 9.0)),
    ("", "Max", extremes),
    ("", "Mean", sums),
    ("", "Min", extremes),
    ("", "Mod", modulo),
    ("", "Mul", arithmetic),
    ("", "Neg", |s| {
        let dtype = if s.chance(0.5) { s.float_type() } else { s.pick(&INTEGERS[..3]) };
        let shape = s.any_shape(0, 4);
        let single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
        s.case(single)
    }),
    ("", "Pow", power),
    ("", "Reciprocal", |s| unary(s, 0.2, 5.0)),
    ("", "Round", |s| unary(s, -5.0, 5.0)),
    ("", "Sign", unary_number),
    ("", "Sin", |s| unary(s, -9.0, 9.0)),
    ("", "Sinh", |s| unary(s, -3.0, 3.0)),
    ("", "Sqrt", |s| unary(s, 0.0, 9.0)),
    ("", "Sub", arithmetic),
    ("", "Sum", sums),
    ("", "Tan", |s| unary(s, -1.4, 1.4)),
    ("", "And", boolean),
    ("", "BitShift", shift),
    ("", "BitwiseAnd", bitwise),
    ("", "BitwiseNot", |s| {
        let (dtype, shape) = (s.pick(INTEGERS), s.any_shape(0, 4));
        let single = s.single().input(s.numbers(dtype, &shape)).output(dtype);
        s.case(single)
    }),
    ("", "BitwiseOr", bitwise),
    ("", "BitwiseXor", bitwise),
    ("", "Equal", equality),
    ("", "Greater", comparison),
    ("", "GreaterOrEqual", comparison),
    ("", "IsInf", is_inf),
    ("", "IsNaN", unary_with_specials),
    ("", "Less", comparison),
    ("", "LessOrEqual", comparison),
    ("", "Not", |s| {
        let shape = s.any_shape(0, 4);
        let single = s.single().input(s.bools(&shape)).output(DataType::Bool);
        s.case(single)
    }),
    ("", "Or", boolean),
    ("", "Where", select),
    ("", "Xor", boolean),
    ("", "Celu", |s| with_alpha(s, "alpha", 0.3, 2.0)),
    ("", "Elu", |s| with_alpha(s, "alpha", 0.3, 2.0)),
    ("", "Gelu", gelu),
    ("", "HardSigmoid", |s| with_two(s, ["alpha", "beta"])),
    ("", "HardSwish", |s| unary(s, -6.0, 6.0)),
    ("", "LeakyRelu", |s| with_alpha(s, "alpha", -0.5, 1.5)),
    ("", "LogSoftmax", softmax),
    ("", "Mish", |s| unary(s, -8.0, 8.0)),
    ("", "PRelu", prelu),
    ("", "Relu", unary_number),
    ("", "Selu", |s| with_two(s, ["alpha", "gamma"])),
    ("", "Sigmoid", |s| unary(s, -9.0, 9.0)),
    ("", "Softmax", softmax),
    ("", "Softplus", |s| unary(s, -30.0, 30.0)),
    ("", "Softsign", |s| unary(s, -9.0, 9.0)),
    ("", "Swish", |s| with_alpha(s, "alpha", 0.3, 2.0)),
    ("", "Tanh", |s| unary(s, -4.0, 4.0)),
    ("", "ThresholdedRelu", |s| with_alpha(s, "alpha", -1.0, 2.0)),
    (MS, "BiasGelu", |s| with_bias(s, true)),
    (MS, "FastGelu", |s| with_bias(s, false)),
    (MS, "Gelu", plain_gelu),
    (MS, "QuickGelu", |s| {
        let shape = s.shape(1, 4);
        let mut single = s.single().input(s.floats(DataType::Float, &shape, -6.0, 6.0)).output(DataType::Float);
        if s.chance(0.6) {
            single = single.float("alpha", s.float(0.5, 2.0));
        }
        s.case(single)
    }),
];

fn plain_gelu(s: &mut Source) -> Case {
    let shape = s.shape(0, 4);
    let single = s.single().input(s.floats(DataType::Float, &shape, -6.0, 6.0)).output(DataType::Float);
    s.case(single)
}
