//! Scaled dot-product attention, and the standard `Attention` operator.

use tch::{Device, Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, LARGEST, OpError, OpResult, list_on, many};
use crate::torch::operator::{MICROSOFT, Operator};
use crate::torch::products::{lowered, product};

use super::cast::kind_from_number;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Attention", 23, attention).host(0b100_0000).grad(),
    Operator::new(MICROSOFT, "Attention", 1, with_projection).grad(),
    Operator::new(MICROSOFT, "MultiHeadAttention", 1, multi_head).grad(),
];

/// Parameters of one attention besides q, k and v.
#[derive(Default)]
pub(super) struct Spec {
    pub scale: f64,
    /// Soft cap: scores become cap * tanh(scores / cap) before the mask; 0 means no cap.
    pub softcap: f64,
    /// Query `i` attends to key `j` when `j <= i`. Valid only for equal lengths and without a mask.
    pub causal: bool,
    /// Bool (true: attend) or float (added), broadcast to `[B, H, S, T]`.
    pub mask: Option<Tensor>,
    /// Attention sink, `[H]`: one logit per head that is part of the softmax and has no value.
    pub sink: Option<Tensor>,
    pub softmax: Option<Kind>,
    pub cast: Option<Kind>,
    /// Requests the scores as a second result.
    pub scores: Option<QkOutputMode>,
}

/// Kind of scores that the node outputs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum QkOutputMode {
    Raw,
    /// After the soft cap.
    Capped,
    /// After the cap and the masks.
    Masked,
    Probabilities,
}

/// Attention over heads: q `[B, H, S, D]`, k `[B, G, T, D]`, v `[B, G, T, E]` with G dividing H -> `[B, H, S, E]`, and
/// the scores `[B, H, S, T]` if requested. A query without a visible key gives zeros.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, spec: &Spec) -> OpResult<(Tensor, Option<Tensor>)> {
    let kind = q.f_kind()?;
    let (q, k, v) = (lowered(q, spec.cast)?, lowered(k, spec.cast)?, lowered(v, spec.cast)?);
    let (heads, groups) = (q.size4()?.1, k.size4()?.1);
    if groups == 0 || heads % groups != 0 || v.size4()?.1 != groups {
        return Err(OpError::new(format!("{heads} query heads over {groups} key and {} value heads", v.size4()?.1)));
    }
    let repeat = heads / groups;
    let plain = spec.softcap == 0.0 && spec.sink.is_none() && spec.scores.is_none() && spec.softmax.is_none();
    if plain {
        let spread = |x: &Tensor| -> OpResult<Tensor> {
            let by_kernel = repeat == 1 || x.device() == Device::Cpu;
            Ok(if by_kernel { x.shallow_clone() } else { x.f_repeat_interleave_self_int(repeat, 1, None)? })
        };
        let mask = spec.mask.as_ref().map(|mask| additive_in(mask, q.f_kind()?)).transpose()?;
        let (k, v) = (spread(&k)?, spread(&v)?);
        let grouped = k.size4()?.1 != heads;
        let causal = spec.causal && mask.is_none();
        let out = Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask.as_ref(), 0.0, causal, spec.scale, grouped)?;
        return Ok((out, None));
    }
    let (k, v) = if repeat == 1 {
        (k, v)
    } else {
        (k.f_repeat_interleave_self_int(repeat, 1, None)?, v.f_repeat_interleave_self_int(repeat, 1, None)?)
    };
    let raw = q.f_mul_scalar(spec.scale)?.f_matmul(&k.f_transpose(-2, -1)?)?;
    let mut logits = raw.shallow_clone();
    if spec.softcap != 0.0 {
        logits = logits.f_div_scalar(spec.softcap)?.f_tanh()?.f_mul_scalar(spec.softcap)?;
    }
    if let Some(kind) = spec.softmax {
        logits = logits.f_to_kind(kind)?;
    } else if spec.cast.is_some() {
        logits = logits.f_to_kind(kind)?;
    }
    let capped = logits.shallow_clone();
    let mut hidden = None;
    let causal = if spec.causal { Some(causal_mask(&q, &k)?) } else { None };
    for mask in spec.mask.iter().chain(&causal) {
        let bias = to_bias(mask, logits.f_kind()?)?;
        let blocked = bias.f_eq(f64::NEG_INFINITY)?;
        hidden = Some(match hidden {
            None => blocked,
            Some(before) => blocked.f_logical_or(&before)?,
        });
        logits = logits.f_add(&bias)?;
    }
    let size = logits.size();
    let masked = logits.shallow_clone();
    let probabilities = match &spec.sink {
        None => logits.f_softmax(-1, None)?,
        Some(sink) => {
            let sink = sink
                .f_to_kind(logits.f_kind()?)?
                .f_reshape([1, heads, 1, 1])?
                .f_expand([size[0], heads, size[2], 1], false)?;
            Tensor::f_cat(&[&logits, &sink], -1)?.f_softmax(-1, None)?.f_narrow(-1, 0, size[3])?
        }
    };
    let probabilities = match hidden {
        // A row without a visible key would be 0 / 0.
        Some(blocked) => {
            let all = blocked.f_all_dim(-1, true)?;
            probabilities.f_masked_fill(&all, 0.0)?
        }
        None => probabilities,
    };
    let probabilities = probabilities.f_to_kind(v.f_kind()?)?;
    let out = probabilities.f_matmul(&v)?;
    let scores = spec.scores.map(|which| match which {
        QkOutputMode::Raw => raw,
        QkOutputMode::Capped => capped,
        QkOutputMode::Masked => masked,
        QkOutputMode::Probabilities => probabilities,
    });
    Ok((out, scores))
}

fn causal_mask(q: &Tensor, k: &Tensor) -> OpResult<Tensor> {
    let (rows, columns) = (q.size4()?.2, k.size4()?.2);
    Ok(Tensor::f_ones([rows, columns], (Kind::Bool, q.device()))?.f_tril(0)?)
}

/// A float mask in the operands' kind; a bool mask unchanged.
fn additive_in(mask: &Tensor, kind: Kind) -> OpResult<Tensor> {
    Ok(if mask.f_kind()? == Kind::Bool { mask.shallow_clone() } else { mask.f_to_kind(kind)? })
}

/// A mask as a bias: 0 where a bool mask is true, minus infinity where it is false.
pub(super) fn to_bias(mask: &Tensor, kind: Kind) -> OpResult<Tensor> {
    if mask.f_kind()? != Kind::Bool {
        return Ok(mask.f_to_kind(kind)?);
    }
    let zeros = Tensor::f_zeros(mask.size(), (kind, mask.device()))?;
    Ok(zeros.f_masked_fill(&mask.f_logical_not()?, f64::NEG_INFINITY)?)
}

/// Key `j` is visible to query `i` when `j <= start + i` and, with a window, `j > start + i - window`.
///
/// Shapes: one start for all -> `[S, T]`; one per sample -> `[B, 1, S, T]`.
pub(super) fn visible(
    starts: &[i64],
    rows: i64,
    columns: i64,
    window: Option<i64>,
    causal: bool,
    device: Device,
) -> OpResult<Tensor> {
    let i = Tensor::f_arange(rows, (Kind::Int64, device))?.f_unsqueeze(1)?;
    let j = Tensor::f_arange(columns, (Kind::Int64, device))?.f_unsqueeze(0)?;
    let place = match starts {
        [start] => i.f_add_scalar(*start)?,
        _ => list_on(starts, device)?.f_reshape([-1i64, 1, 1, 1])?.f_add(&i)?,
    };
    let mut seen = if causal { j.f_le_tensor(&place)? } else { j.f_ge(0)?.f_logical_and(&place.f_ge(i64::MIN)?)? };
    if let Some(window) = window {
        seen = seen.f_logical_and(&j.f_gt_tensor(&place.f_sub_scalar(window)?)?)?;
    }
    Ok(seen)
}

/// True where key `j` is at most `left` positions before and at most `right` positions after `start + i`, the position
/// of query `i`.
///
/// Shapes: as [`visible`].
fn within(
    starts: &[i64],
    rows: i64,
    columns: i64,
    left: Option<i64>,
    right: Option<i64>,
    device: Device,
) -> OpResult<Tensor> {
    let shifted: Vec<i64> = starts.iter().map(|start| start.saturating_add(right.unwrap_or(0))).collect();
    let upper = visible(&shifted, rows, columns, None, right.is_some(), device)?;
    match left {
        None => Ok(upper),
        Some(left) => {
            let lower = visible(starts, rows, columns, Some(left + 1), false, device)?;
            Ok(upper.f_logical_and(&lower)?)
        }
    }
}

/// Splits `[B, S, H * D]` into `[B, H, S, D]`; a 4-D tensor is returned unchanged.
pub(super) fn heads_first(x: &Tensor, heads: i64) -> OpResult<Tensor> {
    if x.dim() == 4 {
        return Ok(x.shallow_clone());
    }
    let (batch, steps, width) = x.size3()?;
    if heads < 1 || width % heads != 0 {
        return Err(OpError::new(format!("width {width} does not split into {heads} heads")));
    }
    Ok(x.f_reshape([batch, steps, heads, width / heads])?.f_transpose(1, 2)?)
}

/// Joins `[B, H, S, D]` to `[B, S, H * D]`.
pub(super) fn heads_last(x: &Tensor) -> OpResult<Tensor> {
    let (batch, heads, steps, width) = x.size4()?;
    Ok(x.f_transpose(1, 2)?.f_reshape([batch, steps, heads * width])?)
}

/// The past keys or values followed by the new ones, along the axis of steps.
pub(super) fn append(past: Option<&Tensor>, new: Tensor) -> OpResult<Tensor> {
    match past {
        Some(past) if past.size4()?.2 > 0 => Ok(Tensor::f_cat(&[past, &new.f_to_kind(past.f_kind()?)?], 2)?),
        _ => Ok(new),
    }
}

/// Shapes: Q `[B, Hq, S, D]` or `[B, S, Hq * D]`, K and V likewise -> Y in Q's layout, and the caches
/// `[B, Hkv, past + L, D]`. Causal masking is aligned to the end of the past.
///
/// `left` and `right` window sizes limit the keys before and after a query's position; -1 means no limit.
///
/// Source: ONNX Attention-23 to -25 with their errata.
fn attention(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let bound = |name: &str| -> OpResult<Option<i64>> {
        match if b.version >= 25 { a.int(name, -1)? } else { -1 } {
            -1 => Ok(None),
            places if (0..=LARGEST).contains(&places) => Ok(Some(places)),
            places => Err(OpError::new(format!("attribute `{name}` is {places}"))),
        }
    };
    let (left, right) = (bound("left_window_size")?, bound("right_window_size")?);
    let causal = a.flag("is_causal", false)?;
    let (q_heads, kv_heads) = (a.int("q_num_heads", 0)?, a.int("kv_num_heads", 0)?);
    let scale = a.float_opt("scale")?;
    let softcap = a.float("softcap", 0.0)?;
    let softmax = a.int_opt("softmax_precision")?.map(kind_from_number).transpose()?;
    let mode = a.int("qk_matmul_output_mode", 0)?;
    let wants_scores = b.wants(3);
    let scores = match (wants_scores, mode) {
        (false, _) => None,
        (true, 0) => Some(QkOutputMode::Raw),
        (true, 1) => Some(QkOutputMode::Capped),
        (true, 2) => Some(QkOutputMode::Masked),
        (true, 3) => Some(QkOutputMode::Probabilities),
        (true, mode) => return Err(OpError::new(format!("qk_matmul_output_mode {mode} is not supported"))),
    };
    let cast = b.autocast;
    many(move |args| {
        let (q, k, v) = (args.get(0)?, args.get(1)?, args.get(2)?);
        let flat = q.dim() == 3;
        let (q, k, v) = (heads_first(q, q_heads)?, heads_first(k, kv_heads)?, heads_first(v, kv_heads)?);
        let past = args.opt(4).map_or(Ok(0), |past| past.size4().map(|size| size.2))?;
        let (k, v) = (append(args.opt(4), k)?, append(args.opt(5), v)?);
        let (_, _, rows, width) = q.size4()?;
        let columns = k.size4()?.2;
        let mut mask = args.opt(3).map(|mask| pad_mask(mask, columns)).transpose()?;
        let lengths = args.ints(6)?;
        let starts: Vec<i64> = match &lengths {
            Some(lengths) if args.opt(4).is_none() => lengths.iter().map(|length| length - rows).collect(),
            _ => vec![past],
        };
        let bounded = left.is_some() || right.is_some();
        let square = causal && mask.is_none() && lengths.is_none() && past == 0 && rows == columns && !bounded;
        if bounded {
            mask = Some(both(mask, within(&starts, rows, columns, left, right, q.device())?)?);
        }
        if causal && !square {
            mask = Some(both(mask, visible(&starts, rows, columns, None, true, q.device())?)?);
        }
        if let Some(lengths) = &lengths {
            let valid = list_on(lengths, q.device())?.f_reshape([-1i64, 1, 1, 1])?;
            let places = Tensor::f_arange(columns, (Kind::Int64, q.device()))?;
            mask = Some(both(mask, places.f_lt_tensor(&valid)?)?);
        }
        let scale = scale.unwrap_or(1.0 / (width as f64).sqrt());
        let softmax = softmax.filter(|kind| q.f_kind().is_ok_and(|own| own != *kind));
        let spec = Spec { scale, softcap, causal: square, mask, sink: None, softmax, cast, scores };
        let (out, scores) = attend(&q, &k, &v, &spec)?;
        let out = if flat { heads_last(&out)? } else { out };
        Ok(vec![out, k, v, scores.unwrap_or_else(Tensor::new)])
    })
}

/// Combines two masks: the first may be a bias, the second is bool.
fn both(mask: Option<Tensor>, more: Tensor) -> OpResult<Tensor> {
    match mask {
        None => Ok(more),
        Some(mask) if mask.f_kind()? == Kind::Bool => Ok(mask.f_logical_and(&more)?),
        Some(mask) => Ok(mask.f_add(&to_bias(&more, mask.f_kind()?)?)?),
    }
}

/// Extends a mask that is shorter than the keys: the remaining keys are hidden.
fn pad_mask(mask: &Tensor, columns: i64) -> OpResult<Tensor> {
    let own = mask.size().last().copied().unwrap_or(1);
    if own >= columns || own == 1 && columns != 1 {
        return Ok(mask.shallow_clone());
    }
    let hidden = if mask.f_kind()? == Kind::Bool { 0.0 } else { f64::NEG_INFINITY };
    Ok(mask.f_pad([0, columns - own], "constant", hidden)?)
}

/// Inputs: query, key, value, bias, key padding mask, attention bias, past key, past value.
///
/// Shapes: query `[B, S, H * D]` with key and value `[B, L, H * D]` or `[B, H, L, D]`, or packed `[B, S, H, 3, D]`, or
/// query with packed key and value `[B, L, H, 2, D]`.
/// Source: ONNX Runtime, com.microsoft MultiHeadAttention-1.
fn multi_head(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let heads = head_count(b)?;
    let causal = a.flag("unidirectional", false)?;
    let scale = a.float_opt("scale")?;
    let filter = a.float("mask_filter_value", -10000.0)?;
    if b.has(8) || b.has(9) {
        return Err(OpError::new("shared cache buffers are not supported"));
    }
    if b.wants(3) {
        return Err(OpError::new("output 3 (qk) is not computed here"));
    }
    let cast = b.autocast;
    many(move |args| {
        let (mut q, mut k, mut v) = unpack(args, heads)?;
        if let Some(bias) = args.opt(3) {
            let widths = [&q, &k, &v].map(|x| x.size()[3] * heads);
            let parts = bias.f_split_with_sizes(&widths[..], 0)?;
            let shaped = |part: &Tensor| part.f_reshape([1, heads, 1, part.numel() as i64 / heads]);
            q = q.f_add(&shaped(&parts[0])?)?;
            k = k.f_add(&shaped(&parts[1])?)?;
            v = v.f_add(&shaped(&parts[2])?)?;
        }
        let past = args.opt(6).map_or(Ok(0), |past| past.size4().map(|size| size.2))?;
        let (k, v) = (append(args.opt(6), k)?, append(args.opt(7), v)?);
        let (_, _, rows, width) = q.size4()?;
        let columns = k.size4()?.2;
        let kind = q.f_kind()?;
        let mut mask = args.opt(5).map(Tensor::shallow_clone);
        if let Some(padding) = args.opt(4) {
            let bias = padding_bias(padding, columns, filter, kind)?;
            mask = Some(match mask {
                Some(mask) => mask.f_add(&bias)?,
                None => bias,
            });
        }
        if causal {
            mask = Some(both(mask, visible(&[past], rows, columns, None, true, q.device())?)?);
        }
        let scale = scale.filter(|scale| *scale != 0.0).unwrap_or(1.0 / (width as f64).sqrt());
        let (out, _) = attend(&q, &k, &v, &Spec { scale, mask, cast, ..Spec::default() })?;
        Ok(vec![heads_last(&out)?, k, v])
    })
}

fn unpack(args: &Args, heads: i64) -> OpResult<(Tensor, Tensor, Tensor)> {
    let query = args.get(0)?;
    let part = |packed: &Tensor, index: i64| -> OpResult<Tensor> { Ok(packed.f_select(3, index)?.f_transpose(1, 2)?) };
    match (args.opt(1), args.opt(2)) {
        (None, None) if query.dim() == 5 => Ok((part(query, 0)?, part(query, 1)?, part(query, 2)?)),
        (Some(packed), None) if packed.dim() == 5 => {
            Ok((heads_first(query, heads)?, part(packed, 0)?, part(packed, 1)?))
        }
        (Some(k), Some(v)) => Ok((heads_first(query, heads)?, heads_first(k, heads)?, heads_first(v, heads)?)),
        _ => Err(OpError::new("query, key and value are in no known layout")),
    }
}

/// The attribute `num_heads`.
fn head_count(b: &Build) -> OpResult<i64> {
    let heads = b.attributes.int_required("num_heads")?;
    if !(1..=LARGEST).contains(&heads) {
        return Err(OpError::new(format!(
            "attribute `num_heads` is {heads}, expected at least 1 and at most {LARGEST}"
        )));
    }
    Ok(heads)
}

/// Attention with one weight for the projections of query, key and value.
///
/// Inputs: x `[B, S, I]`, weight `[I, 2 * H * D + H * E]`, bias, mask, the past keys and values `[2, B, H, P, D]`, and
/// a bias of the scores -> `[B, S, H * E]` and keys and values `[2, B, H, P + S, D]`. The mask is `[B]` lengths,
/// `[2 B]` ends followed by starts, or `[B, T]` or `[B, S, T]` of 0 and 1.
/// Source: ONNX Runtime, com.microsoft Attention-1.
fn with_projection(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let heads = head_count(b)?;
    let causal = a.flag("unidirectional", false)?;
    let scale = a.float_opt("scale")?.filter(|scale| *scale != 0.0);
    let filter = a.float("mask_filter_value", -10000.0)?;
    let widths = a.ints("qkv_hidden_sizes")?.filter(|widths| !widths.is_empty());
    if a.flag("do_rotary", false)? {
        return Err(OpError::new("attribute `do_rotary` is not supported"));
    }
    // The attribute has no effect without the rotation.
    a.ignore("rotary_embedding_dim");
    if a.flag("past_present_share_buffer", false)? || b.has(6) {
        return Err(OpError::new("shared cache buffers are not supported"));
    }
    let wants_cache = b.wants(1);
    let cast = b.autocast;
    many(move |args| {
        let mut projected = product(args.get(0)?, args.get(1)?, cast)?;
        if let Some(bias) = args.opt(2) {
            projected = projected.f_add(bias)?;
        }
        let total = projected.size3()?.2;
        let widths = widths.clone().unwrap_or_else(|| vec![total / 3; 3]);
        if widths.len() != 3 || widths.iter().any(|width| *width < 1) || widths.iter().sum::<i64>() != total {
            return Err(OpError::new(format!("a projection to {total} does not split into {widths:?}")));
        }
        let parts = projected.f_split_with_sizes(&widths, -1)?;
        let [q, k, v] = &parts[..] else { return Err(OpError::new("the projection does not split")) };
        let (q, k, v) = (heads_first(q, heads)?, heads_first(k, heads)?, heads_first(v, heads)?);
        let (past_k, past_v) = match args.opt(4) {
            Some(past) if past.size().first() == Some(&2) => (Some(past.f_select(0, 0)?), Some(past.f_select(0, 1)?)),
            Some(past) => return Err(OpError::new(format!("a past of shape {:?} is not known", past.size()))),
            None => (None, None),
        };
        let past = past_k.as_ref().map_or(Ok(0), |past| past.size4().map(|size| size.2))?;
        let (k, v) = (append(past_k.as_ref(), k)?, append(past_v.as_ref(), v)?);
        let (batch, _, rows, width) = q.size4()?;
        let columns = k.size4()?.2;
        let kind = q.f_kind()?;
        let mut mask = args.opt(5).map(Tensor::shallow_clone);
        if let Some(own) = args.opt(3) {
            let bias = index_bias(own, batch, columns, filter, kind)?;
            mask = Some(match mask {
                Some(mask) => mask.f_add(&bias)?,
                None => bias,
            });
        }
        if causal {
            mask = Some(both(mask, visible(&[past], rows, columns, None, true, q.device())?)?);
        }
        let scale = scale.unwrap_or(1.0 / (width as f64).sqrt());
        let (out, _) = attend(&q, &k, &v, &Spec { scale, mask, cast, ..Spec::default() })?;
        let mut results = vec![heads_last(&out)?];
        if wants_cache {
            results.push(Tensor::f_stack(&[k, v], 0)?);
        }
        Ok(results)
    })
}

/// The mask of `Attention` as a bias for the scores.
fn index_bias(mask: &Tensor, batch: i64, columns: i64, filter: f64, kind: Kind) -> OpResult<Tensor> {
    let size = mask.size();
    let shown = match size[..] {
        [length] if length == 2 * batch && batch > 0 => {
            let places = Tensor::f_arange(columns, (Kind::Int64, mask.device()))?;
            let ends = mask.f_narrow(0, 0, batch)?.f_reshape([-1i64, 1, 1, 1])?;
            let starts = mask.f_narrow(0, batch, batch)?.f_reshape([-1i64, 1, 1, 1])?;
            places.f_lt_tensor(&ends)?.f_logical_and(&places.f_ge_tensor(&starts)?)?
        }
        [length] if length != batch => {
            return Err(OpError::new(format!("a mask of {length} numbers for a batch of {batch} is not supported")));
        }
        _ => return padding_bias(mask, columns, filter, kind),
    };
    Ok(shown.f_logical_not()?.f_to_kind(kind)?.f_mul_scalar(filter)?)
}

/// A padding mask (`[B]` lengths, or `[B, T]` or `[B, S, T]` of 0 and 1) as a bias for the scores.
fn padding_bias(padding: &Tensor, columns: i64, filter: f64, kind: Kind) -> OpResult<Tensor> {
    let size = padding.size();
    let shown = match size.len() {
        1 => {
            let places = Tensor::f_arange(columns, (Kind::Int64, padding.device()))?;
            places.f_lt_tensor(&padding.f_reshape([-1i64, 1, 1, 1])?)?
        }
        2 => padding.f_ne(0)?.f_reshape([size[0], 1, 1, size[1]])?,
        3 => padding.f_ne(0)?.f_unsqueeze(1)?,
        _ => return Err(OpError::new(format!("a padding mask of shape {size:?} is not supported"))),
    };
    Ok(shown.f_logical_not()?.f_to_kind(kind)?.f_mul_scalar(filter)?)
}
