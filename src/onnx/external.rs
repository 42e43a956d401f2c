//! External data: maps each file named by a model once, and refuses files outside the model's folder.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::{Error, MappedFile, Result, contained_path};
use crate::ir::TensorData;

/// The files with the contents of a model's tensors.
pub struct Sources {
    folder: PathBuf,
    own: Arc<MappedFile>,
    files: HashMap<String, Arc<MappedFile>>,
}

impl Sources {
    /// `own` is the model file, `folder` the folder that contains all external data.
    pub fn new(folder: &Path, own: Arc<MappedFile>) -> Self {
        Sources { folder: folder.to_path_buf(), own, files: HashMap::new() }
    }

    /// A payload inside the model file.
    pub fn inside(&self, offset: usize, length: usize) -> TensorData {
        TensorData::Mapped {
            file: Arc::clone(&self.own),
            offset: offset as u64,
            length: length as u64,
            external: false,
        }
    }

    /// A payload that the model names by location, offset and length. `want` is the number of bytes
    /// that type and shape need.
    ///
    /// Errors: `Error::Invalid` when the entries are malformed, leave the folder or exceed the file.
    pub fn external(&mut self, tensor: &str, entries: &[(&str, &str)], want: u64) -> Result<TensorData> {
        let subject = || format!("external data of `{tensor}`");
        let mut location = None;
        let mut offset = 0u64;
        let mut length = None;
        for &(key, value) in entries {
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| Error::invalid(subject(), format!("{key} `{value}` is not a whole number")))
            };
            match key {
                "location" => location = Some(value),
                "offset" => offset = number()?,
                "length" => length = Some(number()?),
                // Checksums cover the whole file and are optional. A rewritten file has another checksum.
                "checksum" => {}
                _ => return Err(Error::invalid(subject(), format!("has an entry `{key}` that ONNX does not define"))),
            }
        }
        let location = location.ok_or_else(|| Error::invalid(subject(), "names no location"))?;
        let length = length.unwrap_or(want);
        let file = match self.files.get(location) {
            Some(file) => Arc::clone(file),
            None => {
                let path = contained_path(&self.folder, location)?;
                let file = Arc::new(MappedFile::open(&path)?);
                self.files.insert(location.to_string(), Arc::clone(&file));
                file
            }
        };
        if length != want {
            return Err(Error::invalid(subject(), format!("is {length} bytes long, its type and shape take {want}")));
        }
        match offset.checked_add(length) {
            Some(end) if end <= file.len() as u64 => Ok(TensorData::Mapped { file, offset, length, external: true }),
            _ => Err(Error::invalid(
                subject(),
                format!("{length} bytes at {offset} reach past the end of `{location}` ({} bytes)", file.len()),
            )
            .remedy("the data file is cut off or belongs to another model")),
        }
    }
}
