//! The learning rate: one pass over the samples with each candidate, each from the same weights.
//!
//! In one pass every sample is new to the network when its loss is taken, so the loss over the pass's end says how well
//! the rate does on samples that were not trained on. Where no term looks at answers, the network has not seen them even
//! after the pass, and their cross-entropy behind it is taken: rates that end as near to the dense stream as one another
//! are not equally good at answering.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::base::{Error, Result, Sha256Digest, read_json, sha256_json, write_json};

use super::context::Run;
use super::layered::heal;
use super::trainer::{Summary, Trainer};
use super::workers;
use crate::finetune::checkpoint::clear_work;
use crate::finetune::cut::FitTarget;
use crate::finetune::data::TrainingSet;
use crate::finetune::error::torch_error;
use crate::finetune::loss::LossKind;
use crate::finetune::plan::{Part, order};
use crate::finetune::record::{METRICS_FILE, RateTrial, StepMetrics, Totals, best, read_metrics};
use crate::finetune::settings::Settings;
use crate::finetune::student::Student;

const SCHEMA_VERSION: u32 = 1;
const TRIAL: &str = "trial.json";
/// The part of a pass, at its end, over which the loss is taken.
const JUDGED: f64 = 0.25;

/// What a finished trial leaves.
#[derive(Serialize, Deserialize)]
struct Kept {
    schema_version: u32,
    key: Sha256Digest,
    trial: RateTrial,
}

/// Tries each of the settings' `learning_rates`, with the fits of `targets` where layers are healed one after the other, and
/// leaves the weights as they were. Each trial keeps its metrics in a folder `search-N` of `work`; a run that resumes does
/// not make finished ones again.
///
/// A rate with which a pass diverges is marked.
///
/// Errors: those of the runs; `Error::NotFinite` when all rates diverge; `Error::Interrupted` with a checkpoint of the trial left behind.
pub fn search(
    run: &Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
) -> Result<Vec<RateTrial>> {
    let Run { settings, inputs, work, shared, resume, .. } = *run;
    let Some(first) = students.first() else { return Ok(Vec::new()) };
    let mut weights: Vec<Tensor> = first.written().iter().map(|weight| weight.tensor.shallow_clone()).collect();
    let copied: Result<Vec<Tensor>, tch::TchError> = weights
        .iter()
        .map(|weight| {
            let mut copy = weight.f_detach()?.f_zeros_like()?;
            copy.f_copy_(&weight.f_detach()?)?;
            Ok(copy)
        })
        .collect();
    let before = copied.map_err(torch_error("the weights before the search"))?;
    let pass = order::steps_per_epoch(settings, dataset.examples.len());
    let layers = if settings.layer_by_layer() { targets.len() as u64 } else { 1 };
    let mut trials = Vec::with_capacity(settings.learning_rates.len());
    for (number, &learning_rate) in settings.learning_rates.iter().enumerate() {
        let own = Settings {
            learning_rate,
            learning_rates: Vec::new(),
            epochs: 1,
            max_steps: settings.max_steps.map(|most| most.min(pass * layers)),
            checkpoint_every: 0,
            ..settings.clone()
        };
        let folder = work.join(format!("search-{number}"));
        let shared = shared.join(format!("search-{number}"));
        let mut inputs = inputs.clone();
        inputs.insert("settings".to_string(), sha256_json(&own)?);
        let key = sha256_json(&inputs)?;
        let file = shared.join(TRIAL);
        if resume && file.exists() {
            let kept: Kept = read_json(&file, SCHEMA_VERSION)?;
            if kept.key == key {
                trials.push(kept.trial);
                continue;
            }
        }
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let run = Run { settings: &own, inputs: &inputs, work: &folder, shared: &shared, ..*run };
        let loss = train(run, targets, students, dataset, Totals::default(), &mut |_| ()).and_then(|_| {
            if settings.layer_by_layer() {
                return answers(&own, students, dataset, &run);
            }
            Ok(judged(&read_metrics(&folder.join(METRICS_FILE))?))
        });
        let (loss, diverged) = match loss {
            Ok(loss) if loss.is_finite() => (Some(loss), None),
            Ok(loss) => (None, Some(format!("the loss is {loss}"))),
            Err(error @ Error::NotFinite { .. }) => (None, Some(error.to_string())),
            Err(error) => return Err(error),
        };
        let trial = RateTrial { learning_rate, loss, diverged };
        clear_work(&folder)?;
        if run.writes() {
            write_json(&file, &Kept { schema_version: SCHEMA_VERSION, key, trial: trial.clone() })?;
        }
        trials.push(trial);
        let _guard = tch::no_grad_guard();
        for (weight, before) in weights.iter_mut().zip(&before) {
            weight.f_copy_(before).map_err(torch_error("the weights before the search"))?;
        }
    }
    if let (None, Some(first)) = (best(&trials), trials.first().and_then(|trial| trial.diverged.as_ref())) {
        let rates: Vec<String> = trials.iter().map(|trial| format!("{:e}", trial.learning_rate)).collect();
        return Err(Error::not_finite(format!("learning rates {}", rates.join(", ")), format!("all diverge: {first}")));
    }
    Ok(trials)
}

/// All steps of a run: over all layers at once, or one layer after the other.
///
/// Errors: those of the trainer.
pub fn train(
    run: Run<'_>,
    targets: &[FitTarget],
    students: &mut [Student],
    dataset: &mut TrainingSet,
    begun: Totals,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Summary> {
    if run.settings.layer_by_layer() {
        return heal(run, targets, students, dataset, begun, observer);
    }
    let part = Part::whole(run.settings, dataset.examples.len());
    Trainer::new(run, part, students, dataset)?.run(begun, observer)
}

/// Mean cross-entropy of all answer tokens.
fn answers(settings: &Settings, students: &mut [Student], dataset: &mut TrainingSet, run: &Run<'_>) -> Result<f64> {
    let settings = Settings { losses: [(LossKind::Ce, 1.0)].into(), stages: Vec::new(), ..settings.clone() };
    dataset.want(0..0);
    let (mut sum, mut count) = (0.0, 0.0);
    for step in order::epoch(&settings, &dataset.lengths(), 0) {
        let tokens: usize = step.iter().flatten().map(|&sample| dataset.examples[sample].targets.len()).sum();
        let sums = workers::run(students, dataset, &settings, &step, run)?;
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
