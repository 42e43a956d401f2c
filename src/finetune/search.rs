//! The learning rate: one pass over the samples with each candidate, each from the same weights.
//!
//! In one pass every sample is new to the network when its loss is taken, so the loss over the pass's end says how well
//! the rate does on samples that were not trained on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::base::{Cancel, Result, Sha256Digest, read_json, sha256_json, write_json};

use super::batch::TrainingSet;
use super::checkpoint::Totals;
use super::loss::LossKind;
use super::metrics::{StepMetrics, read_metrics};
use super::sampler;
use super::settings::Settings;
use super::student::Student;
use super::torch_error;
use super::trainer::{METRICS_FILE, Run, Trainer, clear_checkpoints};

const SCHEMA_VERSION: u32 = 1;
const TRIAL: &str = "trial.json";
/// The part of a pass, at its end, over which the loss is taken.
const JUDGED: f64 = 0.25;

/// One candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RateTrial {
    pub learning_rate: f64,
    /// Mean over the last quarter of the pass: of the cross-entropy where the recipe has it, of the whole loss otherwise.
    pub loss: f64,
}

/// What a finished trial leaves.
#[derive(Serialize, Deserialize)]
struct Kept {
    schema_version: u32,
    key: Sha256Digest,
    trial: RateTrial,
}

/// The rate with the lowest loss, of equal ones the first.
pub fn best(trials: &[RateTrial]) -> Option<f64> {
    trials.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).map(|trial| trial.learning_rate)
}

/// Tries each of the settings' `learning_rates` and leaves the weights as they were. Each trial keeps its metrics in a
/// folder `search-N` of `work`; with `resume` finished ones are not made again.
///
/// Errors: those of the runs; `Error::Interrupted` with a checkpoint of the trial left behind.
pub fn search(
    run: &Run<'_>,
    students: &mut [Student],
    dataset: &TrainingSet,
    resume: bool,
    cancel: &Cancel,
) -> Result<Vec<RateTrial>> {
    let Run { settings, device, inputs, work } = run;
    let Some(first) = students.first() else { return Ok(Vec::new()) };
    let mut weights: Vec<Tensor> = first.weights().iter().map(|weight| weight.tensor.shallow_clone()).collect();
    let copied: Result<Vec<Tensor>, tch::TchError> = weights
        .iter()
        .map(|weight| {
            let mut copy = weight.f_detach()?.f_zeros_like()?;
            copy.f_copy_(&weight.f_detach()?)?;
            Ok(copy)
        })
        .collect();
    let before = copied.map_err(torch_error("the weights before the search"))?;
    let pass = sampler::steps_per_epoch(settings, dataset.examples.len());
    let mut trials = Vec::with_capacity(settings.learning_rates.len());
    for (number, &learning_rate) in settings.learning_rates.iter().enumerate() {
        let own = Settings {
            learning_rate,
            learning_rates: Vec::new(),
            epochs: 1,
            max_steps: settings.max_steps.map(|most| most.min(pass)),
            checkpoint_every: 0,
            ..(*settings).clone()
        };
        let folder = work.join(format!("search-{number}"));
        let mut inputs = (*inputs).clone();
        inputs.insert("settings".to_string(), sha256_json(&own)?);
        let key = sha256_json(&inputs)?;
        let file = folder.join(TRIAL);
        if resume && file.exists() {
            let kept: Kept = read_json(&file, SCHEMA_VERSION)?;
            if kept.key == key {
                trials.push(kept.trial);
                continue;
            }
        }
        let run = Run { settings: &own, device: *device, inputs: &inputs, work: &folder };
        Trainer::new(run, students, dataset)?.run(resume, Totals::default(), cancel, &mut |_| ())?;
        let trial = RateTrial { learning_rate, loss: judged(&read_metrics(&folder.join(METRICS_FILE))?) };
        clear_checkpoints(&folder)?;
        write_json(&file, &Kept { schema_version: SCHEMA_VERSION, key, trial: trial.clone() })?;
        trials.push(trial);
        let _guard = tch::no_grad_guard();
        for (weight, before) in weights.iter_mut().zip(&before) {
            weight.f_copy_(before).map_err(torch_error("the weights before the search"))?;
        }
    }
    Ok(trials)
}

fn judged(steps: &[StepMetrics]) -> f64 {
    let last = &steps[steps.len() - ((JUDGED * steps.len() as f64).ceil() as usize).min(steps.len())..];
    let loss = |step: &StepMetrics| step.losses.get(LossKind::Ce.name()).copied().unwrap_or(step.loss);
    last.iter().map(loss).sum::<f64>() / last.len().max(1) as f64
}
