//! What `eval` writes: `report.json`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::Provenance;

use super::stats::Interval;

/// The content of `report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalReport {
    #[serde(flatten)]
    pub provenance: Provenance,
    pub model: ModelScores,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<ModelScores>,
    /// What the model keeps of the baseline's scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

impl EvalReport {
    /// Version of the schema of `report.json`.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// A model's scores on a benchmark. Scores are from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelScores {
    pub model: String,
    pub benchmark: String,
    pub questions: usize,
    pub groups: Vec<GroupScore>,
    /// Mean of the groups' scores: every group weighs the same.
    pub mean_of_groups: f64,
    /// Mean over all questions: every question weighs the same.
    pub mean_of_questions: f64,
    pub timing: EvalTiming,
    pub answers: Vec<Answer>,
}

/// The questions of one category.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupScore {
    pub group: String,
    pub questions: usize,
    /// Mean score, 0 to 1.
    pub score: f64,
    /// Questions by the metric that judged them.
    pub metrics: BTreeMap<String, usize>,
    /// For the group's yes-or-no questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yes_no: Option<YesNoScores>,
}

/// POPE's figures with yes as the positive class, 0 to 1; an answer that says neither counts as no.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct YesNoScores {
    pub questions: usize,
    pub accuracy: f64,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    /// Share of predictions that say yes.
    pub yes_ratio: f64,
}

/// One question's outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Answer {
    /// The `index` column.
    pub index: String,
    pub group: String,
    pub metric: String,
    pub prediction: String,
    /// 0 to 1.
    pub score: f64,
}

/// What a run took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalTiming {
    pub seconds: f64,
    pub questions_per_second: f64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
}

/// Scores over the baseline's, with 95% paired bootstrap intervals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Retention {
    pub groups: Vec<GroupRetention>,
    /// Of the mean of the groups' scores; questions are drawn within each group.
    pub mean_of_groups: Option<Interval>,
    /// Of the mean over all questions.
    pub mean_of_questions: Option<Interval>,
    pub resamples: usize,
    pub seed: u64,
}

/// One group's retention; `null` where the baseline scores nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupRetention {
    pub group: String,
    pub retention: Option<Interval>,
}
