//! Samples of any data set as what sessions read: conversations and running text by the model's own processor, ready
//! tensors as they are.

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::dataset::Dataset;
use super::processor::{Encoded, Processor};
use super::sample::Sample;
use super::tensors::TensorRow;

/// What encodes the samples of one data set for one model.
#[derive(Debug)]
pub struct Encoder {
    /// `None` for ready tensors, which need none.
    processor: Option<Processor>,
}

impl Encoder {
    /// Opens the model's processor, unless the data set holds ready tensors.
    ///
    /// Errors: as `Processor::open_with`.
    pub fn open(bundle: &Bundle, dataset: &Dataset) -> Result<Self> {
        let open = || Processor::open_with(bundle, &dataset.options().images);
        let processor = (!dataset.holds_tensors()).then(open).transpose()?;
        Ok(Encoder { processor })
    }

    /// A sample up to where the model begins its last answer.
    ///
    /// Errors: as `Processor::encode_prompt`.
    pub fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        match &sample.tensors {
            Some(row) => Ok(encoded(&sample.id, row.prompt())),
            None => self.processor(sample)?.encode_prompt(sample),
        }
    }

    /// A whole sample with its answers marked.
    ///
    /// Errors: as `Processor::encode_conversation`.
    pub fn conversation(&self, sample: &Sample) -> Result<Encoded> {
        match &sample.tensors {
            Some(row) => Ok(encoded(&sample.id, TensorRow::clone(row))),
            None => self.processor(sample)?.encode_conversation(sample),
        }
    }

    /// What a user should know of a model whose image processor is not known.
    pub fn warning(&self) -> Option<String> {
        self.processor.as_ref().and_then(Processor::warning)
    }

    fn processor(&self, sample: &Sample) -> Result<&Processor> {
        self.processor.as_ref().ok_or_else(|| Error::invalid(&sample.id, "is no row of ready tensors"))
    }
}

fn encoded(id: &str, row: TensorRow) -> Encoded {
    let TensorRow { given, input_ids, answer_mask, image_positions } = row;
    Encoded { id: id.to_string(), input_ids, answer_mask, image_positions, images: None, given: Some(given) }
}
