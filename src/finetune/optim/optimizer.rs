//! The optimisers, one row each, over what they train: tensors with state that can be written down and taken up again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::base::{Error, Result};

use super::adamw::{AdamW, Moments};
use super::muon::Muon;
use crate::finetune::error::torch_error;

/// The name of an optimiser.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW.
    #[default]
    AdamW,
    /// Muon for matrices, AdamW for all else.
    Muon,
}

/// One optimiser.
pub struct OptimizerRow {
    pub kind: OptimizerKind,
    /// Its name in settings.
    pub name: &'static str,
    /// True when it takes weights of this shape; AdamW takes those that it does not.
    takes: fn(&[i64]) -> bool,
}

/// Every optimiser there is.
pub const OPTIMIZERS: &[OptimizerRow] = &[
    OptimizerRow { kind: OptimizerKind::AdamW, name: "adamw", takes: |_| false },
    OptimizerRow { kind: OptimizerKind::Muon, name: "muon", takes: Muon::takes },
];

impl OptimizerKind {
    fn row(self) -> &'static OptimizerRow {
        OPTIMIZERS.iter().find(|row| row.kind == self).unwrap_or(&OPTIMIZERS[0])
    }
}

/// Bytes of the moments of weights with these shapes.
pub fn state_bytes(optimizer: OptimizerKind, shapes: &[Vec<u64>]) -> u64 {
    let bytes = |shape: &Vec<u64>| {
        let signed: Vec<i64> = shape.iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect();
        let moments = if (optimizer.row().takes)(&signed) { 1 } else { 2 };
        4 * moments * shape.iter().product::<u64>()
    };
    shapes.iter().map(bytes).sum()
}

/// One tensor that is trained: an f32 leaf with its moments.
pub struct Parameter {
    /// The initializer's name in the graph.
    pub name: String,
    /// The trained value; requires gradients.
    pub value: Tensor,
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment; None where Muon takes the step, which has none.
    pub exp_avg_sq: Option<Tensor>,
}

impl Parameter {
    /// A parameter with its moments at 0. A `value` that requires gradients is trained in place.
    ///
    /// Errors: `Error::Engine` from LibTorch; `Error::Invalid` unless `value` is f32.
    pub fn new(name: impl Into<String>, value: Tensor, optimizer: OptimizerKind) -> Result<Self> {
        let name = name.into();
        if value.kind() != Kind::Float {
            return Err(Error::invalid(
                format!("parameter `{name}`"),
                format!("is {:?}, must be f32 to train", value.kind()),
            ));
        }
        let zeros = || value.f_zeros_like().map_err(torch_error("the optimiser's state"));
        let first_alone = (optimizer.row().takes)(&value.size());
        let (exp_avg, exp_avg_sq) = (zeros()?, (!first_alone).then(zeros).transpose()?);
        let value = if value.requires_grad() { value } else { value.detach().set_requires_grad(true) };
        Ok(Parameter { name, value, exp_avg, exp_avg_sq })
    }

    /// Everything that a run goes on from, by name; the tensors themselves, not copies.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> {
        let named = |kind: &str, tensor: &Tensor| (format!("{kind}/{}", self.name), tensor.shallow_clone());
        let second = self.exp_avg_sq.as_ref().map(|second| named("exp_avg_sq", second));
        [named("value", &self.value), named("exp_avg", &self.exp_avg)].into_iter().chain(second)
    }

    /// What a step costs, next to other parameters' steps.
    pub fn work(&self) -> usize {
        let shorter = match (&self.exp_avg_sq, self.value.size().as_slice()) {
            (None, [.., rows, columns]) => usize::try_from(*rows.min(columns)).unwrap_or(1),
            _ => 1,
        };
        self.value.numel().saturating_mul(shorter)
    }
}

/// What a user sets of the optimisers.
#[derive(Clone, Copy, Debug)]
pub struct Constants {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// Both optimisers, ready to take steps.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    adamw: AdamW,
    muon: Muon,
}

impl Optimizer {
    /// With these constants.
    pub fn new(constants: Constants) -> Self {
        let Constants { beta1, beta2, epsilon, weight_decay } = constants;
        Optimizer { adamw: AdamW { beta1, beta2, epsilon, weight_decay }, muon: Muon { momentum: beta1, weight_decay } }
    }

    /// One update in place: `step` counts from 1.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn step(&self, parameter: &mut Parameter, gradient: &Tensor, step: u64, learning_rate: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Parameter { name, value, exp_avg, exp_avg_sq } = parameter;
        let done = match exp_avg_sq {
            Some(exp_avg_sq) => {
                self.adamw.update(value, Moments { exp_avg, exp_avg_sq }, gradient, step, learning_rate)
            }
            None => self.muon.update(value, exp_avg, gradient, learning_rate),
        };
        done.map_err(torch_error(format!("the step of `{name}`")))
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
pub mod tests {
    use super::*;

    /// A matrix to take steps from, and the gradients of three steps.
    pub fn start() -> Tensor {
        Tensor::from_slice(&[0.5f32, -1.25, 2.0, 1e-3, -3.0, 0.75]).view([2, 3])
    }
    pub const GRADIENTS: [[f32; 6]; 3] =
        [[0.1, -0.2, 0.3, 1e-4, 5.0, -0.01], [-0.4, 0.2, 0.0, 2e-4, -1.0, 0.03], [0.05, 0.6, -0.7, 0.0, 2.5, 0.5]];

    pub fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    pub fn bits_apart(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
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
        assert!(Parameter::new("w", Tensor::zeros([2], (Kind::Half, tch::Device::Cpu)), OptimizerKind::AdamW).is_err());
    }

    #[test]
    fn every_optimiser_has_one_row_under_its_serialised_name() {
        for row in OPTIMIZERS {
            assert_eq!(serde_json::to_value(row.kind).unwrap(), row.name);
        }
    }

    #[test]
    fn muon_takes_matrices_and_stacks_of_them() {
        let second = |size: &[i64]| {
            let value = Tensor::zeros(size, (Kind::Float, tch::Device::Cpu));
            Parameter::new("w", value, OptimizerKind::Muon).unwrap().exp_avg_sq.is_some()
        };
        assert!(!second(&[4, 2]) && !second(&[3, 2, 4]));
        assert!(second(&[4]) && second(&[]) && second(&[4, 1]) && second(&[4, 1, 3]));
    }
}
