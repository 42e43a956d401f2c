//! Whole pipelines: recipes and sweeps, cached steps, the result table and the manifest.

mod comparison;
mod recipe;
mod run;
mod stages;
pub mod steps;
mod store;
mod sweep;
mod table;

pub use comparison::{DenseSection, Measure, OtherData, OtherScore};
pub use recipe::Recipe;
pub use run::{MANIFEST_FILE, Manifest, RunResult, TABLE_FILE, run, stored_answers, stored_bench};
pub use store::{Finished, RunState, STATE_FILE, StepState, Store};
pub use sweep::{
    DenseFigures, SWEEP_FILE, SeedSpread, Sweep, SweepDense, SweepOther, SweepResult, SweepRow, SweepTable, sweep,
};
pub use table::{Speed, Table, TableRow};
