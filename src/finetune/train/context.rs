//! What decides a run besides the network and the samples.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Device;

use crate::base::{Cancel, Result, Sha256Digest};
use crate::finetune::checkpoint::{Checkpoints, checkpoints};
use crate::finetune::data::{Loads, TrainingSet};
use crate::finetune::settings::Settings;
use crate::torch::Ranks;

use super::dense::DenseStream;

/// What decides a run besides the network and the samples.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub settings: &'a Settings,
    pub device: Device,
    /// Most tokens of one forward pass, padding included, longer samples aside.
    pub batch_tokens: usize,
    /// Threads of each network's own.
    pub threads: usize,
    /// Computes rows of samples when steps need them; None where all are on disk.
    pub streamed: Option<&'a dyn Loads>,
    /// The dense model, for fits.
    pub dense: Option<&'a dyn DenseStream>,
    /// The first trained layer, as the pruned model counts.
    pub first: usize,
    /// SHA-256 of what decides the result, by what it is; a checkpoint of other inputs is refused.
    pub inputs: &'a BTreeMap<String, Sha256Digest>,
    /// Folder for metrics and what this process keeps.
    pub work: &'a Path,
    /// Folder for checkpoints; of several processes, the one that the first of them writes.
    pub shared: &'a Path,
    /// The processes that share the samples of every step; none where this one works alone.
    pub ranks: Option<&'a Ranks>,
    /// Goes on from the newest checkpoint in `work`, if there is one.
    pub resume: bool,
    pub cancel: &'a Cancel,
}

impl Run<'_> {
    /// True in the process that writes what all of them go on from.
    pub fn writes(&self) -> bool {
        self.ranks.is_none_or(|ranks| ranks.rank() == 0)
    }

    /// Makes rows of these samples available, where they are not on disk.
    ///
    /// Errors: those of a run of the frozen layers or of the dense model.
    pub fn load(&self, dataset: &mut TrainingSet, samples: &[usize]) -> Result<()> {
        match self.streamed {
            Some(streamed) if !dataset.holds(samples) => streamed.load(dataset, samples),
            _ => Ok(()),
        }
    }

    /// The run's checkpoints, which only the first process writes.
    ///
    /// Errors: `Error::Io`.
    pub fn checkpoints(&self) -> Result<Checkpoints> {
        checkpoints(self.shared, self.writes())
    }

    /// True when the user asked any of the processes to stop. All of them ask at the same place.
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
