//! Scores over groups, retention against a baseline, and robust summaries of timings.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::metrics::Judged;

/// Number of resamples for every interval; percentile intervals need 1,000 or more (Efron &
/// Tibshirani 1993, chapter 19).
pub const RESAMPLES: usize = 2000;

/// A ratio with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Interval {
    /// The model's score over the baseline's.
    pub ratio: f64,
    /// Lower end of the 95% paired bootstrap interval.
    pub low: f64,
    /// Upper end of the 95% paired bootstrap interval.
    pub high: f64,
}

/// Answers to the same questions by a model and its baseline, the input of the bootstrap.
pub struct Stratum {
    /// Units of answers, each with pairs of (model, baseline). The answers of one unit are drawn together.
    pub units: Vec<Vec<(Judged, Judged)>>,
    /// Function from answers to a score.
    pub score: fn(&[Judged]) -> f64,
}

impl Stratum {
    /// The scores of the model and of the baseline over units, in the order of the draw.
    fn scores<'a>(&self, units: impl Iterator<Item = &'a Vec<(Judged, Judged)>>) -> (f64, f64) {
        let (mut model, mut baseline) = (Vec::new(), Vec::new());
        for (number, unit) in units.enumerate() {
            // A unit that is drawn twice counts as two units.
            model.extend(unit.iter().map(|pair| Judged { unit: number, ..pair.0 }));
            baseline.extend(unit.iter().map(|pair| Judged { unit: number, ..pair.1 }));
        }
        ((self.score)(&model), (self.score)(&baseline))
    }
}

/// Retention over strata: the mean of the strata's scores, model over baseline, with a paired bootstrap interval (units
/// are drawn with replacement within each stratum, both models' answers together).
///
/// `None` when the baseline's score is 0 or a stratum is empty.
/// Source of the interval: Efron & Tibshirani 1993, percentile method.
pub fn retention(strata: &[Stratum], seed: u64) -> Option<Interval> {
    if strata.is_empty() || strata.iter().any(|stratum| stratum.units.is_empty()) {
        return None;
    }
    let ratio = ratio_of(strata.iter().map(|stratum| stratum.scores(stratum.units.iter())))?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ratios = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        let drawn = strata.iter().map(|stratum| {
            let units = &stratum.units;
            stratum.scores((0..units.len()).map(|_| &units[rng.random_range(0..units.len())]))
        });
        // A draw in which the baseline's score is 0 has no ratio.
        ratios.extend(ratio_of(drawn));
    }
    ratios.sort_by(f64::total_cmp);
    Some(Interval { ratio, low: quantile(&ratios, 0.025), high: quantile(&ratios, 0.975) })
}

/// Retention of a baseline's mean likelihood per token: `exp` of the summed differences of log-likelihood (model minus
/// baseline, in nats) over the summed tokens, with a bootstrap interval over the rows `(difference, tokens)`.
///
/// Source of the interval: as for `retention`.
pub fn kept_likelihood(rows: &[(f64, f64)], seed: u64) -> Interval {
    let ratio = |rows: &mut dyn Iterator<Item = (f64, f64)>| {
        let (difference, tokens) = rows.fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
        (difference / tokens).exp()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ratios: Vec<f64> =
        (0..RESAMPLES).map(|_| ratio(&mut (0..rows.len()).map(|_| rows[rng.random_range(0..rows.len())]))).collect();
    ratios.sort_by(f64::total_cmp);
    let ratio = ratio(&mut rows.iter().copied());
    Interval { ratio, low: quantile(&ratios, 0.025), high: quantile(&ratios, 0.975) }
}

fn ratio_of(means: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let (a, b) = means.fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
    (b > 0.0).then(|| a / b)
}

/// Linear interpolation between the sorted values; 0 for none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

/// A robust summary of repeated measurements, in the unit of its field's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Spread {
    /// Middle measurement; the mean of the middle two of an even number.
    pub median: f64,
    /// Smallest measurement.
    pub min: f64,
    /// Largest measurement.
    pub max: f64,
    /// Median absolute deviation from the median.
    pub mad: f64,
    /// Number of measurements.
    pub runs: usize,
}

impl Spread {
    /// Summarises measurements; all fields are 0 for an empty list.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let median = quantile(&sorted, 0.5);
        let mut deviations: Vec<f64> = sorted.iter().map(|value| (value - median).abs()).collect();
        deviations.sort_by(f64::total_cmp);
        Spread {
            median,
            min: sorted.first().copied().unwrap_or(0.0),
            max: sorted.last().copied().unwrap_or(0.0),
            mad: quantile(&deviations, 0.5),
            runs: values.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::mean_score;
    use super::*;

    /// Questions that form one unit each.
    fn stratum(pairs: impl Iterator<Item = (f64, f64)>) -> Stratum {
        let judged = |score| Judged { score, ..Judged::default() };
        Stratum { units: pairs.map(|(a, b)| vec![(judged(a), judged(b))]).collect(), score: mean_score }
    }

    #[test]
    fn spreads_by_hand() {
        let spread = Spread::of(&[4.0, 1.0, 2.0, 10.0]);
        assert_eq!(spread, Spread { median: 3.0, min: 1.0, max: 10.0, mad: 1.5, runs: 4 });
        assert_eq!(Spread::of(&[]), Spread::default());
    }

    #[test]
    fn equal_scores_retain_everything_exactly() {
        let pairs = (0..50).map(|i| (f64::from(i % 2), f64::from(i % 2)));
        assert_eq!(retention(&[stratum(pairs)], 7), Some(Interval { ratio: 1.0, low: 1.0, high: 1.0 }));
    }

    #[test]
    fn the_interval_is_that_of_a_binomial_share() {
        // The baseline is right on all 400, the model on 300: the ratio is a proportion with standard error sqrt(0.75 *
        // 0.25 / 400) = 0.02165, so the interval is 0.75 +- 0.0424.
        let pairs = (0..400).map(|i| (f64::from(u8::from(i % 4 != 0)), 1.0));
        let interval = retention(&[stratum(pairs)], 1).expect("a ratio");
        assert_eq!(interval.ratio, 0.75);
        assert!((interval.low - 0.7076).abs() < 0.005 && (interval.high - 0.7924).abs() < 0.005, "{interval:?}");
    }

    #[test]
    fn likelihoods_weigh_by_tokens() {
        // 300 tokens that lose 0.2 nats each and 100 that lose nothing: exp(-0.15).
        let interval = kept_likelihood(&[(-60.0, 300.0), (0.0, 100.0)], 1);
        assert!((interval.ratio - (-0.15f64).exp()).abs() < 1e-12);
        assert!(interval.low >= (-0.2f64).exp() - 1e-12 && interval.high <= 1.0, "{interval:?}");
        assert_eq!(kept_likelihood(&[(0.0, 9.0); 5], 1), Interval { ratio: 1.0, low: 1.0, high: 1.0 });
    }

    #[test]
    fn groups_weigh_the_same_however_large() {
        let strata = [stratum(vec![(1.0, 1.0); 90].into_iter()), stratum(vec![(0.0, 1.0); 10].into_iter())];
        assert_eq!(retention(&strata, 1).expect("a ratio").ratio, 0.5);
    }

    #[test]
    fn no_ratio_where_the_baseline_scores_nothing() {
        assert_eq!(retention(&[stratum([(1.0, 0.0)].into_iter())], 1), None);
        assert_eq!(retention(&[stratum(std::iter::empty())], 1), None);
    }
}
