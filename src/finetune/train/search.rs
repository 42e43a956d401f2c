//! Learning-rate search: trials of several rates, each from the same weights.
//!
//! Each rate of a list is tried for a full pass. Every sample of one pass is new to the network when its loss is
//! computed, so the loss over the end of the pass measures a rate on untrained samples. In layer-by-layer training no
//! term reads answers, so the network has not seen them even after the pass; then the cross-entropy of the answers
//! after the pass is used. Rates that end equally close to the dense stream are not equally good at answering.
//!
//! `auto` tries the optimiser's own rates by short trials on the first samples of an epoch, and compares them by the
//! cross-entropy of the answers of the epoch's last samples, which no trial trains on. The search starts in the middle
//! of the list and continues in the direction in which the cross-entropy falls. A typical run makes three or four
//! trials, and never more than the list has rates.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::base::{Error, Result, Sha256Digest, notice, read_json, sha256_json, write_json};

use super::context::{Run, kept_aside};
use super::layered::train_layers;
use super::trainer::{Summary, Trainer};
use super::workers;
use crate::finetune::checkpoint::clear_work;
use crate::finetune::cut::FitTarget;
use crate::finetune::data::TrainingSet;
use crate::finetune::error::torch_error;
use crate::finetune::loss::LossKind;
use crate::finetune::plan::{Order, StepRange, StepSamples, TrialPlan, order};
use crate::finetune::record::{METRICS_FILE, RateTrial, StepMetrics, Totals, best, read_metrics};
use crate::finetune::settings::{LearningRate, Settings, Stage};
use crate::finetune::student::Student;

const SCHEMA_VERSION: u32 = 1;
const TRIAL: &str = "trial.json";
/// Share of a pass, at its end, over which the loss is averaged.
const JUDGED: f64 = 0.25;

/// Content of the file of a finished trial.
#[derive(Serialize, Deserialize)]
struct Kept {
    schema_version: u32,
    key: Sha256Digest,
    trial: RateTrial,
}

/// Tries the settings' learning rates if there are several, and restores the weights. With layer-by-layer training each
/// trial includes the fits of `targets`. Each trial writes its metrics to a folder `search-N` in `work`; a run that
/// resumes skips finished trials.
///
/// A rate whose trial diverges is marked and skipped.
///
/// Errors: those of the runs; `Error::NotFinite` when all rates diverge; `Error::Interrupted` after writing a
/// checkpoint of the trial.
pub fn search(
    run: &Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
) -> Result<Vec<RateTrial>> {
    let settings = run.settings;
    let wanted = &settings.optimizer.learning_rate;
    if !wanted.is_searched() {
        return Ok(Vec::new());
    }
    let rates = wanted.candidates(settings.optimizer.kind);
    let layers = if run.order == Order::LayerByLayer { targets.len() } else { 1 };
    let plan = TrialPlan::of(settings, dataset.examples.len(), layers);
    let mut trials: Vec<RateTrial> = Vec::with_capacity(rates.len());
    let before = copies(students)?;
    let mut one = |number: usize| trial(run, number, rates[number], plan, targets, students, dataset, &before);
    match wanted {
        LearningRate::Auto(_) => {
            let mut made = std::collections::BTreeMap::new();
            let loss_of = |trial: &RateTrial| trial.loss.unwrap_or(f64::INFINITY);
            let chosen = descend(rates.len(), |number| {
                let trial = one(number)?;
                let loss = loss_of(&trial);
                made.insert(number, trial);
                Ok(loss)
            })?;
            trials.extend(made.into_values());
            if chosen + 1 == rates.len() || chosen == 0 {
                let end = if chosen == 0 { "lowest" } else { "highest" };
                notice(format!(
                    "the best learning rate is the {end} of those tried; give further ones with `--learning-rate`"
                ));
            }
        }
        _ => (0..rates.len()).try_for_each(|number| one(number).map(|trial| trials.push(trial)))?,
    }
    if let (None, Some(first)) = (best(&trials), trials.first().and_then(|trial| trial.diverged.as_ref())) {
        let rates: Vec<String> = trials.iter().map(|trial| format!("{:e}", trial.learning_rate)).collect();
        return Err(Error::not_finite(format!("learning rates {}", rates.join(", ")), format!("all diverge: {first}")));
    }
    Ok(trials)
}

/// Index of the lowest of `count` values that first fall and then rise. Starts in the middle and evaluates each value
/// at most once: upwards while they fall, otherwise downwards. Infinity means that a value is not comparable; it counts
/// as larger than all others.
fn descend(count: usize, mut value: impl FnMut(usize) -> Result<f64>) -> Result<usize> {
    let start = count / 2;
    let (mut place, mut least) = (start, value(start)?);
    for next in start + 1..count {
        let found = value(next)?;
        if found >= least {
            break;
        }
        (place, least) = (next, found);
    }
    if place > start {
        return Ok(place);
    }
    for next in (0..start).rev() {
        let found = value(next)?;
        if found > least || found == least && least.is_finite() {
            break;
        }
        (place, least) = (next, found);
    }
    Ok(place)
}

/// Copies of the weights that a search restores.
fn copies(students: &[Student]) -> Result<Vec<Tensor>> {
    let weights = students.first().into_iter().flat_map(Student::written);
    let copied: Result<Vec<Tensor>, tch::TchError> = weights.map(|weight| kept_aside(&weight.tensor)).collect();
    copied.map_err(torch_error("the weights before the search"))
}

/// Makes one trial and restores the weights `before`.
#[expect(clippy::too_many_arguments, reason = "what a run takes, and which trial it is")]
fn trial(
    run: &Run<'_>,
    number: usize,
    learning_rate: f64,
    plan: TrialPlan,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
    before: &[Tensor],
) -> Result<RateTrial> {
    let Run { settings, inputs, work, shared, resume, .. } = *run;
    let short = matches!(settings.optimizer.learning_rate, LearningRate::Auto(_));
    let own = settings.clone().with(|own| {
        own.optimizer.learning_rate = LearningRate::One(learning_rate);
        own.schedule.epochs = 1;
        own.schedule.max_steps = plan.max_steps;
        own.schedule.checkpoint_every = 0;
    });
    let folder = work.join(format!("search-{number}"));
    let shared = shared.join(format!("search-{number}"));
    let mut inputs = inputs.clone();
    inputs.insert("settings".to_string(), sha256_json(&(&own, short))?);
    let key = sha256_json(&inputs)?;
    let file = shared.join(TRIAL);
    if resume && file.exists() {
        let kept: Kept = read_json(&file, SCHEMA_VERSION)?;
        if kept.key == key {
            return Ok(kept.trial);
        }
    }
    std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
    let run = Run { settings: &own, inputs: &inputs, work: &folder, shared: &shared, ..*run };
    let held_out = if short { held_out(&own, dataset, plan) } else { Vec::new() };
    let trained = train(run, targets, students, dataset, Totals::default(), &mut |_| ());
    let steps = trained.as_ref().map_or(0, |summary| summary.steps);
    let loss = trained.and_then(|_| match (short, run.order == Order::LayerByLayer) {
        (true, _) => answers(&own, students, dataset, &held_out, &run),
        (false, true) => answers(&own, students, dataset, &order::epoch(&own, &dataset.lengths(), 0), &run),
        (false, false) => Ok(judged(&read_metrics(&folder.join(METRICS_FILE))?)),
    });
    let (loss, diverged) = match loss {
        Ok(loss) if loss.is_finite() => (Some(loss), None),
        Ok(loss) => (None, Some(format!("the loss is {loss}"))),
        Err(error @ Error::NotFinite { .. }) => (None, Some(error.to_string())),
        Err(error) => return Err(error),
    };
    let held_out_samples = if plan.held_out_steps > 0 { held_out.iter().flatten().flatten().count() as u64 } else { 0 };
    let trial = RateTrial { learning_rate, loss, diverged, steps, held_out_samples };
    clear_work(&folder)?;
    if run.writes() {
        write_json(&file, &Kept { schema_version: SCHEMA_VERSION, key, trial: trial.clone() })?;
    }
    let _guard = tch::no_grad_guard();
    for (weight, before) in students.first().into_iter().flat_map(Student::written).zip(before) {
        let mut weight = weight.tensor.shallow_clone();
        weight.f_copy_(before).map_err(torch_error("the weights before the search"))?;
    }
    Ok(trial)
}

/// The last steps of the first epoch, which short trials do not reach. An epoch of one step has no samples to hold out;
/// then the trial's own samples are used.
fn held_out(settings: &Settings, dataset: &TrainingSet, plan: TrialPlan) -> Vec<StepSamples> {
    let mut steps = order::epoch(settings, &dataset.lengths(), 0);
    let first = steps.len() - (plan.held_out_steps.max(1) as usize).min(steps.len());
    steps.split_off(first)
}

/// Trains all steps of a run: all layers together, or layer by layer.
///
/// Errors: those of the trainer.
pub fn train(
    run: Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
    start_totals: Totals,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Summary> {
    match run.order {
        Order::LayerByLayer => train_layers(run, targets, students, dataset, start_totals, observer),
        Order::Together | Order::FitOnly => {
            let range = StepRange::whole(run.settings, dataset.examples.len());
            Trainer::new(run, range, students, dataset)?.run(start_totals, observer)
        }
    }
}

/// Mean cross-entropy, in nats, of the answer tokens in these steps.
fn answers(
    settings: &Settings,
    students: &mut [Student],
    dataset: &mut TrainingSet,
    steps: &[StepSamples],
    run: &Run<'_>,
) -> Result<f64> {
    let settings = settings.clone().with(|settings| settings.stages = Stage::only([(LossKind::Ce, 1.0)]));
    let (mut sum, mut count) = (0.0, 0.0);
    for step in steps {
        let tokens: usize = step.iter().flatten().map(|&sample| dataset.examples[sample].answers).sum();
        run.load(dataset, &step.concat())?;
        let sums = workers::run(students, dataset, &settings, step, run)?;
        sum += sums.losses.get(&LossKind::Ce).copied().unwrap_or(0.0) * tokens as f64;
        count += tokens as f64;
    }
    Ok(sum / count.max(1.0))
}

fn judged(steps: &[StepMetrics]) -> f64 {
    let last = &steps[steps.len() - ((JUDGED * steps.len() as f64).ceil() as usize).min(steps.len())..];
    let loss = |step: &StepMetrics| step.losses.get(LossKind::Ce.name()).copied().unwrap_or(step.loss);
    last.iter().map(loss).sum::<f64>() / last.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_with_the_lowest_loss_is_found_with_few_trials() {
        let search = |losses: &[f64]| {
            let mut seen = Vec::new();
            let found = descend(losses.len(), |place| {
                seen.push(place);
                Ok(losses[place])
            });
            (found.unwrap(), seen)
        };
        let far = f64::INFINITY;
        assert_eq!(search(&[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), (5, vec![3, 4, 5]));
        assert_eq!(search(&[6.0, 5.0, 4.0, 3.0, 3.5, 1.0]), (3, vec![3, 4, 2]));
        assert_eq!(search(&[3.0, 2.0, 2.5, 3.0, far, far]), (1, vec![3, 4, 2, 1, 0]));
        assert_eq!(search(&[3.0, 2.0, far, far, far, far]), (1, vec![3, 4, 2, 1, 0]));
        assert_eq!(search(&[1.0, 2.0, far, far]), (0, vec![2, 3, 1, 0]));
        assert_eq!(search(&[1.0]), (0, vec![0]));
    }
}
