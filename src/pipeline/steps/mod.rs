//! What each verb does, as functions that the command line and a run share.

mod eval;
mod finetune;
mod inspect;
mod plan;
mod prune;

pub use eval::{Engine, EvalSettings, TextSettings, eval, eval_text, retention};
pub use finetune::{FINETUNE_REPORT, Finetune, default_work_folder, finetune};
pub use inspect::{Inspection, LayerInfo, VisionInfo, decoder, decoder_layers, inspect};
pub use plan::{HowMany, Losses, PlanSettings, PlannedModel, plan};
pub use prune::{Drop, Pruned, PrunedComponent, prune};
