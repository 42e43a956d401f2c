//! LLaVA's JSON layout: a list (or one object per line) of `image` and `conversations`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::base::{Error, MappedFile, Result, contained_path};

use super::row::{RawMessage, SourceRow, Speaker};
use super::sample::ImageBytes;

/// A `.json` or `.jsonl` file; `image` paths are relative to its folder. The texts are held, the pictures are not.
#[derive(Debug)]
pub(super) struct Conversations {
    path: PathBuf,
    entries: Vec<(Vec<String>, Pairs)>,
}

/// Questions and answers.
type Pairs = Vec<(String, String)>;

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    image: Option<Images>,
    conversations: Vec<Message>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Images {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Message {
    from: String,
    value: String,
}

impl Conversations {
    /// Reads the texts; pictures are not touched.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` naming the entry that is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let is_list = map.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
        let entries: Vec<Entry> = if is_list {
            serde_json::from_slice(&map).map_err(|e| malformed(format!("`{}`", path.display()), &e))?
        } else {
            let lines = map.split(|byte| *byte == b'\n').enumerate();
            let lines = lines.filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace));
            let parse = |(number, line)| {
                serde_json::from_slice(line)
                    .map_err(|e| malformed(format!("line {} of `{}`", number + 1, path.display()), &e))
            };
            lines.map(parse).collect::<Result<_>>()?
        };
        let mut conversations = Conversations { path: path.to_path_buf(), entries: Vec::new() };
        for (row, entry) in entries.into_iter().enumerate() {
            let pairs = conversations.pairs(entry.conversations, row)?;
            let images = match entry.image {
                None => Vec::new(),
                Some(Images::One(name)) => vec![name],
                Some(Images::Many(names)) => names,
            };
            conversations.entries.push((images, pairs));
        }
        Ok(conversations)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rows(&self) -> usize {
        self.entries.len()
    }

    /// Question and answer pairs of each row.
    pub fn turns(&self) -> Vec<usize> {
        self.entries.iter().map(|(_, pairs)| pairs.len()).collect()
    }

    /// The rows with these indices.
    pub fn read(&self, rows: Vec<usize>) -> impl Iterator<Item = Result<SourceRow>> + '_ {
        rows.into_iter().map(|row| {
            let subject = self.subject(row);
            let (names, pairs) = self.entries.get(row).ok_or_else(|| Error::invalid(&subject, "does not exist"))?;
            let folder = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut images = Vec::new();
            for name in names {
                images.push(ImageBytes::file(format!("image `{name}` of {subject}"), contained_path(folder, name)?));
            }
            let messages = pairs.iter().flat_map(|(question, answer)| {
                [
                    RawMessage::text(Speaker::User, question.clone()),
                    RawMessage::text(Speaker::Assistant, answer.clone()),
                ]
            });
            SourceRow::of_messages(subject.clone(), images, messages.collect())
                .map_err(|problem| Error::invalid(subject, problem))
        })
    }

    fn subject(&self, row: usize) -> String {
        format!("entry {row} of `{}`", self.path.display())
    }

    fn pairs(&self, messages: Vec<Message>, row: usize) -> Result<Pairs> {
        let mut pairs = Vec::new();
        let mut messages = messages.into_iter();
        while let Some(question) = messages.next() {
            let answer = messages.next();
            let roles = (question.from.as_str(), answer.as_ref().map(|message| message.from.as_str()));
            let (("human" | "user", Some("gpt" | "assistant")), Some(answer)) = (roles, &answer) else {
                return Err(Error::invalid(
                    self.subject(row),
                    format!(
                        "turn {} is from `{}` then `{}`, expected human then gpt",
                        pairs.len(),
                        roles.0,
                        roles.1.unwrap_or("nobody")
                    ),
                ));
            };
            pairs.push((question.value, answer.value.clone()));
        }
        if pairs.is_empty() {
            return Err(Error::invalid(self.subject(row), "has no conversation"));
        }
        Ok(pairs)
    }
}

fn malformed(subject: String, error: &serde_json::Error) -> Error {
    Error::invalid(subject, format!("does not decode: {error}"))
        .remedy("expected `image` and `conversations` with `from` (human or gpt) and `value`")
}
