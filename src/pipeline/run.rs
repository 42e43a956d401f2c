//! Runs a whole recipe: every verb in order, then writes the result table and the manifest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{AtomicFile, Cancel, Error, Provenance, Result, Sha256Digest, sha256_file, write_json};
use crate::bundle::Bundle;
use crate::data::Dataset;
use crate::eval::ModelBench;
use crate::export::{ExportSettings, export, target_named};

use super::recipe::{PlanSection, Recipe};
use super::stages::{Healing, Stages, questions, size_bytes};
use super::steps::{self, Drop, HowMany, PlanSettings};
use super::store::{Finished, file_digests};
use super::table::{Speed, Table, TableRow};

/// Version of the schema of `manifest.json`.
pub const MANIFEST_SCHEMA_VERSION: u32 = 1;
/// Name of the manifest in the run's folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the table in the run's folder, without extension.
pub const TABLE_FILE: &str = "table";

/// `manifest.json`: every file that a run made, and what it was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Manifest {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// SHA-256 of every file of the run's folder, by path.
    pub files: BTreeMap<String, Sha256Digest>,
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

/// One model of the table.
struct Variant {
    label: String,
    path: PathBuf,
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
    let stages = Stages::open(folder, &recipe.model, recipe.device.parse()?, cancel, on_step)?;
    let mut run = RecipeRun { recipe, stages };
    let count = how_many(&recipe.plan).count(&run.stages.dense)?;
    let scores = run.stages.scores(&recipe.calibration, &recipe.plan.strategies, &[count])?;
    let mut variants = vec![Variant {
        label: "dense".to_string(),
        path: recipe.model.clone(),
        digest: run.stages.dense.digest.clone(),
        dropped: 0,
    }];
    for name in &recipe.plan.strategies {
        run.strategy(&scores, name, &mut variants)?;
    }
    let table = run.measure(&variants)?;
    let gate_held = match (recipe.eval.min_retention, table.rows.get(2).and_then(|row| row.kept)) {
        (Some(wanted), Some(kept)) => kept.ratio >= wanted,
        (Some(_), None) => false,
        (None, _) => true,
    };
    run.export(&variants)?;
    let folder = run.stages.store.folder().to_path_buf();
    write_json(&folder.join(format!("{TABLE_FILE}.json")), &table)?;
    write_text(&folder.join(format!("{TABLE_FILE}.md")), &table.markdown())?;
    run.manifest()?;
    Ok(RunResult { folder, table, gate_held })
}

impl RecipeRun<'_> {
    /// Plan, pruned model and finetuned model of one strategy.
    fn strategy(&mut self, scores: &Finished, name: &str, variants: &mut Vec<Variant>) -> Result<()> {
        let recipe = self.recipe;
        let settings = PlanSettings {
            strategy: name.to_string(),
            how_many: how_many(&recipe.plan),
            seed: recipe.plan.seed,
            samples: None,
            data: None,
            modality_weights: recipe.plan.modality_weights.clone(),
        };
        let (plan, planned) = self.stages.plan(&format!("plan-{name}"), &recipe.calibration, scores, settings)?;
        let drop = Drop::Plan { plan: &plan, digest: planned.digest.clone() };
        let pruned =
            self.stages.prune(&format!("pruned-{name}"), &drop, &recipe.prune, &[("plan", &planned.digest)])?;
        let healed = self.stages.heal(
            &pruned,
            &Healing {
                step: &format!("healed-{name}"),
                work: name,
                plan: &plan,
                plan_digest: &planned.digest,
                plan_key: &planned.digest,
                data: &recipe.finetune.data,
                options: &recipe.finetune.data_options(),
                samples: recipe.finetune.samples,
                settings: &recipe.finetune.settings,
            },
        )?;
        let dropped = plan.drop.len();
        variants.push(Variant { label: format!("{name}, dropped"), path: pruned.path, digest: pruned.digest, dropped });
        variants.push(Variant {
            label: format!("{name}, finetuned"),
            path: healed.path,
            digest: healed.digest,
            dropped,
        });
        Ok(())
    }

    /// Answers and timings of every model, and their table.
    fn measure(&mut self, variants: &[Variant]) -> Result<Table> {
        let recipe = self.recipe;
        let questions = questions(&recipe.eval.benchmarks)?;
        let mut rows = Vec::new();
        let mut dense = None;
        for variant in variants {
            let label = slug(&variant.label);
            let settings = &recipe.eval.settings;
            let scores = self.stages.answers(&label, &variant.path, &variant.digest, &questions, settings)?;
            let dense = dense.get_or_insert_with(|| scores.clone());
            rows.push(TableRow {
                model: variant.label.clone(),
                dropped_layers: variant.dropped,
                groups: scores.groups.iter().map(|group| (group.group.clone(), group.score)).collect(),
                average: scores.score,
                kept: steps::retention(&scores, dense)?.score,
                size_bytes: size_bytes(&variant.path)?,
                speed: None,
            });
        }
        self.bench(variants, &mut rows)?;
        let inputs = BTreeMap::from([("model".to_string(), self.stages.dense.digest.clone())]);
        Table::new(Provenance::new(Table::SCHEMA_VERSION, inputs, recipe)?, rows)
    }

    /// Times of every finetuned model, in alternation with the dense one. The dense model's row has the times of the
    /// first comparison.
    fn bench(&mut self, variants: &[Variant], rows: &mut [TableRow]) -> Result<()> {
        let section = &self.recipe.bench;
        let Some((_, others)) = variants.split_first().filter(|_| section.enabled) else { return Ok(()) };
        for (place, variant) in others.iter().enumerate().filter(|(place, _)| place % 2 == 1) {
            let report = self.stages.bench(&slug(&variant.label), &variant.path, &variant.digest, &section.settings)?;
            let (Some(baseline), Some(speedup)) = (&report.baseline, &report.speedup) else { continue };
            let speed = |model: &ModelBench, ttft_speedup: f64, decoder_ttft_speedup: f64| Speed {
                ttft_ms: model.pipeline_ttft_ms.as_ref().unwrap_or(&model.decoder_ttft_ms).median,
                ttft_speedup,
                decoder_ttft_speedup,
                decode_tokens_per_s: model.decode_tokens_per_second.median,
            };
            let whole = speedup.pipeline_ttft.as_ref().unwrap_or(&speedup.decoder_ttft).median;
            if let Some(row) = rows.get_mut(place + 1) {
                row.speed = Some(speed(&report.model, whole, speedup.decoder_ttft.median));
            }
            if let Some(row) = rows.first_mut() {
                row.speed.get_or_insert(speed(baseline, 1.0, 1.0));
            }
        }
        Ok(())
    }

    /// The first strategy's finetuned model in other layouts.
    fn export(&mut self, variants: &[Variant]) -> Result<()> {
        let Some(variant) = variants.get(2) else { return Ok(()) };
        for name in &self.recipe.export.targets {
            let target = target_named(name).map_err(|problem| Error::invalid("export.targets", problem))?;
            let settings = ExportSettings::default();
            let inputs = [("model", variant.digest.as_str())];
            let done = self.stages.store.step(name, name, &inputs, &settings, |path| {
                export(&Bundle::open(&variant.path)?, target, &settings, path).map(|_| ())
            })?;
            self.stages.report_step(name, &done);
        }
        Ok(())
    }

    fn manifest(&self) -> Result<()> {
        let store = &self.stages.store;
        let path = store.folder().join(MANIFEST_FILE);
        let mut files = file_digests(store.folder())?;
        files.remove(MANIFEST_FILE);
        let mut inputs = BTreeMap::from([("model".to_string(), self.stages.dense.digest.clone())]);
        let (calibration, finetune) = (&self.recipe.calibration, &self.recipe.finetune);
        for (data, options) in
            [(&calibration.data, calibration.data_options()), (&finetune.data, finetune.data_options())]
        {
            let dataset = Dataset::open_for(data, &self.stages.bundle, &options)?;
            inputs.insert(format!("data {}", data.display()), dataset.digest()?);
        }
        for benchmark in &self.recipe.eval.benchmarks {
            inputs.insert(format!("benchmark {}", benchmark.display()), sha256_file(benchmark)?);
        }
        let provenance = Provenance::new(MANIFEST_SCHEMA_VERSION, inputs, self.recipe)?;
        write_json(&path, &Manifest { provenance, files })
    }
}

fn how_many(plan: &PlanSection) -> HowMany {
    // `Recipe::read` has checked that there is one.
    plan.amounts().into_iter().flatten().next().map_or(HowMany::DropCount(0), |(_, amount)| amount)
}

/// A label in a form that is valid in file names.
fn slug(label: &str) -> String {
    label.replace(", ", "-")
}

/// Writes text under its final name atomically.
///
/// Errors: `Error::Io`; then no file remains.
pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(text.as_bytes())?;
    file.commit()
}
