//! Kernels of the fused nodes that `rewrite::fuse_kernels` creates.

use tch::Tensor;

use crate::rewrite::{FUSED_ATTENTION, FUSED_SILU, INTERNAL_DOMAIN};
use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, one};
use crate::torch::operator::Operator;
use crate::torch::products::product;

use super::attention::{Spec, attend};

pub(super) const ROWS: &[Operator] = &[
    Operator::new(INTERNAL_DOMAIN, FUSED_ATTENTION, 1, attention).host(0b1111_0000).grad(),
    Operator::new(INTERNAL_DOMAIN, FUSED_SILU, 1, |_| one(|args| Ok(args.get(0)?.f_silu()?))).grad(),
];

/// LibTorch's kernel does not store the scores, so memory grows linearly with the length, not quadratically. On a CPU
/// it takes as long as separate products (one thread of an EPYC, 16 samples, forward and backward: 2.9 ms and 3.3 ms at
/// 64 tokens, 437 ms and 438 ms at 512), with and without a mask, and reads grouped heads without repeating them.
fn attention(b: &mut Build) -> OpResult<Kernel> {
    let scale = b.attributes.float("scale", 1.0)?;
    let transposed = b.attributes.flag("transposed", false)?;
    let grouped = b.has(4);
    let cast = b.autocast;
    one(move |args| {
        let (q, k, v) = (args.get(0)?, args.get(1)?, args.get(2)?);
        let k = if transposed { k.f_transpose(-2, -1)? } else { k.shallow_clone() };
        if grouped {
            let heads = q.size4()?.1;
            check_repeat(args, &k, 4, heads)?;
            check_repeat(args, v, 6, heads)?;
        }
        let mask = args.opt(3);
        if [q, &k, v].iter().any(|x| x.dim() != 4) {
            let mut scores = product(q, &k.f_transpose(-2, -1)?, cast)?.f_mul_scalar(scale)?;
            if let Some(mask) = mask {
                scores = scores.f_add(mask)?;
            }
            return product(&scores.f_softmax(-1, None)?, v, cast);
        }
        let spec = Spec { scale, mask: mask.map(Tensor::shallow_clone), cast, ..Spec::default() };
        Ok(attend(q, &k, v, &spec)?.0)
    })
}

/// Rejects shapes (inputs `first` and `first + 1`) that do anything else than repeat each head of `x` in place until
/// there are `heads`.
fn check_repeat(args: &Args, x: &Tensor, first: usize, heads: i64) -> OpResult<()> {
    let (batch, groups, steps, width) = x.size4()?;
    let (expand, reshape) = (args.ints_required(first)?, args.ints_required(first + 1)?);
    let copies = heads / groups.max(1);
    let fits = |own: &[i64], want: &[i64], open: &[i64]| {
        own.len() == want.len() && own.iter().zip(want).all(|(own, want)| own == want || open.contains(own))
    };
    // In an expansion, 1 leaves an axis unchanged. In a reshape, -1 is the remaining size and 0 copies the input's
    // axis, which is valid for the first axes.
    let expanded = fits(&expand, &[batch, groups, copies, steps, width], &[1]) && expand.get(2) == Some(&copies);
    let reshaped = fits(&reshape, &[batch, heads, steps, width], &[-1])
        || reshape.first() == Some(&0) && fits(&reshape[1..], &[heads, steps, width], &[-1]);
    if expanded && reshaped && copies * groups == heads {
        return Ok(());
    }
    Err(OpError::new(format!("heads {:?} are expanded to {expand:?} and reshaped to {reshape:?}", x.size())))
}
