//! One function per verb, used by the command line and by runs.

mod budget;
mod compensate;
mod engine;
mod eval;
mod finetune;
mod generate;
mod graft;
mod image_tokens;
mod inspect;
mod likelihood;
mod meter;
mod needs;
mod plan;
mod prune;
mod refusal;

pub use budget::{Budget, LayerCost, ModelCosts, Remaining};
pub use compensate::{Compensated, CompensationReport, CompensationSettings, compensate};
pub use engine::{Engine, EvalSettings};
pub use eval::{TextSettings, compared, eval, eval_text, retention, write_predictions};
pub use finetune::{FINETUNE_REPORT, Finetune, Trained, default_work_folder, finetune, plan_finetune};
pub use generate::{Decoding, Generation, Generations, Question, check_answers, generate, generate_all, print_text};
pub use graft::{Graft, graft, plan_graft};
pub use image_tokens::{ImageTokens, keep_image_tokens, token_pruner_of};
pub use inspect::{Inspection, LayerInfo, TapInfo, VisionInfo, decoder, decoder_analysis, inspect};
pub use likelihood::{LikelihoodReport, compare_likelihoods, eval_likelihood};
pub use meter::{CALIBRATION_SAMPLES, Meter};
pub use needs::{NEEDS, Need, Verdict, Work, check as check_needs, variants_warning, warnings};
pub use plan::{HowMany, PlanSettings, PlannedModel, plan};
pub use prune::{Drop, Pruned, PrunedComponent, prune};
pub use refusal::drop_refusal;
