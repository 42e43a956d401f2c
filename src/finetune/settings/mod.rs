//! Settings of a finetuning run, and named recipes.

mod check;
mod learning_rate;
mod moved;
mod recipe;
mod values;

pub use learning_rate::{Auto, LearningRate};
pub use moved::refuse_moved;
pub use recipe::{DEFAULT_RECIPE, RECIPES, RecipeRow, StageRow};
pub use values::{
    BatchSettings, DataSettings, FitSettings, KdSettings, Lora, LoraLayers, LoraSettings, OptimizerSettings, Precision,
    ScheduleSettings, Settings, Stage, WriteTrained,
};
