//! Mean of the weights over the last steps of a run, which replaces the final weights.
//!
//! With a constant learning rate the weights oscillate around the minimum, and their mean is closer to it than the
//! weights of any single step (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407).

use tch::Tensor;

use crate::base::Result;
use crate::torch;

use crate::finetune::error::torch_error;

/// Running mean of a network's trained weights.
pub struct Average {
    /// First step whose resulting weights are in the mean, counted from 1.
    first: u64,
    means: Vec<Mean>,
}

struct Mean {
    name: String,
    /// The weight in the network.
    weight: Tensor,
    mean: Tensor,
}

impl Average {
    /// A mean over the last `share` of `total` steps, at least one; None when `share` or `total` is 0.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn new(weights: &[torch::Parameter], share: f64, total: u64) -> Result<Option<Self>> {
        let count = (share * total as f64).round().max(1.0) as u64;
        if share == 0.0 || total == 0 {
            return Ok(None);
        }
        let mean = |torch::Parameter { name, tensor, .. }: &torch::Parameter| {
            let weight = tensor.detach();
            let mean = weight.f_zeros_like().map_err(torch_error(format!("the mean of `{name}`")))?;
            Ok(Mean { name: name.clone(), weight, mean })
        };
        let means = weights.iter().map(mean).collect::<Result<_>>()?;
        Ok(Some(Average { first: total.saturating_sub(count) + 1, means }))
    }

    /// Adds the weights after `step`, counted from 1. Call it once per step, in order; it ignores steps before the
    /// averaged ones.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn add(&mut self, step: u64) -> Result<()> {
        if step < self.first {
            return Ok(());
        }
        let part = 1.0 / (step - self.first + 1) as f64;
        for Mean { name, weight, mean } in &mut self.means {
            let _ = mean.f_lerp_(weight, part).map_err(torch_error(format!("the mean of `{name}`")))?;
        }
        Ok(())
    }

    /// Copies the mean into the network's weights.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn apply(&mut self) -> Result<()> {
        for Mean { name, weight, mean } in &mut self.means {
            weight.f_copy_(mean).map_err(torch_error(format!("the mean of `{name}`")))?;
        }
        Ok(())
    }

    /// Tensors for a checkpoint, by name. They share memory with the mean.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.means.iter().map(|mean| (format!("mean/{}", mean.name), mean.mean.shallow_clone()))
    }
}
