//! Healing: trains the finetune layers of a pruned decoder, through its own graph, with everything else frozen.

mod adamw;
mod adapters;
mod average;
mod batch;
mod cache;
mod checkpoint;
mod events;
mod fit;
mod gradient;
mod layered;
mod loss;
mod metrics;
mod muon;
mod optimizer;
mod part;
mod prefix;
mod product;
mod recipe;
mod run;
mod sampler;
mod schedule;
mod search;
mod settings;
mod source;
mod student;
mod suffix;
mod teacher;
mod trainer;
mod weights;
mod workers;

pub use crate::data::LeftOut;
pub use fit::LayerFit;
pub use loss::{LOSSES, LossKind, LossRow};
pub use metrics::StepMetrics;
pub use optimizer::{OPTIMIZERS, OptimizerKind, OptimizerRow};
pub use recipe::{DEFAULT_RECIPE, RECIPES, RecipeRow, StageRow};
pub use run::{Outcome, Report, Request, clear_work, finetune, finetune_with_teacher};
pub use schedule::{SCHEDULES, Schedule, ScheduleRow};
pub use search::RateTrial;
pub use settings::{Precision, Settings, Stage};
pub use source::{Conversations, Sample, Source};
pub use teacher::Teacher;

use crate::base::Error;

/// Turns LibTorch's error into the library's; only its first line speaks of the problem, the rest is a C++ trace.
fn torch_error(subject: impl Into<String>) -> impl FnOnce(tch::TchError) -> Error {
    let subject = subject.into();
    move |error| {
        let text = error.to_string();
        Error::engine("LibTorch", subject, text.lines().next().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests;
