//! The frozen part before the first trained layer: a separate graph that ONNX Runtime runs once per sample. Its output
//! is stored on disk.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Result, Sha256Digest, read_json, write_json};
use crate::data::LeftOut;
use crate::prompt::Prompt;
use crate::runtime::{Embedded, Step, VlmSession};

use super::batch::TrainingSet;
use super::connector_rows::feature_rows;
use super::example::{Example, total_tokens};
use super::rows::{RowDtype, RowsFile, RowsWriter};
use super::source::{Source, TrainingSample};
use crate::finetune::cut::{SideInputs, SideWidths};

const SCHEMA_VERSION: u32 = 3;
/// Limit on the samples whose pictures are in memory and go through the vision encoder together.
const SAMPLES_AHEAD: usize = 32;
/// Limit on the embeddings of a round in bytes; each stored stream of the round is as large. A larger round has more
/// samples of equal length, which run together.
const BYTES_PER_ROUND: usize = 8 << 20;
/// Bytes that a token counts before the width of the embeddings is known. When the decoder embeds the tokens, the width
/// remains unknown.
const BYTES_PER_TOKEN: usize = 2 << 10;

/// Index file of the stored rows.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    schema_version: u32,
    width: usize,
    /// Type of the residual stream's numbers.
    stream: RowDtype,
    /// Widths of the side values; None when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    side: Option<SideWidths>,
    /// Width of the features that the connector in training reads; None when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    features: Option<usize>,
    left_out: LeftOut,
    examples: Vec<Example>,
}

/// Files of the rows of one key.
pub struct RowStore {
    index: PathBuf,
    rows: PathBuf,
    side_rows: PathBuf,
    feature_rows: PathBuf,
    side: SideInputs,
    stream: RowDtype,
}

impl RowStore {
    /// A store in `folder`. `key` is the digest of everything that affects the rows; `side` are the side inputs whose
    /// values are stored with them; `stream` is the type in which the residual stream is stored.
    pub fn new(folder: &Path, key: &Sha256Digest, side: SideInputs, stream: RowDtype) -> Self {
        let name = |extension: &str| folder.join(format!("hidden-{}.{extension}", &key[..16.min(key.len())]));
        let (index, rows) = (name("json"), name(stream.extension()));
        RowStore { index, rows, side_rows: name("side.f32"), feature_rows: name("features.f32"), side, stream }
    }

    /// The rows of an earlier run; None unless that run completed them.
    ///
    /// Errors: `Error::Invalid` when the files are damaged; `Error::Io`.
    pub fn open(&self) -> Result<Option<(TrainingSet, LeftOut)>> {
        if !self.index.exists() {
            return Ok(None);
        }
        let Index { width, stream, side, features, left_out, examples, .. } = read_json(&self.index, SCHEMA_VERSION)?;
        let tokens = total_tokens(&examples);
        let rows = RowsFile::open(&self.rows, tokens, width, stream)?;
        let side = match side {
            Some(side) => Some((side, RowsFile::open(&self.side_rows, tokens, side.total(), RowDtype::F32)?)),
            None => None,
        };
        let features = match features.zip(self.side.connector) {
            Some((width, input)) => {
                let count = examples.iter().map(|example| feature_rows(example) as u64).sum();
                Some((input, RowsFile::open(&self.feature_rows, count, width, RowDtype::F32)?))
            }
            None => None,
        };
        Ok(Some((TrainingSet::new(examples, rows, side).with_connector(features), left_out)))
    }

    /// Runs the frozen part over all samples and stores its output. `frozen` loads a model that embeds prompts and
    /// whose decoder is the frozen prefix. With `embeds_only`, for runs that train the first layer, the embeddings are
    /// the output.
    ///
    /// Errors: those of the samples and runs; `Error::Interrupted`. Nothing is stored then.
    pub fn fill(
        &self,
        source: &dyn Source,
        task: &str,
        frozen: &mut LazySession<'_>,
        embeds_only: bool,
        max_tokens: usize,
        cancel: &Cancel,
    ) -> Result<(TrainingSet, LeftOut)> {
        let mut filling = self.begin()?;
        let left_out = each_round(source, task, frozen, max_tokens, cancel, &mut |round, frozen| {
            let hidden = if embeds_only {
                round.iter().map(|sample| sample.embedded.data.clone()).collect::<Vec<_>>()
            } else {
                outputs(round, frozen, usize::MAX, |_, outputs| Ok(outputs[0].to_vec()))?
            };
            round.drain(..).zip(hidden).try_for_each(|(sample, hidden)| filling.push(&hidden, &sample))
        })?;
        filling.finish(left_out)
    }

    /// Creates the files of the store, to be filled sample by sample.
    ///
    /// Errors: `Error::Io`.
    pub fn begin(&self) -> Result<Filling<'_>> {
        let writer = RowsWriter::create(&self.rows, self.stream)?;
        let side =
            (self.side.widths.total() > 0).then(|| RowsWriter::create(&self.side_rows, RowDtype::F32)).transpose()?;
        Ok(Filling { store: self, writer, side, features: None, examples: Vec::new() })
    }
}

/// A store that is being written.
pub struct Filling<'a> {
    store: &'a RowStore,
    writer: RowsWriter,
    side: Option<RowsWriter>,
    /// Features for a connector in training, from the first picture on.
    features: Option<RowsWriter>,
    examples: Vec<Example>,
}

impl Filling<'_> {
    /// Appends a sample with its residual stream before the first trained layer, one row per token, and its side
    /// values.
    ///
    /// Errors: as `RowsWriter::push` and `SideInputs::rows`; `Error::Unsupported` for image features without those before the
    /// connector, where it is trained.
    pub fn push(&mut self, hidden: &[f32], sample: &Ready) -> Result<()> {
        let example = &sample.example;
        self.writer.push(hidden, example.length)?;
        if let Some(side) = &mut self.side {
            side.push(&self.store.side.rows(&sample.embedded)?, example.length)?;
        }
        if self.store.side.connector.is_some() {
            self.push_features(sample)?;
        }
        self.examples.push(example.clone());
        Ok(())
    }

    fn push_features(&mut self, sample: &Ready) -> Result<()> {
        let side = &sample.embedded.side;
        if side.unprojected.is_empty() && side.image.contains(&true) {
            let problem =
                "has image tokens whose embeddings are ready made, without the features that the connector reads";
            return Err(Error::unsupported(format!("sample `{}`", sample.example.id), problem)
                .remedy("give pictures, or leave the connector as it is with `--lora-layers trained`"));
        }
        for picture in &side.unprojected {
            let writer = match &mut self.features {
                Some(writer) => writer,
                empty => empty.insert(RowsWriter::create(&self.store.feature_rows, RowDtype::F32)?),
            };
            writer.push(&picture.data, picture.tiles * picture.rows)?;
        }
        Ok(())
    }

    /// Completes the store.
    ///
    /// Errors: `Error::Invalid` when there is no sample; `Error::Io`.
    pub fn finish(self, left_out: LeftOut) -> Result<(TrainingSet, LeftOut)> {
        let Filling { store, writer, side, features, examples } = self;
        let examples = not_empty(examples, &left_out)?;
        let rows = writer.finish()?;
        let side = side.map(|side| Ok::<_, Error>((store.side.widths, side.finish()?))).transpose()?;
        let widths = side.as_ref().map(|(widths, _)| *widths);
        let (schema_version, width) = (SCHEMA_VERSION, rows.width());
        let features = features.map(RowsWriter::finish).transpose()?;
        let features_width = features.as_ref().map(RowsFile::width);
        let index = Index {
            schema_version,
            width,
            stream: store.stream,
            side: widths,
            features: features_width,
            left_out: left_out.clone(),
            examples,
        };
        write_json(&store.index, &index)?;
        let features = store.side.connector.zip(features);
        Ok((TrainingSet::new(index.examples, rows, side).with_connector(features), left_out))
    }
}

/// A sample with the decoder's inputs.
pub struct Ready {
    pub example: Example,
    pub embedded: Embedded,
}

/// A model that is loaded on first use and remains loaded until it is released.
pub struct LazySession<'a> {
    model: Option<VlmSession>,
    open: Box<dyn Fn() -> Result<VlmSession> + Send + 'a>,
}

impl<'a> LazySession<'a> {
    /// A slot for the model that `open` loads.
    pub fn new(open: impl Fn() -> Result<VlmSession> + Send + 'a) -> Self {
        LazySession { model: None, open: Box::new(open) }
    }

    /// Frees the model; the next use loads it again.
    pub fn release(&mut self) {
        self.model = None;
    }

    fn get(&mut self) -> Result<&mut VlmSession> {
        match &mut self.model {
            Some(model) => Ok(model),
            empty => Ok(empty.insert((self.open)()?)),
        }
    }
}

/// Summaries of all samples to train on, with their lengths, and counts of the samples left out.
///
/// Errors: those of the samples; `Error::Invalid` when no sample is left; `Error::Interrupted`.
pub fn scan(source: &dyn Source, max_tokens: usize, cancel: &Cancel) -> Result<(Vec<Example>, LeftOut)> {
    let progress = Progress::new("lengths", "samples", source.count());
    let mut left_out = LeftOut::default();
    let mut examples = Vec::new();
    source.ahead(SAMPLES_AHEAD, &mut |samples| {
        for sample in samples {
            let sample = sample?;
            cancel.check("nothing was computed")?;
            progress.advance(1);
            examples.extend(example_of(&sample, max_tokens, &mut left_out)?.map(|example| example.summary()));
        }
        Ok(())
    })?;
    Ok((not_empty(examples, &left_out)?, with_those_of(source, left_out)))
}

/// Reads all samples, embeds those to train on, and passes them to `work` in rounds of samples that run through a
/// decoder together. Reading starts while the model loads. An empty `task` shows no progress.
///
/// Errors: those of the samples, the model and `work`; `Error::Interrupted`.
pub fn each_round(
    source: &dyn Source,
    task: &str,
    model: &mut LazySession<'_>,
    max_tokens: usize,
    cancel: &Cancel,
    work: &mut dyn FnMut(&mut Vec<Ready>, &mut VlmSession) -> Result<()>,
) -> Result<LeftOut> {
    let progress = (!task.is_empty()).then(|| Progress::new(task, "samples", source.count()));
    let mut left_out = LeftOut::default();
    let mut pictured: Vec<(TrainingSample, Example)> = Vec::new();
    let mut round: Vec<Ready> = Vec::new();
    let mut tokens = 0;
    let mut bytes_per_token = BYTES_PER_TOKEN;
    // Pictures of the next samples are decoded while the network runs these.
    source.ahead(SAMPLES_AHEAD, &mut |samples| {
        let model = model.get()?;
        for sample in samples {
            let sample = sample?;
            cancel.check("what was computed of these samples is not kept")?;
            if let Some(progress) = &progress {
                progress.advance(1);
            }
            let Some(example) = example_of(&sample, max_tokens, &mut left_out)? else { continue };
            tokens += example.length;
            pictured.push((sample, example));
            let full = tokens * bytes_per_token >= BYTES_PER_ROUND;
            if full || pictured.len() >= SAMPLES_AHEAD {
                embed(&mut pictured, model, &mut round)?;
                let width = round.last().map_or(0, |last| last.embedded.hidden_size);
                bytes_per_token = if width > 0 { width * size_of::<f32>() } else { BYTES_PER_TOKEN };
            }
            if full {
                tokens = 0;
                work(&mut round, model)?;
                round.clear();
            }
        }
        embed(&mut pictured, model, &mut round)?;
        if !round.is_empty() {
            work(&mut round, model)?;
        }
        Ok(())
    })?;
    Ok(with_those_of(source, left_out))
}

/// Runs the model's decoder over a round and returns the result of `keep` for each sample, in the order of `round`.
/// `keep` receives all outputs of the sample, `[tokens, width]` each; they are freed after the run. A run has at most
/// `tokens_per_run` tokens, or one sample.
///
/// Samples of equal length run together without padding, so the numbers do not depend on the split into rounds.
///
/// Errors: `Error::Engine` when a run fails; `Error::Invalid` when an output does not have one row per token;
/// `Error::Unsupported` for more than one stream; those of `keep`.
pub fn outputs<T>(
    round: &[Ready],
    model: &mut VlmSession,
    tokens_per_run: usize,
    mut keep: impl FnMut(&Ready, &[&[f32]]) -> Result<T>,
) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..round.len()).collect();
    order.sort_by_key(|&number| round[number].example.length);
    let mut results: Vec<(usize, T)> = Vec::with_capacity(round.len());
    let same_length = order.chunk_by(|&a, &b| round[a].example.length == round[b].example.length);
    let most = model.decoder().fixed_batch().unwrap_or(usize::MAX);
    let groups = same_length.flat_map(|group| {
        let length = round[group[0]].example.length.max(1);
        group.chunks((tokens_per_run / length).clamp(1, most.max(1)))
    });
    for group in groups {
        let time = round[group[0]].example.length;
        let rows: Vec<&Embedded> = group.iter().map(|&number| &round[number].embedded).collect();
        let step = Step::prefill(&rows, false)?;
        let outputs = model.decoder_mut().prefill_outputs(&step)?;
        let mut values = Vec::new();
        for (name, tensor) in outputs.iter() {
            if tensor.shape().len() > 3 {
                let problem = format!("has shape {:?}, expected [samples, tokens, width]", tensor.shape());
                return Err(Error::unsupported(format!("the residual stream `{name}`"), problem)
                    .remedy("layers of several streams side by side are dropped, not healed"));
            }
            let numbers = tensor.to_f32()?;
            let each = numbers.len() / group.len();
            if each == 0 || each * group.len() != numbers.len() || !each.is_multiple_of(time) {
                let problem = format!("has shape {:?} for {} samples of {time} tokens", tensor.shape(), group.len());
                return Err(Error::invalid(format!("value `{name}`"), problem));
            }
            values.push((numbers, each));
        }
        for (place, &number) in group.iter().enumerate() {
            let own: Vec<&[f32]> = values.iter().map(|(numbers, each)| &numbers[place * each..][..*each]).collect();
            results.push((number, keep(&round[number], &own)?));
        }
    }
    results.sort_by_key(|(number, _)| *number);
    Ok(results.into_iter().map(|(_, kept)| kept).collect())
}

/// The sample as an example. None when it is too long or has no answer token; `left_out` then counts it.
fn example_of(sample: &TrainingSample, max_tokens: usize, left_out: &mut LeftOut) -> Result<Option<Example>> {
    let mut example = Example::new(sample.id.clone(), &sample.prompt.input_ids, &sample.answer_mask)?;
    example.number = sample.number;
    if example.length > max_tokens {
        left_out.too_long += 1;
    } else if example.answers == 0 {
        left_out.without_answer += 1;
    } else {
        return Ok(Some(example));
    }
    Ok(None)
}

/// Adds the samples that the last pass over `source` left out.
fn with_those_of(source: &dyn Source, mut left_out: LeftOut) -> LeftOut {
    let LeftOut { unreadable, too_long, reasons, .. } = source.left_out();
    left_out.unreadable = unreadable;
    left_out.too_long += too_long;
    left_out.reasons = reasons;
    left_out
}

/// The examples, of which there must be one.
fn not_empty(examples: Vec<Example>, left_out: &LeftOut) -> Result<Vec<Example>> {
    if examples.is_empty() {
        let problem = format!("holds no sample to train on: {}", left_out.summary().unwrap_or_default());
        return Err(Error::invalid("training data", problem).remedy("look at the data, or raise `data.max_tokens`"));
    }
    Ok(examples)
}

/// Embeds samples and frees their pictures. Examples store position ids only for decoders that read several rows of
/// them.
fn embed(pictured: &mut Vec<(TrainingSample, Example)>, model: &mut VlmSession, round: &mut Vec<Ready>) -> Result<()> {
    let (prompts, examples): (Vec<Prompt>, Vec<Example>) =
        pictured.drain(..).map(|(sample, example)| (sample.prompt, example)).unzip();
    let embedded = model.embed_all(&prompts)?;
    let positions = model.decoder().position_rows() > 1;
    for (mut example, embedded) in examples.into_iter().zip(embedded) {
        example.keep(positions.then_some(embedded.positions.as_slice()), &embedded.side);
        round.push(Ready { example, embedded });
    }
    Ok(())
}
