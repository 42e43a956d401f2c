//! Settings of a run and named recipes of them.

mod recipe;
mod values;

pub use recipe::{DEFAULT_RECIPE, RECIPES, RecipeRow, StageRow};
pub use values::{Lora, LoraLayers, Precision, Settings, Stage};
