//! Matches the weights of ONNX graphs by content to tensors of the checkpoint that they were exported from: to write finetuned
//! values into the graphs, and to take changed values out of them under the checkpoint's names.

mod apply;
mod compose;
mod covered;
mod extract;
mod find;
mod index;
mod load;
mod matching;
mod nearest;
mod part;
mod place;
mod scan;
mod table;
mod values;

pub use apply::apply;
pub use extract::{Extracted, Extraction, extract};
pub use find::find;
pub use load::{Loaded, history_of, load};
pub use part::{Absent, ModelPart};
pub use place::stack_of;
pub use table::{GraftTable, MatchedWeight, Nearest, Unmatched};
