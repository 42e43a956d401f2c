//! What each verb does, as functions that the command line and a run share.

mod inspect;
mod plan;

pub use inspect::{Inspection, LayerInfo, VisionInfo, decoder, decoder_layers, inspect};
pub use plan::{HowMany, PlanSettings, PlannedModel, plan};
