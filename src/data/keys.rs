//! Keys of data rows that hold no part of the conversation, and the error for keys without a reader.

use crate::base::{Error, list_preview};

use super::options::DataOptions;

/// Columns and keys that describe the origin or the subject of a row.
const SILENT: &[&str] = &[
    "__index_level_0__",
    "category",
    "data_source",
    "dataset",
    "dataset_name",
    "date",
    "dump",
    "file_path",
    "height",
    "id",
    "idx",
    "image_height",
    "image_id",
    "image_width",
    "index",
    "lang",
    "language",
    "language_score",
    "license",
    "meta",
    "metadata",
    "model",
    "page",
    "prompt_id",
    "question_id",
    "source",
    "split",
    "subset",
    "task",
    "timestamp",
    "token_count",
    "url",
    "uuid",
    "width",
];
/// Suffixes of rating columns.
const SILENT_ENDINGS: &[&str] = &["_ratings", "_rating", "_min", "_score"];

/// True for a column or key that is ignored: known metadata, a rating, or an entry of `ignore_keys`.
pub(super) fn is_silent(key: &str, options: &DataOptions) -> bool {
    SILENT.contains(&key)
        || SILENT_ENDINGS.iter().any(|ending| key.ends_with(ending))
        || options.min_ratings.contains_key(key)
        || options.ignore_keys.iter().any(|ignored| ignored == key)
}

/// The error for keys that have no reader but may hold a part of the conversation.
pub(super) fn unread(subject: impl Into<String>, keys: &[String]) -> Error {
    Error::unsupported(subject, format!("has keys without a reader: {}", list_preview(keys, 8))).remedy(format!(
        "remove what the model should not learn from; `--ignore-keys {}` reads the data without it",
        keys.join(",")
    ))
}
