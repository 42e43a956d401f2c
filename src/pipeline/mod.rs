//! The verbs in one go: a recipe, steps that are done once, the table and the manifest.

mod recipe;
mod run;
pub mod steps;
mod store;
mod table;

pub use recipe::Recipe;
pub use run::{MANIFEST_FILE, Manifest, RunResult, TABLE_FILE, run};
pub use store::{Finished, STATE_FILE, State, StepState, Store};
pub use table::{Row, Speed, Table};
