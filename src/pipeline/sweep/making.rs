//! The first half of a sweep: makes every model and measures its loss on what is held back. No benchmark and no data of
//! another kind is opened here, so nothing is chosen with them.

use std::fmt;

use crate::base::{Result, sha256_json};
use crate::finetune::Settings;
use crate::method::select::Strategy;
use crate::method::{LayerRole, Part, Plan};

use super::super::comparison::parts;
use super::super::stages::{Healing, Stages};
use super::super::steps::{Drop, HowMany, PlanSettings, TextSettings, Trained};
use super::super::store::Finished;
use super::recipe::Sweep;

/// One combination, a row of the table.
pub struct Setting<'s> {
    pub drop_ratio: f64,
    pub strategy: &'s str,
    pub recipe: &'s str,
}

impl fmt::Display for Setting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} at {:.0}%, {}", self.strategy, 100.0 * self.drop_ratio, self.recipe)
    }
}

/// The layers that a model trains.
enum Layers {
    /// Those of a plan, with the digest of its file.
    Planned(Box<Plan>, String),
    /// Those listed; all without a list.
    Listed(Option<Vec<usize>>),
}

/// A trained model, and what it takes to make it again.
pub struct TrainedModel {
    /// Name of its step.
    pub step: String,
    pub made: Finished,
    pub held_back_loss: Option<f64>,
    from: Finished,
    layers: Layers,
    key: (&'static str, String),
    settings: Settings,
}

/// One seed of a combination.
pub struct Cell {
    pub plan: Plan,
    pub pruned_step: String,
    pub pruned: Finished,
    pub healed: TrainedModel,
}

/// The dense model finetuned beside a recipe of healing, by seed.
pub struct DenseModels {
    pub label: String,
    pub recipe: String,
    /// The ratio whose plans say which layers are trained; `None` where all are.
    pub drop_ratio: Option<f64>,
    pub trained_layers: usize,
    pub models: Vec<TrainedModel>,
}

/// All models of a sweep.
pub struct Models {
    pub dense_held_back_loss: Option<f64>,
    pub dense_finetuned: Vec<DenseModels>,
    /// By combination, by seed.
    pub cells: Vec<Vec<Cell>>,
}

/// Makes models.
pub struct Maker<'a> {
    pub sweep: &'a Sweep,
    pub stages: Stages<'a>,
    pub scores: Finished,
}

impl Maker<'_> {
    /// Errors: `Error::Interrupted` on Ctrl-C.
    pub fn check_cancel(&self) -> Result<()> {
        self.stages.cancel.check("the table has the finished rows")
    }

    /// Every model.
    ///
    /// Errors: those of the steps.
    pub fn all(&mut self, settings: &[Setting]) -> Result<Models> {
        let sweep = self.sweep;
        let dense = self.stages.dense_as_made();
        let dense_held_back_loss = self.held_back_loss("dense", &dense)?;
        let mut dense_finetuned = Vec::new();
        for recipe in &sweep.finetune.recipes {
            let lists = vec![None; sweep.seeds.len()];
            dense_finetuned.extend(self.dense_finetuned(recipe, None, &lists)?);
        }
        let count = settings.len() * sweep.seeds.len();
        let mut cells: Vec<Vec<Cell>> = Vec::with_capacity(settings.len());
        for setting in settings {
            let mut row = Vec::with_capacity(sweep.seeds.len());
            for &seed in &sweep.seeds {
                self.check_cancel()?;
                let cell = self.cell(setting, seed)?;
                let number = cells.len() * sweep.seeds.len() + row.len() + 1;
                let loss = cell.healed.held_back_loss.map(|loss| format!(", held-back loss {loss:.4}"));
                let loss = loss.unwrap_or_default();
                self.stages.note(&format!("model {number} of {count}, seed {seed}: {setting}{loss}"));
                row.push(cell);
            }
            if sweep.strategies.first().is_some_and(|first| first == setting.strategy) {
                let lists: Vec<_> = row.iter().map(|cell| Some(cell.plan.finetune.clone())).collect();
                dense_finetuned.extend(self.dense_finetuned(setting.recipe, Some(setting.drop_ratio), &lists)?);
            }
            cells.push(row);
        }
        Ok(Models { dense_held_back_loss, dense_finetuned, cells })
    }

    fn cell(&mut self, setting: &Setting, seed: u64) -> Result<Cell> {
        let sweep = self.sweep;
        let Setting { drop_ratio, strategy, recipe } = *setting;
        let row = Strategy::named(strategy)?;
        let seeded = row.seeded;
        let settings = PlanSettings {
            strategy: strategy.to_string(),
            how_many: HowMany::DropRatio(drop_ratio),
            seed: if seeded { seed } else { sweep.calibration.seed },
            samples: None,
            fit_tokens: None,
            data: None,
            modality_weights: None,
            as_released: sweep.as_released && row.released_differs,
            beyond_structure: sweep.beyond_structure && row.goes_beyond,
        };
        let count = settings.how_many.count(&self.stages.dense)?;
        let step = match seeded {
            true => format!("plan-{strategy}-{count}-seed{seed}"),
            false => format!("plan-{strategy}-{count}"),
        };
        let (plan, planned) = self.stages.plan(&step, &sweep.calibration, &self.scores, settings)?;

        // Pruning and healing depend on the roles of the layers only, so strategies with equal roles share their steps.
        let drop = list(&plan.drop);
        let (pruned_step, layers) = match plan.part {
            Part::Layer => {
                (format!("pruned-{drop}"), Drop::Layers { tower: crate::bundle::Tower::Text, layers: &plan.drop })
            }
            Part::Mlp => (format!("pruned-mlps-{drop}"), Drop::Mlps(&plan.drop)),
        };
        let pruned =
            self.stages.prune(&pruned_step, &layers, (&sweep.prune, &sweep.calibration), &[("drop", &drop)])?;
        let settings = sweep.settings_of(recipe, seed)?;
        let (key, layers) = (roles(&plan)?, Layers::Planned(Box::new(plan.clone()), planned.digest));
        let healed = self.trained("healed", &pruned, layers, ("plan", key), settings)?;
        Ok(Cell { plan, pruned_step, pruned, healed })
    }

    /// The dense model finetuned beside a recipe: for every seed the layers of `lists`. `None` where the sweep leaves it
    /// out.
    fn dense_finetuned(
        &mut self,
        recipe: &str,
        drop_ratio: Option<f64>,
        lists: &[Option<Vec<usize>>],
    ) -> Result<Option<DenseModels>> {
        let sweep = self.sweep;
        let Some(dense) = sweep.dense_beside(recipe, sweep.calibration.seed)? else { return Ok(None) };
        let counted = lists.iter().flatten().map(Vec::len).max();
        let mut models = Vec::with_capacity(lists.len());
        for (&seed, layers) in sweep.seeds.iter().zip(lists) {
            self.check_cancel()?;
            let Some(dense) = sweep.dense_beside(recipe, seed)? else { continue };
            let whole = self.stages.dense_as_made();
            let key = ("layers", layers.as_deref().map_or("all".to_string(), list));
            models.push(self.trained("dense", &whole, Layers::Listed(layers.clone()), key, dense.settings)?);
        }
        let trained_layers = counted.unwrap_or(self.stages.dense.num_layers);
        let label = dense.label(recipe, counted);
        Ok(Some(DenseModels { label, recipe: recipe.to_string(), drop_ratio, trained_layers, models }))
    }

    /// Trains a model and measures its loss on what is held back. Of one that was removed only the loss is read.
    fn trained(
        &mut self,
        name: &str,
        from: &Finished,
        layers: Layers,
        key: (&'static str, String),
        settings: Settings,
    ) -> Result<TrainedModel> {
        let sweep = self.sweep;
        let digest = sha256_json(&(&key.1, &settings, sweep.finetune.samples))?;
        let step = format!("{name}-{}", &digest[..16.min(digest.len())]);
        let made = from.clone();
        let mut model = TrainedModel { step, made, held_back_loss: None, from: from.clone(), layers, key, settings };
        model.made = self.heal(&model)?;
        if !model.made.path.exists() && (sweep.keep_models || !self.has_held_back_loss(&model)?) {
            model.made = self.again(&model)?;
        }
        model.held_back_loss = self.held_back_loss(&model.step, &model.made)?;
        Ok(model)
    }

    /// The model made again from nothing.
    ///
    /// Errors: as `Stages::heal`.
    pub fn again(&mut self, model: &TrainedModel) -> Result<Finished> {
        self.stages.store.remove_step(&model.step)?;
        self.heal(model)
    }

    fn heal(&mut self, model: &TrainedModel) -> Result<Finished> {
        let finetune = &self.sweep.finetune;
        let trained = match &model.layers {
            Layers::Planned(plan, digest) => Trained::Plan { plan, digest },
            Layers::Listed(layers) => Trained::Layers(layers.as_deref()),
        };
        let healing = Healing {
            step: &model.step,
            work: &model.step,
            trained,
            key: (model.key.0, &model.key.1),
            data: &finetune.data,
            options: &finetune.data_options(self.stages.part),
            samples: finetune.samples,
            settings: &model.settings,
        };
        self.stages.heal(&model.from, &healing)
    }

    /// How the held-back part of the data is read, where there is one.
    fn held_back(&self) -> Result<Option<TextSettings>> {
        let finetune = &self.sweep.finetune;
        let (_, part) = parts(finetune.held_back)?;
        Ok(part.map(|part| TextSettings::of(&finetune.data_options(part), None)))
    }

    fn held_back_loss(&mut self, label: &str, model: &Finished) -> Result<Option<f64>> {
        let Some(read) = self.held_back()? else { return Ok(None) };
        let source = (&model.model(), model.digest.as_str());
        let scores = self.stages.perplexity(("held-back", label), source, &self.sweep.finetune.data, &read)?;
        Ok(Some(scores.mean_loss))
    }

    fn has_held_back_loss(&self, model: &TrainedModel) -> Result<bool> {
        let Some(read) = self.held_back()? else { return Ok(true) };
        self.stages.read(("held-back", &model.step), &model.made.digest, &self.sweep.finetune.data, &read)
    }
}

/// A digest of the roles of all layers.
fn roles(plan: &Plan) -> Result<String> {
    sha256_json(&plan.layers.iter().map(|layer| layer.role).collect::<Vec<LayerRole>>())
}

fn list(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join("_")
}
