//! The training loop: steps, gradient clipping, checkpoints and metrics.

use std::time::Instant;

use tch::Tensor;

use crate::base::{Error, Progress, Result, list_preview, peak_memory_bytes};
use crate::torch;

use super::context::Run;
use super::workers::{self, StepSums};
use crate::finetune::checkpoint::{self, CheckpointState, Checkpoints};
use crate::finetune::data::TrainingSet;
use crate::finetune::optim::{Average, OptimizedParameter, Optimizer, clip_gradients, warmup_steps};
use crate::finetune::plan::{StepRange, StepSamples, order};
use crate::finetune::record::{EventWriter, METRICS_FILE, MetricsWriter, StepMetrics, Totals};
use crate::finetune::settings::Settings;
use crate::finetune::student::Student;

/// Folder of TensorBoard event files in the work folder.
const EVENT_FOLDER: &str = "events";

/// Trainer of a run, or of one part of a run.
pub struct Trainer<'a> {
    run: Run<'a>,
    range: StepRange,
    /// The network, once per worker; all share the weights of the first.
    students: &'a mut [Student],
    /// The trained weights, shared with the first network.
    parameters: Vec<OptimizedParameter>,
    average: Option<Average>,
    dataset: &'a mut TrainingSet,
}

/// Result of the training loop.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub steps: u64,
    /// Step from which a resumed run continued; 0 for a new run.
    pub resumed_from: u64,
    /// Number of elements of the trained weights.
    pub trained_parameters: u64,
    pub totals: Totals,
}

impl<'a> Trainer<'a> {
    /// Makes a trainer. `students` are copies of one network, at least one, that share the weights of the first.
    ///
    /// Errors: `Error::Invalid` when a weight cannot be trained or there is no network.
    pub fn new(
        run: Run<'a>,
        range: StepRange,
        students: &'a mut [Student],
        dataset: &'a mut TrainingSet,
    ) -> Result<Self> {
        let first = students.first().ok_or_else(|| Error::invalid("finetune", "has no network to train"))?;
        let weights: Vec<torch::Parameter> = first.weights_now().map(torch::Parameter::shared).collect();
        let parameters = weights.iter().map(|weight| {
            OptimizedParameter::new(weight.name.clone(), weight.tensor.shallow_clone(), run.settings.optimizer.kind)
        });
        let parameters = parameters.collect::<Result<_>>()?;
        let average = Average::new(&weights, run.settings.optimizer.average_last, range.steps)?;
        Ok(Trainer { run, range, students, parameters, average, dataset })
    }

    /// Trains to the last step of the part. A run that resumes continues from the newest checkpoint if it belongs to
    /// this part; otherwise it starts with the totals `start_totals`. `observer` receives the metrics of every step.
    ///
    /// Errors: `Error::Interrupted` when the user asked to stop, after writing a checkpoint; `Error::NotFinite` with
    /// step, samples and weight when a loss, a gradient or a weight at the end is not finite.
    pub fn run(&mut self, start_totals: Totals, observer: &mut dyn FnMut(&StepMetrics)) -> Result<Summary> {
        let Run { settings, work, .. } = self.run;
        let StepRange { before, steps: total, .. } = self.range;
        let lengths = self.dataset.lengths();
        let per_epoch = order::steps_per_epoch(settings, lengths.len());
        let warmup = warmup_steps(settings.schedule.warmup_ratio, total);
        let stages = settings.by_stage(total);
        let optimizer = Optimizer::new(settings.constants());
        let checkpoints = self.run.checkpoints()?;
        let (first, mut totals) = self.start(&checkpoints, start_totals)?;
        let mut metrics = MetricsWriter::open(&work.join(METRICS_FILE), before + first)?;
        let mut events = EventWriter::create(&work.join(EVENT_FOLDER))?;
        let only = self.students.first().and_then(|student| student.only);
        let task = only.map_or("finetune".to_string(), |layer| format!("finetune layer {}", self.run.first + layer));
        let progress = Progress::new(&task, "steps", total);
        progress.set_position(first);
        let mut steps_of: Option<(u64, Vec<StepSamples>)> = None;
        for done in first..total {
            if self.run.stops()? {
                return Err(interrupted(&self.save(&checkpoints, done, &totals)?, before + done, self.range.total));
            }
            let (epoch, position) = (done / per_epoch, (done % per_epoch) as usize);
            if steps_of.as_ref().is_none_or(|(of, _)| *of != epoch) {
                steps_of = Some((epoch, order::epoch(settings, &lengths, epoch)));
            }
            let Some(step) = steps_of.as_ref().and_then(|(_, steps)| steps.get(position)) else { break };
            let began = Instant::now();
            let learning_rate = settings.peak_rate() * settings.schedule.kind.factor(done, warmup, total);
            let Some((_, stage)) = stages.iter().find(|(end, _)| done < *end) else { break };
            if let Some((_, steps)) = &steps_of {
                load(&self.run, self.dataset, &steps[position..], total - done, self.students.len())?;
            }
            let mut result = self.step(done, step, stage, &optimizer, learning_rate)?;
            if let Some(average) = &mut self.average {
                average.add(done + 1)?;
            }
            let seconds = began.elapsed().as_secs_f64();
            totals.tokens += result.tokens;
            totals.answer_tokens += result.metrics.answer_tokens;
            totals.first_loss.get_or_insert(result.metrics.loss);
            totals.last_loss = Some(result.metrics.loss);
            totals.train_seconds += seconds;
            result.metrics.tokens_per_s = result.tokens as f64 / seconds.max(1e-9);
            metrics.push(&result.metrics)?;
            events.step(&result.metrics)?;
            observer(&result.metrics);
            progress.advance(1);
            progress.note(format!("loss {:.4}, {:.0} tokens/s", result.metrics.loss, result.metrics.tokens_per_s));
            let every = settings.schedule.checkpoint_every;
            if every > 0 && (before + done + 1) % every == 0 && done + 1 < total {
                self.save(&checkpoints, done + 1, &totals)?;
            }
        }
        if let Some(average) = &mut self.average {
            average.apply()?;
        }
        // A step can leave a weight infinite although its own loss and gradients were finite.
        if let Some(parameter) = self.parameters.iter().find(|parameter| !is_finite(&parameter.value)) {
            let problem = format!("`{}` is not finite after the last step", parameter.name);
            return Err(Error::not_finite(format!("finetune step {}", before + total), problem)
                .remedy("take a lower learning rate"));
        }
        let trained_parameters = self.trained_parameters();
        Ok(Summary { steps: total, resumed_from: before + first, trained_parameters, totals })
    }

    /// Number of elements of the trained weights.
    pub fn trained_parameters(&self) -> u64 {
        self.parameters.iter().map(|parameter| parameter.value.numel() as u64).sum()
    }

    /// Loads the checkpoint if there is one to resume from. Returns the number of finished steps of the part, and the
    /// totals.
    fn start(&mut self, checkpoints: &Checkpoints, start_totals: Totals) -> Result<(u64, Totals)> {
        let StepRange { before, .. } = self.range;
        let alone = self.alone();
        if self.run.resume
            && let Some((state, folder)) = checkpoints.latest()?
            && (alone || (before + 1..self.range.end()).contains(&state.step))
        {
            checkpoint::check_same_run(&state, &folder, self.run.inputs)?;
            checkpoint::restore(&folder, self.tensors())?;
            return Ok((state.step - before, state.totals));
        }
        if alone {
            checkpoints.clear()?;
        }
        Ok((0, start_totals))
    }

    fn save(&self, checkpoints: &Checkpoints, done: u64, totals: &Totals) -> Result<String> {
        let inputs = self.run.inputs.clone();
        let state = CheckpointState::new(self.range.before + done, self.range.total, inputs, totals.clone());
        Ok(checkpoints.save(&state, self.tensors())?.display().to_string())
    }

    /// Tensors of a checkpoint by name; shared, not copied.
    fn tensors(&self) -> Vec<(String, Tensor)> {
        let parameters = self.parameters.iter().flat_map(OptimizedParameter::tensors);
        let average = self.average.iter().flat_map(Average::tensors);
        parameters.chain(average).chain(self.rest()).collect()
    }

    /// Other weights of a checkpoint: those of all layers in layer-by-layer training, otherwise those that only a fit
    /// writes.
    fn rest(&self) -> Vec<(String, Tensor)> {
        let Some(first) = self.students.first() else { return Vec::new() };
        let all = all_weights(first);
        if first.only.is_some() { all } else { all.into_iter().skip(first.weights().len()).collect() }
    }

    fn alone(&self) -> bool {
        self.students.first().is_none_or(|first| first.only.is_none())
    }

    /// Makes the step after the first `done` steps of the part.
    fn step(
        &mut self,
        done: u64,
        step: &StepSamples,
        settings: &Settings,
        optimizer: &Optimizer,
        learning_rate: f64,
    ) -> Result<Done> {
        let number = self.range.before + done + 1;
        let samples = || step.iter().flatten().map(|&sample| &self.dataset.examples[sample]);
        let (answer_tokens, tokens) = (
            samples().map(|example| example.answers as u64).sum(),
            samples().map(|example| example.length as u64).sum(),
        );
        let StepSums { losses, mut gradients } = workers::run(self.students, self.dataset, settings, step, &self.run)?;
        let loss: f64 = losses.iter().map(|(kind, value)| settings.weight(*kind) * value).sum();
        let grad_norm = clip_gradients(&mut gradients, settings.optimizer.max_grad_norm)?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(self.not_finite(number, step, loss, &gradients));
        }
        if !gradients.is_empty() {
            workers::optimize(optimizer, &mut self.parameters, gradients, done + 1, learning_rate, self.run.device)?;
        }
        let metrics = StepMetrics {
            step: number,
            loss,
            losses: losses.into_iter().map(|(kind, value)| (kind.name().to_string(), value)).collect(),
            learning_rate,
            grad_norm,
            tokens_per_s: 0.0,
            answer_tokens,
            samples: samples().map(|example| example.id.clone()).collect(),
            peak_memory_bytes: peak_memory_bytes(),
        };
        Ok(Done { metrics, tokens })
    }

    fn not_finite(&self, number: u64, step: &StepSamples, loss: f64, gradients: &[Tensor]) -> Error {
        let ids: Vec<&str> = step.iter().flatten().map(|&sample| self.dataset.examples[sample].id.as_str()).collect();
        let weight = self.parameters.iter().zip(gradients).find(|(_, gradient)| !is_finite(gradient));
        let what = match weight {
            Some((parameter, _)) if loss.is_finite() => format!("the gradient of `{}` is not finite", parameter.name),
            Some((parameter, _)) => {
                format!("the loss is {loss} and the gradient of `{}` is not finite", parameter.name)
            }
            None => format!("the loss is {loss}"),
        };
        Error::not_finite(format!("finetune step {number}"), format!("{what}; samples {}", list_preview(&ids, 64)))
            .remedy("look at these samples, or take a lower learning rate; the last checkpoint is kept")
    }
}

/// True when every element is a finite number.
fn is_finite(tensor: &Tensor) -> bool {
    let all = tensor.f_isfinite().and_then(|finite| finite.f_all()).and_then(|all| all.f_int64_value(&[]));
    all.is_ok_and(|all| all != 0)
}

/// Loads the rows of the first of `steps` unless they are held. With a streamed source, also loads the next steps, at
/// most `left` in total, up to the source's token limit. Each process loads only the rows of its own passes.
fn load(run: &Run<'_>, dataset: &mut TrainingSet, steps: &[StepSamples], left: u64, networks: usize) -> Result<()> {
    let Some(streamed) = run.streamed else { return Ok(()) };
    let own = |step: &StepSamples| workers::own_passes(run, dataset, step, networks).concat();
    let Some(first) = steps.first().map(own) else { return Ok(()) };
    if dataset.holds(&first) {
        return Ok(());
    }
    let (mut samples, mut tokens) = (Vec::new(), 0);
    for step in steps.iter().take(left as usize) {
        let own = own(step);
        tokens += own.iter().map(|&sample| dataset.examples[sample].length).sum::<usize>();
        if !samples.is_empty() && tokens > streamed.tokens() {
            break;
        }
        samples.extend(own);
    }
    streamed.load(dataset, &samples)
}

/// Weights of every trained layer with their names in checkpoints; shared, not copied.
pub fn all_weights(student: &Student) -> Vec<(String, Tensor)> {
    let weights = student.written().iter();
    weights.map(|weight| (format!("weight/{}", weight.name), weight.tensor.shallow_clone())).collect()
}

/// The error of a run that was stopped and wrote the checkpoint `kept`.
pub fn interrupted(kept: &str, done: u64, total: u64) -> Error {
    Error::Interrupted { kept: format!("{done} of {total} steps are in `{kept}`, `--resume` goes on from there") }
}

struct Done {
    metrics: StepMetrics,
    tokens: u64,
}
