//! Totals of a run so far: fits, trials of learning rates, and sums over its steps.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the fit of one layer did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerFit {
    /// The layer, as the pruned model counts.
    pub layer: usize,
    /// The initializers that were fitted, in their order; none where the layer has no product to fit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<String>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Mean over the tokens of the squared distance to the dense stream, relative to that stream's squared length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance_before: Option<f64>,
    /// The same distance after the fit; absent where it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance_after: Option<f64>,
    /// The ridge that was chosen for each of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ridges: Vec<f64>,
    /// Tokens that were looked at.
    #[serde(default)]
    pub tokens: u64,
    /// Those of the samples that the ridge was chosen on; 0 where there were too few samples, and a fixed ridge was taken.
    #[serde(default)]
    pub held_out_tokens: u64,
}

/// One candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RateTrial {
    /// The peak learning rate that was tried.
    pub learning_rate: f64,
    /// Absent where the trial diverged. After a short trial (`auto`): cross-entropy of the answers of the samples that were
    /// held back. After a whole pass: mean over the last quarter of the pass: of the cross-entropy where the recipe has it, of the whole loss otherwise.
    /// Of a recipe that never looks at answers, their cross-entropy with the weights behind the pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// What was no finite number, where the trial diverged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diverged: Option<String>,
    /// Optimiser steps of the trial; 0 where it diverged.
    #[serde(default)]
    pub steps: u64,
    /// Samples that no trial trains on and that the loss is of; 0 for a whole pass, or where there was nothing to hold back.
    #[serde(default)]
    pub held_out_samples: u64,
}

/// The rate with the lowest loss, the first of equal ones. Trials that diverged are ignored.
pub fn best(trials: &[RateTrial]) -> Option<f64> {
    let judged = trials.iter().filter_map(|trial| Some((trial.learning_rate, trial.loss?)));
    judged.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(rate, _)| rate)
}

/// Results of the work before the first step, and sums over the optimiser steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    #[serde(default)]
    pub fitted: Vec<LayerFit>,
    #[serde(default)]
    pub fit_seconds: f64,
    #[serde(default)]
    pub trials: Vec<RateTrial>,
    pub tokens: u64,
    pub answer_tokens: u64,
    pub first_loss: Option<f64>,
    pub last_loss: Option<f64>,
    pub train_seconds: f64,
}
