//! Answers a user's question, or every prompt of a data set.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{AtomicFile, Cancel, Error, Progress, Result};
use crate::bundle::ModelSource;
use crate::data::{
    DataOptions, Dataset, Encoder, ImageBytes, ImageSettings, Intake, LeftOut, MessagePart, Sample, Turn,
};
use crate::eval::LoadedModel;
use crate::prompt::Prompt;
use crate::runtime::{Sampler, VlmSettings};

use super::engine::Engine;
use super::needs::{Work, check};

/// Longest answer in tokens when neither the user nor the model's config sets one.
const DEFAULT_MAX_TOKENS: usize = 256;

/// A question.
#[derive(Clone, Debug)]
pub struct Question {
    /// Picture files, in the order in which the prompt refers to them.
    pub images: Vec<PathBuf>,
    /// Frames of a video with their times in seconds; the video follows the pictures.
    pub video: Vec<(f64, PathBuf)>,
    /// Image settings that override the model's own files.
    pub settings: ImageSettings,
    /// System message; `None` leaves it to the chat template.
    pub system: Option<String>,
    /// Text of the user's message, without image placeholders.
    pub prompt: String,
}

/// Settings of decoding.
#[derive(Clone, Debug)]
pub struct Decoding {
    /// Longest answer in tokens; `None` uses the model's own setting.
    pub max_tokens: Option<usize>,
    /// Sampling temperature, 0 or more; 0 selects the most probable token at each step.
    pub temperature: f32,
    /// Nucleus: tokens are sampled among the most probable ones whose probabilities sum to this, above 0 and at most 1.
    pub top_p: f32,
    /// Seed of the sampling; unused at temperature 0.
    pub seed: u64,
}

impl Decoding {
    fn sampler(&self) -> Result<Sampler> {
        Sampler::new(self.temperature, self.top_p, self.seed)
    }

    /// The longest answer, in tokens, to a prompt of `prompt` tokens. The model's own setting or the default is reduced
    /// to the remaining context.
    ///
    /// Errors: `Error::Invalid` naming the prompt when the prompt, alone or with the requested answer length, exceeds
    /// the model's context.
    fn limit(&self, settings: &VlmSettings, id: &str, prompt: usize) -> Result<usize> {
        let own = settings.max_new_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        let Some(positions) = settings.context_tokens else { return Ok(self.max_tokens.unwrap_or(own)) };
        let room = positions.saturating_sub(prompt);
        let problem = |what: String| {
            Error::invalid(id, format!("has {prompt} tokens{what}, and the model was made for {positions} positions"))
        };
        match self.max_tokens {
            _ if room == 0 => Err(problem(String::new()).remedy("ask something shorter")),
            Some(most) if most > room => {
                let problem = problem(format!(", its answer may have {most}"));
                Err(problem.remedy(format!("allow at most {room} tokens with `--max-tokens`")))
            }
            Some(most) => Ok(most),
            None => Ok(own.min(room)),
        }
    }
}

/// An answer with what it took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generation {
    /// Path of the model as the user gave it.
    pub model: String,
    /// Generated text without special tokens.
    pub answer: String,
    /// Tokens of the prompt, images included.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Seconds from the question to the first token, pictures included; absent without a token.
    pub first_token_s: Option<f64>,
    /// Tokens behind the first one, per second; absent where there is none.
    pub tokens_per_s: Option<f64>,
}

/// Output of `generate --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generations {
    /// The model's answer, and behind it the one of the model that it is compared with.
    pub answers: Vec<Generation>,
}

/// Answers a question with a model. Calls `on_text` with each piece of the answer as soon as it is complete.
///
/// Errors: as `LoadedModel::open`; `Error::Invalid` when a picture cannot be decoded or the model does not support the
/// question; `Error::Engine` when a run fails; `Error::Interrupted` when the user asked to stop.
pub fn generate(
    engine: &Engine,
    model: &ModelSource,
    question: &Question,
    decoding: &Decoding,
    cancel: &Cancel,
    on_text: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Generation> {
    let mut sampler = decoding.sampler()?;
    let LoadedModel { name, mut vlm, processor } = engine.load(model, &question.settings)?;
    let picture = |path: &PathBuf| ImageBytes::file(format!("picture `{}`", path.display()), path.clone());
    let mut images: Vec<ImageBytes> = question.images.iter().map(picture).collect();
    if !question.video.is_empty() {
        let frames = question.video.iter().map(|(time, path)| (*time, picture(path))).collect();
        images.push(ImageBytes::frames("the video", frames)?);
    }
    let mut user: Vec<MessagePart> = (0..images.len()).map(MessagePart::Image).collect();
    user.push(MessagePart::Text(question.prompt.clone()));
    let sample = Sample {
        index: 0,
        id: "the question".to_string(),
        images,
        system: question.system.clone(),
        turns: vec![Turn { user, assistant: String::new() }],
        text: None,
        tensors: None,
    };
    let began = Instant::now();
    let prompt = processor.encode_prompt(&sample)?.into_prompt();
    let limit = decoding.limit(vlm.settings(), &sample.id, prompt.input_ids.len())?;
    let mut first = None;
    let mut ids = Vec::new();
    let mut shown = String::new();
    let tokens = vlm.stream(&prompt, limit, &mut sampler, cancel, &mut |token| {
        first.get_or_insert_with(Instant::now);
        ids.push(token);
        let text = processor.decode(&ids)?;
        // A letter may consist of several tokens; until the last one the text ends with a replacement character.
        if let Some(piece) = text.strip_prefix(&shown).filter(|_| !text.ends_with('\u{fffd}')) {
            on_text(piece)?;
            shown = text;
        }
        Ok(())
    })?;
    let answer = processor.decode(&tokens)?;
    if let Some(rest) = answer.strip_prefix(&shown) {
        on_text(rest)?;
    }
    let after_first = first.map(|first| first.elapsed().as_secs_f64());
    Ok(Generation {
        model: name,
        answer: answer.trim().to_string(),
        prompt_tokens: prompt.input_ids.len(),
        tokens: tokens.len(),
        first_token_s: first.map(|first| (first - began).as_secs_f64()),
        tokens_per_s: after_first.filter(|_| tokens.len() > 1).map(|seconds| (tokens.len() - 1) as f64 / seconds),
    })
}

/// One line of the file that [`generate_all`] writes.
#[derive(Serialize)]
struct Line<'a> {
    id: &'a str,
    answer: &'a str,
}

/// Answers the last question of every sample of a data set and writes JSON lines of `id` and `answer`. At temperature
/// 0, samples share batches. Returns the number of answers and the samples that were left out.
///
/// Errors: as `generate`, `Dataset::open_for` and `Intake::encoded`.
pub fn generate_all(
    engine: &Engine,
    model: &ModelSource,
    data: (&Path, &DataOptions),
    output: &Path,
    (decoding, batch_size): (&Decoding, usize),
    cancel: &Cancel,
) -> Result<(usize, LeftOut)> {
    let mut sampler = decoding.sampler()?;
    let bundle = model.open()?;
    let dataset = Dataset::open_for(data.0, &bundle, data.1)?;
    let encoder = Encoder::open(&bundle, &dataset)?;
    let LoadedModel { mut vlm, processor, .. } = engine.load(model, &data.1.images)?;
    let settings = vlm.settings().clone();
    let indices: Vec<usize> = (0..dataset.len()).collect();
    let progress = Progress::new("generate", "answers", indices.len() as u64);
    let mut file = AtomicFile::create(output)?;
    let mut waiting: Vec<(String, Prompt)> = Vec::new();
    let mut written = 0;
    let mut answer = |batch: Vec<(String, Prompt)>| -> Result<()> {
        cancel.check("no answers are written")?;
        let limits = batch.iter().map(|(id, prompt)| decoding.limit(&settings, id, prompt.input_ids.len()));
        let limits = limits.collect::<Result<Vec<usize>>>()?;
        let limit = limits.into_iter().min().unwrap_or(0);
        let (ids, prompts): (Vec<String>, Vec<Prompt>) = batch.into_iter().unzip();
        let answers = if decoding.temperature == 0.0 {
            vlm.generate(&prompts, limit, cancel)?
        } else {
            let mut one = |prompt: &Prompt| vlm.stream(prompt, limit, &mut sampler, cancel, &mut |_| Ok(()));
            prompts.iter().map(&mut one).collect::<Result<_>>()?
        };
        for (id, tokens) in ids.iter().zip(answers) {
            let text = processor.decode(&tokens)?;
            let line = Line { id, answer: text.trim() };
            let mut bytes = serde_json::to_vec(&line).map_err(|e| Error::invalid(id, e.to_string()))?;
            bytes.push(b'\n');
            file.write_all(&bytes)?;
        }
        written += ids.len();
        progress.advance(ids.len() as u64);
        Ok(())
    };
    let intake = Intake::new(&dataset, &bundle, usize::MAX);
    let asked = (&dataset, &indices[..], indices.len());
    intake.ahead(
        asked,
        batch_size,
        |sample| encoder.prompt(sample),
        |all| {
            for encoded in all {
                let (_, encoded) = encoded?;
                waiting.push((encoded.id.clone(), encoded.into_prompt()));
                if waiting.len() == batch_size {
                    answer(std::mem::take(&mut waiting))?;
                }
            }
            Ok(())
        },
    )?;
    if !waiting.is_empty() {
        answer(waiting)?;
    }
    file.commit()?;
    Ok((written, intake.left_out()))
}

/// Prints text immediately, without waiting for the end of the line.
///
/// Errors: `Error::Io` when standard output cannot be written.
pub fn print_text(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("write", "standard output", e))
}

/// Checks that a model can answer questions, before it is loaded.
///
/// Errors: as `steps::check_needs`.
pub fn check_answers(model: &ModelSource) -> Result<()> {
    check(&model.open()?, Work::Answer)
}
