//! Reads ONNX files into [`ir::Model`] and writes them; the only module that knows protobuf.
//!
//! Reading never copies a weight: payloads inside the `.onnx` file and external data are both ranges of memory maps.
//! Writing copies payloads from file to file inside the kernel.

mod decode;
mod encode;
mod external;
mod locations;
mod opaque;
mod order;
mod save;
mod tensor;
mod wire;

pub use encode::Placed;
pub use locations::external_locations;
pub use save::{INLINE_LIMIT, Metadata, Storage, save, save_into, save_sharing, save_with};

use std::path::Path;
use std::sync::Arc;

use crate::base::{Error, MappedFile, Result, folder_of};
use crate::ir;

/// Remedy for a file that breaks a rule of ONNX.
const DAMAGED: &str = "the file is damaged, or its exporter breaks a rule of ONNX: download or export the model again";

/// Reads a model. Weights stay in their files and are mapped.
///
/// Errors: `Error::Io` when a file is missing or unreadable; `Error::Invalid` when the bytes are not an ONNX model,
/// when a graph reads an undefined value, or when external data is outside the folder; `Error::Unsupported` for sparse
/// initializers and training graphs.
pub fn load(path: &Path) -> Result<ir::Model> {
    let file = Arc::new(MappedFile::open(path)?);
    let scan = wire::scan(&file).map_err(|problem| {
        Error::invalid(format!("`{}`", path.display()), problem).remedy("check that the file is a whole ONNX model")
    })?;
    let folder = folder_of(path);
    let mut sources = external::Sources::new(folder, Arc::clone(&file));
    let model = decode::model(&scan, &mut sources, path).and_then(|model| ir::check(&model).map(|()| model));
    model.map_err(|error| error.or_remedy(DAMAGED))
}

#[cfg(test)]
mod round_trip_tests;
#[cfg(test)]
mod tests;
