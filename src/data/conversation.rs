//! Encodes whole conversations as token ids and marks the tokens of answers.

use std::ops::Range;

use crate::base::{Error, Result};

use super::processor::{Encoded, Processor};
use super::sample::{Sample, Turn};
use super::template::ChatMessage;

impl Processor {
    /// Encodes a sample up to the start of its last answer, with earlier turns and all pictures. Running text is
    /// encoded whole. No token is marked.
    ///
    /// Errors: as `encode_question`; `Error::Invalid` for a sample without turns, and for running text that contains
    /// the image token.
    pub fn encode_prompt(&self, sample: &Sample) -> Result<Encoded> {
        if let Some(tokens) = &sample.text {
            return self.running_text(sample, tokens, false);
        }
        if sample.turns.is_empty() {
            return Err(Error::invalid(&sample.id, "has no turns").remedy("remove the row from the data"));
        }
        let mut messages = self.messages(sample, &answers(sample))?;
        messages.pop();
        self.encode_messages(&sample.id, &messages, &sample.images, true)
    }

    /// Encodes a whole conversation. The tokens of every answer are marked, including the token that ends the turn. In
    /// running text every token is marked.
    ///
    /// To locate the answers, the conversation is rendered a second time with a marker in place of each answer; an
    /// answer is between the pieces of text that are equal in both renderings. If the conversation begins with the
    /// rendered prompt of a turn, the marked span begins at the end of that prompt. Otherwise it begins at the answer's
    /// own text.
    ///
    /// Errors: as `encode_prompt`; `Error::Invalid` when an answer has no tokens, begins inside a token, or is changed
    /// by the template. Removal of white space around an answer is not a change.
    pub fn encode_conversation(&self, sample: &Sample) -> Result<Encoded> {
        if let Some(tokens) = &sample.text {
            return self.running_text(sample, tokens, true);
        }
        let id = &sample.id;
        let answers = answers(sample);
        let messages = self.messages(sample, &answers)?;
        let whole = self.render(id, &messages, false)?;
        let spans = self.answer_spans(sample, &answers, &messages, &whole)?;
        let images = self.images(id, &sample.images)?;
        let text = self.expand(id, &whole, images.as_ref(), true)?;
        let tokens = self.tokenizer.encode_with_offsets(&text)?;
        let mut answer_mask = vec![false; tokens.len()];
        for (number, span) in spans.into_iter().enumerate() {
            // Expanding the image markers shifts the answers behind them. Markers inside answers cannot occur here:
            // `expand` above fails when there are more markers than pictures.
            let shift = |place: usize| -> Result<usize> {
                let before = whole.get(..place).unwrap_or_default();
                Ok(self.expand(id, before, images.as_ref(), false)?.len())
            };
            let span = shift(span.start)?..shift(span.end)?;
            let marked = self.answer_tokens(&text, &tokens, &span).map_err(|problem| {
                Error::invalid(id, format!("answer {number} {problem}"))
                    .remedy("correct the answer, or remove the row from the data")
            })?;
            answer_mask.iter_mut().take(marked.end).skip(marked.start).for_each(|mask| *mask = true);
        }
        let ids = tokens.into_iter().map(|(token, _)| token).collect();
        Ok(self.encoded(id, ids, answer_mask, images))
    }

    /// Encodes running text. Every token is marked, or none.
    fn running_text(&self, sample: &Sample, tokens: &[i64], marked: bool) -> Result<Encoded> {
        let image = self.image_token_id();
        if tokens.iter().any(|&token| Some(token) == image) {
            return Err(Error::invalid(&sample.id, "holds the image token, but running text has no pictures")
                .remedy("remove the token from the text"));
        }
        Ok(Encoded {
            id: sample.id.clone(),
            input_ids: tokens.to_vec(),
            answer_mask: vec![marked; tokens.len()],
            image_positions: Vec::new(),
            images: None,
            given: None,
        })
    }

    /// The messages of a sample, with `answers` in place of its own answers.
    fn messages(&self, sample: &Sample, answers: &[String]) -> Result<Vec<ChatMessage>> {
        let mut messages = Vec::with_capacity(2 * sample.turns.len() + 1);
        messages.extend(sample.system.as_deref().map(|text| self.message("system", text)));
        for (Turn { user, .. }, answer) in sample.turns.iter().zip(answers) {
            messages.push(self.user(user, &sample.images)?);
            messages.push(self.message("assistant", answer));
        }
        Ok(messages)
    }

    /// The byte range of each answer in `whole`, the rendered conversation.
    fn answer_spans(
        &self,
        sample: &Sample,
        answers: &[String],
        messages: &[ChatMessage],
        whole: &str,
    ) -> Result<Vec<Range<usize>>> {
        let id = &sample.id;
        let differs = |number: usize| {
            Error::invalid(id, format!("the chat template does not write answer {number} as the data has it"))
                .remedy("leave the sample out, or use a template that keeps answers as they are")
        };
        let markers: Vec<String> = (0..answers.len()).map(|number| marker(number, whole)).collect();
        let marked = self.render(id, &self.messages(sample, &markers)?, false)?;
        let mut spans = Vec::with_capacity(answers.len());
        let (mut rest, mut place) = (marked.as_str(), 0);
        for (number, (answer, marker)) in answers.iter().zip(&markers).enumerate() {
            let (before, after) = rest.split_once(marker.as_str()).ok_or_else(|| differs(number))?;
            let next = markers.get(number + 1).and_then(|next| after.find(next.as_str())).unwrap_or(after.len());
            let following = &after[..next];
            let here = place + before.len();
            let begins = whole.get(place..).is_some_and(|text| text.starts_with(before));
            let tail = whole.get(here..).filter(|_| begins).ok_or_else(|| differs(number))?;
            let fits = |text: &&str| tail.strip_prefix(*text).is_some_and(|tail| tail.starts_with(following));
            let written = [answer.as_str(), answer.trim(), answer.trim_start(), answer.trim_end()];
            let text = written.into_iter().find(fits).ok_or_else(|| differs(number))?;
            // Number of messages up to this question: the system message, two per earlier turn, and the question.
            let turn = usize::from(sample.system.is_some()) + 2 * number + 1;
            let prompt = self.render(id, messages.get(..turn).unwrap_or_default(), true)?;
            let begin = if whole.starts_with(prompt.as_str()) { prompt.len().min(here) } else { here };
            spans.push(begin..here + text.len());
            (rest, place) = (after, here + text.len());
        }
        if whole.get(place..) != Some(rest) {
            return Err(differs(answers.len().saturating_sub(1)));
        }
        Ok(spans)
    }

    /// The token range of an answer whose byte range in `text` is `span`. Includes the token that ends the turn if only
    /// white space is before it.
    ///
    /// Errors: a message when the answer begins inside a token or has no tokens.
    fn answer_tokens(
        &self,
        text: &str,
        tokens: &[(u32, Range<usize>)],
        span: &Range<usize>,
    ) -> Result<Range<usize>, &'static str> {
        let after = |place: usize| tokens.iter().position(|(_, bytes)| bytes.end > place).unwrap_or(tokens.len());
        let first = after(span.start);
        if tokens.get(first).is_some_and(|(_, bytes)| bytes.start < span.start) {
            return Err("begins inside a token; training needs an answer that begins with a token of its own");
        }
        // A token that crosses the end of the answer belongs to the answer.
        let mut end = after(span.end);
        if span.end > span.start && tokens.get(end).is_some_and(|(_, bytes)| bytes.start < span.end) {
            end += 1;
        }
        let closing = tokens.iter().skip(end).position(|(token, _)| self.ends_turn(*token)).map(|place| end + place);
        if let Some(place) = closing
            && let Some((_, bytes)) = tokens.get(place)
            && text.get(span.end.min(bytes.start)..bytes.start).is_some_and(|between| between.trim().is_empty())
        {
            end = place + 1;
        }
        if end <= first { Err("has no tokens") } else { Ok(first..end) }
    }

    /// True for a token that can end a turn.
    fn ends_turn(&self, token: u32) -> bool {
        self.eos.contains(&token) || self.tokenizer.is_special(token)
    }
}

fn answers(sample: &Sample) -> Vec<String> {
    sample.turns.iter().map(|turn| turn.assistant.clone()).collect()
}

/// A placeholder for an answer that does not occur in `whole`.
fn marker(number: usize, whole: &str) -> String {
    let mut salt = 0usize;
    loop {
        let marker = format!("answer{salt}x{number}marker");
        if !whole.contains(&marker) {
            return marker;
        }
        salt += 1;
    }
}
