//! A seeded draw of samples from a data set.

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

/// Number of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// Every sample.
    All,
    /// A fraction in (0, 1], rounded to the nearest whole sample, at least one.
    Fraction(f64),
    /// A number of samples, at most all of them.
    Samples(usize),
}

/// A seeded choice of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Subset {
    /// Number or fraction of the samples.
    pub amount: Amount,
    /// Samples of different seeds are drawn independently.
    pub seed: u64,
}

impl Subset {
    /// Positions of the drawn samples, in the order of the draw. Each sample has a rank, which is a hash of the seed
    /// and its key; the samples with the lowest ranks are drawn. The draw is therefore independent of the samples'
    /// order. A smaller amount with the same seed is a prefix of a larger one.
    ///
    /// Errors: `Error::Invalid` for no samples, a fraction outside (0, 1], or more samples than there are.
    pub fn indices(&self, keys: &[u64]) -> Result<Vec<usize>> {
        let len = keys.len();
        let count = match self.amount {
            Amount::All => len,
            Amount::Fraction(part) if part > 0.0 && part <= 1.0 => {
                ((len as f64 * part).round() as usize).clamp(1, len.max(1))
            }
            Amount::Fraction(part) => {
                return Err(Error::invalid(
                    "fraction of the data",
                    format!("is {part}, expected more than 0 and at most 1"),
                )
                .remedy("give 1 to use all samples"));
            }
            Amount::Samples(count) => count,
        };
        if count == 0 || len == 0 {
            return Err(Error::invalid("data", "no samples are chosen").remedy("ask for at least one of at least one"));
        }
        if count > len {
            return Err(Error::invalid("data", format!("has {len} samples, but {count} are asked for"))
                .remedy(format!("give `--samples {len}` or fewer")));
        }
        let seed = mix(self.seed);
        let mut indices: Vec<usize> = (0..len).collect();
        indices.sort_by_cached_key(|&index| (mix(seed ^ keys[index]), index));
        indices.truncate(count);
        Ok(indices)
    }
}

/// A bijective hash of 64-bit numbers: one step of SplitMix64.
///
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, variant 13 by Stafford.
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(count: u64) -> Vec<u64> {
        (0..count).map(|number| mix(number ^ 77)).collect()
    }

    #[test]
    fn a_smaller_subset_is_a_prefix_of_a_larger_one_of_the_same_seed() {
        let choose = |amount, seed| Subset { amount, seed }.indices(&keys(100)).unwrap();
        let ten = choose(Amount::Fraction(0.1), 42);
        assert_eq!(ten.len(), 10);
        assert_eq!(ten, choose(Amount::Samples(10), 42));
        assert_eq!(ten[..4], choose(Amount::Samples(4), 42)[..]);
        assert_ne!(ten, choose(Amount::Samples(10), 43));
        let mut all = choose(Amount::All, 42);
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn the_chosen_subset_does_not_depend_on_sample_order() {
        let keys = keys(100);
        let backwards: Vec<u64> = keys.iter().rev().copied().collect();
        let chosen = |keys: &[u64]| -> Vec<u64> {
            let subset = Subset { amount: Amount::Samples(20), seed: 5 };
            subset.indices(keys).unwrap().into_iter().map(|index| keys[index]).collect()
        };
        assert_eq!(chosen(&keys), chosen(&backwards));
    }

    #[test]
    fn every_sample_is_drawn_about_equally_often() {
        let keys = keys(50);
        let mut drawn = [0; 50];
        for seed in 0..2000 {
            for index in (Subset { amount: Amount::Samples(5), seed }).indices(&keys).unwrap() {
                drawn[index] += 1;
            }
        }
        // 200 each, with a standard deviation of 13.
        assert!(drawn.iter().all(|count| (130..270).contains(count)), "{drawn:?}");
    }

    #[test]
    fn amounts_out_of_range_are_refused() {
        for (amount, count, want) in [
            (Amount::Fraction(0.0), 10, "fraction of the data: is 0, expected more than 0 and at most 1"),
            (Amount::Fraction(1.5), 10, "fraction of the data: is 1.5, expected more than 0 and at most 1"),
            (Amount::Fraction(f64::NAN), 10, "fraction of the data: is NaN, expected more than 0 and at most 1"),
            (Amount::Samples(0), 10, "data: no samples are chosen"),
            (Amount::Samples(11), 10, "data: has 10 samples, but 11 are asked for; give `--samples 10` or fewer"),
            (Amount::All, 0, "data: no samples are chosen"),
        ] {
            let error = Subset { amount, seed: 1 }.indices(&keys(count)).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{amount:?}: {error}");
            assert!(error.to_string().starts_with(want), "{amount:?}: {error}");
        }
    }
}
