//! Layer-by-layer training. When no loss term reads answers, a trained layer needs only its input stream and the dense
//! model's stream behind it.
//!
//! For each layer in turn, the last product is fitted, the layer is trained for all its steps, and all samples are run
//! once through it and through the frozen layers before the next trained one. So each layer is trained on the output of
//! the finished layers before it, every frozen layer runs once per sample, and no gradient leaves the layer.

use std::time::Instant;

use tch::{Device, Kind};

use crate::base::{Error, Progress, Result};

use super::batches::each_batch;
use super::context::Run;
use super::fit::{fit, say_nothing_is_held_out};
use super::trainer::{Summary, Trainer, all_weights, interrupted};
use super::workers;
use crate::finetune::checkpoint::{CheckpointState, Checkpoints, check_same_run, restore_some};
use crate::finetune::cut::FitTarget;
use crate::finetune::data::{RowDtype, RowsWriter, Stream, TrainingSet};
use crate::finetune::error::torch_error;
use crate::finetune::plan::StepRange;
use crate::finetune::record::{LayerFit, StepMetrics, Totals};
use crate::finetune::student::Student;

/// Number of tokens per network whose stream is held in memory between two layers.
const TOKENS_PER_ROUND: usize = 4096;

/// Trains the layers of `targets`, which are ascending. Afterwards `dataset` begins at the same layer as before. A run
/// that resumes continues from the newest checkpoint if there is one; otherwise it starts with the totals `start_totals`.
///
/// Errors: those of the fit and of the trainer; `Error::Interrupted` when the user asked to stop, after writing a
/// checkpoint.
pub fn train_layers(
    run: Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
    start_totals: Totals,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Summary> {
    let mut first = None;
    let outcome = train_each_layer(run, targets, students, dataset, start_totals, observer, &mut first);
    // Also after an error: a search continues with the next rate when this one diverges.
    students.iter_mut().for_each(|student| student.only = None);
    if let Some(first) = first {
        dataset.begin_at(first);
    }
    outcome
}

/// [`train_layers`] without the restoration. Stores the stream that `dataset` began with in `first`.
fn train_each_layer(
    run: Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
    start_totals: Totals,
    observer: &mut dyn FnMut(&StepMetrics),
    first: &mut Option<Stream>,
) -> Result<Summary> {
    let ranges = StepRange::each(run.settings, dataset.examples.len(), targets.len());
    let mut progress =
        Progressed { run, step: 0, total: ranges.last().map_or(0, StepRange::end), totals: start_totals };
    let checkpoints = run.checkpoints()?;
    let mut resumed_from = 0;
    match checkpoints.latest()?.filter(|_| run.resume) {
        Some((state, folder)) => {
            check_same_run(&state, &folder, run.inputs)?;
            restore_some(&folder, students.first().map(all_weights).unwrap_or_default())?;
            resumed_from = state.step;
            (progress.step, progress.totals) = (state.step, state.totals);
        }
        None => checkpoints.clear()?,
    }
    let mut trained_parameters = 0;
    for (target, range) in targets.iter().zip(ranges) {
        let before = advance(students, dataset, target.layer, &run)
            .map_err(|error| progress.stopped(&checkpoints, students, error))?;
        if first.is_none() {
            *first = before;
        }
        let layers = students.first().map(|student| student.layers_to_run(target.layer));
        dataset.want(layers);
        students.iter_mut().for_each(|student| student.only = Some(target.layer));
        progress.fit(&target.last(), students, dataset, &checkpoints)?;
        let mut trainer = Trainer::new(run, range, students, dataset)?;
        trained_parameters += trainer.trained_parameters();
        if progress.step < range.end() {
            let summary = trainer.run(progress.totals.clone(), observer)?;
            (progress.step, progress.totals) = (range.end(), summary.totals);
            let every = run.settings.schedule.checkpoint_every;
            if every > 0 && range.end() < range.total && range.end() / every > range.before / every {
                progress.save(&checkpoints, students)?;
            }
        }
    }
    let Progressed { total, totals, .. } = progress;
    Ok(Summary { steps: total, resumed_from, trained_parameters, totals })
}

/// Progress of a run, excluding the steps of the current layer.
struct Progressed<'a> {
    run: Run<'a>,
    step: u64,
    total: u64,
    totals: Totals,
}

impl Progressed<'_> {
    /// Fits a layer unless the checkpoint contains its fit.
    fn fit(
        &mut self,
        target: &FitTarget,
        students: &mut [Student],
        dataset: &mut TrainingSet,
        checkpoints: &Checkpoints,
    ) -> Result<()> {
        let layer = self.run.first + target.layer;
        if !self.run.settings.fit.enabled || self.totals.fitted.iter().any(|fitted| fitted.layer == layer) {
            return Ok(());
        }
        let began = Instant::now();
        let targets = std::slice::from_ref(target);
        let fitted = fit(&self.run, students, targets, dataset, None)
            .map_err(|error| self.stopped(checkpoints, students, error))?;
        // Every layer has the same samples, so this is said once.
        let is_fitted = |layer: &LayerFit| layer.problem.is_none();
        let first = !self.totals.fitted.iter().any(is_fitted);
        if first && fitted.iter().any(|layer| is_fitted(layer) && layer.held_out_tokens == 0) {
            say_nothing_is_held_out();
        }
        self.totals.fitted.extend(fitted);
        self.totals.fit_seconds += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// Writes a checkpoint when `error` is an interruption.
    fn stopped(&self, checkpoints: &Checkpoints, students: &[Student], error: Error) -> Error {
        match error {
            Error::Interrupted { .. } => match self.save(checkpoints, students) {
                Ok(kept) => interrupted(&kept, self.step, self.total),
                Err(error) => error,
            },
            error => error,
        }
    }

    fn save(&self, checkpoints: &Checkpoints, students: &[Student]) -> Result<String> {
        let state = CheckpointState::new(self.step, self.total, self.run.inputs.clone(), self.totals.clone());
        let weights = students.first().map(all_weights).unwrap_or_default();
        Ok(checkpoints.save(&state, weights)?.display().to_string())
    }
}

/// Runs all samples through the layers before `to`, writes the stream to disk and makes `dataset` begin there. Returns
/// the stream that `dataset` began with; `None` when nothing was run.
///
/// Errors: those of the operators; `Error::Io`; `Error::Interrupted`.
fn advance(students: &mut [Student], dataset: &mut TrainingSet, to: usize, run: &Run<'_>) -> Result<Option<Stream>> {
    let from = dataset.begins_before();
    if from >= to {
        return Ok(None);
    }
    dataset.want(Some(0..0));
    // The layers' output has the type of their input.
    let element = dataset.stream_element().unwrap_or(RowDtype::F32);
    let path = run.work.join(format!("stream-{to}.{}", element.extension()));
    let mut writer = RowsWriter::create(&path, element)?;
    let progress =
        Progress::new(&format!("stream to layer {}", run.first + to), "samples", dataset.lengths().len() as u64);
    let mut round = Vec::new();
    let mut tokens = 0;
    let count = dataset.examples.len();
    for sample in 0..count {
        round.push(sample);
        tokens += dataset.examples[sample].length;
        if tokens < TOKENS_PER_ROUND * students.len() && sample + 1 < count {
            continue;
        }
        run.cancel.check("the stream is not kept")?;
        for (numbers, sample) in streams(students, dataset, &round, from..to, run)?.iter().zip(&round) {
            writer.push(numbers, dataset.examples[*sample].length)?;
        }
        progress.advance(round.len() as u64);
        round.clear();
        tokens = 0;
    }
    let stream = Stream { rows: writer.finish()?, before: to };
    Ok(dataset.begin_at(stream))
}

/// Output of `layers` for each of `samples`, f32 `[tokens, hidden]`, flattened.
fn streams(
    students: &mut [Student],
    dataset: &TrainingSet,
    samples: &[usize],
    layers: std::ops::Range<usize>,
    run: &Run<'_>,
) -> Result<Vec<Vec<f32>>> {
    let device = run.device;
    let mut shares = workers::passes_by_worker(dataset, samples.to_vec(), students.len(), run.batch_tokens);
    let parts = workers::side_by_side(students, &mut shares, run, |student, passes| {
        let _guard = tch::no_grad_guard();
        let mut found: Vec<(usize, Vec<f32>)> = Vec::new();
        let feeds = student.feeds();
        let make = |samples: &[usize]| dataset.batch(samples, feeds);
        each_batch(passes, device, make, |samples, batch| {
            let side = student.side(batch)?;
            let mut stream = student.entering(&batch.hidden)?;
            for layer in layers.clone() {
                stream = student.layer(layer, &stream, &side)?;
            }
            for (row, &sample) in samples.iter().enumerate() {
                let length = dataset.examples[sample].length as i64;
                let own = stream.f_select(0, row as i64).and_then(|own| own.f_narrow(0, 0, length));
                let own = own.and_then(|own| own.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_flatten(0, -1));
                let numbers = own.and_then(|own| Vec::<f32>::try_from(&own.f_contiguous()?));
                found.push((sample, numbers.map_err(torch_error("the stream"))?));
            }
            Ok(())
        })?;
        Ok(found)
    })?;
    let mut all = Vec::with_capacity(samples.len());
    for part in parts {
        all.extend(part);
    }
    all.sort_by_key(|(sample, _)| *sample);
    Ok(all.into_iter().map(|(_, numbers)| numbers).collect())
}
