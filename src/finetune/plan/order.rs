//! Order of the samples. It depends only on the seed and the epoch, so a resumed run needs no saved position but the
//! step.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::finetune::settings::Settings;

/// Number of optimiser steps whose samples are sorted by length together when batches are grouped by length.
const STEPS_PER_GROUP: usize = 16;

/// Samples of one optimiser step, grouped into the micro-batches of its forward passes.
pub type StepSamples = Vec<Vec<usize>>;

/// All steps of one epoch. `lengths` has the length in tokens of each sample.
///
/// Every sample occurs once. Each step takes `batch_size * accumulation_steps` samples; the last step may be smaller.
/// Within a step the samples are sorted by length before they are cut into forward passes, which reduces padding and
/// changes no gradient.
pub fn epoch(settings: &Settings, lengths: &[usize], epoch: u64) -> Vec<StepSamples> {
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.shuffle(&mut rng);
    let per_step = settings.samples_per_step();
    if settings.data.group_by_length {
        for group in order.chunks_mut(per_step.saturating_mul(STEPS_PER_GROUP)) {
            group.sort_by_key(|&sample| std::cmp::Reverse(lengths[sample]));
        }
    }
    let mut steps: Vec<Vec<usize>> = order.chunks(per_step).map(<[usize]>::to_vec).collect();
    if settings.data.group_by_length {
        steps.shuffle(&mut rng);
    }
    steps
        .into_iter()
        .map(|mut samples| {
            samples.sort_by_key(|&sample| std::cmp::Reverse(lengths[sample]));
            samples.chunks(settings.batch.size as usize).map(<[usize]>::to_vec).collect()
        })
        .collect()
}

/// Number of optimiser steps per epoch.
pub fn steps_per_epoch(settings: &Settings, samples: usize) -> u64 {
    samples.div_ceil(settings.samples_per_step()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths() -> Vec<usize> {
        (0..103).map(|i| 40 + (i * 37) % 50).collect()
    }

    fn settings(group_by_length: bool) -> Settings {
        Settings::default().with(|s| {
            s.batch.size = 4;
            s.batch.accumulation_steps = 2;
            s.data.group_by_length = group_by_length;
        })
    }

    #[test]
    fn every_sample_comes_once_per_epoch() {
        for grouped in [false, true] {
            let settings = settings(grouped);
            let steps = epoch(&settings, &lengths(), 0);
            assert_eq!(steps.len() as u64, steps_per_epoch(&settings, 103));
            let mut seen: Vec<usize> = steps.iter().flatten().flatten().copied().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..103).collect::<Vec<_>>());
            assert!(steps.iter().flatten().all(|batch| !batch.is_empty() && batch.len() <= 4));
        }
    }

    #[test]
    fn the_order_depends_only_on_seed_and_epoch() {
        let first = epoch(&settings(false), &lengths(), 0);
        assert_eq!(first, epoch(&settings(false), &lengths(), 0));
        assert_ne!(first, epoch(&settings(false), &lengths(), 1));
        assert_ne!(first, epoch(&settings(false).with(|s| s.seed = 43), &lengths(), 0));
    }

    #[test]
    fn grouping_by_length_reduces_padding() {
        let lengths = lengths();
        let padded = |grouped: bool| -> usize {
            let steps = epoch(&settings(grouped), &lengths, 0);
            steps.iter().flatten().map(|batch| batch.len() * batch.iter().map(|&s| lengths[s]).max().unwrap()).sum()
        };
        assert!(padded(true) < padded(false));
    }
}
