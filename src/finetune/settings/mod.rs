//! Settings of a run and named recipes of them.

mod recipe;
mod values;

pub use recipe::{DEFAULT_RECIPE, RECIPES, RecipeRow, StageRow};
pub use values::{Precision, Settings, Stage};
