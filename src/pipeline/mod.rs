//! Whole pipelines: recipes and sweeps, cached steps, the result table and the manifest.

mod recipe;
mod run;
mod stages;
pub mod steps;
mod store;
mod sweep;
mod table;

pub use recipe::Recipe;
pub use run::{MANIFEST_FILE, Manifest, RunResult, TABLE_FILE, run};
pub use store::{Finished, STATE_FILE, State, StepState, Store};
pub use sweep::{SWEEP_FILE, Spread, Sweep, SweepResult, SweepRow, SweepTable, sweep};
pub use table::{Row, Speed, Table};
