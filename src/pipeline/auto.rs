//! The choice among strategies by the loss that is left on held-back data after a short healing: its section of a recipe.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

use super::comparison::parts;
use super::recipe::{PlanSection, check_strategies};

/// Name with which a run chooses among strategies by the loss that is left on held-back data after a short healing.
pub(super) const AUTO: &str = "auto";

/// The choice among strategies of the strategy `auto`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AutoSection {
    /// Strategies whose plans are healed for a short time and compared.
    pub candidates: Vec<String>,
    /// Tokens that each is healed on, with the recipe of `[finetune]`: its first samples with at most this many.
    pub step_tokens: u64,
}

impl Default for AutoSection {
    fn default() -> Self {
        let candidates = ["sleb", "shortgpt"].map(String::from).to_vec();
        AutoSection { candidates, step_tokens: 16 << 10 }
    }
}

impl AutoSection {
    pub(super) fn is_default(&self) -> bool {
        *self == AutoSection::default()
    }
}

impl PlanSection {
    /// The rows of the table of strategies that plans are made with, those that `auto` chooses among included.
    pub(super) fn planned(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for name in &self.strategies {
            let own = if name == AUTO { self.auto.candidates.as_slice() } else { std::slice::from_ref(name) };
            names.extend(own.iter().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
        }
        names
    }

    /// Errors: as `check_strategies`; `Error::Invalid` for `auto` without held-back data, or a choice that nothing asks for.
    pub(super) fn check_auto(&self, held_back: f64) -> Result<()> {
        if !self.strategies.iter().any(|name| name == AUTO) {
            return match self.auto.is_default() {
                true => Ok(()),
                false => Err(Error::invalid("plan.auto", "sets a choice, and `strategies` has no `auto`")
                    .remedy("write `strategies = [\"auto\"]`, or take the section out")),
            };
        }
        check_strategies("plan.auto.candidates", &self.auto.candidates)?;
        if self.auto.step_tokens == 0 {
            return Err(Error::invalid("plan.auto", "`step_tokens` is 0").remedy("give 4096 or more"));
        }
        match parts(held_back)? {
            (_, Some(_)) => Ok(()),
            (_, None) => {
                Err(Error::invalid("plan", "strategy `auto` chooses on held-back data, and none is held back")
                    .remedy("write `held_back = 0.1` into `[finetune]`"))
            }
        }
    }
}
