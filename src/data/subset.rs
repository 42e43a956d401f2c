//! Which samples of a data set a step uses.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

/// How many samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    All,
    /// A part in (0, 1], rounded to the nearest whole sample, at least one.
    Fraction(f64),
    /// A number of samples, at most all of them.
    Samples(usize),
}

/// A seeded choice of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Subset {
    pub amount: Amount,
    pub seed: u64,
}

impl Subset {
    /// Indices in the order in which they were drawn: a Fisher-Yates shuffle of `0..len` by ChaCha8 seeded with
    /// `seed` (`SeedableRng::seed_from_u64`), cut to the amount. A smaller amount with the same seed is a prefix.
    ///
    /// Errors: `Error::Invalid` for no samples, a fraction outside (0, 1], or more samples than there are.
    pub fn indices(&self, len: usize) -> Result<Vec<usize>> {
        let count = match self.amount {
            Amount::All => len,
            Amount::Fraction(part) if part > 0.0 && part <= 1.0 => {
                ((len as f64 * part).round() as usize).clamp(1, len.max(1))
            }
            Amount::Fraction(part) => {
                return Err(Error::invalid(
                    "fraction of the data",
                    format!("is {part}, expected more than 0 and at most 1"),
                ));
            }
            Amount::Samples(count) => count,
        };
        if count == 0 || len == 0 {
            return Err(Error::invalid("data", "no samples are chosen").remedy("ask for at least one of at least one"));
        }
        if count > len {
            return Err(Error::invalid("data", format!("{count} samples are asked for, but there are {len}")));
        }
        let mut indices: Vec<usize> = (0..len).collect();
        indices.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed));
        indices.truncate(count);
        Ok(indices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_a_seeded_prefix() {
        let choose = |amount, seed| Subset { amount, seed }.indices(100).unwrap();
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
    fn amounts_that_make_no_sense_are_refused() {
        for amount in [
            Amount::Fraction(0.0),
            Amount::Fraction(1.5),
            Amount::Fraction(f64::NAN),
            Amount::Samples(0),
            Amount::Samples(11),
        ] {
            assert!(Subset { amount, seed: 1 }.indices(10).is_err(), "{amount:?}");
        }
        assert!(Subset { amount: Amount::All, seed: 1 }.indices(0).is_err());
    }
}
