//! Perplexity of running text, and its ratio to a baseline's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Provenance, Result};
use crate::data::Dataset;
use crate::prompt::Prompt;
use crate::runtime::{Step, cross_entropy};

use super::run::LoadedModel;
use super::stats::{Interval, kept_likelihood};

/// The content of `report.json` for running text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TextReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Figures of the model.
    pub model: TextScores,
    /// Figures of the model that it is compared with, on the same sequences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<TextScores>,
    /// The baseline's perplexity over the model's, with its 95% paired bootstrap interval over sequences: 1 where
    /// nothing is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Interval>,
}

impl TextReport {
    /// Version of the schema.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// Perplexity of a model on running text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TextScores {
    /// Path of the model as the user gave it.
    pub model: String,
    /// Exponential of `mean_loss`.
    pub perplexity: f64,
    /// Mean negative log-likelihood in nats over all predicted tokens.
    pub mean_loss: f64,
    /// Tokens that were predicted: all but the first of each sequence.
    pub predicted_tokens: u64,
    /// Wall-clock time of all sequences.
    pub seconds: f64,
    /// One entry per sequence, in the order of the text.
    pub sequences: Vec<SequenceLoss>,
}

/// One sequence's part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SequenceLoss {
    /// Sum of the negative log-likelihoods of its predicted tokens, in nats.
    pub loss: f64,
    /// Tokens of the sequence but its first.
    pub predicted_tokens: u64,
}

/// Perplexity of a model on running text: each sequence goes through by itself, and every token but its first is
/// predicted from those before it. `limit` takes the first sequences only.
///
/// Errors: `Error::Invalid` for conversations instead of text, or a token outside the logits; `Error::Engine` when the
/// runtime fails; `Error::Interrupted` when the user asked to stop.
pub fn perplexity(
    model: &mut LoadedModel,
    text: &Dataset,
    limit: Option<usize>,
    cancel: &Cancel,
) -> Result<TextScores> {
    let began = std::time::Instant::now();
    let count = limit.unwrap_or(text.len()).min(text.len());
    let indices: Vec<usize> = (0..count).collect();
    let progress = Progress::new("eval", "sequences", count as u64);
    let mut sequences = Vec::with_capacity(count);
    for sample in text.read(&indices)? {
        cancel.check("no report is written")?;
        let sample = sample?;
        if sample.text.is_none() {
            return Err(Error::invalid(&sample.id, "is a conversation, perplexity is measured on running text")
                .remedy("give running text: a `.jsonl` file whose lines have `text`"));
        }
        let prompt = model.processor.encode_conversation(&sample)?.into_prompt();
        sequences.push(sequence_loss(model, &prompt)?);
        progress.advance(1);
    }
    let loss: f64 = sequences.iter().map(|sequence| sequence.loss).sum();
    let predicted_tokens: u64 = sequences.iter().map(|sequence| sequence.predicted_tokens).sum();
    let mean_loss = loss / predicted_tokens.max(1) as f64;
    Ok(TextScores {
        model: model.name.clone(),
        perplexity: mean_loss.exp(),
        mean_loss,
        predicted_tokens,
        seconds: began.elapsed().as_secs_f64(),
        sequences,
    })
}

fn sequence_loss(model: &mut LoadedModel, prompt: &Prompt) -> Result<SequenceLoss> {
    let embedded = model.vlm.embed(prompt)?;
    let ids = &prompt.input_ids;
    let decoder = model.vlm.decoder_mut();
    let (logits, _) = decoder.step(&Step::prefill(&[&embedded], false)?, None)?;
    let subject = decoder.session().subject();
    let (width, rows) = match *logits.shape() {
        [1, rows, width] if rows == ids.len() => (width, rows),
        _ => {
            let problem = format!("gave logits of shape {:?} for {} tokens", logits.shape(), ids.len());
            return Err(Error::unsupported(subject, problem).remedy("perplexity needs the logits of every position"));
        }
    };
    let logits = logits.to_f32()?;
    let mut loss = 0.0;
    for (row, &target) in logits.chunks_exact(width.max(1)).zip(ids.iter().skip(1)) {
        loss += cross_entropy(row, target)?;
    }
    Ok(SequenceLoss { loss, predicted_tokens: rows as u64 - 1 })
}

/// Retention: the baseline's perplexity over the model's.
///
/// Errors: `Error::Invalid` when the two did not read the same sequences.
pub fn kept_perplexity(model: &TextScores, baseline: &TextScores, seed: u64) -> Result<Interval> {
    let same = model.sequences.len() == baseline.sequences.len()
        && model.sequences.iter().zip(&baseline.sequences).all(|(a, b)| a.predicted_tokens == b.predicted_tokens);
    if !same {
        return Err(Error::invalid("retention", "model and baseline did not read the same sequences"));
    }
    let rows = model.sequences.iter().zip(&baseline.sequences);
    let rows: Vec<(f64, f64)> = rows.map(|(a, b)| (b.loss - a.loss, a.predicted_tokens as f64)).collect();
    Ok(kept_likelihood(&rows, seed))
}
