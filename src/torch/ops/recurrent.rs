//! Layers with a state: linear attention and short convolutions.

use tch::Tensor;

use crate::torch::kernel::{Args, Build, Kernel, LARGEST, OpError, OpResult, many};
use crate::torch::operator::{MICROSOFT, Operator};
use crate::torch::products::lowered;

pub(super) const ROWS: &[Operator] = &[
    Operator::new(MICROSOFT, "CausalConvWithState", 1, causal_convolution).grad(),
    Operator::new(MICROSOFT, "LinearAttention", 1, linear_attention).grad(),
];

/// Rejects a state that keeps several steps.
fn single_state(b: &Build) -> OpResult<()> {
    match b.attributes.int("state_window", 0)? {
        0 => Ok(()),
        steps => Err(OpError::new(format!("a state of {steps} steps (`state_window`) is not supported"))),
    }
}

/// Update rule of the state.
#[derive(Clone, Copy)]
struct Rule {
    /// The state first decays by an exponential.
    decays: bool,
    /// Delta rule: the value that the state holds for a key is subtracted from the new value.
    corrects: bool,
}

/// For each step `t`: `S = exp(g_t) S + k_t (x) beta_t (v_t - S^T k_t)`, `o_t = scale S^T q_t`. The rule decides
/// whether `g`, `beta` and the correction `S^T k_t` are used.
///
/// Shapes: q `[B, T, Hq * D]`, k `[B, T, Hk * D]`, v `[B, T, H * E]`, state `[B, H, D, E]`, decay `[B, T, H * D]` or
/// `[B, T, H]`, beta `[B, T, H]` or `[B, T, 1]` -> `[B, T, max(Hq, H) * E]` and the state. When one operand has fewer
/// heads, each of its heads serves a group of consecutive heads of the others.
/// Source: ONNX LinearAttention-27; ONNX Runtime, com.microsoft LinearAttention-1.
fn linear_attention(b: &mut Build) -> OpResult<Kernel> {
    single_state(b)?;
    let a = b.attributes;
    // A hint for engines that process many steps at once.
    a.ignore("chunk_size");
    let (q_heads, heads) = (a.int_required("q_num_heads")?, a.int_required("kv_num_heads")?);
    if ![q_heads, heads].iter().all(|count| (1..=LARGEST).contains(count)) {
        return Err(OpError::new("attributes `q_num_heads` and `kv_num_heads` are out of range"));
    }
    let scale = a.float("scale", 0.0)?;
    let rule = match a.text_or("update_rule", "gated_delta")? {
        "linear" => Rule { decays: false, corrects: false },
        "gated" => Rule { decays: true, corrects: false },
        "delta" => Rule { decays: false, corrects: true },
        "gated_delta" => Rule { decays: true, corrects: true },
        other => return Err(OpError::new(format!("update_rule `{other}` is not known"))),
    };
    many(move |args| recur(args, q_heads, heads, scale, rule))
}

fn recur(args: &Args, q_heads: i64, heads: i64, scale: f64, rule: Rule) -> OpResult<Vec<Tensor>> {
    let (query, key, value) = (args.get(0)?, args.get(1)?, args.get(2)?);
    let (batch, steps, width) = query.size3()?;
    if width % q_heads != 0 || width == 0 || key.size3()?.2 % (width / q_heads) != 0 {
        return Err(OpError::new(format!("width {width} does not split into {q_heads} heads that fit the keys")));
    }
    let depth = width / q_heads;
    let all = q_heads.max(heads);
    // `[B, T, own * depth]` -> `[B, T, count, depth]`.
    let spread = |x: &Tensor, count: i64| -> OpResult<Tensor> {
        let own = x.size3()?.2 / depth;
        if own == 0 || count % own != 0 {
            return Err(OpError::new(format!("{own} heads do not spread over {count}")));
        }
        let x = x.f_reshape([batch, steps, own, depth])?;
        Ok(if own == count { x } else { x.f_repeat_interleave_self_int(count / own, 2, None)? })
    };
    let scale = if scale == 0.0 { 1.0 / (depth as f64).sqrt() } else { scale };
    let query = spread(query, all)?.f_mul_scalar(scale)?;
    let key = spread(key, heads)?;
    let value = value.f_reshape([batch, steps, heads, -1])?;
    let mut state = match args.opt(3) {
        Some(state) => state.shallow_clone(),
        None => Tensor::f_zeros([batch, heads, depth, value.size()[3]], (value.f_kind()?, value.device()))?,
    };
    let decay = match rule.decays {
        true => Some(args.get(4)?.f_reshape([batch, steps, heads, -1, 1])?.f_exp()?),
        false => None,
    };
    let beta = match rule.corrects {
        true => Some(args.get(5)?.f_reshape([batch, steps, -1, 1, 1])?),
        false => None,
    };
    let mut outputs = Vec::new();
    for step in 0..steps {
        let at = |x: &Tensor| x.f_select(1, step);
        if let Some(decay) = &decay {
            state = state.f_mul(&at(decay)?)?;
        }
        let key = at(&key)?.f_unsqueeze(-1)?;
        let mut value = at(&value)?.f_unsqueeze(-2)?;
        if let Some(beta) = &beta {
            value = value.f_sub(&key.f_transpose(-1, -2)?.f_matmul(&state)?)?.f_mul(&at(beta)?)?;
        }
        state = state.f_add(&key.f_matmul(&value)?)?;
        let read = if all == heads {
            state.shallow_clone()
        } else {
            state.f_repeat_interleave_self_int(all / heads, 1, None)?
        };
        outputs.push(at(&query)?.f_unsqueeze(-2)?.f_matmul(&read)?.f_reshape([batch, -1])?);
    }
    let output = match outputs.is_empty() {
        true => Tensor::f_zeros([batch, 0, all * value.size()[3]], (value.f_kind()?, value.device()))?,
        false => Tensor::f_stack(&outputs, 1)?,
    };
    Ok(vec![output, state])
}

/// A depthwise causal convolution over the past and new inputs; also returns the inputs that the next call needs.
///
/// Shapes: x `[B, C, T]`, weight `[C, 1, K]`, bias `[C]`, state `[B, C, (K - 1) * dilation]` ->
/// `[B, C, T]` and the state.
/// Source: ONNX CausalConvWithState-27; ONNX Runtime, com.microsoft CausalConvWithState-1.
fn causal_convolution(b: &mut Build) -> OpResult<Kernel> {
    single_state(b)?;
    let a = b.attributes;
    if a.int("ndim", 1)? != 1 || a.flag("channels_last", false)? {
        return Err(OpError::new("only one spatial axis, behind the channels, is supported"));
    }
    let dilation = a.int("dilation", 1)?;
    if !(1..=LARGEST).contains(&dilation) {
        return Err(OpError::new(format!("attribute `dilation` is {dilation}")));
    }
    let activates = match a.text_or("activation", "none")? {
        "none" => false,
        "silu" | "swish" => true,
        other => return Err(OpError::new(format!("activation `{other}` is not known"))),
    };
    let cast = b.autocast;
    many(move |args| {
        let (x, weight) = (args.get(0)?, args.get(1)?);
        let ((batch, channels, _), (_, _, width)) = (x.size3()?, weight.size3()?);
        let length = (width - 1).max(0) * dilation;
        let past = match args.opt(3) {
            Some(past) => past.f_to_kind(x.f_kind()?)?,
            None => Tensor::f_zeros([batch, channels, length], (x.f_kind()?, x.device()))?,
        };
        let seen = Tensor::f_cat(&[&past, x], 2)?;
        let total = seen.size3()?.2;
        if past.size3()?.2 != length {
            return Err(OpError::new(format!("a state of {} steps, expected {length}", past.size3()?.2)));
        }
        let bias = args.opt(2).map(|bias| lowered(bias, cast)).transpose()?;
        let (left, right) = (lowered(&seen, cast)?, lowered(weight, cast)?);
        let mut out = left.f_conv1d(&right, bias.as_ref(), 1, 0, dilation, channels)?;
        if activates {
            out = out.f_silu()?;
        }
        Ok(vec![out, seen.f_narrow(2, total - length, length)?.f_contiguous()?])
    })
}
