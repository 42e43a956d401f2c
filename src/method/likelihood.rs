//! Log-likelihood of the reference answers: teacher-forced, one decoder pass per batch.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::analysis;
use crate::base::{Cancel, Error, Progress, Result};
use crate::bundle::{Bundle, Role};
use crate::data::Encoded;
use crate::onnx;
use crate::rewrite::{KEEP_INPUT, LOSS_OUTPUT, RESTART_INPUT, ROWS_INPUT, STREAM_INPUT, TARGETS_INPUT};
use crate::runtime::{FeatureCache, Runtime, SessionOptions, Tensor, VlmSession, headed};

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
    let component = bundle.require(Role::Decoder)?;
    let analysis = analysis::analyse(&headed(bundle, onnx::load(&bundle.path_of(component))?)?)?;
    let head_dim = bundle.config().and_then(|config| config.head_size());
    let (decoder, _) = open(runtime, &analysis, head_dim, None)?;
    let mut model = VlmSession::with_decoder(runtime, bundle, decoder, &SessionOptions::default(), features)?;
    let layers = analysis.map.layers.len();
    let progress = Progress::new("likelihood", "questions", count as u64);
    let mut found = Vec::with_capacity(count);
    let (mut waiting, mut bytes) = (Vec::new(), 0);
    for encoded in conversations {
        cancel.check("no report is written")?;
        let encoded = encoded?;
        let answer_mask = encoded.answer_mask.clone();
        let embedded = model.embed(&encoded.into_prompt())?;
        bytes += size_of_val(embedded.data.as_slice());
        waiting.push(Conversation { number: found.len(), answer_mask, embedded });
        found.push(AnswerLikelihood::default());
        if bytes >= WINDOW_BYTES || found.len() % LIKELIHOOD_BLOCK == 0 {
            measure(&mut model, layers, std::mem::take(&mut waiting), &mut found, &progress)?;
            bytes = 0;
        }
    }
    measure(&mut model, layers, waiting, &mut found, &progress)?;
    Ok(found)
}

fn measure(
    model: &mut VlmSession,
    layers: usize,
    conversations: Vec<Conversation>,
    found: &mut [AnswerLikelihood],
    progress: &Progress,
) -> Result<()> {
    let count = conversations.len() as u64;
    for batch in batches(conversations, model.decoder().fixed_batch())? {
        let losses = losses(model, layers, &batch)?;
        for (&owner, loss) in batch.owners.iter().zip(losses) {
            let own = found.get_mut(owner).ok_or_else(|| Error::invalid("a batch", "names no conversation"))?;
            own.log_likelihood -= f64::from(loss);
            own.tokens += 1;
        }
    }
    progress.advance(count);
    Ok(())
}

/// Cross-entropy in nats of each answer token of a batch, with all layers.
fn losses(model: &mut VlmSession, layers: usize, batch: &Batch) -> Result<Vec<f32>> {
    let keep = Tensor::new(&[layers], vec![true; layers])?;
    let mut added = vec![(KEEP_INPUT, &keep), (ROWS_INPUT, &batch.rows), (TARGETS_INPUT, &batch.targets)];
    let flag = Tensor::new(&[1], vec![false])?;
    let decoder = model.decoder_mut();
    let nothing = match decoder.session().input(STREAM_INPUT) {
        Some(port) => Some(Tensor::empty(port.dtype, &[0, 0, port.fixed_size(2).unwrap_or(0)])?),
        None => None,
    };
    if let Some(nothing) = &nothing {
        added.extend([(RESTART_INPUT, &flag), (STREAM_INPUT, nothing)]);
    }
    let outputs = decoder.prefill_added(&batch.step, &added, Some(&[LOSS_OUTPUT]))?;
    Ok(outputs.get(LOSS_OUTPUT)?.data::<f32>()?.to_vec())
}
