//! A sweep compares drop ratios, strategies and finetuning recipes over several seeds; equal steps run once. All models are
//! made before a benchmark or data of another kind is opened.

mod making;
mod recipe;
mod table;

pub use recipe::Sweep;
pub use table::{DenseFigures, SeedSpread, SweepDense, SweepOther, SweepRow, SweepTable};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::base::{Cancel, Error, Provenance, Result, write_json};
use crate::bundle::{Bundle, ModelSource};
use crate::eval::ModelScores;

use super::comparison::{OtherScore, check_there, parts};
use super::run::write_text;
use super::stages::{Questions, Stages, questions, size_bytes};
use super::steps::{self, HowMany};

use making::{Cell, DenseModels, Maker, Setting, TrainedModel};

/// Name of the sweep's table in its folder, without extension.
pub const SWEEP_FILE: &str = "sweep";

/// Result of a sweep.
pub struct SweepResult {
    /// The sweep's output folder.
    pub folder: PathBuf,
    /// The comparison of all combinations, also written to `sweep.json`.
    pub table: SweepTable,
}

/// A model's figures.
struct Measured {
    scores: ModelScores,
    held_back_loss: Option<f64>,
    other: Vec<OtherScore>,
}

/// The figures of one seed of a combination.
struct CellFigures<'c> {
    cell: &'c Cell,
    /// The precision of the healed model; `None` for its floats.
    precision: Option<&'static str>,
    kept_dropped: f64,
    healed: Measured,
    speedup: f64,
    speedup_measured: bool,
    size_bytes: u64,
}

/// The second half of a sweep: every model is there, and the benchmarks are read.
struct SweepRun<'a> {
    sweep: &'a Sweep,
    maker: Maker<'a>,
    questions: Vec<Questions>,
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
    sweep_in(sweep, folder, cancel, on_step).map_err(|error| error.kept_in(folder))
}

fn sweep_in(sweep: &Sweep, folder: &Path, cancel: &Cancel, on_step: &mut dyn FnMut(&str)) -> Result<SweepResult> {
    let (part, _) = parts(sweep.finetune.held_back)?;
    check_there(&sweep.eval.benchmarks, &sweep.eval.other)?;
    let model = ModelSource::find(&sweep.model, sweep.variant.clone(), cancel)?;
    let mut stages = Stages::open(folder, &model, sweep.device.parse()?, part, cancel, on_step)?;
    let counts = sweep.drop_ratios.iter().map(|&ratio| HowMany::DropRatio(ratio).count(&stages.dense));
    let counts = counts.collect::<Result<Vec<_>>>()?;
    let scores = stages.scores(&sweep.calibration, &sweep.strategies, &counts)?;
    let settings: Vec<Setting> = sweep
        .drop_ratios
        .iter()
        .flat_map(|&drop_ratio| sweep.strategies.iter().map(move |strategy| (drop_ratio, strategy)))
        .flat_map(|(drop_ratio, strategy)| {
            sweep.finetune.recipes.iter().map(move |recipe| Setting { drop_ratio, strategy, recipe })
        })
        .collect();
    let mut maker = Maker { sweep, stages, scores };
    let made = maker.all(&settings)?;

    // From here on nothing is left to choose.
    let questions = questions(&sweep.eval.benchmarks)?;
    let (finetuned, dense_rows) = (BTreeMap::new(), Vec::new());
    let digest = maker.stages.dense_as_made().digest;
    let dense = Measured {
        scores: maker.stages.answers("dense", &model, &digest, &questions, &sweep.eval.settings)?,
        held_back_loss: made.dense_held_back_loss,
        other: maker.stages.other("dense", (&model, &digest), &sweep.eval.other, &sweep.eval.settings)?,
    };
    let mut run = SweepRun { sweep, maker, questions, dense, finetuned, dense_rows };
    for models in &made.dense_finetuned {
        run.dense_row(models)?;
    }
    let mut rows = Vec::new();
    for (number, (setting, cells)) in settings.iter().zip(&made.cells).enumerate() {
        let figures = cells.iter().enumerate().map(|(place, cell)| {
            let number = number * sweep.seeds.len() + place + 1;
            let text = format!("cell {number} of {}, seed {}", settings.len() * sweep.seeds.len(), sweep.seeds[place]);
            run.maker.check_cancel()?;
            let floats = run.figures(setting, cell, &text)?;
            let others = run.in_precisions(&floats, place == 0)?;
            Ok::<Vec<CellFigures>, Error>(std::iter::once(floats).chain(others).collect())
        });
        for figures in by_precision(figures.collect::<Result<Vec<Vec<CellFigures>>>>()?) {
            rows.push(run.row(setting, &figures)?);
        }
        run.write(&rows)?;
    }
    let table = run.write(&rows)?;
    Ok(SweepResult { folder: run.maker.stages.store.folder().to_path_buf(), table })
}

impl SweepRun<'_> {
    /// A trained model's answers, its loss on what is held back, and its figures on data of other kinds. Without
    /// `keep_models` the model is removed when its figures are in. One that was removed earlier is made again, with the
    /// settings that were chosen then, where there is more to measure.
    fn measured(&mut self, model: &TrainedModel) -> Result<Measured> {
        let sweep = self.sweep;
        let (step, settings) = (model.step.as_str(), &sweep.eval.settings);
        let mut made = model.made.clone();
        let stages = &self.maker.stages;
        let is_measured = stages.answered(step, &made.digest, &self.questions, settings)?
            && stages.other_done(step, &made.digest, &sweep.eval.other, settings)?;
        if !made.path.exists() && !is_measured {
            made = self.maker.again(model)?;
        }
        let stages = &mut self.maker.stages;
        let source = made.model();
        let scores = stages.answers(step, &source, &made.digest, &self.questions, settings)?;
        let other = stages.other(step, (&source, &made.digest), &sweep.eval.other, settings)?;
        if !sweep.keep_models {
            stages.store.remove(step)?;
        }
        Ok(Measured { scores, held_back_loss: model.held_back_loss, other })
    }

    fn figures<'c>(&mut self, setting: &Setting, cell: &'c Cell, place: &str) -> Result<CellFigures<'c>> {
        let sweep = self.sweep;
        let healed = self.measured(&cell.healed)?;
        let (step, pruned) = (cell.pruned_step.as_str(), &cell.pruned);
        let stages = &mut self.maker.stages;
        let source = pruned.model();
        let dropped = stages.answers(step, &source, &pruned.digest, &self.questions, &sweep.eval.settings)?;
        let ideal = match ideal_with_bridges(&pruned.path)? {
            Some(speedup) => speedup,
            None => stages.dense.costs.without_part(cell.plan.part, &cell.plan.drop).speedup,
        };
        let timed = match sweep.bench.enabled {
            true => {
                let report = stages.bench(step, &source, &pruned.digest, &sweep.bench.settings)?;
                report.speedup.map(|speedup| speedup.decoder_ttft.median)
            }
            false => None,
        };
        let kept_dropped = self.kept(&dropped)?;
        let kept = self.kept(&healed.scores)?;
        self.maker.stages.note(&format!(
            "{place}: {setting}: {:.1}% of dense kept, {:.1}% before healing",
            100.0 * kept,
            100.0 * kept_dropped
        ));
        Ok(CellFigures {
            cell,
            precision: None,
            kept_dropped,
            healed,
            speedup: timed.unwrap_or(ideal),
            speedup_measured: timed.is_some(),
            // Healing changes the values of the weights, but not their size.
            size_bytes: size_bytes(&source)?,
        })
    }

    /// A healed model's figures in each precision of the sweep. Where it is asked for, the model is written for the targets too.
    ///
    /// Errors: those of the steps.
    fn in_precisions<'c>(&mut self, floats: &CellFigures<'c>, for_targets: bool) -> Result<Vec<CellFigures<'c>>> {
        let sweep = self.sweep;
        let (cell, healed) = (floats.cell, &floats.cell.healed);
        let model = (&healed.made.model(), healed.made.digest.as_str());
        let stages = &mut self.maker.stages;
        let quantised = stages.quantise(&healed.step, model, (&sweep.export, &sweep.calibration))?;
        let mut figures = Vec::new();
        for (made, (row, source)) in quantised.iter().flat_map(|own| own.models.iter().map(move |it| (&own.made, it))) {
            let (label, digest) = (format!("{}-{}", healed.step, row.name), made.digest.as_str());
            let scores = stages.answers(&label, source, digest, &self.questions, &sweep.eval.settings)?;
            let other = stages.other(&label, (source, digest), &sweep.eval.other, &sweep.eval.settings)?;
            let speedup = match sweep.bench.enabled {
                true => {
                    let report = stages.bench(&label, source, digest, &sweep.bench.settings)?;
                    report.speedup.map(|speedup| speedup.decoder_ttft.median)
                }
                false => None,
            };
            figures.push(CellFigures {
                cell,
                precision: Some(row.name),
                kept_dropped: floats.kept_dropped,
                // The loss on what is held back chooses among floats.
                healed: Measured { scores, held_back_loss: None, other },
                speedup: speedup.unwrap_or(floats.speedup),
                speedup_measured: speedup.is_some(),
                size_bytes: size_bytes(source)?,
            });
        }
        if for_targets {
            stages.export(&format!("-{}", healed.step), model, quantised.as_ref(), &sweep.export)?;
        }
        Ok(figures)
    }

    /// A row of the dense model finetuned beside a recipe.
    fn dense_row(&mut self, models: &DenseModels) -> Result<()> {
        let mut found = Vec::with_capacity(models.models.len());
        for model in &models.models {
            self.maker.check_cancel()?;
            found.push(self.measured(model)?);
        }
        let kept = found.iter().map(|own| self.kept(&own.scores)).collect::<Result<Vec<_>>>()?;
        let row = SweepDense {
            model: models.label.clone(),
            recipe: models.recipe.clone(),
            drop_ratio: models.drop_ratio,
            trained_layers: models.trained_layers,
            average: SeedSpread::over(found.iter().map(|own| own.scores.score).collect()),
            kept_of_dense: SeedSpread::over(kept),
            held_back_loss: held_back(found.iter()),
            other: self.others(found.iter()),
        };
        self.dense_rows.push(row);
        if models.drop_ratio.is_none() {
            self.finetuned.insert(models.recipe.clone(), found);
        }
        Ok(())
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

    fn row(&self, setting: &Setting, cells: &[CellFigures]) -> Result<SweepRow> {
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
            precision: first.precision.map(str::to_string),
            dropped_layers: first.cell.plan.drop.len(),
            dropped: cells.iter().map(|own| own.cell.plan.drop.clone()).collect(),
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
        let inputs = BTreeMap::from([("model".to_string(), self.maker.stages.dense.digest.clone())]);
        let head = Provenance::new(SweepTable::SCHEMA_VERSION, inputs, self.sweep)?;
        let provenance = self.maker.stages.named(head);
        let dense = DenseFigures {
            average: self.dense.scores.score,
            held_back_loss: self.dense.held_back_loss,
            other: self.dense.other.clone(),
        };
        let table =
            SweepTable::new(provenance, dense, self.dense_rows.clone(), self.sweep.seeds.clone(), rows.to_vec());
        let folder = self.maker.stages.store.folder();
        write_json(&folder.join(format!("{SWEEP_FILE}.json")), &table)?;
        write_text(&folder.join(format!("{SWEEP_FILE}.md")), &table.markdown())?;
        Ok(table)
    }
}

/// The figures of all seeds, for the floats and then for each precision.
fn by_precision(seeds: Vec<Vec<CellFigures<'_>>>) -> Vec<Vec<CellFigures<'_>>> {
    let mut rows: Vec<Vec<CellFigures>> = Vec::new();
    for seed in seeds {
        for (place, figures) in seed.into_iter().enumerate() {
            match rows.get_mut(place) {
                Some(row) => row.push(figures),
                None => rows.push(vec![figures]),
            }
        }
    }
    rows
}

/// The ideal speed-up of a pruned model that nodes were added to, those counted.
fn ideal_with_bridges(model: &Path) -> Result<Option<f64>> {
    let record = Bundle::open(model)?.record()?;
    Ok(record.and_then(|record| record.provenance.settings.pointer("/compensation/ideal_speedup")?.as_f64()))
}

/// Losses on what is held back, over the seeds.
fn held_back<'m>(models: impl Iterator<Item = &'m Measured>) -> Option<SeedSpread> {
    let losses: Option<Vec<f64>> = models.map(|model| model.held_back_loss).collect();
    losses.filter(|losses| !losses.is_empty()).map(SeedSpread::over)
}
