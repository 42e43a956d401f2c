//! Writes by index into a copy of the data.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, axis_of, one};
use crate::torch::operator::Operator;

use super::index::{flat_index, wrap};

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Scatter", 9, scatter_elements).until(10).grad(),
    Operator::new("", "ScatterElements", 11, scatter_elements).grad(),
    Operator::new("", "ScatterND", 11, scatter_nd).grad(),
    Operator::new("", "TensorScatter", 24, tensor_scatter).grad(),
];

#[derive(Clone, Copy)]
enum Reduction {
    None,
    Add,
    Other(&'static str),
}

fn reduction(b: &Build, since: i64) -> OpResult<Reduction> {
    if b.version < since {
        return Ok(Reduction::None);
    }
    Ok(match b.attributes.text_or("reduction", "none")? {
        "none" => Reduction::None,
        "add" => Reduction::Add,
        "mul" => Reduction::Other("prod"),
        "max" => Reduction::Other("amax"),
        "min" => Reduction::Other("amin"),
        other => return Err(OpError::new(format!("reduction `{other}` is not known"))),
    })
}

fn put(x: &Tensor, axis: i64, index: &Tensor, updates: &Tensor, reduction: Reduction) -> OpResult<Tensor> {
    let updates = updates.f_to_kind(x.f_kind()?)?;
    Ok(match reduction {
        Reduction::None => x.f_scatter(axis, index, &updates)?,
        Reduction::Add => x.f_scatter_add(axis, index, &updates)?,
        Reduction::Other(name) => x.f_internal_scatter_reduce(axis, index, &updates, name, true)?,
    })
}

fn scatter_elements(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 0)?;
    let reduction = reduction(b, 16)?;
    one(move |args| {
        let (x, index, updates) = (args.get(0)?, args.get(1)?, args.get(2)?);
        let axis = axis_of(axis, x.dim())?;
        let index = wrap(index, x.size()[axis as usize])?;
        put(x, axis, &index, updates, reduction)
    })
}

/// Each index tuple selects a slice of the data; the updates hold one slice per tuple.
fn scatter_nd(b: &mut Build) -> OpResult<Kernel> {
    let reduction = reduction(b, 16)?;
    one(move |args| {
        let (x, index, updates) = (args.get(0)?, args.get(1)?, args.get(2)?);
        let size = x.size();
        let (flat, extent) = flat_index(index, &size, 0)?;
        let depth = *index.size().last().unwrap_or(&0) as usize;
        let width: i64 = size[depth..].iter().product();
        let rows = flat.f_reshape([-1i64])?;
        let count = rows.size()[0];
        let data = x.f_reshape([extent, width])?;
        let updates = updates.f_reshape([count, width])?;
        let index = rows.f_unsqueeze(1)?.f_expand([count, width], false)?;
        Ok(put(&data, 0, &index, &updates, reduction)?.f_reshape(&size)?)
    })
}

/// Writes a block of steps into a cache, for each sample at its own index along `axis`.
///
/// Shapes: past `[B, .., S, ..]`, update `[B, .., T, ..]`, write_indices `[B]` -> past's.
fn tensor_scatter(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", -2)?;
    let circular = match b.attributes.text_or("mode", "linear")? {
        "linear" => false,
        "circular" => true,
        other => return Err(OpError::new(format!("mode `{other}` is not known"))),
    };
    one(move |args| {
        let (past, update) = (args.get(0)?, args.get(1)?);
        let axis = axis_of(axis, past.dim())?;
        let (size, steps) = (past.size(), update.size());
        let (length, count) = (size[axis as usize], steps[axis as usize]);
        let offsets = Tensor::f_arange(count, (Kind::Int64, past.device()))?;
        let starts = match args.opt(2) {
            Some(starts) => starts.f_to_kind(Kind::Int64)?,
            None => Tensor::f_zeros([size[0]], (Kind::Int64, past.device()))?,
        };
        let mut index = starts.f_unsqueeze(1)?.f_add(&offsets.f_unsqueeze(0)?)?;
        if circular {
            index = index.f_remainder(length)?;
        }
        let mut shape = vec![1i64; past.dim()];
        shape[0] = size[0];
        shape[axis as usize] = count;
        let index = wrap(&index, length)?.f_reshape(&shape)?.f_expand(&steps, false)?;
        Ok(past.f_scatter(axis, &index, update)?)
    })
}
