//! ONNX Runtime's mixture of experts.

use tch::Tensor;

use crate::torch::kernel::{Args, Build, Kernel, LARGEST, OpError, OpResult, one};
use crate::torch::table::Row;

use super::MICROSOFT;
use super::linear::product;

pub(super) const ROWS: &[Row] = &[Row::new(MICROSOFT, "MoE", 1, mixture).grad()];

/// What an expert does between its two products.
#[derive(Clone, Copy)]
enum Activation {
    Relu,
    Gelu,
    Silu,
    Identity,
    /// `G * sigmoid(alpha * G) * (L + beta)` of a gate G and a linear part L, both clamped.
    SwiGlu(Layout),
}

/// Where SwiGLU's two parts stand.
#[derive(Clone, Copy)]
enum Layout {
    /// The linear part is computed by a third weight.
    Apart,
    /// Numbers in turn: gate, linear, gate, ...
    Interleaved,
    /// First all of the gate, then all of the linear part.
    Halves,
}

struct Settings {
    chosen: i64,
    normalise: bool,
    activation: Activation,
    alpha: f64,
    beta: f64,
    limit: Option<f64>,
    cast: Option<tch::Kind>,
}

/// Each token goes through the `k` experts with the highest softmax of its router logits, weighted by it.
///
/// Inputs: x `[.., D]`, router logits `[N, E]`, the experts' weights `[E, F, D]`, `[E, D, I]` and optional `[E, I, D]`, each
/// followed by its optional bias -> `[.., D]`. With fused SwiGLU F is 2 I. Without it the third weight's product is a
/// factor of the activated first one.
/// Source: ONNX Runtime, com.microsoft MoE-1.
fn mixture(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    if a.flag("use_sparse_mixer", false)? {
        return Err(OpError::new("attribute `use_sparse_mixer` is not supported"));
    }
    let fusion = a.int("swiglu_fusion", 0)?;
    let activation = match a.text_or("activation_type", "relu")? {
        "relu" => Activation::Relu,
        "gelu" => Activation::Gelu,
        "silu" => Activation::Silu,
        "identity" => Activation::Identity,
        "swiglu" => Activation::SwiGlu(match (fusion, b.has(6)) {
            (0, true) => Layout::Apart,
            // Written before the attribute was there: ONNX Runtime takes it as interleaved too.
            (0 | 1, false) => Layout::Interleaved,
            (2, false) => Layout::Halves,
            _ => return Err(OpError::new(format!("`swiglu_fusion` is {fusion} with a third weight"))),
        }),
        other => return Err(OpError::new(format!("activation_type `{other}` is not known"))),
    };
    let chosen = a.int("k", 1)?;
    if !(1..=LARGEST).contains(&chosen) {
        return Err(OpError::new(format!("attribute `k` is {chosen}")));
    }
    let settings = Settings {
        chosen,
        normalise: a.flag("normalize_routing_weights", false)?,
        activation,
        alpha: a.float("activation_alpha", 1.0)?,
        beta: a.float("activation_beta", 0.0)?,
        limit: a.float_opt("swiglu_limit")?,
        cast: b.autocast,
    };
    one(move |args| run(args, &settings))
}

fn run(args: &Args, s: &Settings) -> OpResult<Tensor> {
    let (x, router) = (args.get(0)?, args.get(1)?);
    let size = x.size();
    let width = size.last().copied().unwrap_or(1);
    let tokens = x.f_reshape([-1, width])?;
    let (rows, experts) = router.size2()?;
    if rows != tokens.size2()?.0 || s.chosen > experts {
        return Err(OpError::new(format!(
            "{} of {experts} experts for {rows} tokens of {} are asked for",
            s.chosen,
            tokens.size2()?.0
        )));
    }
    let shares = router.f_softmax(-1, None)?;
    let (mut shares, picked) = shares.f_topk(s.chosen, -1, true, true)?;
    if s.normalise {
        shares = shares.f_div(&shares.f_sum_dim_intlist(&[-1i64][..], true, None)?)?;
    }
    let shares = shares.f_to_kind(x.f_kind()?)?.f_reshape([-1])?;
    let mut out = Tensor::f_zeros([rows, width], (x.f_kind()?, x.device()))?;
    for expert in 0..experts {
        let places = picked.f_eq(expert)?.f_reshape([-1])?.f_nonzero()?.f_reshape([-1])?;
        if places.numel() == 0 {
            continue;
        }
        let token = places.f_floor_divide_scalar(s.chosen)?;
        let made = through(args, s, &tokens.f_index_select(0, &token)?, expert)?;
        let made = made.f_mul(&shares.f_index_select(0, &places)?.f_unsqueeze(-1)?)?;
        out = out.f_index_add(0, &token, &made)?;
    }
    Ok(out.f_reshape(&size)?)
}

/// One expert: `[n, D]` -> `[n, D]`.
fn through(args: &Args, s: &Settings, x: &Tensor, expert: i64) -> OpResult<Tensor> {
    let linear = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| -> OpResult<Tensor> {
        let out = product(x, &weight.f_select(0, expert)?.f_transpose(0, 1)?, s.cast)?;
        Ok(match bias {
            Some(bias) => out.f_add(&bias.f_select(0, expert)?)?,
            None => out,
        })
    };
    let first = linear(x, args.get(2)?, args.opt(3))?;
    let third = args.opt(6).map(|weight| linear(x, weight, args.opt(7))).transpose()?;
    let plain = match s.activation {
        Activation::Relu => first.f_relu()?,
        // The tanh form, as ONNX Runtime computes it here.
        Activation::Gelu => first.f_gelu("tanh")?,
        Activation::Silu => first.f_silu()?,
        Activation::Identity => first,
        Activation::SwiGlu(layout) => {
            let (gate, other) = match (layout, &third) {
                (Layout::Apart, Some(third)) => (first, third.shallow_clone()),
                (Layout::Apart, None) => return Err(OpError::new("input 6 is missing")),
                (Layout::Interleaved, _) => {
                    let pairs = first.f_reshape([first.size2()?.0, -1, 2])?;
                    (pairs.f_select(2, 0)?, pairs.f_select(2, 1)?)
                }
                (Layout::Halves, _) => {
                    let half = first.size2()?.1 / 2;
                    (first.f_narrow(1, 0, half)?, first.f_narrow(1, half, half)?)
                }
            };
            let (gate, other) = match s.limit {
                Some(limit) => (gate.f_clamp_max(limit)?, other.f_clamp(-limit, limit)?),
                None => (gate, other),
            };
            let made = gate.f_mul(&gate.f_mul_scalar(s.alpha)?.f_sigmoid()?)?.f_mul(&other.f_add_scalar(s.beta)?)?;
            return linear(&made, args.get(4)?, args.opt(5));
        }
    };
    let made = match third {
        Some(third) => plain.f_mul(&third)?,
        None => plain,
    };
    linear(&made, args.get(4)?, args.opt(5))
}
