//! Comparison, boolean and bitwise operators, and selection.

use tch::Kind;

use crate::torch::kernel::{Build, Kernel, OpError, OpResult, one};
use crate::torch::operator::Operator;

use super::elementwise::{binary, unary};

pub(super) const ROWS: &[Operator] = &[
    Operator::new("", "And", 7, |_| binary(|a, b| a.f_logical_and(b))),
    Operator::new("", "BitShift", 11, bit_shift),
    Operator::new("", "BitwiseAnd", 18, |_| binary(|a, b| a.f_bitwise_and_tensor(b))),
    Operator::new("", "BitwiseNot", 18, |_| unary(|x| x.f_bitwise_not())),
    Operator::new("", "BitwiseOr", 18, |_| binary(|a, b| a.f_bitwise_or_tensor(b))),
    Operator::new("", "BitwiseXor", 18, |_| binary(|a, b| a.f_bitwise_xor_tensor(b))),
    Operator::new("", "Equal", 7, |_| binary(|a, b| a.f_eq_tensor(b))),
    Operator::new("", "Greater", 7, |_| binary(|a, b| a.f_gt_tensor(b))),
    Operator::new("", "GreaterOrEqual", 12, |_| binary(|a, b| a.f_ge_tensor(b))),
    Operator::new("", "IsInf", 10, is_inf),
    Operator::new("", "IsNaN", 9, |_| unary(|x| x.f_isnan())),
    Operator::new("", "Less", 7, |_| binary(|a, b| a.f_lt_tensor(b))),
    Operator::new("", "LessOrEqual", 12, |_| binary(|a, b| a.f_le_tensor(b))),
    Operator::new("", "Not", 1, |_| unary(|x| x.f_logical_not())),
    Operator::new("", "Or", 7, |_| binary(|a, b| a.f_logical_or(b))),
    Operator::new("", "Where", 9, |_| {
        one(|args| {
            let condition = args.get(0)?;
            if condition.f_kind()? != Kind::Bool {
                return Err(OpError::new("the condition is not boolean"));
            }
            Ok(args.get(1)?.f_where_self(condition, args.get(2)?)?)
        })
    })
    .grad(),
    Operator::new("", "Xor", 7, |_| binary(|a, b| a.f_logical_xor(b))),
];

fn is_inf(b: &mut Build) -> OpResult<Kernel> {
    let negative = b.attributes.flag("detect_negative", true)?;
    let positive = b.attributes.flag("detect_positive", true)?;
    one(move |args| {
        let x = args.get(0)?;
        Ok(match (negative, positive) {
            (true, true) => x.f_isinf()?,
            (true, false) => x.f_eq(f64::NEG_INFINITY)?,
            (false, true) => x.f_eq(f64::INFINITY)?,
            (false, false) => x.f_isinf()?.f_zeros_like()?,
        })
    })
}

/// ONNX allows unsigned operands only; LibTorch has no kind for those wider than 8 bits.
fn bit_shift(b: &mut Build) -> OpResult<Kernel> {
    let left = match b.attributes.text("direction")? {
        Some("LEFT") => true,
        Some("RIGHT") => false,
        other => return Err(OpError::new(format!("attribute `direction` is {other:?}, expected LEFT or RIGHT"))),
    };
    one(move |args| {
        let (x, by) = (args.get(0)?, args.get(1)?);
        let kind = x.f_kind()?;
        if kind != Kind::Uint8 {
            return Err(OpError::new(format!("{kind:?} operands, expected unsigned integers")));
        }
        let (wide, by) = (x.f_to_kind(Kind::Int64)?, by.f_to_kind(Kind::Int64)?);
        let shifted = if left { wide.f_bitwise_left_shift(&by)? } else { wide.f_bitwise_right_shift(&by)? };
        Ok(shifted.f_bitwise_and(255)?.f_to_kind(kind)?)
    })
}
