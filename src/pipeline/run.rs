//! Runs a whole recipe: every verb in order, then writes the result table and the manifest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{
    AtomicFile, Cancel, Error, LOCK_FILE, Provenance, Result, Sha256Digest, read_json, sha256_file, write_json,
};
use crate::bundle::ModelSource;
use crate::data::Dataset;
use crate::eval::{BenchReport, ModelBench, ModelScores, PairedComparison};
use crate::method::Plan;
use crate::method::select::Strategy;

use super::comparison::{DenseRecipe, check_there, parts};
use super::exporting::Quantised;
use super::recipe::{PlanSection, Recipe};
use super::stages::{Healing, Stages, questions, size_bytes};
use super::steps::{self, Drop, HowMany, PlanSettings, TextSettings, Trained};
use super::store::{Finished, file_digests};
use super::strategies::AUTO;
use super::table::{Speed, Table, TableRow};

/// Name of the manifest in the run's folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the table in the run's folder, without extension.
pub const TABLE_FILE: &str = "table";
/// The chart of kept score over speed that `report::draw_front` draws into the folder of a run or sweep; in no manifest.
pub const FRONT_FILE: &str = "front.svg";

/// `manifest.json`: every file that a run made, and what it was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Manifest {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// SHA-256 of every file of the run's folder, by path.
    pub files: BTreeMap<String, Sha256Digest>,
}

impl Manifest {
    /// Version of the schema of `manifest.json`.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// Result of a run.
pub struct RunResult {
    /// The run's output folder.
    pub folder: PathBuf,
    /// The comparison of all models, also written to `table.json`.
    pub table: Table,
    /// False when the retention is below the recipe's `min_retention`.
    pub gate_held: bool,
}

/// What a model of the table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The dense model as it came.
    Dense,
    /// The dense model finetuned, all layers.
    DenseFinetuned,
    /// The dense model with some layers finetuned.
    DensePartly,
    /// Layers dropped.
    Dropped,
    /// Layers dropped and others finetuned.
    Healed,
    /// One of these in another precision.
    Quantised,
}

/// One model of the table.
struct Variant {
    kind: Kind,
    label: String,
    source: ModelSource,
    digest: Sha256Digest,
    dropped: usize,
}

struct RecipeRun<'a> {
    recipe: &'a Recipe,
    stages: Stages<'a>,
}

/// Runs a recipe into `output`, or into the recipe's own folder. Calls `on_step` with a line per step.
///
/// Errors: those of the steps. The outputs of finished steps are kept, and the same call continues after them.
pub fn run(
    recipe: &Recipe,
    output: Option<&Path>,
    cancel: &Cancel,
    on_step: &mut dyn FnMut(&str),
) -> Result<RunResult> {
    let folder = output.unwrap_or(&recipe.output);
    run_in(recipe, folder, cancel, on_step).map_err(|error| error.kept_in(folder))
}

fn run_in(recipe: &Recipe, folder: &Path, cancel: &Cancel, on_step: &mut dyn FnMut(&str)) -> Result<RunResult> {
    let (part, _) = parts(recipe.finetune.held_back)?;
    check_there(&recipe.eval.benchmarks, &recipe.eval.other)?;
    let model = ModelSource::find(&recipe.model, recipe.variant.clone(), cancel)?;
    let stages = Stages::open(folder, &model, recipe.device.parse()?, part, cancel, on_step)?;
    let mut run = RecipeRun { recipe, stages };
    let count = how_many(&recipe.plan).count(&run.stages.dense)?;
    let scores =
        run.stages.scores(&recipe.calibration, &recipe.plan.auto.planned(&recipe.plan.strategies), &[count])?;
    let mut plans = Vec::new();
    for name in &recipe.plan.strategies {
        plans.push(if name == AUTO { run.choose(&scores)? } else { run.plan(&scores, name)? });
    }
    let dense = run.stages.dense_as_made();
    let mut variants = vec![variant(Kind::Dense, "dense".to_string(), dense, 0)];
    if let (Some(dense), Some((plan, _))) = (recipe.finetune.dense_recipe()?, plans.first()) {
        run.dense(&dense, plan, &mut variants)?;
    }
    for (name, (plan, planned)) in recipe.plan.strategies.iter().zip(&plans) {
        run.strategy(name, plan, planned, &mut variants)?;
    }
    let quantised = run.quantise(&mut variants)?;
    let table = run.measure(&variants)?;
    let healed =
        variants.iter().position(|variant| variant.kind == Kind::Healed).and_then(|place| table.rows.get(place));
    let kept = healed.and_then(|row| row.kept_of_finetuned.or(row.kept_of_dense));
    let gate_held = match (recipe.eval.min_retention, kept) {
        (Some(wanted), Some(kept)) => kept.ratio >= wanted,
        (Some(_), None) => false,
        (None, _) => true,
    };
    if let Some(variant) = variants.iter().find(|variant| variant.kind == Kind::Healed) {
        run.stages.export("", (&variant.source, &variant.digest), quantised.as_ref(), &recipe.export)?;
    }
    let folder = run.stages.store.folder().to_path_buf();
    write_json(&folder.join(format!("{TABLE_FILE}.json")), &table)?;
    write_text(&folder.join(format!("{TABLE_FILE}.md")), &table.markdown())?;
    run.manifest()?;
    Ok(RunResult { folder, table, gate_held })
}

fn variant(kind: Kind, label: String, made: Finished, dropped: usize) -> Variant {
    Variant { kind, label, source: made.model(), digest: made.digest, dropped }
}

impl RecipeRun<'_> {
    /// The plan of one strategy.
    fn plan(&mut self, scores: &Finished, name: &str) -> Result<(Plan, Finished)> {
        let (recipe, row) = (self.recipe, Strategy::named(name)?);
        let settings = PlanSettings {
            strategy: name.to_string(),
            how_many: how_many(&recipe.plan),
            seed: recipe.plan.seed,
            samples: None,
            fit_tokens: None,
            data: None,
            modality_weights: recipe.plan.modality_weights.clone(),
            as_released: recipe.plan.as_released && row.released_differs,
            beyond_structure: recipe.plan.beyond_structure && row.goes_beyond,
        };
        self.stages.plan(&format!("plan-{name}"), &recipe.calibration, scores, settings)
    }

    /// The plan of the candidate of `auto` that has the lowest loss on held-back data after a short healing; the first of
    /// equals. A candidate that cannot drop as many layers is left out. No benchmark is read.
    ///
    /// Errors: those of the steps; the first candidate's where none can.
    fn choose(&mut self, scores: &Finished) -> Result<(Plan, Finished)> {
        let recipe = self.recipe;
        let section = &recipe.finetune;
        let (_, Some(held_back)) = parts(section.held_back)? else {
            return Err(Error::invalid("plan", "strategy `auto` chooses on held-back data, and none is held back")
                .remedy("write `held_back = 0.1` into `[finetune]`"));
        };
        let read = TextSettings::of(&section.data_options(held_back), None);
        let settings = section.settings.clone().with(|settings| {
            let most = recipe.plan.auto.step_tokens;
            settings.data.step_tokens = Some(settings.data.step_tokens.map_or(most, |own| own.min(most)));
        });
        let mut best: Option<(f64, (Plan, Finished))> = None;
        let mut refused = None;
        for name in &recipe.plan.auto.candidates {
            let (plan, planned) = match self.plan(scores, name) {
                // Of some networks a strategy cannot drop that many layers: no block of them may go, or its structure ends.
                Err(Error::Invalid { subject, problem, remedy })
                    if subject == format!("strategy `{name}`") && problem.starts_with("cannot drop") =>
                {
                    self.stages.note(&format!("auto: {name}: left out: {problem}"));
                    refused.get_or_insert(Error::Invalid { subject, problem, remedy });
                    continue;
                }
                planned => planned?,
            };
            let pruned = self.pruned(name, &plan, &planned)?;
            let step = format!("auto-{name}");
            let options = section.data_options(self.stages.part);
            let healing = Healing {
                step: &step,
                work: &step,
                trained: Trained::Plan { plan: &plan, digest: &planned.digest },
                key: ("plan", &planned.digest),
                data: &section.data,
                options: &options,
                samples: section.samples,
                settings: &settings,
            };
            let healed = self.stages.heal(&pruned, &healing)?;
            let model = (&healed.model(), healed.digest.as_str());
            let found = self.stages.perplexity(("held-back", &step), model, &section.data, &read)?;
            self.stages.store.remove(&step)?;
            let loss = found.mean_loss;
            self.stages.note(&format!("auto: {name}: held-back loss {loss:.4} after a short healing"));
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, (plan, planned)));
            }
        }
        let (_, chosen) = best.ok_or_else(|| {
            let none = || Error::invalid("plan.auto", "has no candidates").remedy("name at least one strategy");
            refused.unwrap_or_else(none)
        })?;
        self.stages.note(&format!("auto: chose {}", chosen.0.strategy));
        Ok(chosen)
    }

    /// The model pruned by a plan.
    fn pruned(&mut self, name: &str, plan: &Plan, planned: &Finished) -> Result<Finished> {
        let drop = Drop::Plan { plan, digest: planned.digest.clone(), file: &planned.path };
        let settings = (&self.recipe.prune, &self.recipe.calibration);
        self.stages.prune(&format!("pruned-{name}"), &drop, settings, &[("plan", &planned.digest)])
    }

    /// The dense model finetuned on the samples of healing: all its layers, and as many as the plan finetunes.
    fn dense(&mut self, dense: &DenseRecipe, plan: &Plan, variants: &mut Vec<Variant>) -> Result<()> {
        let recipe = self.recipe;
        let whole = self.stages.dense_as_made();
        let part = plan.finetune.as_slice();
        let list = part.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let rows = [
            (Kind::DenseFinetuned, "dense-finetuned", None, "all"),
            (Kind::DensePartly, "dense-finetuned-partly", Some(part), list.as_str()),
        ];
        for (kind, step, layers, key) in rows {
            let finetuned = self.stages.heal(
                &whole,
                &Healing {
                    step,
                    work: step,
                    trained: Trained::Layers(layers),
                    key: ("layers", key),
                    data: &recipe.finetune.data,
                    options: &recipe.finetune.data_options(self.stages.part),
                    samples: recipe.finetune.samples,
                    settings: &dense.settings,
                },
            )?;
            let label = dense.label(&recipe.finetune.recipe, layers.map(<[usize]>::len));
            variants.push(variant(kind, label, finetuned, 0));
        }
        Ok(())
    }

    /// Pruned model and finetuned model of one strategy.
    fn strategy(&mut self, name: &str, plan: &Plan, planned: &Finished, variants: &mut Vec<Variant>) -> Result<()> {
        let recipe = self.recipe;
        let pruned = self.pruned(name, plan, planned)?;
        let healed = self.stages.heal(
            &pruned,
            &Healing {
                step: &format!("healed-{name}"),
                work: name,
                trained: Trained::Plan { plan, digest: &planned.digest },
                key: ("plan", &planned.digest),
                data: &recipe.finetune.data,
                options: &recipe.finetune.data_options(self.stages.part),
                samples: recipe.finetune.samples,
                settings: &recipe.finetune.settings,
            },
        )?;
        let dropped = plan.drop.len();
        let label = if name == AUTO { format!("{AUTO} ({})", plan.strategy) } else { name.to_string() };
        variants.push(variant(Kind::Dropped, format!("{label}, dropped"), pruned, dropped));
        variants.push(variant(Kind::Healed, format!("{label}, finetuned"), healed, dropped));
        Ok(())
    }

    /// Answers and timings of every model, and their table.
    fn measure(&mut self, variants: &[Variant]) -> Result<Table> {
        let recipe = self.recipe;
        let held_back = self.held_back_losses(variants)?;
        let questions = questions(&recipe.eval.benchmarks)?;
        let settings = &recipe.eval.settings;
        let mut scores = Vec::new();
        for variant in variants {
            let label = slug(&variant.label);
            scores.push(self.stages.answers(&label, &variant.source, &variant.digest, &questions, settings)?);
        }
        let of = |kind: Kind| variants.iter().position(|variant| variant.kind == kind).map(|place| &scores[place]);
        let (dense, finetuned) = (of(Kind::Dense), of(Kind::DenseFinetuned));
        let against = |own: &ModelScores, other: Option<&ModelScores>| -> Result<Option<PairedComparison>> {
            other.map_or(Ok(None), |other| steps::compared(&[(own, other)]))
        };
        let mut rows: Vec<TableRow> = Vec::new();
        for ((variant, own), held_back_loss) in variants.iter().zip(&scores).zip(held_back) {
            let label = slug(&variant.label);
            let other = self.stages.other(&label, (&variant.source, &variant.digest), &recipe.eval.other, settings)?;
            let base: Vec<f64> = rows.first().map_or(&other, |row| &row.other).iter().map(|own| own.value).collect();
            let (by_dense, by_finetuned) = (against(own, dense)?, against(own, finetuned)?);
            rows.push(TableRow {
                model: variant.label.clone(),
                dropped_layers: variant.dropped,
                groups: own.groups.iter().map(|group| (group.group.clone(), group.score)).collect(),
                average: own.score,
                kept_of_finetuned: by_finetuned.and_then(|found| found.ratio),
                difference_from_finetuned: by_finetuned.map(|found| found.difference),
                kept_of_dense: by_dense.and_then(|found| found.ratio),
                difference_from_dense: by_dense.map(|found| found.difference),
                held_back_loss,
                other: other.into_iter().zip(base).map(|(own, base)| own.against(base)).collect(),
                size_bytes: size_bytes(&variant.source)?,
                speed: None,
            });
        }
        self.bench(variants, &mut rows)?;
        let inputs = BTreeMap::from([("model".to_string(), self.stages.dense.digest.clone())]);
        Table::new(self.stages.named(Provenance::new(Table::SCHEMA_VERSION, inputs, recipe)?), rows)
    }

    /// Every model's loss on what was held back, where something was.
    fn held_back_losses(&mut self, variants: &[Variant]) -> Result<Vec<Option<f64>>> {
        let section = &self.recipe.finetune;
        let (_, Some(part)) = parts(section.held_back)? else { return Ok(vec![None; variants.len()]) };
        let settings = TextSettings::of(&section.data_options(part), None);
        let mut losses = Vec::with_capacity(variants.len());
        for variant in variants {
            let (label, model) = (slug(&variant.label), (&variant.source, variant.digest.as_str()));
            let scores = self.stages.perplexity(("held-back", &label), model, &section.data, &settings)?;
            losses.push(Some(scores.mean_loss));
        }
        Ok(losses)
    }

    /// Times of every finetuned and quantised model, in turn with the dense one; the dense row takes those of the first.
    fn bench(&mut self, variants: &[Variant], rows: &mut [TableRow]) -> Result<()> {
        let section = &self.recipe.bench;
        if !section.enabled {
            return Ok(());
        }
        let timed = |variant: &Variant| matches!(variant.kind, Kind::Healed | Kind::Quantised);
        for (place, variant) in variants.iter().enumerate().filter(|(_, variant)| timed(variant)) {
            let report =
                self.stages.bench(&slug(&variant.label), &variant.source, &variant.digest, &section.settings)?;
            let (Some(baseline), Some(speedup)) = (&report.baseline, &report.speedup) else { continue };
            let speed = |model: &ModelBench, ttft_speedup: f64, decoder_ttft_speedup: f64| Speed {
                ttft_ms: model.pipeline_ttft_ms.as_ref().unwrap_or(&model.decoder_ttft_ms).median,
                ttft_speedup,
                decoder_ttft_speedup,
                decode_tokens_per_s: model.decode_tokens_per_second.median,
            };
            let whole = speedup.pipeline_ttft.as_ref().unwrap_or(&speedup.decoder_ttft).median;
            if let Some(row) = rows.get_mut(place) {
                row.speed = Some(speed(&report.model, whole, speedup.decoder_ttft.median));
            }
            if let Some(row) = rows.first_mut() {
                row.speed.get_or_insert(speed(baseline, 1.0, 1.0));
            }
        }
        Ok(())
    }

    /// The dense model and the first strategy's finetuned one in the precisions of the recipe. Returns the latter.
    fn quantise(&mut self, variants: &mut Vec<Variant>) -> Result<Option<Quantised>> {
        let recipe = self.recipe;
        let mut last = None;
        for kind in [Kind::Dense, Kind::Healed] {
            let Some(variant) = variants.iter().find(|variant| variant.kind == kind) else { continue };
            let (label, dropped) = (variant.label.clone(), variant.dropped);
            let model = (&variant.source, variant.digest.as_str());
            last = self.stages.quantise(&slug(&label), model, (&recipe.export, &recipe.calibration))?;
            let Some(Quantised { made, models }) = &last else { continue };
            variants.extend(models.iter().map(|(row, source)| Variant {
                kind: Kind::Quantised,
                label: format!("{label}, {}", row.name),
                source: source.clone(),
                digest: made.digest.clone(),
                dropped,
            }));
        }
        Ok(last)
    }

    fn manifest(&self) -> Result<()> {
        let store = &self.stages.store;
        let path = store.folder().join(MANIFEST_FILE);
        let mut files = file_digests(store.folder())?;
        // The lock's file names the process that is running.
        files.retain(|name, _| ![MANIFEST_FILE, LOCK_FILE, FRONT_FILE].contains(&name.as_str()));
        let mut inputs = BTreeMap::from([("model".to_string(), self.stages.dense.digest.clone())]);
        let (calibration, finetune, part) = (&self.recipe.calibration, &self.recipe.finetune, self.stages.part);
        for (data, options) in
            [(&calibration.data, calibration.data_options(part)), (&finetune.data, finetune.data_options(part))]
        {
            let dataset = Dataset::open_for(data, &self.stages.bundle, &options)?;
            inputs.insert(format!("data {}", data.display()), dataset.digest()?);
        }
        for benchmark in &self.recipe.eval.benchmarks {
            inputs.insert(format!("benchmark {}", benchmark.display()), sha256_file(benchmark)?);
        }
        for other in self.recipe.eval.other.iter().filter(|other| other.data.is_file()) {
            inputs.insert(format!("data {}", other.data.display()), sha256_file(&other.data)?);
        }
        let provenance = self.stages.named(Provenance::new(Manifest::SCHEMA_VERSION, inputs, self.recipe)?);
        write_json(&path, &Manifest { provenance, files })
    }
}

fn how_many(plan: &PlanSection) -> HowMany {
    // `Recipe::read` has checked that there is one.
    plan.amounts().into_iter().flatten().next().map_or(HowMany::DropCount(0), |(_, amount)| amount)
}

/// A model's answers to all benchmarks of a finished run, by its name in the table; `None` when the folder lacks them.
///
/// Errors: as `base::read_json`.
pub fn stored_answers(folder: &Path, benchmarks: &[PathBuf], model: &str) -> Result<Option<ModelScores>> {
    super::stages::stored_answers(folder, benchmarks, &slug(model))
}

/// The speed measurement of a model of a finished run, by its name in the table; `None` when the folder lacks it.
///
/// Errors: as `base::read_json`.
pub fn stored_bench(folder: &Path, model: &str) -> Result<Option<BenchReport>> {
    let path = folder.join(format!("bench-{}.json", slug(model)));
    path.exists().then(|| read_json(&path, BenchReport::SCHEMA_VERSION)).transpose()
}

/// A label in a form that is valid in file names.
fn slug(label: &str) -> String {
    label.replace(", ", "-").replace(['(', ')'], "").replace(' ', "-")
}

/// Writes text under its final name atomically.
///
/// Errors: `Error::Io`; then no file remains.
pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(text.as_bytes())?;
    file.commit()
}
