//! Rotary position embeddings.

use tch::{Kind, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, list_on, one};
use crate::torch::operator::{MICROSOFT, Operator};

use super::index::wrap;

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "RotaryEmbedding", 23, |b| rotary(b, Form::Standard)).grad(),
    Operator::new(MICROSOFT, "MRotaryEmbedding", 1, |b| rotary(b, Form::Sections)).grad(),
    Operator::new(MICROSOFT, "RotaryEmbedding", 1, |b| rotary(b, Form::Microsoft)).grad(),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Inputs: X, cos, sin, position_ids (optional; without them the caches are per token).
    Standard,
    /// Inputs: input, position_ids, cos, sin.
    Microsoft,
    /// As `Microsoft`, with positions in time, height and width.
    Sections,
}

/// Rotates the first `2 * R` numbers of each head by the angles of its token: x `[B, S, H, D]`, cos and sin
/// `[B or 1, S, 1, R]`.
///
/// Source: Su et al. 2021, arXiv:2104.09864.
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> OpResult<Tensor> {
    let half = cos.size().last().copied().unwrap_or(0);
    let width = x.size().last().copied().unwrap_or(0);
    if 2 * half > width {
        return Err(OpError::new(format!("caches of width {half} do not fit heads of {width}")));
    }
    let kind = x.f_kind()?;
    let (cos, sin) = (cos.f_to_kind(kind)?, sin.f_to_kind(kind)?);
    let turned = x.f_narrow(-1, 0, 2 * half)?;
    let (real, imaginary) = if interleaved {
        (turned.f_slice(-1, 0, 2 * half, 2)?, turned.f_slice(-1, 1, 2 * half, 2)?)
    } else {
        (turned.f_narrow(-1, 0, half)?, turned.f_narrow(-1, half, half)?)
    };
    let first = real.f_mul(&cos)?.f_sub(&imaginary.f_mul(&sin)?)?;
    let second = real.f_mul(&sin)?.f_add(&imaginary.f_mul(&cos)?)?;
    let turned = if interleaved {
        Tensor::f_stack(&[first, second], -1)?.f_flatten(-2, -1)?
    } else {
        Tensor::f_cat(&[first, second], -1)?
    };
    if 2 * half == width {
        return Ok(turned);
    }
    Ok(Tensor::f_cat(&[turned, x.f_narrow(-1, 2 * half, width - 2 * half)?], -1)?)
}

/// Rows of a cache `[M, R]` by position; the result has the shape of the positions with `R` appended.
pub(super) fn by_position(cache: &Tensor, positions: &Tensor) -> OpResult<Tensor> {
    let (rows, width) = cache.size2()?;
    let index = wrap(positions, rows)?;
    let mut size = index.size();
    size.push(width);
    Ok(cache.f_index_select(0, &index.f_reshape([-1i64])?)?.f_reshape(&size)?)
}

/// Position stream (time, height or width) of each rotated pair.
///
/// Source: Qwen2-VL, arXiv:2409.12191, section 2.1 (sections one after the other); Qwen3-VL (interleaved).
fn streams(sections: &[i64], interleaved_layout: bool) -> Vec<i64> {
    let half: i64 = sections.iter().sum();
    if !interleaved_layout {
        return sections
            .iter()
            .enumerate()
            .flat_map(|(stream, &count)| vec![stream as i64; count.max(0) as usize])
            .collect();
    }
    (0..half)
        .map(|pair| match pair % 3 {
            1 if pair < 3 * sections[1] => 1,
            2 if pair < 3 * sections[2] => 2,
            _ => 0,
        })
        .collect()
}

fn rotary(b: &mut Build, form: Form) -> OpResult<Kernel> {
    let a = b.attributes;
    let interleaved = a.flag("interleaved", false)?;
    let num_heads = a.int("num_heads", 0)?;
    let dim = a.int("rotary_embedding_dim", 0)?;
    if form != Form::Standard {
        // Ragged batches have a shape that is checked below.
        a.ignore("is_packed_batching");
        if a.float("scale", 1.0)? != 1.0 {
            return Err(OpError::new("attribute `scale` other than 1 is not supported"));
        }
    }
    let stream_of_pair = if form == Form::Sections {
        let sections = a.ints("mrope_section")?.ok_or_else(|| OpError::new("attribute `mrope_section` is missing"))?;
        if sections.len() != 3 || sections.iter().any(|&count| !(0..=1 << 20).contains(&count)) {
            return Err(OpError::new(format!("attribute `mrope_section` is {sections:?}, expected three counts")));
        }
        let layout = a.int("mrope_layout", 0)?;
        if layout != 0 && layout != 1 {
            return Err(OpError::new(format!("attribute `mrope_layout` is {layout}, expected 0 or 1")));
        }
        Some(streams(&sections, layout == 1))
    } else {
        None
    };
    one(move |args| {
        let x = args.get(0)?;
        let (positions, cos, sin) = match form {
            Form::Standard => (args.opt(3), args.get(1)?, args.get(2)?),
            _ => (Some(args.get(1)?), args.get(2)?, args.get(3)?),
        };
        let half = cos.size().last().copied().unwrap_or(0);
        if dim != 0 && dim != 2 * half {
            return Err(OpError::new(format!("rotary_embedding_dim is {dim}, the caches have width {half}")));
        }
        let tokens = if x.dim() == 4 {
            x.f_transpose(1, 2)?
        } else {
            let (batch, steps, width) = x.size3()?;
            let heads = if num_heads > 0 { num_heads } else { width / (2 * half).max(1) };
            if heads < 1 || width % heads != 0 {
                return Err(OpError::new(format!("width {width} does not split into {heads} heads")));
            }
            x.f_reshape([batch, steps, heads, width / heads])?
        };
        let (batch, steps) = (tokens.size()[0], tokens.size()[1]);
        let angles = |cache: &Tensor| -> OpResult<Tensor> {
            let rows = match (positions, &stream_of_pair) {
                (None, _) => cache.shallow_clone(),
                (Some(positions), Some(streams)) => {
                    let all = by_position(cache, &positions.f_reshape([3, batch, steps])?)?;
                    if streams.len() as i64 != half {
                        return Err(OpError::new(format!(
                            "mrope_section adds up to {}, the caches have width {half}",
                            streams.len()
                        )));
                    }
                    let index = list_on(streams, all.device())?;
                    all.f_gather(
                        0,
                        &index.f_reshape([1, 1, 1, half])?.f_expand([1, batch, steps, half], false)?,
                        false,
                    )?
                    .f_squeeze_dim(0)?
                }
                (Some(positions), None)
                    if form == Form::Microsoft && positions.numel() == 1 && (batch != 1 || steps != 1) =>
                {
                    // One number is the position of the first token.
                    let offsets = Tensor::f_arange(steps, (Kind::Int64, positions.device()))?;
                    by_position(cache, &offsets.f_add(&positions.f_reshape([1i64])?)?.f_unsqueeze(0)?)?
                }
                (Some(positions), None) => by_position(cache, &positions.f_reshape([batch, steps])?)?,
            };
            Ok(rows.f_unsqueeze(2)?)
        };
        let out = rotate(&tokens, &angles(cos)?, &angles(sin)?, interleaved)?;
        if x.dim() == 4 { Ok(out.f_transpose(1, 2)?) } else { Ok(out.f_reshape(x.size())?) }
    })
}
