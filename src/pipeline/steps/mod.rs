//! What each verb does, as functions that the command line and a run share.

mod plan;

pub use plan::{HowMany, PlanSettings, PlannedModel, plan};

use crate::base::Result;
use crate::bundle::Bundle;

/// Decoder layers of a model.
///
/// Errors: `Error::Invalid` when its config does not say.
pub fn decoder_layers(bundle: &Bundle) -> Result<usize> {
    let config = bundle.require_config()?;
    config.require("num_hidden_layers", config.num_hidden_layers)
}
