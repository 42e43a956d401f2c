//! Keys of data rows without a part of the conversation, and the error for keys that no reader knows.

use crate::base::{Error, list_preview};

use super::options::DataOptions;

/// Columns and keys that say where a row comes from or what it is about.
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
/// Endings of columns that rate a row.
const SILENT_ENDINGS: &[&str] = &["_ratings", "_rating", "_min", "_score"];

/// True for a column or key that is not read and holds nothing of the conversation.
pub(super) fn is_silent(key: &str, options: &DataOptions) -> bool {
    SILENT.contains(&key)
        || SILENT_ENDINGS.iter().any(|ending| key.ends_with(ending))
        || options.min_ratings.contains_key(key)
        || options.ignore_keys.iter().any(|ignored| ignored == key)
}

/// The error for keys that may hold a part of the conversation.
pub(super) fn unread(subject: impl Into<String>, keys: &[String]) -> Error {
    Error::unsupported(subject, format!("nothing reads {}", list_preview(keys, 8))).remedy(format!(
        "remove what the model should not learn from; `--ignore-keys {}` reads the data without it",
        keys.join(",")
    ))
}
