//! Inputs and results of a finetuning run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Provenance};
use crate::bundle::Bundle;
use crate::data::LeftOut;
use crate::finetune::checkpoint::folder_of_rank;
use crate::finetune::data::Source;
use crate::finetune::plan::Limits;
use crate::finetune::record::{LayerFit, RateTrial};
use crate::finetune::settings::Settings;
use crate::ir::Model;
use crate::runtime::FeatureCache;
use crate::torch::Ranks;

/// Inputs of a finetuning run.
pub struct Request<'a> {
    /// The pruned model.
    pub bundle: &'a Bundle,
    /// Decoder layers to train, in the pruned model's numbering.
    pub layers: &'a [usize],
    /// Training samples.
    pub data: &'a dyn Source,
    /// Losses, optimiser, schedule and stages.
    pub settings: &'a Settings,
    /// Device of the trained layers.
    pub device: Device,
    /// Folder for the frozen part's outputs, checkpoints and metrics; kept between runs.
    pub work: &'a Path,
    /// Resumes from the newest checkpoint in `work`, if there is one.
    pub resume: bool,
    /// Limits on the run's use of the machine.
    pub limits: Limits,
    /// Processes that share the samples of every step; all of them read `work`.
    pub ranks: Option<&'a Ranks>,
    /// Cache of image features, shared by models with the same vision encoder.
    pub features: &'a Arc<FeatureCache>,
}

impl Request<'_> {
    /// Folder for files that only this process reads: `work` for the first process, a subfolder of `work` for each
    /// other one.
    pub fn own_work(&self) -> PathBuf {
        folder_of_rank(self.work, self.ranks.map_or(0, Ranks::rank))
    }
}

/// Result of a run.
pub struct FinetunedModel {
    /// The decoder with its trained weights; all other initializers are unchanged.
    pub decoder: Model,
    /// The connector with its adapters merged; `None` where it got none.
    pub connector: Option<Model>,
    /// Figures of the run.
    pub report: Report,
}

/// Report of a run: the content of the report file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Layers trained, in the pruned model's numbering.
    pub layers: Vec<usize>,
    /// File of the connector that was trained with them; absent where none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connector: Option<String>,
    /// Number of elements of the trained weights, or of the adapters.
    pub trained_parameters: u64,
    /// Number of samples trained on.
    pub samples: u64,
    /// Ids of the samples.
    #[serde(default)]
    pub sample_ids: Vec<String>,
    /// Number of samples that were drawn and not used, by reason.
    pub left_out: LeftOut,
    /// Number of optimiser steps.
    pub steps: u64,
    /// Step from which a resumed run continued; 0 for a new run.
    pub resumed_from_step: u64,
    /// Number of tokens over all epochs, image tokens included, padding excluded. When layers are trained one after the
    /// other: tokens per layer.
    pub tokens: u64,
    /// Number of answer tokens over all epochs; per layer when layers are trained one after the other.
    pub answer_tokens: u64,
    /// Peak learning rate; the best of the trials if there are any.
    pub learning_rate: f64,
    /// Trials of learning rates, in the order of the settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<RateTrial>,
    /// Results of the fit, per layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fitted: Vec<LayerFit>,
    /// Time of the fit in seconds.
    #[serde(default)]
    pub fit_s: f64,
    /// Loss of the first step; absent when the run ends with the fit.
    pub first_loss: Option<f64>,
    /// Loss of the last step; absent when the run ends with the fit.
    pub last_loss: Option<f64>,
    /// Time of all optimiser steps in seconds, including those before a resumption.
    pub train_s: f64,
    /// `tokens` divided by `train_s`.
    pub tokens_per_s: f64,
    /// Peak resident memory of the process in bytes.
    pub peak_memory_bytes: u64,
    /// The most bytes that tensors took on the GPU; absent in a run on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_gpu_memory_bytes: Option<u64>,
    /// Name of the metrics file (JSON lines) in the work folder.
    pub metrics_file: String,
}

impl Report {
    /// Version of the report's schema.
    pub const SCHEMA_VERSION: u32 = 1;
}
