//! Settings and environment of a training run.

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Device, Tensor};

use crate::base::{Cancel, Result, Sha256Digest};
use crate::finetune::checkpoint::{Checkpoints, checkpoints};
use crate::finetune::data::{Loads, TrainingSet};
use crate::finetune::plan::Order;
use crate::finetune::settings::Settings;
use crate::torch::Ranks;

use super::dense::DenseStream;

/// Settings and environment of a training run: everything but the network and the samples.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub settings: &'a Settings,
    /// Order in which layers are trained.
    pub order: Order,
    pub device: Device,
    /// Maximum number of tokens of one forward pass, padding included. A longer sample forms a pass of its own.
    pub batch_tokens: usize,
    /// Number of threads per network.
    pub threads: usize,
    /// Computes rows of samples when steps need them; `None` when all rows are on disk.
    pub streamed: Option<&'a dyn Loads>,
    /// Streams of the dense model, for fits.
    pub dense: Option<&'a dyn DenseStream>,
    /// Number of layers whose streams of the dense model a fit holds at a time.
    pub fit_layers: usize,
    /// The first trained layer, in the pruned model's numbering.
    pub first: usize,
    /// SHA-256 of each input that determines the result, by name. A checkpoint with other inputs is refused.
    pub inputs: &'a BTreeMap<String, Sha256Digest>,
    /// Folder for metrics and files of this process.
    pub work: &'a Path,
    /// Folder for checkpoints, shared by all processes; the first process writes it.
    pub shared: &'a Path,
    /// Processes that share the samples of every step; `None` for a single process.
    pub ranks: Option<&'a Ranks>,
    /// Resumes from the newest checkpoint in `shared`, if there is one.
    pub resume: bool,
    pub cancel: &'a Cancel,
}

impl Run<'_> {
    /// True in the process that writes checkpoints and trial results.
    pub fn writes(&self) -> bool {
        self.ranks.is_none_or(|ranks| ranks.rank() == 0)
    }

    /// Loads the rows of these samples unless they are on disk or already held.
    ///
    /// Errors: those of a run of the frozen layers or of the dense model.
    pub fn load(&self, dataset: &mut TrainingSet, samples: &[usize]) -> Result<()> {
        match self.streamed {
            Some(streamed) if !dataset.holds(samples) => {
                self.release_cached()?;
                streamed.load(dataset, samples)
            }
            _ => Ok(()),
        }
    }

    /// On a GPU, gives the memory back that LibTorch holds for later tensors, before ONNX Runtime computes.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn release_cached(&self) -> Result<()> {
        match self.device {
            Device::Cpu => Ok(()),
            _ => crate::torch::release_cached(),
        }
    }

    /// The run's checkpoints; only the first process writes them.
    ///
    /// Errors: `Error::Io`.
    pub fn checkpoints(&self) -> Result<Checkpoints> {
        checkpoints(self.shared, self.writes())
    }

    /// True when the user asked any of the processes to stop. All processes must call this at the same point.
    ///
    /// Errors: as `Ranks::sum`.
    pub fn stops(&self) -> Result<bool> {
        let own = self.cancel.requested();
        match self.ranks {
            Some(ranks) => Ok(ranks.sum_of(f64::from(u8::from(own)))? > 0.0),
            None => Ok(own),
        }
    }
}

/// A copy of a weight that is restored later; in host memory, so that it takes nothing of a GPU.
///
/// Errors: LibTorch's own.
pub fn kept_aside(weight: &Tensor) -> Result<Tensor, tch::TchError> {
    let weight = weight.f_detach()?;
    match weight.device() {
        Device::Cpu => {
            let mut copy = weight.f_empty_like()?;
            copy.f_copy_(&weight)?;
            Ok(copy)
        }
        _ => weight.f_to_device(Device::Cpu),
    }
}
