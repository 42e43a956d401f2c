//! Scores to a plan.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, Sha256Digest};
use crate::method::select::{MeasureLosses, Request, Strategy, drop_count};
use crate::method::{PLAN_SCHEMA_VERSION, Plan, Scores};

/// How many layers go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HowMany {
    /// Part of the decoder's layers, rounded down.
    DropRatio(f64),
    DropCount(usize),
    /// These layers, named by the user.
    Drop(Vec<usize>),
}

/// What decides a plan besides model and scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanSettings {
    pub strategy: String,
    pub how_many: HowMany,
    /// Seed of the `random` strategy and of the draw of samples.
    pub seed: u64,
    /// Calibration samples that losses are measured on, where the strategy measures them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
}

/// Losses for a strategy that measures them, with the digest of the data that they are measured on.
pub struct Losses<'m> {
    pub data: Sha256Digest,
    pub measure: &'m mut dyn MeasureLosses,
}

/// The model that a plan is for.
pub struct PlannedModel {
    pub digest: Sha256Digest,
    pub num_layers: usize,
}

impl HowMany {
    /// The number of layers to drop.
    ///
    /// Errors: as `select::drop_count`.
    pub fn count(&self, num_layers: usize) -> Result<usize> {
        match self {
            HowMany::DropRatio(ratio) => drop_count(*ratio, num_layers),
            HowMany::DropCount(count) => Ok(*count),
            HowMany::Drop(layers) => Ok(layers.len()),
        }
    }
}

/// Chooses layers by a strategy. `scores` come with the digest of their file.
///
/// Errors: `Error::Invalid` when the scores are of another model, the strategy needs scores or losses that are not
/// there, or it cannot drop that many layers.
pub fn plan<'m>(
    model: &PlannedModel,
    scores: Option<(&Scores, Sha256Digest)>,
    settings: &PlanSettings,
    losses: Option<Losses<'m>>,
) -> Result<Plan> {
    let strategy = Strategy::named(&settings.strategy)?;
    let num_layers = model.num_layers;
    let count = settings.how_many.count(num_layers)?;
    let mut inputs = BTreeMap::from([("model".to_string(), model.digest.clone())]);
    if let Some((scores, digest)) = &scores {
        if scores.provenance.inputs.get("model") != Some(&model.digest) {
            return Err(Error::invalid("scores", "were made for another model").remedy("score this model first"));
        }
        inputs.insert("scores".to_string(), digest.clone());
    } else if !(strategy.packs)(count).is_empty() {
        return Err(Error::invalid(format!("strategy `{}`", strategy.name), "needs scores")
            .remedy("make them with `interlace score` and name them with `--scores`"));
    }
    let measure = losses.map(|losses| {
        inputs.insert("data".to_string(), losses.data);
        losses.measure
    });
    let layers: &[usize] = match &settings.how_many {
        HowMany::Drop(layers) => layers,
        _ => &[],
    };
    let scores = scores.map(|(scores, _)| scores);
    let similarities = scores.map(Scores::similarities).unwrap_or_default();
    let include_last = scores.is_some_and(|scores| scores.last_layer_included);
    let mut request =
        Request { num_layers, count, include_last, similarities: &similarities, seed: settings.seed, layers, measure };
    let groups = strategy.select(&mut request)?;
    Plan::new(Provenance::new(PLAN_SCHEMA_VERSION, inputs, settings)?, strategy.name, num_layers, groups)
}
