//! Element-wise arithmetic with NumPy broadcasting.

use tch::{TchError, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, is_float, many, one};
use crate::torch::operator::{MICROSOFT, Operator};

type Unary = fn(&Tensor) -> Result<Tensor, TchError>;
type Binary = fn(&Tensor, &Tensor) -> Result<Tensor, TchError>;

/// A kernel of one operand.
pub(super) fn unary(f: Unary) -> OpResult<Kernel> {
    one(move |args| Ok(f(args.get(0)?)?))
}

/// A kernel of two operands.
pub(super) fn binary(f: Binary) -> OpResult<Kernel> {
    one(move |args| Ok(f(args.get(0)?, args.get(1)?)?))
}

fn fold(f: Binary) -> OpResult<Kernel> {
    one(move |args| fold_all(args, f))
}

fn fold_all(args: &Args, f: Binary) -> OpResult<Tensor> {
    let mut result = args.get(0)?.shallow_clone();
    for other in args.all().skip(1) {
        result = f(&result, other)?;
    }
    Ok(result)
}

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Abs", 6, |_| unary(|x| x.f_abs())).grad(),
    Operator::new("", "Acos", 7, |_| unary(|x| x.f_acos())).grad(),
    Operator::new("", "Acosh", 9, |_| unary(|x| x.f_acosh())).grad(),
    Operator::new("", "Add", 7, |_| binary(|a, b| a.f_add(b))).rounds().grad(),
    Operator::new("", "Asin", 7, |_| unary(|x| x.f_asin())).grad(),
    Operator::new("", "Asinh", 9, |_| unary(|x| x.f_asinh())).grad(),
    Operator::new("", "Atan", 7, |_| unary(|x| x.f_atan())).grad(),
    Operator::new("", "Atanh", 9, |_| unary(|x| x.f_atanh())).grad(),
    Operator::new("", "Ceil", 6, |_| unary(|x| x.f_ceil())),
    Operator::new("", "Clip", 6, clip).grad(),
    Operator::new("", "Cos", 7, |_| unary(|x| x.f_cos())).grad(),
    Operator::new("", "Cosh", 9, |_| unary(|x| x.f_cosh())).grad(),
    Operator::new("", "Div", 7, |_| binary(divide)).rounds().grad(),
    Operator::new("", "Erf", 9, |_| unary(|x| x.f_erf())).grad(),
    Operator::new("", "Exp", 6, |_| unary(|x| x.f_exp())).widens().grad(),
    Operator::new("", "Floor", 6, |_| unary(|x| x.f_floor())),
    Operator::new("", "Log", 6, |_| unary(|x| x.f_log())).widens().grad(),
    Operator::new("", "Max", 8, |_| fold(|a, b| a.f_maximum(b))).grad(),
    Operator::new("", "Mean", 8, |_| one(mean)).grad(),
    Operator::new("", "Min", 8, |_| fold(|a, b| a.f_minimum(b))).grad(),
    Operator::new("", "Mod", 10, modulo),
    Operator::new("", "Mul", 7, |_| binary(|a, b| a.f_mul(b))).rounds().grad(),
    Operator::new("", "Neg", 6, |_| unary(|x| x.f_neg())).grad(),
    Operator::new("", "Pow", 7, |_| one(power)).widens().grad(),
    Operator::new("", "Reciprocal", 6, |_| unary(|x| x.f_reciprocal())).widens().grad(),
    Operator::new("", "Round", 11, |_| unary(|x| x.f_round())),
    Operator::new("", "Sign", 9, |_| unary(|x| x.f_sign())),
    Operator::new("", "Sin", 7, |_| unary(|x| x.f_sin())).grad(),
    Operator::new("", "Sinh", 9, |_| unary(|x| x.f_sinh())).grad(),
    Operator::new("", "Sqrt", 6, |_| unary(|x| x.f_sqrt())).widens().grad(),
    Operator::new("", "Sub", 7, |_| binary(|a, b| a.f_sub(b))).rounds().grad(),
    Operator::new("", "Sum", 8, |_| fold(|a, b| a.f_add(b))).rounds().grad(),
    Operator::new("", "Tan", 7, |_| unary(|x| x.f_tan())).grad(),
    Operator::new(MICROSOFT, "BiasAdd", 1, |_| many(bias_add)).grad(),
];

/// Integer division truncates towards zero, as in ONNX Runtime.
fn divide(a: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
    if is_float(a.f_kind()?) || is_float(b.f_kind()?) { a.f_div(b) } else { a.f_div_tensor_mode(b, "trunc") }
}

fn mean(args: &Args) -> OpResult<Tensor> {
    let count = args.all().count() as f64;
    Ok(fold_all(args, |a, b| a.f_add(b))?.f_div_scalar(count)?)
}

/// The remainder: with the divisor's sign for integers, with the dividend's when `fmod` is set.
fn modulo(b: &mut Build) -> OpResult<Kernel> {
    let fmod = b.attributes.flag("fmod", false)?;
    one(move |args| {
        let (x, y) = (args.get(0)?, args.get(1)?);
        if fmod {
            return Ok(x.f_fmod_tensor(y)?);
        }
        if is_float(x.f_kind()?) {
            return Err(OpError::new("floating-point operands need attribute `fmod` = 1"));
        }
        Ok(x.f_remainder_tensor(y)?)
    })
}

/// The result has the type of the base.
fn power(args: &Args) -> OpResult<Tensor> {
    let (base, exponent) = (args.get(0)?, args.get(1)?);
    let kind = base.f_kind()?;
    let on_host = exponent.device() == tch::Device::Cpu && !exponent.requires_grad();
    if is_float(kind) && on_host && exponent.numel() == 1 && exponent.dim() <= base.dim() {
        return Ok(base.f_pow_tensor_scalar(exponent.f_reshape([1i64])?.f_double_value(&[0])?)?);
    }
    Ok(base.f_pow(exponent)?.f_to_kind(kind)?)
}

fn clip(b: &mut Build) -> OpResult<Kernel> {
    if b.version < 11 {
        let low = b.attributes.float("min", f32::MIN)?;
        let high = b.attributes.float("max", f32::MAX)?;
        return one(move |args| Ok(args.get(0)?.f_clamp(low, high)?));
    }
    one(|args| {
        let x = args.get(0)?;
        match (args.opt(1), args.opt(2)) {
            (None, None) => Ok(x.shallow_clone()),
            // When the bounds cross, the upper one applies.
            (low, high) => Ok(x.f_clamp_tensor(low, high)?),
        }
    })
}

/// X + bias + skip, the bias over the last axis.
fn bias_add(args: &Args) -> OpResult<Vec<Tensor>> {
    Ok(vec![args.get(0)?.f_add(args.get(1)?)?.f_add(args.get(2)?)?])
}
