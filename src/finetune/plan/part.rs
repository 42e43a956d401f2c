//! How the steps of a run fall into parts.

use crate::finetune::settings::Settings;

use super::order;

/// The optimiser steps that belong together: all of a run, or those of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Steps of the run before these.
    pub before: u64,
    pub steps: u64,
    /// Steps of the whole run.
    pub total: u64,
}

impl Part {
    /// All steps of a run over all layers at once.
    pub fn whole(settings: &Settings, samples: usize) -> Self {
        let steps = steps(settings, samples);
        Part { before: 0, steps, total: steps }
    }

    /// The steps of each of `layers` layers.
    pub fn each(settings: &Settings, samples: usize, layers: usize) -> Vec<Self> {
        let steps = steps(settings, samples);
        let total = settings.max_steps.map_or(steps * layers as u64, |_| steps);
        let until = |layer: usize| match settings.max_steps {
            Some(_) => total * layer as u64 / layers.max(1) as u64,
            None => steps * layer as u64,
        };
        (0..layers).map(|layer| Part { before: until(layer), steps: until(layer + 1) - until(layer), total }).collect()
    }

    /// Steps of the run when these are done.
    pub fn end(&self) -> u64 {
        self.before + self.steps
    }
}

/// Optimiser steps that the settings ask for, over all layers at once.
fn steps(settings: &Settings, samples: usize) -> u64 {
    let all = || order::steps_per_epoch(settings, samples) * u64::from(settings.epochs);
    if settings.trains() { settings.max_steps.unwrap_or_else(all) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_has_an_equal_part_of_the_steps() {
        let settings = Settings { batch_size: 4, accumulation_steps: 1, epochs: 2, ..Settings::default() };
        let ends = |settings: &Settings| -> Vec<(u64, u64)> {
            let parts = Part::each(settings, 10, 3);
            assert!(parts.iter().all(|part| part.total == parts[2].end()));
            parts.iter().map(|part| (part.before, part.end())).collect()
        };
        assert_eq!(ends(&settings), [(0, 6), (6, 12), (12, 18)]);
        assert_eq!(ends(&Settings { max_steps: Some(7), ..settings.clone() }), [(0, 2), (2, 4), (4, 7)]);
        assert_eq!(Part::whole(&settings, 10), Part { before: 0, steps: 6, total: 6 });
    }
}
