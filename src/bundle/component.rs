//! One component of a model folder.

use serde::Serialize;

use super::layout::Role;

/// One ONNX file of a folder, with the files of its weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Component {
    /// Part of the model that it computes.
    pub role: Role,
    /// Path below the folder without variant and extension: `onnx/decoder_model_merged`.
    pub stem: String,
    /// `""`, `fp16`, `q4` ..
    pub variant: String,
    /// Path of the `.onnx` file below the folder.
    pub file: String,
    /// Paths of its external data below the folder.
    pub external: Vec<String>,
}
