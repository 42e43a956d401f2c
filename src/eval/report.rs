//! `report.json`, the result of `eval`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::Provenance;
use crate::runtime::Profile;

use super::stats::{Difference, Interval};

/// The content of `report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Rows of the benchmark that are not asked because they have no picture, as in VLMEvalKit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rows_without_picture: usize,
    /// Scores of the model.
    pub model: ModelScores,
    /// Scores of the model that it is compared with, on the same questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<ModelScores>,
    /// Reason why the likelihood of the right answers was not measured; absent where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likelihood_not_measured: Option<String>,
    /// The model's scores against the baseline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl EvalReport {
    /// Version of the schema of `report.json`.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// A model's scores on a benchmark. Scores are from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelScores {
    /// Path of the model as the user gave it.
    pub model: String,
    /// Name of the benchmark.
    pub benchmark: String,
    /// Questions that were asked.
    pub questions: usize,
    /// The metric of a benchmark that is known by name; absent where each row names its own metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// The headline: the score that the benchmark's metric computes from all answers, or the mean of the groups' scores.
    pub score: f64,
    /// Further figures of the metric; the names give the units.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
    /// Questions by `category`.
    pub groups: Vec<GroupScore>,
    /// Questions by the other columns that group them, where there are any (`l2-category`, `split`), and grades by
    /// `component_type`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub by_column: BTreeMap<String, Vec<GroupScore>>,
    /// Mean of the groups' scores: every group weighs the same.
    pub mean_of_groups: f64,
    /// Mean over all questions: every question weighs the same.
    pub mean_of_questions: f64,
    /// Time and tokens of all questions.
    pub timing: EvalTiming,
    /// How likely the right answers are; absent where it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likelihood: Option<Likelihood>,
    /// One entry per question, in the order of the benchmark; empty where only the likelihood was asked for.
    pub answers: Vec<Answer>,
}

/// Log-likelihoods of the right answers, given the same prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Likelihood {
    /// Mean over all answer tokens, in nats, at most 0.
    pub mean_log_likelihood: f64,
    /// Answer tokens of all questions, those that close an answer among them.
    pub answer_tokens: u64,
    /// One entry per question, in the order of the benchmark.
    pub answers: Vec<QuestionLikelihood>,
}

/// One question's part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct QuestionLikelihood {
    /// The `index` column.
    pub index: String,
    /// Sum over the answer's tokens, in nats.
    pub log_likelihood: f64,
    /// Tokens of the answer.
    pub tokens: u64,
}

/// The questions of one category.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupScore {
    /// The category's name.
    pub group: String,
    /// Questions in it.
    pub questions: usize,
    /// The metric's score of the group's answers, 0 to 1; the mean of their scores where several metrics judged them.
    pub score: f64,
    /// Questions by the metric that judged them.
    pub metrics: BTreeMap<String, usize>,
    /// Further figures of the group's metric; where several judged, those of the yes-or-no questions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
}

/// One question's outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Answer {
    /// The `index` column.
    pub index: String,
    /// Category of the question; several are separated by commas.
    pub group: String,
    /// Name of the metric that judged the answer.
    pub metric: String,
    /// The model's text.
    pub prediction: String,
    /// Score of the answer alone, 0 to 1.
    pub score: f64,
    /// What the judge replied, where a language model judges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// The judge's reply could not be read, so that the answer counts nowhere.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unjudged: bool,
    /// The right answer is yes; absent where it is neither yes nor no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truth: Option<bool>,
    /// Answers of one unit count together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Answers of one stratum are averaged before the strata are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratum: Option<String>,
}

impl Answer {
    /// The groups in which the answer counts. POPE's questions count in every category of a comma-separated list.
    pub fn groups(&self) -> impl Iterator<Item = &str> {
        self.groups_of(&self.group)
    }

    /// The groups in a cell of a column, for this answer.
    pub(super) fn groups_of<'a>(&self, cell: &'a str) -> impl Iterator<Item = &'a str> + use<'a> {
        let listed = self.metric == "yes_no_f1";
        cell.split(move |c| listed && c == ',')
    }

    /// Moves the answer to one group, in which it counts as many times as it had groups.
    pub fn regroup(&mut self, group: &str) {
        self.group = vec![group; self.groups().count()].join(",");
    }
}

/// Time and tokens of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalTiming {
    /// Wall-clock time of all questions, loading excluded.
    pub seconds: f64,
    /// Questions over `seconds`.
    pub questions_per_second: f64,
    /// Tokens of all prompts, image tokens included.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub generated_tokens: u64,
    /// Where the time was spent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
}

/// Scores against the baseline's, with 95% paired bootstrap intervals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Retention {
    /// One entry per group, in the order of `ModelScores::groups`.
    pub groups: Vec<GroupRetention>,
    /// Of the headline score.
    pub score: Option<Interval>,
    /// The headline score less the baseline's, from the same draws.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<Difference>,
    /// Of the mean of the groups' scores; questions are drawn within each group.
    pub mean_of_groups: Option<Interval>,
    /// Of the mean over all questions.
    pub mean_of_questions: Option<Interval>,
    /// Of the mean likelihood per answer token: `exp` of the difference of the mean log-likelihoods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likelihood: Option<Interval>,
    /// Bootstrap draws behind each interval.
    pub resamples: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// One group's retention; `null` where the baseline scores nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupRetention {
    /// The category's name.
    pub group: String,
    /// Score over the baseline's score.
    pub retention: Option<Interval>,
    /// Score less the baseline's, from the same draws.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<Difference>,
}
