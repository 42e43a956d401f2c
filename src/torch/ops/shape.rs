//! Shapes, constants and the operators that only rearrange axes.

use tch::{Device, Kind, Tensor};

use crate::ir;
use crate::torch::convert::constant_from_ir;
use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, axes_of, axis_of, is_float, many, one};
use crate::torch::operator::{ALL, Operator};

use super::cast::kind_from_number;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Constant", 1, constant),
    Operator::new("", "ConstantOfShape", 9, constant_of_shape).host(ALL),
    Operator::new("", "EyeLike", 9, eye_like).shape_only(),
    Operator::new("", "Expand", 8, |_| one(expand)).host(0b10).grad(),
    Operator::new("", "Flatten", 1, flatten).grad(),
    Operator::new("", "Identity", 1, |_| one(|args| Ok(args.get(0)?.shallow_clone()))).grad(),
    Operator::new("", "Range", 11, |_| one(range)).host(ALL),
    Operator::new("", "Reshape", 5, reshape).host(0b10).grad(),
    Operator::new("", "Shape", 1, shape).shape_only(),
    Operator::new("", "Size", 1, |_| {
        one(|args| int_vector(&[args.get(0)?.numel() as i64])?.f_reshape([0i64; 0]).map_err(Into::into))
    })
    .shape_only(),
    Operator::new("", "Squeeze", 1, squeeze).host(0b10).grad(),
    Operator::new("", "Transpose", 1, transpose).grad(),
    Operator::new("", "Unsqueeze", 1, unsqueeze).host(0b10).grad(),
];

/// A 1-D int64 tensor on the host.
pub(super) fn int_vector(values: &[i64]) -> OpResult<Tensor> {
    Ok(Tensor::f_from_slice(values)?)
}

fn constant(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let ints = |values: &[i64], dims: &[u64]| ir::Tensor::from_i64(dims, values);
    let tensor = if let Some(tensor) = a.tensor("value")? {
        tensor.clone()
    } else if let Some(value) = a.int_opt("value_int")? {
        ints(&[value], &[])
    } else if let Some(values) = a.ints("value_ints")? {
        ints(&values, &[values.len() as u64])
    } else if let Some(attribute) = a.get("value_float") {
        let value = attribute.as_float().ok_or_else(|| OpError::new("attribute `value_float` is not a float"))?;
        ir::Tensor::from_f32(&[], &[value])
    } else if let Some(values) = a.floats("value_floats")? {
        ir::Tensor::from_f32(&[values.len() as u64], &values)
    } else {
        return Err(OpError::new("holds none of the values that are supported (tensor, integers, floats)"));
    };
    let value = constant_from_ir("value", &tensor).map_err(|e| OpError::new(e.to_string()))?;
    one(move |_| Ok(value.shallow_clone()))
}

fn constant_of_shape(b: &mut Build) -> OpResult<Kernel> {
    let value = match b.attributes.tensor("value")? {
        Some(tensor) => constant_from_ir("value", tensor).map_err(|e| OpError::new(e.to_string()))?,
        None => Tensor::f_zeros([1i64], (Kind::Float, Device::Cpu))?,
    };
    if value.numel() != 1 {
        return Err(OpError::new("attribute `value` has more than one element"));
    }
    let value = value.f_reshape([1i64])?;
    one(move |args| {
        let size = args.ints_required(0)?;
        check_size(&size)?;
        let ones = vec![1i64; size.len()];
        Ok(value.f_reshape(&ones)?.f_expand(&size, false)?.f_contiguous()?)
    })
}

/// Rejects negative sizes and sizes whose product overflows.
pub(super) fn check_size(size: &[i64]) -> OpResult<()> {
    let count = size.iter().try_fold(1i64, |count, &dim| if dim < 0 { None } else { count.checked_mul(dim) });
    count.map(|_| ()).ok_or_else(|| OpError::new(format!("shape {size:?} is not possible")))
}

fn eye_like(b: &mut Build) -> OpResult<Kernel> {
    let kind = b.attributes.int_opt("dtype")?.map(kind_from_number).transpose()?;
    let diagonal = b.attributes.int("k", 0)?;
    one(move |args| {
        let x = args.get(0)?;
        let (rows, columns) = x.size2()?;
        let ones = Tensor::f_ones([rows, columns], (Kind::Float, x.device()))?;
        let eye = ones.f_tril(diagonal)?.f_triu(diagonal)?;
        Ok(eye.f_to_kind(kind.unwrap_or(x.f_kind()?))?)
    })
}

/// Two-way broadcasting: an axis of 1 in the target keeps the input's size.
fn expand(args: &Args) -> OpResult<Tensor> {
    let x = args.get(0)?;
    let target = args.ints_required(1)?;
    let size = x.size();
    let rank = size.len().max(target.len());
    let mut out = vec![1i64; rank];
    for (position, axis) in out.iter_mut().enumerate() {
        let own = (position + size.len()).checked_sub(rank).map_or(1, |i| size[i]);
        let other = (position + target.len()).checked_sub(rank).map_or(1, |i| target[i]);
        *axis = match (own, other) {
            (own, other) if own == other || other == 1 => own,
            (1, other) => other,
            _ => return Err(OpError::new(format!("shape {size:?} does not broadcast to {target:?}"))),
        };
    }
    check_size(&out)?;
    Ok(x.f_expand(&out, false)?)
}

fn flatten(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 1)?;
    one(move |args| {
        let x = args.get(0)?;
        let size = x.size();
        let rank = size.len() as i64;
        if !(-rank..=rank).contains(&axis) {
            return Err(OpError::new(format!("axis {axis} is outside rank {rank}")));
        }
        let axis = if axis < 0 { axis + rank } else { axis } as usize;
        let (rows, columns): (i64, i64) = (size[..axis].iter().product(), size[axis..].iter().product());
        Ok(x.f_reshape([rows, columns])?)
    })
}

/// `start`, `limit`, `delta`: ceil((limit - start) / delta) numbers from start.
fn range(args: &Args) -> OpResult<Tensor> {
    let kind = args.get(0)?.f_kind()?;
    if is_float(kind) {
        let value = |index| args.float(index)?.ok_or_else(|| OpError::new(format!("input {index} is missing")));
        let (start, limit, delta) = (value(0)?, value(1)?, value(2)?);
        let count = ((limit - start) / delta).ceil().max(0.0);
        if !count.is_finite() || count > 1e12 {
            return Err(OpError::new(format!("no range from {start} to {limit} in steps of {delta}")));
        }
        let steps = Tensor::f_arange(count as i64, (Kind::Double, Device::Cpu))?;
        return Ok(steps.f_mul_scalar(delta)?.f_add_scalar(start)?.f_to_kind(kind)?);
    }
    let value = |index| args.int(index)?.ok_or_else(|| OpError::new(format!("input {index} is missing")));
    let (start, limit, delta) = (value(0)?, value(1)?, value(2)?);
    if delta == 0 {
        return Err(OpError::new("the step is 0"));
    }
    if (delta > 0 && start >= limit) || (delta < 0 && start <= limit) {
        return Ok(Tensor::f_zeros([0i64], (kind, Device::Cpu))?);
    }
    Ok(Tensor::f_arange_start_step(start, limit, delta, (kind, Device::Cpu))?)
}

fn reshape(b: &mut Build) -> OpResult<Kernel> {
    let allow_zero = b.attributes.flag("allowzero", false)?;
    one(move |args| {
        let x = args.get(0)?;
        let mut target = args.ints_required(1)?;
        if !allow_zero && target.contains(&0) {
            let size = x.size();
            for (position, dim) in target.iter_mut().enumerate() {
                if *dim == 0 {
                    *dim = *size.get(position).ok_or_else(|| {
                        OpError::new(format!(
                            "axis {position} of the target is 0 and the input has rank {}",
                            size.len()
                        ))
                    })?;
                }
            }
        }
        if target.contains(&-1) && target.contains(&0) {
            // LibTorch rejects -1 next to a 0; ONNX derives it from the remaining size.
            let known = target.iter().filter(|&&dim| dim > 0).fold(1i64, |count, &dim| count.saturating_mul(dim));
            let size = x.size();
            let own: i64 = size.iter().filter(|&&dim| dim > 0).product();
            for dim in &mut target {
                if *dim == -1 {
                    *dim = if known > 0 { own / known } else { 0 };
                }
            }
        }
        Ok(x.f_reshape(&target)?)
    })
}

/// `start` and `end` (since version 15) count from the end when negative, and are clamped.
fn shape(b: &mut Build) -> OpResult<Kernel> {
    let start = b.attributes.int("start", 0)?;
    let end = b.attributes.int_opt("end")?;
    one(move |args| {
        let size = args.get(0)?.size();
        let rank = size.len() as i64;
        let place = |axis: i64| (if axis < 0 { axis.saturating_add(rank) } else { axis }).clamp(0, rank) as usize;
        let (start, end) = (place(start), place(end.unwrap_or(rank)));
        int_vector(size.get(start..end).unwrap_or(&[]))
    })
}

/// Axes from the attribute (before version 13) or from input 1.
pub(super) fn axes_reader(
    b: &mut Build,
    input_since: i64,
) -> OpResult<impl Fn(&Args) -> OpResult<Option<Vec<i64>>> + Send + use<>> {
    let by_input = b.version >= input_since;
    let fixed = if by_input { None } else { b.attributes.ints("axes")? };
    Ok(move |args: &Args| if by_input { args.ints(1) } else { Ok(fixed.clone()) })
}

fn squeeze(b: &mut Build) -> OpResult<Kernel> {
    let axes = axes_reader(b, 13)?;
    one(move |args| {
        let x = args.get(0)?;
        let size = x.size();
        let axes = match axes(args)? {
            Some(axes) => axes_of(&axes, size.len())?,
            None => (0..size.len() as i64).filter(|&axis| size[axis as usize] == 1).collect(),
        };
        if let Some(axis) = axes.iter().find(|&&axis| size[axis as usize] != 1) {
            return Err(OpError::new(format!("axis {axis} of shape {size:?} is not 1")));
        }
        let kept: Vec<i64> =
            (0..size.len()).filter(|&axis| !axes.contains(&(axis as i64))).map(|axis| size[axis]).collect();
        Ok(x.f_reshape(&kept)?)
    })
}

fn unsqueeze(b: &mut Build) -> OpResult<Kernel> {
    let axes = axes_reader(b, 13)?;
    one(move |args| {
        let x = args.get(0)?;
        let axes = axes(args)?.ok_or_else(|| OpError::new("the axes are missing"))?;
        let axes = axes_of(&axes, x.dim() + axes.len())?;
        let mut out = x.shallow_clone();
        for axis in axes {
            out = out.f_unsqueeze(axis)?;
        }
        Ok(out)
    })
}

fn transpose(b: &mut Build) -> OpResult<Kernel> {
    let permutation = b.attributes.ints("perm")?;
    many(move |args| {
        let x = args.get(0)?;
        let rank = x.dim();
        let order: Vec<i64> = match &permutation {
            Some(order) => order.clone(),
            None => (0..rank as i64).rev().collect(),
        };
        if order.len() != rank {
            return Err(OpError::new(format!("attribute `perm` has {} axes, the input {rank}", order.len())));
        }
        for &axis in &order {
            axis_of(axis, rank)?;
        }
        Ok(vec![x.f_permute(&order)?])
    })
}
