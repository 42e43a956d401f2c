//! Quantised operators. Gradients pass through products with packed weights to what they multiply, and straight through the
//! rounding nodes that `quantised::float_products` creates; the weights themselves have none.

use tch::{Kind, Tensor};

use crate::ir::DataType;
use crate::rewrite::{EXPANDED_BLOCKS, INTERNAL_DOMAIN, ROUNDED, ROUNDED_DYNAMICALLY};
use crate::torch::convert::data_type_of;
use crate::torch::kernel::{Build, Kernel, LARGEST, OpError, OpResult, axis_of, many, one};
use crate::torch::operator::{MICROSOFT, Operator};
use crate::torch::products::product;

use super::cast::kind_from_number;
use super::convolution::{EXACT, centred};
use super::index::wrap;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "DequantizeLinear", 10, dequantize).expands(),
    Operator::new("", "DynamicQuantizeLinear", 11, |_| many(|args| dynamic_quantize(args.get(0)?))),
    Operator::new("", "MatMulInteger", 10, |_| {
        one(|args| {
            let (a, b) = (args.get(0)?, args.get(1)?);
            let left = centred(a, args.opt(2).map(|zero| per_row(zero, a)).transpose()?.as_ref())?;
            let right = centred(b, args.opt(3).map(|zero| per_column(zero, b)).transpose()?.as_ref())?;
            Ok(left.f_matmul(&right)?.f_to_kind(Kind::Int)?)
        })
    }),
    Operator::new("", "QuantizeLinear", 10, quantize),
    Operator::new(MICROSOFT, "DequantizeLinear", 1, dequantize).expands(),
    Operator::new(MICROSOFT, "GatherBlockQuantized", 1, gather_block_quantized),
    Operator::new(MICROSOFT, "MatMulNBits", 1, matmul_nbits).grad(),
    Operator::new(MICROSOFT, "QuantizeLinear", 1, quantize),
    Operator::new(INTERNAL_DOMAIN, EXPANDED_BLOCKS, 1, expanded_blocks).expands(),
    Operator::new(INTERNAL_DOMAIN, ROUNDED, 1, rounded),
    Operator::new(INTERNAL_DOMAIN, ROUNDED_DYNAMICALLY, 1, |_| one(|args| rounded_dynamically(args.get(0)?))),
];

/// One zero point per row of the left operand, or one for all.
fn per_row(zero: &Tensor, a: &Tensor) -> OpResult<Tensor> {
    if zero.numel() == 1 {
        return Ok(zero.f_reshape([0i64; 0])?);
    }
    Ok(if zero.dim() == a.dim() { zero.shallow_clone() } else { zero.f_unsqueeze(-1)? })
}

/// One zero point per column of the right operand, or one for all.
fn per_column(zero: &Tensor, b: &Tensor) -> OpResult<Tensor> {
    if zero.numel() == 1 {
        return Ok(zero.f_reshape([0i64; 0])?);
    }
    Ok(if zero.dim() == b.dim() { zero.shallow_clone() } else { zero.f_unsqueeze(-2)? })
}

/// Quantises to uint8 by the tensor's own range, which always includes 0.
///
/// Outputs: the numbers, the scale and the zero point.
fn dynamic_quantize(x: &Tensor) -> OpResult<Vec<Tensor>> {
    let low = x.f_min()?.f_clamp_max(0.0)?;
    let high = x.f_max()?.f_clamp_min(0.0)?;
    let scale = high.f_sub(&low)?.f_div_scalar(255.0)?;
    // An all-zero tensor has no range; any scale is right, and 1 avoids a division by zero.
    let scale = scale.f_where_self(&scale.f_gt(0.0)?, &scale.f_ones_like()?)?;
    let zero = low.f_neg()?.f_div(&scale)?.f_clamp(0.0, 255.0)?.f_round()?;
    let y = x.f_div(&scale)?.f_round()?.f_add(&zero)?.f_clamp(0.0, 255.0)?;
    Ok(vec![y.f_to_kind(Kind::Uint8)?, scale, zero.f_to_kind(Kind::Uint8)?])
}

/// Scale or zero point in a shape that broadcasts over `x`: a scalar, one entry per position of
/// `axis`, or one per block.
fn spread(parameter: &Tensor, x: &Tensor, axis: i64, block: i64) -> OpResult<Tensor> {
    if parameter.numel() == 1 {
        return Ok(parameter.f_reshape([0i64; 0])?);
    }
    let axis = axis_of(axis, x.dim())?;
    let size = x.size();
    if parameter.dim() == 1 && block == 0 {
        let mut shape = vec![1i64; x.dim()];
        shape[axis as usize] = parameter.numel() as i64;
        return Ok(parameter.f_reshape(&shape)?);
    }
    if block <= 0 || parameter.dim() != x.dim() {
        return Err(OpError::new(format!("scales of shape {:?} do not fit {size:?}", parameter.size())));
    }
    Ok(parameter.f_repeat_interleave_self_int(block, axis, None)?.f_narrow(axis, 0, size[axis as usize])?)
}

fn dequantize(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 1)?;
    let block = b.attributes.int("block_size", 0)?;
    let output = b.attributes.int("output_dtype", 0)?;
    let output = if output == 0 { None } else { Some(kind_from_number(output)?) };
    one(move |args| {
        let (x, scale) = (args.get(0)?, args.get(1)?);
        let kind = scale.f_kind()?;
        // A difference of integers of up to 16 bits is exact in f32. The conversion makes a copy, which is changed in place.
        let mut out = x.f_to_kind(if x.f_kind()? == Kind::Int { EXACT } else { Kind::Float })?;
        if let Some(zero) = args.opt(2) {
            out = out.f_sub_(&spread(zero, x, axis, block)?.f_to_kind(out.f_kind()?)?)?;
        }
        let out = out.f_mul_(&spread(scale, x, axis, block)?.f_to_kind(out.f_kind()?)?)?;
        Ok(out.f_to_kind(output.unwrap_or(kind))?)
    })
}

/// The declared target type: that of the zero point or, without one, `output_dtype`.
fn quantized_type(b: &Build) -> OpResult<Option<DataType>> {
    let number = b.attributes.int("output_dtype", 0)?;
    let said = match i32::try_from(number).ok().and_then(DataType::from_number) {
        None if number != 0 => return Err(OpError::new(format!("element type {number} is not known"))),
        said => said,
    };
    let zero = if b.has(2) { b.dtype(2)? } else { None };
    match (zero, said) {
        (Some(zero), Some(said)) if zero != said => {
            Err(OpError::new(format!("the zero point is of {zero}, and `output_dtype` says {said}")))
        }
        _ => Ok(zero.or(said)),
    }
}

/// Kind, least and greatest number of a quantised type; uint8 where none is declared.
fn range_of(target: Option<DataType>) -> OpResult<(Kind, f64, f64)> {
    Ok(match target {
        None | Some(DataType::Uint8) => (Kind::Uint8, 0.0, 255.0),
        Some(DataType::Int8) => (Kind::Int8, -128.0, 127.0),
        Some(DataType::Int16) => (Kind::Int16, -32768.0, 32767.0),
        Some(DataType::Uint4) => (Kind::Uint8, 0.0, 15.0),
        Some(DataType::Int4) => (Kind::Int8, -8.0, 7.0),
        Some(other) => return Err(OpError::new(format!("quantising to {other} is not supported"))),
    })
}

/// What `QuantizeLinear` and `DequantizeLinear` make of a value, with the gradient of the value itself where the range is not
/// exceeded, and 0 elsewhere.
///
/// Inputs: the value, the scale and the zero point. Source: `fake_quantize_per_tensor_affine` of PyTorch.
fn rounded(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 1)?;
    let (_, low, high) = range_of(if b.has(2) { b.dtype(2)? } else { None })?;
    one(move |args| {
        let x = args.get(0)?;
        let own = exact(x)?;
        let scale = spread(args.get(1)?, x, axis, 0)?.f_to_kind(own.f_kind()?)?;
        let mut number = own.f_div(&scale)?.f_round()?;
        let zero =
            args.opt(2).map(|zero| -> OpResult<Tensor> { Ok(spread(zero, x, axis, 0)?.f_to_kind(own.f_kind()?)?) });
        let zero = zero.transpose()?;
        if let Some(zero) = &zero {
            number = number.f_add(zero)?;
        }
        let kept = number.f_clamp(low, high)?;
        let inside = kept.f_eq_tensor(&number)?.f_to_kind(x.f_kind()?)?;
        let centred = if let Some(zero) = &zero { kept.f_sub(zero)? } else { kept };
        let passing = x.f_mul(&inside)?;
        let change = centred.f_mul(&scale)?.f_sub(&passing.detach())?;
        Ok(passing.f_add(&change.f_to_kind(x.f_kind()?)?)?)
    })
}

/// What `DynamicQuantizeLinear` and the way back to floats make of a value, with the gradient of the value itself: nothing
/// exceeds a range that is the value's own.
fn rounded_dynamically(x: &Tensor) -> OpResult<Tensor> {
    let own = exact(x)?;
    let [number, scale, zero] = &dynamic_quantize(&own)?[..] else {
        return Err(OpError::new("the value has no range"));
    };
    let kind = own.f_kind()?;
    let rounded = number.f_to_kind(kind)?.f_sub(&zero.f_to_kind(kind)?)?.f_mul(scale)?;
    Ok(x.f_add(&rounded.f_sub(&own)?.f_to_kind(x.f_kind()?)?)?)
}

/// A value without its history, in a kind that holds every quantised number.
fn exact(x: &Tensor) -> OpResult<Tensor> {
    Ok(x.detach().f_to_kind(if x.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float })?)
}

fn quantize(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", 1)?;
    let block = b.attributes.int("block_size", 0)?;
    // `saturate` applies to 8-bit floats only, which are rejected as a target.
    b.attributes.ignore("saturate");
    if b.attributes.int("precision", 0)? != 0 {
        return Err(OpError::new("attribute `precision` is not supported"));
    }
    let target = quantized_type(b)?;
    one(move |args| {
        let (x, scale) = (args.get(0)?, args.get(1)?);
        let target = match (target, args.opt(2)) {
            (None, Some(zero)) => data_type_of(zero.f_kind()?),
            (target, _) => target,
        };
        let (kind, low, high) = range_of(target)?;
        let mut y = x.f_div(&spread(scale, x, axis, block)?)?.f_round()?;
        if let Some(zero) = args.opt(2) {
            y = y.f_add(&spread(zero, x, axis, block)?.f_to_kind(y.f_kind()?)?)?;
        }
        Ok(y.f_clamp(low, high)?.f_to_kind(kind)?)
    })
}

/// A times the transpose of a weight, which is quantised in blocks of `block_size` elements of 2, 4 or 8 bits, each
/// block with its own scale.
///
/// Shapes: A `[.., K]`, B `[N, blocks, block_size * bits / 8]`, scales `[N, blocks]`, zero points packed
/// `[N, ceil(blocks * bits / 8)]` or one per block in A's type -> `[.., N]`.
/// Source: ONNX Runtime, com.microsoft MatMulNBits-1.
fn matmul_nbits(b: &mut Build) -> OpResult<Kernel> {
    // The attribute lets the engine choose A's precision; here A is exact.
    b.attributes.ignore("accuracy_level");
    if b.attributes.int("weight_prepacked", 0)? != 0 {
        return Err(OpError::new("prepacked weights are not supported"));
    }
    if b.has(4) {
        return Err(OpError::new("input 4 (g_idx) is not supported"));
    }
    let packing = Packing::of(b)?;
    let cast = b.autocast;
    one(move |args| {
        let x = args.get(0)?;
        let weight = packing.expand([args.get(1)?, args.get(2)?], args.opt(3), x.f_kind()?)?;
        let out = product(x, &weight.f_transpose(0, 1)?, cast)?;
        match args.opt(5) {
            Some(bias) => Ok(out.f_add(bias)?),
            None => Ok(out),
        }
    })
}

/// The weight of [`matmul_nbits`] as floats `[K, N]`. Inputs: B, scales, zero points.
fn expanded_blocks(b: &mut Build) -> OpResult<Kernel> {
    let packing = Packing::of(b)?;
    one(move |args| {
        let weight = packing.expand([args.get(0)?, args.get(1)?], args.opt(2), Kind::Float)?;
        Ok(weight.f_transpose(0, 1)?)
    })
}

/// How a weight of [`matmul_nbits`] is packed.
struct Packing {
    width: i64,
    height: i64,
    bits: i64,
    block: i64,
}

impl Packing {
    fn of(b: &Build) -> OpResult<Self> {
        let a = b.attributes;
        let (width, height) = (a.int_required("K")?, a.int_required("N")?);
        let (bits, block) = (a.int("bits", 4)?, a.int_required("block_size")?);
        let sizes = [block, width, height];
        if ![2, 4, 8].contains(&bits) || !sizes.iter().all(|size| (1..=LARGEST).contains(size)) {
            return Err(OpError::new(format!("{bits} bits in blocks of {block} are not supported")));
        }
        Ok(Packing { width, height, bits, block })
    }

    /// The weight `[N, K]` as floats of this kind.
    fn expand(&self, [packed, scales]: [&Tensor; 2], zero: Option<&Tensor>, kind: Kind) -> OpResult<Tensor> {
        let Packing { width, height, bits, block } = *self;
        let blocks = (width + block - 1) / block;
        // Changed in place: a large weight is in memory as floats once.
        let mut numbers = unpack(packed, bits)?.f_reshape([height, blocks, block])?.f_to_kind(kind)?;
        let scales = scales.f_to_kind(kind)?.f_reshape([height, blocks, 1])?;
        let middle = (1i64 << (bits - 1)) as f64;
        let mut centred = match zero {
            None => numbers.f_sub_scalar_(middle)?,
            Some(zero) if zero.f_kind()? == Kind::Uint8 => {
                let zero = unpack(&zero.f_reshape([height, -1])?, bits)?.f_narrow(1, 0, blocks)?;
                numbers.f_sub_(&zero.f_to_kind(kind)?.f_unsqueeze(2)?)?
            }
            Some(zero) => numbers.f_sub_(&zero.f_reshape([height, blocks, 1])?.f_to_kind(kind)?)?,
        };
        Ok(centred.f_mul_(&scales)?.f_reshape([height, blocks * block])?.f_narrow(1, 0, width)?)
    }
}

/// Rows of a table that is quantised in blocks of `block_size` elements with a scale each. The
/// selected rows are dequantised.
///
/// Shapes: data `[V, ..]` (bytes packed along the last axis, or elements of 4 bits), scales and zero points with
/// one entry per block along `quantize_axis`.
/// Source: ONNX Runtime, com.microsoft GatherBlockQuantized-1.
fn gather_block_quantized(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let (gather_axis, quantize_axis) = (a.int("gather_axis", 0)?, a.int("quantize_axis", 1)?);
    let (bits, block) = (a.int("bits", 4)?, a.int("block_size", 128)?);
    if ![2, 4, 8].contains(&bits) || !(1..=LARGEST).contains(&block) {
        return Err(OpError::new(format!("{bits} bits in blocks of {block} are not supported")));
    }
    // Bytes hold several elements; 4-bit tensors are already unpacked to one byte per element.
    let packed = match b.dtype(0)? {
        None | Some(DataType::Uint8) => true,
        Some(DataType::Uint4 | DataType::Int4) => false,
        Some(other) => return Err(OpError::new(format!("data of {other} is not supported"))),
    };
    one(move |args| {
        let (data, index, scales) = (args.get(0)?, args.get(1)?, args.get(2)?);
        let rank = data.dim();
        let (gather, quantize) = (axis_of(gather_axis, rank)?, axis_of(quantize_axis, rank)?);
        if gather == quantize || scales.dim() != rank {
            return Err(OpError::new("gathering along the axis of the blocks is not supported"));
        }
        let (length, blocks) = (data.size()[quantize as usize], scales.size()[quantize as usize]);
        let per_byte = if packed { 8 / bits } else { 1 };
        if (length * per_byte + block - 1) / block != blocks {
            return Err(OpError::new(format!("{blocks} blocks of {block} do not fit {} numbers", length * per_byte)));
        }
        if packed && per_byte > 1 && quantize + 1 != rank as i64 {
            return Err(OpError::new("packed data is not supported along another axis than the last"));
        }
        let index = wrap(index, data.size()[gather as usize])?;
        let rows = index.f_reshape([-1i64])?;
        let pick = |x: &Tensor| -> OpResult<Tensor> { Ok(x.f_index_select(gather, &rows)?) };
        let open = |x: &Tensor| -> OpResult<Tensor> { if packed { unpack(x, bits) } else { Ok(x.shallow_clone()) } };
        let kind = scales.f_kind()?;
        let numbers = open(&pick(data)?)?;
        let length = numbers.size()[quantize as usize];
        let spread = |x: &Tensor| -> OpResult<Tensor> {
            Ok(x.f_repeat_interleave_self_int(block, quantize, None)?.f_narrow(quantize, 0, length)?.f_to_kind(kind)?)
        };
        let numbers = numbers.f_to_kind(kind)?;
        let centred = match args.opt(3) {
            Some(zero) => numbers.f_sub(&spread(&open(&pick(zero)?)?.f_narrow(quantize, 0, blocks)?)?)?,
            None if packed => numbers.f_sub_scalar((1i64 << (bits - 1)) as f64)?,
            None => numbers,
        };
        let values = centred.f_mul(&spread(&pick(scales)?)?)?;
        let mut size = values.size();
        size.splice(gather as usize..gather as usize + 1, index.size());
        Ok(values.f_reshape(&size)?)
    })
}

/// Unpacks bytes to elements of `bits` bits along the last axis, low bits first.
pub(super) fn unpack(packed: &Tensor, bits: i64) -> OpResult<Tensor> {
    if bits == 8 {
        return Ok(packed.shallow_clone());
    }
    let parts: Vec<Tensor> = (0..8 / bits)
        .map(|part| -> OpResult<Tensor> {
            Ok(packed.f_bitwise_right_shift_tensor_scalar(part * bits)?.f_bitwise_and((1i64 << bits) - 1)?)
        })
        .collect::<OpResult<_>>()?;
    Ok(Tensor::f_stack(&parts, -1)?.f_flatten(-2, -1)?)
}
