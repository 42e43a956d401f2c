//! What a run is asked for, and what it gives.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Provenance};
use crate::bundle::Bundle;
use crate::data::LeftOut;
use crate::finetune::data::Source;
use crate::finetune::plan::Limits;
use crate::finetune::record::{LayerFit, RateTrial};
use crate::finetune::settings::Settings;
use crate::ir::Model;
use crate::runtime::FeatureCache;
use crate::torch::Ranks;

/// What to finetune, on what, and how.
pub struct Request<'a> {
    /// The pruned model.
    pub bundle: &'a Bundle,
    /// Decoder layers to train, as the pruned model counts them.
    pub layers: &'a [usize],
    /// The samples.
    pub data: &'a dyn Source,
    /// Losses, optimiser, schedule and stages.
    pub settings: &'a Settings,
    /// Device on which the trained layers are computed.
    pub device: Device,
    /// Folder for the frozen part's outputs, checkpoints and metrics; kept between runs.
    pub work: &'a Path,
    /// Goes on from the newest checkpoint in `work`, if there is one.
    pub resume: bool,
    /// What the run may take of the machine.
    pub limits: Limits,
    /// The processes that share the samples of every step; all of them see `work`.
    pub ranks: Option<&'a Ranks>,
    /// Image features of models with the same vision encoder.
    pub features: &'a Arc<FeatureCache>,
}

impl Request<'_> {
    /// Where this process keeps what the others do not read: a folder of its own in `work` for all but the first.
    pub fn own_work(&self) -> PathBuf {
        match self.ranks {
            Some(ranks) if ranks.rank() > 0 => self.work.join(format!("rank-{}", ranks.rank())),
            _ => self.work.to_path_buf(),
        }
    }
}

/// What a run gives.
pub struct Outcome {
    /// The decoder with its trained weights; all other initializers are the ones it had.
    pub decoder: Model,
    /// Figures of the run.
    pub report: Report,
}

/// How a run went: the content of the report file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Layers trained, as the pruned model counts them.
    pub layers: Vec<usize>,
    /// Elements of the trained weights, or of the adapters beside them.
    pub trained_parameters: u64,
    /// Samples trained on.
    pub samples: u64,
    /// Their ids.
    #[serde(default)]
    pub sample_ids: Vec<String>,
    /// Samples that were drawn and not used, by reason.
    pub left_out: LeftOut,
    /// Optimiser steps.
    pub steps: u64,
    /// The step that a resumed run went on from; 0 otherwise.
    pub resumed_from_step: u64,
    /// Tokens without padding, images included, over all epochs; those that each layer saw where layers are healed one after
    /// the other.
    pub tokens: u64,
    /// Answer tokens over all epochs.
    pub answer_tokens: u64,
    /// The peak learning rate, chosen from the trials where there are any.
    pub learning_rate: f64,
    /// Learning rates that were tried, in the order of the settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<RateTrial>,
    /// What the fit before the first step did, layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fitted: Vec<LayerFit>,
    /// Time of the fit.
    #[serde(default)]
    pub fit_s: f64,
    /// None where the run ends with the fit.
    pub first_loss: Option<f64>,
    /// Loss of the last step; absent where the run ends with the fit.
    pub last_loss: Option<f64>,
    /// Time in optimiser steps, over all resumptions.
    pub train_s: f64,
    /// Tokens of all steps over the time of the steps.
    pub tokens_per_s: f64,
    /// Largest resident set of the process.
    pub peak_memory_bytes: u64,
    /// Name of the JSONL file of metrics in the work folder.
    pub metrics_file: String,
}

impl Report {
    /// Version of the report's schema.
    pub const SCHEMA_VERSION: u32 = 1;
}
