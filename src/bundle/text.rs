//! Text and JSON files of a model folder, limited in size.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::base::{Error, Result};

/// The largest text file that is read, in bytes.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Reads a text of at most 64 MiB.
///
/// Errors: `Error::Io` when unreadable; `Error::Invalid` when larger or not UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let size = fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
    if size > MAX_TEXT_BYTES {
        return Err(Error::invalid(
            format!("`{}`", path.display()),
            format!("is {size} bytes long, expected at most {MAX_TEXT_BYTES}"),
        )
        .remedy("no config is so large: move the file out of the folder"));
    }
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    String::from_utf8(bytes).map_err(|_| {
        Error::invalid(format!("`{}`", path.display()), "is not UTF-8").remedy("save it as UTF-8, or move it away")
    })
}

/// Reads a JSON file of at most 64 MiB.
///
/// Errors: as `read_text`, and `Error::Invalid` when it is not JSON.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?).map_err(|e| {
        Error::invalid(format!("`{}`", path.display()), format!("not JSON: {e}"))
            .remedy("correct the file, or download it again")
    })
}
