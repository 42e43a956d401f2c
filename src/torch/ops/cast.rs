//! Type conversion.

use tch::{Kind, Tensor};

use crate::ir::DataType;
use crate::torch::convert::{computed_kind, kind_of};
use crate::torch::kernel::{Build, Kernel, OpError, OpResult, is_float, one};
use crate::torch::operator::Operator;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Cast", 6, cast).grad(),
    Operator::new("", "CastLike", 15, |b| {
        ignore_float8_options(b)?;
        one(|args| convert(args.get(0)?, args.get(1)?.f_kind()?))
    })
    .grad(),
];

/// The LibTorch kind in which to compute with an element type. `number` is a `TensorProto.DataType`.
pub(super) fn kind_from_number(number: i64) -> OpResult<Kind> {
    let dtype = i32::try_from(number).ok().and_then(DataType::from_number);
    let Some(dtype) = dtype else {
        return Err(OpError::new(format!("element type {number} is not known")));
    };
    kind_of(dtype).map(computed_kind).ok_or_else(|| OpError::new(format!("element type {dtype} is not supported")))
}

/// `saturate` and `round_mode` apply to 8-bit floats only, which are rejected as a target.
fn ignore_float8_options(b: &Build) -> OpResult<()> {
    b.attributes.ignore("saturate");
    b.attributes.ignore("round_mode");
    Ok(())
}

/// Where the graph goes on in 16 bits after a part in f32, a program with an autocast kind goes on in that.
fn cast(b: &mut Build) -> OpResult<Kernel> {
    let number = b.attributes.int_required("to")?;
    let kind = kind_from_number(number)?;
    ignore_float8_options(b)?;
    let narrow = [DataType::Float16, DataType::Bfloat16].iter().any(|&dtype| dtype as i64 == number);
    let low = b.autocast.filter(|_| narrow);
    one(move |args| {
        let x = args.get(0)?;
        // Integers, such as positions, have too many digits for it.
        convert(x, if is_float(x.f_kind()?) { low.unwrap_or(kind) } else { kind })
    })
}

/// Floats to integers truncate towards zero; integers to narrower ones keep the low bits; to bool: not equal to zero.
pub(super) fn convert(tensor: &Tensor, kind: Kind) -> OpResult<Tensor> {
    let from = tensor.f_kind()?;
    if from == kind {
        return Ok(tensor.shallow_clone());
    }
    if is_float(from) && matches!(kind, Kind::Uint8 | Kind::Int8 | Kind::Int16) {
        // Through int64, so that the low bits are defined on every machine.
        return Ok(tensor.f_to_kind(Kind::Int64)?.f_to_kind(kind)?);
    }
    Ok(tensor.f_to_kind(kind)?)
}
