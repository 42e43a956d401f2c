//! Parts of a run plan as its table and its JSON show them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// In which order layers are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// All trained layers at once.
    Together,
    /// One after the other, each on the stream that those before it give in the end.
    LayerByLayer,
    /// The run ends with the fit.
    FitOnly,
}

/// One stage of the steps.
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
    /// Rates that may be tried.
    pub learning_rates: Vec<f64>,
    /// Most optimiser steps of each trial, over all layers.
    pub steps: u64,
    /// Steps' worth of samples that are held back; 0 where a trial is a whole pass.
    pub held_out_steps: u64,
}

/// The fit before the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedFit {
    /// Layers that are fitted.
    pub layers: u64,
    /// Products that are fitted.
    pub products: u64,
    /// Columns of the widest normal matrix.
    pub widest: u64,
    /// Most tokens that it looks at.
    pub tokens: u64,
}

/// What the dense model or the frozen layers are to give.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedTarget {
    /// Its name: a stream, answers, or the frozen layers' output.
    pub what: String,
    /// Loss terms, or `fit`, or `steps`, that read it.
    pub read_by: Vec<String>,
    /// Tokens that it is made for.
    pub tokens: u64,
    /// Bytes of all of it.
    pub bytes: u64,
    /// True where it is written to the work folder; else it is made when it is read.
    pub written: bool,
}

/// The samples; tokens are estimated from the first ones before the data has been read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedData {
    /// Samples that are trained on.
    pub samples: u64,
    /// Tokens of all samples, image tokens included.
    pub tokens: u64,
    /// Tokens that losses on answers count.
    pub answer_tokens: u64,
    /// Tokens of the longest sample.
    pub longest_tokens: u64,
    /// True where the figures come from the first samples alone.
    pub estimated: bool,
}

/// Where bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Memory of the device that trains.
    Memory,
    /// The work folder.
    Disk,
}

/// When bytes are held.
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
    /// What takes them.
    pub what: String,
    /// When they are held.
    pub phase: Phase,
    /// Where they lie.
    pub place: Place,
    /// Bytes of the item.
    pub bytes: u64,
    /// How the figure comes about.
    pub formula: String,
}
