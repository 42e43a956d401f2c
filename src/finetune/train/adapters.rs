//! Low-rank adapters: each trained matrix is its old value and a product of two thin matrices, and these are trained.
//!
//! `W = W0 + alpha / r * A B`, `A` `[K, r]`, `B` `[r, D]` for `W` `[K, D]`; `A` begins at random and `B` at 0, so the
//! network begins as it was (Hu et al. 2021, arXiv:2106.09685, section 4.1). The network itself runs with `W`, and
//! the gradients of `A` and `B` follow from that of `W`: `dA = alpha / r * dW B^T`, `dB = alpha / r * A^T dW`. So what is
//! exported needs no merging, and no operator knows of adapters.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::base::{Error, Result};
use crate::torch;

use crate::finetune::error::torch_error;
use crate::finetune::optim::Parameter;
use crate::finetune::settings::Settings;

/// The stream of the seeded generator that adapters draw from; the sampler's are counted from 0.
const STREAM: u64 = u64::MAX;

/// Which weights have adapters, and what they were without.
pub struct Adapters {
    scale: f64,
    adapted: Vec<Adapted>,
}

struct Adapted {
    name: String,
    /// Position in the network's weights.
    number: usize,
    /// The weight that the network runs with, `[.., K, D]`.
    weight: Tensor,
    /// Its value before the first step.
    before: Tensor,
}

impl Adapters {
    /// Adapters beside all weights that are matrices, or stacks of them, with both sides above the rank, and the thin
    /// matrices to train, `A` and `B` of each in turn. The other weights stay as they are.
    ///
    /// Errors: `Error::Invalid` when no weight is large enough.
    pub fn new(weights: &[torch::Parameter], settings: &Settings) -> Result<(Self, Vec<Parameter>)> {
        let rank = i64::from(settings.lora_rank);
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(STREAM);
        let mut adapted = Vec::new();
        let mut parameters = Vec::new();
        for (number, torch::Parameter { name, tensor, .. }) in weights.iter().enumerate() {
            let size = tensor.size();
            let [stack @ .., rows, columns] = size.as_slice() else { continue };
            if (*rows).min(*columns) <= rank {
                continue;
            }
            let failed = || torch_error(format!("the adapter of `{name}`"));
            let thin = |last: [i64; 2]| [stack, &last].concat();
            let bound = 1.0 / (*rows as f32).sqrt();
            let count: i64 = thin([*rows, rank]).iter().product();
            let numbers: Vec<f32> = (0..count).map(|_| rng.random_range(-bound..bound)).collect();
            let a = Tensor::f_from_slice(&numbers).and_then(|a| a.f_view(thin([*rows, rank]).as_slice()));
            let a = a.and_then(|a| a.f_to_device(tensor.device())).map_err(failed())?;
            let b = Tensor::f_zeros(thin([rank, *columns]), (Kind::Float, tensor.device())).map_err(failed())?;
            parameters.push(Parameter::new(format!("{name}.lora_A"), a, settings.optimizer)?);
            parameters.push(Parameter::new(format!("{name}.lora_B"), b, settings.optimizer)?);
            let mut before = tensor.f_detach().and_then(|weight| weight.f_zeros_like()).map_err(failed())?;
            before.f_copy_(&tensor.detach()).map_err(failed())?;
            adapted.push(Adapted { name: name.clone(), number, weight: tensor.shallow_clone(), before });
        }
        if adapted.is_empty() {
            return Err(Error::invalid(
                "finetune setting `lora_rank`",
                format!("is {rank}, and no weight has larger sides"),
            )
            .remedy("take a smaller rank, or 0 to train the weights themselves"));
        }
        Ok((Adapters { scale: settings.lora_alpha / f64::from(settings.lora_rank), adapted }, parameters))
    }

    /// The gradients of the thin matrices from those of the network's weights.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn gradients(&self, weights: &[Tensor], parameters: &[Parameter]) -> Result<Vec<Tensor>> {
        let mut gradients = Vec::with_capacity(parameters.len());
        for (adapted, pair) in self.adapted.iter().zip(parameters.chunks_exact(2)) {
            let compute = || -> Result<[Tensor; 2], tch::TchError> {
                let (a, b) = (pair[0].value.f_detach()?, pair[1].value.f_detach()?);
                let gradient = weights[adapted.number].f_mul_scalar(self.scale)?;
                Ok([gradient.f_matmul(&b.f_transpose(-2, -1)?)?, a.f_transpose(-2, -1)?.f_matmul(&gradient)?])
            };
            gradients.extend(compute().map_err(torch_error(format!("the adapter of `{}`", adapted.name)))?);
        }
        Ok(gradients)
    }

    /// Gives the network's weights the value that the thin matrices say.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn apply(&mut self, parameters: &[Parameter]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (adapted, pair) in self.adapted.iter_mut().zip(parameters.chunks_exact(2)) {
            let product = pair[0].value.f_matmul(&pair[1].value).and_then(|product| product.f_mul_scalar(self.scale));
            let value = product.and_then(|product| product.f_add(&adapted.before));
            value
                .and_then(|value| adapted.weight.f_copy_(&value))
                .map_err(torch_error(format!("the adapter of `{}`", adapted.name)))?;
        }
        Ok(())
    }

    /// What a checkpoint needs besides the parameters: each adapted weight before the first step.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.adapted.iter().map(|adapted| (format!("before/{}", adapted.name), adapted.before.shallow_clone()))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::ir::{DataType, Graph, Value};

    fn weights(sizes: &[&[i64]]) -> Vec<torch::Parameter> {
        let mut graph = Graph::default();
        let weight = |(number, size): (usize, &&[i64])| torch::Parameter {
            id: graph.add_value(Value::default()),
            name: format!("w{number}"),
            tensor: Tensor::rand(*size, (Kind::Float, Device::Cpu)).set_requires_grad(true),
            dtype: DataType::Float,
        };
        sizes.iter().enumerate().map(weight).collect()
    }

    fn settings(lora_rank: u32) -> Settings {
        Settings { lora_rank, lora_alpha: 6.0, ..Settings::default() }
    }

    /// Autograd through `W0 + alpha / r * A B`, of a matrix and of a stack of matrices.
    #[test]
    fn gradients_are_those_of_the_product() {
        let weights = weights(&[&[7, 5], &[4], &[2, 5, 6]]);
        let (mut adapters, mut parameters) = Adapters::new(&weights, &settings(3)).unwrap();
        let names: Vec<&str> = parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        assert_eq!(names, ["w0.lora_A", "w0.lora_B", "w2.lora_A", "w2.lora_B"]);
        for parameter in &mut parameters {
            let random = Tensor::rand(parameter.value.size(), (Kind::Float, Device::Cpu));
            tch::no_grad(|| parameter.value.copy_(&random));
        }
        let merged = |number: usize, first: usize| {
            weights[number].tensor.detach() + 2.0 * parameters[first].value.matmul(&parameters[first + 1].value)
        };
        let merged = [merged(0, 0), merged(2, 2)];
        let loss = |w0: &Tensor, w2: &Tensor| w0.square().sum(Kind::Float) + w2.sin().sum(Kind::Float);
        let thin: Vec<&Tensor> = parameters.iter().map(|parameter| &parameter.value).collect();
        let want = Tensor::run_backward(&[loss(&merged[0], &merged[1])], &thin, false, false);

        adapters.apply(&parameters).unwrap();
        for (weight, merged) in [&weights[0], &weights[2]].into_iter().zip(&merged) {
            assert!(weight.tensor.detach().allclose(&merged.detach(), 1e-6, 1e-6, false));
        }
        let leaves = [&weights[0].tensor, &weights[2].tensor];
        let mut full = Tensor::run_backward(&[loss(leaves[0], leaves[1])], &leaves, false, false);
        full.insert(1, Tensor::zeros([4], (Kind::Float, Device::Cpu)));
        let found = adapters.gradients(&full, &parameters).unwrap();
        for (found, want) in found.iter().zip(&want) {
            assert!(found.allclose(want, 1e-5, 1e-5, false), "{found}, expected {want}");
        }
    }

    #[test]
    fn a_rank_that_no_weight_exceeds_is_refused() {
        let error = Adapters::new(&weights(&[&[7, 5], &[9]]), &settings(5)).err().unwrap().to_string();
        assert!(error.contains("`lora_rank`") && error.contains("is 5"), "{error}");
    }

    /// `B` is 0 at first, so nothing changes before a step.
    #[test]
    fn the_network_begins_as_it_was() {
        let weights = weights(&[&[7, 5]]);
        let before = weights[0].tensor.detach().copy();
        let (mut adapters, parameters) = Adapters::new(&weights, &settings(2)).unwrap();
        adapters.apply(&parameters).unwrap();
        assert!(weights[0].tensor.detach().equal(&before));
        let again = Adapters::new(&weights, &settings(2)).unwrap().1;
        assert!(again[0].value.equal(&parameters[0].value) && parameters[0].value.abs().max().double_value(&[]) > 0.0);
    }
}
