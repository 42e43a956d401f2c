//! The verbs in one go: a recipe, steps that are done once, the table and the manifest.

pub mod steps;
mod store;

pub use store::{Finished, STATE_FILE, State, StepState, Store};
