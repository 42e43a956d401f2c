//! Parts of a run plan, as its table and its JSON report them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Names of items that errors refer to.
pub(super) const PROCESS: &str = "process";
pub(super) const ONNX_RUNTIME: &str = "ONNX Runtime's weights";
/// Name of the dense model's answers among the targets.
pub(super) const ANSWERS: &str = "dense model's answers";

/// Order in which layers are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// All trained layers at once.
    Together,
    /// One after the other, each on the output stream of the finished layers before it.
    LayerByLayer,
    /// None; the run ends with the fit.
    FitOnly,
}

/// The outputs of the frozen layers and of the dense model that are on disk for all samples. The others are computed for the
/// next steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptRows {
    All,
    /// Those of the dense model, which cost most to compute.
    Dense,
    Nothing,
}

/// A stage of the optimiser steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedStage {
    /// Optimiser steps.
    pub steps: u64,
    /// Loss terms and their weights.
    pub losses: BTreeMap<String, f64>,
}

/// Trials of learning rates before the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedSearch {
    /// Candidate learning rates.
    pub learning_rates: Vec<f64>,
    /// Maximum number of optimiser steps of each trial, over all layers.
    pub steps: u64,
    /// Number of steps whose samples are held out; 0 when a trial is a full pass.
    pub held_out_steps: u64,
}

/// The fit before the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedFit {
    /// Number of fitted layers.
    pub layers: u64,
    /// Number of fitted products.
    pub products: u64,
    /// Columns of the widest normal matrix.
    pub widest: u64,
    /// Maximum number of tokens that the fit uses.
    pub tokens: u64,
    /// Number of elements of the fitted weights.
    #[serde(default)]
    pub elements: u64,
    /// Number of layers whose targets the dense model computes for the fit; it writes the others for the losses.
    #[serde(default)]
    pub computed: u64,
    /// Number of layers whose targets the dense model computes together. When it is smaller than `computed`, the dense
    /// model is loaded again during the fit.
    #[serde(default)]
    pub together: u64,
}

/// An output of the dense model or of the frozen layers that the run needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedTarget {
    /// Name of the output: a stream, the dense model's answers, or the frozen layers' output.
    pub what: String,
    /// Loss terms, `fit` or `steps` that read it.
    pub read_by: Vec<String>,
    /// Number of tokens that it is computed for.
    pub tokens: u64,
    /// Bytes for all these tokens.
    pub bytes: u64,
    /// True when it is written to the work folder; otherwise it is computed when it is read.
    pub written: bool,
}

/// A connector that is a graph of its own, in a run with adapters on all layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedConnector {
    /// Its file in the model folder.
    pub file: String,
    /// Number of its matrices with adapters.
    pub matrices: u64,
    /// Number of elements of these adapters, which are among the trained parameters.
    pub parameters: u64,
    /// Why it gets no adapters; absent where it gets them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

impl PlannedConnector {
    /// What becomes of it, in a line.
    pub fn line(&self) -> String {
        match &self.left_out {
            Some(reason) => format!("the connector `{}` gets no adapters: {reason}", self.file),
            None => {
                let noun = if self.matrices == 1 { "matrix" } else { "matrices" };
                format!("the connector `{}` gets adapters on {} {noun}", self.file, self.matrices)
            }
        }
    }
}

/// Size of the training data. Token counts are estimated from the first samples until the data has been read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedData {
    /// Number of training samples.
    pub samples: u64,
    /// Tokens of all samples, image tokens included.
    pub tokens: u64,
    /// Number of answer tokens, over which losses on answers are averaged.
    pub answer_tokens: u64,
    /// Largest share of answer tokens in a sample, from 0 to 1.
    #[serde(default)]
    pub answer_share: f64,
    /// Tokens of the longest sample.
    pub longest_tokens: u64,
    /// Image tokens of all samples.
    #[serde(default)]
    pub image_tokens: u64,
    /// Largest share of image tokens in a sample, from 0 to 1.
    #[serde(default)]
    pub image_share: f64,
    /// True when the figures are estimated from the first samples.
    pub estimated: bool,
}

/// Where bytes are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Memory of the training device.
    Memory,
    /// Host memory of a run on a GPU.
    Host,
    /// The work folder.
    Disk,
}

/// Phase of a run in which bytes are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// ONNX Runtime runs the frozen layers or the dense model.
    Teacher,
    /// The closed-form fit before the steps.
    Fit,
    /// Optimiser steps.
    Steps,
}

/// One item of memory or disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedBytes {
    /// Name of the item.
    pub what: String,
    /// Phase in which it is held.
    pub phase: Phase,
    /// Where it is held.
    pub place: Place,
    /// Bytes of the item.
    pub bytes: u64,
    /// Formula or explanation of the figure.
    pub formula: String,
}
