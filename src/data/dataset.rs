//! Sets of conversations about pictures and of running text, opened by what the path holds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result, Sha256Digest, sha256_file, sha256_json};
use crate::bundle::Bundle;

use super::finevision::Shard;
use super::llava::Conversations;
use super::row::SourceRow;
use super::sample::Sample;
use super::text::TextFile;

/// What several question and answer pairs about the same pictures are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Texts {
    /// Turns of one conversation: one sample.
    Conversation,
    /// Questions that do not know of each other: a sample each, with the same pictures.
    #[default]
    Separate,
}

#[derive(Debug)]
enum Source {
    Parquet(Shard),
    Llava(Conversations),
    Text(TextFile),
}

impl Source {
    fn path(&self) -> &Path {
        match self {
            Source::Parquet(shard) => shard.path(),
            Source::Llava(conversations) => conversations.path(),
            Source::Text(text) => text.path(),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Source::Parquet(shard) => shard.rows(),
            Source::Llava(conversations) => conversations.rows(),
            Source::Text(text) => text.sequences(),
        }
    }

    fn texts_per_row(&self) -> Result<Vec<usize>> {
        match self {
            Source::Parquet(shard) => shard.texts_per_row(),
            Source::Llava(conversations) => Ok(conversations.turns()),
            Source::Text(text) => Ok(vec![1; text.sequences()]),
        }
    }

    fn read(&self, rows: Vec<usize>) -> Rows<'_> {
        match self {
            Source::Parquet(shard) => Box::new(shard.read(rows)),
            Source::Llava(conversations) => Box::new(conversations.read(rows)),
            Source::Text(text) => Box::new(text.read(rows)),
        }
    }
}

/// A data set: a FineVision parquet file, a folder of such shards, a LLaVA `.json` / `.jsonl` file, or a `.jsonl` file
/// of running text.
#[derive(Debug)]
pub struct Dataset {
    sources: Vec<Source>,
    /// For each sample: source, row, and the pair in it (with `Texts::Separate`).
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    source: u32,
    row: u32,
    pair: Option<u32>,
}

impl Dataset {
    /// Opens a set of conversations without reading pictures.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a path that is none of these, a file that does not decode, a set
    /// without samples, or running text, which only a model's tokenizer cuts into samples.
    pub fn open(path: &Path, texts: Texts) -> Result<Self> {
        if TextFile::holds(path)? {
            return Err(Error::invalid(format!("data `{}`", path.display()), "holds running text")
                .remedy("expected conversations: parquet in the FineVision layout, or LLaVA's JSON"));
        }
        Dataset::new(path, conversations(path)?, texts)
    }

    /// Opens a set of any kind for a model: running text becomes sequences of `sequence_length` tokens of the model's
    /// tokenizer, the last one maybe shorter; questions about the same pictures are samples of their own.
    ///
    /// Errors: as `open`, and `Error::Invalid` for a line without text or a model without tokenizer.
    pub fn open_for(path: &Path, bundle: &Bundle, sequence_length: usize) -> Result<Self> {
        if TextFile::holds(path)? {
            let text = TextFile::open(path, bundle, sequence_length)?;
            return Dataset::new(path, vec![Source::Text(text)], Texts::Separate);
        }
        Dataset::open(path, Texts::default())
    }

    /// True for a file of running text.
    ///
    /// Errors: `Error::Io` when it cannot be read.
    pub fn is_text(path: &Path) -> Result<bool> {
        TextFile::holds(path)
    }

    fn new(path: &Path, sources: Vec<Source>, texts: Texts) -> Result<Self> {
        let mut places = Vec::new();
        for (number, source) in sources.iter().enumerate() {
            let narrow = |value: usize| {
                u32::try_from(value)
                    .map_err(|_| Error::invalid(format!("`{}`", source.path().display()), "has too many rows"))
            };
            let number = narrow(number)?;
            match texts {
                Texts::Conversation => {
                    for row in 0..source.rows() {
                        places.push(Place { source: number, row: narrow(row)?, pair: None });
                    }
                }
                Texts::Separate => {
                    for (row, count) in source.texts_per_row()?.into_iter().enumerate() {
                        for pair in 0..count {
                            places.push(Place { source: number, row: narrow(row)?, pair: Some(narrow(pair)?) });
                        }
                    }
                }
            }
        }
        if places.is_empty() {
            return Err(Error::invalid(format!("data `{}`", path.display()), "is empty")
                .remedy("give data with at least one sample"));
        }
        Ok(Dataset { sources, places })
    }

    /// Number of samples, at least one.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Always false: an empty set does not open.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The samples with these indices (in any order, each once), read in ascending order, row group by row group;
    /// `Sample::index` says which is which.
    ///
    /// Errors: `Error::Invalid` for an index that does not exist; each item: `Error::Invalid` naming the row.
    pub fn read(&self, indices: &[usize]) -> Result<Samples<'_>> {
        let mut wanted = indices.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        if let Some(index) = wanted.iter().find(|index| **index >= self.places.len()) {
            return Err(Error::invalid(
                "data",
                format!("sample {index} does not exist, there are {}", self.places.len()),
            ));
        }
        Ok(Samples {
            dataset: self,
            wanted,
            position: 0,
            rows: Box::new(std::iter::empty()),
            groups: Vec::new().into_iter(),
            ready: Vec::new().into_iter(),
        })
    }

    /// One digest over all files.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        let mut digests = BTreeMap::new();
        for source in &self.sources {
            let name = source.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let digest = sha256_file(source.path())?;
            // How running text is cut decides its samples; the tokenizer is the model's.
            digests.insert(
                name,
                match source {
                    Source::Text(text) => sha256_json(&(digest, text.length()))?,
                    _ => digest,
                },
            );
        }
        sha256_json(&digests)
    }
}

/// Rows of one source, read as they are asked for.
type Rows<'a> = Box<dyn Iterator<Item = Result<SourceRow>> + 'a>;

/// The samples that a row makes: their indices, and the pair that each takes of it.
type Wanted = Vec<(usize, Option<u32>)>;

/// Samples of a [`Dataset`] in ascending order.
pub struct Samples<'a> {
    dataset: &'a Dataset,
    wanted: Vec<usize>,
    position: usize,
    rows: Rows<'a>,
    /// What each of `rows` makes.
    groups: std::vec::IntoIter<Wanted>,
    ready: std::vec::IntoIter<Result<Sample>>,
}

impl Iterator for Samples<'_> {
    type Item = Result<Sample>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(sample) = self.ready.next() {
                return Some(sample);
            }
            if let Some(group) = self.groups.next() {
                let row = self.rows.next().unwrap_or_else(|| {
                    Err(Error::invalid("data", "ends before the last row that its footer promises"))
                });
                self.ready = samples_of(row, &group).into_iter();
                continue;
            }
            if !self.next_source() {
                return None;
            }
        }
    }
}

impl Samples<'_> {
    /// Begins the next source that has wanted samples; false when there is none.
    fn next_source(&mut self) -> bool {
        let place = |index: &usize| self.dataset.places.get(*index).copied();
        let Some(first) = self.wanted.get(self.position).and_then(place) else { return false };
        let Some(source) = self.dataset.sources.get(first.source as usize) else { return false };
        let mut rows: Vec<usize> = Vec::new();
        let mut groups: Vec<Wanted> = Vec::new();
        while let Some(&index) = self.wanted.get(self.position) {
            let Some(here) = place(&index).filter(|here| here.source == first.source) else { break };
            if rows.last() != Some(&(here.row as usize)) {
                rows.push(here.row as usize);
                groups.push(Vec::new());
            }
            if let Some(group) = groups.last_mut() {
                group.push((index, here.pair));
            }
            self.position += 1;
        }
        self.rows = source.read(rows);
        self.groups = groups.into_iter();
        true
    }
}

fn samples_of(row: Result<SourceRow>, places: &[(usize, Option<u32>)]) -> Vec<Result<Sample>> {
    let row = match row {
        Ok(row) => row,
        Err(error) => return vec![Err(error)],
    };
    let sample = |&(index, turn): &(usize, Option<u32>)| match turn {
        Some(turn) if row.text.is_none() => row
            .turn(index, turn as usize)
            .ok_or_else(|| Error::invalid(&row.subject, format!("has no turn {turn}, which was counted before"))),
        _ => Ok(row.sample(index)),
    };
    places.iter().map(sample).collect()
}

/// The sources of a set of conversations.
fn conversations(path: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for file in files(path)? {
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        sources.push(match extension {
            "parquet" => Source::Parquet(Shard::open(&file)?),
            "json" | "jsonl" => Source::Llava(Conversations::open(&file)?),
            _ => {
                return Err(Error::invalid(format!("data `{}`", path.display()), "is no data set that is known")
                    .remedy(
                        "expected a FineVision .parquet file or a folder of them, or a LLaVA .json or .jsonl file",
                    ));
            }
        });
    }
    Ok(sources)
}

/// The file itself, or a folder's parquet shards in name order.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if !metadata.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| Error::io("read", path, e))? {
        let file = entry.map_err(|e| Error::io("read", path, e))?.path();
        if file.extension().is_some_and(|extension| extension == "parquet") {
            shards.push(file);
        }
    }
    if shards.is_empty() {
        return Err(Error::invalid(format!("data `{}`", path.display()), "is a folder without .parquet files"));
    }
    shards.sort();
    Ok(shards)
}
