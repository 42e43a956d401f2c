//! Text files of a model folder, limited in size.

use std::fs;
use std::path::Path;

use crate::base::{Error, Result};

/// The largest text file that is read, in bytes.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads a text of at most 64 MiB.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let size = fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
    if size > MAX_JSON_BYTES {
        return Err(Error::invalid(
            format!("`{}`", path.display()),
            format!("is {size} bytes long, expected at most {MAX_JSON_BYTES}"),
        )
        .remedy("no config is so large: move the file out of the folder"));
    }
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    String::from_utf8(bytes).map_err(|_| {
        Error::invalid(format!("`{}`", path.display()), "is not UTF-8").remedy("save it as UTF-8, or move it away")
    })
}
