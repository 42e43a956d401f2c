//! Triton Inference Server: a model repository with one model per component.
//!
//! ```text
//! REPOSITORY/
//!   interlace-export.json        what was exported, with digests
//!   vision_encoder/config.pbtxt
//!   vision_encoder/1/model.onnx  and its data file beside it
//!   embed_tokens/...
//!   decoder_model_merged/...
//!   decoder_model_merged/processor/   tokenizer, processor and configs, for clients; the server passes over it
//! ```

mod config;
mod rules;
mod scalars;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, Sha256Digest, StagedDir, list_preview, sha256_file, write_json};
use crate::bundle::{AssetKind, Bundle, Component, Role};
use crate::ir::{DataType, Model};
use crate::onnx::{self, Storage};

pub use config::{MODEL_FILE, config_text};

/// Version of the schema of an export's own record.
pub const EXPORT_SCHEMA_VERSION: u32 = 1;
/// Name of the record in the repository; Triton reads folders only.
pub const EXPORT_FILE: &str = "interlace-export.json";

/// How a repository is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TritonSettings {
    /// For models in which all inputs and outputs share a free first dimension; others get 0.
    pub max_batch_size: u32,
    /// Precision variant of each component (`fp16`, `q4`, ..); the most precise one without it.
    pub variant: Option<String>,
    /// Writes files of a newer ONNX IR version as this one, for servers that refuse newer ones.
    pub max_ir_version: Option<i64>,
}

impl Default for TritonSettings {
    fn default() -> Self {
        TritonSettings { max_batch_size: 8, variant: None, max_ir_version: None }
    }
}

/// `interlace-export.json`: what a repository was made from and what is in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Export {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// `triton`.
    pub target: String,
    /// Models by name.
    pub models: BTreeMap<String, ExportedModel>,
    /// SHA-256 of every other file of the repository, by path.
    pub files: BTreeMap<String, Sha256Digest>,
}

/// One model of a repository.
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

/// Writes a model repository as a new folder.
///
/// Errors: `Error::Invalid` when the target exists, the bundle has no such variant or two components would share a name;
/// `Error::Unsupported` for inputs that Triton has no type for and weights that the IR version lacks; `Error::Io` when
/// the disk refuses. Nothing is left under the target's name then.
pub fn export(bundle: &Bundle, settings: &TritonSettings, target: &Path) -> Result<Export> {
    let staged = StagedDir::create(target)?;
    let root = staged.path();
    let mut models = BTreeMap::new();
    let mut processor = None;
    for component in components(bundle, settings.variant.as_deref())? {
        let name = file_name(&component.stem);
        if models.contains_key(&name) {
            return Err(Error::invalid(format!("model `{name}`"), "stands for two components")
                .remedy("export a folder with one of them"));
        }
        let mut model = onnx::load(&bundle.path_of(component))?;
        if let Some(version) = settings.max_ir_version {
            cap_ir_version(&name, &mut model, version)?;
        }
        let reshaped = scalars::with_an_axis(&mut model)?;
        let config = config_text(&name, &model, settings.max_batch_size)?;
        let version_folder = root.join(&name).join("1");
        create(&version_folder)?;
        let storage = if component.external.is_empty() {
            Storage::Inline
        } else {
            Storage::External { file_name: format!("{MODEL_FILE}_data"), chunk_bytes: None }
        };
        let mut size_bytes = 0;
        let data = onnx::save(&model, &version_folder.join(MODEL_FILE), &storage)?;
        for file in data.iter().map(String::as_str).chain([MODEL_FILE]) {
            let path = version_folder.join(file);
            size_bytes += fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
        }
        write(&root.join(&name).join("config.pbtxt"), &config)?;
        if component.role.is_decoder() && processor.is_none() {
            processor = Some(format!("{name}/processor"));
        }
        let exported = ExportedModel {
            source: component.file.clone(),
            role: component.role,
            inputs: model.graph.body.inputs.len(),
            outputs: model.graph.body.outputs.len(),
            size_bytes,
            reshaped,
        };
        models.insert(name, exported);
    }
    let mut files = BTreeMap::new();
    for asset in bundle.assets() {
        let (Some(folder), AssetKind::Config | AssetKind::Tokenizer) = (&processor, asset.kind) else { continue };
        let path = format!("{folder}/{}", asset.file);
        let target = root.join(&path);
        create(target.parent().unwrap_or(root))?;
        fs::copy(bundle.root().join(&asset.file), &target).map_err(|e| Error::io("write", &target, e))?;
        files.insert(path, sha256_file(&target)?);
    }
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?)]);
    let provenance = Provenance::new(EXPORT_SCHEMA_VERSION, inputs, settings)?;
    let export = Export { provenance, target: "triton".to_string(), models, files };
    write_json(&root.join(EXPORT_FILE), &export)?;
    staged.commit()?;
    Ok(export)
}

/// One component per role and stem, in the wanted variant.
fn components<'a>(bundle: &'a Bundle, variant: Option<&str>) -> Result<Vec<&'a Component>> {
    let mut chosen: Vec<&Component> = Vec::new();
    for component in bundle.components() {
        if chosen.iter().any(|other| other.stem == component.stem) {
            continue;
        }
        let variants: Vec<&Component> =
            bundle.variants(component.role).filter(|other| other.stem == component.stem).collect();
        let found = match variant {
            None => variants.first(),
            Some(wanted) => variants.iter().find(|other| other.variant == wanted),
        };
        let found = found.ok_or_else(|| {
            let names: Vec<&str> = variants.iter().map(|other| other.file.as_str()).collect();
            Error::invalid(
                format!("variant `{}` of `{}`", variant.unwrap_or_default(), component.stem),
                format!("is not there; found {}", list_preview(&names, 6)),
            )
            .remedy("name a variant that every component has, or leave `--variant` out")
        })?;
        chosen.push(found);
    }
    Ok(chosen)
}

fn cap_ir_version(name: &str, model: &mut Model, version: i64) -> Result<()> {
    if model.ir_version <= version {
        return Ok(());
    }
    // Model-local functions came with version 8; the element types below with the version given.
    let mut least = if model.functions.is_empty() { 4 } else { 8 };
    for (_, tensor) in &model.graph.body.initializers {
        least = least.max(match tensor.dtype {
            DataType::Float4E2M1 => 11,
            DataType::Float8E8M0 => 12,
            DataType::Uint2 | DataType::Int2 => 13,
            DataType::Uint4 | DataType::Int4 => 10,
            DataType::Float8E4M3Fn | DataType::Float8E4M3Fnuz | DataType::Float8E5M2 | DataType::Float8E5M2Fnuz => 9,
            _ => 4,
        });
    }
    if version < least {
        return Err(Error::unsupported(
            format!("model `{name}` as IR version {version}"),
            format!("it holds what came with version {least}"),
        )
        .remedy(format!("give `--max-ir-version {least}` or more, to a server that reads it")));
    }
    model.ir_version = version;
    Ok(())
}

fn file_name(stem: &str) -> String {
    match stem.rsplit_once('/') {
        // Layouts with one folder per component call every file `model`.
        Some((folder, "model")) if folder != "onnx" => folder.rsplit('/').next().unwrap_or(folder).to_string(),
        Some((_, name)) => name.to_string(),
        None => stem.to_string(),
    }
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_what_they_are() {
        for (stem, want) in [
            ("onnx/decoder_model_merged", "decoder_model_merged"),
            ("onnx/model", "model"),
            ("decoder/model", "decoder"),
            ("model", "model"),
        ] {
            assert_eq!(file_name(stem), want);
        }
    }

    #[test]
    fn an_ir_version_is_lowered_only_where_the_file_allows_it() {
        let mut model = Model { ir_version: 11, ..Model::default() };
        cap_ir_version("m", &mut model, 10).unwrap();
        assert_eq!(model.ir_version, 10);
        cap_ir_version("m", &mut model, 12).unwrap();
        assert_eq!(model.ir_version, 10);
        model.functions.push(crate::ir::Function::default());
        assert!(cap_ir_version("m", &mut model, 7).unwrap_err().to_string().contains("version 8"));
    }
}
