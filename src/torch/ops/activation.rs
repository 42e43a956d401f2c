//! Activation functions and softmax.

use tch::{TchError, Tensor};

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, axis_of, one};
use crate::torch::operator::{MICROSOFT, Operator};

type Unary = fn(&Tensor) -> Result<Tensor, TchError>;

fn unary(f: Unary) -> OpResult<Kernel> {
    one(move |args| Ok(f(args.get(0)?)?))
}

/// x * sigmoid(alpha * x).
fn swish(alpha: f64) -> OpResult<Kernel> {
    one(move |args| {
        let x = args.get(0)?;
        if alpha == 1.0 {
            return Ok(x.f_silu()?);
        }
        Ok(x.f_mul(&x.f_mul_scalar(alpha)?.f_sigmoid()?)?)
    })
}

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "Celu", 12, |b| {
        let alpha = b.attributes.float("alpha", 1.0)?;
        one(move |args| {
            let x = args.get(0)?;
            let negative = x.f_div_scalar(alpha)?.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(alpha)?;
            Ok(x.f_relu()?.f_add(&negative)?)
        })
    })
    .grad(),
    Operator::new("", "Elu", 6, |b| {
        let alpha = b.attributes.float("alpha", 1.0)?;
        one(move |args| {
            let x = args.get(0)?;
            Ok(x.f_relu()?.f_add(&x.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(alpha)?)?)
        })
    })
    .grad(),
    Operator::new("", "Gelu", 20, |b| {
        let approximate = match b.attributes.text_or("approximate", "none")? {
            "none" => "none",
            "tanh" => "tanh",
            other => return Err(OpError::new(format!("attribute `approximate` is `{other}`, expected none or tanh"))),
        };
        one(move |args| Ok(args.get(0)?.f_gelu(approximate)?))
    })
    .grad(),
    Operator::new("", "HardSigmoid", 6, |b| {
        let (alpha, beta) = (b.attributes.float("alpha", 0.2)?, b.attributes.float("beta", 0.5)?);
        one(move |args| Ok(args.get(0)?.f_mul_scalar(alpha)?.f_add_scalar(beta)?.f_clamp(0.0, 1.0)?))
    })
    .grad(),
    Operator::new("", "HardSwish", 14, |_| unary(|x| x.f_hardswish())).grad(),
    Operator::new("", "LeakyRelu", 6, |b| {
        let alpha = b.attributes.float("alpha", 0.01)?;
        one(move |args| {
            let x = args.get(0)?;
            Ok(x.f_relu()?.f_add(&x.f_clamp_max(0.0)?.f_mul_scalar(alpha)?)?)
        })
    })
    .grad(),
    Operator::new("", "LogSoftmax", 1, |b| softmax(b, |x, axis| x.f_log_softmax(axis, None))).grad(),
    Operator::new("", "Mish", 18, |_| unary(|x| x.f_mish())).grad(),
    Operator::new("", "PRelu", 7, |_| {
        one(|args| {
            let x = args.get(0)?;
            Ok(x.f_relu()?.f_add(&x.f_clamp_max(0.0)?.f_mul(args.get(1)?)?)?)
        })
    })
    .grad(),
    Operator::new("", "Relu", 6, |_| unary(|x| x.f_relu())).grad(),
    Operator::new("", "Selu", 6, |b| {
        let alpha = b.attributes.float("alpha", 1.673_263_2)?;
        let gamma = b.attributes.float("gamma", 1.050_701)?;
        one(move |args| {
            let x = args.get(0)?;
            let negative = x.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(alpha)?;
            Ok(x.f_relu()?.f_add(&negative)?.f_mul_scalar(gamma)?)
        })
    })
    .grad(),
    Operator::new("", "Sigmoid", 6, |_| unary(|x| x.f_sigmoid())).grad(),
    Operator::new("", "Softmax", 1, |b| softmax(b, |x, axis| x.f_softmax(axis, None))).grad(),
    Operator::new("", "Softplus", 1, |_| unary(|x| x.f_softplus())).grad(),
    Operator::new("", "Softsign", 1, |_| unary(|x| x.f_div(&x.f_abs()?.f_add_scalar(1.0)?))).grad(),
    Operator::new("", "Swish", 24, |b| swish(b.attributes.float("alpha", 1.0)?)).grad(),
    Operator::new("", "Tanh", 6, |_| unary(|x| x.f_tanh())).grad(),
    Operator::new("", "ThresholdedRelu", 10, |b| {
        let alpha = b.attributes.float("alpha", 1.0)?;
        one(move |args| {
            let x = args.get(0)?;
            Ok(x.f_mul(&x.f_gt(alpha)?.f_to_kind(x.f_kind()?)?)?)
        })
    })
    .grad(),
    Operator::new(MICROSOFT, "BiasGelu", 1, |_| one(|args| Ok(args.get(0)?.f_add(args.get(1)?)?.f_gelu("none")?)))
        .grad(),
    Operator::new(MICROSOFT, "FastGelu", 1, |_| {
        one(|args| {
            let x = args.get(0)?;
            match args.opt(1) {
                Some(bias) => Ok(x.f_add(bias)?.f_gelu("tanh")?),
                None => Ok(x.f_gelu("tanh")?),
            }
        })
    })
    .grad(),
    Operator::new(MICROSOFT, "Gelu", 1, |_| unary(|x| x.f_gelu("none"))).grad(),
    Operator::new(MICROSOFT, "QuickGelu", 1, |b| swish(b.attributes.float("alpha", 1.702)?)).grad(),
];

/// Since version 13 over one axis (default: the last); before, over the flattened axes from `axis` on (default: 1).
fn softmax(b: &mut Build, f: fn(&Tensor, i64) -> Result<Tensor, TchError>) -> OpResult<Kernel> {
    if b.version >= 13 {
        let axis = b.attributes.int("axis", -1)?;
        return one(move |args| {
            let x = args.get(0)?;
            Ok(f(x, axis_of(axis, x.dim())?)?)
        });
    }
    let axis = b.attributes.int("axis", 1)?;
    one(move |args| {
        let x = args.get(0)?;
        let size = x.size();
        let axis = axis_of(axis, x.dim())? as usize;
        let rows: i64 = size[..axis].iter().product();
        let columns: i64 = size[axis..].iter().product();
        let flat = x.f_reshape([rows, columns])?;
        Ok(f(&flat, 1)?.f_reshape(&size)?)
    })
}
