//! The training data: samples, the frozen part's output for them, and the dense model's targets.

mod batch;
mod connector_rows;
mod example;
mod feeds;
mod frozen_part;
mod rows;
mod same;
mod source;
mod streamed;
mod teacher;

pub use batch::{Stream, TrainingBatch, TrainingSet, bf16_matrix};
pub use example::Example;
pub use feeds::{FeedPlace, Feeds};
pub use frozen_part::{LazySession, RowStore, scan};
pub use rows::{RowDtype, RowsWriter};
pub use source::{Conversations, Source, TrainingSample};
pub use streamed::{Loads, Streamed, StreamedParts, WINDOW_FOLDER};
pub use teacher::{Dense, Frozen, Teacher, TeacherRequest, TeacherTargets};
