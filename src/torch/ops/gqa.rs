//! ONNX Runtime's grouped-query attention with its cache.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, LARGEST, OpError, OpResult, list_on, many, moved_to};
use crate::torch::operator::{MICROSOFT, Operator};

use super::attention::{Spec, attend, heads_last, to_bias, visible};
use super::rotary::{by_position, rotate};

pub(super) const ROWS: &[Operator] =
    &[Operator::new(MICROSOFT, "GroupQueryAttention", 1, build).host(0b110_0000).grad()];

struct GqaSettings {
    heads: i64,
    groups: i64,
    scale: Option<f64>,
    softcap: f64,
    rotary: bool,
    interleaved: bool,
    window: Option<i64>,
    causal: bool,
    smooth: bool,
    norm_epsilon: f64,
    cast: Option<Kind>,
}

fn build(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    for name in ["k_quant_type", "v_quant_type"] {
        if a.text_or(name, "NONE")? != "NONE" {
            return Err(OpError::new("a quantised cache is not supported"));
        }
    }
    a.ignore("kv_cache_bit_width");
    if a.int("sliding_window_cache", 0)? != 0 {
        return Err(OpError::new("a window-sized cache is not supported"));
    }
    if a.int("qk_output", 0)? != 0 || b.wants(3) {
        return Err(OpError::new("output 3 (qk) is not computed here"));
    }
    let settings = GqaSettings {
        heads: a.int_required("num_heads")?,
        groups: a.int_required("kv_num_heads")?,
        scale: a.float_opt("scale")?.filter(|scale| *scale != 0.0),
        softcap: a.float("softcap", 0.0)?,
        rotary: a.flag("do_rotary", false)?,
        interleaved: a.flag("rotary_interleaved", false)?,
        window: Some(a.int("local_window_size", -1)?).filter(|window| *window != -1),
        causal: a.flag("causal", true)?,
        smooth: a.int("smooth_softmax", 0)? > 0,
        norm_epsilon: a.float("qk_norm_epsilon", 1e-6)?,
        cast: b.autocast,
    };
    if settings.window.is_some_and(|window| window < 1) {
        return Err(OpError::new("attribute `local_window_size` is neither -1 nor positive"));
    }
    if ![settings.heads, settings.groups].iter().all(|count| (1..=LARGEST).contains(count)) {
        return Err(OpError::new("attributes `num_heads` and `kv_num_heads` are out of range"));
    }
    many(move |args| run(args, &settings))
}

/// Inputs: query (or packed QKV), key, value, past key, past value, seqlens_k (per sample, total length minus 1),
/// total_sequence_length, cos and sin cache, position_ids, attention bias, head sink, two scales, two norm weights.
///
/// Shapes: query `[B, S, H * D]`, key and value `[B, S, G * D]`, caches `[B, G, P, D]` -> `[B, S, H * D]` and caches
/// `[B, G, max(P, total), D]`.
/// Source: ONNX Runtime, com.microsoft GroupQueryAttention-1.
fn run(args: &Args, s: &GqaSettings) -> OpResult<Vec<Tensor>> {
    let (mut q, mut k, v) = operands(args, s)?;
    let (batch, rows, _, width) = q.size4()?;
    let totals: Vec<i64> = args.ints_required(5)?.iter().map(|last| last.saturating_add(1)).collect();
    let total = args.int(6)?.ok_or_else(|| OpError::new("input 6 is missing"))?;
    if totals.len() as i64 != batch {
        return Err(OpError::new(format!("seqlens_k has {} entries for a batch of {batch}", totals.len())));
    }
    // A first prompt has no past, regardless of its padding.
    let starts: Vec<i64> = totals.iter().map(|own| if rows == total { 0 } else { own.saturating_sub(rows) }).collect();
    if let Some(start) = starts.iter().find(|start| **start < 0) {
        return Err(OpError::new(format!("a sample's past has length {start}")));
    }
    if let (Some(q_weight), Some(k_weight)) = (args.opt(14), args.opt(15)) {
        let norm = |x: &Tensor, weight: &Tensor| -> OpResult<Tensor> {
            let inverse =
                x.f_square()?.f_mean_dim(&[-1i64][..], true, None)?.f_add_scalar(s.norm_epsilon)?.f_rsqrt()?;
            Ok(x.f_mul(&inverse)?.f_mul(weight)?)
        };
        (q, k) = (norm(&q, q_weight)?, norm(&k, k_weight)?);
    }
    if s.rotary {
        let (cos, sin) = (args.get(7)?, args.get(8)?);
        let positions = match args.opt(9) {
            Some(positions) => positions.f_reshape([-1, rows])?,
            None => {
                let starts = Tensor::f_from_slice(&starts)?.f_unsqueeze(1)?;
                moved_to(&starts.f_add(&Tensor::f_arange(rows, (Kind::Int64, tch::Device::Cpu))?)?, q.device())?
            }
        };
        let angles = |cache: &Tensor| -> OpResult<Tensor> { Ok(by_position(cache, &positions)?.f_unsqueeze(2)?) };
        let (cos, sin) = (angles(cos)?, angles(sin)?);
        (q, k) = (rotate(&q, &cos, &sin, s.interleaved)?, rotate(&k, &cos, &sin, s.interleaved)?);
    }
    let (q, k, v) = (q.f_transpose(1, 2)?, k.f_transpose(1, 2)?, v.f_transpose(1, 2)?);
    let keys = extend(args.opt(3), &k, &starts, total)?;
    let values = extend(args.opt(4), &v, &starts, total)?;
    let columns = keys.size4()?.2;
    let same = starts.windows(2).all(|pair| pair[0] == pair[1]);
    let start = starts.first().copied().unwrap_or(0);
    let bias = args.opt(10);
    let square = s.causal && s.window.is_none() && bias.is_none() && same && start == 0 && rows == columns;
    let last = s.causal && s.window.is_none() && bias.is_none() && same && rows == 1 && start + 1 == columns;
    let mut mask = None;
    if !square && !last {
        let starts = if same { &starts[..1.min(starts.len())] } else { &starts[..] };
        let shown = visible(starts, rows, columns, s.window, s.causal, q.device())?;
        let shown = if s.causal {
            shown
        } else {
            let places = Tensor::f_arange(columns, (Kind::Int64, q.device()))?;
            let ends = list_on(&totals, q.device())?.f_reshape([-1i64, 1, 1, 1])?;
            shown.f_logical_and(&places.f_lt_tensor(&ends)?)?
        };
        mask = Some(match bias {
            None => shown,
            Some(bias) => {
                let own = bias.size().last().copied().unwrap_or(0);
                let bias =
                    if own < columns { bias.f_constant_pad_nd(&[0, columns - own][..])? } else { bias.shallow_clone() };
                bias.f_add(&to_bias(&shown, bias.f_kind()?)?)?
            }
        });
    }
    let sink = match args.opt(11) {
        Some(sink) => Some(sink.shallow_clone()),
        None if s.smooth => Some(Tensor::f_zeros([s.heads], (q.f_kind()?, q.device()))?),
        None => None,
    };
    let scale = s.scale.unwrap_or(1.0 / (width as f64).sqrt());
    let spec = Spec { scale, softcap: s.softcap, causal: square, mask, sink, cast: s.cast, ..Spec::default() };
    let (out, _) = attend(&q, &keys, &values, &spec)?;
    Ok(vec![heads_last(&out)?, keys, values])
}

/// Query, key and value as `[B, S, heads, D]`.
fn operands(args: &Args, s: &GqaSettings) -> OpResult<(Tensor, Tensor, Tensor)> {
    let query = args.get(0)?;
    let (batch, steps, width) = query.size3()?;
    match (args.opt(1), args.opt(2)) {
        (Some(k), Some(v)) => {
            if width % s.heads != 0 {
                return Err(OpError::new(format!("width {width} does not split into {} heads", s.heads)));
            }
            let cut = |x: &Tensor, heads: i64| -> OpResult<Tensor> {
                let (batch, steps, width) = x.size3()?;
                Ok(x.f_reshape([batch, steps, heads, width / heads])?)
            };
            Ok((cut(query, s.heads)?, cut(k, s.groups)?, cut(v, s.groups)?))
        }
        (None, None) => {
            let all = s.heads + 2 * s.groups;
            if width % all != 0 {
                return Err(OpError::new(format!("packed width {width} does not split into {all} heads")));
            }
            let packed = query.f_reshape([batch, steps, all, width / all])?;
            let mut parts = packed.f_split_with_sizes(&[s.heads, s.groups, s.groups][..], 2)?.into_iter();
            match (parts.next(), parts.next(), parts.next()) {
                (Some(q), Some(k), Some(v)) => Ok((q, k, v)),
                _ => Err(OpError::new("packed operands do not split")),
            }
        }
        _ => Err(OpError::new("key and value must come together")),
    }
}

/// The cache with the new steps written after each sample's past, `[B, G, max(P, total), D]`; unused steps are 0.
fn extend(past: Option<&Tensor>, new: &Tensor, starts: &[i64], total: i64) -> OpResult<Tensor> {
    let (batch, groups, steps, width) = new.size4()?;
    let room = past.map_or(Ok(0), |past| past.size4().map(|size| size.2))?;
    let length = room.max(total).max(starts.iter().max().copied().unwrap_or(0) + steps);
    if let Some(start) = starts.iter().find(|start| **start > room) {
        return Err(OpError::new(format!("a past of {start} steps is asked for, the cache holds {room}")));
    }
    let join = |past: Option<Tensor>, new: &Tensor, start: i64| -> OpResult<Tensor> {
        let mut parts = Vec::with_capacity(3);
        if let (Some(past), true) = (past, start > 0) {
            parts.push(past.f_narrow(2, 0, start)?.f_to_kind(new.f_kind()?)?);
        }
        parts.push(new.shallow_clone());
        let rest = length - start - steps;
        if rest > 0 {
            parts.push(Tensor::f_zeros([new.size()[0], groups, rest, width], (new.f_kind()?, new.device()))?);
        }
        if parts.len() == 1 { Ok(parts.swap_remove(0)) } else { Ok(Tensor::f_cat(&parts, 2)?) }
    };
    let Some(&first) = starts.first() else { return Ok(new.shallow_clone()) };
    if starts.iter().all(|start| *start == first) {
        return join(past.map(Tensor::shallow_clone), new, first);
    }
    let samples: Vec<Tensor> = (0..batch)
        .zip(starts)
        .map(|(sample, &start)| {
            let own = past.map(|past| past.f_narrow(0, sample, 1)).transpose()?;
            join(own, &new.f_narrow(0, sample, 1)?, start)
        })
        .collect::<OpResult<_>>()?;
    Ok(Tensor::f_cat(&samples, 0)?)
}
