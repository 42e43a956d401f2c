//! Normalisation layers.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, axis_of, is_float, many, one};
use crate::torch::operator::{MICROSOFT, Operator};

use super::cast::kind_from_number;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "BatchNormalization", 9, batch_normalization).widens().rounds().grad(),
    Operator::new("", "GroupNormalization", 18, group_normalization).widens().rounds().grad(),
    Operator::new("", "InstanceNormalization", 6, instance_normalization).widens().rounds().grad(),
    Operator::new("", "LayerNormalization", 17, layer_normalization).grad(),
    Operator::new("", "LpNormalization", 1, lp_normalization).widens().rounds().grad(),
    Operator::new("", "RMSNormalization", 23, simplified).grad(),
    // ONNX Runtime writes it into the default domain.
    Operator::new("", "SimplifiedLayerNormalization", 1, simplified).grad(),
    Operator::new(MICROSOFT, "SimplifiedLayerNormalization", 1, simplified).grad(),
    Operator::new(MICROSOFT, "SkipLayerNormalization", 1, |b| skip(b, false)).grad(),
    Operator::new(MICROSOFT, "SkipSimplifiedLayerNormalization", 1, |b| skip(b, true)).grad(),
];

/// The kind in which statistics are computed: the input's, or the stash type if it is wider.
fn statistics_kind(x: &Tensor, stash: Option<Kind>) -> OpResult<Kind> {
    let own = x.f_kind()?;
    Ok(match (own, stash) {
        (Kind::Half | Kind::BFloat16, Some(kind)) => kind,
        (Kind::Half | Kind::BFloat16, None) => Kind::Float,
        (own, _) => own,
    })
}

fn stash_type(b: &Build) -> OpResult<Option<Kind>> {
    match b.attributes.int_opt("stash_type")? {
        None => Ok(Some(Kind::Float)),
        Some(number) => {
            let kind = kind_from_number(number)?;
            if is_float(kind) {
                Ok(Some(kind))
            } else {
                Err(OpError::new("attribute `stash_type` is not a float type"))
            }
        }
    }
}

/// RMS normalisation over the axes from `axis` on: x / sqrt(mean(x^2) + epsilon) * scale.
///
/// Outputs: the result, and the inverse root mean square.
/// Source: Zhang & Sennrich 2019, arXiv:1910.07467.
fn simplified(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", -1)?;
    let epsilon = b.attributes.float("epsilon", 1e-5)?;
    let stash = stash_type(b)?;
    b.only_outputs(2)?;
    let inverse = b.wants(1);
    many(move |args| {
        let (x, scale) = (args.get(0)?, args.get(1)?);
        let (out, rms) = rms(x, scale, axis, epsilon, stash)?;
        Ok(if inverse { vec![out, rms] } else { vec![out] })
    })
}

fn rms(x: &Tensor, scale: &Tensor, axis: i64, epsilon: f64, stash: Option<Kind>) -> OpResult<(Tensor, Tensor)> {
    let kind = x.f_kind()?;
    let axis = axis_of(axis, x.dim())?;
    let axes: Vec<i64> = (axis..x.dim() as i64).collect();
    let wide = x.f_to_kind(statistics_kind(x, stash)?)?;
    let inverse = wide.f_square()?.f_mean_dim(&axes[..], true, None)?.f_add_scalar(epsilon)?.f_rsqrt()?;
    let out = wide.f_mul(&inverse)?.f_to_kind(kind)?.f_mul(&scale.f_to_kind(kind)?)?;
    Ok((out, inverse))
}

/// Normalisation to mean 0 and variance 1 over the axes from `axis` on, then scale and bias.
///
/// Outputs: the result, the mean, and the inverse standard deviation.
/// Source: Ba et al. 2016, arXiv:1607.06450.
fn layer_normalization(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", -1)?;
    let epsilon = b.attributes.float("epsilon", 1e-5)?;
    let stash = stash_type(b)?;
    let statistics = b.wants(1) || b.wants(2);
    many(move |args| layer(args.get(0)?, args.get(1)?, args.opt(2), axis, epsilon, stash, statistics))
}

fn layer(
    x: &Tensor,
    scale: &Tensor,
    bias: Option<&Tensor>,
    axis: i64,
    epsilon: f64,
    stash: Option<Kind>,
    statistics: bool,
) -> OpResult<Vec<Tensor>> {
    let kind = x.f_kind()?;
    let size = x.size();
    let axis = axis_of(axis, size.len())?;
    let shape = &size[axis as usize..];
    let axes: Vec<i64> = (axis..size.len() as i64).collect();
    // The result has the type of `x`, also where the weights keep a wider one.
    let scale = &scale.f_to_kind(kind)?;
    let bias = bias.map(|bias| bias.f_to_kind(kind)).transpose()?;
    if !statistics && scale.size() == shape && bias.as_ref().is_none_or(|bias| bias.size() == shape) {
        return Ok(vec![x.f_layer_norm(shape, Some(scale), bias.as_ref(), epsilon, true)?]);
    }
    let wide = x.f_to_kind(statistics_kind(x, stash)?)?;
    let mean = wide.f_mean_dim(&axes[..], true, None)?;
    let centred = wide.f_sub(&mean)?;
    let inverse = centred.f_square()?.f_mean_dim(&axes[..], true, None)?.f_add_scalar(epsilon)?.f_rsqrt()?;
    let mut out = centred.f_mul(&inverse)?.f_to_kind(kind)?.f_mul(scale)?;
    if let Some(bias) = bias {
        out = out.f_add(&bias)?;
    }
    // ONNX types the statistics by `stash_type`, for double inputs too.
    let stored = stash.unwrap_or(Kind::Float);
    Ok(vec![out, mean.f_to_kind(stored)?, inverse.f_to_kind(stored)?])
}

/// The sum of input, skip and bias, normalised over the last axis.
///
/// Inputs: input, skip, gamma, then beta (layer form only) and bias.
/// Outputs: the result, mean (layer form only), inverse deviation, and the sum.
fn skip(b: &mut Build, simplified: bool) -> OpResult<Kernel> {
    let epsilon = b.attributes.float("epsilon", 1e-12)?;
    if simplified && b.wants(1) {
        return Err(OpError::new("there is no mean in the simplified form"));
    }
    let statistics = b.wants(1) || b.wants(2);
    many(move |args: &Args| {
        let (x, skip, gamma) = (args.get(0)?, args.get(1)?, args.get(2)?);
        let (beta, bias) = if simplified { (None, args.opt(3)) } else { (args.opt(3), args.opt(4)) };
        let mut sum = x.f_add(skip)?;
        if let Some(bias) = bias {
            sum = sum.f_add(bias)?;
        }
        if simplified {
            let (out, inverse) = rms(&sum, gamma, -1, epsilon, Some(Kind::Float))?;
            return Ok(vec![out, Tensor::new(), inverse, sum]);
        }
        let mut out = layer(&sum, gamma, beta, -1, epsilon, Some(Kind::Float), statistics)?;
        out.resize_with(3, Tensor::new);
        out.push(sum);
        Ok(out)
    })
}

/// The per-channel parameter `[C]` in a shape that broadcasts over `[N, C, ..]`.
fn channels(parameter: &Tensor, rank: usize) -> OpResult<Tensor> {
    let mut shape = vec![1i64; rank];
    if let Some(axis) = shape.get_mut(1) {
        *axis = parameter.numel() as i64;
    }
    Ok(parameter.f_reshape(&shape)?)
}

/// Normalisation with the stored statistics. Training mode is rejected.
fn batch_normalization(b: &mut Build) -> OpResult<Kernel> {
    let epsilon = b.attributes.float("epsilon", 1e-5)?;
    b.attributes.ignore("momentum");
    if b.version >= 14 && b.attributes.flag("training_mode", false)? {
        return Err(OpError::new("training mode is not supported"));
    }
    b.only_outputs(1)?;
    one(move |args| {
        let x = args.get(0)?;
        let rank = x.dim();
        let (scale, bias) = (channels(args.get(1)?, rank)?, channels(args.get(2)?, rank)?);
        let (mean, variance) = (channels(args.get(3)?, rank)?, channels(args.get(4)?, rank)?);
        let inverse = variance.f_add_scalar(epsilon)?.f_rsqrt()?;
        Ok(x.f_sub(&mean)?.f_mul(&inverse)?.f_mul(&scale)?.f_add(&bias)?)
    })
}

fn instance_normalization(b: &mut Build) -> OpResult<Kernel> {
    let epsilon = b.attributes.float("epsilon", 1e-5)?;
    one(move |args| {
        let x = args.get(0)?;
        let axes: Vec<i64> = (2..x.dim() as i64).collect();
        let centred = x.f_sub(&x.f_mean_dim(&axes[..], true, None)?)?;
        let inverse = centred.f_square()?.f_mean_dim(&axes[..], true, None)?.f_add_scalar(epsilon)?.f_rsqrt()?;
        let (scale, bias) = (channels(args.get(1)?, x.dim())?, channels(args.get(2)?, x.dim())?);
        Ok(centred.f_mul(&inverse)?.f_mul(&scale)?.f_add(&bias)?)
    })
}

/// Scale and bias are per group before version 21 and per channel since then.
fn group_normalization(b: &mut Build) -> OpResult<Kernel> {
    let epsilon = b.attributes.float("epsilon", 1e-5)?;
    let groups = b.attributes.int_required("num_groups")?;
    if groups < 1 {
        return Err(OpError::new(format!("attribute `num_groups` is {groups}")));
    }
    let per_channel = b.version >= 21;
    if per_channel {
        b.attributes.ignore("stash_type");
    }
    one(move |args| {
        let x = args.get(0)?;
        let (scale, bias) = (args.get(1)?, args.get(2)?);
        let normal = x.f_group_norm(groups, None::<&Tensor>, None::<&Tensor>, epsilon, true)?;
        let count = x.size().get(1).copied().unwrap_or(1);
        let spread = |parameter: &Tensor| -> OpResult<Tensor> {
            let full = if per_channel {
                parameter.shallow_clone()
            } else {
                parameter.f_repeat_interleave_self_int(count / groups, 0, None)?
            };
            channels(&full, x.dim())
        };
        Ok(normal.f_mul(&spread(scale)?)?.f_add(&spread(bias)?)?)
    })
}

fn lp_normalization(b: &mut Build) -> OpResult<Kernel> {
    let axis = b.attributes.int("axis", -1)?;
    let order = b.attributes.int("p", 2)?;
    if order != 1 && order != 2 {
        return Err(OpError::new(format!("attribute `p` is {order}, expected 1 or 2")));
    }
    one(move |args| {
        let x = args.get(0)?;
        let axis = [axis_of(axis, x.dim())?];
        let norm = if order == 1 {
            x.f_abs()?.f_sum_dim_intlist(&axis[..], true, None)?
        } else {
            x.f_square()?.f_sum_dim_intlist(&axis[..], true, None)?.f_sqrt()?
        };
        // A zero vector stays zero.
        Ok(x.f_div(&norm)?.f_masked_fill(&norm.f_eq(0.0)?, 0.0)?)
    })
}
