//! Running text: JSON lines with a `text` field, tokenised and cut into sequences of equal length.

use std::path::{Path, PathBuf};

use crate::base::{Error, MappedFile, Progress, Result};
use crate::bundle::Bundle;

use super::json_row::{TextLine, TextProblem};
use super::keys::unread;
use super::listing::{Listed, content_key};
use super::options::DataOptions;
use super::row::SourceRow;
use super::tokenizer::Tokenizer;

/// A `.jsonl` file of running text. Its token ids are in memory, four bytes each.
///
/// Each line is tokenised separately. The tokens of all lines are joined without a separator and cut into sequences of
/// `length` tokens. Where the model's tokenizer puts a begin token before a text, every sequence has one in its first
/// place, and no other: models that were trained with it predict badly without. The last sequence may be shorter. If it
/// has only one token it is left out, because one token predicts nothing.
#[derive(Debug)]
pub(super) struct TextFile {
    path: PathBuf,
    length: usize,
    ids: Vec<u32>,
    listed: Vec<Listed>,
}

impl TextFile {
    /// True for a `.jsonl` file whose first line that is not blank has a `text` and no conversation.
    ///
    /// Errors: `Error::Io` when it cannot be read.
    pub fn holds(path: &Path) -> Result<bool> {
        if path.extension().is_none_or(|extension| extension != "jsonl") || !path.is_file() {
            return Ok(false);
        }
        let map = MappedFile::open(path)?;
        Ok(lines(&map).next().is_some_and(|(_, line)| TextLine::is_one(line)))
    }

    /// Tokenises a file with the model's tokenizer.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a line without `text` (named in the message), a model without a
    /// tokenizer, or a sequence length below 2; `Error::Unsupported` names the keys that have content but no reader.
    pub fn open(path: &Path, bundle: &Bundle, options: &DataOptions) -> Result<Self> {
        let length = options.sequence_length;
        if length < 2 {
            return Err(Error::invalid("sequence length", format!("is {length}, expected at least 2"))
                .remedy("give `--sequence-length` a larger number"));
        }
        let tokenizer = Tokenizer::open(bundle)?;
        let map = MappedFile::open(path)?;
        let progress = Progress::new("tokenise", "bytes", map.len() as u64);
        let begin = tokenizer.begin()?;
        let mut ids = Vec::new();
        for (number, line) in lines(&map) {
            let subject = || format!("line {} of `{}`", number + 1, path.display());
            let text = TextLine::parse(line, options).map_err(|problem| match problem {
                TextProblem::Bad(problem) => {
                    Error::invalid(subject(), problem).remedy("expected an object with `text`")
                }
                TextProblem::Unread(keys) => unread(subject(), &keys),
            })?;
            let tokens = tokenizer.encode(&text).map_err(|error| Error::invalid(subject(), error.to_string()))?;
            for token in &tokens[usize::from(begin.is_some() && tokens.first() == begin.as_ref())..] {
                if ids.len().is_multiple_of(length) {
                    ids.extend(begin);
                }
                ids.push(*token);
            }
            progress.advance(line.len() as u64 + 1);
        }
        let sequences = ids.chunks(length).filter(|sequence| sequence.len() > 1).enumerate();
        let subject = format!("`{}`", path.display());
        let listed = sequences.map(|(row, sequence)| {
            let bytes: Vec<u8> = sequence.iter().flat_map(|token: &u32| token.to_le_bytes()).collect();
            Listed::new(&subject, row, 1, content_key(&[bytes]))
        });
        let listed = listed.collect::<Result<_>>()?;
        Ok(TextFile { path: path.to_path_buf(), length, listed, ids })
    }

    /// Moves the list of sequences out of the reader.
    pub fn take_listed(&mut self) -> Vec<Listed> {
        std::mem::take(&mut self.listed)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens in every sequence except the last.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Reads the sequences with these indices, in the given order.
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
    use crate::data::{DataOptions, Dataset, Processor};

    fn cut(sequence_length: usize) -> DataOptions {
        DataOptions { sequence_length, ..DataOptions::default() }
    }

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
    fn texts_are_joined_and_cut_into_sequences_with_a_loss_on_every_token() {
        let bundle = bundle();
        let (_folder, path) = written("{\"text\": \"the cat sat \", \"page\": 3}\n\n{\"text\": \"on the mat\"}\n");
        let tokenizer = Tokenizer::open(&bundle).unwrap();
        let mut want = tokenizer.encode("the cat sat ").unwrap();
        want.extend(tokenizer.encode("on the mat").unwrap());
        let dataset = Dataset::open_for(&path, &bundle, &cut(4)).unwrap();
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
        // One token alone predicts nothing.
        want.truncate(want.len() - usize::from(rest == 1));
        assert_eq!(found, want.into_iter().map(i64::from).collect::<Vec<_>>());
    }

    #[test]
    fn every_sequence_has_the_begin_token_that_the_tokenizer_puts_before_a_text() {
        let (folder, path) = written("{\"text\": \"the cat sat\"}\n{\"text\": \"on the mat\"}\n");
        let plain = Tokenizer::open(&bundle()).unwrap();
        let words = [plain.encode("the cat sat").unwrap(), plain.encode("on the mat").unwrap()].concat();
        let begin = plain.id("<s>").unwrap();
        // The same model, whose tokenizer puts a begin token before each text.
        let (from, model) = (bundle().root().to_path_buf(), folder.path().join("model"));
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.onnx", "special_tokens_map.json", "tokenizer_config.json"] {
            fs::copy(from.join(name), model.join(name)).unwrap();
        }
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(from.join("tokenizer.json")).unwrap()).unwrap();
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
        });
        fs::write(model.join("tokenizer.json"), json.to_string()).unwrap();
        let mut file = TextFile::open(&path, &Bundle::open(&model).unwrap(), &cut(4)).unwrap();
        let want: Vec<u32> = words.chunks(3).flat_map(|words| [&[begin], words].concat()).collect();
        assert_eq!(file.ids, want);
        assert_eq!(file.take_listed().len(), words.len().div_ceil(3));
    }

    #[test]
    fn the_sequence_length_is_part_of_the_digest() {
        let (_folder, path) = written("{\"text\": \"the cat sat on the mat\"}\n");
        let digest = |length| Dataset::open_for(&path, &bundle(), &cut(length)).unwrap().digest().unwrap();
        assert_eq!(digest(4), digest(4));
        assert_ne!(digest(4), digest(5));
    }

    #[test]
    fn malformed_text_files_are_refused_with_a_reason() {
        let bundle = bundle();
        let open = |text: &str, length| {
            let (_folder, path) = written(text);
            Dataset::open_for(&path, &bundle, &cut(length)).unwrap_err().to_string()
        };
        assert!(open("{\"text\": \"a b c\", \"image\": \"x.png\"}\n", 4).contains("without a reader: `image`"));
        assert!(open("{\"text\": \"a b c\"}\n{\"body\": \"d\"}\n", 4).contains("line 2 of"));
        assert!(open("{\"text\": 7}\n", 4).contains("line 1 of"));
        assert!(open("{\"text\": \"\"}\n", 4).contains("is empty"));
        assert!(open("{\"text\": \"a b c\"}\n", 1).contains("sequence length"));
        let (_folder, path) = written("{\"text\": \"a b c\"}\n");
        assert!(Dataset::open(&path, &DataOptions::default()).unwrap_err().to_string().contains("running text"));
    }
}
