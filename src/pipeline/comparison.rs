//! What healed models are compared with: the dense model finetuned on the same samples, data held back from training, and
//! data of other kinds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::{Error, Result};
use crate::data::{Benchmark, DataPart, SEQUENCE_LENGTH};
use crate::eval::benchmark_name;
use crate::finetune::Settings;

use super::steps::{EvalSettings, TextSettings};

/// The dense model, finetuned on the samples that pruned models are healed on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DenseSection {
    /// False leaves it out: healed models are then compared with the dense model as it came alone.
    pub enabled: bool,
    /// A named recipe; by default the one of healing, or `paper` where that has no loss on answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Settings in place of the recipe's and of those for healing.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, Value>,
}

impl Default for DenseSection {
    fn default() -> Self {
        DenseSection { enabled: true, recipe: None, settings: BTreeMap::new() }
    }
}

/// How the dense model is finetuned beside healing by some recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseRecipe {
    /// Name of its recipe.
    pub name: String,
    /// Its settings: the samples, their order and their number are those of healing.
    pub settings: Settings,
}

impl DenseSection {
    /// The recipe beside healing by the recipe `healing`; `with` gives the settings of a recipe as the file has them.
    ///
    /// Errors: `Error::Invalid` for a recipe or setting that is not known or out of range, and for a recipe that teaches a
    /// dense model nothing.
    pub fn beside(
        &self,
        healing: &str,
        settings: &Settings,
        with: impl Fn(&str) -> Result<Settings>,
    ) -> Result<DenseRecipe> {
        let on_answers = |settings: &Settings| {
            let losses = settings.losses();
            losses.iter().any(|(kind, weight)| *weight > 0.0 && kind.looks_at_answers())
        };
        let own = if on_answers(settings) { healing } else { "paper" };
        let name = self.recipe.as_deref().unwrap_or(own).to_string();
        let wrong = |e: String| Error::invalid("finetune.dense.settings", e.trim_end());
        let own = toml::Table::try_from(&self.settings).map_err(|e| wrong(e.to_string()))?;
        let found = with(&name)?.changed_by("finetune.dense.settings", [own])?;
        if !on_answers(&found) {
            let problem = "has no loss on answers, and the dense model has nothing else to learn";
            return Err(Error::invalid(format!("finetune.dense: recipe `{name}`"), problem)
                .remedy("take a recipe with `ce`, such as `paper`, or set `enabled = false`"));
        }
        let (data, seed) = (settings.data.clone(), settings.seed);
        // Nothing was dropped, so there is no gap that a fit could close.
        let settings = found.with(|found| {
            (found.data.share, found.data.step_tokens, found.seed) = (data.share, data.step_tokens, seed);
            found.fit.enabled = false;
        });
        settings.check()?;
        Ok(DenseRecipe { name, settings })
    }
}

impl DenseRecipe {
    /// Name of a row in the table, of a model healed by `healing`; `layers` where not all of them are trained.
    pub fn label(&self, healing: &str, layers: Option<usize>) -> String {
        let by = if self.name == healing { String::new() } else { format!(" by {}", self.name) };
        let part = match layers {
            Some(1) => " (1 layer)".to_string(),
            Some(layers) => format!(" ({layers} layers)"),
            None => String::new(),
        };
        format!("dense, finetuned{by}{part}")
    }
}

/// Data of another kind than the models are healed on: a benchmark in VLMEvalKit's TSV format, or running text,
/// conversations or ready tensors, of which the perplexity is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OtherData {
    /// The file, folder or pattern.
    pub data: PathBuf,
    /// Name of the column; the file's name by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Take only this number of questions or sequences, from the first on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Tokens in each sequence of running text.
    #[serde(default = "sequence_length")]
    pub sequence_length: usize,
}

fn sequence_length() -> usize {
    SEQUENCE_LENGTH
}

/// A model's figure on data of another kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OtherScore {
    /// Name of the data.
    pub name: String,
    /// What was measured.
    pub measure: Measure,
    /// The score, 0 to 1, or the perplexity.
    pub value: f64,
    /// Over the dense model's: the score, or the dense model's perplexity over this one; 1 where nothing is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<f64>,
}

/// A measure of a model on data of another kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The benchmark's score; more is better.
    Score,
    /// Perplexity of the text or of the answers; less is better.
    Perplexity,
}

impl OtherData {
    /// Name of the column.
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| benchmark_name(&self.data))
    }

    /// How a benchmark is asked.
    pub fn eval_settings(&self, settings: &EvalSettings) -> EvalSettings {
        EvalSettings { limit: self.limit, ..settings.clone() }
    }

    /// How text is read.
    pub fn text_settings(&self) -> TextSettings {
        let OtherData { limit, sequence_length, .. } = *self;
        TextSettings { limit, sequence_length, ..TextSettings::default() }
    }

    /// What is measured.
    pub fn measure(&self) -> Measure {
        if Benchmark::is_one(&self.data) { Measure::Score } else { Measure::Perplexity }
    }
}

impl OtherScore {
    /// Head of the column.
    pub fn head(&self) -> String {
        match self.measure {
            Measure::Score => format!("{} %", self.name),
            Measure::Perplexity => format!("{} perplexity", self.name),
        }
    }

    /// The figure as text.
    pub fn text(&self, value: f64) -> String {
        match self.measure {
            Measure::Score => format!("{:.1}", 100.0 * value),
            Measure::Perplexity => format!("{value:.2}"),
        }
    }

    /// The same with what is kept of the dense model's figure.
    pub fn against(self, dense: f64) -> Self {
        let kept = match self.measure {
            Measure::Score => (dense > 0.0).then(|| self.value / dense),
            Measure::Perplexity => Some(dense / self.value),
        };
        OtherScore { kept, ..self }
    }
}

/// Errors: `Error::Invalid` when two files would have one name, or one is the test of another column.
pub fn check_names(benchmarks: &[PathBuf], other: &[OtherData]) -> Result<()> {
    let mut names: Vec<String> = benchmarks.iter().map(|path| benchmark_name(path)).collect();
    for data in other {
        let name = data.name();
        if names.contains(&name) {
            return Err(Error::invalid("eval", format!("two files are called `{name}`"))
                .remedy("give one of them another `name` under `[[eval.other]]`"));
        }
        names.push(name);
    }
    Ok(())
}

/// Errors: `Error::Invalid` for a file that is not there. Nothing of it is read.
pub fn check_there(benchmarks: &[PathBuf], other: &[OtherData]) -> Result<()> {
    // Other data may be a pattern, which names no one file.
    let named = other.iter().map(|other| &other.data).filter(|path| !path.to_string_lossy().contains('*'));
    match benchmarks.iter().chain(named).find(|path| !path.exists()) {
        Some(path) => Err(Error::invalid(format!("`{}`", path.display()), "does not exist")
            .remedy("correct the path under `[eval]`; paths are relative to the recipe's folder")),
        None => Ok(()),
    }
}

/// The part of the finetuning data that a file trains on, and the part that is held back, where there is one.
///
/// Errors: `Error::Invalid` for a fraction out of range.
pub fn parts(held_back: f64) -> Result<(DataPart, Option<DataPart>)> {
    match held_back {
        0.0 => Ok((DataPart::All, None)),
        part if part > 0.0 && part < 1.0 => Ok((DataPart::Train(part), Some(DataPart::HeldBack(part)))),
        other => Err(Error::invalid("finetune.held_back", format!("is {other}, must be at least 0 and below 1"))
            .remedy("write `held_back = 0.1`, for instance")),
    }
}
