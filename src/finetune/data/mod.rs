//! The training data: samples, the frozen part's output for them, and the dense model's targets.

mod batch;
mod frozen_part;
mod rows;
mod source;
mod teacher;

pub use batch::{Batch, Stream, TrainingSet, bf16_matrix};
pub use frozen_part::Store;
pub use rows::{Element, RowsWriter};
pub use source::{Conversations, Sample, Source};
pub use teacher::{Course, Dense, Lesson, Teacher};
