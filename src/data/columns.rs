//! The columns of a Parquet file that hold conversations, and how to read their cells.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, OffsetSizeTrait, StructArray};
use arrow::datatypes::{DataType, Float64Type, Schema};

use crate::base::{Error, Result, shortened};

use super::keys::{is_silent, unread};
use super::options::DataOptions;
use super::row::{RawMessage, RawPiece, Speaker};
use super::sample::ImageBytes;

/// Reads the messages of one row from its list of structs.
type ReadMessages = fn(&ArrayRef) -> Result<Vec<RawMessage>, String>;

/// Layout of a column of conversations.
pub(super) struct ColumnLayout {
    pub column: &'static str,
    holds: &'static str,
    read: ReadMessages,
}

/// All supported layouts.
const LAYOUTS: &[ColumnLayout] = &[
    ColumnLayout { column: "texts", holds: "list of struct{user, assistant}", read: pairs },
    ColumnLayout {
        column: "conversations",
        holds: "list of struct{from, value}",
        read: |cells| role_messages(cells, "from", "value"),
    },
    ColumnLayout {
        column: "messages",
        holds: "list of struct{role, content}",
        read: |cells| role_messages(cells, "role", "content"),
    },
];

/// Names of the picture columns.
const IMAGE_COLUMNS: [&str; 2] = ["images", ONE_IMAGE];
/// Picture column with one picture per cell. The other column has a list per cell.
const ONE_IMAGE: &str = "image";

/// The columns of a Parquet file that are read.
#[derive(Clone)]
pub(super) struct Columns {
    layout: &'static ColumnLayout,
    images: Vec<&'static str>,
    id: bool,
    ratings: Vec<String>,
}

impl std::fmt::Debug for Columns {
    fn fmt(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        out.debug_struct("Columns").field("messages", &self.layout.column).field("images", &self.images).finish()
    }
}

impl Columns {
    /// Finds the columns in a schema. `is_null` returns true for a column that is null in every row.
    ///
    /// Errors: `Error::Invalid` without a column of conversations, or when a column of `min_ratings` is missing;
    /// `Error::Unsupported` names the columns that have content but no reader.
    pub fn of(schema: &Schema, subject: &str, options: &DataOptions, is_null: impl Fn(&str) -> bool) -> Result<Self> {
        let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        let layout = LAYOUTS.iter().find(|layout| names.contains(&layout.column)).ok_or_else(|| {
            let known: Vec<String> =
                LAYOUTS.iter().map(|layout| format!("`{}` ({})", layout.column, layout.holds)).collect();
            Error::invalid(subject, format!("has no column of conversations, only {}", names.join(", ")))
                .remedy(format!("expected {}, with pictures in `images` or `image`", known.join(" or ")))
        })?;
        let images: Vec<&'static str> = IMAGE_COLUMNS.into_iter().filter(|name| names.contains(name)).collect();
        if let Some(missing) = options.min_ratings.keys().find(|name| !names.contains(&name.as_str())) {
            return Err(Error::invalid(subject, format!("has no column `{missing}`, only {}", names.join(", ")))
                .remedy("name one of these columns, or leave the rating out"));
        }
        let silent = |name: &&str| *name == layout.column || images.contains(name) || is_silent(name, options);
        let held: Vec<String> =
            names.iter().filter(|name| !silent(name) && !is_null(name)).map(|name| name.to_string()).collect();
        if !held.is_empty() {
            return Err(unread(subject, &held));
        }
        let ratings = options.min_ratings.keys().cloned().collect();
        Ok(Columns { layout, images, id: names.contains(&"id"), ratings })
    }

    /// The columns that are read to list rows.
    pub fn listed(&self) -> Vec<&str> {
        let id = self.id.then_some("id");
        std::iter::once(self.layout.column).chain(id).chain(self.ratings.iter().map(String::as_str)).collect()
    }

    /// The columns that are read to build samples.
    pub fn read(&self) -> Vec<&str> {
        let id = self.id.then_some("id");
        std::iter::once(self.layout.column).chain(id).chain(self.images.iter().copied()).collect()
    }

    /// Picture columns whose bytes are in one Parquet leaf column. The flag is true when the leaf is the struct field
    /// `bytes`.
    pub fn picture_leaves(&self, schema: &Schema) -> Vec<(&'static str, bool)> {
        let leaf = |name: &&'static str| {
            let bytes =
                |kind: &DataType| matches!(kind, DataType::Binary | DataType::LargeBinary | DataType::BinaryView);
            let cell = match (*name, schema.field_with_name(name).ok()?.data_type()) {
                (ONE_IMAGE, kind) => kind,
                (_, DataType::List(element) | DataType::LargeList(element)) => element.data_type(),
                _ => return None,
            };
            match cell {
                DataType::Struct(fields) => {
                    fields.find("bytes").filter(|(_, field)| bytes(field.data_type())).map(|_| (*name, true))
                }
                kind => bytes(kind).then_some((*name, false)),
            }
        };
        self.images.iter().filter_map(leaf).collect()
    }

    /// The messages of a row.
    ///
    /// Errors: a message that describes the invalid cell.
    pub fn messages(&self, rows: &StructArray, place: usize) -> Result<Vec<RawMessage>, String> {
        let cell = list_at(column(rows, self.layout.column)?, place)?;
        (self.layout.read)(&cell).map_err(|problem| format!("`{}` {problem}", self.layout.column))
    }

    /// The content of the column `id`: a non-empty string or a number.
    pub fn id(&self, rows: &StructArray, place: usize) -> Option<String> {
        let array = rows.column_by_name("id").filter(|_| self.id)?;
        match string_at(array, place) {
            Ok(text) => text.filter(|text| !text.is_empty()),
            Err(_) => number_at(array, place).map(|number| number.to_string()),
        }
    }

    /// A row's rating in a column: a number, or the minimum of a list of numbers. `None` for a null and for other
    /// types.
    pub fn rating(&self, rows: &StructArray, name: &str, place: usize) -> Option<f64> {
        let array = rows.column_by_name(name)?;
        match list_at(array, place) {
            Ok(list) => {
                let numbers = (0..list.len()).map(|item| number_at(&list, item));
                numbers.collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::min)
            }
            Err(_) => number_at(array, place),
        }
    }

    /// The encoded pictures of a row. `apart` holds the cells of picture columns that are not in `rows`.
    ///
    /// Errors: a message that describes the invalid cell.
    pub fn pictures(
        &self,
        rows: &StructArray,
        place: usize,
        subject: &str,
        mut apart: HashMap<&'static str, Cells>,
    ) -> Result<Vec<ImageBytes>, String> {
        let mut images = Vec::new();
        for name in &self.images {
            let cells = match apart.remove(name) {
                Some(cells) => cells,
                None => cells_of(column(rows, name)?, *name == ONE_IMAGE, place)?,
            };
            // A row without a picture has a null, or a picture without bytes and without a path.
            let blank = *name == ONE_IMAGE && cells.iter().all(Option::is_none);
            if blank && rows.column_by_name(name).is_none_or(|array| is_blank(&array.slice(place, 1))) {
                continue;
            }
            if !images.is_empty() && !cells.is_empty() {
                return Err("has pictures in both `image` and `images`".into());
            }
            for (image, content) in cells.into_iter().enumerate() {
                let content = content.ok_or_else(|| {
                    format!("image {image} has no bytes; only pictures held in the file itself can be read")
                })?;
                images.push(ImageBytes::held(format!("image {image} of {subject}"), content));
            }
        }
        Ok(images)
    }
}

/// The encoded pictures of a row; `None` for a null.
pub(super) type Cells = Vec<Option<Arc<[u8]>>>;

/// The pictures of a cell: one picture if `one` is true, otherwise a list.
fn cells_of(array: &ArrayRef, one: bool, place: usize) -> Result<Cells, String> {
    if array.is_null(place) {
        return Ok(Vec::new());
    }
    let cells = if one { array.slice(place, 1) } else { list_at(array, place)? };
    let bytes = match cells.as_struct_opt() {
        Some(cells) => cells.column_by_name("bytes").cloned().ok_or("holds pictures without a field `bytes`")?,
        None => cells,
    };
    (0..bytes.len()).map(|image| binary_at(&bytes, image)).collect()
}

/// The fields of a struct array with these names. Any other field is an error, unless it is silent (see `is_silent`) or
/// null in every element.
fn fields<'a, const N: usize>(cells: &'a ArrayRef, names: [&str; N]) -> Result<[&'a ArrayRef; N], String> {
    let cells = cells.as_struct_opt().ok_or_else(|| format!("is not a list of struct{{{}}}", names.join(", ")))?;
    let none = DataOptions::default();
    for (name, array) in cells.column_names().iter().zip(cells.columns()) {
        if !names.contains(name) && !is_silent(name, &none) && array.logical_null_count() < array.len() {
            return Err(format!("has a field `{name}` that the reader does not know"));
        }
    }
    let mut found = Vec::with_capacity(N);
    for name in names {
        found.push(cells.column_by_name(name).ok_or_else(|| format!("has no field `{name}`"))?);
    }
    found.try_into().map_err(|_| format!("is not a list of struct{{{}}}", names.join(", ")))
}

fn pairs(cells: &ArrayRef) -> Result<Vec<RawMessage>, String> {
    let [user, assistant] = fields(cells, ["user", "assistant"])?;
    let mut messages = Vec::with_capacity(2 * cells.len());
    for turn in 0..cells.len() {
        for (array, name, speaker) in [(user, "user", Speaker::User), (assistant, "assistant", Speaker::Assistant)] {
            let text = string_at(array, turn)?.ok_or_else(|| format!("text {turn} has no `{name}`"))?;
            messages.push(RawMessage::text(speaker, text));
        }
    }
    Ok(messages)
}

fn role_messages(cells: &ArrayRef, role: &str, content: &str) -> Result<Vec<RawMessage>, String> {
    let [roles, contents] = fields(cells, [role, content])?;
    let mut messages = Vec::with_capacity(cells.len());
    for number in 0..cells.len() {
        let name = string_at(roles, number)?.ok_or_else(|| format!("message {number} has no `{role}`"))?;
        let speaker = Speaker::named(&name)
            .ok_or_else(|| format!("has a message of `{}`, expected system, user or assistant", shortened(&name)))?;
        if contents.is_null(number) {
            return Err(format!("message {number} has no `{content}`"));
        }
        let pieces = match list_at(contents, number) {
            Ok(parts) => parts_of(&parts)?,
            Err(_) => vec![RawPiece::Text(string_at(contents, number)?.unwrap_or_default())],
        };
        messages.push(RawMessage { speaker, pieces });
    }
    Ok(messages)
}

/// Parses the parts of a message, each a `struct{type, text, index}`. `index` is the position of a picture in the row.
fn parts_of(parts: &ArrayRef) -> Result<Vec<RawPiece>, String> {
    let cells = parts.as_struct_opt().ok_or("`content` is not a list of struct{type, text}")?;
    let none = DataOptions::default();
    for (name, array) in cells.column_names().iter().zip(cells.columns()) {
        let known = ["type", "text", "index"].contains(name) || is_silent(name, &none);
        if !known && array.logical_null_count() < array.len() {
            return Err(format!("has parts with a field `{name}` that the reader does not know"));
        }
    }
    let kinds = cells.column_by_name("type").ok_or("`content` has no field `type`")?;
    let mut pieces = Vec::with_capacity(cells.len());
    for part in 0..cells.len() {
        let kind = string_at(kinds, part)?.unwrap_or_default();
        let text = match cells.column_by_name("text") {
            Some(texts) => string_at(texts, part)?,
            None => None,
        };
        pieces.push(match (kind.as_str(), text) {
            ("text", Some(text)) => RawPiece::Text(text),
            ("image", _) => {
                let index = cells.column_by_name("index").and_then(|indices| number_at(indices, part));
                if let Some(index) = index.filter(|index| *index < 0.0 || index.fract() != 0.0) {
                    return Err(format!("shows picture {index}, expected a position from 0"));
                }
                RawPiece::Image(index.map(|index| index as usize))
            }
            (kind, _) => return Err(format!("has a part of type `{}`, expected text or image", shortened(kind))),
        });
    }
    Ok(pieces)
}

/// True for a null, and for one picture without bytes and without a path.
fn is_blank(cell: &ArrayRef) -> bool {
    cell.is_null(0) || cell.as_struct_opt().is_some_and(|cell| cell.columns().iter().all(|field| field.is_null(0)))
}

fn column<'a>(rows: &'a StructArray, name: &str) -> Result<&'a ArrayRef, String> {
    rows.column_by_name(name).ok_or(format!("has no column `{name}`"))
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
        DataType::Null => return Ok(None),
        DataType::Utf8 => array.as_string::<i32>().value(row),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row),
        DataType::Utf8View => array.as_string_view().value(row),
        _ => return Err(wrong_type(array, "a string")),
    };
    Ok(Some(text.to_string()))
}

fn number_at(array: &ArrayRef, row: usize) -> Option<f64> {
    if array.is_null(row) || !(array.data_type().is_numeric()) {
        return None;
    }
    let one = arrow::compute::cast(&array.slice(row, 1), &DataType::Float64).ok()?;
    Some(one.as_primitive_opt::<Float64Type>()?.value(0))
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
