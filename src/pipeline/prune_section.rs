//! The section `[prune]` of recipes and sweeps.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::bundle::Deepstack;
use crate::data::{Amount, Subset};
use crate::method::CompensationKind;
use crate::method::select::Strategy;

use super::steps::CompensationSettings;

/// Settings of the graph rewrite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PruneSection {
    /// Treatment of features that are added after the first layers (DeepStack): `keep` or `shift`.
    pub deepstack: Deepstack,
    /// Closed form that makes up for dropped layers before each gap, fitted on the calibration data; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compensate: Option<CompensationKind>,
    /// Rank of the maps of `bridge`; 16 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Tokens that the fit reads at most; 4,096 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fit_tokens: Option<usize>,
}

impl PruneSection {
    /// What is fitted, with the loss on this part of the calibration data; `None` without a compensation.
    ///
    /// Errors: as `CompensationSettings::new`; `Error::Invalid` for settings of a compensation without one.
    pub(super) fn compensation(&self, subset: Subset) -> Result<Option<CompensationSettings>> {
        let Some(kind) = self.compensate else {
            let alone = [("rank", self.rank.is_some()), ("fit_tokens", self.fit_tokens.is_some())];
            return match alone.iter().find(|(_, is_there)| *is_there) {
                Some((key, _)) => Err(Error::invalid("prune", format!("has `{key}` and no `compensate`"))
                    .remedy("write `compensate = \"linear\"`, for instance, or leave the key out")),
                None => Ok(None),
            };
        };
        if self.fit_tokens == Some(0) {
            return Err(Error::invalid("prune", "`fit_tokens` is 0").remedy("leave it out, or give 1024 or more"));
        }
        CompensationSettings::new(kind, self.rank, subset, self.fit_tokens).map(Some)
    }

    /// Errors: as [`PruneSection::compensation`]; `Error::Invalid` for a compensation beside a strategy that drops MLPs alone.
    pub(super) fn check(&self, strategies: &[String]) -> Result<()> {
        let Some(_) = self.compensation(Subset { amount: Amount::All, seed: 0 })? else { return Ok(()) };
        for name in strategies {
            if !Strategy::named(name)?.drops.is_layer() {
                return Err(Error::invalid(
                    "prune",
                    format!("has `compensate`, and strategy `{name}` drops MLPs alone, which leaves no gap to close"),
                )
                .remedy("leave one of the two out"));
            }
        }
        Ok(())
    }
}
