//! Predicted figures and loss of every combination of choices.

use crate::base::{Error, Result};

use super::costs::{BudgetCosts, Costs};
use super::quality::{Choice, Quality};
use super::solve::TunePoint;
use super::target::Figures;

/// The choices with their costs.
pub struct Predictor<'a> {
    quality: &'a Quality,
    costs: &'a Costs,
}

impl<'a> Predictor<'a> {
    /// Errors: `Error::Invalid` when the two are not of one search.
    pub fn new(quality: &'a Quality, costs: &'a Costs) -> Result<Self> {
        let complete = quality.axes.len() == 3
            && quality.axes.iter().all(|axis| !axis.is_empty())
            && quality.axes.get(2).is_some_and(|axis| axis.len() == costs.budgets.len());
        match complete {
            true => Ok(Predictor { quality, costs }),
            false => Err(Error::invalid("the work folder", "has costs and losses of different searches")
                .remedy("name a new folder with `--work`")),
        }
    }

    /// Number of choices on each axis.
    pub fn sizes(&self) -> TunePoint {
        [0, 1, 2].map(|axis| self.quality.axes[axis].len())
    }

    /// The choice on an axis.
    pub fn choice(&self, axis: usize, point: TunePoint) -> &'a Choice {
        &self.quality.axes[axis][point[axis]]
    }

    fn budget(&self, point: TunePoint) -> &'a BudgetCosts {
        &self.costs.budgets[point[2]]
    }

    /// Image tokens of the measured question.
    pub fn image_tokens(&self, point: TunePoint) -> usize {
        self.budget(point).image_tokens
    }

    /// The loss in nats, if the choices do not help or hurt each other: that of the unchanged model and what each choice
    /// adds.
    pub fn loss(&self, point: TunePoint) -> f64 {
        let added = (0..3).map(|axis| self.choice(axis, point).loss - self.quality.loss);
        self.quality.loss + added.sum::<f64>()
    }

    /// Likelihood of an answer token over that of the unchanged model, predicted.
    pub fn kept(&self, point: TunePoint) -> f64 {
        (self.quality.loss - self.loss(point)).exp()
    }

    /// Times and size: those of the whole model with this budget, less those of the dropped layers.
    pub fn figures(&self, point: TunePoint) -> Figures {
        let (decoder, tower) = (&self.choice(0, point).dropped, &self.choice(1, point).dropped);
        let budget = self.budget(point);
        let (layers, tower_layers) = (decoder.len() as f64, tower.len() as f64);
        let bytes = |dropped: &[usize], of: &[u64]| -> u64 { dropped.iter().filter_map(|&layer| of.get(layer)).sum() };
        let gone = bytes(decoder, &self.costs.decoder_layer_bytes) + bytes(tower, &self.costs.tower_layer_bytes);
        let first_gone = layers * budget.decoder_layer_ms + tower_layers * budget.tower_layer_ms;
        Figures {
            ttft_ms: time_left(budget.ttft_ms.median, first_gone),
            tokens_per_s: 1000.0 / time_left(budget.step_ms.median, layers * budget.step_layer_ms),
            size_bytes: self.costs.size_bytes.saturating_sub(gone),
        }
    }
}

/// A time without the parts that are gone. Where noise makes the parts cost as much as the whole, nothing can be said of what is
/// left, and the whole time stands: a plan must not meet a target by noise.
fn time_left(whole: f64, gone: f64) -> f64 {
    if gone < whole { whole - gone } else { whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_in_costs_predicts_no_infinite_speed() {
        assert_eq!(time_left(8.0, 3.0), 5.0);
        for gone in [8.0, 9.0, f64::NAN] {
            assert_eq!(time_left(8.0, gone), 8.0);
        }
    }
}
