//! Named recipes of healing: one row each, as settings that differ from the defaults.

use std::collections::BTreeMap;

use crate::base::{Error, Result};

use super::values::{Settings, Stage};
use crate::finetune::loss::LossKind;
use crate::finetune::optim::OptimizerKind;
use crate::finetune::optim::Schedule;

/// The recipe that is used when none is named.
pub const DEFAULT_RECIPE: &str = "best";

/// A part of a run.
pub struct StageRow {
    /// Part of the steps.
    pub share: f64,
    /// Losses with their weights.
    pub losses: &'static [(LossKind, f64)],
}

/// Most tokens of a fit.
#[derive(Clone, Copy)]
pub enum FitTokens {
    /// This many.
    All(u64),
    /// This many for each number that a product reads.
    PerFeature(u32),
}

/// One recipe.
pub struct RecipeRow {
    /// Name in recipes and for `--recipe`.
    pub name: &'static str,
    /// One line for help texts and documents.
    pub summary: &'static str,
    /// Tokens of the drawn samples that are trained on; None for all.
    pub step_tokens: Option<u64>,
    /// Passes over them.
    pub epochs: u32,
    /// Samples in one forward pass, and forward passes per optimiser step.
    pub batch: (u32, u32),
    /// Update rule.
    pub optimizer: OptimizerKind,
    /// Peak learning rate, in the measure of the optimiser.
    pub learning_rate: f64,
    /// Course of the learning rate.
    pub schedule: Schedule,
    /// Part of the steps, the last ones, whose mean is given.
    pub average_last: f64,
    /// How many tokens a fit before the first step looks at; None for no fit.
    pub fit: Option<FitTokens>,
    /// None for a recipe that ends with the fit.
    pub stages: &'static [StageRow],
}

/// Every recipe there is.
pub const RECIPES: &[RecipeRow] = &[
    RecipeRow {
        name: "paper",
        summary: "cross-entropy of the answers alone, with all defaults (arXiv:2511.19676)",
        step_tokens: None,
        epochs: 1,
        batch: (16, 2),
        optimizer: OptimizerKind::AdamW,
        learning_rate: 1e-5,
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
        learning_rate: 1e-2,
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
        learning_rate: 1e-5,
        schedule: Schedule::ConstantWithWarmup,
        average_last: 0.5,
        fit: Some(FitTokens::PerFeature(128)),
        stages: &[StageRow { share: 1.0, losses: &[(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)] }],
    },
];

impl RecipeRow {
    /// The row of a name.
    ///
    /// Errors: `Error::Invalid` that lists the names there are.
    pub fn named(name: &str) -> Result<&'static RecipeRow> {
        RECIPES.iter().find(|row| row.name == name).ok_or_else(|| {
            let names: Vec<_> = RECIPES.iter().map(|row| row.name).collect();
            Error::invalid(format!("recipe `{name}`"), "there is none of that name")
                .remedy(format!("use one of {}", names.join(", ")))
        })
    }

    /// True when it wants the dense model.
    pub fn needs_teacher(&self) -> bool {
        let mut losses = self.stages.iter().flat_map(|stage| stage.losses);
        self.fit.is_some() || losses.any(|(kind, _)| kind.needs_teacher())
    }

    /// The recipe as settings; everything that it does not speak of is the default.
    pub fn settings(&self) -> Settings {
        let defaults = Settings::default();
        let losses = |stage: &StageRow| stage.losses.iter().copied().collect::<BTreeMap<_, _>>();
        let (losses, stages) = match self.stages {
            [] => (BTreeMap::new(), Vec::new()),
            [only] => (losses(only), Vec::new()),
            stages => {
                let stages = stages.iter().map(|stage| Stage { share: stage.share, losses: losses(stage) });
                (BTreeMap::new(), stages.collect())
            }
        };
        Settings {
            step_tokens: self.step_tokens,
            epochs: self.epochs,
            batch_size: self.batch.0,
            accumulation_steps: self.batch.1,
            optimizer: self.optimizer,
            learning_rate: self.learning_rate,
            schedule: self.schedule,
            average_last: self.average_last,
            fit: self.fit.is_some(),
            fit_tokens_per_feature: match self.fit {
                Some(FitTokens::PerFeature(tokens)) => tokens,
                _ => defaults.fit_tokens_per_feature,
            },
            fit_tokens: match self.fit {
                Some(FitTokens::All(tokens)) => Some(tokens),
                _ => None,
            },
            losses,
            stages,
            ..defaults
        }
    }

    /// The recipe's settings with those of a TOML table in place of its own.
    ///
    /// Errors: `Error::Invalid` for a setting that is not known or of the wrong type.
    pub fn settings_with(&self, table: toml::Table) -> Result<Settings> {
        let wrong = |e: String| Error::invalid("finetune settings", e.trim_end());
        let own = self.settings();
        let mut all = toml::Table::try_from(&own).map_err(|e| wrong(e.to_string()))?;
        // Losses and stages stand for one another: who names one means it in place of the other.
        if table.contains_key("losses") && !table.contains_key("stages") {
            all.remove("stages");
        }
        if table.contains_key("stages") && !table.contains_key("losses") {
            all.insert("losses".to_string(), toml::Value::Table(toml::Table::new()));
        }
        all.extend(table);
        all.try_into().map_err(|e: toml::de::Error| wrong(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_valid_and_paper_is_the_defaults() {
        for row in RECIPES {
            row.settings().check().unwrap();
            assert_eq!(row.settings_with(toml::Table::new()).unwrap(), row.settings(), "{}", row.name);
        }
        assert_eq!(RecipeRow::named("paper").unwrap().settings(), Settings::default());
        assert_eq!(RecipeRow::named("fast").unwrap().settings().learning_rate, 1e-2);
        assert!(RecipeRow::named(DEFAULT_RECIPE).is_ok());
        let error = RecipeRow::named("magic").err().unwrap().to_string();
        assert!(RECIPES.iter().all(|row| error.contains(row.name)), "{error}");
    }

    #[test]
    fn what_a_user_sets_wins_over_the_recipe() {
        let best = RecipeRow::named("best").unwrap();
        let with = |text: &str| best.settings_with(text.parse().unwrap());
        let settings = with("learning_rate = 1e-3\nepochs = 3").unwrap();
        assert_eq!((best.settings().epochs, settings.learning_rate, settings.epochs), (2, 1e-3, 3));
        assert_eq!(settings.stages, best.settings().stages);
        let settings = with("losses = { ce = 0.5 }").unwrap();
        assert_eq!((settings.weight(LossKind::Ce), settings.stages.len()), (0.5, 0));
        settings.check().unwrap();
        assert!(with("learning_rats = 1").unwrap_err().to_string().contains("learning_rats"));
    }
}
