//! Named recipes. Each is one row of settings that differ from the defaults.

use std::collections::BTreeMap;

use crate::base::{Error, Result};

use super::learning_rate::LearningRate;
use super::moved::refuse_moved;
use super::values::{Settings, Stage};
use crate::finetune::loss::LossKind;
use crate::finetune::optim::OptimizerKind;
use crate::finetune::optim::Schedule;

/// The default recipe.
pub const DEFAULT_RECIPE: &str = "best";

/// A stage of a recipe.
pub struct StageRow {
    /// Share of the steps.
    pub share: f64,
    /// Loss terms and their weights.
    pub losses: &'static [(LossKind, f64)],
}

/// Maximum number of tokens of a fit.
#[derive(Clone, Copy)]
pub enum FitTokens {
    /// Total number of tokens.
    All(u64),
    /// Tokens per input feature of the widest product.
    PerFeature(u32),
}

/// One recipe.
pub struct RecipeRow {
    /// Name in recipe files and for `--recipe`.
    pub name: &'static str,
    /// One-line description for help texts and documents.
    pub summary: &'static str,
    /// Number of tokens of the drawn samples to train on; `None` for all.
    pub step_tokens: Option<u64>,
    /// Number of epochs.
    pub epochs: u32,
    /// Samples per forward pass, and forward passes per optimiser step.
    pub batch: (u32, u32),
    /// Optimiser.
    pub optimizer: OptimizerKind,
    /// Peak learning rate in the optimiser's units; `None` for a search.
    pub learning_rate: Option<f64>,
    /// Learning rate schedule.
    pub schedule: Schedule,
    /// Share of the last steps over which the written weights are averaged.
    pub average_last: f64,
    /// Number of tokens of the fit before the first step; `None` for no fit.
    pub fit: Option<FitTokens>,
    /// Stages of the run; empty when the recipe ends with the fit.
    pub stages: &'static [StageRow],
}

/// All recipes.
pub const RECIPES: &[RecipeRow] = &[
    RecipeRow {
        name: "paper",
        summary: "cross-entropy of the answers alone, with all defaults (arXiv:2511.19676)",
        step_tokens: None,
        epochs: 1,
        batch: (16, 2),
        optimizer: OptimizerKind::AdamW,
        learning_rate: Some(1e-5),
        schedule: Schedule::Cosine,
        average_last: 0.0,
        fit: None,
        stages: &[StageRow { share: 1.0, losses: &[(LossKind::Ce, 1.0)] }],
    },
    RecipeRow {
        name: "fast",
        summary: "one finetuned layer after the other, on 24,576 tokens: its last product fitted to the dense model's stream by \
                  least squares, then a pass of Muon's steps on the distance to that stream",
        step_tokens: Some(24 << 10),
        epochs: 1,
        batch: (24, 1),
        optimizer: OptimizerKind::Muon,
        learning_rate: Some(1e-2),
        schedule: Schedule::ConstantWithWarmup,
        average_last: 0.0,
        fit: Some(FitTokens::All(16 << 10)),
        stages: &[StageRow { share: 1.0, losses: &[(LossKind::Anchor, 1.0)] }],
    },
    RecipeRow {
        name: "best",
        summary: "the last products of attention and MLP of each finetuned layer fitted as in `fast`, on all samples, then two passes of cross-entropy and the dense model's answers in \
                  equal parts at one rate; what it gives is the mean of the weights over the second",
        step_tokens: None,
        epochs: 2,
        batch: (16, 2),
        optimizer: OptimizerKind::AdamW,
        learning_rate: None,
        schedule: Schedule::ConstantWithWarmup,
        average_last: 0.5,
        fit: Some(FitTokens::PerFeature(128)),
        stages: &[StageRow { share: 1.0, losses: &[(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)] }],
    },
];

impl RecipeRow {
    /// Finds a recipe by its name.
    ///
    /// Errors: `Error::Invalid` with the known names.
    pub fn named(name: &str) -> Result<&'static RecipeRow> {
        RECIPES.iter().find(|row| row.name == name).ok_or_else(|| {
            let names: Vec<_> = RECIPES.iter().map(|row| row.name).collect();
            Error::invalid(format!("recipe `{name}`"), "there is none of that name")
                .remedy(format!("use one of {}", names.join(", ")))
        })
    }

    /// True when the recipe needs the dense model.
    pub fn needs_teacher(&self) -> bool {
        let mut losses = self.stages.iter().flat_map(|stage| stage.losses);
        self.fit.is_some() || losses.any(|(kind, _)| kind.needs_teacher())
    }

    /// Settings of the recipe. Values that the recipe does not set have their defaults.
    pub fn settings(&self) -> Settings {
        let stages = self.stages.iter().map(|stage| {
            let losses = stage.losses.iter().copied().collect::<BTreeMap<_, _>>();
            Stage { share: stage.share, losses }
        });
        Settings::default().with(|settings| {
            settings.data.step_tokens = self.step_tokens;
            settings.schedule.epochs = self.epochs;
            (settings.batch.size, settings.batch.accumulation_steps) = self.batch;
            settings.optimizer.kind = self.optimizer;
            settings.optimizer.learning_rate = self.learning_rate.map_or(LearningRate::AUTO, LearningRate::One);
            settings.schedule.kind = self.schedule;
            settings.optimizer.average_last = self.average_last;
            settings.fit.enabled = self.fit.is_some();
            match self.fit {
                Some(FitTokens::PerFeature(tokens)) => settings.fit.tokens_per_feature = tokens,
                Some(FitTokens::All(tokens)) => settings.fit.tokens = Some(tokens),
                None => {}
            }
            settings.stages = stages.collect();
        })
    }

    /// The recipe's settings, overridden by TOML tables; later tables take precedence.
    ///
    /// Errors: `Error::Invalid` for an unknown setting, a value of the wrong type, or a key of the flat layout.
    pub fn settings_with(&self, tables: impl IntoIterator<Item = toml::Table>) -> Result<Settings> {
        self.settings().changed_by("finetune settings", tables)
    }
}

impl Settings {
    /// These settings, overridden by TOML tables; later tables take precedence. `subject` names the source of the
    /// settings in error messages.
    ///
    /// Errors: `Error::Invalid` for an unknown setting, a value of the wrong type, or a key of the flat layout.
    pub fn changed_by(self, subject: &str, tables: impl IntoIterator<Item = toml::Table>) -> Result<Settings> {
        let wrong = |e: String| Error::invalid(subject, e.trim_end());
        let mut all = toml::Table::try_from(self).map_err(|e| wrong(e.to_string()))?;
        for table in tables {
            refuse_moved(&table)?;
            put_into(&mut all, table);
        }
        all.try_into().map_err(|e: toml::de::Error| wrong(e.to_string()))
    }
}

/// Merges `table` into `all` recursively. Lists are replaced as a whole, and so are stages with their loss terms.
fn put_into(all: &mut toml::Table, table: toml::Table) {
    for (key, value) in table {
        match (all.get_mut(&key), value) {
            (Some(toml::Value::Table(own)), toml::Value::Table(new)) => put_into(own, new),
            (_, value) => {
                all.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_valid_and_paper_is_the_defaults() {
        for row in RECIPES {
            row.settings().check().unwrap();
            assert_eq!(row.settings_with([]).unwrap(), row.settings(), "{}", row.name);
        }
        assert_eq!(RecipeRow::named("paper").unwrap().settings(), Settings::default());
        assert_eq!(RecipeRow::named("fast").unwrap().settings().peak_rate(), 1e-2);
        assert_eq!(RecipeRow::named("best").unwrap().settings().optimizer.learning_rate, LearningRate::AUTO);
        assert!(RecipeRow::named(DEFAULT_RECIPE).is_ok());
        let error = RecipeRow::named("magic").err().unwrap().to_string();
        assert!(RECIPES.iter().all(|row| error.contains(row.name)), "{error}");
    }

    #[test]
    fn user_settings_override_the_recipe() {
        let best = RecipeRow::named("best").unwrap();
        let with = |texts: &[&str]| best.settings_with(texts.iter().map(|text| text.parse().unwrap()));
        let settings = with(&["optimizer = { learning_rate = 1e-3, beta1 = 0.8 }\n[schedule]\nepochs = 3"]).unwrap();
        assert_eq!((best.settings().schedule.epochs, settings.schedule.epochs), (2, 3));
        assert_eq!((settings.peak_rate(), settings.optimizer.average_last), (1e-3, 0.5));
        assert_eq!(settings.stages, best.settings().stages);
        let settings = with(&["[optimizer]\nbeta1 = 0.8\nbeta2 = 0.9", "[optimizer]\nbeta1 = 0.7"]).unwrap();
        assert_eq!((settings.optimizer.beta1, settings.optimizer.beta2), (0.7, 0.9));
        let settings = with(&["[[stage]]\nlosses = { ce = 0.5 }"]).unwrap();
        assert_eq!(settings.stages, Stage::only([(LossKind::Ce, 0.5)]));
        settings.check().unwrap();
        for (text, want) in [("[optimizer]\nlearning_rats = 1", "learning_rats"), ("epochs = 3", "`[schedule] epochs`")]
        {
            let error = with(&[text]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
