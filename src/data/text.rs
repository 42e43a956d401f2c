//! Running text: JSON lines with a `text` field, tokenised and cut into sequences of one length.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::base::{Error, MappedFile, Progress, Result};
use crate::bundle::Bundle;

use super::row::SourceRow;
use super::tokenizer::Tokenizer;

/// Tokens in a sequence of running text, unless the user says otherwise.
pub const SEQUENCE_LENGTH: usize = 512;

/// A `.jsonl` file whose lines hold a `text`; its token ids are held, four bytes each.
///
/// Every line is tokenised by itself, with the begin token where the model's tokenizer adds one. The lines' tokens
/// stand one after another, nothing between them, and are cut every `length` tokens. The last sequence may be shorter;
/// it is left out when it has one token only, which predicts nothing.
#[derive(Debug)]
pub(super) struct TextFile {
    path: PathBuf,
    length: usize,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

/// What a line of a `.jsonl` file has, whatever it holds.
#[derive(Deserialize)]
struct Keys {
    #[serde(default)]
    text: Option<IgnoredAny>,
    #[serde(default)]
    conversations: Option<IgnoredAny>,
}

impl TextFile {
    /// True for a `.jsonl` file whose first line has a `text` and no `conversations`.
    ///
    /// Errors: `Error::Io` when it cannot be read.
    pub fn holds(path: &Path) -> Result<bool> {
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            return Ok(false);
        }
        let map = MappedFile::open(path)?;
        let first = lines(&map).next().and_then(|(_, line)| serde_json::from_slice::<Keys>(line).ok());
        Ok(first.is_some_and(|keys| keys.text.is_some() && keys.conversations.is_none()))
    }

    /// Tokenises the file as the model does.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` naming the line that has no `text`, or when the model has no tokenizer.
    pub fn open(path: &Path, bundle: &Bundle, length: usize) -> Result<Self> {
        if length < 2 {
            return Err(Error::invalid("sequence length", format!("is {length}, expected at least 2")));
        }
        let tokenizer = Tokenizer::open(bundle)?;
        let map = MappedFile::open(path)?;
        let progress = Progress::new("tokenise", "lines", lines(&map).count() as u64);
        let mut ids = Vec::new();
        for (number, line) in lines(&map) {
            let subject = || format!("line {} of `{}`", number + 1, path.display());
            let line: Line = serde_json::from_slice(line).map_err(|e| {
                Error::invalid(subject(), format!("does not decode: {e}")).remedy("expected an object with `text`")
            })?;
            let tokens = tokenizer.encode(&line.text);
            ids.extend(tokens.map_err(|error| Error::invalid(subject(), error.to_string()))?);
            progress.advance(1);
        }
        Ok(TextFile { path: path.to_path_buf(), length, ids })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens in every sequence but the last.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.ids.len() / self.length + usize::from(self.ids.len() % self.length > 1)
    }

    /// The sequences with these indices.
    pub fn read(&self, sequences: Vec<usize>) -> impl Iterator<Item = Result<SourceRow>> + '_ {
        sequences.into_iter().map(|sequence| {
            let subject = format!("sequence {sequence} of `{}`", self.path.display());
            let ids = self.ids.chunks(self.length).nth(sequence);
            let ids = ids.ok_or_else(|| Error::invalid(&subject, "does not exist"))?;
            Ok(SourceRow::of_text(subject, ids.iter().map(|&token| i64::from(token)).collect()))
        })
    }
}

/// Lines that are not blank, with their numbers from 0.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::{Dataset, Processor, Texts};

    fn bundle() -> Bundle {
        Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/optimum/llama-with-past")).unwrap()
    }

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.jsonl");
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn texts_are_joined_and_cut_and_every_token_counts() {
        let bundle = bundle();
        let (_folder, path) = written("{\"text\": \"the cat sat \", \"page\": 3}\n\n{\"text\": \"on the mat\"}\n");
        let tokenizer = Tokenizer::open(&bundle).unwrap();
        let mut want = tokenizer.encode("the cat sat ").unwrap();
        want.extend(tokenizer.encode("on the mat").unwrap());
        let dataset = Dataset::open_for(&path, &bundle, 4).unwrap();
        let rest = want.len() % 4;
        assert_eq!(dataset.len(), want.len() / 4 + usize::from(rest > 1));
        let processor = Processor::open(&bundle).unwrap();
        let all: Vec<usize> = (0..dataset.len()).collect();
        let mut found = Vec::new();
        for sample in dataset.read(&all).unwrap() {
            let encoded = processor.encode_conversation(&sample.unwrap()).unwrap();
            assert!(encoded.answer_mask.iter().all(|&answer| answer) && encoded.len() <= 4);
            found.extend(encoded.input_ids);
        }
        want.truncate(found.len());
        assert_eq!(found, want.into_iter().map(i64::from).collect::<Vec<_>>());
    }

    #[test]
    fn the_length_of_sequences_is_part_of_the_digest() {
        let (_folder, path) = written("{\"text\": \"the cat sat on the mat\"}\n");
        let digest = |length| Dataset::open_for(&path, &bundle(), length).unwrap().digest().unwrap();
        assert_eq!(digest(4), digest(4));
        assert_ne!(digest(4), digest(5));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let bundle = bundle();
        let open = |text: &str, length| {
            let (_folder, path) = written(text);
            Dataset::open_for(&path, &bundle, length).unwrap_err().to_string()
        };
        assert!(open("{\"text\": \"a b c\"}\n{\"body\": \"d\"}\n", 4).contains("line 2 of"));
        assert!(open("{\"text\": 7}\n", 4).contains("line 1 of"));
        assert!(open("{\"text\": \"\"}\n", 4).contains("is empty"));
        assert!(open("{\"text\": \"a b c\"}\n", 1).contains("sequence length"));
        let (_folder, path) = written("{\"text\": \"a b c\"}\n");
        assert!(Dataset::open(&path, Texts::default()).unwrap_err().to_string().contains("running text"));
    }
}
