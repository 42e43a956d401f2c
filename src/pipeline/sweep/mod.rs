//! A sweep compares drop ratios, strategies and finetuning recipes over several seeds; equal steps run once.

mod recipe;
mod table;

pub use recipe::Sweep;
pub use table::{DenseFigures, SeedSpread, SweepDense, SweepOther, SweepRow, SweepTable};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::base::{Cancel, Error, Provenance, Result, sha256_json, write_json};
use crate::eval::ModelScores;
use crate::finetune::Settings;
use crate::method::select::Strategy;
use crate::method::{LayerRole, Plan};

use super::comparison::{OtherScore, check_there, parts};
use super::run::write_text;
use super::stages::{Healing, Questions, Stages, questions, size_bytes};
use super::steps::{self, Drop, HowMany, PlanSettings, TextSettings, Trained};
use super::store::Finished;

/// Name of the sweep's table in its folder, without extension.
pub const SWEEP_FILE: &str = "sweep";

/// Result of a sweep.
pub struct SweepResult {
    /// The sweep's output folder.
    pub folder: PathBuf,
    /// The comparison of all combinations, also written to `sweep.json`.
    pub table: SweepTable,
}

/// One combination, a row of the table.
struct Setting<'s> {
    drop_ratio: f64,
    strategy: &'s str,
    recipe: &'s str,
}

/// A model's figures.
struct Measured {
    scores: ModelScores,
    held_back_loss: Option<f64>,
    other: Vec<OtherScore>,
}

/// Result of one seed of a combination.
struct Cell {
    plan: Plan,
    kept_dropped: f64,
    healed: Measured,
    speedup: f64,
    speedup_measured: bool,
    size_bytes: u64,
}

struct SweepRun<'a> {
    sweep: &'a Sweep,
    stages: Stages<'a>,
    questions: Vec<Questions>,
    scores: Finished,
    dense: Measured,
    /// By recipe of healing: the dense model finetuned beside it, by seed.
    finetuned: BTreeMap<String, Vec<Measured>>,
    dense_rows: Vec<SweepDense>,
}

/// Runs a sweep into `output`, or into the sweep's own folder. Calls `on_step` with a line per step and per cell. The
/// table is rewritten after every row, so a stopped sweep keeps its finished rows.
///
/// Errors: those of the steps. The outputs of finished steps are kept, and the same call continues after them.
pub fn sweep(
    sweep: &Sweep,
    output: Option<&Path>,
    cancel: &Cancel,
    on_step: &mut dyn FnMut(&str),
) -> Result<SweepResult> {
    let folder = output.unwrap_or(&sweep.output);
    let (part, _) = parts(sweep.finetune.held_back)?;
    check_there(&sweep.eval.benchmarks, &sweep.eval.other)?;
    let mut stages = Stages::open(folder, &sweep.model, sweep.device.parse()?, part, cancel, on_step)?;
    let counts = sweep.drop_ratios.iter().map(|&ratio| HowMany::DropRatio(ratio).count(&stages.dense));
    let counts = counts.collect::<Result<Vec<_>>>()?;
    let scores = stages.scores(&sweep.calibration, &sweep.strategies, &counts)?;
    let questions = questions(&sweep.eval.benchmarks)?;
    let dense = stages.dense_as_made();
    let dense = measured(sweep, &mut stages, &questions, "dense", &dense)?;
    let (finetuned, dense_rows) = (BTreeMap::new(), Vec::new());
    let mut run = SweepRun { sweep, stages, questions, scores, dense, finetuned, dense_rows };
    for recipe in &sweep.finetune.recipes {
        run.dense_finetuned(recipe)?;
    }
    let settings: Vec<Setting> = sweep
        .drop_ratios
        .iter()
        .flat_map(|&drop_ratio| sweep.strategies.iter().map(move |strategy| (drop_ratio, strategy)))
        .flat_map(|(drop_ratio, strategy)| {
            sweep.finetune.recipes.iter().map(move |recipe| Setting { drop_ratio, strategy, recipe })
        })
        .collect();
    let mut rows = Vec::new();
    for setting in &settings {
        let cells = (0..sweep.seeds.len()).map(|place| {
            let number = rows.len() * sweep.seeds.len() + place + 1;
            run.stages.cancel.check("the table has the finished rows; the same call continues after them")?;
            run.cell(setting, sweep.seeds[place], &format!("cell {number} of {}", settings.len() * sweep.seeds.len()))
        });
        let cells = cells.collect::<Result<Vec<Cell>>>()?;
        if sweep.strategies.first().is_some_and(|first| first == setting.strategy) {
            run.dense_partly(setting, &cells)?;
        }
        rows.push(run.row(setting, &cells)?);
        run.write(&rows)?;
    }
    let table = run.write(&rows)?;
    Ok(SweepResult { folder: run.stages.store.folder().to_path_buf(), table })
}

/// A model's answers, its loss on what is held back, and its figures on data of other kinds.
fn measured(
    sweep: &Sweep,
    stages: &mut Stages,
    questions: &[Questions],
    label: &str,
    model: &Finished,
) -> Result<Measured> {
    let (path, digest) = (model.path.as_path(), model.digest.as_str());
    let settings = &sweep.eval.settings;
    let held_back_loss = match parts(sweep.finetune.held_back)? {
        (_, Some(part)) => {
            let read = TextSettings::of(&sweep.finetune.data_options(part), None);
            Some(stages.perplexity(("held-back", label), (path, digest), &sweep.finetune.data, &read)?.mean_loss)
        }
        (_, None) => None,
    };
    let scores = stages.answers(label, path, digest, questions, settings)?;
    let other = stages.other(label, (path, digest), &sweep.eval.other, settings)?;
    Ok(Measured { scores, held_back_loss, other })
}

impl SweepRun<'_> {
    fn cell(&mut self, setting: &Setting, seed: u64, place: &str) -> Result<Cell> {
        let sweep = self.sweep;
        let Setting { drop_ratio, strategy, recipe } = *setting;
        let row = Strategy::named(strategy)?;
        let seeded = row.seeded;
        let settings = PlanSettings {
            strategy: strategy.to_string(),
            how_many: HowMany::DropRatio(drop_ratio),
            seed: if seeded { seed } else { sweep.calibration.seed },
            samples: None,
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
        let pruned_step = format!("pruned-{drop}");
        let layers = Drop::Layers { tower: crate::bundle::Tower::Text, layers: &plan.drop };
        let pruned = self.stages.prune(&pruned_step, &layers, &sweep.prune, &[("drop", &drop)])?;
        let settings = sweep.settings_of(recipe, seed)?;
        let roles = roles(&plan)?;
        let trained = Trained::Plan { plan: &plan, digest: &planned.digest };
        let healed = self.trained_and_measured("healed", &pruned, trained, ("plan", &roles), &settings)?;
        let dropped =
            self.stages.answers(&pruned_step, &pruned.path, &pruned.digest, &self.questions, &sweep.eval.settings)?;
        let kept_dropped = self.kept(&dropped)?;
        let ideal = self.stages.dense.costs.without(&plan.drop).speedup;
        let measured = match sweep.bench.enabled {
            true => {
                let settings = &sweep.bench.settings;
                let report = self.stages.bench(&pruned_step, &pruned.path, &pruned.digest, settings)?;
                report.speedup.map(|speedup| speedup.decoder_ttft.median)
            }
            false => None,
        };
        self.stages.note(&format!(
            "{place}: {strategy} at {:.0}%, {recipe}, seed {seed}: {:.1}% of dense kept, {:.1}% before healing",
            100.0 * drop_ratio,
            100.0 * self.kept(&healed.scores)?,
            100.0 * kept_dropped
        ));
        Ok(Cell {
            kept_dropped,
            healed,
            speedup: measured.unwrap_or(ideal),
            speedup_measured: measured.is_some(),
            // Healing changes the values of the weights, but not their size.
            size_bytes: size_bytes(&pruned.path)?,
            plan,
        })
    }

    /// The dense model finetuned beside a recipe, all its layers, for every seed.
    fn dense_finetuned(&mut self, recipe: &str) -> Result<()> {
        let layers = self.stages.dense.num_layers;
        let found = self.dense_row(recipe, None, |run, seed| {
            let Some(dense) = run.sweep.dense_beside(recipe, seed)? else { return Ok(None) };
            let whole = run.stages.dense_as_made();
            let trained = Trained::Layers(None);
            run.trained_and_measured("dense", &whole, trained, ("layers", "all"), &dense.settings).map(Some)
        })?;
        if let Some((row, found)) = found {
            self.dense_rows.push(SweepDense { trained_layers: layers, ..row });
            self.finetuned.insert(recipe.to_string(), found);
        }
        Ok(())
    }

    /// The same with as many layers as the pruned models of a combination train: those that its plans name.
    fn dense_partly(&mut self, setting: &Setting, cells: &[Cell]) -> Result<()> {
        let recipe = setting.recipe;
        let mut cells = cells.iter();
        let count = cells.clone().map(|cell| cell.plan.finetune.len()).max().unwrap_or(0);
        let found = self.dense_row(recipe, Some(count), |run, seed| {
            let (Some(dense), Some(cell)) = (run.sweep.dense_beside(recipe, seed)?, cells.next()) else {
                return Ok(None);
            };
            let whole = run.stages.dense_as_made();
            let layers = &cell.plan.finetune;
            let (trained, key) = (Trained::Layers(Some(layers)), list(layers));
            run.trained_and_measured("dense", &whole, trained, ("layers", &key), &dense.settings).map(Some)
        })?;
        if let Some((row, _)) = found {
            self.dense_rows.push(SweepDense { drop_ratio: Some(setting.drop_ratio), trained_layers: count, ..row });
        }
        Ok(())
    }

    fn dense_row(
        &mut self,
        recipe: &str,
        layers: Option<usize>,
        mut of_seed: impl FnMut(&mut Self, u64) -> Result<Option<Measured>>,
    ) -> Result<Option<(SweepDense, Vec<Measured>)>> {
        let mut found = Vec::new();
        for &seed in &self.sweep.seeds {
            self.stages.cancel.check("the table has the finished rows; the same call continues after them")?;
            found.extend(of_seed(self, seed)?);
        }
        let Some(dense) = self.sweep.dense_beside(recipe, self.sweep.calibration.seed)? else { return Ok(None) };
        let kept = found.iter().map(|own| self.kept(&own.scores)).collect::<Result<Vec<_>>>()?;
        let row = SweepDense {
            model: dense.label(recipe, layers),
            recipe: recipe.to_string(),
            drop_ratio: None,
            trained_layers: 0,
            average: SeedSpread::over(found.iter().map(|own| own.scores.score).collect()),
            kept_of_dense: SeedSpread::over(kept),
            held_back_loss: held_back(found.iter()),
            other: self.others(found.iter()),
        };
        Ok(Some((row, found)))
    }

    /// Trains a model and measures it. Without `keep_models` it is removed when its figures are in; of one that was removed
    /// only the figures are read, and it is made again where there is more to measure.
    fn trained_and_measured(
        &mut self,
        name: &str,
        from: &Finished,
        trained: Trained,
        key: (&str, &str),
        settings: &Settings,
    ) -> Result<Measured> {
        let sweep = self.sweep;
        let digest = sha256_json(&(key.1, settings, sweep.finetune.samples))?;
        let step = format!("{name}-{}", &digest[..16.min(digest.len())]);
        let healing = Healing {
            step: &step,
            work: &step,
            trained,
            key,
            data: &sweep.finetune.data,
            options: &sweep.finetune.data_options(self.stages.part),
            samples: sweep.finetune.samples,
            settings,
        };
        let mut made = self.stages.heal(from, &healing)?;
        if !made.path.exists() && (sweep.keep_models || !self.is_measured(&step, &made)?) {
            self.stages.store.forget(&step)?;
            made = self.stages.heal(from, &healing)?;
        }
        let found = measured(sweep, &mut self.stages, &self.questions, &step, &made)?;
        if !sweep.keep_models {
            self.stages.store.remove(&step)?;
        }
        Ok(found)
    }

    /// True when all figures of a model are there.
    fn is_measured(&self, label: &str, model: &Finished) -> Result<bool> {
        let (sweep, digest) = (self.sweep, model.digest.as_str());
        let settings = &sweep.eval.settings;
        let held_back = match parts(sweep.finetune.held_back)? {
            (_, Some(part)) => {
                let read = TextSettings::of(&sweep.finetune.data_options(part), None);
                self.stages.read(("held-back", label), digest, &sweep.finetune.data, &read)?
            }
            (_, None) => true,
        };
        Ok(held_back
            && self.stages.answered(label, digest, &self.questions, settings)?
            && self.stages.other_done(label, digest, &sweep.eval.other, settings)?)
    }

    /// Score over the dense model's.
    fn kept(&self, scores: &ModelScores) -> Result<f64> {
        let kept = steps::compared(&[(scores, &self.dense.scores)])?.and_then(|found| found.ratio);
        kept.map(|kept| kept.ratio).ok_or_else(|| {
            Error::invalid(format!("`{}`", self.sweep.model.display()), "answers nothing right, so nothing can be kept")
                .remedy("choose benchmarks that the dense model can do")
        })
    }

    /// Figures on data of other kinds, over the seeds.
    fn others<'m>(&self, models: impl Iterator<Item = &'m Measured> + Clone) -> Vec<SweepOther> {
        let dense = self.dense.other.iter().enumerate();
        let spread = dense.map(|(place, base)| {
            let own = models.clone().filter_map(|model| model.other.get(place).cloned());
            let against: Vec<OtherScore> = own.map(|own| own.against(base.value)).collect();
            let kept: Option<Vec<f64>> = against.iter().map(|own| own.kept).collect();
            SweepOther {
                name: base.name.clone(),
                measure: base.measure,
                value: SeedSpread::over(against.iter().map(|own| own.value).collect()),
                kept: kept.map(SeedSpread::over),
            }
        });
        spread.collect()
    }

    fn row(&self, setting: &Setting, cells: &[Cell]) -> Result<SweepRow> {
        let first = cells
            .first()
            .ok_or_else(|| Error::invalid("sweep", "has no seeds").remedy("write `seeds = [42]`, for instance"))?;
        let kept = cells.iter().map(|cell| self.kept(&cell.healed.scores)).collect::<Result<Vec<_>>>()?;
        let finetuned = self.finetuned.get(setting.recipe).map(Vec::as_slice).unwrap_or_default();
        let pairs: Vec<(&ModelScores, &ModelScores)> =
            cells.iter().zip(finetuned).map(|(cell, dense)| (&cell.healed.scores, &dense.scores)).collect();
        let of_seeds = pairs.iter().map(|pair| Ok(steps::compared(&[*pair])?.and_then(|found| found.ratio)));
        let of_seeds = of_seeds.collect::<Result<Option<Vec<_>>>>()?.filter(|found| !found.is_empty());
        let models = || cells.iter().map(|cell| &cell.healed);
        Ok(SweepRow {
            drop_ratio: setting.drop_ratio,
            strategy: setting.strategy.to_string(),
            recipe: setting.recipe.to_string(),
            dropped_layers: first.plan.drop.len(),
            dropped: cells.iter().map(|cell| cell.plan.drop.clone()).collect(),
            kept_dropped: SeedSpread::over(cells.iter().map(|cell| cell.kept_dropped).collect()),
            kept_of_finetuned: of_seeds.map(|kept| SeedSpread::over(kept.iter().map(|kept| kept.ratio).collect())),
            difference_from_finetuned: steps::compared(&pairs)?.map(|found| found.difference),
            kept_of_dense: SeedSpread::over(kept),
            held_back_loss: held_back(models()),
            other: self.others(models()),
            speedup: SeedSpread::over(cells.iter().map(|cell| cell.speedup).collect()).mean,
            speedup_measured: first.speedup_measured,
            size_bytes: first.size_bytes,
            pareto: false,
            chosen: false,
        })
    }

    fn write(&self, rows: &[SweepRow]) -> Result<SweepTable> {
        let inputs = BTreeMap::from([("model".to_string(), self.stages.dense.digest.clone())]);
        let provenance = Provenance::new(SweepTable::SCHEMA_VERSION, inputs, self.sweep)?;
        let dense = DenseFigures {
            average: self.dense.scores.score,
            held_back_loss: self.dense.held_back_loss,
            other: self.dense.other.clone(),
        };
        let table =
            SweepTable::new(provenance, dense, self.dense_rows.clone(), self.sweep.seeds.clone(), rows.to_vec());
        let folder = self.stages.store.folder();
        write_json(&folder.join(format!("{SWEEP_FILE}.json")), &table)?;
        write_text(&folder.join(format!("{SWEEP_FILE}.md")), &table.markdown())?;
        Ok(table)
    }
}

/// Losses on what is held back, over the seeds.
fn held_back<'m>(models: impl Iterator<Item = &'m Measured>) -> Option<SeedSpread> {
    let losses: Option<Vec<f64>> = models.map(|model| model.held_back_loss).collect();
    losses.filter(|losses| !losses.is_empty()).map(SeedSpread::over)
}

/// A digest of the roles of all layers.
fn roles(plan: &Plan) -> Result<String> {
    sha256_json(&plan.layers.iter().map(|layer| layer.role).collect::<Vec<LayerRole>>())
}

fn list(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join("_")
}
