//! The mean of the weights over the last steps of a run, which is what the run then gives.
//!
//! Steps at a rate that does not fall go around the lowest point; their mean lies closer to it than any of them
//! (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407).

use tch::Tensor;

use crate::base::Result;
use crate::torch;

use crate::finetune::error::torch_error;

/// The running mean of a network's trained weights.
pub struct Average {
    /// The step behind which the first weights are taken, counted from 1.
    first: u64,
    means: Vec<Mean>,
}

struct Mean {
    name: String,
    /// The weight that the network runs with.
    weight: Tensor,
    mean: Tensor,
}

impl Average {
    /// The mean over the last `share` of `total` steps, at least one; None for a share of 0.
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

    /// Takes the weights behind a step, counted from 1; each of the last steps once, in order.
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

    /// Gives the network's weights their mean.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn apply(&mut self) -> Result<()> {
        for Mean { name, weight, mean } in &mut self.means {
            weight.f_copy_(mean).map_err(torch_error(format!("the mean of `{name}`")))?;
        }
        Ok(())
    }

    /// What a checkpoint holds of it, by name; the tensors themselves, not copies.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.means.iter().map(|mean| (format!("mean/{}", mean.name), mean.mean.shallow_clone()))
    }
}
