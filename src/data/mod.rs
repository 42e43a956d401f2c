//! Conversations about pictures and running text, and what the networks read of them: data sets, benchmarks, image processors, chat
//! templates, tokenizers.

mod conversation;
mod dataset;
mod finevision;
mod guard;
mod idefics3;
mod image_processor;
mod jpeg;
mod llava;
mod picture;
mod processor;
mod qwen2_vl;
mod resample;
mod row;
mod sample;
mod subset;
mod template;
mod text;
mod tokenizer;
mod tsv;

#[cfg(test)]
mod conversation_tests;
#[cfg(test)]
mod tests;

pub use dataset::{Dataset, Samples, Texts};
pub use image_processor::{ImageInputs, ImageLayout};
pub use picture::{Picture, Transparency};
pub use processor::{Encoded, Processor};
pub use resample::{Filter, resize};
pub use sample::{ImageBytes, Part, Sample, Turn};
pub use subset::{Amount, Subset};
pub use text::SEQUENCE_LENGTH;
pub use tsv::{BenchRow, Benchmark};
