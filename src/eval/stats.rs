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

/// A difference of scores, from 0 to 1 each, with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// The model's score less the baseline's.
    pub difference: f64,
    /// Lower end of the 95% paired bootstrap interval.
    pub low: f64,
    /// Upper end of the 95% paired bootstrap interval.
    pub high: f64,
}

/// Two models' scores on the same questions: their ratio, where the baseline scores anything, and their difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairedComparison {
    /// Model over baseline; absent where the baseline scores nothing.
    pub ratio: Option<Interval>,
    /// Model less baseline.
    pub difference: Difference,
}

/// Answers to the same questions by a model and by its baseline, as a bootstrap draws them.
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

/// Compares over strata: the mean of the strata's scores, model over baseline and model less baseline, with paired
/// bootstrap intervals (units are drawn with replacement within each stratum, both models' answers together; ratio and
/// difference are of the same draws).
///
/// `None` when there is no stratum or one is empty.
/// Source of the intervals: Efron & Tibshirani 1993, percentile method.
pub fn compared(strata: &[Stratum], seed: u64) -> Option<PairedComparison> {
    compared_over(&[strata], seed)
}

/// [`compared`] for models that were made several times, from other random seeds: ratio and difference are means over
/// these runs, and every draw takes the same questions from all of them.
pub fn compared_over(runs: &[&[Stratum]], seed: u64) -> Option<PairedComparison> {
    let draws: Vec<Draws> = runs.iter().map(|strata| Draws::of(strata, seed)).collect::<Option<_>>()?;
    let mean = |values: &dyn Fn(&Draws) -> Option<f64>| -> Option<f64> {
        let values: Vec<f64> = draws.iter().map(values).collect::<Option<_>>()?;
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let difference = mean(&|run| Some(run.whole.0 - run.whole.1))?;
    let differences = (0..RESAMPLES).filter_map(|draw| mean(&|run| Some(run.drawn[draw].0 - run.drawn[draw].1)));
    let (low, high) = ends(differences.collect());
    let difference = Difference { difference, low, high };
    let ratio = mean(&|run| ratio_of(run.whole)).map(|ratio| {
        // A draw in which a baseline scores nothing has no ratio.
        let ratios = (0..RESAMPLES).filter_map(|draw| mean(&|run| ratio_of(run.drawn[draw])));
        let (low, high) = ends(ratios.collect());
        Interval { ratio, low, high }
    });
    Some(PairedComparison { ratio, difference })
}

/// Mean scores over strata of model and baseline: of all units, and of each draw.
struct Draws {
    whole: (f64, f64),
    drawn: Vec<(f64, f64)>,
}

impl Draws {
    fn of(strata: &[Stratum], seed: u64) -> Option<Self> {
        if strata.is_empty() || strata.iter().any(|stratum| stratum.units.is_empty()) {
            return None;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let drawn = (0..RESAMPLES).map(|_| {
            mean_of(strata.iter().map(|stratum| {
                let units = &stratum.units;
                stratum.scores((0..units.len()).map(|_| &units[rng.random_range(0..units.len())]))
            }))
        });
        let drawn = drawn.collect();
        Some(Draws { whole: mean_of(strata.iter().map(|stratum| stratum.scores(stratum.units.iter()))), drawn })
    }
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
    let ratios =
        (0..RESAMPLES).map(|_| ratio(&mut (0..rows.len()).map(|_| rows[rng.random_range(0..rows.len())]))).collect();
    let (low, high) = ends(ratios);
    Interval { ratio: ratio(&mut rows.iter().copied()), low, high }
}

fn mean_of(scores: impl ExactSizeIterator<Item = (f64, f64)>) -> (f64, f64) {
    let count = scores.len() as f64;
    let (model, baseline) = scores.fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
    (model / count, baseline / count)
}

fn ratio_of((model, baseline): (f64, f64)) -> Option<f64> {
    (baseline > 0.0).then(|| model / baseline)
}

/// The 2.5% and 97.5% quantiles.
fn ends(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (quantile(&values, 0.025), quantile(&values, 0.975))
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

    fn retention(strata: &[Stratum], seed: u64) -> Option<Interval> {
        compared(strata, seed).and_then(|compared| compared.ratio)
    }

    #[test]
    fn the_spread_equals_values_computed_by_hand() {
        let spread = Spread::of(&[4.0, 1.0, 2.0, 10.0]);
        assert_eq!(spread, Spread { median: 3.0, min: 1.0, max: 10.0, mad: 1.5, runs: 4 });
        assert_eq!(Spread::of(&[]), Spread::default());
    }

    #[test]
    fn equal_scores_give_a_ratio_of_exactly_1() {
        let pairs = (0..50).map(|i| (f64::from(i % 2), f64::from(i % 2)));
        let difference = Difference { difference: 0.0, low: 0.0, high: 0.0 };
        let ratio = Some(Interval { ratio: 1.0, low: 1.0, high: 1.0 });
        assert_eq!(compared(&[stratum(pairs)], 7), Some(PairedComparison { ratio, difference }));
    }

    #[test]
    fn the_interval_is_that_of_a_binomial_proportion() {
        // The baseline is right on all 400, the model on 300: the ratio is a proportion with standard error sqrt(0.75 *
        // 0.25 / 400) = 0.02165, so the interval is 0.75 +- 0.0424.
        let pairs = (0..400).map(|i| (f64::from(u8::from(i % 4 != 0)), 1.0));
        let interval = retention(&[stratum(pairs)], 1).expect("a ratio");
        assert_eq!(interval.ratio, 0.75);
        assert!((interval.low - 0.7076).abs() < 0.005 && (interval.high - 0.7924).abs() < 0.005, "{interval:?}");
    }

    #[test]
    fn the_likelihood_ratio_is_weighted_by_tokens() {
        // 300 tokens that lose 0.2 nats each and 100 that lose nothing: exp(-0.15).
        let interval = kept_likelihood(&[(-60.0, 300.0), (0.0, 100.0)], 1);
        assert!((interval.ratio - (-0.15f64).exp()).abs() < 1e-12);
        assert!(interval.low >= (-0.2f64).exp() - 1e-12 && interval.high <= 1.0, "{interval:?}");
        assert_eq!(kept_likelihood(&[(0.0, 9.0); 5], 1), Interval { ratio: 1.0, low: 1.0, high: 1.0 });
    }

    /// Each run beats the baseline on exactly the questions where the other one loses, so every draw has a mean
    /// difference of 0.
    #[test]
    fn all_runs_are_resampled_with_the_same_draws() {
        let run = |even: f64| vec![stratum((0..40).map(|i| if i % 2 == 0 { (even, 0.5) } else { (1.0 - even, 0.5) }))];
        let (first, second) = (run(1.0), run(0.0));
        let found = compared_over(&[first.as_slice(), second.as_slice()], 3).expect("scores");
        let Difference { difference, low, high } = found.difference;
        assert!([difference, low, high].iter().all(|value| value.abs() < 1e-12), "{found:?}");
        let alone = compared(&first, 3).expect("scores").difference;
        assert!(alone.low < -0.05 && alone.high > 0.05, "{alone:?}");
    }

    #[test]
    fn groups_have_equal_weight_whatever_their_size() {
        let strata = [stratum(vec![(1.0, 1.0); 90].into_iter()), stratum(vec![(0.0, 1.0); 10].into_iter())];
        assert_eq!(retention(&strata, 1).expect("a ratio").ratio, 0.5);
    }

    #[test]
    fn there_is_no_ratio_if_the_baseline_scores_zero() {
        let found = compared(&[stratum([(1.0, 0.0)].into_iter())], 1).expect("a difference");
        assert_eq!((found.ratio, found.difference.difference), (None, 1.0));
        assert_eq!(compared(&[stratum(std::iter::empty())], 1), None);
    }

    /// Written by `scripts/reference/bootstrap.py`: scores by question and numpy's percentile intervals.
    #[derive(serde::Deserialize)]
    struct Reference {
        /// For each stratum: the model's scores and the baseline's.
        strata: Vec<(Vec<f64>, Vec<f64>)>,
        ratio: [f64; 3],
        difference: [f64; 3],
        /// For each question: the difference of log-likelihoods, and the number of tokens.
        likelihood: Vec<(f64, f64)>,
        kept_likelihood: [f64; 3],
    }

    /// Both sides draw at random. The ends of 2,000 draws agree with the ends of numpy's 200,000 draws to a seventh of
    /// the half width of the interval (the standard error of the quantile is 0.03 of it). The estimates agree to
    /// rounding.
    #[test]
    fn bootstrap_intervals_equal_numpy_on_stored_scores() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/expected/bootstrap.json");
        let reference: Reference = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let close = |[found, low, high]: [f64; 3], want: [f64; 3]| {
            let near = (want[2] - want[1]) / 14.0;
            assert!((found - want[0]).abs() < 1e-12, "{found}, numpy has {}", want[0]);
            assert!(
                (low - want[1]).abs() < near && (high - want[2]).abs() < near,
                "{low} to {high}, numpy has {want:?}"
            );
        };
        let strata = reference
            .strata
            .iter()
            .map(|(model, baseline)| stratum(model.iter().copied().zip(baseline.iter().copied())));
        let found = compared(&strata.collect::<Vec<_>>(), 42).expect("scores");
        let ratio = found.ratio.expect("a ratio");
        close([ratio.ratio, ratio.low, ratio.high], reference.ratio);
        let Difference { difference, low, high } = found.difference;
        close([difference, low, high], reference.difference);
        let kept = kept_likelihood(&reference.likelihood, 42);
        close([kept.ratio, kept.low, kept.high], reference.kept_likelihood);
    }
}
