//! A model's tokenizer: `tokenizer.json`, and the special tokens that the configs name.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::guard::guarded;

/// Converts text to token ids and back.
#[derive(Debug)]
pub(super) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    /// Special tokens by name, such as `bos_token`.
    pub tokens: Map<String, Value>,
    /// True when the tokenizer adds its own special tokens, such as a begin token, to a text.
    pub special_tokens: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// Errors: `Error::Invalid` when `tokenizer.json` is missing or one of them does not decode.
    pub fn open(bundle: &Bundle) -> Result<Self> {
        let subject = || format!("`{}`", bundle.root().join("tokenizer.json").display());
        let text = bundle.read_text("tokenizer.json")?.ok_or_else(|| {
            Error::invalid(format!("`{}`", bundle.root().display()), "has no tokenizer.json")
                .remedy("save the tokenizer in its fast form beside the model")
        })?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(text.as_bytes()))
            .and_then(|inner| inner.map_err(|e| e.to_string()))
            .map_err(|problem| {
                Error::invalid(subject(), format!("is not a tokenizer: {problem}"))
                    .remedy("restore `tokenizer.json` of the model, in the format of the `tokenizers` library")
            })?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::invalid(subject(), e.to_string()))?;
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let mut tokens = Map::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            if let Some(Value::Object(map)) = bundle.read_json(file)? {
                collect_tokens(&map, &mut tokens);
                if let Some(Value::Object(extra)) = map.get("extra_special_tokens") {
                    collect_tokens(extra, &mut tokens);
                }
            }
        }
        Ok(Tokenizer { inner, special, tokens, special_tokens: true })
    }

    /// The id of one token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids with which every text can be written: added tokens, such as those that end an answer, and tokens of one byte or character.
    pub fn essential(&self) -> BTreeSet<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let all = self.inner.get_vocab(true).into_iter();
        all.filter(|(token, id)| added.contains_key(id) || is_single(token)).map(|(_, id)| id).collect()
    }

    /// True for an added token that is marked special.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// A special token by its name in the configs, such as `eos_token`.
    pub fn named(&self, name: &str) -> Option<&str> {
        self.tokens.get(name).and_then(Value::as_str)
    }

    /// The token ids of a text. The tokenizer adds its own special tokens, such as a begin token, unless the text
    /// already starts with the begin token or `special_tokens` is false.
    ///
    /// Errors: `Error::Invalid` when the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, self.special_tokens && !self.begins(text)));
        let encoding = encoding.and_then(|encoding| encoding.map_err(|e| e.to_string()));
        encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|problem| Error::invalid("tokenizer", problem))
    }

    /// As `encode`, each id with its byte range in the text. The range is empty for a token that the tokenizer adds.
    ///
    /// Errors: as `encode`.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(|| self.inner.encode(text, self.special_tokens && !self.begins(text)));
        let encoding = encoding.and_then(|encoding| encoding.map_err(|e| e.to_string()));
        let encoding = encoding.map_err(|problem| Error::invalid("tokenizer", problem))?;
        let bytes = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(bytes).collect())
    }

    /// The begin token that the tokenizer puts before a text, or none.
    ///
    /// Errors: as `encode`.
    pub fn begin(&self) -> Result<Option<u32>> {
        let named = self.named("bos_token").and_then(|token| self.id(token));
        let first = self.encode("a")?.first().copied();
        Ok(named.filter(|&id| first == Some(id)))
    }

    /// True for a text that starts with the begin token.
    fn begins(&self, text: &str) -> bool {
        self.named("bos_token").is_some_and(|token| text.starts_with(token))
    }

    /// The text of token ids, without special tokens.
    ///
    /// Errors: `Error::Invalid` for a negative id, or when the tokenizer fails.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let ids: Result<Vec<u32>> = ids
            .iter()
            .map(|id| u32::try_from(*id).map_err(|_| Error::invalid("tokenizer", format!("{id} is not a token id"))))
            .collect();
        let ids = ids?;
        let text = guarded(|| self.inner.decode(&ids, true)).and_then(|text| text.map_err(|e| e.to_string()));
        text.map_err(|problem| Error::invalid("tokenizer", problem))
    }
}

/// True for a byte, as in `<0x0A>`, and for a character, alone or behind the mark of a word's begin or middle.
fn is_single(token: &str) -> bool {
    let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
    let behind = ["\u{2581}", "##"].iter().find_map(|mark| token.strip_prefix(mark)).filter(|rest| !rest.is_empty());
    is_byte || behind.unwrap_or(token).chars().count() == 1
}

/// Copies the entries whose name ends in `_token`, such as `"eos_token": "</s>"` or
/// `"eos_token": {"content": "</s>", ..}`.
fn collect_tokens(from: &Map<String, Value>, into: &mut Map<String, Value>) {
    for (name, value) in from {
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
        if let Some(text) = text.filter(|_| name.ends_with("_token")) {
            into.insert(name.clone(), text.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_bytes_and_characters_are_recognised_in_every_tokenizer_s_spelling() {
        for token in ["a", "\u{120}", "\u{4e2d}", "<0x0A>", "\u{2581}", "\u{2581}a", "##s"] {
            assert!(is_single(token), "{token}");
        }
        for token in ["", "ab", "<0x0A", "\u{2581}ab", "##es", "##", "\u{120}a"] {
            assert!(!is_single(token), "{token}");
        }
    }
}
