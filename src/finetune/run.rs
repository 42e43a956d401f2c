//! The whole of a finetuning run: cut, compute the frozen part, train, put the weights back.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device as TorchDevice;

use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest, notice, sha256_json, thread_count};
use crate::bundle::{Bundle, Role};
use crate::data::LeftOut;
use crate::finetune::checkpoint::begun;
use crate::finetune::cut::{Cut, FitTarget, Suffix, replaced, side_inputs};
use crate::finetune::data::{Course, Dense, Lesson, Source, Store, Teacher, TrainingSet};
use crate::finetune::loss;
use crate::finetune::plan::{Facts, Limits, PlannedData, Point, RunPlan, Sizes, anchor_points};
use crate::finetune::record::{LayerFit, METRICS_FILE, RateTrial, StepMetrics, Totals, best};
use crate::finetune::settings::{Lora, LoraLayers, Settings};
use crate::finetune::student::Student;
use crate::finetune::train::{DenseStream, Run, Summary, fit, search, train};
use crate::ir::Model;
use crate::rewrite::extract;
use crate::runtime::{Decoder, FeatureCache, Runtime, SessionOptions, VlmSession, headed};
use crate::torch::{Hold, Ranks};

/// What to finetune, on what, and how.
pub struct Request<'a> {
    /// The pruned model.
    pub bundle: &'a Bundle,
    /// Decoder layers to train, as the pruned model counts them.
    pub layers: &'a [usize],
    /// The samples.
    pub data: &'a dyn Source,
    /// Losses, optimiser, schedule and stages.
    pub settings: &'a Settings,
    /// Device on which the trained layers are computed.
    pub device: Device,
    /// Folder for the frozen part's outputs, checkpoints and metrics; kept between runs.
    pub work: &'a Path,
    /// Goes on from the newest checkpoint in `work`, if there is one.
    pub resume: bool,
    /// What the run may take of the machine.
    pub limits: Limits,
    /// The processes that share the samples of every step; all of them see `work`.
    pub ranks: Option<&'a Ranks>,
    /// Image features of models with the same vision encoder.
    pub features: &'a Arc<FeatureCache>,
}

impl Request<'_> {
    /// Where this process keeps what the others do not read: a folder of its own in `work` for all but the first.
    pub fn own_work(&self) -> PathBuf {
        match self.ranks {
            Some(ranks) if ranks.rank() > 0 => self.work.join(format!("rank-{}", ranks.rank())),
            _ => self.work.to_path_buf(),
        }
    }
}

/// What a run gives.
pub struct Outcome {
    /// The decoder with its trained weights; all other initializers are the ones it had.
    pub decoder: Model,
    /// Figures of the run.
    pub report: Report,
}

/// How a run went: the content of the report file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Layers trained, as the pruned model counts them.
    pub layers: Vec<usize>,
    /// Elements of the trained weights, or of the adapters beside them.
    pub trained_parameters: u64,
    /// Samples trained on.
    pub samples: u64,
    /// Their ids.
    #[serde(default)]
    pub sample_ids: Vec<String>,
    /// Samples that were drawn and not used, by reason.
    pub left_out: LeftOut,
    /// Optimiser steps.
    pub steps: u64,
    /// The step that a resumed run went on from; 0 otherwise.
    pub resumed_from_step: u64,
    /// Tokens without padding, images included, over all epochs; those that each layer saw where layers are healed one after
    /// the other.
    pub tokens: u64,
    /// Answer tokens over all epochs.
    pub answer_tokens: u64,
    /// The peak learning rate, chosen from the trials where there are any.
    pub learning_rate: f64,
    /// Learning rates that were tried, in the order of the settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<RateTrial>,
    /// What the fit before the first step did, layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fitted: Vec<LayerFit>,
    /// Time of the fit.
    #[serde(default)]
    pub fit_s: f64,
    /// None where the run ends with the fit.
    pub first_loss: Option<f64>,
    /// Loss of the last step; absent where the run ends with the fit.
    pub last_loss: Option<f64>,
    /// Time in optimiser steps, over all resumptions.
    pub train_s: f64,
    /// Tokens of all steps over the time of the steps.
    pub tokens_per_s: f64,
    /// Largest resident set of the process.
    pub peak_memory_bytes: u64,
    /// Name of the JSONL file of metrics in the work folder.
    pub metrics_file: String,
}

impl Report {
    /// Version of the report's schema.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// Finetunes the layers and gives the decoder with their new weights. Nothing of the bundle is changed.
///
/// Errors: `Error::Invalid` and `Error::Unsupported` for settings, layers, graphs and data that do not fit;
/// `Error::Interrupted` when the user asked to stop, a checkpoint left behind; `Error::Engine` from LibTorch and ONNX
/// Runtime.
pub fn finetune(request: &Request<'_>, cancel: &Cancel, observer: &mut dyn FnMut(&StepMetrics)) -> Result<Outcome> {
    finetune_with_teacher(request, None, cancel, observer)
}

/// [`finetune`] with the dense model at hand, for the losses that need it.
///
/// Errors: as `finetune`, and `Error::Invalid` when the two models do not belong together.
pub fn finetune_with_teacher(
    request: &Request<'_>,
    teacher: Option<&Teacher<'_>>,
    cancel: &Cancel,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Outcome> {
    let settings = request.settings;
    settings.check()?;
    let all_stages = settings.of_all_stages();
    let asked = || all_stages.losses.iter().filter(|(_, weight)| **weight > 0.0).map(|(kind, _)| *kind);
    loss::check_teacher(asked(), settings.fit, teacher.is_some())?;
    let device = torch_device(request.device)?;
    if device == TorchDevice::Cpu {
        // What this thread does between the passes is too small to be shared, and its last bits must not depend on how
        // busy the machine is.
        tch::set_num_threads(1);
    }
    let wanted = settings.fit || asked().any(|kind| kind.needs_teacher());
    let teacher = teacher.filter(|_| wanted);
    // Files are hashed while the graphs are looked at.
    let (digests, opened) = std::thread::scope(|scope| {
        let (bundle, data) = (request.bundle, request.data);
        let hashing = scope.spawn(move || {
            let dense = teacher.map(|teacher| teacher.bundle.digest()).transpose()?;
            Ok::<_, Error>((bundle.digest()?, data.digest()?, dense))
        });
        let opened = Opened::new(request, teacher);
        (hashing.join().unwrap_or_else(|panic| resume_unwind(panic)), opened)
    });
    let Opened { decoder, cut, suffix, sizes, targets, points, dense } = opened?;
    let (model_digest, data_digest, dense_digest) = digests?;
    let own = request.own_work();
    std::fs::create_dir_all(&own).map_err(|e| Error::io("create", &own, e))?;
    let teacher_bytes = dense.as_ref().map_or(0, Dense::weight_bytes);
    let planned = |data: PlannedData| {
        let (layer_count, first) = (cut.analysis.map.layers.len(), cut.first);
        let parts = Parts { sizes: &sizes, targets: &targets, points: &points, teacher_bytes, layer_count, first };
        resolve(request, &parts, data)
    };
    if request.limits.memory.is_some() {
        planned(estimated(request.data)?)?.check()?;
    }

    let mut inputs = BTreeMap::from([
        ("model".to_string(), model_digest.clone()),
        ("data".to_string(), data_digest.clone()),
        ("layers".to_string(), sha256_json(&request.layers)?),
        ("settings".to_string(), sha256_json(settings)?),
    ]);
    let key =
        sha256_json(&("stream with sample numbers", &model_digest, &data_digest, cut.first, settings.max_tokens))?;
    let store = Store::new(&own, &key, side_inputs(&cut.analysis.model.graph, &suffix)?);
    let course = teacher.zip(dense).zip(dense_digest).map(|((teacher, dense), digest)| {
        let lesson = Lesson {
            teacher,
            trained: request.layers,
            first: cut.first,
            source: request.data,
            data_digest: &data_digest,
            settings: &all_stages,
            device: request.device,
            work: &own,
            features: request.features,
        };
        lesson.prepare(dense, digest)
    });
    let course = course.transpose()?;
    let (mut dataset, left_out) = frozen_part(request, &cut, &store, course.as_ref(), cancel)?;

    let mut plan = planned(PlannedData {
        samples: dataset.examples.len() as u64,
        tokens: dataset.examples.iter().map(|example| example.length as u64).sum(),
        answer_tokens: dataset.examples.iter().map(|example| example.targets.len() as u64).sum(),
        longest_tokens: dataset.examples.iter().map(|example| example.length as u64).max().unwrap_or(0),
        estimated: false,
    })?;
    plan.check()?;
    if let Some(ranks) = request.ranks {
        // A step is cut into as many passes as one process wants, so all must know the same number of cores.
        let first = ranks.from_first(&plan.workers.to_le_bytes())?;
        plan.workers = first.try_into().map_or(plan.workers, u64::from_le_bytes);
    }
    notice(plan.line());
    let hold = if plan.frozen_as_stored { Hold::Stored } else { Hold::Widened };
    let compile = || Student::compile(&cut, suffix.clone(), settings.precision, hold, device);
    let mut student = compile()?;
    if let (Some(teacher), Some(course)) = (teacher, &course) {
        inputs.insert("teacher".to_string(), course.digest.clone());
        if !course.kept() {
            course.fill(None, cancel)?;
        }
        let targets = course.open(&dataset.examples, dataset.hidden_size())?;
        student.points = targets.streams.iter().map(|target| target.point).collect();
        let points = anchor_points(teacher.anchors, request.layers, &all_stages).into_iter();
        student.anchor_points = points.filter_map(|point| point.checked_sub(cut.first)).collect();
        dataset.targets = targets;
    }
    let mut students = vec![student];
    while (students.len() as u64) < plan.workers {
        let mut twin = compile()?;
        twin.work_for(&students[0])?;
        students.push(twin);
    }
    let (work, resume, batch_tokens) = (own.as_path(), request.resume, plan.batch_tokens as usize);
    let (shared, ranks) = (request.work, request.ranks);
    let asked_settings = settings;
    let settings = &Settings { gradient_checkpointing: Some(plan.gradient_checkpointing), ..asked_settings.clone() };
    let numbers: Vec<u64> = dataset.examples.iter().map(|example| example.number).collect();
    let live = course.as_ref().map(|course| Live { course, numbers, cancel });
    let dense = live.as_ref().map(|live| live as &dyn DenseStream);
    let threads = plan.threads as usize;
    let run = Run {
        settings,
        device,
        batch_tokens,
        threads,
        dense,
        first: cut.first,
        inputs: &inputs,
        work,
        shared,
        ranks,
        resume,
        cancel,
    };
    let resumed = if request.resume { begun(request.work)? } else { None };
    let done = match resumed {
        Some(totals) => totals,
        None => begin(&run, &targets, &mut students, &mut dataset)?,
    };
    let rate = best(&done.trials).unwrap_or(settings.learning_rate);
    let chosen = Settings { learning_rate: rate, ..settings.clone() };
    let run = Run { settings: &chosen, ..run };
    let summary = train(run, &targets, &mut students, &mut dataset, done, observer)?;
    let tensors = students[0].changed(&cut, settings.lora().map_or(1.0, Lora::scale))?;
    let decoder = replaced(&decoder, tensors)?;
    let report = report(request, rate, inputs, &dataset, left_out, &summary)?;
    Ok(Outcome { decoder, report })
}

/// The graphs, with what follows from them alone.
struct Opened {
    decoder: Model,
    cut: Cut,
    suffix: Suffix,
    sizes: Sizes,
    /// Products to fit in each trained layer.
    targets: Vec<FitTarget>,
    points: Vec<Point>,
    dense: Option<Dense>,
}

impl Opened {
    fn new(request: &Request<'_>, teacher: Option<&Teacher<'_>>) -> Result<Self> {
        let settings = request.settings;
        let decoder = crate::onnx::load(&request.bundle.path_of(request.bundle.require(Role::Decoder)?))?;
        let whole = headed(request.bundle, decoder.clone())?;
        let mut cut = Cut::new(&whole, request.layers)?;
        if settings.train_head {
            cut.train_head()?;
        }
        let fits = settings.fit || settings.layer_by_layer();
        let mut targets = if fits { cut.targets(request.layers, !settings.trains())? } else { Vec::new() };
        if let Some(lora) = settings.lora() {
            if settings.lora_layers == LoraLayers::All {
                let all: Vec<usize> = (0..cut.analysis.map.layers.len()).collect();
                let after = cut.first;
                cut = Cut::new(&whole, &all)?;
                if settings.train_head {
                    cut.train_head()?;
                }
                targets.iter_mut().for_each(|target| target.layer += after);
            }
            let written: &[FitTarget] = if settings.fit { &targets } else { &[] };
            cut.adapt(lora, written)?;
        }
        let (suffix, first) = (cut.suffix()?, cut.first);
        let sizes = Sizes::of(&cut, &suffix);
        let dense = teacher.map(Dense::open).transpose()?;
        let points = dense.as_ref().zip(teacher);
        let points =
            points.map(|(dense, teacher)| dense.points(teacher, request.layers, first, &settings.of_all_stages()));
        Ok(Opened { decoder, cut, suffix, sizes, targets, points: points.unwrap_or_default(), dense })
    }
}

/// What a plan needs of the graphs.
struct Parts<'a> {
    sizes: &'a Sizes,
    targets: &'a [FitTarget],
    points: &'a [Point],
    teacher_bytes: u64,
    layer_count: usize,
    first: usize,
}

fn resolve(request: &Request<'_>, parts: &Parts<'_>, data: PlannedData) -> Result<RunPlan> {
    let heads = request.bundle.config().and_then(|config| config.num_attention_heads).unwrap_or(0);
    RunPlan::resolve(&Facts {
        device: request.device.to_string(),
        on_gpu: request.device != Device::Cpu,
        cores: thread_count() as u64,
        heads: heads as u64,
        settings: request.settings,
        layers: request.layers,
        layer_count: parts.layer_count,
        first: parts.first,
        sizes: parts.sizes,
        fitted: parts.targets,
        points: parts.points,
        teacher_bytes: parts.teacher_bytes,
        data,
        limits: request.limits,
    })
}

/// Samples that a plan looks at before the data has been read.
const ESTIMATED_FROM: usize = 64;

/// What the first samples say of all of them.
fn estimated(source: &dyn Source) -> Result<PlannedData> {
    let (mut seen, mut tokens, mut answers, mut longest) = (0u64, 0u64, 0u64, 0u64);
    for sample in source.samples()?.take(ESTIMATED_FROM) {
        let sample = sample?;
        let length = sample.prompt.input_ids.len() as u64;
        (seen, tokens, longest) = (seen + 1, tokens + length, longest.max(length));
        answers += sample.answer_mask.iter().filter(|answer| **answer).count() as u64;
    }
    let samples = source.count();
    let all = |some: u64| (u128::from(some) * u128::from(samples) / u128::from(seen.max(1))) as u64;
    let (tokens, answer_tokens) = (all(tokens), all(answers));
    Ok(PlannedData { samples, tokens, answer_tokens, longest_tokens: longest, estimated: true })
}

/// Decides a run and does nothing: what is trained, in which order, on what, and what it takes.
///
/// Errors: as [`finetune`], for what does not need the data to be read.
pub fn plan_run(request: &Request<'_>, teacher: Option<&Teacher<'_>>) -> Result<RunPlan> {
    request.settings.check()?;
    let all = request.settings.of_all_stages();
    let asked = || all.losses.iter().filter(|(_, weight)| **weight > 0.0).map(|(kind, _)| *kind);
    loss::check_teacher(asked(), request.settings.fit, teacher.is_some())?;
    let opened = Opened::new(request, teacher)?;
    let parts = Parts {
        sizes: &opened.sizes,
        targets: &opened.targets,
        points: &opened.points,
        teacher_bytes: opened.dense.as_ref().map_or(0, Dense::weight_bytes),
        layer_count: opened.cut.analysis.map.layers.len(),
        first: opened.cut.first,
    };
    resolve(request, &parts, estimated(request.data)?)
}

/// The dense model for fits, by places in the data set.
struct Live<'a> {
    course: &'a Course<'a>,
    /// Of each sample, which one of its source it is.
    numbers: Vec<u64>,
    cancel: &'a Cancel,
}

impl DenseStream for Live<'_> {
    fn behind(&self, layers: &[usize], samples: &[usize]) -> Result<Vec<BTreeMap<usize, Vec<u8>>>> {
        let numbers: Vec<u64> = samples.iter().map(|&sample| self.numbers[sample]).collect();
        let mut found = self.course.behind(layers, &numbers, self.cancel)?;
        let by_place = found.iter_mut().map(|rows| {
            let own = samples.iter().zip(&numbers);
            own.filter_map(|(&sample, number)| Some((sample, rows.remove(number)?))).collect()
        });
        Ok(by_place.collect())
    }
}

/// What comes before the first step: the fit of all layers, where they are trained at once, and the choice of the learning
/// rate.
fn begin(run: &Run<'_>, targets: &[FitTarget], students: &mut [Student], dataset: &mut TrainingSet) -> Result<Totals> {
    let mut totals = Totals::default();
    if run.settings.fit && !run.settings.layer_by_layer() {
        let began = Instant::now();
        totals.fitted = fit(run, students, targets, dataset)?;
        totals.fit_seconds = began.elapsed().as_secs_f64();
    }
    if run.settings.trains() {
        totals.trials = search(run, targets, students, dataset)?;
    }
    Ok(totals)
}

/// The stream before the first trained layer: from disk, from the dense model where that has it and is to be run anyway, or
/// from a run of the layers before.
fn frozen_part(
    request: &Request<'_>,
    cut: &Cut,
    store: &Store,
    course: Option<&Course<'_>>,
    cancel: &Cancel,
) -> Result<(TrainingSet, LeftOut)> {
    if let Some(found) = store.open()? {
        return Ok(found);
    }
    // With nothing frozen before the first trained layer, a prefix of one layer only says how the graph is fed.
    let embeds_only = cut.begins_at_input();
    let prefix = extract(&cut.analysis.model, &[], &[cut.streams[usize::from(embeds_only)]])?;
    if let Some(course) = course.filter(|course| !course.kept())
        && let Some(frozen) = course.frozen(request.bundle, (!embeds_only).then_some(&prefix))?
        && let Some(filled) = course.fill(Some((frozen, store)), cancel)?
    {
        return Ok(filled);
    }
    let frozen = || {
        let runtime = Runtime::new(request.device)?;
        let options = SessionOptions::default();
        let head_dim = request.bundle.config().and_then(|config| config.head_size());
        let decoder = Decoder::prefill_only(runtime.session_of(&prefix, &options)?, head_dim)?;
        VlmSession::with_decoder(&runtime, request.bundle, decoder, &options, request.features)
    };
    store.fill(request.data, frozen, embeds_only, request.settings.max_tokens as usize, cancel)
}

fn torch_device(device: Device) -> Result<TorchDevice> {
    match device {
        Device::Cpu => Ok(TorchDevice::Cpu),
        Device::Cuda(index) => crate::torch::cuda_device(index as usize),
    }
}

fn report(
    request: &Request<'_>,
    learning_rate: f64,
    inputs: BTreeMap<String, Sha256Digest>,
    dataset: &TrainingSet,
    left_out: LeftOut,
    summary: &Summary,
) -> Result<Report> {
    let totals = &summary.totals;
    let layers = if request.settings.layer_by_layer() { request.layers.len().max(1) as u64 } else { 1 };
    let (tokens, answer_tokens) = (totals.tokens / layers, totals.answer_tokens / layers);
    Ok(Report {
        provenance: Provenance::new(Report::SCHEMA_VERSION, inputs, request.settings)?,
        layers: request.layers.to_vec(),
        trained_parameters: summary.trained_parameters,
        samples: dataset.examples.len() as u64,
        sample_ids: dataset.examples.iter().map(|example| example.id.clone()).collect(),
        left_out,
        steps: summary.steps,
        resumed_from_step: summary.resumed_from,
        tokens,
        answer_tokens,
        learning_rate,
        trials: totals.trials.clone(),
        fitted: totals.fitted.clone(),
        fit_s: totals.fit_seconds,
        first_loss: totals.first_loss,
        last_loss: totals.last_loss,
        train_s: totals.train_seconds,
        tokens_per_s: tokens as f64 / totals.train_seconds.max(1e-9),
        peak_memory_bytes: crate::base::peak_memory_bytes(),
        metrics_file: METRICS_FILE.to_string(),
    })
}
