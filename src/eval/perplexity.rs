//! Perplexity of running text, and its ratio to a baseline's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Peers, Progress, Provenance, Result, Stopwatch, gathered, own_part};
use crate::bundle::Bundle;
use crate::data::{Dataset, Encoded, Encoder, Intake, LeftOut};
use crate::runtime::{Profile, Step, VlmSession, cross_entropy};

use super::stats::{Interval, kept_likelihood};

/// Number of samples prepared ahead of the runtime.
const SAMPLES_AHEAD: usize = 8;

/// The content of `report.json` for running text, conversations and ready tensors.
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

/// Perplexity of a model on running text or on answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TextScores {
    /// Path of the model as the user gave it.
    pub model: String,
    /// Exponential of `mean_loss`.
    pub perplexity: f64,
    /// Mean negative log-likelihood in nats over all predicted tokens.
    pub mean_loss: f64,
    /// Tokens that were predicted: those of answers, or all but the first of each sequence of running text.
    pub predicted_tokens: u64,
    /// Wall-clock time of all sequences.
    pub seconds: f64,
    /// Where the time was spent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// Samples that were not used.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
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

/// Perplexity of a model named `name` on running text, on the answers of conversations, or on the labels of ready
/// tensors. Each sample is a pass of its own; each token is predicted from the tokens before it. `limit` restricts the
/// run to the first samples.
///
/// Errors: as `Intake::encoded`; `Error::Invalid` when there is nothing to predict or a token is outside the logits;
/// `Error::Engine` when the runtime fails; `Error::Interrupted` when the user asked to stop.
pub fn perplexity(
    name: &str,
    vlm: &mut VlmSession,
    (bundle, data): (&Bundle, &Dataset),
    limit: Option<usize>,
    peers: Option<&dyn Peers>,
    cancel: &Cancel,
) -> Result<TextScores> {
    let began = std::time::Instant::now();
    let encoder = Encoder::open(bundle, data)?;
    let count = limit.unwrap_or(data.len()).min(data.len());
    let all: Vec<usize> = (0..count).collect();
    let indices = own_part(peers, &all);
    let progress = Progress::new("eval", "sequences", indices.len() as u64);
    let mut sequences = Vec::with_capacity(count);
    let intake = Intake::new(data, bundle, usize::MAX);
    let (waiting, before) = (Stopwatch::default(), vlm.times());
    let own = (data, indices, count);
    intake.ahead(
        own,
        SAMPLES_AHEAD,
        |sample| encoder.conversation(sample),
        |all| {
            for encoded in waiting.over(all) {
                cancel.check("no report is written")?;
                sequences.push(sequence_loss(vlm, encoded?.1)?);
                progress.advance(1);
            }
            Ok(())
        },
    )?;
    let left_out = intake.left_out_by_all(peers, count)?;
    let sequences = gathered(peers, sequences)?.concat();
    let loss: f64 = sequences.iter().map(|sequence| sequence.loss).sum();
    let predicted_tokens: u64 = sequences.iter().map(|sequence| sequence.predicted_tokens).sum();
    if predicted_tokens == 0 {
        return Err(Error::invalid(format!("data `{}`", data.path().display()), "has no token to predict")
            .remedy("give running text, conversations with answers, or tensors with `labels`"));
    }
    let mean_loss = loss / predicted_tokens as f64;
    Ok(TextScores {
        model: name.to_string(),
        perplexity: mean_loss.exp(),
        mean_loss,
        predicted_tokens,
        seconds: began.elapsed().as_secs_f64(),
        profile: Some(Profile::new(began.elapsed(), intake.preparing(), &waiting, before, vlm.times())),
        left_out,
        sequences,
    })
}

fn sequence_loss(vlm: &mut VlmSession, encoded: Encoded) -> Result<SequenceLoss> {
    let answers = encoded.answer_mask.clone();
    let prompt = encoded.into_prompt();
    let embedded = vlm.embed(&prompt)?;
    let (ids, answers) = (embedded.of_kept(&prompt.input_ids), embedded.of_kept(&answers));
    let decoder = vlm.decoder_mut();
    let name = decoder.logits_name().to_string();
    let logits = decoder.prefill_added(&Step::prefill(&[&embedded], false)?, &[], Some(&[&name]))?.take(&name)?;
    let subject = decoder.session().subject();
    let width = match *logits.shape() {
        [1, rows, width] if rows == ids.len() => width,
        _ => {
            let problem = format!("gave logits of shape {:?} for {} tokens", logits.shape(), ids.len());
            return Err(Error::unsupported(subject, problem).remedy("perplexity needs the logits of every position"));
        }
    };
    let logits = logits.to_f32()?;
    let (mut loss, mut predicted_tokens) = (0.0, 0);
    let next = ids.iter().zip(&answers).skip(1);
    for (row, (&target, _)) in logits.chunks_exact(width.max(1)).zip(next).filter(|(_, (_, answer))| **answer) {
        loss += cross_entropy(row, target)?;
        predicted_tokens += 1;
    }
    Ok(SequenceLoss { loss, predicted_tokens })
}

/// Retention: the baseline's perplexity over the model's.
///
/// Errors: `Error::Invalid` when the two have different sequences.
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
