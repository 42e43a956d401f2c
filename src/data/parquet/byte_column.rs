//! Reader of one column of byte strings in a row group, such as images: returns the cells of requested rows. Pages are
//! read as streams. Neither a page, which may contain a thousand images, nor a large dictionary is held in memory as a
//! whole.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::sync::Arc;

use parquet::basic::{Compression, Encoding, Repetition, Type as Physical};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::page_index::offset_index::PageLocation;
use parquet::schema::types::SchemaDescriptor;
use tempfile::SpooledTempFile;

use super::super::columns::Cells;
use super::super::sample::MAX_IMAGE_BYTES;
use super::hybrid::{Hybrid, byte};
use super::page::{Head, PageBody, PageKind, Span, exactly, streams};

/// Maximum size of the repetition or definition levels of a page, in bytes.
const MAX_LEVEL_BYTES: u64 = 64 << 20;
/// A decompressed dictionary is held in memory up to this size, in bytes; a larger one is in a temporary file.
const HELD_DICTIONARY_BYTES: usize = 4 << 20;

/// Maximum number of values of a dictionary.
const MAX_DICTIONARY: usize = 16 << 20;

/// Numbers of the encodings `PLAIN`, and `PLAIN_DICTIONARY` and `RLE_DICTIONARY`.
const PLAIN: i64 = 0;
const IN_DICTIONARY: [i64; 2] = [2, 8];

/// Reads one leaf column of one row group, from its first row to its last.
pub(super) struct ByteColumn {
    file: Arc<File>,
    codec: Compression,
    levels: LeafLevels,
    /// File offset of the next page; `end` is the end of the last page.
    next_page: u64,
    end: u64,
    /// First rows and offsets of the pages, if the file has an offset index.
    pages: Vec<PageLocation>,
    /// Number of rows that have begun.
    row: usize,
    page: Option<Page>,
    dictionary: Option<Dictionary>,
    /// First error; nothing is read after it.
    failed: Option<String>,
}

/// Levels of the format that determine the meaning of an entry.
#[derive(Clone, Copy, Debug)]
struct LeafLevels {
    /// Maximum repetition level: 1 in a list, else 0.
    repeated: u32,
    /// Definition level of a value that is present.
    defined: u32,
    /// Minimum definition level of a list element. A lower level means an empty or missing list.
    element: u32,
}

/// Rest of a page.
struct Page {
    entries: usize,
    /// Number of rows that begin in the remaining entries.
    starts: usize,
    repetition: Hybrid<Cursor<Vec<u8>>>,
    definition: Hybrid<Cursor<Vec<u8>>>,
    /// Repetition level of the next entry, if it was read ahead.
    peeked: Option<u32>,
    values: Values,
}

enum Values {
    /// Values, each after its length.
    Plain(PageBody),
    /// Indices into the dictionary.
    Positions(Hybrid<PageBody>),
}

/// The dictionary of the column.
enum Dictionary {
    Unread(Head),
    Read(DictionaryValues),
}

impl ByteColumn {
    /// Opens a leaf column of a row group; `None` when its type, compression or encoding cannot be read as a stream.
    pub fn open(file: &Arc<File>, metadata: &ParquetMetaData, group: usize, leaf: usize) -> Option<Self> {
        let chunk = metadata.row_groups().get(group)?.columns().get(leaf)?;
        let levels = LeafLevels::of(metadata.file_metadata().schema_descr(), leaf)?;
        let known = |encoding| {
            use Encoding::{PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY};
            matches!(encoding, PLAIN | PLAIN_DICTIONARY | RLE | RLE_DICTIONARY)
        };
        if !streams(chunk.compression()) || !chunk.encodings().all(known) {
            return None;
        }
        let first = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset()).min(chunk.data_page_offset());
        let begin = u64::try_from(first).ok()?;
        let end = begin.checked_add(u64::try_from(chunk.compressed_size()).ok()?)?;
        let pages = metadata.offset_index().and_then(|index| index.get(group)?.get(leaf));
        Some(ByteColumn {
            file: file.clone(),
            codec: chunk.compression(),
            levels,
            next_page: begin,
            end,
            pages: pages.map(|index| index.page_locations().clone()).unwrap_or_default(),
            row: 0,
            page: None,
            dictionary: None,
            failed: None,
        })
    }

    /// Reads the cells of a row of the group: the elements of its list, or one cell. Rows must be requested in
    /// ascending order.
    ///
    /// Errors: the file is malformed; every later call returns the same error.
    pub fn cells(&mut self, row: usize) -> Result<Cells, String> {
        if let Some(problem) = &self.failed {
            return Err(problem.clone());
        }
        let cells = self.read(row);
        if let Err(problem) = &cells {
            self.failed = Some(problem.clone());
        }
        cells
    }

    fn read(&mut self, row: usize) -> Result<Cells, String> {
        self.jump(row)?;
        loop {
            if !self.open_page(row)? {
                return Err(format!("ends before row {row} of its row group"));
            }
            if self.begins_row()? {
                if self.row == row {
                    break;
                }
                self.begin_row();
            }
            self.entry(false)?;
        }
        self.begin_row();
        let mut cells = Vec::new();
        loop {
            cells.extend(self.entry(true)?);
            if self.levels.repeated == 0 || !self.open_page(row)? || self.begins_row()? {
                return Ok(cells);
            }
        }
    }

    /// Jumps to the page that contains `row`, if the file has an offset index.
    fn jump(&mut self, row: usize) -> Result<(), String> {
        let first = |page: &PageLocation| usize::try_from(page.first_row_index).unwrap_or(usize::MAX);
        let number = self.pages.partition_point(|page| first(page) <= row);
        let Some(page) = number.checked_sub(1).and_then(|number| self.pages.get(number)) else { return Ok(()) };
        let place = u64::try_from(page.offset).map_err(|e| e.to_string())?;
        if first(page) > self.row && place > self.next_page {
            if self.row == 0 && self.page.is_none() {
                // Only the dictionary page is not in the offset index; it comes first.
                let head = self.head()?;
                self.dictionary = (head.kind == PageKind::Dictionary).then_some(Dictionary::Unread(head));
            }
            (self.page, self.row, self.next_page) = (None, first(page), place);
        }
        Ok(())
    }

    fn head(&self) -> Result<Head, String> {
        Head::read(Span::new(self.file.clone(), self.next_page, self.end))
    }

    /// Opens pages until there is an entry. Returns false at the end of the column. Skips pages, and the rest of a
    /// page, that contain no start of `row` or of a later row.
    fn open_page(&mut self, row: usize) -> Result<bool, String> {
        loop {
            if let Some(page) =
                self.page.take_if(|page| page.entries == 0 || self.row.saturating_add(page.starts) <= row)
            {
                self.row = self.row.saturating_add(page.starts);
            }
            if self.page.is_some() {
                return Ok(true);
            }
            if self.next_page >= self.end {
                return Ok(false);
            }
            let head = self.head()?;
            self.next_page = head.body.end();
            match head.kind {
                PageKind::Dictionary => self.dictionary = Some(Dictionary::Unread(head)),
                PageKind::Data | PageKind::DataV2 { .. } => {
                    self.page = Some(Page::open(&head, self.codec, self.levels)?)
                }
                PageKind::Other => {}
            }
        }
    }

    /// Counts the start of a row at the next entry.
    fn begin_row(&mut self) {
        self.row += 1;
        if let Some(page) = &mut self.page {
            page.starts = page.starts.saturating_sub(1);
        }
    }

    /// True when the next entry starts a row. A page with an entry must be open.
    fn begins_row(&mut self) -> Result<bool, String> {
        let page = self.page.as_mut().ok_or("has no page")?;
        let level = match page.peeked {
            Some(level) => level,
            None => page.repetition.next()?,
        };
        page.peeked = Some(level);
        Ok(level == 0)
    }

    /// Reads the next entry, or skips its value if `keep` is false. Returns `None` for an empty list and `Some(None)`
    /// for a null or skipped value. A page with an entry must be open.
    fn entry(&mut self, keep: bool) -> Result<Option<Option<Arc<[u8]>>>, String> {
        let page = self.page.as_mut().ok_or("has no page")?;
        if page.peeked.take().is_none() {
            page.repetition.next()?;
        }
        let defined = page.definition.next()?;
        page.entries = page.entries.checked_sub(1).ok_or("has more values than its pages say")?;
        if defined < self.levels.element {
            return Ok(None);
        }
        if defined != self.levels.defined {
            return match defined < self.levels.defined {
                true => Ok(Some(None)),
                false => Err(format!("has a value of level {defined}, expected at most {}", self.levels.defined)),
            };
        }
        let position = match &mut page.values {
            Values::Plain(body) => return plain(body, keep).map(Some),
            Values::Positions(positions) => positions.next()?,
        };
        if !keep {
            return Ok(Some(None));
        }
        if let Some(Dictionary::Unread(head)) = &self.dictionary {
            self.dictionary = Some(Dictionary::Read(DictionaryValues::read(head, self.codec)?));
        }
        match &mut self.dictionary {
            Some(Dictionary::Read(store)) => store.value(position).map(|bytes| Some(Some(bytes))),
            _ => Err("refers to a dictionary, but has none".into()),
        }
    }
}

impl LeafLevels {
    /// Computes the levels of a leaf; `None` for nested lists and for values other than byte strings.
    fn of(schema: &SchemaDescriptor, leaf: usize) -> Option<Self> {
        let column = schema.columns().get(leaf)?;
        let (repeated, defined) = (u32::try_from(column.max_rep_level()), u32::try_from(column.max_def_level()));
        let (repeated, defined) = (repeated.ok()?, defined.ok()?);
        if repeated > 1 || column.physical_type() != Physical::BYTE_ARRAY {
            return None;
        }
        // Each optional or repeated field on the path to the leaf adds one definition level.
        let (mut group, mut level, mut element) = (schema.root_schema(), 0, 0);
        for name in column.path().parts() {
            group = group.get_fields().iter().find(|field| field.name() == name)?;
            match group.get_basic_info().repetition() {
                Repetition::REQUIRED => {}
                Repetition::OPTIONAL => level += 1,
                Repetition::REPEATED => {
                    level += 1;
                    element = level;
                }
            }
        }
        (level == defined).then_some(LeafLevels { repeated, defined, element })
    }
}

impl Page {
    fn open(head: &Head, codec: Compression, levels: LeafLevels) -> Result<Self, String> {
        let level_bytes = |body: &mut PageBody, bytes: u64| match bytes <= MAX_LEVEL_BYTES {
            true => exactly(body, bytes),
            false => Err(format!("has levels of {bytes} bytes in a page, expected at most {MAX_LEVEL_BYTES}")),
        };
        let (repetition, definition, mut body) = match head.kind {
            PageKind::DataV2 { repetition_bytes, definition_bytes, .. } => {
                let mut stored = head.open(Compression::UNCOMPRESSED, 0)?;
                let repetition = level_bytes(&mut stored, repetition_bytes)?;
                let definition = level_bytes(&mut stored, definition_bytes)?;
                (repetition, definition, head.open(codec, repetition_bytes + definition_bytes)?)
            }
            _ => {
                let mut body = head.open(codec, 0)?;
                let mut counted = |most: u32| match most {
                    0 => Ok(Vec::new()),
                    _ => {
                        let bytes = body.length()?.ok_or("has a page without its levels")?;
                        level_bytes(&mut body, u64::from(bytes))
                    }
                };
                (counted(levels.repeated)?, counted(levels.defined)?, body)
            }
        };
        let width = |most: u32| u32::BITS - most.leading_zeros();
        let starts = Hybrid::new(repetition.as_slice(), width(levels.repeated))?.zeros(head.values)?;
        Ok(Page {
            entries: head.values,
            starts,
            repetition: Hybrid::new(Cursor::new(repetition), width(levels.repeated))?,
            definition: Hybrid::new(Cursor::new(definition), width(levels.defined))?,
            peeked: None,
            values: match head.encoding {
                PLAIN => Values::Plain(body),
                encoding if IN_DICTIONARY.contains(&encoding) => {
                    match byte(&mut body) {
                        Ok(width) => Values::Positions(Hybrid::new(body, u32::from(width))?),
                        // A page with only nulls may have no bit width and no indices.
                        Err(_) => Values::Plain(body),
                    }
                }
                other => return Err(format!("has a page of encoding {other}, which its footer does not list")),
            },
        })
    }
}

/// Values of a dictionary. The bytes are in the Parquet file itself, or decompressed in memory or in a temporary file.
struct DictionaryValues {
    source: DictionaryBytes,
    /// Offset and length of each value, in bytes.
    places: Vec<(u64, u32)>,
}

enum DictionaryBytes {
    File(Span),
    Copy(Box<SpooledTempFile>),
}

impl DictionaryValues {
    fn read(head: &Head, codec: Compression) -> Result<Self, String> {
        if head.values > MAX_DICTIONARY {
            return Err(format!("has a dictionary of {} values, expected at most {MAX_DICTIONARY}", head.values));
        }
        let mut body = head.open(codec, 0)?;
        let mut copy = match codec {
            Compression::UNCOMPRESSED => None,
            _ => Some(Box::new(SpooledTempFile::new(HELD_DICTIONARY_BYTES))),
        };
        let (mut places, mut place) = (Vec::new(), 0u64);
        for _ in 0..head.values {
            let length = body.length()?.ok_or("has a dictionary that ends before its last value")?;
            let begin = match &mut copy {
                None => {
                    body.skip(u64::from(length))?;
                    place + 4
                }
                Some(copy) => {
                    let copied = io::copy(&mut (&mut body).take(u64::from(length)), copy);
                    if copied.map_err(|e| format!("does not decompress to a temporary file: {e}"))? != u64::from(length)
                    {
                        return Err("has a dictionary that ends inside a value".into());
                    }
                    place
                }
            };
            places.push((begin, length));
            place = begin + u64::from(length);
        }
        let source = copy.map_or_else(|| DictionaryBytes::File(head.body.clone()), DictionaryBytes::Copy);
        Ok(DictionaryValues { source, places })
    }

    fn value(&mut self, position: u32) -> Result<Arc<[u8]>, String> {
        let &(begin, length) = self
            .places
            .get(position as usize)
            .ok_or_else(|| format!("refers to value {position} of a dictionary of {}", self.places.len()))?;
        let length = checked(length)?;
        let read = match &mut self.source {
            DictionaryBytes::File(body) => body.after(begin).and_then(|rest| exactly(rest, length)),
            DictionaryBytes::Copy(copy) => {
                copy.seek(SeekFrom::Start(begin)).map_err(|e| e.to_string())?;
                exactly(copy.as_mut(), length)
            }
        };
        read.map(Arc::from)
    }
}

/// Reads the next value of a page, or skips it and returns `None`.
fn plain(body: &mut PageBody, keep: bool) -> Result<Option<Arc<[u8]>>, String> {
    let length = body.length()?.ok_or("has a page that ends before its last value")?;
    if !keep {
        body.skip(u64::from(length))?;
        return Ok(None);
    }
    exactly(body, checked(length)?).map(|bytes| Some(Arc::from(bytes)))
}

fn checked(length: u32) -> Result<u64, String> {
    match u64::from(length) <= MAX_IMAGE_BYTES {
        true => Ok(u64::from(length)),
        false => Err(format!("has a picture of {length} bytes, expected at most {MAX_IMAGE_BYTES}")),
    }
}
