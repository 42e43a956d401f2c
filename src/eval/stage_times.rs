//! Times of the stages of an answer, of several models in alternating rounds of one process.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::base::{Cancel, Error, Progress, Result};
use crate::bundle::ModelSource;
use crate::data::{ImageSettings, Processor, Sample};
use crate::runtime::{FeatureCache, NetworkTimes, Runtime, SessionOptions, Step, TokenPruner, VlmSession, argmax_last};

/// Rounds before the measured ones.
const WARM_UP: usize = 2;

/// Treatment of the pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PictureSettings {
    /// Settings of the image processor.
    pub images: ImageSettings,
    /// Part of each picture's tokens that the decoder reads; `None` for the model's own.
    pub keep_image_tokens: Option<f64>,
}

/// Times of one answer in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageTimes {
    /// The picture's decoding and scaling, and the tokenizer.
    pub prepare_ms: f64,
    /// The vision encoder with its projector.
    pub vision_ms: f64,
    /// The decoder's prefill.
    pub prefill_ms: f64,
    /// From the encoded picture and the question to the first token, all of the above included.
    pub ttft_ms: f64,
    /// The decoder's part of one generated token, the mean over the generated ones.
    pub decoder_step_ms: f64,
    /// One generated token, the mean over the generated ones.
    pub step_ms: f64,
    /// Tokens of the prompt that the decoder reads.
    pub prompt_tokens: usize,
    /// Image tokens among them.
    pub image_tokens: usize,
}

/// The workload of a round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StageOptions {
    /// Measured rounds; in each, every model answers with every treatment of the pictures once.
    pub rounds: usize,
    /// Tokens generated behind the prompt.
    pub new_tokens: usize,
    /// Threads inside one operator; all cores without it.
    pub threads: Option<usize>,
}

struct Contestant {
    session: VlmSession,
    /// By treatment of the pictures.
    pictures: Vec<(Processor, Option<TokenPruner>)>,
}

/// Times of all rounds by model and by treatment of the pictures, `[model][setting][round]`, for one question with its pictures.
///
/// Errors: `Error::Invalid` when a count is 0 or a model does not load; `Error::Engine` when a run fails;
/// `Error::Interrupted` on Ctrl-C.
pub fn stage_times(
    models: &[ModelSource],
    settings: &[PictureSettings],
    question: &Sample,
    options: &StageOptions,
    runtime: &Runtime,
    cancel: &Cancel,
) -> Result<Vec<Vec<Vec<StageTimes>>>> {
    if options.rounds == 0 || options.new_tokens == 0 {
        return Err(Error::invalid("number of rounds or of new tokens", "is 0, expected at least 1")
            .remedy("give a larger number"));
    }
    let mut contestants = Vec::with_capacity(models.len());
    for model in models {
        let bundle = model.open()?;
        let session_options = SessionOptions { threads: options.threads, ..SessionOptions::default() };
        // A cache of size 0 keeps nothing, so every round encodes its picture.
        let session = VlmSession::open(runtime, &bundle, &session_options, &FeatureCache::new(0))?;
        let mut pictures = Vec::with_capacity(settings.len());
        for own in settings {
            let build = |keep| TokenPruner::build(runtime, session.decoder(), keep, &session_options);
            let pruner = own.keep_image_tokens.map(build).transpose()?;
            pictures.push((Processor::open_with(&bundle, &own.images)?, pruner));
        }
        contestants.push(Contestant { session, pictures });
    }
    let mut times = vec![vec![Vec::with_capacity(options.rounds); settings.len()]; models.len()];
    let progress = Progress::new("measure", "rounds", (WARM_UP + options.rounds) as u64);
    for round in 0..WARM_UP + options.rounds {
        for setting in 0..settings.len() {
            for (contestant, own) in contestants.iter_mut().zip(&mut times) {
                cancel.check("the times of this measurement are not kept")?;
                let found = contestant.answer(setting, question, options.new_tokens)?;
                if round >= WARM_UP {
                    own[setting].push(found);
                }
            }
        }
        progress.advance(1);
    }
    Ok(times)
}

impl Contestant {
    fn answer(&mut self, setting: usize, question: &Sample, new_tokens: usize) -> Result<StageTimes> {
        let Contestant { session, pictures } = self;
        let (processor, pruner) = &mut pictures[setting];
        let own = match pruner.take() {
            Some(pruner) => Some(session.replace_token_pruner(Some(pruner))?),
            None => None,
        };
        let (began, before) = (Instant::now(), session.times());
        let prompt = processor.encode_prompt(question)?.into_prompt();
        let prepare = began.elapsed();
        let embedded = session.embed(&prompt)?;
        let image_tokens = embedded.side.image.iter().filter(|&&image| image).count();
        let (logits, mut cache) = session.decoder_mut().step(&Step::prefill(&[&embedded], true)?, None)?;
        let mut token = likeliest(&logits)?;
        let (ttft, first) = (began.elapsed(), session.times());

        let began = Instant::now();
        for position in (embedded.next_position..).take(new_tokens) {
            let row = session.embed_text(&[token], position)?;
            let step = Step::decode(&[&row], &[vec![1; cache.length()]], true)?;
            let (logits, longer) = session.decoder_mut().step(&step, Some(cache))?;
            (token, cache) = (likeliest(&logits)?, longer);
        }
        let (decoding, last) = (began.elapsed(), session.times());
        if let Some(own) = own {
            *pruner = session.replace_token_pruner(own)?;
        }
        let spent = |part: fn(&NetworkTimes) -> Duration, from: &NetworkTimes, to: &NetworkTimes| {
            milliseconds(part(to).saturating_sub(part(from)))
        };
        Ok(StageTimes {
            prepare_ms: milliseconds(prepare),
            vision_ms: spent(|times| times.vision_encoder, &before, &first),
            prefill_ms: spent(|times| times.decoder, &before, &first),
            ttft_ms: milliseconds(ttft),
            decoder_step_ms: spent(|times| times.decoder, &first, &last) / new_tokens as f64,
            step_ms: milliseconds(decoding) / new_tokens as f64,
            prompt_tokens: embedded.len(),
            image_tokens,
        })
    }
}

/// The most probable token at the last position.
fn likeliest(logits: &crate::runtime::TensorValue) -> Result<i64> {
    argmax_last(logits, 1)?.first().copied().ok_or_else(|| Error::invalid("logits", "are empty"))
}

fn milliseconds(duration: Duration) -> f64 {
    1000.0 * duration.as_secs_f64()
}
