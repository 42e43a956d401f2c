//! Whole pipelines: recipes and sweeps, cached steps, the result table and the manifest.

mod comparison;
mod export_section;
mod exporting;
mod prune_section;
mod recipe;
mod run;
mod stages;
pub mod steps;
mod store;
mod strategies;
mod sweep;
mod table;
mod tune;

pub use comparison::{DenseSection, Measure, OtherData, OtherScore};
pub use export_section::ExportSection;
pub use recipe::{Calibration, Recipe};
pub use run::{FRONT_FILE, MANIFEST_FILE, Manifest, RunResult, TABLE_FILE, run, stored_answers, stored_bench};
pub use store::{Finished, RunState, RunStore, STATE_FILE, StepState};
pub use sweep::{
    DenseFigures, SWEEP_FILE, SeedSpread, Sweep, SweepDense, SweepOther, SweepResult, SweepRow, SweepTable, sweep,
};
pub use table::{Speed, Table, TableRow};
pub use tune::{
    AXES, Axis, BudgetCosts, Candidate, Choice, Costs, Figures, Healed, Healer, NamedPlan, Quality, TARGETS, TUNE_FILE,
    TargetKind, Tune, TunePlan, TuneReport, TuneTarget, tune, with_torch,
};
