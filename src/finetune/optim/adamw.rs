//! AdamW over LibTorch tensors, with state that can be saved and restored bit for bit.
//!
//! The binding does not expose the moments of LibTorch's own optimiser classes, so a run with them could not resume to
//! the same result. The update is that of `torch.optim.AdamW`, operation for operation.

use tch::Tensor;

/// AdamW's constants.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// First and second moment of a parameter.
pub struct Moments<'a> {
    pub exp_avg: &'a mut Tensor,
    pub exp_avg_sq: &'a mut Tensor,
}

impl AdamW {
    /// One update in place. All tensors have the same shape; `step` counts from 1.
    ///
    /// Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; `torch/optim/adamw.py`, `_single_tensor_adamw`.
    pub fn update(
        &self,
        value: &mut Tensor,
        moments: Moments<'_>,
        gradient: &Tensor,
        step: u64,
        learning_rate: f64,
    ) -> Result<(), tch::TchError> {
        let Moments { exp_avg, exp_avg_sq } = moments;
        let steps = step as f64;
        let correction1 = 1.0 - self.beta1.powf(steps);
        let correction2 = 1.0 - self.beta2.powf(steps);
        if self.weight_decay != 0.0 {
            let _ = value.f_mul_scalar_(1.0 - learning_rate * self.weight_decay)?;
        }
        let _ = exp_avg.f_lerp_(gradient, 1.0 - self.beta1)?;
        let squared = gradient.f_mul(gradient)?.f_mul_scalar_(1.0 - self.beta2)?;
        let _ = exp_avg_sq.f_mul_scalar_(self.beta2)?.f_add_(&squared)?;
        // The one buffer that a step needs besides the moments.
        let mut denominator = exp_avg_sq.f_sqrt_out(&squared)?;
        let _ = denominator.f_div_scalar_(correction2.sqrt())?.f_add_scalar_(self.epsilon)?;
        let update = exp_avg.f_div_out(&denominator, &denominator)?.f_mul_scalar_(-learning_rate / correction1)?;
        let _ = value.f_add_(&update)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::optimizer::tests::{GRADIENTS, bits_apart, start, values};
    use super::*;

    /// Reference: three steps of `torch.optim.AdamW(lr=0.02, weight_decay=0.1)` in torch 2.11.
    #[test]
    fn adamw_steps_equal_torch() {
        let start = start();
        // Bits of each value.
        let want: [[u32; 6]; 3] = [
            [0x3ef5_3f7d, 0xbf9d_1eb9, 0x3ffc_ed92, 0xbc9b_a5e3, 0xc040_e560, 0x3f44_bc6a],
            [0x3efa_7ca0, 0xbf9c_f0c5, 0x3ffa_b4f2, 0xbd1c_bb27, 0xc041_2a11, 0x3f41_cff1],
            [0x3efd_9830, 0xbf9e_2684, 0x3ffb_2fd9, 0xbd59_884e, 0xc041_9798, 0x3f3e_097c],
        ];
        let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let (mut value, mut exp_avg, mut exp_avg_sq) = (start.copy(), start.zeros_like(), start.zeros_like());
        for (step, (gradient, want)) in GRADIENTS.iter().zip(want).enumerate() {
            let gradient = Tensor::from_slice(gradient).view([2, 3]);
            let moments = Moments { exp_avg: &mut exp_avg, exp_avg_sq: &mut exp_avg_sq };
            optimizer.update(&mut value, moments, &gradient, step as u64 + 1, 0.02).unwrap();
            for (found, want) in values(&value).into_iter().zip(want.map(f32::from_bits)) {
                assert!(bits_apart(found, want) <= 1, "step {step}: {found}, expected {want}");
            }
        }
    }
}
