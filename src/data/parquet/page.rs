//! Pages of a column chunk: their headers, and their bodies as streams.
//!
//! Source: apache/parquet-format, parquet.thrift and Encodings.md; the compact protocol of Apache Thrift.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use parquet::basic::Compression;

use super::hybrid::{byte, varint};
use super::snappy::Snappy;

/// Buffer size of reads from the file, in bytes.
const BUFFER_BYTES: usize = 32 << 10;
/// Maximum nesting depth of structs in a page header.
const MAX_DEPTH: usize = 8;

/// A byte range of a file with its own read position.
#[derive(Clone, Debug)]
pub(super) struct Span {
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl Span {
    pub fn new(file: Arc<File>, begin: u64, end: u64) -> Self {
        Span { file, position: begin.min(end), end }
    }

    pub fn end(&self) -> u64 {
        self.end
    }

    /// The range without its first `bytes` bytes.
    ///
    /// Errors: the range is shorter.
    pub fn after(&self, bytes: u64) -> Result<Self, String> {
        let begin = self.position.checked_add(bytes).filter(|begin| *begin <= self.end);
        begin.map(|position| Span { position, ..self.clone() }).ok_or_else(|| "has a page that is too short".into())
    }

    fn buffered(self) -> BufReader<Span> {
        BufReader::with_capacity(BUFFER_BYTES, self)
    }
}

impl Read for Span {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let length = out.len().min(usize::try_from(self.end - self.position).unwrap_or(usize::MAX));
        let count = self.file.read_at(out.get_mut(..length).unwrap_or_default(), self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Span {
    /// Positions are relative to the file, not to the range.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        let place = place.filter(|place| *place <= self.end).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.position = place;
        Ok(place)
    }
}

/// Type of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageKind {
    Dictionary,
    /// Version 1: levels and values are compressed together.
    Data,
    /// Version 2: levels come first and are never compressed.
    DataV2 {
        repetition_bytes: u64,
        definition_bytes: u64,
    },
    /// Other page types; they are skipped.
    Other,
}

/// Header of a page.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub kind: PageKind,
    /// Number of values, nulls included.
    pub values: usize,
    /// Number of the encoding in the format.
    pub encoding: i64,
    /// Byte range of the page's body.
    pub body: Span,
    compressed: bool,
}

impl Head {
    /// Reads the header at the start of `span`; the body follows it.
    ///
    /// Errors: the header is malformed, or the page extends beyond the span.
    pub fn read(span: Span) -> Result<Self, String> {
        let mut input = span.buffered();
        let fields = fields(&mut input, 0)?;
        let begin = input.stream_position().map_err(|e| e.to_string())?;
        let Span { file, end: last, .. } = input.into_inner();
        let end = u64::try_from(number(&fields, 3)?).ok().and_then(|bytes| begin.checked_add(bytes));
        let end = end.filter(|end| *end <= last).ok_or("has a page that ends behind its column")?;
        let none = BTreeMap::new();
        let inner = |id| match fields.get(&id) {
            Some(HeadField::Struct(fields)) => fields,
            _ => &none,
        };
        let count = |fields: &HeadFields, id| usize::try_from(number(fields, id)?).map_err(|e| e.to_string());
        let (kind, values, encoding, compressed) = match number(&fields, 1)? {
            0 => (PageKind::Data, count(inner(5), 1)?, number(inner(5), 2)?, true),
            2 => (PageKind::Dictionary, count(inner(7), 1)?, number(inner(7), 2)?, true),
            3 => {
                let fields = inner(8);
                let kind = PageKind::DataV2 {
                    definition_bytes: count(fields, 5)? as u64,
                    repetition_bytes: count(fields, 6)? as u64,
                };
                let compressed = !matches!(fields.get(&7), Some(HeadField::Bool(false)));
                (kind, count(fields, 1)?, number(fields, 4)?, compressed)
            }
            _ => (PageKind::Other, 0, 0, false),
        };
        Ok(Head { kind, values, encoding, body: Span::new(file, begin, end), compressed })
    }

    /// Opens the body after its first `bytes` bytes, which are not compressed, and decompresses it.
    ///
    /// Errors: the page is shorter, or its compression cannot be read as a stream.
    pub fn open(&self, codec: Compression, bytes: u64) -> Result<PageBody, String> {
        let body = self.body.after(bytes)?.buffered();
        Ok(match codec {
            Compression::UNCOMPRESSED => PageBody::Stored(body),
            _ if !self.compressed => PageBody::Stored(body),
            Compression::SNAPPY => PageBody::Coded(Box::new(Snappy::new(body))),
            Compression::GZIP(_) => PageBody::Coded(Box::new(flate2::bufread::MultiGzDecoder::new(body))),
            Compression::ZSTD(_) => {
                PageBody::Coded(Box::new(zstd::stream::read::Decoder::with_buffer(body).map_err(|e| e.to_string())?))
            }
            other => return Err(format!("is compressed by {other}, which is not read as a stream")),
        })
    }
}

/// True for a compression that [`Head::open`] supports.
pub(super) fn streams(codec: Compression) -> bool {
    matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_))
}

/// Reader of the decompressed body of a page.
pub(super) enum PageBody {
    Stored(BufReader<Span>),
    Coded(Box<dyn Read>),
}

impl PageBody {
    /// Skips `bytes` bytes.
    ///
    /// Errors: fewer bytes are left.
    pub fn skip(&mut self, bytes: u64) -> Result<(), String> {
        let skipped = match self {
            PageBody::Stored(input) => {
                i64::try_from(bytes).map_err(io::Error::other).and_then(|bytes| input.seek_relative(bytes))
            }
            PageBody::Coded(input) => {
                io::copy(&mut input.take(bytes), &mut io::sink()).and_then(|skipped| match skipped == bytes {
                    true => Ok(()),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                })
            }
        };
        skipped.map_err(|e| e.to_string())
    }

    /// Reads a length: four bytes, little-endian; `None` at the end of the body.
    ///
    /// Errors: the body ends inside the length.
    pub fn length(&mut self) -> Result<Option<u32>, String> {
        let mut bytes = Vec::with_capacity(4);
        self.take(4).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        match <[u8; 4]>::try_from(bytes.as_slice()) {
            Ok(bytes) => Ok(Some(u32::from_le_bytes(bytes))),
            Err(_) if bytes.is_empty() => Ok(None),
            Err(_) => Err("ends inside a length".into()),
        }
    }
}

impl Read for PageBody {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            PageBody::Stored(input) => input.read(out),
            PageBody::Coded(input) => input.read(out),
        }
    }
}

/// Reads exactly `count` bytes. Memory grows with the bytes that are present, not with `count`, so a malformed length
/// does not exhaust memory.
///
/// Errors: fewer bytes are left.
pub(super) fn exactly(input: impl Read, count: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    input.take(count).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    match bytes.len() as u64 == count {
        true => Ok(bytes),
        false => Err(format!("ends after {} of {count} bytes", bytes.len())),
    }
}

/// Value of a header field.
#[derive(Debug)]
enum HeadField {
    Bool(bool),
    Number(i64),
    Struct(HeadFields),
    /// A field whose value is skipped.
    Unused,
}

type HeadFields = BTreeMap<i64, HeadField>;

fn number(fields: &HeadFields, id: i64) -> Result<i64, String> {
    match fields.get(&id) {
        Some(HeadField::Number(value)) => Ok(*value),
        _ => Err(format!("has a page whose head lacks field {id}")),
    }
}

/// Reads the fields of a struct in Thrift's compact protocol.
fn fields(input: &mut impl BufRead, depth: usize) -> Result<HeadFields, String> {
    let mut fields = BTreeMap::new();
    let mut id = 0i64;
    loop {
        let head = byte(input)?;
        if head == 0 {
            return Ok(fields);
        }
        id = match i64::from(head >> 4) {
            0 => zigzag(input)?,
            step => id.checked_add(step).ok_or("has a page whose head is malformed")?,
        };
        let field = match head & 0xf {
            1 => HeadField::Bool(true),
            2 => HeadField::Bool(false),
            3 => HeadField::Number(i64::from(byte(input)?)),
            4..=6 => HeadField::Number(zigzag(input)?),
            7 => unused(input, 8)?,
            8 => {
                let length = varint(input)?;
                unused(input, length)?
            }
            12 if depth < MAX_DEPTH => HeadField::Struct(self::fields(input, depth + 1)?),
            other => return Err(format!("has a page whose head holds a value of type {other}")),
        };
        if fields.len() > 64 {
            return Err("has a page whose head has too many fields".into());
        }
        fields.insert(id, field);
    }
}

fn zigzag(input: &mut impl Read) -> Result<i64, String> {
    let value = varint(input)?;
    Ok((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
}

fn unused(input: &mut impl Read, bytes: u64) -> Result<HeadField, String> {
    match io::copy(&mut input.take(bytes), &mut io::sink()).map_err(|e| e.to_string())? == bytes {
        true => Ok(HeadField::Unused),
        false => Err("ends inside the head of a page".into()),
    }
}
