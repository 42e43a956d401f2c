//! The record of an export: its source and its content.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Provenance, Sha256Digest};
use crate::bundle::{Component, ModelSource, Role};
use crate::eval::Check;
use crate::graft::Unmatched;
use crate::ir::Model;

use super::precision::{QuantisedComponent, Sensitivity};
use super::triton::Serving;

/// Version of the schema of an export's own record.
pub const EXPORT_SCHEMA_VERSION: u32 = 1;

/// How an export is written. Each target says which of these it reads; another one that is set is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSettings {
    /// Largest batch of models in which all inputs and outputs share a free first dimension; others get 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch_size: Option<u32>,
    /// Precision variant of each component (`fp16`, `q4`, ..).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Writes files of a newer ONNX IR version as this one, for consumers that refuse newer ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ir_version: Option<i64>,
    /// Writes operators of ONNX Runtime's own domain as standard ones.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub standard_ops: bool,
    /// Raises the default operator set to this version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opset: Option<i64>,
    /// Splits initializers of more bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_buffer_bytes: Option<u64>,
    /// How Triton runs the models.
    #[serde(skip_serializing_if = "is_default")]
    pub serving: Serving,
    /// Hugging Face checkpoint that the graphs were exported from. The record has its digest, not its path.
    #[serde(skip)]
    pub base: Option<PathBuf>,
    /// The model before it was trained; as above.
    #[serde(skip)]
    pub dense: Option<ModelSource>,
    /// Reports of `eval` whose scores go into the manifest.
    #[serde(skip)]
    pub reports: Vec<PathBuf>,
    /// Largest size of a weight file in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_bytes: Option<u64>,
}

fn is_default(serving: &Serving) -> bool {
    *serving == Serving::default()
}

/// `interlace-export.json`: what an export was made from and what is in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Export {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Name of the target.
    pub target: String,
    /// Models by name.
    pub models: BTreeMap<String, ExportedModel>,
    /// SHA-256 of every other file, by path.
    pub files: BTreeMap<String, Sha256Digest>,
    /// What a user of the export should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What the graphs compute beside the largest buffer, where one was named, or for WebGPU: the checks of `verify --max-buffer`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buffers: Vec<Check>,
    /// Where the tensors of a written checkpoint come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<CheckpointWeights>,
    /// Components that were quantised for this export.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub precision: Vec<QuantisedComponent>,
    /// What their parts cost in fewer bits, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,
}

/// Where the weights of a written checkpoint come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointWeights {
    /// Tensors written.
    pub tensors: usize,
    /// Those with other values than in the base.
    pub changed: usize,
    /// Tensors of the base that are in none of the graphs, written with the base's values.
    pub from_base: Vec<String>,
    /// Weights of the graphs that are made of no tensor of the base: tables of rotations, masks.
    pub unmatched: Vec<Unmatched>,
}

/// What a target has written.
pub(super) struct Written {
    /// The settings, with what the target takes where nothing is said.
    pub settings: ExportSettings,
    /// As [`Export::models`].
    pub models: BTreeMap<String, ExportedModel>,
    /// As [`Export::files`].
    pub files: BTreeMap<String, Sha256Digest>,
    /// As [`Export::notes`].
    pub notes: Vec<String>,
    /// Digests of inputs besides the model, by name.
    pub inputs: BTreeMap<String, Sha256Digest>,
    /// As [`Export::weights`].
    pub weights: Option<CheckpointWeights>,
}

/// One model of an export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportedModel {
    /// The component's path in the bundle.
    pub source: String,
    /// What the component computes.
    pub role: Role,
    /// Number of inputs.
    pub inputs: usize,
    /// Number of outputs.
    pub outputs: usize,
    /// Bytes of the ONNX file and its external data.
    pub size_bytes: u64,
    /// Inputs and outputs that are scalars in the component and have one axis of size 1 here, as Triton has no scalars.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reshaped: Vec<String>,
}

impl ExportedModel {
    /// A component that was written as `model`, in files of this size in bytes.
    pub(super) fn new(component: &Component, model: &Model, size_bytes: u64) -> Self {
        ExportedModel {
            source: component.file.clone(),
            role: component.role,
            inputs: model.graph.body.inputs.len(),
            outputs: model.graph.body.outputs.len(),
            size_bytes,
            reshaped: Vec::new(),
        }
    }
}
