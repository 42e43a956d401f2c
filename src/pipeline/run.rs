//! A whole recipe: every verb in its order, each step once, then the table and the manifest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{AtomicFile, Cancel, Device, Provenance, Result, Sha256Digest, read_json, sha256_file, write_json};
use crate::bundle::Bundle;
use crate::data::{Amount, Benchmark, Dataset, SEQUENCE_LENGTH, Subset};
use crate::eval::{BenchReport, EvalReport, EvalTiming, ModelBench, ModelScores, bench, benchmark_name};
use crate::export::triton::{self, TritonSettings};
use crate::method::select::Strategy;
use crate::method::{LossMeter, Plan, ScoreSettings, Scores, score};
use crate::runtime::{FeatureCache, Runtime};

use super::recipe::Recipe;
use super::steps::{self, Drop, Engine, Finetune, HowMany, PlanSettings, PlannedModel};
use super::store::{Finished, Store, file_digests};
use super::table::{Row, Speed, Table};

/// Version of the schema of `manifest.json`.
pub const MANIFEST_SCHEMA_VERSION: u32 = 1;
/// Name of the manifest in the run's folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the table in the run's folder, without extension.
pub const TABLE_FILE: &str = "table";
/// Calibration samples on which strategies measure losses.
const LOSS_SAMPLES: usize = 32;

/// `manifest.json`: every file that a run made, and what it was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Manifest {
    #[serde(flatten)]
    pub provenance: Provenance,
    /// SHA-256 of every file of the run's folder, by path.
    pub files: BTreeMap<String, Sha256Digest>,
}

/// What a run came to.
pub struct RunResult {
    pub folder: PathBuf,
    pub table: Table,
    /// False when less is kept than the recipe's `min_retention`.
    pub gate_held: bool,
}

/// One model of the table.
struct Variant {
    label: String,
    path: PathBuf,
    digest: Sha256Digest,
    dropped: usize,
}

struct Run<'a> {
    recipe: &'a Recipe,
    store: Store,
    device: Device,
    cancel: &'a Cancel,
    say: &'a mut dyn FnMut(&str),
    dense: PlannedModel,
    /// Image features of the finetuning data, which all variants share.
    features: Arc<FeatureCache>,
}

/// Does what a recipe says, into `output` or the recipe's own folder. `say` is told each step.
///
/// Errors: those of the steps; what finished steps made is kept, and the same call goes on from there.
pub fn run(recipe: &Recipe, output: Option<&Path>, cancel: &Cancel, say: &mut dyn FnMut(&str)) -> Result<RunResult> {
    let store = Store::open(output.unwrap_or(&recipe.output))?;
    let bundle = Bundle::open(&recipe.model)?;
    let dense = PlannedModel { digest: bundle.digest()?, num_layers: steps::decoder_layers(&bundle)? };
    let features = FeatureCache::new(256 << 20);
    let mut run = Run { recipe, store, device: recipe.device.parse()?, cancel, say, dense, features };
    let scores = run.scores(&bundle)?;
    let mut variants = vec![Variant {
        label: "dense".to_string(),
        path: recipe.model.clone(),
        digest: run.dense.digest.clone(),
        dropped: 0,
    }];
    for name in &recipe.plan.strategies {
        run.strategy(&bundle, &scores, name, &mut variants)?;
    }
    let table = run.measure(&variants)?;
    let gate_held = match (recipe.eval.min_retention, table.rows.get(2).and_then(|row| row.kept)) {
        (Some(wanted), Some(kept)) => kept.ratio >= wanted,
        (Some(_), None) => false,
        (None, _) => true,
    };
    run.export(&variants)?;
    let folder = run.store.folder().to_path_buf();
    write_json(&folder.join(format!("{TABLE_FILE}.json")), &table)?;
    write_text(&folder.join(format!("{TABLE_FILE}.md")), &table.markdown())?;
    run.manifest()?;
    Ok(RunResult { folder, table, gate_held })
}

impl Run<'_> {
    fn count(&self) -> Result<usize> {
        how_many(self.recipe).count(self.dense.num_layers)
    }

    fn told(&mut self, name: &str, done: &Finished) {
        let seconds = self.store.state().steps.get(name).map_or(0.0, |step| step.seconds);
        let how = if done.reused { "kept from before".to_string() } else { format!("{seconds:.1} s") };
        (self.say)(&format!("{name}: {how}"));
    }

    fn scores(&mut self, bundle: &Bundle) -> Result<Finished> {
        let calibration = &self.recipe.calibration;
        let count = self.count()?;
        let mut longer_packs = BTreeSet::new();
        for name in &self.recipe.plan.strategies {
            longer_packs.extend((Strategy::named(name)?.packs)(count).into_iter().filter(|&size| size > 3));
        }
        let amount = match (calibration.samples, calibration.fraction) {
            (Some(samples), _) => Amount::Samples(samples),
            (None, part) => Amount::Fraction(part.unwrap_or(1.0)),
        };
        let settings = ScoreSettings { amount, seed: calibration.seed, longer_packs, ..ScoreSettings::default() };
        let dataset = Dataset::open_for(&calibration.data, bundle, SEQUENCE_LENGTH)?;
        let inputs = [("model", self.dense.digest.as_str()), ("data", &dataset.digest()?)];
        let (device, cancel) = (self.device, self.cancel);
        let done = self.store.step("score", "scores.json", &inputs, &settings, |path| {
            write_json(path, &score(bundle, &dataset, &settings, device, cancel)?)
        })?;
        self.told("score", &done);
        Ok(done)
    }

    /// Plan, pruned model and finetuned model of one strategy.
    fn strategy(&mut self, bundle: &Bundle, scores: &Finished, name: &str, variants: &mut Vec<Variant>) -> Result<()> {
        let (recipe, cancel, device) = (self.recipe, self.cancel, self.device);
        let samples = Strategy::named(name)?.measures_loss.then_some(LOSS_SAMPLES);
        let settings =
            PlanSettings { strategy: name.to_string(), how_many: how_many(recipe), seed: recipe.plan.seed, samples };
        let inputs = [("model", self.dense.digest.as_str()), ("scores", &scores.digest)];
        let dense = &self.dense;
        let step = format!("plan-{name}");
        let planned = self.store.step(&step, &format!("{step}.json"), &inputs, &settings, |path| {
            let read = Scores::read(&scores.path)?;
            let mut meter = match Strategy::named(name)?.measures_loss {
                true => {
                    let data = Dataset::open_for(&recipe.calibration.data, bundle, SEQUENCE_LENGTH)?;
                    let amount = Amount::Samples(LOSS_SAMPLES.min(data.len()));
                    let subset = Subset { amount, seed: recipe.calibration.seed };
                    Some((LossMeter::new(bundle, &data, subset, device, cancel)?, data.digest()?))
                }
                false => None,
            };
            let losses = meter.as_mut().map(|(measure, data)| steps::Losses { data: data.clone(), measure });
            write_json(path, &steps::plan(dense, Some((&read, scores.digest.clone())), &settings, losses)?)
        })?;
        self.told(&step, &planned);
        let plan = Plan::read(&planned.path)?;

        let inputs = [("model", self.dense.digest.as_str()), ("plan", &planned.digest)];
        let step = format!("pruned-{name}");
        let pruned = self.store.step(&step, &step, &inputs, &(), |path| {
            steps::prune(bundle, &Drop::Plan { plan: &plan, digest: planned.digest.clone() }, path).map(|_| ())
        })?;
        self.told(&step, &pruned);

        let section = &recipe.finetune;
        let features = Arc::clone(&self.features);
        let amount = section.samples.map_or(Amount::All, Amount::Samples);
        let subset = Subset { amount, seed: section.settings.seed };
        let data_digest = Dataset::open_for(&section.data, bundle, SEQUENCE_LENGTH)?.digest()?;
        let inputs = [("model", pruned.digest.as_str()), ("plan", &planned.digest), ("data", &data_digest)];
        let step = format!("healed-{name}");
        let work = self.store.folder().join("work").join(name);
        let healed = self.store.step(&step, &step, &inputs, &(subset, &section.settings), |path| {
            let request = Finetune {
                pruned: &pruned.path,
                plan: &plan,
                plan_digest: planned.digest.clone(),
                data: &section.data,
                sequence_length: SEQUENCE_LENGTH,
                subset,
                settings: &section.settings,
                device,
                work: &work,
                resume: true,
                features: &features,
                teacher: Some(&recipe.model),
            };
            steps::finetune(&request, path, cancel, &mut |_| ()).map(|_| ())
        })?;
        self.told(&step, &healed);
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

    /// Answers and timings of every model, and the table of them.
    fn measure(&mut self, variants: &[Variant]) -> Result<Table> {
        let recipe = self.recipe;
        let mut benchmarks = Vec::new();
        for path in &recipe.eval.benchmarks {
            let benchmark = Benchmark::open(path)?;
            let digest = benchmark.digest()?;
            benchmarks.push((path, benchmark, digest));
        }
        let mut engine = None;
        let mut answered: Vec<Vec<ModelScores>> = Vec::new();
        for variant in variants {
            let mut scores = Vec::new();
            for (path, benchmark, digest) in &benchmarks {
                let name = benchmark_name(path);
                let step = format!("eval-{name}-{}", slug(&variant.label));
                let inputs = [("model", variant.digest.as_str()), ("data", digest)];
                let settings = &recipe.eval.settings;
                let (device, cancel) = (self.device, self.cancel);
                let done = self.store.step(&step, &format!("{step}.json"), &inputs, settings, |target| {
                    let engine = match &mut engine {
                        Some(engine) => engine,
                        slot => slot.insert(Engine::new(device)?),
                    };
                    let model = engine.answer(&variant.path, benchmark, path, settings, cancel)?;
                    let inputs = inputs.iter().map(|(name, digest)| (name.to_string(), digest.to_string())).collect();
                    let provenance = Provenance::new(EvalReport::SCHEMA_VERSION, inputs, settings)?;
                    write_json(target, &EvalReport { provenance, model, baseline: None, retention: None })
                })?;
                self.told(&step, &done);
                let report: EvalReport = read_json(&done.path, EvalReport::SCHEMA_VERSION)?;
                scores.push(report.model);
            }
            answered.push(scores);
        }
        let mut rows = Vec::new();
        let dense = merged(answered.first().map_or(&[], Vec::as_slice));
        for (variant, scores) in variants.iter().zip(&answered) {
            let scores = merged(scores);
            let kept = steps::retention(&scores, &dense)?.mean_of_groups;
            let bundle = Bundle::open(&variant.path)?;
            let mut size_bytes = 0;
            for component in bundle.components() {
                size_bytes += bundle.size_bytes(component)?;
            }
            rows.push(Row {
                model: variant.label.clone(),
                dropped_layers: variant.dropped,
                groups: scores.groups.iter().map(|group| (group.group.clone(), group.score)).collect(),
                average: scores.mean_of_groups,
                kept,
                size_bytes,
                speed: None,
            });
        }
        self.bench(variants, &mut rows)?;
        let inputs = BTreeMap::from([("model".to_string(), self.dense.digest.clone())]);
        Table::new(Provenance::new(Table::SCHEMA_VERSION, inputs, recipe)?, rows)
    }

    /// Times of every finetuned model, in turn with the dense one; the dense row takes those of the first.
    fn bench(&mut self, variants: &[Variant], rows: &mut [Row]) -> Result<()> {
        let section = &self.recipe.bench;
        let Some((dense, others)) = variants.split_first().filter(|_| section.enabled) else { return Ok(()) };
        let (device, cancel) = (self.device, self.cancel);
        for (place, variant) in others.iter().enumerate().filter(|(place, _)| place % 2 == 1) {
            let step = format!("bench-{}", slug(&variant.label));
            let inputs = [("model", variant.digest.as_str()), ("baseline", &dense.digest)];
            let done = self.store.step(&step, &format!("{step}.json"), &inputs, &section.settings, |target| {
                let runtime = Runtime::new(device)?;
                let report = bench(&variant.path, Some(&dense.path), &runtime, &section.settings, None, cancel)?;
                write_json(target, &report)
            })?;
            self.told(&step, &done);
            let report: BenchReport = read_json(&done.path, BenchReport::SCHEMA_VERSION)?;
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
        let Some(variant) = variants.get(2).filter(|_| self.recipe.export.triton) else { return Ok(()) };
        let settings = TritonSettings::default();
        let inputs = [("model", variant.digest.as_str())];
        let done = self.store.step("triton", "triton", &inputs, &settings, |path| {
            triton::export(&Bundle::open(&variant.path)?, &settings, path).map(|_| ())
        })?;
        self.told("triton", &done);
        Ok(())
    }

    fn manifest(&self) -> Result<()> {
        let path = self.store.folder().join(MANIFEST_FILE);
        let mut files = file_digests(self.store.folder())?;
        files.remove(MANIFEST_FILE);
        let mut inputs = BTreeMap::from([("model".to_string(), self.dense.digest.clone())]);
        let bundle = Bundle::open(&self.recipe.model)?;
        for data in [&self.recipe.calibration.data, &self.recipe.finetune.data] {
            let dataset = Dataset::open_for(data, &bundle, SEQUENCE_LENGTH)?;
            inputs.insert(format!("data {}", data.display()), dataset.digest()?);
        }
        for benchmark in &self.recipe.eval.benchmarks {
            inputs.insert(format!("benchmark {}", benchmark.display()), sha256_file(benchmark)?);
        }
        let provenance = Provenance::new(MANIFEST_SCHEMA_VERSION, inputs, self.recipe)?;
        write_json(&path, &Manifest { provenance, files })
    }
}

fn how_many(recipe: &Recipe) -> HowMany {
    match (recipe.plan.drop_count, recipe.plan.drop_ratio) {
        (Some(count), _) => HowMany::DropCount(count),
        (None, ratio) => HowMany::DropRatio(ratio.unwrap_or_default()),
    }
}

/// A label as part of a file name.
fn slug(label: &str) -> String {
    label.replace(", ", "-")
}

/// Several benchmarks as one; groups are told apart by the benchmark where there is more than one.
fn merged(parts: &[ModelScores]) -> ModelScores {
    let mut whole = ModelScores {
        model: String::new(),
        benchmark: String::new(),
        questions: 0,
        groups: Vec::new(),
        mean_of_groups: 0.0,
        mean_of_questions: 0.0,
        timing: EvalTiming::default(),
        answers: Vec::new(),
    };
    for part in parts {
        let mut part = part.clone();
        if parts.len() > 1 {
            let name = |group: &str| format!("{}: {group}", part.benchmark);
            part.groups.iter_mut().for_each(|row| row.group = name(&row.group));
            part.answers.iter_mut().for_each(|row| row.group = name(&row.group));
        }
        whole.questions += part.questions;
        whole.groups.append(&mut part.groups);
        whole.answers.append(&mut part.answers);
    }
    whole.mean_of_groups = whole.groups.iter().map(|row| row.score).sum::<f64>() / whole.groups.len().max(1) as f64;
    whole
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(text.as_bytes())?;
    file.commit()
}
