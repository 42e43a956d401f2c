//! Encodes the samples of a data set for a model. The model's processor encodes conversations and running text; ready
//! tensors are used unchanged.

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::dataset::Dataset;
use super::processor::{Encoded, Processor};
use super::sample::Sample;
use super::tensors::TensorRow;

/// Encoder of one data set's samples for one model.
#[derive(Debug)]
pub struct Encoder {
    /// `None` for ready tensors.
    processor: Option<Processor>,
}

impl Encoder {
    /// Opens the model's processor, unless the data set holds ready tensors.
    ///
    /// Errors: as `Processor::open_with`; `Error::Invalid` for conversations and a model without a chat template.
    pub fn open(bundle: &Bundle, dataset: &Dataset) -> Result<Self> {
        let open = || Processor::open_with(bundle, &dataset.options().images);
        let processor = (!dataset.holds_tensors()).then(open).transpose()?;
        if let Some(processor) = processor.as_ref().filter(|_| !dataset.holds_text()) {
            processor.template()?;
        }
        Ok(Encoder { processor })
    }

    /// Encodes a sample up to the start of its last answer.
    ///
    /// Errors: as `Processor::encode_prompt`.
    pub fn prompt(&self, sample: &Sample) -> Result<Encoded> {
        match &sample.tensors {
            Some(row) => Ok(encoded(&sample.id, row.prompt())),
            None => self.processor(sample)?.encode_prompt(sample),
        }
    }

    /// Encodes a whole sample and marks the tokens of its answers.
    ///
    /// Errors: as `Processor::encode_conversation`.
    pub fn conversation(&self, sample: &Sample) -> Result<Encoded> {
        match &sample.tensors {
            Some(row) => Ok(encoded(&sample.id, TensorRow::clone(row))),
            None => self.processor(sample)?.encode_conversation(sample),
        }
    }

    /// Warning when the model's image processor is not supported; see [`Processor::warning`].
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
