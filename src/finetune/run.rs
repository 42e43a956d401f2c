//! The whole of a finetuning run: cut, compute the frozen part, train, put the weights back.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device as TorchDevice;

use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest, sha256_json};
use crate::bundle::{Bundle, Role};
use crate::data::LeftOut;
use crate::finetune::checkpoint::begun;
use crate::finetune::cut::{Cut, FitTarget, replaced, side_inputs};
use crate::finetune::data::{Course, Lesson, Source, Store, Teacher, TrainingSet};
use crate::finetune::loss;
use crate::finetune::plan::anchor_points;
use crate::finetune::record::{LayerFit, METRICS_FILE, RateTrial, StepMetrics, Totals, best};
use crate::finetune::settings::Settings;
use crate::finetune::student::Student;
use crate::finetune::train::{Run, Summary, fit, search, train, worker_count};
use crate::ir::Model;
use crate::rewrite::extract;
use crate::runtime::{Decoder, FeatureCache, Runtime, SessionOptions, VlmSession, headed};

/// What to finetune, on what, and how.
pub struct Request<'a> {
    /// The pruned model.
    pub bundle: &'a Bundle,
    /// Decoder layers to train, as the pruned model counts them.
    pub layers: &'a [usize],
    pub data: &'a dyn Source,
    pub settings: &'a Settings,
    pub device: Device,
    /// Folder for the frozen part's outputs, checkpoints and metrics; kept between runs.
    pub work: &'a Path,
    /// Goes on from the newest checkpoint in `work`, if there is one.
    pub resume: bool,
    /// Image features of models with the same vision encoder.
    pub features: &'a Arc<FeatureCache>,
}

/// What a run gives.
pub struct Outcome {
    /// The decoder with its trained weights; all other initializers are the ones it had.
    pub decoder: Model,
    pub report: Report,
}

/// How a run went: the content of the report file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
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
    pub left_out: LeftOut,
    /// Optimiser steps.
    pub steps: u64,
    /// The step that a resumed run went on from; 0 otherwise.
    pub resumed_from_step: u64,
    /// Tokens without padding, images included, over all epochs; those that each layer saw where layers are healed one after
    /// the other.
    pub tokens: u64,
    pub answer_tokens: u64,
    /// The peak learning rate, chosen from the trials where there are any.
    pub learning_rate: f64,
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
    pub last_loss: Option<f64>,
    /// Time in optimiser steps, over all resumptions.
    pub train_s: f64,
    pub tokens_per_s: f64,
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
    let path = request.bundle.path_of(request.bundle.require(Role::Decoder)?);
    let wanted = settings.fit || asked().any(|kind| kind.row().teacher != loss::Teacher::Nothing);
    let teacher = teacher.filter(|_| wanted);
    // Files are hashed while the graph is looked at.
    let (digests, cut) = std::thread::scope(|scope| {
        let (bundle, data) = (request.bundle, request.data);
        let hashing = scope.spawn(move || {
            let dense = teacher.map(|teacher| teacher.bundle.digest()).transpose()?;
            Ok::<_, Error>((bundle.digest()?, data.digest()?, dense))
        });
        let cut = crate::onnx::load(&path).and_then(|decoder| {
            let cut = Cut::new(&headed(request.bundle, decoder.clone())?, request.layers)?;
            let suffix = cut.suffix()?;
            Ok((decoder, cut, suffix))
        });
        (hashing.join().unwrap_or_else(|panic| resume_unwind(panic)), cut)
    });
    let (decoder, cut, suffix) = cut?;
    let (model_digest, data_digest, dense_digest) = digests?;
    std::fs::create_dir_all(request.work).map_err(|e| Error::io("create", request.work, e))?;

    let mut inputs = BTreeMap::from([
        ("model".to_string(), model_digest.clone()),
        ("data".to_string(), data_digest.clone()),
        ("layers".to_string(), sha256_json(&request.layers)?),
        ("settings".to_string(), sha256_json(settings)?),
    ]);
    let key = sha256_json(&("hidden", &model_digest, &data_digest, cut.first, settings.max_tokens))?;
    let store = Store::new(request.work, &key, side_inputs(&cut.analysis.model.graph, &suffix)?);
    let course = teacher.zip(dense_digest).map(|(teacher, digest)| {
        let lesson = Lesson {
            teacher,
            trained: request.layers,
            source: request.data,
            data_digest: &data_digest,
            settings: &all_stages,
            device: request.device,
            work: request.work,
            features: request.features,
        };
        lesson.prepare(digest)
    });
    let course = course.transpose()?;
    let (mut dataset, left_out) = frozen_part(request, &cut, &store, course.as_ref(), cancel)?;

    let compile = || Student::compile(&cut.analysis.model, suffix.clone(), &cut.trained, settings.precision, device);
    let mut student = compile()?;
    if let (Some(teacher), Some(course)) = (teacher, course) {
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
    while students.len() < worker_count(device) {
        let mut twin = compile()?;
        twin.work_for(&students[0])?;
        students.push(twin);
    }
    let targets = if settings.fit || settings.layer_by_layer() {
        cut.targets(request.layers, !settings.trains())?
    } else {
        vec![]
    };
    let (work, resume) = (request.work, request.resume);
    let run = Run { settings, device, first: cut.first, inputs: &inputs, work, resume, cancel };
    let resumed = if request.resume { begun(request.work)? } else { None };
    let done = match resumed {
        Some(totals) => totals,
        None => begin(&run, &targets, &mut students, &mut dataset)?,
    };
    if !asked().any(|kind| kind.row().teacher == loss::Teacher::Stream) {
        // The fit alone wanted them; steps would read them for nothing.
        dataset.targets.streams.clear();
    }
    let rate = best(&done.trials).unwrap_or(settings.learning_rate);
    let chosen = Settings { learning_rate: rate, ..settings.clone() };
    let run = Run { settings: &chosen, ..run };
    let summary = train(run, &targets, &mut students, &mut dataset, done, observer)?;
    let tensors = students[0].trained()?;
    let decoder = replaced(&decoder, tensors)?;
    let report = report(request, rate, inputs, &dataset, left_out, &summary)?;
    Ok(Outcome { decoder, report })
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
