//! Selects the next token from logits: greedily, or by temperature and nucleus sampling.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::{Error, Result};

use super::logits::{argmax_last, last_logits};
use super::tensor::TensorValue;

/// Selects tokens: the most probable one at temperature 0, otherwise a random one from the nucleus.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Always selects the most probable token.
    pub fn greedy() -> Self {
        Sampler { temperature: 0.0, top_p: 1.0, rng: ChaCha8Rng::seed_from_u64(0) }
    }

    /// Samples from the softmax of `logits / temperature`, restricted to the fewest tokens whose
    /// probabilities reach `top_p`.
    ///
    /// Source: Holtzman et al. 2020, arXiv:1904.09751 (nucleus sampling).
    /// Errors: `Error::Invalid` for a temperature below 0 or a `top_p` outside (0, 1].
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::invalid("temperature", format!("is {temperature}, expected a number of 0 or more"))
                .remedy("give `--temperature` 0 for the most likely token at each step"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::invalid("top_p", format!("is {top_p}, expected a number above 0 and at most 1"))
                .remedy("give `--top-p` 1 to draw from all tokens"));
        }
        Ok(Sampler { temperature, top_p, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// One token for each row of a batch.
    ///
    /// Errors: as `argmax_last`.
    pub(super) fn choose(&mut self, logits: &TensorValue, batch: usize) -> Result<Vec<i64>> {
        let likeliest = argmax_last(logits, batch)?;
        if self.temperature == 0.0 {
            return Ok(likeliest);
        }
        let rows = last_logits(logits, batch)?;
        let vocabulary = rows.len() / batch.max(1);
        Ok(rows.chunks_exact(vocabulary.max(1)).zip(likeliest).map(|(row, best)| self.draw(row, best)).collect())
    }

    fn draw(&mut self, logits: &[f32], best: i64) -> i64 {
        let top = usize::try_from(best).ok().and_then(|best| logits.get(best)).copied().unwrap_or(0.0);
        let mut ranked: Vec<(usize, f64)> = logits
            .iter()
            .map(|logit| f64::from((logit - top) / self.temperature).exp())
            .enumerate()
            .filter(|(_, weight)| *weight > 0.0)
            .collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
        let mut mass = 0.0;
        let kept = ranked.iter().take_while(|(_, weight)| {
            let wanted = mass < f64::from(self.top_p) * total;
            mass += weight;
            wanted
        });
        let kept: Vec<(usize, f64)> = kept.copied().collect();
        let mut place = self.rng.random::<f64>() * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        for (token, weight) in &kept {
            place -= weight;
            if place < 0.0 {
                return *token as i64;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(values: &[f32]) -> TensorValue {
        TensorValue::new(&[1, 1, values.len()], values.to_vec()).expect("logits")
    }

    #[test]
    fn sampled_frequencies_follow_the_softmax_and_top_p() {
        // Probabilities 0.6, 0.3 and 0.1.
        let given = logits(&[0.6f32.ln(), 0.1f32.ln(), 0.3f32.ln()]);
        let shares = |top_p: f32, temperature: f32| {
            let mut sampler = Sampler::new(temperature, top_p, 1).expect("sampler");
            let mut counts = [0.0; 3];
            for _ in 0..4000 {
                counts[sampler.choose(&given, 1).expect("token")[0] as usize] += 1.0 / 4000.0;
            }
            counts
        };
        // Four standard errors of a proportion over 4,000 draws are at most 0.032.
        let close = |found: [f64; 3], want: [f64; 3]| found.iter().zip(want).all(|(a, b)| (a - b).abs() < 0.032);
        assert!(close(shares(1.0, 1.0), [0.6, 0.1, 0.3]), "{:?}", shares(1.0, 1.0));
        assert!(close(shares(0.85, 1.0), [0.6667, 0.0, 0.3333]), "{:?}", shares(0.85, 1.0));
        assert!(close(shares(1.0, 0.5), [0.7826, 0.0217, 0.1957]), "{:?}", shares(1.0, 0.5));
        assert_eq!(shares(0.5, 1.0)[0].round(), 1.0);
    }

    #[test]
    fn a_seed_determines_the_samples_and_greedy_takes_the_maximum() {
        let given = logits(&[0.0, 0.1, 0.2, 0.3]);
        let draw = |seed| {
            let mut sampler = Sampler::new(1.0, 1.0, seed).expect("sampler");
            (0..40).map(|_| sampler.choose(&given, 1).expect("token")[0]).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert_eq!(Sampler::greedy().choose(&given, 1).expect("token"), [3]);
        for (temperature, top_p, want) in [
            (-1.0, 1.0, "temperature: is -1, expected a number of 0 or more"),
            (f32::NAN, 1.0, "temperature: is NaN, expected a number of 0 or more"),
            (1.0, 0.0, "top_p: is 0, expected a number above 0 and at most 1"),
        ] {
            let error = Sampler::new(temperature, top_p, 0).expect_err(want).to_string();
            assert!(error.starts_with(want), "{error}");
        }
    }
}
