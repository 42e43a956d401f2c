//! Activations, and a product with transposed operands.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use crate::base::Result;
use crate::ir::Node;

use super::site::{Site, float, int, optional};

/// `x * sigmoid(alpha * x)`.
pub(super) fn quick_gelu(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["alpha"], 1)?;
    let (x, output) = (site.input(node, 0)?, site.output(node)?);
    let alpha = site.float_like(float(node, "alpha", 1.702), x);
    let scaled = site.op("Mul", &[x, alpha], &[]);
    let gate = site.op("Sigmoid", &[scaled], &[]);
    site.give(output, "Mul", &[x, gate], &[]);
    Ok(())
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`, for `x` or for the sum of `x` and a bias.
pub(super) fn gelu(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &[], 2)?;
    let (mut x, output) = (site.input(node, 0)?, site.output(node)?);
    if let Some(bias) = optional(node, 1) {
        x = site.op("Add", &[x, bias], &[]);
    }
    let [root, one, half] = [FRAC_1_SQRT_2, 1.0, 0.5].map(|value| site.float_like(value, x));
    let scaled = site.op("Mul", &[x, root], &[]);
    let error = site.op("Erf", &[scaled], &[]);
    let gate = site.op("Add", &[error, one], &[]);
    let gated = site.op("Mul", &[x, gate], &[]);
    site.give(output, "Mul", &[gated, half], &[]);
    Ok(())
}

/// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, for `x` or for the sum of `x` and a bias.
pub(super) fn fast_gelu(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &[], 2)?;
    let (mut x, output) = (site.input(node, 0)?, site.output(node)?);
    if let Some(bias) = optional(node, 1) {
        x = site.op("Add", &[x, bias], &[]);
    }
    let root = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
    let [root, third, one, half] = [root, root * 0.044_715, 1.0, 0.5].map(|value| site.float_like(value, x));
    let square = site.op("Mul", &[x, x], &[]);
    let inner = site.op("Mul", &[square, third], &[]);
    let inner = site.op("Add", &[inner, root], &[]);
    let inner = site.op("Mul", &[inner, x], &[]);
    let tanh = site.op("Tanh", &[inner], &[]);
    let gate = site.op("Add", &[tanh, one], &[]);
    let gated = site.op("Mul", &[x, gate], &[]);
    site.give(output, "Mul", &[gated, half], &[]);
    Ok(())
}

/// `alpha * A B` with the last two axes of an operand exchanged.
pub(super) fn fused_mat_mul(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["alpha", "transA", "transB", "transBatchA", "transBatchB"], 2)?;
    if int(node, "transBatchA", 0) != 0 || int(node, "transBatchB", 0) != 0 {
        return Err(site.refuse(node, "moves the first axis of an operand"));
    }
    let mut operands = [site.input(node, 0)?, site.input(node, 1)?];
    for (operand, name) in operands.iter_mut().zip(["transA", "transB"]) {
        if int(node, name, 0) == 0 {
            continue;
        }
        let Some(rank) = site.rank(*operand).filter(|rank| *rank >= 2) else {
            return Err(site.refuse(node, "transposes an operand of unknown rank"));
        };
        let mut order: Vec<i64> = (0..rank as i64).collect();
        order.swap(rank - 1, rank - 2);
        *operand = site.transpose(*operand, &order);
    }
    let output = site.output(node)?;
    match float(node, "alpha", 1.0) {
        1.0 => site.give(output, "MatMul", &operands, &[]),
        alpha => {
            let product = site.op("MatMul", &operands, &[]);
            let alpha = site.float_like(alpha, product);
            site.give(output, "Mul", &[product, alpha], &[]);
        }
    }
    Ok(())
}
