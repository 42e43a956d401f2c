//! The pruning method: scores layers by the similarity of the residual stream, and selects
//! layers to drop and to finetune.
//!
//! Source: INTERLACE, arXiv:2511.19676.

mod batch;
mod embedder;
mod heal;
#[cfg(test)]
mod heal_tests;
mod likelihood;
mod loss;
#[cfg(test)]
mod loss_tests;
mod plan;
mod ridge;
mod score;
mod scores;
pub mod select;
mod switched;

pub use heal::{Compensation, FIT_TOKENS, HealMeter, layers_before_gaps};
pub use likelihood::{AnswerLikelihood, AnswerMeter, Answers, LIKELIHOOD_BLOCK, answer_likelihoods};
pub use loss::LossMeter;
pub use plan::{LayerPlan, LayerRole, PLAN_SCHEMA_VERSION, Plan, check_layers, named_layers};
pub use score::{ScoreSettings, score, score_with_peers};
pub use scores::{
    MODALITIES, Modality, ModalityScores, ModalityWeights, PackScores, SCORES_SCHEMA_VERSION, SampleModality,
    SampleScores, Scores, Similarities, check_weights,
};
