//! Division of a run's optimiser steps into parts, and the length of learning-rate trials.

use crate::finetune::settings::{LearningRate, Settings};

use super::order;

/// A part of the optimiser steps: all of a run, or those of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepRange {
    /// Steps of the run before this part.
    pub before: u64,
    pub steps: u64,
    /// Steps of the whole run.
    pub total: u64,
}

impl StepRange {
    /// All steps of a run that trains all layers together.
    pub fn whole(settings: &Settings, samples: usize) -> Self {
        let steps = steps(settings, samples);
        StepRange { before: 0, steps, total: steps }
    }

    /// One part for each of `layers` layers. With `max_steps` the layers divide these steps equally; otherwise every
    /// layer takes all epochs.
    pub fn each(settings: &Settings, samples: usize, layers: usize) -> Vec<Self> {
        let steps = steps(settings, samples);
        let total = settings.schedule.max_steps.map_or(steps.saturating_mul(layers as u64), |_| steps);
        // In 128 bits: steps times layers may not fit into 64.
        let until = |layer: usize| (u128::from(total) * layer as u128 / layers.max(1) as u128) as u64;
        (0..layers)
            .map(|layer| StepRange { before: until(layer), steps: until(layer + 1) - until(layer), total })
            .collect()
    }

    /// Steps of the run at the end of this part.
    pub fn end(&self) -> u64 {
        self.before.saturating_add(self.steps)
    }
}

/// Maximum number of optimiser steps of a short trial; per layer when layers are trained one after the other.
const TRIAL_STEPS: u64 = 32;
/// Maximum number of steps whose samples a short trial holds out.
const HELD_OUT_STEPS: u64 = 4;

/// Length of one learning-rate trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrialPlan {
    /// Steps of the trial, over all layers; `None` for one pass over the samples.
    pub max_steps: Option<u64>,
    /// Number of steps at the end of the first epoch whose samples no trial trains on; 0 when an epoch has one step.
    pub held_out_steps: u64,
}

impl TrialPlan {
    /// Length of each trial of the settings' learning rates. `layers` is 1 when all layers are trained together.
    pub fn of(settings: &Settings, samples: usize, layers: usize) -> Self {
        let pass = order::steps_per_epoch(settings, samples);
        let layers = layers.max(1) as u64;
        let most = settings.schedule.max_steps;
        match settings.optimizer.learning_rate {
            LearningRate::Auto(_) => {
                // A quarter of the epoch, limited to the samples needed to tell rates apart.
                let held_out_steps = if pass > 1 { pass.div_ceil(4).min(HELD_OUT_STEPS) } else { 0 };
                let steps = (pass - held_out_steps).min(TRIAL_STEPS).saturating_mul(layers);
                TrialPlan { max_steps: Some(most.map_or(steps, |most| most.min(steps))), held_out_steps }
            }
            _ => TrialPlan { max_steps: most.map(|most| most.min(pass.saturating_mul(layers))), held_out_steps: 0 },
        }
    }
}

/// Optimiser steps of the settings, for all layers together or for each layer.
fn steps(settings: &Settings, samples: usize) -> u64 {
    let all = || order::steps_per_epoch(settings, samples).saturating_mul(u64::from(settings.schedule.epochs));
    if settings.trains() { settings.schedule.max_steps.unwrap_or_else(all) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_gets_an_equal_share_of_the_steps() {
        let settings = Settings::default().with(|s| {
            s.batch.size = 4;
            s.batch.accumulation_steps = 1;
            s.schedule.epochs = 2;
        });
        let ends = |settings: &Settings| -> Vec<(u64, u64)> {
            let ranges = StepRange::each(settings, 10, 3);
            assert!(ranges.iter().all(|range| range.total == ranges[2].end()));
            ranges.iter().map(|range| (range.before, range.end())).collect()
        };
        assert_eq!(ends(&settings), [(0, 6), (6, 12), (12, 18)]);
        assert_eq!(ends(&settings.clone().with(|s| s.schedule.max_steps = Some(7))), [(0, 2), (2, 4), (4, 7)]);
        let auto = settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::AUTO);
        let trial = |samples, layers| {
            let TrialPlan { max_steps, held_out_steps } = TrialPlan::of(&auto, samples, layers);
            (max_steps.unwrap(), held_out_steps)
        };
        assert_eq!((trial(4, 1), trial(8, 1), trial(40, 1)), ((1, 0), (1, 1), (7, 3)));
        assert_eq!((trial(4000, 1), trial(4000, 3)), ((32, 4), (96, 4)));
        assert_eq!(StepRange::whole(&settings, 10), StepRange { before: 0, steps: 6, total: 6 });
    }
}
