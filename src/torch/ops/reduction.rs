//! Sums, means, extremes and norms over axes.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, axes_of, is_float, one};
use crate::torch::operator::Operator;

use super::shape::axes_reader;

type Reduce = fn(&Tensor, &[i64], bool) -> OpResult<Tensor>;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "ReduceL1", 1, |b| reduce(b, 18, false, |x, axes, keep| total(&x.f_abs()?, axes, keep)))
        .widens()
        .host(0b10)
        .grad(),
    Operator::new("", "ReduceL2", 1, |b| {
        reduce(b, 18, false, |x, axes, keep| Ok(total(&x.f_square()?, axes, keep)?.f_sqrt()?))
    })
    .widens()
    .host(0b10)
    .grad(),
    Operator::new("", "ReduceLogSum", 1, |b| reduce(b, 18, false, |x, axes, keep| Ok(total(x, axes, keep)?.f_log()?)))
        .widens()
        .host(0b10)
        .grad(),
    Operator::new("", "ReduceLogSumExp", 1, |b| reduce(b, 18, false, |x, axes, keep| Ok(x.f_logsumexp(axes, keep)?)))
        .widens()
        .host(0b10)
        .grad(),
    Operator::new("", "ReduceMax", 1, |b| reduce(b, 18, true, |x, axes, keep| extreme(x, axes, keep, true)))
        .host(0b10)
        .grad(),
    Operator::new("", "ReduceMean", 1, |b| reduce(b, 18, true, |x, axes, keep| Ok(x.f_mean_dim(axes, keep, None)?)))
        .widens()
        .host(0b10)
        .grad(),
    Operator::new("", "ReduceMin", 1, |b| reduce(b, 18, true, |x, axes, keep| extreme(x, axes, keep, false)))
        .host(0b10)
        .grad(),
    Operator::new("", "ReduceProd", 1, |b| reduce(b, 18, true, product)).widens().host(0b10).grad(),
    Operator::new("", "ReduceSum", 1, |b| reduce(b, 13, true, total)).widens().host(0b10).grad(),
    Operator::new("", "ReduceSumSquare", 1, |b| {
        reduce(b, 18, false, |x, axes, keep| total(&x.f_square()?, axes, keep))
    })
    .widens()
    .host(0b10)
    .grad(),
];

/// `plain` reductions return the input unchanged when no axis is reduced; for the others ONNX
/// does not define this case.
fn reduce(b: &mut Build, axes_input_since: i64, plain: bool, f: Reduce) -> OpResult<Kernel> {
    let keep = b.attributes.flag("keepdims", true)?;
    let by_input = b.version >= axes_input_since;
    let noop = by_input && b.attributes.flag("noop_with_empty_axes", false)?;
    let axes = axes_reader(b, axes_input_since)?;
    one(move |args| {
        let x = args.get(0)?;
        let axes = axes(args)?.unwrap_or_default();
        if axes.is_empty() && noop {
            if !plain {
                return Err(OpError::new("`noop_with_empty_axes` without axes is not defined for this operator"));
            }
            return Ok(x.shallow_clone());
        }
        if x.dim() == 0 {
            return f(&x.f_reshape([1i64])?, &[0], false);
        }
        let axes = if axes.is_empty() { (0..x.dim() as i64).collect() } else { axes_of(&axes, x.dim())? };
        f(x, &axes, keep)
    })
}

/// The sum, in the input's own type.
fn total(x: &Tensor, axes: &[i64], keep: bool) -> OpResult<Tensor> {
    Ok(x.f_sum_dim_intlist(axes, keep, x.f_kind()?)?)
}

fn extreme(x: &Tensor, axes: &[i64], keep: bool, largest: bool) -> OpResult<Tensor> {
    if axes.iter().any(|&axis| x.size().get(axis as usize) == Some(&0)) {
        return empty_extreme(x, axes, keep, largest);
    }
    Ok(if largest { x.f_amax(axes, keep)? } else { x.f_amin(axes, keep)? })
}

/// The extreme of an empty set: minus infinity or false for a maximum, infinity or true for a minimum.
fn empty_extreme(x: &Tensor, axes: &[i64], keep: bool, largest: bool) -> OpResult<Tensor> {
    let kind = x.f_kind()?;
    if !is_float(kind) && kind != Kind::Bool {
        return Err(OpError::new("no extreme of an empty set of integers"));
    }
    let counted = x.f_to_kind(Kind::Float)?.f_sum_dim_intlist(axes, keep, None)?;
    let value = if largest { f64::NEG_INFINITY } else { f64::INFINITY };
    if kind == Kind::Bool {
        return Ok(counted.f_zeros_like()?.f_add_scalar(if largest { 0.0 } else { 1.0 })?.f_to_kind(kind)?);
    }
    Ok(counted.f_zeros_like()?.f_add_scalar(value)?.f_to_kind(kind)?)
}

fn product(x: &Tensor, axes: &[i64], keep: bool) -> OpResult<Tensor> {
    let kind = x.f_kind()?;
    let mut out = x.shallow_clone();
    for &axis in axes.iter().rev() {
        out = out.f_prod_dim_int(axis, keep, if is_float(kind) { None::<Kind> } else { Some(kind) })?;
    }
    Ok(out)
}
