//! The pruning method: scores layers by the similarity of the residual stream, and selects
//! layers to drop and to finetune.
//!
//! Source: INTERLACE, arXiv:2511.19676.

mod batch;
mod compensation;
#[cfg(test)]
mod compensation_tests;
mod embedder;
mod heal;
#[cfg(test)]
mod heal_tests;
mod likelihood;
mod loss;
#[cfg(test)]
mod loss_tests;
mod low_rank;
#[cfg(test)]
mod mlp_tests;
mod plan;
mod ridge;
mod score;
mod scores;
pub mod select;
mod switched;

pub use compensation::{BRIDGE_RANK, COMPENSATIONS, CompensationKind, CompensationRow, GapChange};
pub use heal::{Compensation, FIT_TOKENS, HealMeter, layers_before_gaps};
pub use likelihood::{AnswerLikelihood, AnswerMeter, EmbeddedAnswers, LIKELIHOOD_BLOCK, answer_likelihoods};
pub use loss::{LossMeter, MlpMeter};
pub use plan::{LayerPlan, LayerRole, PLAN_SCHEMA_VERSION, Part, Plan, check_layers, named_layers};
pub use score::{ScoreSettings, score, score_with_peers};
pub use scores::{
    MODALITIES, Modality, ModalityScores, ModalityWeights, PackScores, SCORES_SCHEMA_VERSION, SampleModality,
    SampleScores, Scores, Similarities, check_weights,
};
