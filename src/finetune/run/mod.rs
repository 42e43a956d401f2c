//! A finetuning run: cuts the decoder, computes the frozen part, trains and writes the weights back into the graph.

mod frozen;
mod planning;
mod request;

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::time::Instant;

use tch::Device as TorchDevice;

use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest, notice, sha256_json};
use crate::data::LeftOut;
use crate::finetune::checkpoint::newest_totals;
use crate::finetune::cut::{FitTarget, written_back};
use crate::finetune::data::{
    Dense, Loads, RowStore, Teacher, TeacherRequest, TeacherTargets, TrainingSet, WINDOW_FOLDER, scan,
};
use crate::finetune::loss;
use crate::finetune::plan::{PlannedData, anchor_points};
use crate::finetune::record::{METRICS_FILE, StepMetrics, Totals, best};
use crate::finetune::settings::{LearningRate, Lora};
use crate::finetune::student::Student;
use crate::finetune::train::{DenseStream, Run, Summary, fit, search, train};
use crate::torch::Hold;

use frozen::FrozenLayers;
use planning::{Opened, Parts, estimated, resolve};

pub use planning::plan_run;
pub use request::{FinetunedModel, Report, Request};

/// Finetunes layers and returns the decoder with the new weights. The bundle is not modified.
///
/// Errors: `Error::Invalid` and `Error::Unsupported` for unsuitable settings, layers, graphs and data;
/// `Error::Interrupted` when the user asked to stop, during the steps after writing a checkpoint; `Error::NotFinite`
/// when a loss, a gradient or a sum of the fit is not finite; `Error::Engine` from LibTorch and ONNX Runtime.
pub fn finetune(
    request: &Request<'_>,
    cancel: &Cancel,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<FinetunedModel> {
    finetune_with_teacher(request, None, cancel, observer)
}

/// [`finetune`] with the dense model, which some losses and the fit need.
///
/// Errors: as [`finetune`], and `Error::Invalid` when the dense model does not match the pruned one.
pub fn finetune_with_teacher(
    request: &Request<'_>,
    teacher: Option<&Teacher<'_>>,
    cancel: &Cancel,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<FinetunedModel> {
    let settings = request.settings;
    settings.check()?;
    let losses = settings.losses();
    let asked = || losses.keys().copied();
    loss::check_teacher(asked(), settings.fit.enabled, teacher.is_some())?;
    let device = torch_device(request.device)?;
    if device == TorchDevice::Cpu {
        // The work of this thread between passes is too small to parallelise, and its last bits must not depend on the
        // load of the machine.
        tch::set_num_threads(1);
    }
    let wanted = settings.fit.enabled || asked().any(|kind| kind.needs_teacher());
    let teacher = teacher.filter(|_| wanted);
    // Files are hashed while the graphs are analysed.
    let (digests, opened) = std::thread::scope(|scope| {
        let (bundle, data) = (request.bundle, request.data);
        let hashing = scope.spawn(move || {
            let dense = teacher.map(|teacher| teacher.bundle.digest()).transpose()?;
            Ok::<_, Error>((bundle.digest()?, data.digest()?, dense))
        });
        let opened = Opened::new(request, teacher);
        (hashing.join().unwrap_or_else(|panic| resume_unwind(panic)), opened)
    });
    let Opened { decoder, mut cut, suffix, side, sizes, targets, points, dense } = opened?;
    let (model_digest, data_digest, dense_digest) = digests?;
    let own = request.own_work();
    std::fs::create_dir_all(&own).map_err(|e| Error::io("create", &own, e))?;
    let teacher_bytes = dense.as_ref().map_or(0, Dense::weight_bytes);
    let planned = |data: PlannedData, streamed: Option<bool>| {
        let (layer_count, first) = (cut.analysis.map.layers.len(), cut.first);
        let parts = Parts { sizes: &sizes, targets: &targets, points: &points, teacher_bytes, layer_count, first };
        resolve(request, &parts, data, streamed)
    };

    let mut inputs = BTreeMap::from([
        ("model".to_string(), model_digest.clone()),
        ("data".to_string(), data_digest.clone()),
        ("layers".to_string(), sha256_json(&request.layers)?),
        ("settings".to_string(), sha256_json(settings)?),
    ]);
    let key =
        sha256_json(&("stream with sample numbers", &model_digest, &data_digest, cut.first, settings.data.max_tokens))?;
    let store = RowStore::new(&own, &key, side.clone());
    let teacher_targets = teacher.zip(dense).zip(dense_digest).map(|((teacher, dense), digest)| {
        let teacher_request = TeacherRequest {
            teacher,
            trained: request.layers,
            first: cut.first,
            source: request.data,
            data_digest: &data_digest,
            settings,
            device: request.device,
            work: &own,
            features: request.features,
        };
        teacher_request.prepare(dense, digest)
    });
    let teacher_targets = teacher_targets.transpose()?;
    let kept = store.open()?;
    let streams = match kept {
        Some(_) => false,
        None => {
            let plan = planned(estimated(request.data)?, None)?;
            plan.check()?;
            plan.streamed
        }
    };
    let prefix = FrozenLayers::new(request, &cut)?;
    let (mut dataset, left_out) = match kept {
        Some(kept) => kept,
        None if streams => {
            let (examples, left_out) = scan(request.data, settings.data.max_tokens as usize, cancel)?;
            (TrainingSet::of_windows(examples), left_out)
        }
        None => prefix.fill(&store, teacher_targets.as_ref(), cancel)?,
    };

    let mut plan = planned(
        PlannedData {
            samples: dataset.examples.len() as u64,
            tokens: dataset.examples.iter().map(|example| example.length as u64).sum(),
            answer_tokens: dataset.examples.iter().map(|example| example.answers as u64).sum(),
            longest_tokens: dataset.examples.iter().map(|example| example.length as u64).max().unwrap_or(0),
            estimated: false,
        },
        Some(streams),
    )?;
    plan.check()?;
    if let Some(ranks) = request.ranks {
        // All processes cut a step into the same passes, so they must use the same number of networks.
        let first = ranks.from_first(&plan.workers.to_le_bytes())?;
        plan.workers = first.try_into().map_or(plan.workers, u64::from_le_bytes);
    }
    notice(plan.line());
    let hold = if plan.frozen_as_stored { Hold::Stored } else { Hold::Widened };
    let compile = || Student::compile(&cut, suffix.clone(), settings.precision, hold, device);
    let mut student = compile()?;
    if let (Some(teacher), Some(teacher_targets)) = (teacher, &teacher_targets) {
        inputs.insert("teacher".to_string(), teacher_targets.digest.clone());
        if !streams {
            let files = teacher_targets.files();
            if !teacher_targets.files_exist() {
                let mut running = teacher_targets.running(None);
                teacher_targets.fill(request.data, files, None, &mut running, "dense model", cancel)?;
            }
            dataset.targets = teacher_targets.open(files, &dataset.examples, dataset.hidden_size())?;
        }
        student.points = teacher_targets.student_points();
        let points = anchor_points(teacher.anchors, request.layers, settings).into_iter();
        student.anchor_points = points.filter_map(|point| point.checked_sub(cut.first)).collect();
    }
    let mut students = vec![student];
    while (students.len() as u64) < plan.workers {
        let mut twin = compile()?;
        twin.work_for(&students[0])?;
        students.push(twin);
    }
    cut.release_expanded();
    let (work, resume, batch_tokens) = (own.as_path(), request.resume, plan.batch_tokens as usize);
    let (shared, ranks) = (request.work, request.ranks);
    let asked_settings = settings;
    let settings = &asked_settings.clone().with(|s| s.batch.gradient_checkpointing = Some(plan.gradient_checkpointing));
    let numbers: Vec<u64> = dataset.examples.iter().map(|example| example.number).collect();
    let live = teacher_targets.as_ref().map(|targets| Live { targets, numbers, cancel });
    let dense = live.as_ref().map(|live| live as &dyn DenseStream);
    let threads = plan.threads as usize;
    let streamed = match streams {
        true => Some(prefix.streamed(side, teacher_targets.as_ref(), (&own, sizes.hidden_size), cancel)?),
        false => None,
    };
    let streamed = streamed.as_ref().map(|streamed| streamed as &dyn Loads);
    let run = Run {
        settings,
        device,
        batch_tokens,
        threads,
        streamed,
        dense,
        first: cut.first,
        inputs: &inputs,
        work,
        shared,
        ranks,
        resume,
        cancel,
    };
    let resumed = if request.resume { newest_totals(request.work)? } else { None };
    let done = match resumed {
        Some(totals) => totals,
        None => begin(&run, &targets, &mut students, &mut dataset)?,
    };
    let rate = best(&done.trials).unwrap_or(settings.peak_rate());
    let chosen = settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::One(rate));
    let run = Run { settings: &chosen, ..run };
    let summary = train(run, &targets, &mut students, &mut dataset, done, observer)?;
    let window = own.join(WINDOW_FOLDER);
    if window.exists() {
        std::fs::remove_dir_all(&window).map_err(|e| Error::io("remove", &window, e))?;
    }
    // The weights are read once more where they are merged and copied into the result.
    decoder.graph.body.initializers.iter().for_each(|(_, tensor)| tensor.release());
    let tensors = students[0].changed(&cut, settings.lora().map_or(1.0, Lora::scale))?;
    let decoder = written_back(&decoder, tensors, &cut.quantised, settings.write_trained)?;
    let layers = settings.trained_layers(request.layers, cut.analysis.map.layers.len());
    let report = report(request, layers, rate, inputs, &dataset, left_out, &summary)?;
    Ok(FinetunedModel { decoder, report })
}

/// Streams of the dense model for fits, indexed by position in the training set.
struct Live<'a> {
    targets: &'a TeacherTargets<'a>,
    /// Number of each sample in its source.
    numbers: Vec<u64>,
    cancel: &'a Cancel,
}

impl DenseStream for Live<'_> {
    fn rows_behind(&self, layers: &[usize], samples: &[usize]) -> Result<Vec<BTreeMap<usize, Vec<u8>>>> {
        let numbers: Vec<u64> = samples.iter().map(|&sample| self.numbers[sample]).collect();
        let mut found = self.targets.rows_behind(layers, &numbers, self.cancel)?;
        let by_place = found.iter_mut().map(|rows| {
            let own = samples.iter().zip(&numbers);
            own.filter_map(|(&sample, number)| Some((sample, rows.remove(number)?))).collect()
        });
        Ok(by_place.collect())
    }
}

/// The phases before the first step: the fit of all layers, when they are trained together, and the search of the
/// learning rate.
fn begin(run: &Run<'_>, targets: &[FitTarget], students: &mut [Student], dataset: &mut TrainingSet) -> Result<Totals> {
    let mut totals = Totals::default();
    if run.settings.fit.enabled && !run.settings.layer_by_layer() {
        let began = Instant::now();
        totals.fitted = fit(run, students, targets, dataset)?;
        totals.fit_seconds = began.elapsed().as_secs_f64();
    }
    if run.settings.trains() {
        totals.trials = search(run, targets, students, dataset)?;
    }
    Ok(totals)
}

fn torch_device(device: Device) -> Result<TorchDevice> {
    match device {
        Device::Cpu => Ok(TorchDevice::Cpu),
        Device::Cuda(index) => crate::torch::cuda_device(index as usize),
    }
}

fn report(
    request: &Request<'_>,
    trained: Vec<usize>,
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
        layers: trained,
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
