//! Data sets of conversations, running text or ready tensors. The extensions and the content of the files determine the
//! reader.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result, Sha256Digest, sha256_file, sha256_json};
use crate::bundle::Bundle;

use super::data_files::{DataFile, data_files};
use super::json::JsonFile;
use super::listing::Listed;
use super::options::{DataOptions, DataPart, Turns};
use super::parquet::Shard;
use super::part_key::part_keys;
use super::row::SourceRow;
use super::sample::Sample;
use super::subset::{Subset, mix};
use super::tensors::{GraphInputs, TensorFile, is_tensor_file};
use super::text::TextFile;

/// Salt of the hash that assigns rows to parts. It makes that hash independent of the ranks in a draw, so that
/// both parts have samples of all ranks.
const PART_SALT: u64 = 0x6865_6c64_5f62_616b;

/// A data set: parquet or JSON files of conversations, a `.jsonl` file of running text, or files of ready tensors.
#[derive(Debug)]
pub struct Dataset {
    /// File, folder or pattern as given by the user.
    path: PathBuf,
    /// Readers by file name. The names are part of the digest.
    readers: Vec<(String, RowReader)>,
    /// Position of each sample in the files.
    places: Vec<SamplePlace>,
    /// Content key of each sample; determines its rank in a draw.
    keys: Vec<u64>,
    options: DataOptions,
}

/// Position of a sample: the reader, the row in its file, and the turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SamplePlace {
    reader: u32,
    row: u32,
    /// The turn, if each turn is a sample; `None` for the whole row.
    turn: Option<u32>,
}

impl Dataset {
    /// Opens a data set of conversations: a file, a folder of files, or a pattern such as `data/*/train-*.parquet`.
    /// Pictures are read only where a part of the rows is asked for, which their bytes decide.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a path that is none of these, a file that does not decode, a set
    /// without samples, ready tensors, or running text (see [`Dataset::open_for`]); `Error::Unsupported` names the keys
    /// that have content but no reader.
    pub fn open(path: &Path, options: &DataOptions) -> Result<Self> {
        if TextFile::holds(path)? {
            return Err(Error::invalid(format!("data `{}`", path.display()), "holds running text")
                .remedy("expected conversations in parquet or JSON files"));
        }
        let mut readers = Vec::new();
        for DataFile { path, name } in data_files(path)? {
            if is_tensor_file(&path) {
                return Err(Error::invalid(format!("data `{}`", path.display()), "holds ready tensors")
                    .remedy("expected conversations in parquet or JSON files"));
            }
            let is_parquet = path.extension().is_some_and(|extension| extension == "parquet");
            let reader = if is_parquet {
                RowReader::Parquet(Shard::open(&path, &name, options)?)
            } else {
                RowReader::Json(JsonFile::open(&path, &name, options)?)
            };
            readers.push((name, reader));
        }
        Dataset::new(path, readers, options)
    }

    /// Opens a data set of any kind for a model. Running text is cut into token sequences with the model's tokenizer;
    /// the last sequence may be shorter. Each row of ready tensors is a sample.
    ///
    /// Errors: as [`Dataset::open`]; `Error::Invalid` for a line without text, a model without a tokenizer, a mix of
    /// tensor files and other files, or tensors that do not match the inputs of the model's graphs.
    pub fn open_for(path: &Path, bundle: &Bundle, options: &DataOptions) -> Result<Self> {
        if TextFile::holds(path)? {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let text = TextFile::open(path, bundle, options)?;
            return Dataset::new(path, vec![(name, RowReader::Text(text))], options);
        }
        let files = data_files(path)?;
        if files.iter().any(|file| is_tensor_file(&file.path)) {
            if let Some(other) = files.iter().find(|file| !is_tensor_file(&file.path)) {
                let problem = format!("holds ready tensors, and `{}`, which holds none", other.name);
                return Err(Error::invalid(format!("data `{}`", path.display()), problem)
                    .remedy("name the files of one kind by a pattern, such as `data/*.safetensors`"));
            }
            let graphs = GraphInputs::of(bundle)?;
            let open = |file: DataFile| {
                let reader = TensorFile::open(&file.path, &file.name, bundle, &graphs)?;
                Ok((file.name, RowReader::Tensors(reader)))
            };
            return Dataset::new(path, files.into_iter().map(open).collect::<Result<_>>()?, options);
        }
        Dataset::open(path, options)
    }

    /// True when the samples are rows of ready tensors.
    pub fn holds_tensors(&self) -> bool {
        self.readers.iter().any(|(_, reader)| matches!(reader, RowReader::Tensors(_)))
    }

    /// True when the samples are sequences of running text.
    pub fn holds_text(&self) -> bool {
        self.readers.iter().any(|(_, reader)| matches!(reader, RowReader::Text(_)))
    }

    /// True when `path` names files of ready tensors.
    pub fn is_tensors(path: &Path) -> bool {
        data_files(path).is_ok_and(|files| files.iter().any(|file| is_tensor_file(&file.path)))
    }

    fn new(path: &Path, mut readers: Vec<(String, RowReader)>, options: &DataOptions) -> Result<Self> {
        let subject = || format!("data `{}`", path.display());
        let (mut places, mut keys) = (Vec::new(), Vec::new());
        for (number, (_, reader)) in (0u32..).zip(&mut readers) {
            let separate =
                options.turns == Turns::Separate && !matches!(reader, RowReader::Text(_) | RowReader::Tensors(_));
            for Listed { row, turns, key } in reader.take_part(options.part) {
                if separate {
                    places.extend((0..turns).map(|turn| SamplePlace { reader: number, row, turn: Some(turn) }));
                    keys.extend((0..turns).map(|turn| mix(key ^ mix(u64::from(turn)))));
                } else {
                    places.push(SamplePlace { reader: number, row, turn: None });
                    keys.push(key);
                }
            }
        }
        tell_apart(&mut keys);
        if places.is_empty() {
            let problem = match (options.min_ratings.is_empty(), options.part) {
                (true, DataPart::All) => "is empty",
                (false, DataPart::All) => "has no row that reaches the ratings",
                (_, DataPart::Train(_)) => "has no row that is not held back",
                (_, DataPart::HeldBack(_)) => "has no row that is held back",
            };
            return Err(Error::invalid(subject(), problem).remedy("give data with at least one sample"));
        }
        Ok(Dataset { path: path.to_path_buf(), readers, places, keys, options: options.clone() })
    }

    /// The file, folder or pattern.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Options with which the data set was opened.
    pub fn options(&self) -> &DataOptions {
        &self.options
    }

    /// Number of samples, at least one.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Always false: an empty set does not open.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Indices of the samples of a subset, in the order of the draw. The draw depends on the content of the rows (id
    /// and text), and not on the names of the files or the order of files and rows.
    ///
    /// Errors: as `Subset::indices`.
    pub fn draw(&self, subset: Subset) -> Result<Vec<usize>> {
        subset.indices(&self.keys)
    }

    /// Reads the samples with these indices, which may be in any order; duplicates are read once. The iterator yields
    /// the samples in ascending order and reads one row group at a time. `Sample::index` identifies each sample.
    ///
    /// Errors: `Error::Invalid` for an index that does not exist. Each item: `Error::Invalid` or `Error::Io` that names
    /// the row.
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

    /// SHA-256 over all files and over the options that determine the samples.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        let mut digests = BTreeMap::new();
        for (name, reader) in &self.readers {
            let digest = sha256_file(reader.path())?;
            // The sequence length determines the samples of running text. The tokenizer belongs to the model and is not
            // part of the digest.
            digests.insert(
                name,
                match reader {
                    RowReader::Text(text) => sha256_json(&(digest, text.length()))?,
                    _ => sha256_json(&(digest, self.options.turns, &self.options.min_ratings))?,
                },
            );
        }
        match self.options.part {
            DataPart::All => sha256_json(&digests),
            part => sha256_json(&(digests, part)),
        }
    }
}

/// Reader of one file's rows.
#[derive(Debug)]
enum RowReader {
    Parquet(Shard),
    Json(JsonFile),
    Text(TextFile),
    Tensors(TensorFile),
}

impl RowReader {
    fn path(&self) -> &Path {
        match self {
            RowReader::Parquet(shard) => shard.path(),
            RowReader::Json(file) => file.path(),
            RowReader::Text(text) => text.path(),
            RowReader::Tensors(file) => file.path(),
        }
    }

    fn take_listed(&mut self) -> Vec<Listed> {
        match self {
            RowReader::Parquet(shard) => shard.take_listed(),
            RowReader::Json(file) => file.take_listed(),
            RowReader::Text(text) => text.take_listed(),
            RowReader::Tensors(file) => file.take_listed(),
        }
    }

    /// Moves the list of the rows in this part out of the reader.
    fn take_part(&mut self, part: DataPart) -> Vec<Listed> {
        let mut listed = self.take_listed();
        if part.is_all() {
            return listed;
        }
        let keys: Vec<u64> = match self {
            RowReader::Parquet(_) | RowReader::Json(_) => {
                let rows = listed.iter().map(|entry| entry.row as usize).collect();
                part_keys(&listed, self.read(rows))
            }
            RowReader::Text(_) | RowReader::Tensors(_) => listed.iter().map(|entry| entry.key).collect(),
        };
        let mut keys = keys.into_iter();
        listed.retain(|_| keys.next().is_some_and(|key| part.has(mix(key ^ PART_SALT))));
        listed
    }

    fn read(&self, rows: Vec<usize>) -> SourceRows<'_> {
        match self {
            RowReader::Parquet(shard) => Box::new(shard.read(rows)),
            RowReader::Json(file) => Box::new(file.read(rows)),
            RowReader::Text(text) => Box::new(text.read(rows)),
            RowReader::Tensors(file) => Box::new(file.read(rows)),
        }
    }
}

/// Rehashes each key with its number of earlier occurrences, so that samples with the same content have different keys.
fn tell_apart(keys: &mut [u64]) {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_unstable_by_key(|&index| (keys[index], index));
    let (mut previous, mut repeated) = (None, 0u64);
    for index in order {
        let key = keys[index];
        repeated = if previous == Some(key) { repeated + 1 } else { 0 };
        previous = Some(key);
        keys[index] = mix(key ^ mix(repeated));
    }
}

/// Rows of one file, read lazily.
type SourceRows<'a> = Box<dyn Iterator<Item = Result<SourceRow>> + 'a>;

/// Requested samples of one row: the index and the turn of each.
type Wanted = Vec<(usize, Option<u32>)>;

/// Iterator over samples of a [`Dataset`], in ascending order of index.
pub struct Samples<'a> {
    dataset: &'a Dataset,
    wanted: Vec<usize>,
    position: usize,
    rows: SourceRows<'a>,
    /// Requested samples of each of `rows`.
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
                    Err(Error::invalid("data", "has fewer rows than were listed").remedy("write the files again"))
                });
                self.ready = samples_of(row, &group).into_iter();
                continue;
            }
            if !self.next_reader() {
                return None;
            }
        }
    }
}

impl Samples<'_> {
    /// Opens the next file with requested samples. Returns false when there is none.
    fn next_reader(&mut self) -> bool {
        let place = |index: &usize| self.dataset.places.get(*index).copied();
        let Some(first) = self.wanted.get(self.position).and_then(place) else { return false };
        let Some((_, reader)) = self.dataset.readers.get(first.reader as usize) else { return false };
        let mut rows: Vec<usize> = Vec::new();
        let mut groups: Vec<Wanted> = Vec::new();
        while let Some(&index) = self.wanted.get(self.position) {
            let Some(here) = place(&index).filter(|here| here.reader == first.reader) else { break };
            if rows.last() != Some(&(here.row as usize)) {
                rows.push(here.row as usize);
                groups.push(Vec::new());
            }
            if let Some(group) = groups.last_mut() {
                group.push((index, here.turn));
            }
            self.position += 1;
        }
        self.rows = reader.read(rows);
        self.groups = groups.into_iter();
        true
    }
}

/// The samples of one row. An error of the row is repeated for each of its samples.
fn samples_of(row: Result<SourceRow>, places: &[(usize, Option<u32>)]) -> Vec<Result<Sample>> {
    let row = match row {
        Ok(row) => row,
        Err(error) => {
            let text = error.to_string();
            let again = places.iter().skip(1).map(|_| Err(Error::invalid("data", &text)));
            return std::iter::once(Err(error)).chain(again).collect();
        }
    };
    let sample = |&(index, turn): &(usize, Option<u32>)| match turn {
        Some(turn) => row
            .turn(index, turn as usize)
            .ok_or_else(|| Error::invalid(&row.subject, format!("has no turn {turn}, which was counted before"))),
        None => Ok(row.sample(index)),
    };
    places.iter().map(sample).collect()
}
