//! The loss of a decoder without some of its layers, for strategies that measure.

use std::sync::Arc;

use crate::analysis::{self, Analysis};
use crate::base::{Cancel, Device, Error, Result};
use crate::bundle::{Bundle, Role};
use crate::data::{Dataset, Processor, Subset};
use crate::onnx;
use crate::rewrite::drop_layers;
use crate::runtime::{
    Decoder, Embedded, FeatureCache, Picture, Prompt, Runtime, SessionOptions, Step, StepTokens, VlmSession,
};

/// Calibration conversations, embedded once, and the decoder that they are put to.
pub struct LossMeter {
    runtime: Runtime,
    analysis: Analysis,
    head_dim: Option<usize>,
    conversations: Vec<Conversation>,
    cancel: Cancel,
}

struct Conversation {
    input_ids: Vec<i64>,
    answer_mask: Vec<bool>,
    embedded: Embedded,
}

impl LossMeter {
    /// Embeds the drawn conversations, pictures included.
    ///
    /// Errors: as `Processor::encode_conversation` and `VlmSession::open`; `Error::Invalid` without a single answer token.
    pub fn new(bundle: &Bundle, dataset: &Dataset, subset: Subset, device: Device, cancel: &Cancel) -> Result<Self> {
        let processor = Processor::open(bundle)?;
        let runtime = Runtime::new(device)?;
        let indices = subset.indices(dataset.len())?;
        let component = bundle.require(Role::Decoder)?;
        let analysis = analysis::analyse(&onnx::load(&bundle.path_of(component))?)?;
        let mut model = VlmSession::open(&runtime, bundle, &SessionOptions::default(), &FeatureCache::new(64 << 20))?;
        let mut conversations = Vec::with_capacity(indices.len());
        for sample in dataset.read(&indices)? {
            cancel.check("no plan is written")?;
            let encoded = processor.encode_conversation(&sample?)?;
            let pictures: Vec<Arc<Picture>> = match encoded.images {
                Some(images) => {
                    Picture::of_inputs(images.pixel_values, images.pixel_attention_mask, images.image_grid_thw)?
                }
                None => Vec::new(),
            };
            let prompt = Prompt { input_ids: encoded.input_ids, pictures };
            let embedded = model.embed(&prompt)?;
            let (input_ids, answer_mask) = (prompt.input_ids, encoded.answer_mask);
            conversations.push(Conversation { input_ids, answer_mask, embedded });
        }
        if !conversations.iter().any(|conversation| conversation.answer_mask.iter().skip(1).any(|&answer| answer)) {
            return Err(Error::invalid("calibration data", "has no answer to measure a loss on"));
        }
        let head_dim = bundle.config().and_then(|config| config.head_size());
        Ok(LossMeter { runtime, analysis, head_dim, conversations, cancel: cancel.clone() })
    }

    /// Mean cross-entropy over all answer tokens, in nats, of the decoder without these layers.
    ///
    /// Errors: as `drop_layers`; `Error::Engine` when a run fails; `Error::Interrupted` on Ctrl-C.
    pub fn measure(&self, removed: &[usize]) -> Result<f64> {
        self.cancel.check("no plan is written")?;
        let model = drop_layers(&self.analysis, removed)?;
        let session = self.runtime.session_of(&model, &SessionOptions::default())?;
        let mut decoder = Decoder::new(session, self.head_dim)?;
        let (mut sum, mut count) = (0.0, 0usize);
        for conversation in &self.conversations {
            let embedded = &conversation.embedded;
            let positions: Vec<i64> = embedded.positions.iter().flatten().copied().collect();
            let tokens = if decoder.takes_embeds() {
                StepTokens::Embeds { data: &embedded.data, hidden_size: embedded.hidden_size }
            } else {
                StepTokens::Ids(&conversation.input_ids)
            };
            let step = Step {
                batch: 1,
                tokens,
                attention_mask: &vec![1; conversation.input_ids.len()],
                position_ids: &positions,
                position_rows: embedded.positions.len(),
                last_only: false,
            };
            let (logits, _) = decoder.step(&step, None)?;
            let width = logits.shape().last().copied().unwrap_or(0).max(1);
            let logits = logits.to_f32()?;
            let targets = conversation.input_ids.iter().zip(&conversation.answer_mask).skip(1);
            for (row, (&target, &answer)) in logits.chunks_exact(width).zip(targets) {
                if answer {
                    sum += cross_entropy(row, target)?;
                    count += 1;
                }
            }
        }
        Ok(sum / count.max(1) as f64)
    }
}

/// `-log softmax(logits)[target]`, computed in f64.
fn cross_entropy(logits: &[f32], target: i64) -> Result<f64> {
    let chosen = usize::try_from(target)
        .ok()
        .and_then(|target| logits.get(target))
        .ok_or_else(|| Error::invalid(format!("token {target}"), format!("is outside the {} logits", logits.len())))?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&value| f64::from(value - most).exp()).sum();
    Ok(total.ln() - f64::from(chosen - most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_by_hand() {
        // softmax of (0, ln 3) is (1/4, 3/4).
        let logits = [0.0, 3f32.ln()];
        assert!((cross_entropy(&logits, 1).unwrap() - (4.0f64 / 3.0).ln()).abs() < 1e-6);
        assert!((cross_entropy(&logits, 0).unwrap() - 4f64.ln()).abs() < 1e-6);
        assert!((cross_entropy(&[1000.0, 1000.0], 0).unwrap() - 2f64.ln()).abs() < 1e-6);
        assert!(cross_entropy(&logits, 2).is_err());
        assert!(cross_entropy(&logits, -1).is_err());
    }
}
