//! Optimisers, their state, and the schedule of the learning rate.

mod adamw;
mod average;
mod eight_bit;
mod muon;
mod optimizer;
mod schedule;

pub use average::Average;
pub use optimizer::{
    Constants, OPTIMIZERS, OptimizedParameter, Optimizer, OptimizerKind, OptimizerRow, clip_gradients, state_bytes,
};
pub use schedule::{SCHEDULES, Schedule, ScheduleRow, warmup_steps};
