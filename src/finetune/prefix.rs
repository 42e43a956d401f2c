//! The frozen part before the first trained layer: a graph of its own, run once per sample in ONNX Runtime, its output
//! kept on disk.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Result, Sha256Digest, ahead, read_json, write_json};
use crate::runtime::{Embedded, Prompt, Step, StepTokens, VlmSession};

use super::batch::{Example, TrainingSet, total_tokens};
use super::cache::{Element, Rows, RowsWriter};
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
        let rows = Rows::open(&self.rows, total_tokens(&examples), width, Element::F32)?;
        Ok(Some((TrainingSet::new(examples, rows), left_out)))
    }

    /// Runs the frozen part over all samples and keeps what it gives. `frozen` embeds prompts, and its decoder is the
    /// prefix; `embeds_only` takes the embeddings themselves, when the first layer is trained.
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
        let mut filling = self.begin()?;
        let left_out = each_round(source, "frozen part", max_tokens, cancel, &mut |mut round| {
            let embedded = embed(&mut round, frozen)?;
            let hidden: Vec<Vec<f32>> = if embeds_only {
                embedded.into_iter().map(|embedded| embedded.data).collect()
            } else {
                let outputs = outputs(&round, &embedded, frozen, usize::MAX)?;
                outputs.into_iter().map(|mut outputs| outputs.swap_remove(0)).collect()
            };
            hidden.iter().zip(round).try_for_each(|(numbers, (_, example))| filling.push(numbers, example))
        })?;
        filling.finish(left_out)
    }

    /// Begins to keep rows, sample after sample.
    ///
    /// Errors: `Error::Io`.
    pub fn begin(&self) -> Result<Filling<'_>> {
        let writer = RowsWriter::create(&self.rows, Element::F32)?;
        Ok(Filling { store: self, writer, examples: Vec::new() })
    }
}

/// Rows of a store that are being written.
pub struct Filling<'a> {
    store: &'a Store,
    writer: RowsWriter,
    examples: Vec<Example>,
}

impl Filling<'_> {
    /// Takes a sample and the stream before the first trained layer, a row per token.
    ///
    /// Errors: as `RowsWriter::push`.
    pub fn push(&mut self, hidden: &[f32], example: Example) -> Result<()> {
        self.writer.push(hidden, example.length)?;
        self.examples.push(example);
        Ok(())
    }

    /// Completes the store.
    ///
    /// Errors: `Error::Invalid` when there is no sample; `Error::Io`.
    pub fn finish(self, left_out: LeftOut) -> Result<(TrainingSet, LeftOut)> {
        let Filling { store, writer, examples } = self;
        if examples.is_empty() {
            let LeftOut { too_long, without_answer } = left_out;
            let problem =
                format!("holds no sample to train on: {too_long} too long, {without_answer} without an answer");
            return Err(Error::invalid("training data", problem).remedy("look at the data, or raise `max_tokens`"));
        }
        let rows = writer.finish()?;
        let index = Index { schema_version: SCHEMA_VERSION, width: rows.width(), left_out, examples };
        write_json(&store.index, &index)?;
        Ok((TrainingSet::new(index.examples, rows), left_out))
    }
}

/// A few samples that go through a network together.
pub type Round = Vec<(Sample, Example)>;

/// Reads all samples and hands on, in rounds, those that are trained on.
///
/// Errors: whatever a sample or `work` fails with; `Error::Interrupted`.
pub fn each_round(
    source: &dyn Source,
    task: &str,
    max_tokens: usize,
    cancel: &Cancel,
    work: &mut dyn FnMut(Round) -> Result<()>,
) -> Result<LeftOut> {
    let progress = Progress::new(task, "samples", source.count());
    let mut left_out = LeftOut::default();
    let mut round = Round::new();
    let mut tokens = 0;
    // The next round's pictures are decoded while this one's go through the network.
    ahead(
        SAMPLES_PER_ROUND,
        || source.samples(),
        |sample| {
            cancel.check(&format!("nothing of the {task} is kept"))?;
            progress.advance(1);
            let example = Example::new(sample.id.clone(), &sample.prompt.input_ids, &sample.answer_mask)?;
            if example.length > max_tokens {
                left_out.too_long += 1;
                return Ok(());
            }
            if example.targets.is_empty() {
                left_out.without_answer += 1;
                return Ok(());
            }
            tokens += example.length;
            round.push((sample, example));
            if round.len() >= SAMPLES_PER_ROUND || tokens >= TOKENS_PER_ROUND {
                tokens = 0;
                work(std::mem::take(&mut round))?;
            }
            Ok(())
        },
    )?;
    if !round.is_empty() {
        work(round)?;
    }
    Ok(left_out)
}

/// The embeddings of a round; positions that are more than counting go into the examples.
pub fn embed(round: &mut Round, model: &mut VlmSession) -> Result<Vec<Embedded>> {
    let prompts: Vec<Prompt> = round.iter().map(|(sample, _)| sample.prompt.clone()).collect();
    let embedded = model.embed_all(&prompts)?;
    if model.decoder().position_rows() > 1 {
        for ((_, example), embedded) in round.iter_mut().zip(&embedded) {
            example.rotary = embedded.positions.clone();
        }
    }
    Ok(embedded)
}

/// All outputs of the model's decoder for each sample, a row per token, with at most `tokens_per_run` tokens at a time.
///
/// Samples of one length go together and are not padded, so that no number depends on how they fell into rounds.
///
/// Errors: `Error::Engine` when a run fails; `Error::Invalid` when an output has no row per token.
pub fn outputs(
    round: &Round,
    embedded: &[Embedded],
    model: &mut VlmSession,
    tokens_per_run: usize,
) -> Result<Vec<Vec<Vec<f32>>>> {
    let rows = model.decoder().position_rows();
    let mut order: Vec<usize> = (0..round.len()).collect();
    order.sort_by_key(|&number| round[number].1.length);
    let mut results: Vec<Vec<Vec<f32>>> = vec![Vec::new(); round.len()];
    let same_length = order.chunk_by(|&a, &b| round[a].1.length == round[b].1.length);
    let groups = same_length.flat_map(|group| {
        let length = round[group[0]].1.length.max(1);
        group.chunks((tokens_per_run / length).max(1))
    });
    for group in groups {
        let time = round[group[0]].1.length;
        let (mut data, mut ids, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for &number in group {
            data.extend_from_slice(&embedded[number].data);
            ids.extend_from_slice(&round[number].0.prompt.input_ids);
        }
        for row in 0..rows {
            for &number in group {
                positions.extend_from_slice(embedded[number].positions.get(row).map_or(&[], Vec::as_slice));
            }
        }
        let mask = vec![1; group.len() * time];
        let hidden_size = embedded[group[0]].hidden_size;
        let tokens = if model.decoder().takes_embeds() {
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
        for (name, tensor) in model.decoder_mut().prefill_outputs(&step)?.iter() {
            let numbers = tensor.to_f32()?;
            let each = numbers.len() / group.len();
            if each == 0 || each * group.len() != numbers.len() || !each.is_multiple_of(time) {
                let problem = format!("has shape {:?} for {} samples of {time} tokens", tensor.shape(), group.len());
                return Err(Error::invalid(format!("value `{name}`"), problem));
            }
            for (&number, numbers) in group.iter().zip(numbers.chunks_exact(each)) {
                results[number].push(numbers.to_vec());
            }
        }
    }
    Ok(results)
}
