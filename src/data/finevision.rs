//! FineVision's parquet layout: `images` (list of encoded pictures) and `texts` (list of user/assistant pairs).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, OffsetSizeTrait, RecordBatch};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
    RowSelector,
};

use crate::base::{Error, Progress, Result};

use super::guard::guarded;
use super::row::{RawMessage, SourceRow, Speaker};
use super::sample::ImageBytes;

/// Rows that are decoded at a time; pictures make rows large.
const BATCH_ROWS: usize = 32;

/// One parquet file.
#[derive(Clone, Debug)]
pub(super) struct Shard {
    path: PathBuf,
    metadata: ArrowReaderMetadata,
    /// Rows before each row group, and the total.
    starts: Vec<usize>,
}

impl Shard {
    /// Reads the footer.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when it is no parquet file, or lacks the two columns.
    pub fn open(path: &Path) -> Result<Self> {
        let subject = || format!("`{}`", path.display());
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let metadata = guarded(|| ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()))
            .and_then(|metadata| metadata.map_err(|e| e.to_string()))
            .map_err(|problem| Error::invalid(subject(), format!("is no readable parquet file: {problem}")))?;
        for column in ["images", "texts"] {
            if metadata.schema().field_with_name(column).is_err() {
                let found: Vec<String> = metadata.schema().fields().iter().map(|field| field.name().clone()).collect();
                return Err(Error::invalid(subject(), format!("has no column `{column}`, only {}", found.join(", ")))
                    .remedy("expected `images` (list of struct{bytes, path} or of binary) and `texts` (list of struct{user, assistant})"));
            }
        }
        let mut starts = vec![0usize];
        for group in metadata.metadata().row_groups() {
            let rows = usize::try_from(group.num_rows())
                .map_err(|_| Error::invalid(subject(), "a row group has a negative number of rows"))?;
            let total = starts.last().copied().unwrap_or(0).checked_add(rows);
            starts.push(total.ok_or_else(|| Error::invalid(subject(), "has too many rows"))?);
        }
        Ok(Shard { path: path.to_path_buf(), metadata, starts })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rows(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The question and answer pairs of each row, counted without reading pictures.
    pub fn texts_per_row(&self) -> Result<Vec<usize>> {
        let groups: Vec<usize> = (0..self.starts.len() - 1).collect();
        let progress = Progress::new("count", "rows", self.rows() as u64);
        let mut counts = Vec::with_capacity(self.rows().min(1 << 20));
        let smallest = self.smallest_leaf("texts");
        for batch in self.reader(groups, None, smallest, 4096)? {
            let batch = batch.map_err(|e| self.unreadable(e))?;
            progress.advance(batch.num_rows() as u64);
            let texts = column(&batch, "texts").map_err(|problem| Error::invalid(self.subject(), problem))?;
            for row in 0..batch.num_rows() {
                let list =
                    list_at(texts, row).map_err(|problem| Error::invalid(self.row_subject(counts.len()), problem))?;
                counts.push(list.len());
            }
        }
        if counts.len() != self.rows() {
            return Err(Error::invalid(
                self.subject(),
                format!("has {} rows, its footer says {}", counts.len(), self.rows()),
            ));
        }
        Ok(counts)
    }

    /// The rows with these ascending indices; one row group is open at a time.
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
        let mut position = self.starts.get(group).copied().unwrap_or(0);
        for &row in &rows {
            if row > position {
                selectors.push(RowSelector::skip(row - position));
            }
            selectors.push(RowSelector::select(1));
            position = row + 1;
        }
        let selection = RowSelection::from(selectors);
        let reader = match self.reader(vec![group], Some(selection), self.columns(&["images", "texts"]), BATCH_ROWS) {
            Ok(reader) => reader,
            Err(error) => return Box::new(std::iter::once(Err(error))),
        };
        let mut numbers = rows.into_iter();
        let mut row = move |batch: &RecordBatch, place: usize| {
            let number =
                numbers.next().ok_or_else(|| Error::invalid(self.subject(), "has more rows than its footer says"))?;
            let row = guarded(|| self.row(batch, place, number)).and_then(|row| row);
            row.map_err(|problem| Error::invalid(self.row_subject(number), problem))
        };
        Box::new(reader.flat_map(move |batch| match batch {
            Ok(batch) => (0..batch.num_rows()).map(|place| row(&batch, place)).collect::<Vec<_>>(),
            Err(error) => vec![Err(self.unreadable(error))],
        }))
    }

    fn columns(&self, columns: &[&str]) -> ProjectionMask {
        ProjectionMask::columns(self.metadata.metadata().file_metadata().schema_descr(), columns.iter().copied())
    }

    /// The leaf of a column with the fewest bytes: enough to learn the lengths of its lists.
    fn smallest_leaf(&self, column: &str) -> ProjectionMask {
        let metadata = self.metadata.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let size = |leaf: &usize| -> i64 {
            let chunks = metadata.row_groups().iter().filter_map(|group| group.columns().get(*leaf));
            chunks.map(|chunk| chunk.compressed_size()).fold(0, i64::saturating_add)
        };
        let leaves = (0..schema.num_columns()).filter(|leaf| schema.get_column_root(*leaf).name() == column);
        ProjectionMask::leaves(schema, leaves.min_by_key(size))
    }

    fn reader(
        &self,
        groups: Vec<usize>,
        selection: Option<RowSelection>,
        mask: ProjectionMask,
        batch: usize,
    ) -> Result<Batches> {
        let file = File::open(&self.path).map_err(|e| Error::io("open", &self.path, e))?;
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
            .with_row_groups(groups)
            .with_projection(mask)
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
        format!("row {row} of `{}`", self.path.display())
    }

    fn unreadable(&self, error: impl std::fmt::Display) -> Error {
        Error::invalid(self.subject(), format!("does not decode: {error}"))
    }

    fn row(&self, batch: &RecordBatch, place: usize, number: usize) -> Result<SourceRow, String> {
        let subject = self.row_subject(number);
        let mut images = Vec::new();
        let list = column(batch, "images")?;
        if !list.is_null(place) {
            let cells = list_at(list, place)?;
            let bytes = match cells.as_struct_opt() {
                Some(cells) => cells.column_by_name("bytes").cloned().ok_or("`images` has no field `bytes`")?,
                None => cells,
            };
            for image in 0..bytes.len() {
                let content = binary_at(&bytes, image)?.ok_or_else(|| {
                    format!("image {image} has no bytes; only pictures held in the file itself can be read")
                })?;
                images.push(ImageBytes::held(format!("image {image} of {subject}"), content));
            }
        }
        let cells = list_at(column(batch, "texts")?, place)?;
        let cells = cells.as_struct_opt().ok_or("`texts` is no list of struct{user, assistant}")?;
        let field = |name: &str| cells.column_by_name(name).ok_or(format!("`texts` has no field `{name}`"));
        let (user, assistant) = (field("user")?, field("assistant")?);
        let mut messages = Vec::with_capacity(2 * cells.len());
        for turn in 0..cells.len() {
            let get = |array: &ArrayRef, name: &str| -> Result<String, String> {
                string_at(array, turn)?.ok_or(format!("text {turn} has no `{name}`"))
            };
            messages.push(RawMessage::text(Speaker::User, get(user, "user")?));
            messages.push(RawMessage::text(Speaker::Assistant, get(assistant, "assistant")?));
        }
        SourceRow::of_messages(subject, images, messages)
    }
}

/// Record batches; the first failure is the last item.
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

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, String> {
    batch.column_by_name(name).ok_or(format!("has no column `{name}`"))
}

fn list_at(array: &ArrayRef, row: usize) -> Result<ArrayRef, String> {
    fn at<O: OffsetSizeTrait>(array: &ArrayRef, row: usize) -> Option<ArrayRef> {
        array.as_list_opt::<O>().map(|list| list.value(row))
    }
    if array.is_null(row) {
        return Err("holds null where a list is expected".into());
    }
    at::<i32>(array, row).or_else(|| at::<i64>(array, row)).ok_or_else(|| wrong_type(array, "a list"))
}

fn string_at(array: &ArrayRef, row: usize) -> Result<Option<String>, String> {
    if array.is_null(row) {
        return Ok(None);
    }
    let text = match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row),
        DataType::Utf8View => array.as_string_view().value(row),
        _ => return Err(wrong_type(array, "a string")),
    };
    Ok(Some(text.to_string()))
}

fn binary_at(array: &ArrayRef, row: usize) -> Result<Option<Arc<[u8]>>, String> {
    if array.is_null(row) {
        return Ok(None);
    }
    let bytes = match array.data_type() {
        DataType::Binary => array.as_binary::<i32>().value(row),
        DataType::LargeBinary => array.as_binary::<i64>().value(row),
        DataType::BinaryView => array.as_binary_view().value(row),
        _ => return Err(wrong_type(array, "bytes")),
    };
    Ok(Some(bytes.into()))
}

fn wrong_type(array: &ArrayRef, expected: &str) -> String {
    format!("holds {} where {expected} is expected", array.data_type())
}
