//! Healing: trains the finetune layers of a pruned decoder through its own graph. Everything else is frozen.
//!
//! Submodules in import order, each importing only later ones: `run`, `train`, `student`, `checkpoint`, `data`, `plan`,
//! `cut`, `settings`, `optim`, `record`, `loss`, `error`.

mod checkpoint;
mod cut;
mod data;
mod error;
mod loss;
mod optim;
mod plan;
mod record;
mod run;
mod settings;
mod student;
mod train;

pub use crate::data::LeftOut;
pub use checkpoint::{clear_work, interrupted_at, remove_cache_only_folder};
pub use data::{Conversations, Source, Teacher, TrainingSample};
pub use loss::{LOSSES, LossKind, LossRow};
pub use optim::{OPTIMIZERS, OptimizerKind, OptimizerRow, SCHEDULES, Schedule, ScheduleRow};
pub use plan::{Limits, MOST_BATCH_TOKENS, PlannedBytes, RunPlan};
pub use record::{LayerFit, RateTrial, StepMetrics};
pub use run::{FinetunedModel, Report, Request, finetune, finetune_with_teacher, plan_run};
pub use settings::{
    Auto, BatchSettings, DEFAULT_RECIPE, DataSettings, FitSettings, KdSettings, LearningRate, LoraLayers, LoraSettings,
    OptimizerSettings, Precision, RECIPES, RecipeRow, ScheduleSettings, Settings, Stage, StageRow, WriteTrained,
    refuse_moved,
};

#[cfg(test)]
mod host_read_tests;
#[cfg(test)]
mod tests;
