//! Writes finetuned weights into an ONNX graph that exists: each weight of the graph is matched by content to tensors of the
//! checkpoint that it was exported from, and gets their finetuned values.

mod apply;
mod compose;
mod covered;
mod find;
mod index;
mod matching;
mod nearest;
mod part;
mod place;
mod table;
mod values;

pub use apply::apply;
pub use find::find;
pub use part::{Absent, Part};
pub use table::{GraftTable, MatchedWeight, Nearest, Unmatched};
