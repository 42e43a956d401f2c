//! Reads conversations about pictures and running text, and encodes them as network inputs: data sets, benchmarks,
//! image processors, chat templates, tokenizers.

mod columns;
mod conversation;
mod data_files;
mod dataset;
mod encoder;
mod families;
mod guard;
mod images;
mod intake;
mod json;
mod json_row;
mod json_scan;
mod keys;
mod levers;
mod listing;
mod options;
mod parquet;
mod part_key;
mod picture_budget;
mod placeholders;
mod processor;
mod row;
mod sample;
mod string_list;
mod subset;
mod template;
mod tensors;
mod text;
mod token_budget;
mod tokenizer;
mod tsv;

#[cfg(test)]
mod conversation_tests;
#[cfg(test)]
mod family_tests;
#[cfg(test)]
mod layout_tests;
#[cfg(test)]
mod tests;

pub use dataset::{Dataset, Samples};
pub use encoder::Encoder;
pub use families::{FAMILIES, Family, Proof, Reach, VERBS, family_table};
pub use images::{
    BackEnd, Filter, ImageInputs, ImageLayout, ImageSettings, Picture, Scaler, Shown, Transparency, VideoLayout,
};
pub use intake::{Intake, LeftOut};
pub use levers::{LEVERS, Lever};
pub use options::{DataOptions, DataPart, SEQUENCE_LENGTH, Turns};
pub use picture_budget::{PictureBudget, picture_budgets};
pub use processor::{Encoded, Processor};
pub use sample::{ImageBytes, MessagePart, Sample, Turn};
pub use string_list::string_list;
pub use subset::{Amount, Subset};
pub use tensors::TensorRow;
pub use token_budget::within_tokens;
pub use tsv::{BenchRow, Benchmark};
