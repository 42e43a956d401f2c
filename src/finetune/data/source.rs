//! Sources of training samples: conversations, tokenised, with their pictures processed, in a fixed order.

use std::cell::Cell;
use std::rc::Rc;

use crate::base::{Result, Sha256Digest, ahead};
use crate::data::{Dataset, Encoded, Encoder, Intake, LeftOut};
use crate::prompt::Prompt;

/// A tokenised training sample with its pictures.
#[derive(Clone, Debug)]
pub struct TrainingSample {
    /// Name in errors.
    pub id: String,
    /// Index of the sample in its source; ascending.
    pub number: u64,
    /// Token ids and the arrays of the pictures.
    pub prompt: Prompt,
    /// True for each token of an answer, its end token included; as long as the prompt's ids.
    pub answer_mask: Vec<bool>,
}

/// Receives samples in order.
pub type TakeSamples<'a> = dyn FnMut(&mut dyn Iterator<Item = Result<TrainingSample>>) -> Result<()> + 'a;

/// A data set to train on. A run reads the first samples to plan its work, and the others only to compute outputs that
/// are not on disk yet.
pub trait Source: Sync {
    /// Digest of everything that affects the samples.
    fn digest(&self) -> Result<Sha256Digest>;
    /// Number of samples.
    fn count(&self) -> u64;
    /// The usable samples, in a fixed order.
    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>>;
    /// Passes the samples to `take` in order. Other threads prepare them, at most `window` ahead.
    fn ahead(&self, window: usize, take: &mut TakeSamples<'_>) -> Result<()> {
        ahead(window, || self.samples(), |mut samples| take(&mut samples))
    }
    /// The samples with these numbers, which are ascending.
    fn some(&self, numbers: &[u64]) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        let wanted = numbers.to_vec();
        let chosen =
            move |sample: &Result<TrainingSample>| sample.as_ref().map_or(true, |own| wanted.contains(&own.number));
        Ok(Box::new(self.samples()?.filter(chosen)))
    }
    /// Samples that the last pass left out, by reason.
    fn left_out(&self) -> LeftOut {
        LeftOut::default()
    }
}

/// Conversations of a data set, in ascending order of `indices`.
pub struct Conversations<'a> {
    /// Encodes the samples.
    pub encoder: &'a Encoder,
    /// The data set.
    pub dataset: &'a Dataset,
    /// Positions of the drawn samples in the data set.
    pub indices: &'a [usize],
    /// Leaves out and counts samples that cannot be used.
    pub intake: Intake,
}

impl Source for Conversations<'_> {
    fn digest(&self) -> Result<Sha256Digest> {
        crate::base::sha256_json(&(self.dataset.digest()?, self.indices))
    }

    fn count(&self) -> u64 {
        self.indices.len() as u64
    }

    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        // Samples are encoded one at a time, on demand, so `number` is the index of the returned sample.
        let number = Rc::new(Cell::new(0));
        let read = number.clone();
        let encode = move |sample: &crate::data::Sample| {
            read.set(sample.index as u64);
            self.encoder.conversation(sample)
        };
        let samples = self.intake.encoded(self.dataset, self.indices, encode)?;
        Ok(Box::new(samples.map(move |encoded| Ok(TrainingSample::new(encoded?, number.get())))))
    }

    fn ahead(&self, window: usize, take: &mut TakeSamples<'_>) -> Result<()> {
        let all = (self.dataset, self.indices, self.indices.len());
        self.intake.ahead(
            all,
            window,
            |sample| self.encoder.conversation(sample),
            |samples| {
                take(
                    &mut samples
                        .map(|sample| sample.map(|(index, encoded)| TrainingSample::new(encoded, index as u64))),
                )
            },
        )
    }

    fn some(&self, numbers: &[u64]) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        let indices: Vec<usize> = numbers.iter().map(|&number| number as usize).collect();
        let samples = self.dataset.read(&indices)?;
        Ok(Box::new(samples.map(|sample| {
            let sample = sample?;
            Ok(TrainingSample::new(self.encoder.conversation(&sample)?, sample.index as u64))
        })))
    }

    fn left_out(&self) -> LeftOut {
        self.intake.left_out()
    }
}

impl TrainingSample {
    /// Splits an encoded conversation into the runtime's prompt and the answer mask.
    pub fn new(encoded: Encoded, number: u64) -> Self {
        let (id, answer_mask) = (encoded.id.clone(), encoded.answer_mask.clone());
        TrainingSample { id, number, prompt: encoded.into_prompt(), answer_mask }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::bundle::Bundle;
    use crate::data::DataOptions;

    #[test]
    fn a_sample_with_a_broken_picture_is_skipped_and_counted_in_every_pass() {
        let bundle = Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("broken.jpg"), b"\xff\xd8\xff\xe0 ends early").unwrap();
        let talk = r#""conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ho"}]}"#;
        let row = |number: usize| match number {
            7 => format!("{{\"image\": \"broken.jpg\", {talk}"),
            _ => format!("{{\"id\": {number}, {talk}"),
        };
        let path = folder.path().join("x.jsonl");
        std::fs::write(&path, (0..20).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let dataset = Dataset::open(&path, &DataOptions::default()).unwrap();
        let encoder = Encoder::open(&bundle, &dataset).unwrap();
        let indices: Vec<usize> = (0..20).collect();
        let intake = Intake::new(&dataset, &bundle, usize::MAX);
        let source = Conversations { encoder: &encoder, dataset: &dataset, indices: &indices, intake };
        for _ in 0..2 {
            let samples: Vec<TrainingSample> = source.samples().unwrap().map(Result::unwrap).collect();
            let numbers: Vec<u64> = samples.iter().map(|sample| sample.number).collect();
            let again = source.some(&numbers[5..9]).unwrap().map(|sample| sample.unwrap().id);
            assert!(again.eq(samples[5..9].iter().map(|sample| sample.id.clone())));
            let mut ahead = Vec::new();
            source
                .ahead(3, &mut |all| {
                    ahead.extend(all.map(|sample| sample.unwrap().number));
                    Ok(())
                })
                .unwrap();
            assert_eq!(ahead, numbers);
            let ids: Vec<String> = samples.into_iter().map(|sample| sample.id).collect();
            assert_eq!((ids.len(), ids[7].as_str()), (19, "row 8 of `x.jsonl` (id `8`)"));
            let left_out = source.left_out();
            assert_eq!(left_out.unreadable, 1);
            assert!(left_out.reasons[0].contains("`broken.jpg` of row 7 of `x.jsonl`"), "{left_out:?}");
        }
    }
}
