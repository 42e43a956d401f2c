//! Token generation with a KV cache.

use std::collections::BTreeMap;

use crate::base::{Cancel, Result};
use crate::prompt::Prompt;

use super::decoder::KvCache;
use super::logits::last_logits;
use super::sampling::Sampler;
use super::step::{Embedded, Step};
use super::vlm::{TokenTypes, VlmSession};

/// Largest relative difference of logits at which left padding still counts as supported.
const PADDING_TOLERANCE: f32 = 1e-2;

/// A batch after prefill.
#[derive(Debug)]
struct Running {
    cache: KvCache,
    mask: Vec<Vec<i64>>,
    next_positions: Vec<i64>,
    next_tokens: Vec<i64>,
}

impl VlmSession {
    /// Answers by greedy decoding: at most `max_new_tokens` tokens each, without the end token.
    ///
    /// The prompts of one call form one batch, padded on the left. If the graph does not support padding, only prompts
    /// of equal length form a batch; if its batch size is fixed at one, each prompt runs alone.
    ///
    /// Errors: `Error::Invalid` for a prompt that does not fit the model; `Error::Engine` when a run fails;
    /// `Error::Interrupted` when the user asked to stop.
    pub fn generate(&mut self, prompts: &[Prompt], max_new_tokens: usize, cancel: &Cancel) -> Result<Vec<Vec<i64>>> {
        let embedded = self.embed_all(prompts)?;
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (number, prompt) in embedded.iter().enumerate() {
            groups.entry(prompt.len()).or_default().push(number);
        }
        if groups.len() > 1 && self.decoder.fixed_batch() != Some(1) && self.padding_works()? {
            let all = groups.into_values().flatten().collect();
            groups = BTreeMap::from([(0, all)]);
        }
        let largest = self.decoder.fixed_batch().unwrap_or(prompts.len()).max(1);
        let mut answers = vec![Vec::new(); prompts.len()];
        for group in groups.values().flat_map(|group| group.chunks(largest)) {
            let rows: Vec<&Embedded> = group.iter().map(|&number| &embedded[number]).collect();
            let own = self.generate_batch(&rows, max_new_tokens, &mut Sampler::greedy(), cancel, &mut |_| Ok(()))?;
            for (&number, answer) in group.iter().zip(own) {
                answers[number] = answer;
            }
        }
        Ok(answers)
    }

    /// Generates one answer and calls `on_token` with each token, except the end token.
    ///
    /// Errors: as `generate`, and those of `on_token`, which stop the generation.
    pub fn stream(
        &mut self,
        prompt: &Prompt,
        max_new_tokens: usize,
        sampler: &mut Sampler,
        cancel: &Cancel,
        on_token: &mut dyn FnMut(i64) -> Result<()>,
    ) -> Result<Vec<i64>> {
        let embedded = self.embed(prompt)?;
        let mut answers = self.generate_batch(&[&embedded], max_new_tokens, sampler, cancel, on_token)?;
        Ok(answers.pop().unwrap_or_default())
    }

    fn generate_batch(
        &mut self,
        rows: &[&Embedded],
        max_new_tokens: usize,
        sampler: &mut Sampler,
        cancel: &Cancel,
        on_token: &mut dyn FnMut(i64) -> Result<()>,
    ) -> Result<Vec<Vec<i64>>> {
        let mut answers = vec![Vec::new(); rows.len()];
        let mut ended = vec![max_new_tokens == 0; rows.len()];
        let mut running = self.begin(rows, sampler)?;
        loop {
            for ((answer, ended), &token) in answers.iter_mut().zip(&mut ended).zip(&running.next_tokens) {
                if !*ended && self.settings.eos_token_ids.contains(&token) {
                    *ended = true;
                } else if !*ended {
                    on_token(token)?;
                    answer.push(token);
                    *ended = answer.len() >= max_new_tokens;
                }
            }
            if ended.iter().all(|&ended| ended) {
                return Ok(answers);
            }
            cancel.check("no answer of this batch is kept")?;
            running = self.decode(running, sampler)?;
        }
    }

    fn begin(&mut self, rows: &[&Embedded], sampler: &mut Sampler) -> Result<Running> {
        let (logits, cache) = self.decoder.step(&Step::prefill(rows, true)?, None)?;
        let width = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let mask = |row: &&Embedded| [vec![0; width - row.len()], vec![1; row.len()]].concat();
        Ok(Running {
            cache,
            mask: rows.iter().map(mask).collect(),
            next_positions: rows.iter().map(|embedded| embedded.next_position).collect(),
            next_tokens: sampler.choose(&logits, rows.len())?,
        })
    }

    fn decode(&mut self, mut running: Running, sampler: &mut Sampler) -> Result<Running> {
        let rows = self.next_rows(&running.next_tokens, &running.next_positions)?;
        let step = Step::decode(&rows.iter().collect::<Vec<_>>(), &running.mask, true)?;
        let (logits, cache) = self.decoder.step(&step, Some(running.cache))?;
        running.mask.iter_mut().for_each(|row| row.push(1));
        running.next_positions.iter_mut().for_each(|position| *position += 1);
        Ok(Running { cache, next_tokens: sampler.choose(&logits, rows.len())?, ..running })
    }

    /// The decoder's rows for the next tokens of a batch, each at its position.
    ///
    /// Errors: `Error::Engine` when the tokens cannot be embedded.
    pub fn next_rows(&mut self, tokens: &[i64], positions: &[i64]) -> Result<Vec<Embedded>> {
        let all = self.embed_text(tokens, 0)?;
        let answer = self.settings.token_types == TokenTypes::Answer;
        let row = |(number, &position): (usize, &i64)| {
            let mut row = all.slice(number..number + 1);
            row.positions.iter_mut().for_each(|row| *row = vec![position]);
            row.next_position = position + 1;
            row.side.types = if answer { vec![1] } else { Vec::new() };
            row
        };
        Ok(positions.iter().take(tokens.len()).enumerate().map(row).collect())
    }

    /// Tests once whether the graph supports left padding: it must not change the logits of a short prompt.
    fn padding_works(&mut self) -> Result<bool> {
        if let Some(works) = self.padding_works {
            return Ok(works);
        }
        let works = self.decoder.takes_padding() && {
            let (short, long) = (self.embed_text(&[2, 3], 0)?, self.embed_text(&[1, 2, 3], 0)?);
            let mut run = |rows: &[&Embedded]| {
                let (logits, _) = self.decoder.step(&Step::prefill(rows, true)?, None)?;
                last_logits(&logits, rows.len())
            };
            let plain = run(&[&short])?;
            let together = run(&[&short, &long])?;
            let scale = plain.iter().fold(1f32, |scale, x| scale.max(x.abs()));
            plain.iter().zip(&together).all(|(a, b)| (a - b).abs() <= PADDING_TOLERANCE * scale)
        };
        self.padding_works = Some(works);
        Ok(works)
    }
}

#[cfg(test)]
#[path = "generate_tests.rs"]
mod tests;
