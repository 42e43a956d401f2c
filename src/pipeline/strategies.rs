//! The strategies that runs and sweeps name, and a run's choice among them by the loss that is left on held-back data after a
//! short healing.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::method::select::Strategy;

use super::comparison::parts;

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
        let candidates = ["sleb", "shortgpt", "angular"].map(String::from).to_vec();
        AutoSection { candidates, step_tokens: 16 << 10 }
    }
}

impl AutoSection {
    pub(super) fn is_default(&self) -> bool {
        *self == AutoSection::default()
    }

    /// The rows of the table of strategies that plans are made with, those that `auto` chooses among included.
    pub(super) fn planned(&self, strategies: &[String]) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for name in strategies {
            let own = if name == AUTO { self.candidates.as_slice() } else { std::slice::from_ref(name) };
            names.extend(own.iter().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
        }
        names
    }

    /// Checks the strategies of a run.
    ///
    /// Errors: as `check_strategies`; `Error::Invalid` for `auto` without held-back data, or a choice that nothing asks for.
    pub(super) fn check(&self, strategies: &[String], held_back: f64) -> Result<()> {
        let named: Vec<String> = strategies.iter().filter(|name| *name != AUTO).cloned().collect();
        if !named.is_empty() || strategies.is_empty() {
            check_strategies("plan", &named)?;
        }
        match strategies.len() - named.len() {
            0 if self.is_default() => return Ok(()),
            0 => {
                return Err(Error::invalid("plan.auto", "sets a choice, and `strategies` has no `auto`")
                    .remedy("write `strategies = [\"auto\"]`, or take the section out"));
            }
            1 => {}
            _ => return Err(Error::invalid("plan", "strategy `auto` occurs twice").remedy("name it once")),
        }
        check_strategies("plan.auto.candidates", &self.candidates)?;
        if self.step_tokens == 0 {
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

/// Errors: `Error::Invalid` when the list is empty, or a strategy is unknown, repeated, or needs layers from the user.
pub(super) fn check_strategies(section: &str, names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Err(Error::invalid(section, "`strategies` is empty").remedy("name at least one"));
    }
    for (place, name) in names.iter().enumerate() {
        Strategy::named(name)?;
        if names[..place].contains(name) {
            return Err(Error::invalid(section, format!("strategy `{name}` occurs twice")).remedy("name it once"));
        }
        if name == "explicit" {
            return Err(Error::invalid(
                section,
                "strategy `explicit` names its layers on the command line, not in a recipe",
            )
            .remedy("use `interlace plan --drop`"));
        }
    }
    Ok(())
}
