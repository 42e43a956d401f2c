//! The optimisers, one row each, and the parameters with optimiser state that can be saved and restored.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::base::{Error, Result};

use super::adamw::{AdamW, Moments};
use super::eight_bit::{Moment, moment_bytes};
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
    /// AdamW with moments in 8 bits, a quarter of the memory.
    #[serde(rename = "adamw-8bit")]
    AdamW8Bit,
}

/// One optimiser.
pub struct OptimizerRow {
    /// The optimiser.
    pub kind: OptimizerKind,
    /// Name in settings.
    pub name: &'static str,
    /// Peak learning rates that `learning_rate = "auto"` tries, ascending.
    pub rates: &'static [f64],
    /// Creates the initial state for a weight.
    begin: fn(&Tensor) -> Result<OptimizerState, tch::TchError>,
    /// Bytes of that state for a weight of this shape.
    bytes: fn(&[u64]) -> u64,
}

/// All optimisers.
pub const OPTIMIZERS: &[OptimizerRow] = &[
    OptimizerRow {
        kind: OptimizerKind::AdamW,
        name: "adamw",
        rates: ADAMW_RATES,
        begin: OptimizerState::adamw,
        bytes: |shape| 8 * shape.iter().product::<u64>(),
    },
    OptimizerRow {
        kind: OptimizerKind::Muon,
        name: "muon",
        rates: &[1e-3, 3e-3, 1e-2, 3e-2],
        begin: |value| match Muon::takes(&value.size()) {
            true => Ok(OptimizerState::Muon { momentum: value.f_zeros_like()? }),
            false => OptimizerState::adamw(value),
        },
        bytes: |shape| {
            let signed: Vec<i64> = shape.iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect();
            4 * shape.iter().product::<u64>() * if Muon::takes(&signed) { 1 } else { 2 }
        },
    },
    OptimizerRow {
        kind: OptimizerKind::AdamW8Bit,
        name: "adamw-8bit",
        rates: ADAMW_RATES,
        begin: |value| match value.numel() >= EIGHT_BITS_FROM {
            true => Ok(OptimizerState::EightBit {
                first: Moment::zeros(value, true)?,
                second: Moment::zeros(value, false)?,
            }),
            false => OptimizerState::adamw(value),
        },
        bytes: |shape| match shape.iter().product::<u64>() {
            elements if elements >= EIGHT_BITS_FROM as u64 => 2 * moment_bytes(elements),
            elements => 8 * elements,
        },
    },
];

/// From the rate for billions of parameters to the rate for adapters and networks of a few million parameters.
const ADAMW_RATES: &[f64] = &[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3];

/// Weights with fewer elements, such as norms and biases, have moments of 32 bits.
const EIGHT_BITS_FROM: usize = 4096;

impl OptimizerKind {
    /// Peak learning rates to try, ascending.
    pub fn rates(self) -> &'static [f64] {
        self.row().rates
    }

    fn row(self) -> &'static OptimizerRow {
        OPTIMIZERS.iter().find(|row| row.kind == self).unwrap_or(&OPTIMIZERS[0])
    }
}

/// Bytes of the optimiser state for weights of these shapes.
pub fn state_bytes(optimizer: OptimizerKind, shapes: &[Vec<u64>]) -> u64 {
    shapes.iter().map(|shape| (optimizer.row().bytes)(shape)).sum()
}

/// State of an optimiser for one weight, carried from step to step.
#[derive(Debug)]
pub enum OptimizerState {
    AdamW {
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    },
    Muon {
        momentum: Tensor,
    },
    /// AdamW's moments in 8 bits.
    EightBit {
        first: Moment,
        second: Moment,
    },
}

impl OptimizerState {
    fn adamw(value: &Tensor) -> Result<Self, tch::TchError> {
        Ok(OptimizerState::AdamW { exp_avg: value.f_zeros_like()?, exp_avg_sq: value.f_zeros_like()? })
    }
}

/// A trained tensor: an f32 leaf with its optimiser state.
pub struct OptimizedParameter {
    /// The initializer's name in the graph.
    pub name: String,
    /// The trained value; requires gradients.
    pub value: Tensor,
    pub state: OptimizerState,
}

impl OptimizedParameter {
    /// A parameter with its state at 0. A `value` that requires gradients is trained in place.
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
        let value = if value.requires_grad() { value } else { value.detach().set_requires_grad(true) };
        let state = (optimizer.row().begin)(&value.detach()).map_err(torch_error("the optimiser's state"))?;
        Ok(OptimizedParameter { name, value, state })
    }

    /// Tensors for a checkpoint, by name. They share memory with the parameter.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> {
        let named = |kind: &str, tensor: &Tensor| (format!("{kind}/{}", self.name), tensor.shallow_clone());
        let state = match &self.state {
            OptimizerState::AdamW { exp_avg, exp_avg_sq } => {
                vec![named("exp_avg", exp_avg), named("exp_avg_sq", exp_avg_sq)]
            }
            OptimizerState::Muon { momentum } => vec![named("exp_avg", momentum)],
            OptimizerState::EightBit { first, second } => vec![
                named("exp_avg", &first.codes),
                named("exp_avg_scales", &first.scales),
                named("exp_avg_sq", &second.codes),
                named("exp_avg_sq_scales", &second.scales),
            ],
        };
        [named("value", &self.value)].into_iter().chain(state)
    }

    /// Relative cost of a step, to compare parameters.
    pub fn work(&self) -> usize {
        let shorter = match (&self.state, self.value.size().as_slice()) {
            (OptimizerState::Muon { .. }, [.., rows, columns]) => usize::try_from(*rows.min(columns)).unwrap_or(1),
            _ => 1,
        };
        self.value.numel().saturating_mul(shorter)
    }
}

/// Hyperparameters of the optimisers.
#[derive(Clone, Copy, Debug)]
pub struct Constants {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// AdamW and Muon with their hyperparameters.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    adamw: AdamW,
    muon: Muon,
}

impl Optimizer {
    /// Optimisers with these hyperparameters.
    pub fn new(constants: Constants) -> Self {
        let Constants { beta1, beta2, epsilon, weight_decay } = constants;
        Optimizer { adamw: AdamW { beta1, beta2, epsilon, weight_decay }, muon: Muon { momentum: beta1, weight_decay } }
    }

    /// One update in place; `step` counts from 1.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn step(
        &self,
        parameter: &mut OptimizedParameter,
        gradient: &Tensor,
        step: u64,
        learning_rate: f64,
    ) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let OptimizedParameter { name, value, state } = parameter;
        let done = match state {
            OptimizerState::AdamW { exp_avg, exp_avg_sq } => {
                self.adamw.update(value, Moments { exp_avg, exp_avg_sq }, gradient, step, learning_rate)
            }
            OptimizerState::Muon { momentum } => self.muon.update(value, momentum, gradient, learning_rate),
            OptimizerState::EightBit { first, second } => {
                let mut update = || -> Result<(), tch::TchError> {
                    let (mut exp_avg, mut exp_avg_sq) = (first.numbers()?, second.numbers()?);
                    let moments = Moments { exp_avg: &mut exp_avg, exp_avg_sq: &mut exp_avg_sq };
                    self.adamw.update(value, moments, gradient, step, learning_rate)?;
                    first.keep(&exp_avg)?;
                    second.keep(&exp_avg_sq)
                };
                update()
            }
        };
        done.map_err(torch_error(format!("the step of `{name}`")))
    }
}

/// Global L2 norm of all gradients. When it is larger than `max_norm`, the gradients are scaled down to `max_norm`; a
/// `max_norm` of 0 disables this.
///
/// Errors: `Error::Engine` from LibTorch. Source: `torch.nn.utils.clip_grad_norm_`, factor `max_norm / (norm + 1e-6)`.
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

    /// Initial matrix of the optimisers' tests; [`GRADIENTS`] are the gradients of three steps.
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

    /// Reference: `torch.nn.utils.clip_grad_norm_` of the same two gradients.
    #[test]
    fn gradient_clipping_equals_torch() {
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
    fn small_gradients_or_a_limit_of_zero_are_not_clipped() {
        for limit in [0.0, 100.0] {
            let mut gradients = [Tensor::from_slice(&[3.0f32, -4.0])];
            assert_eq!(clip_gradients(&mut gradients, limit).unwrap(), 5.0);
            assert_eq!(values(&gradients[0]), [3.0, -4.0]);
        }
    }

    #[test]
    fn only_f32_parameters_are_trained() {
        let half = Tensor::zeros([2], (Kind::Half, tch::Device::Cpu));
        let error = OptimizedParameter::new("w", half, OptimizerKind::AdamW).err().unwrap().to_string();
        assert_eq!(error, "parameter `w`: is Half, must be f32 to train");
    }

    #[test]
    fn every_optimiser_has_one_row_under_its_serialised_name() {
        for row in OPTIMIZERS {
            assert_eq!(serde_json::to_value(row.kind).unwrap(), row.name);
        }
    }

    #[test]
    fn muon_updates_matrices_and_stacks_of_matrices() {
        let second = |size: &[i64]| {
            let value = Tensor::zeros(size, (Kind::Float, tch::Device::Cpu));
            let state = OptimizedParameter::new("w", value, OptimizerKind::Muon).unwrap().state;
            matches!(state, OptimizerState::AdamW { .. })
        };
        assert!(!second(&[4, 2]) && !second(&[3, 2, 4]));
        assert!(second(&[4]) && second(&[]) && second(&[4, 1]) && second(&[4, 1, 3]));
    }

    /// On a regression with noisy gradients, both come equally near to the true weights and to each other.
    #[test]
    fn training_with_8_bit_moments_follows_32_bit_moments() {
        let fill = |size: [i64; 2], step: f64| {
            let count: i64 = size.iter().product();
            (Tensor::arange(count, (Kind::Float, tch::Device::Cpu)) * step).sin().reshape(size)
        };
        let want = fill([96, 64], 0.37);
        let optimizer = Optimizer::new(Constants { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 });
        let train = |kind: OptimizerKind| -> Tensor {
            let mut parameter = OptimizedParameter::new("w", Tensor::zeros_like(&want), kind).unwrap();
            for step in 1..=300u64 {
                let x = fill([16, 96], 0.011 * step as f64 + 0.3);
                let off = x.matmul(&(parameter.value.detach() - &want));
                let gradient = x.tr().matmul(&off);
                optimizer.step(&mut parameter, &gradient, step, 0.01).unwrap();
            }
            parameter.value.detach()
        };
        let distance = |a: &Tensor, b: &Tensor| (a - b).square().mean(Kind::Float).sqrt().double_value(&[]);
        let (full, eight) = (train(OptimizerKind::AdamW), train(OptimizerKind::AdamW8Bit));
        let initial = distance(&Tensor::zeros_like(&want), &want);
        let (left, left_8) = (distance(&full, &want), distance(&eight, &want));
        assert!(left < 0.7 * initial && left_8 < 1.01 * left, "{initial}: {left} in 32 bits, {left_8} in 8");
        assert!(distance(&full, &eight) < 0.1 * initial, "{}", distance(&full, &eight));
        let bytes = |kind| state_bytes(kind, &[vec![96, 64]]);
        assert_eq!((bytes(OptimizerKind::AdamW), bytes(OptimizerKind::AdamW8Bit)), (49152, 12480));
    }
}
