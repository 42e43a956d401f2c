//! Log-likelihood of the reference answers: teacher-forced, one decoder pass per batch.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::analysis;
use crate::base::{Cancel, Error, Progress, Result};
use crate::bundle::{Bundle, Role};
use crate::data::Encoded;
use crate::ir::Model;
use crate::onnx;
use crate::rewrite::{KEEP_INPUT, LOSS_OUTPUT, RESTART_INPUT, ROWS_INPUT, STREAM_INPUT, TARGETS_INPUT};
use crate::runtime::{FeatureCache, Runtime, SessionOptions, TensorValue, TokenPruner, VlmSession, headed};

use super::batch::{Batch, Conversation, batches};
use super::switched::open;

/// Conversations that are looked at together at most: the processes of a run take blocks of so many.
pub const LIKELIHOOD_BLOCK: usize = 256;
/// Bytes of embedded conversations that wait for their batch.
const WINDOW_BYTES: usize = 64 << 20;

/// The answers of one conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AnswerLikelihood {
    /// Sum over the answer tokens, in nats, at most 0.
    pub log_likelihood: f64,
    /// Number of answer tokens, including those that end an answer.
    pub tokens: u64,
}

/// The log-likelihood of each conversation's answers, in the order of `conversations`. `count` is their expected
/// number, used for the progress bar only. Logits are computed at answer positions only and stay inside the runtime.
///
/// Errors: those of `conversations`; `Error::Unsupported` when the decoder has an opset below 11; `Error::Engine` when
/// a run fails; `Error::Interrupted` when the user asked to stop.
pub fn answer_likelihoods(
    bundle: &Bundle,
    runtime: &Runtime,
    features: &Arc<FeatureCache>,
    conversations: impl Iterator<Item = Result<Encoded>>,
    count: usize,
    cancel: &Cancel,
) -> Result<Vec<AnswerLikelihood>> {
    let mut meter = AnswerMeter::open(bundle, runtime, features)?;
    let progress = Progress::new("likelihood", "questions", count as u64);
    let mut found = Vec::with_capacity(count);
    let (mut waiting, mut bytes) = (Vec::new(), 0);
    for encoded in conversations {
        cancel.check("no report is written")?;
        let conversation = meter.conversation(encoded?, found.len())?;
        bytes += size_of_val(conversation.embedded.data.as_slice());
        waiting.push(conversation);
        found.push(AnswerLikelihood::default());
        if bytes >= WINDOW_BYTES || found.len() % LIKELIHOOD_BLOCK == 0 {
            let count = waiting.len() as u64;
            meter.measure(&meter.batches(std::mem::take(&mut waiting))?, &[], &mut found)?;
            progress.advance(count);
            bytes = 0;
        }
    }
    meter.measure(&meter.batches(waiting)?, &[], &mut found)?;
    Ok(found)
}

/// A model whose decoder layers can be left out and whose vision encoder can be replaced, with the likelihood of right
/// answers as its result.
pub struct AnswerMeter {
    model: VlmSession,
    runtime: Runtime,
    bundle: Bundle,
    layers: usize,
}

/// Conversations embedded by a meter's vision encoder.
pub struct EmbeddedAnswers {
    batches: Vec<Batch>,
    /// Number of conversations.
    count: usize,
}

impl AnswerMeter {
    /// Loads the model.
    ///
    /// Errors: as `rewrite::bypass_layers` and `VlmSession::with_decoder`.
    pub fn open(bundle: &Bundle, runtime: &Runtime, features: &Arc<FeatureCache>) -> Result<Self> {
        let component = bundle.require(Role::Decoder)?;
        let analysis = analysis::analyse(&headed(bundle, onnx::load(&bundle.path_of(component))?)?)?;
        let head_dim = bundle.config().and_then(|config| config.head_size());
        let (decoder, _) = open(runtime, &analysis, head_dim, None)?;
        let model = VlmSession::with_decoder(runtime, bundle, decoder, &SessionOptions::default(), features)?;
        Ok(AnswerMeter { model, runtime: *runtime, bundle: bundle.clone(), layers: analysis.map.layers.len() })
    }

    /// Embeds conversations with the vision encoder as it is now.
    ///
    /// Errors: those of `conversations`; `Error::Engine` when a run fails; `Error::Interrupted` on Ctrl-C.
    pub fn answers(
        &mut self,
        conversations: impl Iterator<Item = Result<Encoded>>,
        cancel: &Cancel,
    ) -> Result<EmbeddedAnswers> {
        let mut all = Vec::new();
        for encoded in conversations {
            cancel.check("nothing is written")?;
            all.push(self.conversation(encoded?, all.len())?);
        }
        let count = all.len();
        Ok(EmbeddedAnswers { batches: self.batches(all)?, count })
    }

    /// The likelihood of each conversation's answers by the decoder without these layers.
    ///
    /// Errors: as `answers`.
    pub fn likelihoods(
        &mut self,
        answers: &EmbeddedAnswers,
        removed: &[usize],
        cancel: &Cancel,
    ) -> Result<Vec<AnswerLikelihood>> {
        cancel.check("nothing is written")?;
        let mut found = vec![AnswerLikelihood::default(); answers.count];
        self.measure(&answers.batches, removed, &mut found)?;
        Ok(found)
    }

    /// Mean loss of an answer token in nats, by the decoder without these layers.
    ///
    /// Errors: as `answers`; `Error::Invalid` without an answer token.
    pub fn loss(&mut self, answers: &EmbeddedAnswers, removed: &[usize], cancel: &Cancel) -> Result<f64> {
        let found = self.likelihoods(answers, removed, cancel)?;
        let tokens: u64 = found.iter().map(|answer| answer.tokens).sum();
        if tokens == 0 {
            return Err(Error::invalid("calibration data", "has no answer to measure a loss on")
                .remedy("give conversations with answers"));
        }
        Ok(-found.iter().map(|answer| answer.log_likelihood).sum::<f64>() / tokens as f64)
    }

    /// Replaces the vision encoder by a graph that is not written yet.
    ///
    /// Errors: as `VlmSession::replace_vision`.
    pub fn replace_vision(&mut self, encoder: &Model) -> Result<()> {
        let options = SessionOptions::default();
        self.model.replace_vision(&self.runtime, &self.bundle, encoder, &options, WINDOW_BYTES)
    }

    /// Reads this part of each picture's tokens from now on, all of them with `None`.
    ///
    /// Errors: as `VlmSession::set_token_pruner`.
    pub fn keep_image_tokens(&mut self, keep: Option<f64>) -> Result<()> {
        let options = SessionOptions::default();
        let build = |keep| TokenPruner::build(&self.runtime, self.model.decoder(), keep, &options);
        let pruner = keep.map(build).transpose()?;
        self.model.set_token_pruner(pruner)
    }

    fn conversation(&mut self, encoded: Encoded, number: usize) -> Result<Conversation> {
        let answer_mask = encoded.answer_mask.clone();
        let embedded = self.model.embed(&encoded.into_prompt())?;
        Ok(Conversation { number, answer_mask: embedded.of_kept(&answer_mask), embedded })
    }

    fn batches(&self, conversations: Vec<Conversation>) -> Result<Vec<Batch>> {
        batches(conversations, self.model.decoder().fixed_batch())
    }

    fn measure(&mut self, batches: &[Batch], removed: &[usize], found: &mut [AnswerLikelihood]) -> Result<()> {
        for batch in batches {
            let losses = self.losses(batch, removed)?;
            for (&owner, loss) in batch.owners.iter().zip(losses) {
                let own = found.get_mut(owner).ok_or_else(|| Error::invalid("a batch", "names no conversation"))?;
                own.log_likelihood -= f64::from(loss);
                own.tokens += 1;
            }
        }
        Ok(())
    }

    /// Cross-entropy in nats of each answer token of a batch.
    fn losses(&mut self, batch: &Batch, removed: &[usize]) -> Result<Vec<f32>> {
        let keep = (0..self.layers).map(|layer| !removed.contains(&layer)).collect();
        let keep = TensorValue::new(&[self.layers], keep)?;
        let mut added = vec![(KEEP_INPUT, &keep), (ROWS_INPUT, &batch.rows), (TARGETS_INPUT, &batch.targets)];
        let flag = TensorValue::new(&[1], vec![false])?;
        let decoder = self.model.decoder_mut();
        let nothing = match decoder.session().input(STREAM_INPUT) {
            Some(port) => Some(TensorValue::empty(port.dtype, &[0, 0, port.fixed_size(2).unwrap_or(0)])?),
            None => None,
        };
        if let Some(nothing) = &nothing {
            added.extend([(RESTART_INPUT, &flag), (STREAM_INPUT, nothing)]);
        }
        let outputs = decoder.prefill_added(&batch.step, &added, Some(&[LOSS_OUTPUT]))?;
        Ok(outputs.get(LOSS_OUTPUT)?.data::<f32>()?.to_vec())
    }
}
