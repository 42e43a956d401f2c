//! The training data: samples, the frozen part's output for them, and the dense model's targets.

mod batch;
mod frozen_part;
mod rows;
mod same;
mod source;
mod streamed;
mod teacher;

pub use batch::{Batch, Stream, TrainingSet, bf16_matrix};
pub use frozen_part::{Slot, Store, scan};
pub use rows::{Element, RowsWriter};
pub use source::{Conversations, Sample, Source};
pub use streamed::{Loads, Streamed, StreamedParts, WINDOW_FOLDER};
pub use teacher::{Course, Dense, Frozen, Lesson, Teacher};
