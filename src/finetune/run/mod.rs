//! A finetuning run: cuts the decoder, computes the frozen part, trains and writes the weights back into the graph.

mod digests;
mod frozen;
mod live;
mod planning;
mod request;
mod rows;

use std::collections::BTreeMap;
use std::time::Instant;

use tch::Device as TorchDevice;

use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest};
use crate::data::LeftOut;
use crate::finetune::checkpoint::newest_totals;
use crate::finetune::cut::{FitTarget, written_back};
use crate::finetune::data::{Loads, Teacher, TeacherRequest, TrainingSet, WINDOW_FOLDER};
use crate::finetune::loss;
use crate::finetune::plan::{Order, RunPlan, anchor_points};
use crate::finetune::record::{METRICS_FILE, StepMetrics, Totals, best};
use crate::finetune::settings::{LearningRate, Lora, Settings};
use crate::finetune::student::Student;
use crate::finetune::train::{DenseStream, Drawn, Run, Summary, fit, search, train};
use crate::ir::Model;
use crate::torch::Hold;

use digests::open;
use frozen::FrozenLayers;
use live::Live;
use planning::Opened;
use rows::RunRows;

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
    let settings = &request.settings.clone().for_device(request.device);
    let request = &Request { settings, ..*request };
    let teacher = needed(teacher, settings)?;
    let device = torch_device(request.device)?;

    let (digests, mut opened) = open(request, teacher)?;
    // On a GPU the sessions of ONNX Runtime have a limit too where the user set none.
    let request = &Request { limits: opened.limits, ..*request };
    let own = &request.own_work();
    std::fs::create_dir_all(own).map_err(|e| Error::io("create", own, e))?;
    let dense = opened.dense.take().zip(digests.dense.clone());
    let targets = teacher.zip(dense).map(|(teacher, dense)| {
        let asked = TeacherRequest {
            teacher,
            points: opened.points.clone(),
            fit_points: opened.fit_points.clone(),
            first: opened.cut.first,
            source: request.data,
            data_digest: &digests.data,
            settings,
            device: request.device,
            memory_limit: request.limits.memory,
            work: own,
            features: request.features,
            connector: opened.side.connector.is_some(),
        };
        asked.prepare(dense.0, dense.1)
    });
    let teacher_targets = targets.transpose()?;
    let targets = teacher_targets.as_ref();
    let frozen = FrozenLayers::new(request, &opened.cut)?;

    let RunRows { mut dataset, left_out, plan, streamed } =
        rows::of(request, &opened, &frozen, (targets, &digests), cancel)?;

    let inputs = &digests.inputs(request)?;
    let planned = &settings.clone().with(|s| s.batch.gradient_checkpointing = Some(plan.gradient_checkpointing));
    let live = targets.map(|targets| Live::new(targets, &dataset, cancel));
    let run = Run {
        settings: planned,
        order: plan.order,
        device,
        batch_tokens: plan.batch_tokens as usize,
        threads: plan.threads as usize,
        streamed: streamed.as_ref().map(|streamed| streamed as &dyn Loads),
        dense: live.as_ref().map(|live| live as &dyn DenseStream),
        fit_layers: plan.fit.as_ref().map_or(1, |fit| fit.together as usize),
        first: opened.cut.first,
        inputs,
        work: own,
        shared: request.work,
        ranks: request.ranks,
        resume: request.resume,
        cancel,
    };
    let anchors = teacher.map_or(&[][..], |teacher| teacher.anchors);
    let compile = |opened: &Opened| compiled(request, opened, &plan, anchors, device);
    let trained = trained(run, &mut opened, &mut dataset, compile, observer)?;

    let (decoder, connector) = written(request, &opened, &trained.network)?;
    let mut report = report(request, &opened, &trained, inputs, &dataset, left_out)?;
    report.connector = opened.connector.filter(|_| connector.is_some()).map(|connector| connector.file);
    Ok(FinetunedModel { decoder, connector, report })
}

/// The dense model, if the run reads it.
///
/// Errors: those of the settings; `Error::Invalid` when the run needs the dense model and it is missing.
fn needed<'t, 'b>(teacher: Option<&'t Teacher<'b>>, settings: &Settings) -> Result<Option<&'t Teacher<'b>>> {
    settings.check()?;
    let losses = settings.losses();
    loss::check_teacher(losses.keys().copied(), settings.fit.enabled, teacher.is_some())?;
    let wanted = settings.fit.enabled || losses.keys().any(|kind| kind.needs_teacher());
    Ok(teacher.filter(|_| wanted))
}

/// LibTorch's device. On the CPU also sets the number of threads of this thread's work.
fn torch_device(device: Device) -> Result<TorchDevice> {
    match device {
        Device::Cpu => {
            // The work of this thread between passes is too small to parallelise, and its last bits must not depend on the
            // load of the machine.
            tch::set_num_threads(1);
            Ok(TorchDevice::Cpu)
        }
        Device::Cuda(index) => crate::torch::cuda_device(index as usize),
    }
}

/// The networks of a run: one, or one for each worker of its plan.
fn compiled(
    request: &Request<'_>,
    opened: &Opened,
    plan: &RunPlan,
    anchors: &[usize],
    device: TorchDevice,
) -> Result<Vec<Student>> {
    let (settings, first) = (request.settings, opened.cut.first);
    let hold = if plan.frozen_as_stored { Hold::Stored } else { Hold::Widened };
    let points: Vec<usize> = opened.points.iter().map(|point| point.student - first).collect();
    let anchors = anchor_points(anchors, request.layers, settings).into_iter();
    let anchors: Vec<usize> = anchors.filter_map(|point| point.checked_sub(first)).collect();
    let compile = || -> Result<Student> {
        let precision = settings.precision_on(request.device);
        let student = Student::compile(&opened.cut, opened.suffix.clone(), precision, hold, device)?;
        Ok(student.comparing(points.clone(), anchors.clone()))
    };
    let mut students = vec![compile()?];
    while (students.len() as u64) < plan.workers {
        let mut twin = compile()?;
        twin.work_for(&students[0])?;
        students.push(twin);
    }
    Ok(students)
}

/// A trained network.
struct Trained {
    network: Student,
    /// Peak learning rate.
    rate: f64,
    summary: Summary,
}

/// Fits and trains the networks that `compile` makes.
fn trained(
    run: Run<'_>,
    opened: &mut Opened,
    dataset: &mut TrainingSet,
    compile: impl FnOnce(&Opened) -> Result<Vec<Student>>,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Trained> {
    let resumed = if run.resume { newest_totals(run.shared)? } else { None };
    // The dense model computes the targets of the fit before the networks take memory.
    let fits = resumed.is_none() && run.settings.fit.enabled && run.order != Order::LayerByLayer;
    let drawn = fits.then(|| Drawn::new(&run, &opened.targets, dataset)).transpose()?;
    run.release_cached()?;
    let mut students = compile(opened)?;
    opened.cut.release_expanded();
    let targets = &opened.targets;
    let done = match resumed {
        Some(totals) => totals,
        None => begin(&run, targets, &mut students, dataset, drawn)?,
    };
    let rate = best(&done.trials).unwrap_or(run.settings.peak_rate());
    let chosen = run.settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::One(rate));
    let run = Run { settings: &chosen, ..run };
    let summary = train(run, targets, &mut students, dataset, done, observer)?;
    let window = run.work.join(WINDOW_FOLDER);
    if window.exists() {
        std::fs::remove_dir_all(&window).map_err(|e| Error::io("remove", &window, e))?;
    }
    Ok(Trained { network: students.swap_remove(0), rate, summary })
}

/// The phases before the first step: the fit of all layers, when they are trained together, and the search of the
/// learning rate.
fn begin(
    run: &Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
    drawn: Option<Drawn>,
) -> Result<Totals> {
    let mut totals = Totals::default();
    if drawn.is_some() {
        let began = Instant::now();
        totals.fitted = fit(run, students, targets, dataset, drawn)?;
        totals.fit_seconds = began.elapsed().as_secs_f64();
    }
    if run.order != Order::FitOnly {
        totals.trials = search(run, targets, students, dataset)?;
    }
    Ok(totals)
}

/// The decoder and the connector with the network's weights; no connector where it is not trained.
fn written(request: &Request<'_>, opened: &Opened, network: &Student) -> Result<(Model, Option<Model>)> {
    let Opened { decoder, cut, .. } = opened;
    let settings = request.settings;
    // The weights are read once more where they are merged and copied into the result.
    decoder.graph.body.initializers.iter().for_each(|(_, tensor)| tensor.release());
    let tensors = network.changed(cut, settings.lora().map_or(1.0, Lora::scale))?;
    let (of_connector, tensors) = tensors.into_iter().partition(|(id, _)| cut.of_connector(*id));
    let decoder = written_back(decoder, tensors, &cut.quantised, settings.write_trained)?;
    let connector = cut.connector.as_ref().map(|own| own.written_back(of_connector, settings.write_trained));
    Ok((decoder, connector.transpose()?))
}

fn report(
    request: &Request<'_>,
    opened: &Opened,
    trained: &Trained,
    inputs: &BTreeMap<String, Sha256Digest>,
    dataset: &TrainingSet,
    left_out: LeftOut,
) -> Result<Report> {
    let Trained { rate, summary, .. } = trained;
    let settings = request.settings;
    let totals = &summary.totals;
    // Layer by layer, every layer sees all tokens.
    let times = if settings.layer_by_layer() { request.layers.len().max(1) as u64 } else { 1 };
    let (tokens, answer_tokens) = (totals.tokens / times, totals.answer_tokens / times);
    Ok(Report {
        provenance: Provenance::new(Report::SCHEMA_VERSION, inputs.clone(), settings)?,
        layers: settings.trained_layers(request.layers, opened.cut.analysis.map.layers.len()),
        connector: None,
        trained_parameters: summary.trained_parameters,
        samples: dataset.examples.len() as u64,
        sample_ids: dataset.examples.iter().map(|example| example.id.clone()).collect(),
        left_out,
        steps: summary.steps,
        resumed_from_step: summary.resumed_from,
        tokens,
        answer_tokens,
        learning_rate: *rate,
        trials: totals.trials.clone(),
        fitted: totals.fitted.clone(),
        fit_s: totals.fit_seconds,
        first_loss: totals.first_loss,
        last_loss: totals.last_loss,
        train_s: totals.train_seconds,
        tokens_per_s: tokens as f64 / totals.train_seconds.max(1e-9),
        peak_memory_bytes: crate::base::peak_memory_bytes(),
        peak_gpu_memory_bytes: match request.device {
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(crate::torch::peak_gpu_memory(gpu as usize)?),
        },
        metrics_file: METRICS_FILE.to_string(),
    })
}
