//! A sweep compares drop ratios, strategies and finetuning recipes over several seeds; equal steps run once.

mod recipe;
mod table;

pub use recipe::Sweep;
pub use table::{SeedSpread, SweepRow, SweepTable};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::base::{Cancel, Error, Provenance, Result, sha256_json, write_json};
use crate::eval::ModelScores;
use crate::method::select::Strategy;
use crate::method::{LayerRole, Plan};

use super::run::write_text;
use super::stages::{Healing, Questions, Stages, questions, size_bytes};
use super::steps::{self, Drop, HowMany, PlanSettings};
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

/// Result of one seed of a combination.
struct Cell {
    dropped: Vec<usize>,
    kept_dropped: f64,
    kept: f64,
    speedup: f64,
    speedup_measured: bool,
    size_bytes: u64,
}

struct SweepRun<'a> {
    sweep: &'a Sweep,
    stages: Stages<'a>,
    questions: Vec<Questions>,
    scores: Finished,
    dense: ModelScores,
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
    let mut stages = Stages::open(folder, &sweep.model, sweep.device.parse()?, cancel, on_step)?;
    let counts = sweep.drop_ratios.iter().map(|&ratio| HowMany::DropRatio(ratio).count(&stages.dense));
    let counts = counts.collect::<Result<Vec<_>>>()?;
    let scores = stages.scores(&sweep.calibration, &sweep.strategies, &counts)?;
    let questions = questions(&sweep.eval.benchmarks)?;
    let digest = stages.dense.digest.clone();
    let dense = stages.answers("dense", &sweep.model, &digest, &questions, &sweep.eval.settings)?;
    let mut run = SweepRun { sweep, stages, questions, scores, dense };
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
        rows.push(row(setting, cells)?);
        run.write(&rows)?;
    }
    let table = run.write(&rows)?;
    Ok(SweepResult { folder: run.stages.store.folder().to_path_buf(), table })
}

impl SweepRun<'_> {
    fn cell(&mut self, setting: &Setting, seed: u64, place: &str) -> Result<Cell> {
        let sweep = self.sweep;
        let Setting { drop_ratio, strategy, recipe } = *setting;
        let seeded = Strategy::named(strategy)?.seeded;
        let settings = PlanSettings {
            strategy: strategy.to_string(),
            how_many: HowMany::DropRatio(drop_ratio),
            seed: if seeded { seed } else { sweep.calibration.seed },
            samples: None,
            data: None,
            modality_weights: None,
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
        let key = sha256_json(&(&roles, &settings, sweep.finetune.samples))?;
        let healed_step = format!("healed-{}", &key[..16.min(key.len())]);
        let healing = Healing {
            step: &healed_step,
            work: &healed_step,
            plan: &plan,
            plan_digest: &planned.digest,
            plan_key: &roles,
            data: &sweep.finetune.data,
            options: &sweep.finetune.data_options(),
            samples: sweep.finetune.samples,
            settings: &settings,
        };
        let healed = self.healed(&pruned, &healing)?;
        let kept_dropped = self.kept(&pruned_step, &pruned)?;
        let kept = self.kept(&healed_step, &healed)?;
        if !sweep.keep_models {
            self.stages.store.remove(&healed_step)?;
        }
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
            "{place}: {strategy} at {:.0}%, {recipe}, seed {seed}: {:.1}% kept, {:.1}% before healing",
            100.0 * drop_ratio,
            100.0 * kept,
            100.0 * kept_dropped
        ));
        Ok(Cell {
            kept_dropped,
            kept,
            speedup: measured.unwrap_or(ideal),
            speedup_measured: measured.is_some(),
            // Healing changes the values of the weights, but not their size.
            size_bytes: size_bytes(&pruned.path)?,
            dropped: plan.drop,
        })
    }

    /// A healed model. For a cached one only the answers may remain.
    fn healed(&mut self, pruned: &Finished, healing: &Healing) -> Result<Finished> {
        let healed = self.stages.heal(pruned, healing)?;
        let settings = &self.sweep.eval.settings;
        let enough = || self.stages.answered(healing.step, &healed.digest, &self.questions, settings);
        if healed.path.exists() || (!self.sweep.keep_models && enough()?) {
            return Ok(healed);
        }
        self.stages.store.forget(healing.step)?;
        self.stages.heal(pruned, healing)
    }

    /// Average score over the dense model's.
    fn kept(&mut self, label: &str, model: &Finished) -> Result<f64> {
        let settings = &self.sweep.eval.settings;
        let scores = self.stages.answers(label, &model.path, &model.digest, &self.questions, settings)?;
        let kept = steps::retention(&scores, &self.dense)?.score;
        kept.map(|kept| kept.ratio).ok_or_else(|| {
            Error::invalid(format!("`{}`", self.sweep.model.display()), "answers nothing right, so nothing can be kept")
                .remedy("choose benchmarks that the dense model can do")
        })
    }

    fn write(&self, rows: &[SweepRow]) -> Result<SweepTable> {
        let inputs = BTreeMap::from([("model".to_string(), self.stages.dense.digest.clone())]);
        let provenance = Provenance::new(SweepTable::SCHEMA_VERSION, inputs, self.sweep)?;
        let table = SweepTable::new(provenance, self.dense.score, self.sweep.seeds.clone(), rows.to_vec());
        let folder = self.stages.store.folder();
        write_json(&folder.join(format!("{SWEEP_FILE}.json")), &table)?;
        write_text(&folder.join(format!("{SWEEP_FILE}.md")), &table.markdown())?;
        Ok(table)
    }
}

fn row(setting: &Setting, cells: Vec<Cell>) -> Result<SweepRow> {
    let first = cells
        .first()
        .ok_or_else(|| Error::invalid("sweep", "has no seeds").remedy("write `seeds = [42]`, for instance"))?;
    let spread = |value: fn(&Cell) -> f64| SeedSpread::over(cells.iter().map(value).collect());
    Ok(SweepRow {
        drop_ratio: setting.drop_ratio,
        strategy: setting.strategy.to_string(),
        recipe: setting.recipe.to_string(),
        dropped_layers: first.dropped.len(),
        dropped: cells.iter().map(|cell| cell.dropped.clone()).collect(),
        kept_dropped: spread(|cell| cell.kept_dropped),
        kept: spread(|cell| cell.kept),
        speedup: spread(|cell| cell.speedup).mean,
        speedup_measured: first.speedup_measured,
        size_bytes: first.size_bytes,
        pareto: false,
    })
}

/// A digest of the roles of all layers.
fn roles(plan: &Plan) -> Result<String> {
    sha256_json(&plan.layers.iter().map(|layer| layer.role).collect::<Vec<LayerRole>>())
}

fn list(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join("_")
}
