//! Tuning: the plan with the least loss that is small or fast enough, over decoder depth, depth of the vision tower and
//! picture budget. Losses and costs are measured once and kept, so that another target needs no model.

mod candidates;
mod costs;
mod predict;
mod quality;
mod report;
mod search;
mod solve;
mod target;

pub use candidates::{Healed, Healer, with_torch};
pub use costs::{BudgetCosts, Costs};
pub use quality::{AXES, Axis, Choice, Quality};
pub use report::{Candidate, NamedPlan, TunePlan, TuneReport};
pub use search::{TUNE_FILE, Tune, tune};
pub use target::{Figures, TARGETS, TargetKind, TuneTarget};
