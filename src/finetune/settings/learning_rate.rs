//! The learning rate setting: a number, a list of candidates, or a search.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::finetune::optim::OptimizerKind;

/// The peak learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number, a list of numbers, or \"auto\"")]
pub enum LearningRate {
    /// A fixed rate.
    One(f64),
    /// Candidates, each tried for a full pass; the run uses the one with the lowest loss.
    Several(Vec<f64>),
    /// Search over the optimiser's own rates by short trials, judged on held-out training samples: see
    /// `docs/healing.md`.
    Auto(Auto),
}

/// The keyword for a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// `auto`
    Auto,
}

impl LearningRate {
    /// The search with short trials.
    pub const AUTO: LearningRate = LearningRate::Auto(Auto::Auto);

    /// Candidate rates in the order of the settings; the optimiser's own rates are ascending.
    pub fn candidates(&self, optimizer: OptimizerKind) -> Vec<f64> {
        match self {
            LearningRate::One(rate) => vec![*rate],
            LearningRate::Several(rates) => rates.clone(),
            LearningRate::Auto(_) => optimizer.rates().to_vec(),
        }
    }

    /// True when the rate is chosen by trials before the run.
    pub fn is_searched(&self) -> bool {
        !matches!(self, LearningRate::One(_))
    }

    /// Checks that every rate is finite and above 0.
    ///
    /// Errors: `Error::Invalid` for another rate or an empty list.
    pub fn check(&self) -> Result<()> {
        let wrong = |problem: String| Err(Error::invalid("finetune setting `optimizer.learning_rate`", problem));
        match self {
            LearningRate::Several(rates) if rates.is_empty() => wrong("is an empty list".to_string()),
            LearningRate::One(_) | LearningRate::Several(_) => {
                let rates = self.candidates(OptimizerKind::AdamW);
                // Steps compute in f32.
                let fits = |rate: f64| rate as f32 > 0.0 && (rate as f32).is_finite();
                match rates.iter().find(|rate| !fits(**rate)) {
                    Some(rate) if *rate > 0.0 && rate.is_finite() => {
                        wrong(format!("is {rate:?}, must be in the range of f32"))
                    }
                    Some(rate) => wrong(format!("is {rate}, must be above 0")),
                    None => Ok(()),
                }
            }
            LearningRate::Auto(_) => Ok(()),
        }
    }
}

impl std::str::FromStr for LearningRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(LearningRate::AUTO);
        }
        let number = |part: &str| part.trim().parse::<f64>().map_err(|_| format!("`{part}` is no number"));
        let rates = text.split(',').map(number).collect::<Result<Vec<f64>, String>>()?;
        Ok(match rates.as_slice() {
            &[rate] => LearningRate::One(rate),
            _ => LearningRate::Several(rates),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_learning_rate_is_a_number_a_list_or_auto() {
        let read = |text: &str| serde_json::from_str::<LearningRate>(text);
        assert_eq!(read("1e-3").unwrap(), LearningRate::One(1e-3));
        assert_eq!(read("[1, 2e-3]").unwrap(), LearningRate::Several(vec![1.0, 2e-3]));
        assert_eq!(read("\"auto\"").unwrap(), LearningRate::AUTO);
        let error = read("\"best\"").unwrap_err().to_string();
        assert!(error.contains("or \"auto\""), "{error}");
        assert_eq!("auto".parse(), Ok(LearningRate::AUTO));
        assert_eq!("1e-3,2e-3".parse(), Ok(LearningRate::Several(vec![1e-3, 2e-3])));
        assert_eq!("fast".parse::<LearningRate>(), Err("`fast` is no number".to_string()));
        assert_eq!(serde_json::to_string(&LearningRate::AUTO).unwrap(), "\"auto\"");
    }
}
