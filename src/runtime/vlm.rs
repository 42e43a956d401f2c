//! A whole vision-language model: pictures and token ids in, greedy answers out.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::base::{Cancel, Error, Result};
use crate::prompt::{ImageArrays, Prompt};

use super::decoder::{Decoder, KvCache, Step, StepTokens};
use super::positions::{multimodal_positions, positions_of_mask};
use super::session::Session;
use super::tensor::Tensor;
use super::vision::{Features, VisionEncoder};

/// Largest difference of logits that still counts as the same answer when padding is tried out.
const PADDING_TOLERANCE: f32 = 1e-2;

/// What the model's configs say about generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VlmSettings {
    /// The token that stands for one row of image features.
    pub image_token_id: Option<i64>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<i64>,
    /// Patches per side that the encoder merges into one token (multimodal rotary positions).
    pub spatial_merge_size: Option<usize>,
    /// Longest answer, in tokens.
    pub max_new_tokens: Option<usize>,
}

/// The loaded components of a model.
#[derive(Debug)]
pub struct VlmSession {
    vision: Option<VisionEncoder>,
    embed: Option<Session>,
    decoder: Decoder,
    settings: VlmSettings,
    padding_works: Option<bool>,
}

/// A prompt's `inputs_embeds`, image features merged in.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedded {
    pub hidden_size: usize,
    /// `[tokens, hidden_size]` in row-major order.
    pub data: Vec<f32>,
    /// One row of positions, or three for multimodal rotary embedding.
    pub positions: Vec<Vec<i64>>,
    /// The position of the first generated token.
    pub next_position: i64,
}

/// A batch after prefill.
#[derive(Debug)]
struct Running {
    cache: KvCache,
    mask: Vec<Vec<i64>>,
    next_positions: Vec<i64>,
    next_tokens: Vec<i64>,
}

impl VlmSession {
    /// Puts components together.
    ///
    /// Errors: `Error::Invalid` when the decoder takes embeddings and there is nothing that makes them, or there is a
    /// vision encoder and no image token.
    pub fn new(
        vision: Option<VisionEncoder>,
        embed: Option<Session>,
        decoder: Decoder,
        settings: VlmSettings,
    ) -> Result<Self> {
        let subject = decoder.session().subject().to_string();
        if decoder.takes_embeds() && embed.is_none() {
            return Err(Error::invalid(
                subject,
                "takes `inputs_embeds`, but the model has no token embedding component",
            ));
        }
        if vision.is_some() && settings.image_token_id.is_none() {
            return Err(Error::invalid(
                subject,
                "belongs to a model with a vision encoder whose config names no image token",
            ));
        }
        if vision.is_some() && !decoder.takes_embeds() {
            return Err(Error::invalid(subject, "takes token ids, so image features cannot be merged in"));
        }
        if let Some(embed) = &embed
            && let Some(port) = embed.inputs().iter().find(|port| port.name != "input_ids")
        {
            return Err(Error::unsupported(embed.subject(), format!("input `{}` has no known meaning", port.name)));
        }
        Ok(VlmSession { vision, embed, decoder, settings, padding_works: None })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The decoder, to run steps on.
    pub fn decoder_mut(&mut self) -> &mut Decoder {
        &mut self.decoder
    }

    /// The decoder alone.
    pub fn into_decoder(self) -> Decoder {
        self.decoder
    }

    /// The vision encoder, for models that have one.
    pub fn vision_mut(&mut self) -> Option<&mut VisionEncoder> {
        self.vision.as_mut()
    }

    /// What the configs say about generation.
    pub fn settings(&self) -> &VlmSettings {
        &self.settings
    }

    /// Token embeddings, `[tokens, hidden_size]`, and the hidden size.
    ///
    /// Errors: `Error::Invalid` when the model has no embedding component; `Error::Engine` when the run fails.
    pub fn embed_tokens(&mut self, input_ids: &[i64]) -> Result<(Vec<f32>, usize)> {
        let Some(embed) = &mut self.embed else {
            return Err(Error::invalid(
                self.decoder.session().subject(),
                "is part of a model without token embeddings",
            ));
        };
        let dtype = embed.input("input_ids").map(|port| port.dtype);
        let output = embed.outputs().first().map(|port| port.name.clone());
        let (Some(dtype), Some(output)) = (dtype, output) else {
            return Err(Error::invalid(embed.subject(), "lacks `input_ids` or an output"));
        };
        let tensor = Tensor::from_i64(dtype, &[1, input_ids.len()], input_ids.to_vec())?;
        let outputs = embed.run(&[("input_ids", &tensor)], None)?;
        let result = outputs.get(&output)?;
        let data = result.to_f32()?.into_owned();
        match data.len().checked_div(input_ids.len()) {
            Some(hidden) if hidden > 0 && hidden * input_ids.len() == data.len() => Ok((data, hidden)),
            _ => Err(Error::invalid(
                embed.subject(),
                format!("gave shape {:?} for {} tokens", result.shape(), input_ids.len()),
            )),
        }
    }

    /// A prompt's embeddings with its pictures' features at the image tokens.
    ///
    /// Errors: `Error::Invalid` when the features' rows are not as many as the image tokens, or as wide as the embeddings.
    pub fn embed(&mut self, prompt: &Prompt) -> Result<Embedded> {
        let mut embedded = self.embed_all(std::slice::from_ref(prompt))?;
        embedded.pop().ok_or_else(|| Error::invalid("prompt", "is empty"))
    }

    /// [`VlmSession::embed`] of several prompts; new pictures share runs of the vision encoder.
    ///
    /// Errors: as `embed`.
    pub fn embed_all(&mut self, prompts: &[Prompt]) -> Result<Vec<Embedded>> {
        if prompts.iter().any(|prompt| prompt.input_ids.is_empty()) {
            return Err(Error::invalid("prompt", "has no tokens"));
        }
        let pictures: Vec<&ImageArrays> =
            prompts.iter().flat_map(|prompt| prompt.pictures.iter().map(Arc::as_ref)).collect();
        let features = match &mut self.vision {
            Some(vision) => vision.encode(&pictures)?,
            None if pictures.is_empty() => Vec::new(),
            None => {
                return Err(Error::invalid(
                    self.decoder.session().subject(),
                    "belongs to a model without a vision encoder, but the prompt has pictures",
                ));
            }
        };
        let mut features = features.as_slice();
        let mut embedded = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let (own, rest) = features.split_at(prompt.pictures.len());
            features = rest;
            embedded.push(self.merge(prompt, own)?);
        }
        Ok(embedded)
    }

    fn merge(&mut self, prompt: &Prompt, features: &[Arc<Features>]) -> Result<Embedded> {
        let ids = &prompt.input_ids;
        let image_token = self.settings.image_token_id;
        let tokens = ids.iter().filter(|&&id| Some(id) == image_token).count();
        let rows: usize = features.iter().map(|item| item.tokens()).sum();
        if tokens != rows {
            return Err(Error::invalid(
                "prompt",
                format!("has {tokens} image tokens, its pictures give {rows} rows of features"),
            )
            .remedy("check that the processor's settings and the vision encoder belong together"));
        }
        let (positions, next_position) = self.positions(prompt)?;
        if !self.decoder.takes_embeds() {
            return Ok(Embedded { hidden_size: 0, data: Vec::new(), positions, next_position });
        }
        let (mut data, hidden_size) = self.embed_tokens(ids)?;
        let mut source = features.iter().flat_map(|item| item.data.chunks_exact(item.hidden_size));
        for (target, &id) in data.chunks_exact_mut(hidden_size).zip(ids) {
            if Some(id) != image_token {
                continue;
            }
            match source.next() {
                Some(row) if row.len() == hidden_size => target.copy_from_slice(row),
                row => {
                    let found = row.map_or(0, <[f32]>::len);
                    return Err(Error::invalid(
                        "image features",
                        format!("are {found} wide, token embeddings {hidden_size}"),
                    ));
                }
            }
        }
        Ok(Embedded { hidden_size, data, positions, next_position })
    }

    fn positions(&self, prompt: &Prompt) -> Result<(Vec<Vec<i64>>, i64)> {
        let length = prompt.input_ids.len() as i64;
        if self.decoder.position_rows() == 1 || prompt.pictures.is_empty() {
            let row: Vec<i64> = (0..length).collect();
            return Ok((vec![row; self.decoder.position_rows()], length));
        }
        let subject = self.decoder.session().subject();
        let grids: Option<Vec<[i64; 3]>> = prompt.pictures.iter().map(|picture| picture.grid_thw()).collect();
        let grids = grids.ok_or_else(|| {
            Error::invalid(subject, "takes three rows of positions, but a picture has no grid of patches")
        })?;
        let merge = self.settings.spatial_merge_size.ok_or_else(|| {
            Error::invalid(subject, "takes three rows of positions, but the config names no `spatial_merge_size`")
        })?;
        let image_token = self.settings.image_token_id.unwrap_or(-1);
        let (rows, next) = multimodal_positions(&prompt.input_ids, image_token, &grids, merge)?;
        Ok((rows.into(), next))
    }

    /// Answers by greedy decoding: at most `max_new_tokens` tokens each, without the token that ends them.
    ///
    /// Prompts of one call form one batch, padded on the left; where the graph does not understand padding, prompts
    /// of equal length do; where it is made for a batch of one, each prompt is one.
    ///
    /// Errors: `Error::Invalid` for a prompt that does not fit the model; `Error::Engine` when a run fails;
    /// `Error::Interrupted` when the user asked to stop.
    pub fn generate(&mut self, prompts: &[Prompt], max_new_tokens: usize, cancel: &Cancel) -> Result<Vec<Vec<i64>>> {
        let embedded = self.embed_all(prompts)?;
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (number, prompt) in prompts.iter().enumerate() {
            groups.entry(prompt.input_ids.len()).or_default().push(number);
        }
        if groups.len() > 1 && self.decoder.fixed_batch() != Some(1) && self.padding_works()? {
            let all = groups.into_values().flatten().collect();
            groups = BTreeMap::from([(0, all)]);
        }
        let largest = self.decoder.fixed_batch().unwrap_or(prompts.len()).max(1);
        let mut answers = vec![Vec::new(); prompts.len()];
        for group in groups.values().flat_map(|group| group.chunks(largest)) {
            let rows: Vec<(&Prompt, &Embedded)> =
                group.iter().map(|&number| (&prompts[number], &embedded[number])).collect();
            for (&number, answer) in group.iter().zip(self.generate_batch(&rows, max_new_tokens, cancel)?) {
                answers[number] = answer;
            }
        }
        Ok(answers)
    }

    fn generate_batch(
        &mut self,
        rows: &[(&Prompt, &Embedded)],
        max_new_tokens: usize,
        cancel: &Cancel,
    ) -> Result<Vec<Vec<i64>>> {
        let mut answers = vec![Vec::new(); rows.len()];
        let mut ended = vec![max_new_tokens == 0; rows.len()];
        let mut running = self.prefill(rows)?;
        loop {
            for ((answer, ended), &token) in answers.iter_mut().zip(&mut ended).zip(&running.next_tokens) {
                if !*ended && self.settings.eos_token_ids.contains(&token) {
                    *ended = true;
                } else if !*ended {
                    answer.push(token);
                    *ended = answer.len() >= max_new_tokens;
                }
            }
            if ended.iter().all(|&ended| ended) {
                return Ok(answers);
            }
            cancel.check("no answer of this batch is kept")?;
            running = self.decode(running)?;
        }
    }

    fn prefill(&mut self, rows: &[(&Prompt, &Embedded)]) -> Result<Running> {
        let batch = rows.len();
        let width = rows.iter().map(|(prompt, _)| prompt.input_ids.len()).max().unwrap_or(0);
        let padding: Vec<usize> = rows.iter().map(|(prompt, _)| width - prompt.input_ids.len()).collect();
        let mask: Vec<Vec<i64>> = padding.iter().map(|&pad| [vec![0; pad], vec![1; width - pad]].concat()).collect();
        let position_rows = self.decoder.position_rows();
        let mut positions = Vec::with_capacity(position_rows * batch * width);
        for row in 0..position_rows {
            for ((_, embedded), &pad) in rows.iter().zip(&padding) {
                positions.resize(positions.len() + pad, 0);
                positions.extend_from_slice(&embedded.positions[row]);
            }
        }
        let flat_mask = mask.concat();
        let mut ids = Vec::new();
        let mut data = Vec::new();
        let mut hidden_size = 0;
        for ((prompt, embedded), &pad) in rows.iter().zip(&padding) {
            hidden_size = embedded.hidden_size;
            // What stands at padding is masked out; a copy of the row's first position keeps the numbers ordinary.
            for _ in 0..pad {
                ids.push(prompt.input_ids[0]);
                data.extend_from_slice(&embedded.data[..hidden_size]);
            }
            ids.extend_from_slice(&prompt.input_ids);
            data.extend_from_slice(&embedded.data);
        }
        let tokens = if self.decoder.takes_embeds() {
            StepTokens::Embeds { data: &data, hidden_size }
        } else {
            StepTokens::Ids(&ids)
        };
        let step = Step {
            batch,
            tokens,
            attention_mask: &flat_mask,
            position_ids: &positions,
            position_rows,
            last_only: true,
        };
        let (logits, cache) = self.decoder.step(&step, None)?;
        Ok(Running {
            cache,
            mask,
            next_positions: rows.iter().map(|(_, embedded)| embedded.next_position).collect(),
            next_tokens: argmax_last(&logits, batch)?,
        })
    }

    fn decode(&mut self, mut running: Running) -> Result<Running> {
        let batch = running.next_tokens.len();
        running.mask.iter_mut().for_each(|row| row.push(1));
        let position_rows = self.decoder.position_rows();
        let positions = running.next_positions.repeat(position_rows);
        let flat_mask = running.mask.concat();
        let (data, hidden_size) =
            if self.decoder.takes_embeds() { self.embed_tokens(&running.next_tokens)? } else { (Vec::new(), 0) };
        let tokens = if self.decoder.takes_embeds() {
            StepTokens::Embeds { data: &data, hidden_size }
        } else {
            StepTokens::Ids(&running.next_tokens)
        };
        let step = Step {
            batch,
            tokens,
            attention_mask: &flat_mask,
            position_ids: &positions,
            position_rows,
            last_only: true,
        };
        let (logits, cache) = self.decoder.step(&step, Some(running.cache))?;
        running.next_positions.iter_mut().for_each(|position| *position += 1);
        Ok(Running { cache, next_tokens: argmax_last(&logits, batch)?, ..running })
    }

    /// Tries out once whether the graph understands padding on the left: the logits of a short prompt must not change.
    fn padding_works(&mut self) -> Result<bool> {
        if let Some(works) = self.padding_works {
            return Ok(works);
        }
        let works = self.decoder.takes_padding() && {
            let ids = [1i64, 2, 3];
            let (data, hidden_size) =
                if self.decoder.takes_embeds() { self.embed_tokens(&ids)? } else { (Vec::new(), 0) };
            let mut run = |skip: usize, mask: &[i64]| -> Result<Vec<f32>> {
                let tokens = if self.decoder.takes_embeds() {
                    StepTokens::Embeds { data: &data[skip * hidden_size..], hidden_size }
                } else {
                    StepTokens::Ids(&ids[skip..])
                };
                let positions = positions_of_mask(mask, 1, mask.len());
                let step = Step {
                    batch: 1,
                    tokens,
                    attention_mask: mask,
                    position_ids: &positions,
                    position_rows: 1,
                    last_only: true,
                };
                let (logits, _) = match self.decoder.position_rows() {
                    1 => self.decoder.step(&step, None)?,
                    rows => {
                        let positions = positions.repeat(rows);
                        self.decoder.step(&Step { position_ids: &positions, position_rows: rows, ..step }, None)?
                    }
                };
                last_logits(&logits, 1)
            };
            let plain = run(1, &[1, 1])?;
            let padded = run(0, &[0, 1, 1])?;
            let scale = plain.iter().fold(1f32, |scale, x| scale.max(x.abs()));
            plain.iter().zip(&padded).all(|(a, b)| (a - b).abs() <= PADDING_TOLERANCE * scale)
        };
        self.padding_works = Some(works);
        Ok(works)
    }
}

/// Logits of the last position of every row, `[B, V]`.
fn last_logits(logits: &Tensor, batch: usize) -> Result<Vec<f32>> {
    let shape = logits.shape();
    let [rows, time, vocabulary] = shape[..] else {
        return Err(Error::invalid("logits", format!("have shape {shape:?}, expected [batch, positions, vocabulary]")));
    };
    if rows != batch || time == 0 || vocabulary == 0 {
        return Err(Error::invalid("logits", format!("have shape {shape:?} for a batch of {batch}")));
    }
    let data = logits.to_f32()?;
    let last = data.chunks_exact(time * vocabulary).flat_map(|row| &row[(time - 1) * vocabulary..]);
    Ok(last.copied().collect())
}

/// The likeliest token of each row at its last position; the first one on ties.
///
/// Errors: `Error::Invalid` unless `logits` has shape `[batch, T, V]` and numbers in it.
pub fn argmax_last(logits: &Tensor, batch: usize) -> Result<Vec<i64>> {
    let last = last_logits(logits, batch)?;
    let vocabulary = last.len() / batch.max(1);
    last.chunks_exact(vocabulary.max(1))
        .map(|row| {
            let mut best = 0;
            for (token, &value) in row.iter().enumerate() {
                if value.is_nan() {
                    return Err(Error::invalid("logits", "contain a value that is not a number"));
                }
                if value > row[best] {
                    best = token;
                }
            }
            Ok(best as i64)
        })
        .collect()
}

#[cfg(test)]
#[path = "vlm_tests.rs"]
mod tests;
