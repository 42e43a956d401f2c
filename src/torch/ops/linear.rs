//! Matrix products.

use tch::Tensor;

use crate::torch::kernel::{Args, Build, Kernel, OpError, OpResult, is_float, one};
use crate::torch::operator::{MICROSOFT, Operator};
use crate::torch::products::{lowered, product};

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Einsum", 12, einsum).grad().lowers(),
    Operator::new("", "Gemm", 7, |b| gemm(b, false)).grad().lowers(),
    Operator::new("", "MatMul", 1, |b| {
        let cast = b.autocast;
        one(move |args| product(args.get(0)?, args.get(1)?, cast))
    })
    .grad()
    .lowers(),
    Operator::new(MICROSOFT, "FusedGemm", 1, |b| gemm(b, true)).grad().lowers(),
    Operator::new(MICROSOFT, "FusedMatMul", 1, fused_matmul).grad().lowers(),
];

fn einsum(b: &mut Build) -> OpResult<Kernel> {
    let equation = b.attributes.text("equation")?.ok_or_else(|| OpError::new("attribute `equation` is missing"))?;
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let cast = b.autocast;
    one(move |args| {
        let operands: Vec<Tensor> = args.all().map(|x| lowered(x, cast)).collect::<OpResult<_>>()?;
        Ok(Tensor::f_einsum(&equation, &operands, None::<&[i64]>)?)
    })
}

/// alpha * A' * B' + beta * C, with C broadcast to the product; the fused form adds an activation.
fn gemm(b: &mut Build, fused: bool) -> OpResult<Kernel> {
    let (alpha, beta) = (b.attributes.float("alpha", 1.0)?, b.attributes.float("beta", 1.0)?);
    let (left, right) = (b.attributes.flag("transA", false)?, b.attributes.flag("transB", false)?);
    let activation = if fused { activation(b)? } else { None };
    let cast = b.autocast;
    one(move |args| {
        let turn = |x: &Tensor, on: bool| -> OpResult<Tensor> {
            Ok(if on { x.f_transpose(0, 1)? } else { x.shallow_clone() })
        };
        let (a, w) = (lowered(args.get(0)?, cast)?, lowered(args.get(1)?, cast)?);
        if a.dim() != 2 || w.dim() != 2 {
            return Err(OpError::new("the operands are not matrices"));
        }
        let (a, w) = (turn(&a, left)?, turn(&w, right)?);
        let mut out = match args.opt(2) {
            Some(c) if alpha == 1.0 && beta == 1.0 && is_float(a.f_kind()?) => lowered(c, cast)?.f_addmm(&a, &w)?,
            c => {
                let mut out = a.f_mm(&w)?;
                if alpha != 1.0 {
                    out = out.f_mul_scalar(alpha)?;
                }
                match c {
                    Some(c) => out.f_add(&c.f_mul_scalar(beta)?)?,
                    None => out,
                }
            }
        };
        if let Some(activation) = activation {
            out = activation(&out)?;
        }
        Ok(out)
    })
}

type Activation = fn(&Tensor) -> Result<Tensor, tch::TchError>;

fn activation(b: &Build) -> OpResult<Option<Activation>> {
    Ok(match b.attributes.text_or("activation", "")? {
        "" => None,
        "Relu" => Some(|x| x.f_relu()),
        "Sigmoid" => Some(|x| x.f_sigmoid()),
        "Tanh" => Some(|x| x.f_tanh()),
        other => return Err(OpError::new(format!("activation `{other}` is not supported"))),
    })
}

/// alpha * A' * B'; `transBatchA` moves the first axis of A before its last one, then `transA` swaps the last two.
fn fused_matmul(b: &mut Build) -> OpResult<Kernel> {
    let alpha = b.attributes.float("alpha", 1.0)?;
    let (left, right) = (b.attributes.flag("transA", false)?, b.attributes.flag("transB", false)?);
    let (batch_left, batch_right) =
        (b.attributes.flag("transBatchA", false)?, b.attributes.flag("transBatchB", false)?);
    let cast = b.autocast;
    one(move |args: &Args| {
        let turn = |x: &Tensor, matrix: bool, batch: bool| -> OpResult<Tensor> {
            let mut out = x.shallow_clone();
            let rank = x.dim() as i64;
            if batch && rank > 2 {
                let mut order: Vec<i64> = (1..rank - 1).collect();
                order.extend([0, rank - 1]);
                out = out.f_permute(&order)?;
            }
            if matrix && rank > 1 {
                out = out.f_transpose(-2, -1)?;
            }
            Ok(out)
        };
        let a = turn(args.get(0)?, left, batch_left)?;
        let w = turn(args.get(1)?, right, batch_right)?;
        let out = product(&a, &w, cast)?;
        Ok(if alpha == 1.0 { out } else { out.f_mul_scalar(alpha)? })
    })
}
