//! AdamW over LibTorch tensors, with state that can be written down and taken up again bit for bit.
//!
//! LibTorch's own optimiser classes keep their moments out of reach of this binding, so a run could not be resumed to
//! the same result; the update itself is the one of `torch.optim.AdamW`, operation for operation.

use tch::{Kind, Tensor};

use crate::base::{Error, Result};

use super::torch_error;

/// One tensor that is trained: an f32 leaf with its moments.
pub struct Parameter {
    /// The initializer's name in the graph.
    pub name: String,
    /// The trained value; requires gradients.
    pub value: Tensor,
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment.
    pub exp_avg_sq: Tensor,
}

impl Parameter {
    /// A parameter with its moments at 0. A `value` that requires gradients is trained in place.
    ///
    /// Errors: `Error::Engine` from LibTorch; `Error::Invalid` unless `value` is f32.
    pub fn new(name: impl Into<String>, value: Tensor) -> Result<Self> {
        let name = name.into();
        if value.kind() != Kind::Float {
            return Err(Error::invalid(
                format!("parameter `{name}`"),
                format!("is {:?}, must be f32 to train", value.kind()),
            ));
        }
        let zeros = || value.f_zeros_like().map_err(torch_error("the optimiser's state"));
        let (exp_avg, exp_avg_sq) = (zeros()?, zeros()?);
        let value = if value.requires_grad() { value } else { value.detach().set_requires_grad(true) };
        Ok(Parameter { name, value, exp_avg, exp_avg_sq })
    }

    /// Everything that a run goes on from, by name; the tensors themselves, not copies.
    pub fn tensors(&self) -> [(String, Tensor); 3] {
        let named = |kind: &str, tensor: &Tensor| (format!("{kind}/{}", self.name), tensor.shallow_clone());
        [named("value", &self.value), named("exp_avg", &self.exp_avg), named("exp_avg_sq", &self.exp_avg_sq)]
    }
}

/// AdamW's constants.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

impl AdamW {
    /// One update in place: `step` counts from 1, `gradients` run parallel to `parameters`.
    ///
    /// Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; `torch/optim/adamw.py`, `_single_tensor_adamw`.
    pub fn step(
        &self,
        parameters: &mut [Parameter],
        gradients: &[Tensor],
        step: u64,
        learning_rate: f64,
    ) -> Result<()> {
        tch::no_grad(|| {
            for (parameter, gradient) in parameters.iter_mut().zip(gradients) {
                self.update(parameter, gradient, step, learning_rate)
                    .map_err(torch_error(format!("the step of `{}`", parameter.name)))?;
            }
            Ok(())
        })
    }

    fn update(
        &self,
        parameter: &mut Parameter,
        gradient: &Tensor,
        step: u64,
        learning_rate: f64,
    ) -> Result<(), tch::TchError> {
        let steps = step as f64;
        let correction1 = 1.0 - self.beta1.powf(steps);
        let correction2 = 1.0 - self.beta2.powf(steps);
        if self.weight_decay != 0.0 {
            let _ = parameter.value.f_mul_scalar_(1.0 - learning_rate * self.weight_decay)?;
        }
        let _ = parameter.exp_avg.f_lerp_(gradient, 1.0 - self.beta1)?;
        let squared = gradient.f_mul(gradient)?.f_mul_scalar_(1.0 - self.beta2)?;
        let _ = parameter.exp_avg_sq.f_mul_scalar_(self.beta2)?.f_add_(&squared)?;
        let mut denominator = parameter.exp_avg_sq.f_sqrt()?;
        let _ = denominator.f_div_scalar_(correction2.sqrt())?.f_add_scalar_(self.epsilon)?;
        let update = parameter.exp_avg.f_div(&denominator)?.f_mul_scalar_(-learning_rate / correction1)?;
        let _ = parameter.value.f_add_(&update)?;
        Ok(())
    }
}

/// Global L2 norm of all gradients together, and their scaling down to `max_norm` where it is larger; 0 only measures.
///
/// Source: `torch.nn.utils.clip_grad_norm_`, factor `max_norm / (norm + 1e-6)`.
pub fn clip_gradients(gradients: &mut [Tensor], max_norm: f64) -> Result<f64> {
    let norm = gradient_norm(gradients).map_err(torch_error("the gradient norm"))?;
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        for gradient in gradients {
            let _ = gradient.f_mul_scalar_(factor).map_err(torch_error("gradient clipping"))?;
        }
    }
    Ok(norm)
}

fn gradient_norm(gradients: &[Tensor]) -> Result<f64, tch::TchError> {
    let norms = gradients.iter().map(Tensor::f_norm).collect::<Result<Vec<_>, _>>()?;
    if norms.is_empty() {
        return Ok(0.0);
    }
    Tensor::f_stack(&norms, 0)?.f_norm()?.f_double_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    fn bits_apart(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    /// Three steps of `torch.optim.AdamW(lr=0.02, weight_decay=0.1)` in torch 2.11.
    #[test]
    fn steps_are_those_of_the_reference() {
        let start = Tensor::from_slice(&[0.5f32, -1.25, 2.0, 1e-3, -3.0, 0.75]).view([2, 3]);
        let gradients: [[f32; 6]; 3] =
            [[0.1, -0.2, 0.3, 1e-4, 5.0, -0.01], [-0.4, 0.2, 0.0, 2e-4, -1.0, 0.03], [0.05, 0.6, -0.7, 0.0, 2.5, 0.5]];
        // The bits of each value.
        let want: [[u32; 6]; 3] = [
            [0x3ef5_3f7d, 0xbf9d_1eb9, 0x3ffc_ed92, 0xbc9b_a5e3, 0xc040_e560, 0x3f44_bc6a],
            [0x3efa_7ca0, 0xbf9c_f0c5, 0x3ffa_b4f2, 0xbd1c_bb27, 0xc041_2a11, 0x3f41_cff1],
            [0x3efd_9830, 0xbf9e_2684, 0x3ffb_2fd9, 0xbd59_884e, 0xc041_9798, 0x3f3e_097c],
        ];
        let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let mut parameters = vec![Parameter::new("w", start).unwrap()];
        for (step, (gradient, want)) in gradients.iter().zip(want).enumerate() {
            let gradient = Tensor::from_slice(gradient).view([2, 3]);
            optimizer.step(&mut parameters, &[gradient], step as u64 + 1, 0.02).unwrap();
            for (found, want) in values(&parameters[0].value).into_iter().zip(want.map(f32::from_bits)) {
                assert!(bits_apart(found, want) <= 1, "step {step}: {found}, expected {want}");
            }
        }
    }

    /// `torch.nn.utils.clip_grad_norm_` of the same two gradients.
    #[test]
    fn clipping_is_that_of_the_reference() {
        let mut gradients = [Tensor::from_slice(&[3.0f32, -4.0]), Tensor::from_slice(&[1.0f32, 2.0, -2.0])];
        let norm = clip_gradients(&mut gradients, 1.0).unwrap();
        assert!((norm - 34f64.sqrt()).abs() < 1e-6);
        let want = [[0.514_495_73, -0.685_994_27].as_slice(), &[0.171_498_57, 0.342_997_13, -0.342_997_13]];
        for (gradient, want) in gradients.iter().zip(want) {
            for (found, &want) in values(gradient).into_iter().zip(want) {
                assert!(bits_apart(found, want) <= 1, "{found}, expected {want}");
            }
        }
    }

    #[test]
    fn small_gradients_and_a_limit_of_zero_are_left_alone() {
        for limit in [0.0, 100.0] {
            let mut gradients = [Tensor::from_slice(&[3.0f32, -4.0])];
            assert_eq!(clip_gradients(&mut gradients, limit).unwrap(), 5.0);
            assert_eq!(values(&gradients[0]), [3.0, -4.0]);
        }
    }

    #[test]
    fn only_f32_trains() {
        assert!(Parameter::new("w", Tensor::zeros([2], (Kind::Half, tch::Device::Cpu))).is_err());
    }
}
