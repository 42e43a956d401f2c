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
    Example, Loads, RowDtype, RowStore, Teacher, TeacherRequest, TeacherTargets, TrainingSet, WINDOW_FOLDER, scan,
};
use crate::finetune::loss;
use crate::finetune::plan::{KeptRows, PlannedData, RunPlan, anchor_points};
use crate::finetune::record::{METRICS_FILE, StepMetrics, Totals, best};
use crate::finetune::settings::{LearningRate, Lora};
use crate::finetune::student::Student;
use crate::finetune::train::{DenseStream, Drawn, Run, Summary, fit, search, train};
use crate::torch::{Hold, Ranks};

use frozen::FrozenLayers;
use planning::{Opened, estimated, resolve};

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
    let mut opened = opened?;
    // On a GPU the sessions of ONNX Runtime have a limit too where the user set none.
    let request = &Request { limits: opened.limits, ..*request };
    let dense = opened.dense.take();
    let (model_digest, data_digest, dense_digest) = digests?;
    let own = request.own_work();
    std::fs::create_dir_all(&own).map_err(|e| Error::io("create", &own, e))?;
    let mut inputs = BTreeMap::from([
        ("model".to_string(), model_digest.clone()),
        ("data".to_string(), data_digest.clone()),
        ("layers".to_string(), sha256_json(&request.layers)?),
        ("settings".to_string(), sha256_json(settings)?),
    ]);
    let first = opened.cut.first;
    let element = RowDtype::of_stream(settings.precision_on(request.device));
    let rows = ("stream with sample numbers", &model_digest, &data_digest, first, settings.data.max_tokens, element);
    let key = match opened.side.connector {
        Some(connector) => sha256_json(&(rows, connector))?,
        None => sha256_json(&rows)?,
    };
    let store = RowStore::new(&own, &key, opened.side.clone(), element);
    let teacher_targets = teacher.zip(dense).zip(dense_digest).map(|((teacher, dense), digest)| {
        let teacher_request = TeacherRequest {
            teacher,
            trained: request.layers,
            first,
            source: request.data,
            data_digest: &data_digest,
            settings,
            device: request.device,
            memory_limit: request.limits.memory,
            work: &own,
            features: request.features,
            connector: opened.side.connector.is_some(),
        };
        teacher_request.prepare(dense, digest)
    });
    let teacher_targets = teacher_targets.transpose()?;
    let kept = store.open()?;
    let prefix = FrozenLayers::new(request, &opened.cut)?;
    let written = teacher_targets.as_ref().filter(|targets| kept.is_none() && !targets.files().is_empty());
    let in_dense = written.map(|targets| prefix.in_dense(targets)).transpose()?.flatten();
    if kept.is_none() {
        opened.sessions.in_dense &= written.is_none() || in_dense.is_some();
    }
    let parts = opened.parts();
    let mut estimate = PlannedData::default();
    let rows = match kept {
        Some(_) => None,
        None => {
            estimate = estimated(request.data, request.bundle)?;
            let plan = resolve(request, &parts, estimate.clone(), None);
            plan.check()?;
            Some(plan.rows())
        }
    };
    let rows = agreed(rows, request.ranks)?;
    let (mut dataset, left_out) = match kept {
        Some(kept) => kept,
        None if rows == KeptRows::All => prefix.fill(&store, teacher_targets.as_ref(), in_dense, cancel)?,
        None => {
            let (examples, left_out) = scan(request.data, settings.data.max_tokens as usize, cancel)?;
            (TrainingSet::of_windows(examples), left_out)
        }
    };

    let mut plan = resolve(request, &parts, planned_data(&dataset, &estimate), Some(rows));
    plan.check()?;
    if let Some(ranks) = request.ranks {
        plan.take_passes_of_first(ranks)?;
    }
    notice(plan.line());
    if let Some(connector) = &plan.connector {
        notice(connector.line());
    }
    if let Some(targets) = &teacher_targets {
        inputs.insert("teacher".to_string(), targets.digest.clone());
        if rows != KeptRows::Nothing {
            let files = targets.files();
            if !targets.files_exist() {
                let mut running = targets.running(None);
                targets.fill(request.data, files, None, &mut running, "dense model", cancel)?;
                drop(running);
                targets.release();
            }
            let width = if rows == KeptRows::All { dataset.hidden_size() } else { opened.sizes.hidden_size as usize };
            dataset.set_targets(targets.open(files, &dataset.examples, width)?);
        }
    }
    let (work, resume, batch_tokens) = (own.as_path(), request.resume, plan.batch_tokens as usize);
    let (shared, ranks) = (request.work, request.ranks);
    let asked_settings = settings;
    let settings = &asked_settings.clone().with(|s| s.batch.gradient_checkpointing = Some(plan.gradient_checkpointing));
    let numbers: Vec<u64> = dataset.examples.iter().map(|example| example.number).collect();
    let live = teacher_targets.as_ref().map(|targets| Live { targets, numbers, cancel });
    let dense = live.as_ref().map(|live| live as &dyn DenseStream);
    let threads = plan.threads as usize;
    let fit_layers = plan.fit.as_ref().map_or(1, |fit| fit.together as usize);
    let place = (own.as_path(), &opened.sizes);
    let computed = teacher_targets.as_ref().filter(|_| rows == KeptRows::Nothing);
    let streamed =
        (rows != KeptRows::All).then(|| prefix.streamed(opened.side.clone(), computed, in_dense, place, cancel));
    let streamed = streamed.as_ref().map(|streamed| streamed as &dyn Loads);
    let run = Run {
        settings,
        device,
        batch_tokens,
        threads,
        streamed,
        dense,
        fit_layers,
        first,
        inputs: &inputs,
        work,
        shared,
        ranks,
        resume,
        cancel,
    };
    let resumed = if request.resume { newest_totals(request.work)? } else { None };
    // The dense model computes the targets of the fit before the networks take memory.
    let fits = resumed.is_none() && settings.fit.enabled && !settings.layer_by_layer();
    let drawn = fits.then(|| Drawn::new(&run, &opened.targets, &dataset)).transpose()?;
    run.release_cached()?;
    let mut students = compiled(request, &opened, &plan, device)?;
    if let (Some(teacher), Some(targets)) = (teacher, &teacher_targets) {
        let points = anchor_points(teacher.anchors, request.layers, settings).into_iter();
        let anchors: Vec<usize> = points.filter_map(|point| point.checked_sub(first)).collect();
        for student in &mut students {
            student.points = targets.student_points();
            student.anchor_points.clone_from(&anchors);
        }
    }
    opened.cut.release_expanded();
    let Opened { decoder, cut, targets, .. } = &opened;
    let done = match resumed {
        Some(totals) => totals,
        None => begin(&run, targets, &mut students, &mut dataset, drawn)?,
    };
    let rate = best(&done.trials).unwrap_or(settings.peak_rate());
    let chosen = settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::One(rate));
    let run = Run { settings: &chosen, ..run };
    let summary = train(run, targets, &mut students, &mut dataset, done, observer)?;
    let window = own.join(WINDOW_FOLDER);
    if window.exists() {
        std::fs::remove_dir_all(&window).map_err(|e| Error::io("remove", &window, e))?;
    }
    // The weights are read once more where they are merged and copied into the result.
    decoder.graph.body.initializers.iter().for_each(|(_, tensor)| tensor.release());
    let tensors = students[0].changed(cut, settings.lora().map_or(1.0, Lora::scale))?;
    let (of_connector, tensors) = tensors.into_iter().partition(|(id, _)| cut.of_connector(*id));
    let decoder = written_back(decoder, tensors, &cut.quantised, settings.write_trained)?;
    let connector = cut.connector.as_ref().map(|own| own.written_back(of_connector, settings.write_trained));
    let connector = connector.transpose()?;
    let layers = settings.trained_layers(request.layers, cut.analysis.map.layers.len());
    let mut report = report(request, layers, rate, inputs, &dataset, left_out, &summary)?;
    report.connector = opened.connector.filter(|_| connector.is_some()).map(|connector| connector.file);
    Ok(FinetunedModel { decoder, connector, report })
}

/// The networks of a run: one, or one for each worker of its plan.
fn compiled(request: &Request<'_>, opened: &Opened, plan: &RunPlan, device: TorchDevice) -> Result<Vec<Student>> {
    let hold = if plan.frozen_as_stored { Hold::Stored } else { Hold::Widened };
    let compile = || {
        Student::compile(
            &opened.cut,
            opened.suffix.clone(),
            request.settings.precision_on(request.device),
            hold,
            device,
        )
    };
    let mut students = vec![compile()?];
    while (students.len() as u64) < plan.workers {
        let mut twin = compile()?;
        twin.work_for(&students[0])?;
        students.push(twin);
    }
    Ok(students)
}

/// The rows that are kept on disk: the decision of the first process, unless it has the rows of an earlier run. `own`: None in
/// a process that has them.
fn agreed(own: Option<KeptRows>, ranks: Option<&Ranks>) -> Result<KeptRows> {
    const CHOICES: [KeptRows; 3] = [KeptRows::All, KeptRows::Dense, KeptRows::Nothing];
    let Some(ranks) = ranks else { return Ok(own.unwrap_or(KeptRows::All)) };
    let number = CHOICES.iter().position(|&choice| own == Some(choice)).unwrap_or(CHOICES.len());
    let first = ranks.from_first(&[number as u8])?.first().and_then(|&first| CHOICES.get(usize::from(first)).copied());
    Ok(own.map_or(KeptRows::All, |own| first.unwrap_or(own)))
}

/// Sizes of the samples. Summaries of samples do not count image tokens; their number is estimated then.
fn planned_data(dataset: &TrainingSet, estimate: &PlannedData) -> PlannedData {
    let examples = &dataset.examples;
    let tokens: u64 = examples.iter().map(|example| example.length as u64).sum();
    let image = |example: &Example| example.detail().image.iter().map(|&[_, count]| u64::from(count)).sum::<u64>();
    let counted: u64 = examples.iter().map(image).sum();
    let share = |example| image(example) as f64 / example.length.max(1) as f64;
    let scaled = u128::from(estimate.image_tokens) * u128::from(tokens) / u128::from(estimate.tokens.max(1));
    PlannedData {
        samples: examples.len() as u64,
        tokens,
        image_tokens: if counted > 0 { counted } else { scaled as u64 },
        image_share: examples.iter().map(share).fold(if counted > 0 { 0.0 } else { estimate.image_share }, f64::max),
        answer_tokens: examples.iter().map(|example| example.answers as u64).sum(),
        answer_share: examples.iter().map(|e| e.answers as f64 / e.length.max(1) as f64).fold(0.0, f64::max),
        longest_tokens: examples.iter().map(|example| example.length as u64).max().unwrap_or(0),
        estimated: false,
    }
}

/// Streams of the dense model for fits, indexed by position in the training set.
struct Live<'a> {
    targets: &'a TeacherTargets<'a>,
    /// Number of each sample in its source.
    numbers: Vec<u64>,
    cancel: &'a Cancel,
}

impl DenseStream for Live<'_> {
    fn computes(&self, layer: usize) -> bool {
        !self.targets.student_points().contains(&(layer + 1))
    }

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
        connector: None,
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
        peak_gpu_memory_bytes: match request.device {
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(crate::torch::peak_gpu_memory(gpu as usize)?),
        },
        metrics_file: METRICS_FILE.to_string(),
    })
}
