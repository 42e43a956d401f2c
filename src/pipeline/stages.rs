//! The verbs as cached steps. Runs and sweeps consist of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::{Cancel, Device, Provenance, Result, Sha256Digest, read_json, refuse_hub_cache, write_json};
use crate::bundle::{Bundle, ModelSource};
use crate::data::{Amount, Benchmark, DataOptions, DataPart, Dataset, LeftOut, Subset};
use crate::eval::{
    BenchOptions, BenchReport, EvalReport, EvalTiming, GroupScore, ModelScores, TextReport, TextScores, bench,
    benchmark_name,
};
use crate::finetune;
use crate::method::select::{Measures, Strategy};
use crate::method::{FIT_TOKENS, Plan, ScoreSettings, Scores, score};
use crate::runtime::{FeatureCache, Runtime};

use super::comparison::{Measure, OtherData, OtherScore};
use super::prune_section::PruneSection;
use super::recipe::Calibration;
use super::steps::{
    self, Drop, Engine, EvalSettings, Finetune, Meter, PlanSettings, PlannedModel, TextSettings, Trained,
};
use super::store::{Finished, RunStore};

/// The run's folder, the dense model, and data shared by the steps.
pub struct Stages<'a> {
    pub store: RunStore,
    pub model: &'a ModelSource,
    pub bundle: Bundle,
    pub dense: PlannedModel,
    pub device: Device,
    pub cancel: &'a Cancel,
    /// The part of all data that models are scored and trained on.
    pub part: DataPart,
    on_step: &'a mut dyn FnMut(&str),
    /// Image features of the finetuning data, shared by all variants.
    features: Arc<FeatureCache>,
    engine: Option<Engine>,
}

/// A benchmark with the digest of its file.
pub struct Questions {
    path: PathBuf,
    benchmark: Benchmark,
    digest: Sha256Digest,
}

/// Settings of a finetuning step, without its model.
pub struct Healing<'a> {
    /// Name of the step and of its folder.
    pub step: &'a str,
    /// Folder for checkpoints and metrics, inside the run's folder.
    pub work: &'a str,
    pub trained: Trained<'a>,
    /// What the step is known by besides model and data: `plan` with its digest, for instance.
    pub key: (&'a str, &'a str),
    pub data: &'a Path,
    pub options: &'a DataOptions,
    pub samples: Option<usize>,
    pub settings: &'a finetune::Settings,
}

impl<'a> Stages<'a> {
    /// Opens the folder and the dense model.
    ///
    /// Errors: as `RunStore::open`, `ModelSource::open` and `PlannedModel::of`.
    pub fn open(
        folder: &Path,
        model: &'a ModelSource,
        device: Device,
        part: DataPart,
        cancel: &'a Cancel,
        on_step: &'a mut dyn FnMut(&str),
    ) -> Result<Self> {
        let bundle = model.open()?;
        refuse_hub_cache(folder)?;
        bundle.check_output(folder)?;
        let store = RunStore::open(folder)?.of_variants(model.chosen());
        let dense = PlannedModel::of(&bundle)?;
        let features = FeatureCache::new(256 << 20);
        Ok(Stages { store, model, bundle, dense, device, cancel, part, on_step, features, engine: None })
    }

    /// ONNX Runtime on the run's device.
    ///
    /// Errors: as `Runtime::new`.
    pub fn runtime(&self) -> Result<Runtime> {
        Runtime::new(self.device)
    }

    /// Image features that steps share.
    pub fn features(&self) -> &Arc<FeatureCache> {
        &self.features
    }

    /// A head with the dense model's name on the hub and its variants.
    pub fn named(&self, head: Provenance) -> Provenance {
        head.with_hub("model", self.bundle.hub_name()).with_variants("model", self.bundle.chosen_variants())
    }

    /// Prints a line for the user.
    pub fn note(&mut self, text: &str) {
        (self.on_step)(text);
    }

    /// Prints the duration of a step, or that its output is reused.
    pub fn report_step(&mut self, name: &str, done: &Finished) {
        let seconds = self.store.state().steps.get(name).map_or(0.0, |step| step.seconds);
        let how = if done.reused { "kept from before".to_string() } else { format!("{seconds:.1} s") };
        (self.on_step)(&format!("{name}: {how}"));
    }

    fn warn_left_out(&mut self, left_out: &LeftOut) {
        if let Some(summary) = left_out.summary() {
            (self.on_step)(&format!("warning: samples left out: {summary}"));
        }
    }

    /// Scores with all pack sizes that the strategies read for these numbers of dropped layers.
    ///
    /// Errors: as `method::score`.
    pub fn scores(&mut self, calibration: &Calibration, strategies: &[String], counts: &[usize]) -> Result<Finished> {
        let mut longer_packs = BTreeSet::new();
        for name in strategies {
            let packs = Strategy::named(name)?.packs;
            longer_packs.extend(counts.iter().flat_map(|&count| packs(count)).filter(|&size| size > 3));
        }
        let settings =
            ScoreSettings { amount: calibration.amount(), seed: calibration.seed, longer_packs, ..Default::default() };
        let dataset = Dataset::open_for(&calibration.data, &self.bundle, &calibration.data_options(self.part))?;
        let inputs = [("model", self.dense.digest.as_str()), ("data", &dataset.digest()?)];
        let (bundle, device, cancel) = (&self.bundle, self.device, self.cancel);
        let done = self.store.step("score", "scores.json", &inputs, &settings, |path| {
            write_json(path, &score(bundle, &dataset, &settings, device, cancel)?)
        })?;
        self.report_step("score", &done);
        self.warn_left_out(&Scores::read(&done.path)?.left_out);
        Ok(done)
    }

    /// A plan. Losses are measured if its strategy uses them.
    ///
    /// Errors: as `steps::plan`.
    pub fn plan(
        &mut self,
        step: &str,
        calibration: &Calibration,
        scores: &Finished,
        mut settings: PlanSettings,
    ) -> Result<(Plan, Finished)> {
        let strategy = Strategy::named(&settings.strategy)?;
        let measures = strategy.measures;
        let needs_data = measures != Measures::Nothing;
        settings.samples = needs_data.then_some(steps::CALIBRATION_SAMPLES);
        settings.fit_tokens = (measures == Measures::HealedLoss).then_some(FIT_TOKENS);
        settings.data = needs_data.then(|| calibration.data_options(self.part));
        let inputs = [("model", self.dense.digest.as_str()), ("scores", &scores.digest)];
        let (bundle, dense, device, cancel) = (&self.bundle, &self.dense, self.device, self.cancel);
        let options = calibration.data_options(self.part);
        let planned = self.store.step(step, &format!("{step}.json"), &inputs, &settings, |path| {
            let read = Scores::read(&scores.path)?;
            let mut meter = match needs_data {
                true => {
                    let data = (calibration.data.as_path(), &options);
                    let drawn = (None, calibration.seed, FIT_TOKENS);
                    Some(Meter::open(bundle, strategy, data, drawn, device, cancel)?)
                }
                false => None,
            };
            write_json(path, &steps::plan(dense, Some((&read, scores.digest.clone())), &settings, meter.as_mut())?)
        })?;
        self.report_step(step, &planned);
        let plan = Plan::read(&planned.path)?;
        self.warn_left_out(&plan.left_out);
        for warning in self.dense.plan_warnings(&plan) {
            (self.on_step)(&format!("warning: {warning}"));
        }
        Ok((plan, planned))
    }

    /// The dense model without layers, and with what makes up for them where the settings say so. `inputs` are further parts of
    /// the step's cache key.
    ///
    /// Errors: as `steps::prune` and `steps::compensate`.
    pub fn prune(
        &mut self,
        step: &str,
        drop: &Drop,
        (settings, calibration): (&PruneSection, &Calibration),
        inputs: &[(&str, &str)],
    ) -> Result<Finished> {
        let mut all: Vec<(&str, &str)> =
            std::iter::once(("model", self.dense.digest.as_str())).chain(inputs.iter().copied()).collect();
        let options = calibration.data_options(self.part);
        let (bundle, device, cancel) = (&self.bundle, self.device, self.cancel);
        let (mut subset, mut fitted_on) = (Subset { amount: Amount::All, seed: calibration.seed }, None);
        if settings.compensate.is_some() {
            let dataset = Dataset::open_for(&calibration.data, bundle, &options)?;
            subset.amount = Amount::Samples(steps::CALIBRATION_SAMPLES.min(dataset.len()));
            fitted_on = Some(dataset.digest()?);
        }
        let compensation = settings.compensation(subset)?;
        all.extend(fitted_on.iter().map(|digest| ("data", digest.as_str())));
        let (mut set_aside, mut left_out) = (Vec::new(), LeftOut::default());
        let key = (settings, compensation.map(|_| (subset, &options)));
        let make = |path: &Path| {
            let data = (calibration.data.as_path(), &options);
            let fit = |settings| steps::compensate(bundle, drop.layers().1, data, &settings, device, cancel);
            let compensated = compensation.map(fit).transpose()?;
            set_aside = steps::prune(bundle, drop, settings.deepstack, compensated.as_ref(), path)?.set_aside;
            left_out = compensated.map(|own| own.left_out).unwrap_or_default();
            Ok(())
        };
        let pruned = match key {
            (settings, None) => self.store.step(step, step, &all, settings, make)?,
            key => self.store.step(step, step, &all, &key, make)?,
        };
        self.report_step(step, &pruned);
        self.warn_left_out(&left_out);
        for variant in set_aside {
            (self.on_step)(&format!("warning: `{}` is set aside: {}", variant.file, variant.problem));
        }
        Ok(pruned)
    }

    /// The dense model as if a step had made it.
    pub fn dense_as_made(&self) -> Finished {
        let (path, variants) = (self.model.path().to_path_buf(), Some(self.model.variants().clone()));
        Finished { path, digest: self.dense.digest.clone(), reused: true, variants }
    }

    /// A pruned model, or the dense one, finetuned.
    ///
    /// Errors: as `steps::finetune`.
    pub fn heal(&mut self, pruned: &Finished, healing: &Healing) -> Result<Finished> {
        let settings = &healing.settings.clone().for_device(self.device);
        let amount = healing.samples.map_or(Amount::All, Amount::Samples);
        let subset = Subset { amount, seed: settings.seed };
        let data_digest = Dataset::open_for(healing.data, &self.bundle, healing.options)?.digest()?;
        let inputs = [("model", pruned.digest.as_str()), healing.key, ("data", &data_digest)];
        let work = self.store.folder().join("work").join(healing.work);
        let (features, device, cancel, teacher) = (&self.features, self.device, self.cancel, self.model);
        let mut left_out = LeftOut::default();
        let healed = self.store.step(healing.step, healing.step, &inputs, &(subset, settings), |path| {
            let request = Finetune {
                model: &pruned.model(),
                trained: healing.trained,
                data: healing.data,
                options: healing.options,
                subset,
                settings,
                device,
                work: &work,
                resume: true,
                limits: finetune::Limits::default(),
                ranks: None,
                features,
                teacher: Some(teacher),
            };
            steps::finetune(&request, path, cancel, &mut |_| ()).map(|report| left_out = report.left_out)
        })?;
        self.report_step(healing.step, &healed);
        self.warn_left_out(&left_out);
        Ok(healed)
    }

    /// A model's answers to all benchmarks, merged; `label` is part of the steps' names.
    ///
    /// Errors: as `Engine::answer`.
    pub fn answers(
        &mut self,
        label: &str,
        asked: &ModelSource,
        digest: &str,
        questions: &[Questions],
        settings: &EvalSettings,
    ) -> Result<ModelScores> {
        let mut scores = Vec::new();
        for Questions { path, benchmark, digest: data } in questions {
            let step = eval_step(path, label);
            let inputs = [("model", digest), ("data", data)];
            let (device, cancel, engine) = (self.device, self.cancel, &mut self.engine);
            let done = self.store.step(&step, &format!("{step}.json"), &inputs, settings, |target| {
                let engine = opened(engine, device)?;
                let model = engine.answer(asked, benchmark, path, settings, cancel)?;
                let inputs = inputs.iter().map(|(name, digest)| (name.to_string(), digest.to_string())).collect();
                let provenance = Provenance::new(EvalReport::SCHEMA_VERSION, inputs, settings)?
                    .with_variants("model", asked.chosen().as_deref())
                    .with_hub("model", asked.hub_name());
                write_json(
                    target,
                    &EvalReport {
                        provenance,
                        likelihood_not_measured: None,
                        rows_without_picture: benchmark.rows_without_picture(),
                        model,
                        baseline: None,
                        retention: None,
                    },
                )
            })?;
            self.report_step(&step, &done);
            let report: EvalReport = read_json(&done.path, EvalReport::SCHEMA_VERSION)?;
            scores.push(report.model);
        }
        Ok(merged(&scores))
    }

    /// True when `answers` would find all answers in the cache.
    ///
    /// Errors: as `RunStore::is_done`.
    pub fn answered(
        &self,
        label: &str,
        digest: &str,
        questions: &[Questions],
        settings: &EvalSettings,
    ) -> Result<bool> {
        for Questions { path, digest: data, .. } in questions {
            let inputs = [("model", digest), ("data", data.as_str())];
            if !self.store.is_done(&eval_step(path, label), &inputs, settings)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A model's perplexity on data, as the report of step `NAME-LABEL`.
    ///
    /// Errors: as `steps::eval_text`.
    pub fn perplexity(
        &mut self,
        (name, label): (&str, &str),
        (model, digest): (&ModelSource, &str),
        data: &Path,
        settings: &TextSettings,
    ) -> Result<TextScores> {
        let step = format!("{name}-{label}");
        let data_digest = Dataset::open_for(data, &self.bundle, &settings.data_options())?.digest()?;
        let inputs = [("model", digest), ("data", data_digest.as_str())];
        let (device, cancel, engine) = (self.device, self.cancel, &mut self.engine);
        let done = self.store.step(&step, &format!("{step}.json"), &inputs, settings, |target| {
            write_json(target, &steps::eval_text(opened(engine, device)?, model, None, data, settings, cancel)?)
        })?;
        self.report_step(&step, &done);
        let report: TextReport = read_json(&done.path, TextReport::SCHEMA_VERSION)?;
        Ok(report.model)
    }

    /// True when `perplexity` would read nothing with the model.
    ///
    /// Errors: as `RunStore::is_done`.
    pub fn read(
        &self,
        (name, label): (&str, &str),
        digest: &str,
        data: &Path,
        settings: &TextSettings,
    ) -> Result<bool> {
        let data_digest = Dataset::open_for(data, &self.bundle, &settings.data_options())?.digest()?;
        let inputs = [("model", digest), ("data", data_digest.as_str())];
        self.store.is_done(&format!("{name}-{label}"), &inputs, settings)
    }

    /// A model's figures on data of other kinds.
    ///
    /// Errors: as `answers` and `perplexity`.
    pub fn other(
        &mut self,
        label: &str,
        (model, digest): (&ModelSource, &str),
        other: &[OtherData],
        settings: &EvalSettings,
    ) -> Result<Vec<OtherScore>> {
        let mut scores = Vec::with_capacity(other.len());
        for data in other {
            let measure = data.measure();
            let value = match measure {
                Measure::Score => {
                    let asked = questions(std::slice::from_ref(&data.data))?;
                    self.answers(label, model, digest, &asked, &data.eval_settings(settings))?.score
                }
                Measure::Perplexity => {
                    let name = format!("text-{}", data.name());
                    self.perplexity((&name, label), (model, digest), &data.data, &data.text_settings())?.perplexity
                }
            };
            scores.push(OtherScore { name: data.name(), measure, value, kept: None });
        }
        Ok(scores)
    }

    /// True when `other` would do nothing with the model.
    ///
    /// Errors: as `answered` and `read`.
    pub fn other_done(&self, label: &str, digest: &str, other: &[OtherData], settings: &EvalSettings) -> Result<bool> {
        for data in other {
            let done = match data.measure() {
                Measure::Score => {
                    let asked = questions(std::slice::from_ref(&data.data))?;
                    self.answered(label, digest, &asked, &data.eval_settings(settings))?
                }
                Measure::Perplexity => {
                    let name = format!("text-{}", data.name());
                    self.read((&name, label), digest, &data.data, &data.text_settings())?
                }
            };
            if !done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A model's times in turn with the dense one's.
    ///
    /// Errors: as `eval::bench`.
    pub fn bench(
        &mut self,
        label: &str,
        model: &ModelSource,
        digest: &str,
        settings: &BenchOptions,
    ) -> Result<BenchReport> {
        let step = format!("bench-{label}");
        let inputs = [("model", digest), ("baseline", self.dense.digest.as_str())];
        let (device, cancel, dense) = (self.device, self.cancel, self.model);
        let done = self.store.step(&step, &format!("{step}.json"), &inputs, settings, |target| {
            let runtime = Runtime::new(device)?;
            write_json(target, &bench(model, Some(dense), &runtime, settings, None, cancel)?)
        })?;
        self.report_step(&step, &done);
        read_json(&done.path, BenchReport::SCHEMA_VERSION)
    }
}

/// The engine, opened where it is first needed.
fn opened(engine: &mut Option<Engine>, device: Device) -> Result<&mut Engine> {
    Ok(match engine {
        Some(engine) => engine,
        slot => slot.insert(Engine::new(device)?),
    })
}

/// The answers that `Stages::answers` kept in a run's folder, merged; `None` when one of its files is not there.
///
/// Errors: as `base::read_json`.
pub fn stored_answers(folder: &Path, benchmarks: &[PathBuf], label: &str) -> Result<Option<ModelScores>> {
    let mut scores = Vec::new();
    for benchmark in benchmarks {
        let path = folder.join(format!("{}.json", eval_step(benchmark, label)));
        if !path.exists() {
            return Ok(None);
        }
        let report: EvalReport = read_json(&path, EvalReport::SCHEMA_VERSION)?;
        scores.push(report.model);
    }
    Ok((!scores.is_empty()).then(|| merged(&scores)))
}

fn eval_step(benchmark: &Path, label: &str) -> String {
    format!("eval-{}-{label}", benchmark_name(benchmark))
}

/// Opens benchmarks.
///
/// Errors: as `Benchmark::open`.
pub fn questions(paths: &[PathBuf]) -> Result<Vec<Questions>> {
    let open = |path: &PathBuf| {
        let benchmark = Benchmark::open(path)?;
        let digest = benchmark.digest()?;
        Ok(Questions { path: path.clone(), benchmark, digest })
    };
    paths.iter().map(open).collect()
}

/// Total size of a model's ONNX files in bytes, without variants that were not chosen.
///
/// Errors: those of reading the files.
pub fn size_bytes(model: &ModelSource) -> Result<u64> {
    let bundle = model.open()?;
    bundle.components().iter().map(|component| bundle.size_bytes(component)).sum()
}

/// Merges several benchmarks. A benchmark with a metric of its own becomes one group with its score; the groups of
/// other benchmarks get the benchmark's name as a prefix.
fn merged(parts: &[ModelScores]) -> ModelScores {
    if let [only] = parts {
        return only.clone();
    }
    let mut whole = ModelScores {
        model: String::new(),
        benchmark: String::new(),
        questions: 0,
        metric: None,
        score: 0.0,
        figures: BTreeMap::new(),
        groups: Vec::new(),
        by_column: BTreeMap::new(),
        mean_of_groups: 0.0,
        mean_of_questions: 0.0,
        timing: EvalTiming::default(),
        likelihood: None,
        answers: Vec::new(),
    };
    for part in parts {
        let mut part = part.clone();
        if let Some(metric) = &part.metric {
            part.answers.iter_mut().for_each(|answer| answer.regroup(&part.benchmark));
            part.groups = vec![GroupScore {
                group: part.benchmark.clone(),
                questions: part.questions,
                score: part.score,
                metrics: BTreeMap::from([(metric.clone(), part.questions)]),
                figures: part.figures.clone(),
            }];
        } else {
            let name = |group: &str| format!("{}: {group}", part.benchmark);
            part.groups.iter_mut().for_each(|row| row.group = name(&row.group));
            part.answers.iter_mut().for_each(|row| row.group = name(&row.group));
        }
        whole.questions += part.questions;
        whole.groups.append(&mut part.groups);
        whole.answers.append(&mut part.answers);
    }
    whole.mean_of_groups = whole.groups.iter().map(|row| row.score).sum::<f64>() / whole.groups.len().max(1) as f64;
    whole.score = whole.mean_of_groups;
    whole
}
