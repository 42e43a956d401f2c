//! Parquet files of conversations. Text is read in batches of rows, images are read one by one.

mod byte_column;
mod hybrid;
mod page;
mod snappy;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, RecordBatch, StructArray};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
    RowSelector,
};
use parquet::file::metadata::ParquetMetaData;

use crate::base::{Error, Progress, Result, shortened};

use crate::data::columns::{Cells, Columns};
use crate::data::guard::guarded;
use crate::data::listing::{Listed, content_key};
use crate::data::options::DataOptions;
use crate::data::row::{RawMessage, RawPiece, SourceRow, Speaker};

use byte_column::ByteColumn;

/// Number of rows that are decoded together, without images.
const LISTED_ROWS: usize = 1024;
/// Maximum number of rows that are decoded together with images, and their maximum size in bytes when images are not
/// read one by one.
const BATCH_ROWS: usize = 32;
const BATCH_BYTES: usize = 16 << 20;

/// A Parquet file.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    /// Name of the file in sample ids.
    name: String,
    metadata: ArrowReaderMetadata,
    columns: Columns,
    /// Number of rows before each row group, and the total.
    starts: Vec<usize>,
    listed: Vec<Listed>,
}

impl Shard {
    /// Opens a file and reads its footer and its conversations, without images.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when the file is not Parquet or lacks required columns;
    /// `Error::Unsupported` with the names of unknown columns.
    pub fn open(path: &Path, name: &str, options: &DataOptions) -> Result<Self> {
        let subject = format!("`{}`", path.display());
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        // With a page index a reader can jump to a page. Files without one are read from the start of a row group.
        let load = || {
            ArrowReaderMetadata::load(&file, ArrowReaderOptions::new().with_page_index(true))
                .or_else(|_| ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()))
        };
        let metadata = guarded(load).and_then(|metadata| metadata.map_err(|e| e.to_string())).map_err(|problem| {
            Error::invalid(&subject, format!("is not a readable Parquet file: {problem}"))
                .remedy("check that the file is whole: download it again, or write it again as Parquet")
        })?;
        let columns =
            Columns::of(metadata.schema(), &subject, options, |column| holds_nothing(metadata.metadata(), column))?;
        let mut starts = vec![0usize];
        for group in metadata.metadata().row_groups() {
            let rows = usize::try_from(group.num_rows()).map_err(|_| {
                Error::invalid(&subject, "a row group has a negative number of rows")
                    .remedy("write the file again as Parquet")
            })?;
            let total = starts.last().copied().unwrap_or(0).checked_add(rows);
            starts.push(total.ok_or_else(|| Error::invalid(&subject, "has too many rows").remedy("split the file"))?);
        }
        let path = path.to_path_buf();
        let mut shard = Shard { path, name: name.to_string(), metadata, columns, starts, listed: Vec::new() };
        shard.listed = shard.list(options)?;
        Ok(shard)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the list of rows out of the shard.
    pub fn take_listed(&mut self) -> Vec<Listed> {
        std::mem::take(&mut self.listed)
    }

    fn rows(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Lists the rows whose ratings reach the minimum.
    fn list(&self, options: &DataOptions) -> Result<Vec<Listed>> {
        let groups: Vec<usize> = (0..self.starts.len() - 1).collect();
        let progress = Progress::new("list", "rows", self.rows() as u64);
        let mut listed = Vec::with_capacity(self.rows().min(1 << 20));
        let subject = self.subject();
        let mut row = 0;
        let rated = |batch: &StructArray, place: usize| {
            let rating = |name| guarded(|| self.columns.rating(batch, name, place)).ok().flatten();
            options.min_ratings.iter().all(|(name, least)| rating(name).is_some_and(|rating| rating >= *least))
        };
        for batch in self.reader(groups, None, self.leaves(&self.columns.listed(), &[]), LISTED_ROWS)? {
            let batch = StructArray::from(batch.map_err(|e| self.unreadable(e))?);
            progress.advance(batch.len() as u64);
            for place in 0..batch.len() {
                if rated(&batch, place) {
                    let (turns, key) = self.turns_and_key(&batch, place);
                    listed.push(Listed::new(&subject, row, turns, key)?);
                }
                row += 1;
            }
        }
        if row != self.rows() {
            return Err(Error::invalid(subject, format!("has {row} rows, its footer says {}", self.rows()))
                .remedy("write the file again as Parquet"));
        }
        Ok(listed)
    }

    /// Number of turns of a row, and its content key. A row that does not decode counts as one turn; its error is
    /// reported when the row is read.
    fn turns_and_key(&self, batch: &StructArray, place: usize) -> (usize, u64) {
        let read = guarded(|| -> Result<_, String> {
            let messages = self.columns.messages(batch, place)?;
            let turns = messages.iter().filter(|message| message.speaker == Speaker::Assistant).count();
            Ok((turns.max(1), key_of(self.columns.id(batch, place), &messages)))
        });
        read.and_then(|read| read).unwrap_or_else(|problem| (1, content_key(&[problem])))
    }

    /// Reads the rows with these ascending indices. One row group is open at a time.
    pub fn read(&self, rows: Vec<usize>) -> impl Iterator<Item = Result<SourceRow>> + '_ {
        let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut rest = rows.as_slice();
        for (group, &end) in self.starts.iter().skip(1).enumerate() {
            let (here, later) = rest.split_at(rest.partition_point(|row| *row < end));
            if !here.is_empty() {
                groups.push((group, here.to_vec()));
            }
            rest = later;
        }
        groups.into_iter().flat_map(move |(group, rows)| self.read_group(group, rows))
    }

    fn read_group(&self, group: usize, rows: Vec<usize>) -> Box<dyn Iterator<Item = Result<SourceRow>> + '_> {
        let mut selectors = Vec::new();
        let start = self.starts.get(group).copied().unwrap_or(0);
        let mut position = start;
        for &row in &rows {
            if row > position {
                selectors.push(RowSelector::skip(row - position));
            }
            selectors.push(RowSelector::select(1));
            position = row + 1;
        }
        let selection = RowSelection::from(selectors);
        let opened = self.file().and_then(|file| {
            let apart = self.pictures(&Arc::new(file), group);
            let leaves = self.leaves(&self.columns.read(), &apart);
            let batch = self.batch_rows(group, &leaves);
            Ok((self.reader(vec![group], Some(selection), leaves, batch)?, apart))
        });
        let (reader, mut apart) = match opened {
            Ok(opened) => opened,
            Err(error) => return Box::new(std::iter::once(Err(error))),
        };
        let mut numbers = rows.into_iter();
        let mut row = move |batch: &StructArray, place: usize| {
            let number = numbers.next().ok_or_else(|| {
                Error::invalid(self.subject(), "has more rows than its footer says")
                    .remedy("write the file again as Parquet")
            })?;
            let pictures = cells_of(&mut apart, number - start).map_err(|problem| {
                Error::invalid(self.row_subject(number), format!("does not decode: {problem}"))
                    .remedy("download the file again, or write it again as Parquet")
            })?;
            let row = guarded(|| self.row(batch, place, number, pictures)).and_then(|row| row);
            row.map_err(|problem| {
                Error::invalid(self.row_subject(number), problem).remedy("correct the row, or remove it from the file")
            })
        };
        Box::new(reader.flat_map(move |batch| match batch {
            Ok(batch) => {
                let batch = StructArray::from(batch);
                (0..batch.len()).map(|place| row(&batch, place)).collect::<Vec<_>>()
            }
            Err(error) => vec![Err(self.unreadable(error))],
        }))
    }

    /// Opens the image columns that are read one by one.
    fn pictures(&self, file: &Arc<File>, group: usize) -> Vec<Apart> {
        let metadata = self.metadata.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let column = |(name, in_struct): (&'static str, bool)| {
            let mut leaves = (0..schema.num_columns()).filter(|leaf| {
                let field = schema.columns().get(*leaf).is_some_and(|column| column.name() == "bytes");
                schema.get_column_root(*leaf).name() == name && (field || !in_struct)
            });
            let leaf = leaves.next().filter(|_| leaves.next().is_none())?;
            Some(Apart { name, leaf, column: ByteColumn::open(file, metadata, group, leaf)? })
        };
        self.columns.picture_leaves(self.metadata.schema()).into_iter().filter_map(column).collect()
    }

    /// Leaf columns of `columns`, without those in `apart`.
    fn leaves(&self, columns: &[&str], apart: &[Apart]) -> Vec<usize> {
        let schema = self.metadata.metadata().file_metadata().schema_descr();
        let wanted = |leaf: &usize| {
            columns.contains(&schema.get_column_root(*leaf).name()) && apart.iter().all(|apart| apart.leaf != *leaf)
        };
        (0..schema.num_columns()).filter(wanted).collect()
    }

    /// Number of rows of a group that are decoded together.
    fn batch_rows(&self, group: usize, leaves: &[usize]) -> usize {
        let group = self.metadata.metadata().row_groups().get(group);
        let chunks = leaves.iter().filter_map(|leaf| group?.columns().get(*leaf));
        let bytes: usize = chunks.map(|chunk| usize::try_from(chunk.uncompressed_size()).unwrap_or(0)).sum();
        let rows = group.map_or(1, |group| usize::try_from(group.num_rows()).unwrap_or(1)).max(1);
        (BATCH_BYTES / (bytes / rows).max(1)).clamp(1, BATCH_ROWS)
    }

    fn file(&self) -> Result<File> {
        File::open(&self.path).map_err(|e| Error::io("open", &self.path, e))
    }

    fn reader(
        &self,
        groups: Vec<usize>,
        selection: Option<RowSelection>,
        leaves: Vec<usize>,
        batch: usize,
    ) -> Result<Batches> {
        let schema = self.metadata.metadata().file_metadata().schema_descr();
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(self.file()?, self.metadata.clone())
            .with_row_groups(groups)
            .with_projection(ProjectionMask::leaves(schema, leaves))
            .with_batch_size(batch);
        if let Some(selection) = selection {
            builder = builder.with_row_selection(selection);
        }
        let reader = guarded(|| builder.build()).and_then(|reader| reader.map_err(|e| e.to_string()));
        reader.map(|reader| Batches(Some(reader))).map_err(|e| self.unreadable(e))
    }

    fn subject(&self) -> String {
        format!("`{}`", self.path.display())
    }

    fn row_subject(&self, row: usize) -> String {
        format!("row {row} of `{}`", self.name)
    }

    fn unreadable(&self, error: impl std::fmt::Display) -> Error {
        Error::invalid(self.subject(), format!("does not decode: {error}"))
            .remedy("download the file again, or write it again as Parquet")
    }

    fn row(
        &self,
        batch: &StructArray,
        place: usize,
        number: usize,
        apart: HashMap<&'static str, Cells>,
    ) -> Result<SourceRow, String> {
        let mut subject = self.row_subject(number);
        if let Some(id) = self.columns.id(batch, place) {
            subject.push_str(&format!(" (id `{}`)", shortened(&id)));
        }
        let images = self.columns.pictures(batch, place, &subject, apart)?;
        SourceRow::of_messages(subject, images, self.columns.messages(batch, place)?)
    }
}

/// An image column of a row group that is read separately from the batches.
struct Apart {
    name: &'static str,
    leaf: usize,
    column: ByteColumn,
}

/// Images of a row of the group, by column.
fn cells_of(apart: &mut [Apart], row: usize) -> Result<HashMap<&'static str, Cells>, String> {
    apart.iter_mut().map(|apart| Ok((apart.name, apart.column.cells(row)?))).collect()
}

/// Key that determines a row's rank in the draw: a hash of its id, speakers and texts.
fn key_of(id: Option<String>, messages: &[RawMessage]) -> u64 {
    let mut texts: Vec<String> = id.into_iter().collect();
    for message in messages {
        texts.push(format!("{:?}", message.speaker));
        texts.extend(message.pieces.iter().map(|piece| match piece {
            RawPiece::Text(text) => text.clone(),
            RawPiece::Image(index) => format!("{index:?}"),
        }));
    }
    content_key(&texts)
}

/// True when the file's statistics state that all values of the column are null.
fn holds_nothing(metadata: &ParquetMetaData, column: &str) -> bool {
    let schema = metadata.file_metadata().schema_descr();
    let leaves: Vec<usize> =
        (0..schema.num_columns()).filter(|leaf| schema.get_column_root(*leaf).name() == column).collect();
    metadata.row_groups().iter().all(|group| {
        leaves.iter().filter_map(|leaf| group.columns().get(*leaf)).all(|chunk| {
            let nulls = chunk.statistics().and_then(|statistics| statistics.null_count_opt());
            nulls.is_some_and(|nulls| i64::try_from(nulls).is_ok_and(|nulls| nulls == chunk.num_values()))
        })
    })
}

/// Iterator over record batches that ends after the first error.
struct Batches(Option<ParquetRecordBatchReader>);

impl Iterator for Batches {
    type Item = Result<RecordBatch, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let reader = self.0.as_mut()?;
        let batch = guarded(|| reader.next());
        match batch.and_then(|batch| batch.transpose().map_err(|e| e.to_string())).transpose() {
            Some(Err(error)) => {
                self.0 = None;
                Some(Err(error))
            }
            batch => batch,
        }
    }
}
