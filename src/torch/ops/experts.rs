//! ONNX Runtime's mixture of experts, with float and with quantised weights.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Args, Build, Kernel, LARGEST, OpError, OpResult, one, own_ints};
use crate::torch::operator::{MICROSOFT, Operator};
use crate::torch::products::product;

use super::quantized::unpack;

pub(super) const ROWS: &[Operator] = &[
    Operator::new(MICROSOFT, "MoE", 1, mixture).waits().grad(),
    Operator::new(MICROSOFT, "QMoE", 1, quantised_mixture).waits(),
];

/// Activation of an expert between its products.
#[derive(Clone, Copy)]
enum Activation {
    Relu,
    Gelu,
    Silu,
    Identity,
    /// `G * sigmoid(alpha * G) * (L + beta)` of a gate G and a linear part L, both clamped.
    SwiGlu(Layout),
}

/// Order of SwiGLU's two parts in the first product's output.
#[derive(Clone, Copy)]
enum Layout {
    /// A third weight computes the linear part.
    Apart,
    /// Alternating: gate, linear, gate, ...
    Interleaved,
    /// The whole gate first, then the whole linear part.
    Halves,
}

struct ExpertSettings {
    /// Number of experts per token.
    chosen: i64,
    /// True when the shares of the selected experts are scaled to a sum of 1.
    normalise: bool,
    activation: Activation,
    alpha: f64,
    beta: f64,
    /// Limit of SwiGLU's two parts before they are multiplied.
    limit: Option<f64>,
    /// Element type of the products when it differs from that of their operands.
    cast: Option<Kind>,
    quantised: Option<Quantised>,
}

/// Storage of quantised expert weights.
#[derive(Clone, Copy)]
struct Quantised {
    bits: i64,
    /// Elements along the input axis that share a scale; `None`: the whole axis shares one.
    block: Option<i64>,
}

/// The products of an expert; their inputs follow each other in this order.
#[derive(Clone, Copy)]
enum ExpertProduct {
    First = 0,
    Second = 1,
    Third = 2,
}

/// Each token is processed by the `k` experts with the largest softmax of the router logits; the
/// softmax weights their sum.
///
/// Inputs: x `[.., D]`, router logits `[N, E]`, the experts' weights `[E, F, D]`, `[E, D, I]` and optional
/// `[E, I, D]`, each followed by its optional bias -> `[.., D]`. With fused SwiGLU F is 2 I. Otherwise the
/// activated first product is multiplied with the third one.
/// Source: ONNX Runtime, com.microsoft MoE-1.
fn mixture(b: &mut Build) -> OpResult<Kernel> {
    let settings = settings(b, b.has(6), None)?;
    one(move |args| run(args, &settings))
}

/// The same with weights of 2, 4 or 8 bits, packed along the input axis, low bits first.
///
/// Inputs: x, router logits, for each of the three products its weight `[E, N, K * bits / 8]`, scales `[E, N]` or
/// `[E, N, K / block]` and optional bias `[E, N]`; their zero points `[E, N * bits / 8]` or
/// `[E, N, K / block * bits / 8]`, by default 2^(bits - 1); and separate weights for the mixing of the selected experts
/// (optional). A weight is `(number - zero point) * scale`. Layouts that only one provider supports are rejected when
/// the file names them; when the file leaves the layout to the provider, the layout of the CPU provider is used.
/// Source: ONNX Runtime, com.microsoft QMoE-1.
fn quantised_mixture(b: &mut Build) -> OpResult<Kernel> {
    let a = b.attributes;
    let kind = a.text_or("quant_type", "int")?;
    if kind != "int" {
        return Err(OpError::new(format!("quant_type `{kind}` is not supported")));
    }
    if a.int("weights_prepacked", -1)? == 1 {
        return Err(OpError::new("prepacked weights are not supported"));
    }
    if let Some(input) = (15..b.inputs.len()).find(|&input| b.has(input)) {
        return Err(OpError::new(format!("input {input} is not supported")));
    }
    let bits = a.int("expert_weight_bits", 4)?;
    let block = a.int_opt("block_size")?.filter(|block| *block != 0);
    if ![2, 4, 8].contains(&bits) || block.is_some_and(|block| !(1..=LARGEST).contains(&block)) {
        return Err(OpError::new(format!("{bits} bits in blocks of {} are not supported", block.unwrap_or(0))));
    }
    let settings = settings(b, b.has(8), Some(Quantised { bits, block }))?;
    one(move |args| run(args, &settings))
}

fn settings(b: &Build, third: bool, quantised: Option<Quantised>) -> OpResult<ExpertSettings> {
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
        "swiglu" => Activation::SwiGlu(match (fusion, third) {
            (0, true) => Layout::Apart,
            // Files from before this attribute: ONNX Runtime also reads them as interleaved.
            (0 | 1, false) => Layout::Interleaved,
            (2, false) => Layout::Halves,
            _ => {
                let third = if third { "with" } else { "without" };
                return Err(OpError::new(format!("`swiglu_fusion` is {fusion} {third} a third weight")));
            }
        }),
        other => return Err(OpError::new(format!("activation_type `{other}` is not known"))),
    };
    let chosen = a.int("k", 1)?;
    if !(1..=LARGEST).contains(&chosen) {
        return Err(OpError::new(format!("attribute `k` is {chosen}")));
    }
    Ok(ExpertSettings {
        chosen,
        normalise: a.flag("normalize_routing_weights", false)?,
        activation,
        alpha: a.float("activation_alpha", 1.0)?,
        beta: a.float("activation_beta", 0.0)?,
        limit: a.float_opt("swiglu_limit")?,
        cast: b.autocast,
        quantised,
    })
}

/// The whole operator: `[.., D]` -> `[.., D]`.
fn run(args: &Args, s: &ExpertSettings) -> OpResult<Tensor> {
    let (x, router) = (args.get(0)?, args.get(1)?);
    let size = x.size();
    let width = size.last().copied().unwrap_or(1);
    let tokens = x.f_reshape([-1, width])?;
    let (rows, experts) = router.size2()?;
    let count = tokens.size2()?.0;
    if rows != count || s.chosen > experts {
        return Err(OpError::new(format!(
            "router logits of shape [{rows}, {experts}] do not fit {count} tokens with {} experts each",
            s.chosen
        )));
    }
    // Among experts with equal logits ONNX Runtime selects the last ones.
    let (_, order) = router.f_flip([-1i64])?.f_sort_stable(true, -1, true)?;
    let picked = order.f_narrow(-1, 0, s.chosen)?.f_neg()?.f_add_scalar(experts - 1)?;
    let mixing = if s.quantised.is_some() { args.opt(14) } else { None };
    let mut shares = match mixing {
        Some(mixing) => mixing.f_gather(-1, &picked, false)?,
        None => router.f_softmax(-1, None)?.f_gather(-1, &picked, false)?,
    };
    // ONNX Runtime's quantised form computes the softmax over the selected experts only, regardless of the attribute.
    if s.normalise || s.quantised.is_some() && mixing.is_none() {
        shares = shares.f_div(&shares.f_sum_dim_intlist(&[-1i64][..], true, None)?)?;
    }
    let shares = shares.f_to_kind(x.f_kind()?)?.f_reshape([-1])?;
    let mut out = Tensor::f_zeros([rows, width], (x.f_kind()?, x.device()))?;
    // Sorted by expert, so that one read on the host says how many rows each expert has. `bincount` would read twice more:
    // the least and the largest number.
    let picked = picked.f_reshape([-1])?;
    let counts = Tensor::f_zeros([experts], (Kind::Int64, x.device()))?;
    let counts = own_ints(&counts.f_scatter_add(0, &picked, &picked.f_ones_like()?)?)?;
    let (_, sorted) = picked.f_sort_stable(true, 0, false)?;
    let mut start = 0;
    for (expert, count) in (0..experts).zip(counts) {
        let places = sorted.f_narrow(0, start, count)?;
        start += count;
        if count == 0 {
            continue;
        }
        let token = places.f_floor_divide_scalar(s.chosen)?;
        let made = one_expert(args, s, &tokens.f_index_select(0, &token)?, expert)?;
        let made = made.f_mul(&shares.f_index_select(0, &places)?.f_unsqueeze(-1)?)?;
        out = out.f_index_add(0, &token, &made)?;
    }
    Ok(out.f_reshape(&size)?)
}

/// One product of an expert with its bias: `[n, K]` -> `[n, N]`; `None` when the weight is omitted.
fn linear(args: &Args, s: &ExpertSettings, x: &Tensor, which: ExpertProduct, expert: i64) -> OpResult<Option<Tensor>> {
    let place = which as usize;
    let (weight, bias) = match s.quantised {
        None => (args.opt(2 + 2 * place), args.opt(3 + 2 * place)),
        Some(_) => (args.opt(2 + 3 * place), args.opt(4 + 3 * place)),
    };
    let Some(weight) = weight else { return Ok(None) };
    let mut weight = weight.f_select(0, expert)?;
    if let Some(quantised) = s.quantised {
        let scales = args.get(3 + 3 * place)?.f_select(0, expert)?;
        let zero = args.opt(11 + place).map(|zero| zero.f_select(0, expert)).transpose()?;
        weight = dequantised(&weight, &scales, zero.as_ref(), quantised, x.f_kind()?)?;
    }
    let out = product(x, &weight.f_transpose(0, 1)?, s.cast)?;
    Ok(Some(match bias {
        Some(bias) => out.f_add(&bias.f_select(0, expert)?)?,
        None => out,
    }))
}

/// Dequantises a packed weight: `[N, K * bits / 8]` -> `[N, K]`.
fn dequantised(packed: &Tensor, scales: &Tensor, zero: Option<&Tensor>, q: Quantised, kind: Kind) -> OpResult<Tensor> {
    let numbers = unpack(packed, q.bits)?;
    let (rows, columns) = numbers.size2()?;
    let block = q.block.unwrap_or(columns.max(1));
    if columns % block != 0 || scales.numel() as i64 != rows * (columns / block) {
        return Err(OpError::new(format!(
            "scales of shape {:?} do not fit a weight of [{rows}, {columns}] in blocks of {block}",
            scales.size()
        )));
    }
    let blocks = columns / block;
    let numbers = numbers.f_to_kind(kind)?.f_reshape([rows, blocks, block])?;
    let centred = match zero {
        None => numbers.f_sub_scalar((1i64 << (q.bits - 1)) as f64)?,
        Some(zero) => {
            // Packed along the last axis: over the blocks of a row, or over the rows when a row has one scale.
            let zero = unpack(zero, q.bits)?;
            let zero = if q.block.is_some() { zero.f_narrow(1, 0, blocks)? } else { zero.f_narrow(0, 0, rows)? };
            numbers.f_sub(&zero.f_reshape([rows, blocks, 1])?.f_to_kind(kind)?)?
        }
    };
    let scales = scales.f_to_kind(kind)?.f_reshape([rows, blocks, 1])?;
    Ok(centred.f_mul(&scales)?.f_reshape([rows, columns])?)
}

/// One expert: `[n, D]` -> `[n, D]`.
fn one_expert(args: &Args, s: &ExpertSettings, x: &Tensor, expert: i64) -> OpResult<Tensor> {
    let first =
        linear(args, s, x, ExpertProduct::First, expert)?.ok_or_else(|| OpError::new("the first weight is missing"))?;
    let third = linear(args, s, x, ExpertProduct::Third, expert)?;
    let second = |made: &Tensor| {
        linear(args, s, made, ExpertProduct::Second, expert)?
            .ok_or_else(|| OpError::new("the second weight is missing"))
    };
    let plain = match s.activation {
        Activation::Relu => first.f_relu()?,
        // ONNX Runtime uses the tanh approximation here.
        Activation::Gelu => first.f_gelu("tanh")?,
        Activation::Silu => first.f_silu()?,
        Activation::Identity => first,
        Activation::SwiGlu(layout) => {
            let (gate, other) = match (layout, &third) {
                (Layout::Apart, Some(third)) => (first, third.shallow_clone()),
                (Layout::Apart, None) => return Err(OpError::new("the third weight is missing")),
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
            return second(&made);
        }
    };
    let made = match third {
        Some(third) => plain.f_mul(&third)?,
        None => plain,
    };
    second(&made)
}
