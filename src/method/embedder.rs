//! Embeds calibration conversations for a decoder whose layers can be switched off.

use crate::analysis;
use crate::base::{Cancel, Device, Progress, Result};
use crate::bundle::{Bundle, Role};
use crate::data::{Dataset, Encoded, Encoder, Intake, LeftOut, within_tokens};
use crate::onnx;
use crate::runtime::{FeatureCache, Runtime, SessionOptions, VlmSession, headed};

use super::batch::Conversation;
use super::switched::{Switched, Switches, open};

/// Samples with more tokens are left out; also the default of `score --max-tokens`.
const MAX_TOKENS: usize = 8192;

/// Conversations that are embedded with a model's own encoders.
pub struct Embedder<'a> {
    dataset: &'a Dataset,
    encoder: Encoder,
    intake: Intake,
    model: VlmSession,
    num_layers: usize,
    /// With switches of residual blocks: for each layer, that of its MLP.
    pub mlps: Vec<Option<usize>>,
    file: String,
    restarts: bool,
    cancel: &'a Cancel,
    /// Ids of the samples so far.
    pub samples: Vec<String>,
    pub left_out: LeftOut,
}

impl<'a> Embedder<'a> {
    /// Loads the model, its decoder with these switches.
    ///
    /// Errors: as `VlmSession::open` and `rewrite::bypass_layers`.
    pub fn new(
        bundle: &Bundle,
        dataset: &'a Dataset,
        switches: Switches,
        device: Device,
        cancel: &'a Cancel,
    ) -> Result<Self> {
        let encoder = Encoder::open(bundle, dataset)?;
        let runtime = Runtime::new(device)?;
        let component = bundle.require(Role::Decoder)?;
        let mut analysis = analysis::analyse(&headed(bundle, onnx::load(&bundle.path_of(component))?)?)?;
        let mut mlps = Vec::new();
        let mapped = match switches {
            Switches::Layers => None,
            Switches::Mapped(of) => Some(of),
            Switches::Sublayers => {
                let parts = analysis::sublayers(&analysis)?;
                (analysis.map, mlps) = (parts.map, parts.mlps.into_iter().map(Result::ok).collect());
                None
            }
        };
        let head_dim = bundle.config().and_then(|config| config.head_size());
        let (decoder, restarts) = open(&runtime, &analysis, head_dim, mapped)?;
        let features = FeatureCache::new(64 << 20);
        let model = VlmSession::with_decoder(&runtime, bundle, decoder, &SessionOptions::default(), &features)?;
        Ok(Embedder {
            dataset,
            encoder,
            intake: Intake::new(dataset, bundle, MAX_TOKENS),
            model,
            num_layers: analysis.map.layers.len(),
            mlps,
            file: component.file.clone(),
            restarts,
            cancel,
            samples: Vec::new(),
            left_out: LeftOut::default(),
        })
    }

    /// The first of these samples, in the order given, with at most `most_tokens` tokens in all, at least one. Samples that
    /// cannot be used count as none.
    ///
    /// Errors: as `within_tokens`.
    pub fn within_tokens(&self, drawn: &[usize], most_tokens: usize) -> Result<Vec<usize>> {
        let most = most_tokens as u64;
        let mut taken = within_tokens((self.dataset, &self.encoder), drawn, most, MAX_TOKENS as u64, self.cancel)?;
        let tokens: u64 = taken.iter().map(|(_, length)| length).sum();
        let used = taken.iter().filter(|(_, length)| *length > 0).count();
        if tokens > most && used > 1 {
            taken.pop();
        }
        Ok(taken.into_iter().map(|(index, _)| index).collect())
    }

    /// The samples with these indices that can be used.
    ///
    /// Errors: as `Intake::encoded`; `Error::Engine` when an encoder fails; `Error::Interrupted` on Ctrl-C.
    pub fn embedded(&mut self, indices: &[usize]) -> Result<Vec<Conversation>> {
        let mut conversations: Vec<Conversation> = Vec::new();
        let progress = Progress::new("embed", "samples", indices.len() as u64);
        let encoder = &self.encoder;
        for encoded in self.intake.encoded(self.dataset, indices, |sample| encoder.conversation(sample))? {
            self.cancel.check("nothing is written")?;
            let encoded: Encoded = encoded?;
            self.samples.push(encoded.id.clone());
            let answer_mask = encoded.answer_mask.clone();
            let embedded = self.model.embed(&encoded.into_prompt())?;
            let answer_mask = embedded.of_kept(&answer_mask);
            conversations.push(Conversation { number: conversations.len(), answer_mask, embedded });
            progress.advance(1);
        }
        let left_out = self.intake.left_out();
        self.left_out.unreadable += left_out.unreadable;
        self.left_out.too_long += left_out.too_long;
        self.left_out.reasons.extend(left_out.reasons);
        Ok(conversations)
    }

    /// The decoder, when all is embedded.
    pub fn into_switched(self) -> Switched {
        let (decoder, cancel) = (self.model.into_decoder(), self.cancel.clone());
        Switched::new(decoder, self.num_layers, self.file, self.restarts, cancel)
    }
}
