//! Gathering by index, searching and counting.

use tch::{Device, Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, axis_of, host_ints, list_on, many, one};
use crate::torch::operator::Operator;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "ArgMax", 1, |b| arg(b, true)),
    Operator::new("", "ArgMin", 1, |b| arg(b, false)),
    Operator::new("", "Compress", 9, compress).host(0b10).grad(),
    Operator::new("", "CumSum", 11, cum_sum).widens().host(0b10).grad(),
    Operator::new("", "Gather", 1, gather).grad(),
    Operator::new("", "GatherElements", 11, gather_elements).grad(),
    Operator::new("", "GatherND", 11, gather_nd).grad(),
    Operator::new("", "NonZero", 9, |_| one(|args| Ok(args.get(0)?.f_nonzero()?.f_transpose(0, 1)?))).host(1),
    Operator::new("", "OneHot", 9, one_hot).host(0b10),
    Operator::new("", "TopK", 10, top_k).host(0b10).grad(),
];

/// Indices into an axis of length `size`, with negative ones counted from the end.
///
/// Errors: an index outside the axis, for indices on the host. On a GPU LibTorch performs the check.
pub(super) fn wrap(index: &Tensor, size: i64) -> OpResult<Tensor> {
    let index = index.f_to_kind(Kind::Int64)?;
    if index.numel() == 0 {
        return Ok(index);
    }
    if index.device() == Device::Cpu {
        let (low, high) = index.f_aminmax(None, false)?;
        let (low, high) = (low.f_int64_value(&[])?, high.f_int64_value(&[])?);
        if low < -size || high >= size {
            let worst = if high >= size { high } else { low };
            return Err(OpError::new(format!("index {worst} is outside an axis of {size}")));
        }
        if low >= 0 {
            return Ok(index);
        }
    }
    Ok(index.f_add_scalar(size)?.f_where_self(&index.f_lt(0)?, &index)?)
}

fn gather(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 0)?;
    one(move |args| {
        let (x, index) = (args.get(0)?, args.get(1)?);
        let axis = axis_of(axis, x.dim())?;
        let size = x.size();
        let length = size[axis as usize];
        if index.device() == Device::Cpu && index.numel() == 1 {
            let place = host_ints(index)?[0];
            let place = if place < 0 { place + length } else { place };
            if !(0..length).contains(&place) {
                return Err(OpError::new(format!("index {place} is outside an axis of {length}")));
            }
            let mut picked = x.f_narrow(axis, place, 1)?;
            if index.dim() == 0 {
                return Ok(picked.f_squeeze_dim(axis)?);
            }
            for _ in 1..index.dim() {
                picked = picked.f_unsqueeze(axis)?;
            }
            return Ok(picked);
        }
        let index = wrap(index, length)?;
        let flat = index.f_reshape([-1i64])?;
        let picked = x.f_index_select(axis, &flat)?;
        if index.dim() == 1 {
            return Ok(picked);
        }
        let mut out: Vec<i64> = size[..axis as usize].to_vec();
        out.extend(index.size());
        out.extend(&size[axis as usize + 1..]);
        Ok(picked.f_reshape(&out)?)
    })
}

fn gather_elements(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 0)?;
    one(move |args| {
        let (x, index) = (args.get(0)?, args.get(1)?);
        let axis = axis_of(axis, x.dim())?;
        let index = wrap(index, x.size()[axis as usize])?;
        Ok(x.f_gather(axis, &index, false)?)
    })
}

/// The index tuples of a `..ND` operator as one flat index into the axes `batch..batch + depth`, shape `[B, K]`.
pub(super) fn flat_index(index: &Tensor, size: &[i64], batch: usize) -> OpResult<(Tensor, i64)> {
    let index_size = index.size();
    let Some(&depth) = index_size.last() else { return Err(OpError::new("the indices are a scalar")) };
    let depth = depth as usize;
    if batch >= index_size.len() || batch + depth > size.len() {
        return Err(OpError::new(format!(
            "indices of shape {index_size:?} with batch_dims {batch} do not fit {size:?}"
        )));
    }
    let batches: i64 = size[..batch].iter().product();
    let extent: i64 = size[batch..batch + depth].iter().product();
    let tuples: i64 = index_size[batch..index_size.len() - 1].iter().product();
    let index = index.f_to_kind(Kind::Int64)?.f_reshape([batches, tuples, depth as i64])?;
    let mut flat = Tensor::f_zeros([batches, tuples], (Kind::Int64, index.device()))?;
    for position in 0..depth {
        let axis_size = size[batch + position];
        let part = wrap(&index.f_select(2, position as i64)?, axis_size)?;
        flat = flat.f_mul_scalar(axis_size)?.f_add(&part)?;
    }
    Ok((flat, extent))
}

fn gather_nd(b: &mut Build) -> OpResult<Kernel> {
    let batch = b.attributes.int("batch_dims", 0)?;
    let batch = usize::try_from(batch).map_err(|_| OpError::new("attribute `batch_dims` is negative"))?;
    one(move |args| {
        let (x, index) = (args.get(0)?, args.get(1)?);
        let (size, index_size) = (x.size(), index.size());
        let (flat, extent) = flat_index(index, &size, batch)?;
        let depth = *index_size.last().unwrap_or(&0) as usize;
        let rest: Vec<i64> = size[batch + depth..].to_vec();
        let batches: i64 = size[..batch].iter().product();
        let width: i64 = rest.iter().product();
        // Batches follow each other in memory, so one offset per batch makes the indices global.
        let offsets = Tensor::f_arange(batches, (Kind::Int64, flat.device()))?.f_mul_scalar(extent)?;
        let rows = flat.f_add(&offsets.f_unsqueeze(1)?)?.f_reshape([-1i64])?;
        let picked = x.f_reshape([batches * extent, width])?.f_index_select(0, &rows)?;
        let mut out: Vec<i64> = index_size[..index_size.len() - 1].to_vec();
        out.extend(rest);
        Ok(picked.f_reshape(&out)?)
    })
}

fn compress(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int_opt("axis")?;
    one(move |args| {
        let x = args.get(0)?;
        let chosen: Vec<i64> =
            args.ints_required(1)?.iter().enumerate().filter(|(_, keep)| **keep != 0).map(|(i, _)| i as i64).collect();
        let index = list_on(&chosen, x.device())?;
        match axis {
            Some(axis) => Ok(x.f_index_select(axis_of(axis, x.dim())?, &index)?),
            None => Ok(x.f_reshape([-1i64])?.f_index_select(0, &index)?),
        }
    })
}

fn cum_sum(b: &mut Build) -> OpResult<Kernel> {
    let exclusive = b.attributes.flag("exclusive", false)?;
    let reverse = b.attributes.flag("reverse", false)?;
    one(move |args| {
        let x = args.get(0)?;
        let axis = args.int(1)?.ok_or_else(|| OpError::new("the axis is missing"))?;
        let axis = axis_of(axis, x.dim())?;
        let kind = x.f_kind()?;
        let directed = if reverse { x.f_flip([axis])? } else { x.shallow_clone() };
        let mut sum = directed.f_cumsum(axis, kind)?;
        let size = sum.size()[axis as usize];
        if exclusive && size > 0 {
            // Shift each sum by one position: subtracting the element itself would be inexact, and NaN for an infinity.
            let first = sum.f_narrow(axis, 0, 1)?.f_zeros_like()?;
            sum = Tensor::f_cat(&[first, sum.f_narrow(axis, 0, size - 1)?], axis)?;
        }
        Ok(if reverse { sum.f_flip([axis])? } else { sum })
    })
}

/// `depth` entries along a new axis. An index out of range gives a row of the off value.
fn one_hot(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", -1)?;
    one(move |args| {
        let (index, values) = (args.get(0)?, args.get(2)?);
        let depth = args.float(1)?.ok_or_else(|| OpError::new("the depth is missing"))? as i64;
        if depth < 0 || values.numel() != 2 {
            return Err(OpError::new("the depth is negative or there are not two values"));
        }
        let axis = axis_of(axis, index.dim() + 1)?;
        let index = index.f_to_kind(Kind::Int64)?;
        let index = index.f_add_scalar(depth)?.f_where_self(&index.f_lt(0)?, &index)?.f_unsqueeze(axis)?;
        let mut shape = vec![1i64; index.dim()];
        shape[axis as usize] = depth;
        let places = Tensor::f_arange(depth, (Kind::Int64, index.device()))?.f_reshape(&shape)?;
        let hot = index.f_eq_tensor(&places)?;
        let values = values.f_reshape([2i64])?;
        Ok(values.f_select(0, 1)?.f_where_self(&hot, &values.f_select(0, 0)?)?)
    })
}

fn top_k(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", -1)?;
    let largest = b.version < 11 || b.attributes.flag("largest", true)?;
    if b.version >= 11 {
        // Sorted results are also valid when any order is allowed.
        b.attributes.ignore("sorted");
    }
    many(move |args| {
        let x = args.get(0)?;
        let count = args.int(1)?.ok_or_else(|| OpError::new("k is missing"))?;
        let axis = axis_of(axis, x.dim())?;
        if !(0..=x.size()[axis as usize]).contains(&count) {
            return Err(OpError::new(format!("k {count} is outside an axis of {}", x.size()[axis as usize])));
        }
        // A stable sort orders ties by index, as ONNX requires.
        let (values, order) = x.f_sort_stable(true, axis, largest)?;
        Ok(vec![values.f_narrow(axis, 0, count)?, order.f_narrow(axis, 0, count)?])
    })
}

fn arg(b: &mut Build, largest: bool) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 0)?;
    let keep = b.attributes.flag("keepdims", true)?;
    let last = b.version >= 12 && b.attributes.flag("select_last_index", false)?;
    one(move |args: &Args| {
        let x = args.get(0)?;
        let axis = axis_of(axis, x.dim())?;
        let find = |x: &Tensor| if largest { x.f_argmax(axis, keep) } else { x.f_argmin(axis, keep) };
        if !last {
            return Ok(find(x)?);
        }
        let size = x.size()[axis as usize];
        Ok(find(&x.f_flip([axis])?)?.f_neg()?.f_add_scalar(size - 1)?)
    })
}
