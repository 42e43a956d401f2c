//! Sets of conversations about pictures and of running text; the path's content decides the reader.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result, Sha256Digest, sha256_file, sha256_json};
use crate::bundle::Bundle;

use super::data_files::{DataFile, data_files};
use super::json::JsonFile;
use super::listing::Listed;
use super::options::{DataOptions, DataPart, Turns};
use super::parquet::Shard;
use super::row::SourceRow;
use super::sample::Sample;
use super::subset::{Subset, mix};
use super::tensors::{GraphInputs, TensorFile, is_tensor_file};
use super::text::TextFile;

/// Tells the hash that parts a data set from the one that draws samples.
const PART_SALT: u64 = 0x6865_6c64_5f62_616b;

/// Rows of one file.
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

    fn read(&self, rows: Vec<usize>) -> SourceRows<'_> {
        match self {
            RowReader::Parquet(shard) => Box::new(shard.read(rows)),
            RowReader::Json(file) => Box::new(file.read(rows)),
            RowReader::Text(text) => Box::new(text.read(rows)),
            RowReader::Tensors(file) => Box::new(file.read(rows)),
        }
    }
}

/// A data set: parquet or JSON files of conversations, a `.jsonl` file of running text, or files of ready tensors.
#[derive(Debug)]
pub struct Dataset {
    /// As the user names it.
    path: PathBuf,
    /// By the name that is part of the digest.
    readers: Vec<(String, RowReader)>,
    /// One for each sample.
    places: Vec<SamplePlace>,
    /// Keys that determine each sample's rank in the draw.
    keys: Vec<u64>,
    options: DataOptions,
}

/// SamplePlace of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SamplePlace {
    reader: u32,
    row: u32,
    /// The turn that is the sample; `None` for the whole row.
    turn: Option<u32>,
}

impl Dataset {
    /// Opens a set of conversations without reading pictures: a file, a folder of files, or a pattern such as
    /// `data/*/train-*.parquet`.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a path that is none of these, a file that does not decode, a set
    /// without samples, or running text, which only a model's tokenizer cuts into samples; `Error::Unsupported` naming
    /// the keys that nobody reads.
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
            let reader = match is_parquet {
                true => RowReader::Parquet(Shard::open(&path, &name, options)?),
                false => RowReader::Json(JsonFile::open(&path, &name, options)?),
            };
            readers.push((name, reader));
        }
        Dataset::new(path, readers, options)
    }

    /// Opens a set of any kind for a model: running text becomes sequences of tokens of the model's tokenizer, the last
    /// one may be shorter; each row of ready tensors is a sample.
    ///
    /// Errors: as `open`, and `Error::Invalid` for a line without text, a model without tokenizer, or tensors that are
    /// not what the model's graphs take.
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

    /// True when its samples are rows of ready tensors.
    pub fn holds_tensors(&self) -> bool {
        self.readers.iter().any(|(_, reader)| matches!(reader, RowReader::Tensors(_)))
    }

    /// True when these are files of ready tensors.
    pub fn is_tensors(path: &Path) -> bool {
        data_files(path).is_ok_and(|files| files.iter().any(|file| is_tensor_file(&file.path)))
    }

    fn new(path: &Path, mut readers: Vec<(String, RowReader)>, options: &DataOptions) -> Result<Self> {
        let subject = || format!("data `{}`", path.display());
        let (mut places, mut keys) = (Vec::new(), Vec::new());
        for (number, (_, reader)) in (0u32..).zip(&mut readers) {
            let separate =
                options.turns == Turns::Separate && !matches!(reader, RowReader::Text(_) | RowReader::Tensors(_));
            for Listed { row, turns, key } in reader.take_listed() {
                // With bits of its own: those of the draw would make the parts differ in what is drawn from them.
                if !options.part.has(mix(key ^ PART_SALT)) {
                    continue;
                }
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

    /// Options for reading it.
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

    /// The samples of a subset, in the order in which they are drawn. Samples are drawn by their text, so that neither
    /// the order of files and rows nor their names make a difference.
    ///
    /// Errors: as `Subset::indices`.
    pub fn draw(&self, subset: Subset) -> Result<Vec<usize>> {
        subset.indices(&self.keys)
    }

    /// The samples with these indices (in any order, each once), read in ascending order, row group by row group;
    /// `Sample::index` says which is which.
    ///
    /// Errors: `Error::Invalid` for an index that does not exist; each item: `Error::Invalid` or `Error::Io` naming the
    /// row.
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

    /// One digest over all files and over what decides the samples.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        let mut digests = BTreeMap::new();
        for (name, reader) in &self.readers {
            let digest = sha256_file(reader.path())?;
            // How running text is cut decides its samples; the tokenizer is the model's.
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

/// Gives samples with the same text, whose keys are equal, keys by their order.
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

/// SourceRows of one file, read as they are asked for.
type SourceRows<'a> = Box<dyn Iterator<Item = Result<SourceRow>> + 'a>;

/// The samples that a row makes: their indices, and the turn that each is.
type Wanted = Vec<(usize, Option<u32>)>;

/// Samples of a [`Dataset`] in ascending order.
pub struct Samples<'a> {
    dataset: &'a Dataset,
    wanted: Vec<usize>,
    position: usize,
    rows: SourceRows<'a>,
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
            if !self.next_reader() {
                return None;
            }
        }
    }
}

impl Samples<'_> {
    /// Begins the next file that has wanted samples; false when there is none.
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

/// An error of the row is that of each of its samples.
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
