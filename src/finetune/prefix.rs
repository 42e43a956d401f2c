//! The frozen part before the first trained layer: a graph of its own, run once per sample in ONNX Runtime, its output
//! kept on disk.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Result, Sha256Digest, read_json, write_json};
use crate::runtime::{Prompt, Step, StepTokens, VlmSession};

use super::batch::{Example, TrainingSet, total_tokens};
use super::cache::{Rows, RowsWriter};
use super::source::{Sample, Source};

const SCHEMA_VERSION: u32 = 1;
/// Samples and tokens that go through the frozen part in one round.
const SAMPLES_PER_ROUND: usize = 32;
const TOKENS_PER_ROUND: usize = 16_384;

/// Samples that were not trained on, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LeftOut {
    /// Longer than `max_tokens`.
    pub too_long: u64,
    /// Without an answer token.
    pub without_answer: u64,
}

/// What stands beside the rows: whose rows they are.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    schema_version: u32,
    width: usize,
    left_out: LeftOut,
    examples: Vec<Example>,
}

/// Where the rows of one key are kept.
pub struct Store {
    index: PathBuf,
    rows: PathBuf,
}

impl Store {
    /// `key` is the digest of everything that decides the rows.
    pub fn new(folder: &Path, key: &Sha256Digest) -> Self {
        let name = |extension: &str| folder.join(format!("hidden-{}.{extension}", &key[..16.min(key.len())]));
        Store { index: name("json"), rows: name("f32") }
    }

    /// What an earlier run left, if it is complete.
    ///
    /// Errors: `Error::Invalid` when it is damaged.
    pub fn open(&self) -> Result<Option<(TrainingSet, LeftOut)>> {
        if !self.index.exists() {
            return Ok(None);
        }
        let Index { width, left_out, examples, .. } = read_json(&self.index, SCHEMA_VERSION)?;
        let rows = Rows::open(&self.rows, total_tokens(&examples), width)?;
        Ok(Some((TrainingSet::new(examples, rows), left_out)))
    }

    /// Runs the frozen part over all samples and keeps what it gives. `frozen` embeds prompts, and its decoder is the
    /// prefix; `None` takes the embeddings themselves, when the first layer is trained.
    ///
    /// Errors: whatever a sample or a run fails with; `Error::Interrupted`; nothing is kept then.
    pub fn fill(
        &self,
        source: &dyn Source,
        frozen: &mut VlmSession,
        embeds_only: bool,
        max_tokens: usize,
        cancel: &Cancel,
    ) -> Result<(TrainingSet, LeftOut)> {
        let progress = Progress::new("frozen part", "samples", source.count());
        let mut samples = source.samples()?;
        let mut left_out = LeftOut::default();
        let mut examples = Vec::new();
        let mut writer: Option<RowsWriter> = None;
        let mut width = 0;
        let mut round: Vec<(Sample, Example)> = Vec::new();
        let mut tokens = 0;
        loop {
            cancel.check("nothing of the frozen part is kept")?;
            let next = samples.next().transpose()?;
            let ended = next.is_none();
            if let Some(sample) = next {
                progress.advance(1);
                let example = Example::new(sample.id.clone(), &sample.prompt.input_ids, &sample.answer_mask)?;
                if example.length > max_tokens {
                    left_out.too_long += 1;
                } else if example.targets.is_empty() {
                    left_out.without_answer += 1;
                } else {
                    tokens += example.length;
                    round.push((sample, example));
                }
            }
            if round.len() >= SAMPLES_PER_ROUND || tokens >= TOKENS_PER_ROUND || (ended && !round.is_empty()) {
                let hidden = run_round(&mut round, frozen, embeds_only)?;
                for (numbers, (_, example)) in hidden.into_iter().zip(round.drain(..)) {
                    width = numbers.len() / example.length.max(1);
                    if writer.is_none() {
                        writer = Some(RowsWriter::create(&self.rows, width)?);
                    }
                    if let Some(writer) = &mut writer {
                        writer.push(&numbers)?;
                    }
                    examples.push(example);
                }
                tokens = 0;
            }
            if ended {
                break;
            }
        }
        let Some(writer) = writer else {
            return Err(Error::invalid(
                "training data",
                format!(
                    "holds no sample to train on: {} too long, {} without an answer",
                    left_out.too_long, left_out.without_answer
                ),
            )
            .remedy("look at the data, or raise `max_tokens`"));
        };
        let rows = writer.finish()?;
        let rows = Rows::open(&self.rows, rows, width)?;
        write_json(
            &self.index,
            &Index { schema_version: SCHEMA_VERSION, width, left_out, examples: examples.clone() },
        )?;
        Ok((TrainingSet::new(examples, rows), left_out))
    }
}

/// The frozen part's rows for each sample of a round.
fn run_round(round: &mut [(Sample, Example)], frozen: &mut VlmSession, embeds_only: bool) -> Result<Vec<Vec<f32>>> {
    let prompts: Vec<Prompt> = round.iter().map(|(sample, _)| sample.prompt.clone()).collect();
    let embedded = frozen.embed_all(&prompts)?;
    let rows = frozen.decoder().position_rows();
    for ((_, example), embedded) in round.iter_mut().zip(&embedded) {
        if rows > 1 {
            example.rotary = embedded.positions.clone();
        }
    }
    if embeds_only {
        return Ok(embedded.into_iter().map(|embedded| embedded.data).collect());
    }
    let mut order: Vec<usize> = (0..round.len()).collect();
    order.sort_by_key(|&number| round[number].1.length);
    let mut results: Vec<Vec<f32>> = vec![Vec::new(); round.len()];
    // Equal lengths together: no padding, so that no row depends on how samples fell into rounds.
    for group in order.chunk_by(|&a, &b| round[a].1.length == round[b].1.length) {
        let time = round[group[0]].1.length;
        let (mut data, mut ids, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for &number in group {
            data.extend_from_slice(&embedded[number].data);
            ids.extend_from_slice(&prompts[number].input_ids);
        }
        for row in 0..rows {
            for &number in group {
                positions.extend_from_slice(embedded[number].positions.get(row).map_or(&[], Vec::as_slice));
            }
        }
        let mask = vec![1; group.len() * time];
        let hidden_size = embedded[group[0]].hidden_size;
        let tokens = if frozen.decoder().takes_embeds() {
            StepTokens::Embeds { data: &data, hidden_size }
        } else {
            StepTokens::Ids(&ids)
        };
        let step = Step {
            batch: group.len(),
            tokens,
            attention_mask: &mask,
            position_ids: &positions,
            position_rows: rows,
            last_only: false,
        };
        let outputs = frozen.decoder_mut().prefill_outputs(&step)?;
        let (_, hidden) = outputs.iter().next().ok_or_else(|| Error::invalid("the frozen part", "gave nothing"))?;
        let numbers = hidden.to_f32()?;
        let each = numbers.len() / group.len();
        if each * group.len() != numbers.len() || !each.is_multiple_of(time) {
            return Err(Error::invalid(
                "the frozen part",
                format!("gave shape {:?} for {} samples of {time} tokens", hidden.shape(), group.len()),
            ));
        }
        for (&number, numbers) in group.iter().zip(numbers.chunks_exact(each)) {
            results[number] = numbers.to_vec();
        }
    }
    Ok(results)
}
