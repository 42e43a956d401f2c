//! Muon: steps along the momentum of a matrix, with all its singular values brought to about the same size.
//!
//! With few steps on few samples, other optimisers move mainly along the directions of the largest gradients, at any
//! learning rate. With Muon every direction is part of every step.

use tch::{Kind, Tensor};

/// Newton-Schulz iterations per step. Each multiplies small singular values by 3.4. The reference uses five; three heal
/// as well and cost less.
const ROUNDS: usize = 3;

/// Coefficients of the iteration's first, third and fifth power.
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);

/// Root mean square of a step relative to the learning rate, as of AdamW's steps in long runs.
const STEP_SIZE: f64 = 0.2;

/// Muon's constants.
#[derive(Clone, Copy, Debug)]
pub struct Muon {
    pub momentum: f64,
    pub weight_decay: f64,
}

impl Muon {
    /// True for matrices, and stacks of them, with both sides above 1.
    pub fn takes(size: &[i64]) -> bool {
        matches!(size, [.., rows, columns] if *rows > 1 && *columns > 1)
    }

    /// One update in place with Nesterov momentum. All tensors have the same shape `[.., K, D]`. Steps have the root
    /// mean square of AdamW's at the same learning rate.
    ///
    /// Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
    /// arXiv:2502.16982, section 2.2 (the factor `0.2 * sqrt(max(K, D))`).
    pub fn update(
        &self,
        value: &mut Tensor,
        momentum: &mut Tensor,
        gradient: &Tensor,
        learning_rate: f64,
    ) -> Result<(), tch::TchError> {
        let _ = momentum.f_lerp_(gradient, 1.0 - self.momentum)?;
        let direction = orthogonal(&gradient.f_lerp(momentum, self.momentum)?)?;
        if self.weight_decay != 0.0 {
            let _ = value.f_mul_scalar_(1.0 - learning_rate * self.weight_decay)?;
        }
        let longer = value.size().iter().rev().take(2).copied().max().unwrap_or(1);
        let size = STEP_SIZE * (longer as f64).sqrt();
        let _ = value.f_add_(&direction.f_mul_scalar(-learning_rate * size)?)?;
        Ok(())
    }
}

/// Approximates `U V^T` of the matrix `U S V^T` with [`ROUNDS`] Newton-Schulz iterations `X <- (a + b A + c A^2) X`,
/// `A = X X^T`, from the matrix divided by its Frobenius norm. Shape `[.., K, D]`.
fn orthogonal(matrix: &Tensor) -> Result<Tensor, tch::TchError> {
    let (a, b, c) = COEFFICIENTS;
    let wide = matches!(matrix.size().as_slice(), [.., rows, columns] if rows <= columns);
    let turned = |x: &Tensor| if wide { Ok(x.shallow_clone()) } else { x.f_transpose(-2, -1) };
    let norm = matrix.f_square()?.f_sum_dim_intlist([-2i64, -1].as_slice(), true, Kind::Float)?.f_sqrt()?;
    let mut x = turned(&matrix.f_div(&norm.f_clamp_min(1e-7)?)?)?;
    for _ in 0..ROUNDS {
        let gram = x.f_matmul(&x.f_transpose(-2, -1)?)?;
        let factor = gram.f_matmul(&gram)?.f_mul_scalar_(c)?.f_add_(&gram.f_mul_scalar(b)?)?;
        let _ = factor.f_diagonal(0, -2, -1)?.f_add_scalar_(a)?;
        x = factor.f_matmul(&x)?;
    }
    turned(&x)
}

#[cfg(test)]
mod tests {
    use super::super::optimizer::tests::{GRADIENTS, start, values};
    use super::*;

    /// Reference: three steps in NumPy, f64, from the same formulas. `torch.optim.Muon` with three rounds iterates in
    /// bf16 and is within 1e-4 of them.
    #[test]
    fn muon_steps_equal_the_numpy_reference() {
        let start = start();
        let want: [[f32; 6]; 3] = [
            [0.496_546_1, -1.247_334, 1.988_648, 0.000_903_065, -2.998_975_7, 0.748_225_8],
            [0.502_271_54, -1.245_060_6, 1.982_310_5, 0.000_288_901, -2.997_701_7, 0.746_836_25],
            [0.502_066_26, -1.243_890_2, 1.984_621_3, 0.000_193_503, -2.996_442, 0.743_975_6],
        ];
        let muon = Muon { momentum: 0.9, weight_decay: 0.1 };
        // A wide matrix, a tall one, and a stack of two.
        let turn = |tensor: &Tensor| tensor.transpose(-2, -1).contiguous();
        let two = |tensor: &Tensor| Tensor::stack(&[tensor, &(tensor * 3.0)], 0);
        let (mut wide, mut tall, mut stack) = (start.copy(), turn(&start), two(&start));
        let mut moments = [wide.zeros_like(), tall.zeros_like(), stack.zeros_like()];
        for (gradient, want) in GRADIENTS.iter().zip(want) {
            let gradient = Tensor::from_slice(gradient).view([2, 3]);
            muon.update(&mut wide, &mut moments[0], &gradient, 0.02).unwrap();
            muon.update(&mut tall, &mut moments[1], &turn(&gradient), 0.02).unwrap();
            muon.update(&mut stack, &mut moments[2], &two(&gradient), 0.02).unwrap();
            for found in [values(&wide), values(&turn(&tall)), values(&stack.get(0))] {
                assert!(found.iter().zip(want).all(|(found, want)| (found - want).abs() < 1e-6), "{found:?}, {want:?}");
            }
        }
    }

    #[test]
    fn an_orthogonalised_matrix_has_singular_values_near_1() {
        let values: Vec<f32> = (0..24 * 40).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
        let matrix = Tensor::from_slice(&values).view([24, 40]);
        let range = |matrix: &Tensor| {
            let sizes = matrix.matmul(&matrix.tr()).linalg_eigvalsh("L").sqrt();
            (sizes.min().double_value(&[]), sizes.max().double_value(&[]))
        };
        let (least, most) = range(&matrix);
        assert!(most / least > 3.0, "{least} to {most}");
        let (least, most) = range(&orthogonal(&matrix).unwrap());
        assert!(least > 0.6 && most < 1.3, "{least} to {most}");
    }
}
