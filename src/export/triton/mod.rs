//! Triton Inference Server: a model repository with one model per component.
//!
//! ```text
//! REPOSITORY/
//!   interlace-export.json        the record of the export, with digests
//!   vision_encoder/config.pbtxt
//!   vision_encoder/1/model.onnx  and its data file
//!   embed_tokens/...
//!   decoder_model_merged/...
//!   decoder_model_merged/processor/   tokenizer, processor and configs, for clients; the server ignores it
//! ```

mod config;
mod rules;
mod scalars;

mod schema;

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{Error, Result};
use crate::bundle::{AssetKind, Bundle};
use crate::onnx::{self, Storage};

use super::components::{cap_ir_version, chosen, copy, create, size_of, write as write_text};
use super::record::{ExportSettings, ExportedModel, Written};

pub use config::{MODEL_FILE, config_text};

/// Default for the largest batch.
pub const MAX_BATCH_SIZE: u32 = 8;

/// Writes a model repository into the folder `root`.
///
/// Errors: `Error::Invalid` when the bundle lacks the requested variant or two components would get the same name;
/// `Error::Unsupported` for inputs of a type that Triton lacks and for weights that the IR version lacks; `Error::Io`
/// when writing fails.
pub(super) fn write(bundle: &Bundle, settings: &ExportSettings, root: &Path) -> Result<Written> {
    let settings =
        ExportSettings { max_batch_size: Some(settings.max_batch_size.unwrap_or(MAX_BATCH_SIZE)), ..settings.clone() };
    let mut models = BTreeMap::new();
    let mut processor = None;
    for component in chosen(bundle, settings.variant.as_deref())? {
        let name = file_name(&component.stem);
        if models.contains_key(&name) {
            return Err(Error::invalid(format!("model `{name}`"), "names two components")
                .remedy("export a folder with one of them"));
        }
        let mut model = onnx::load(&bundle.path_of(component))?;
        if let Some(version) = settings.max_ir_version {
            cap_ir_version(&name, &mut model, version)?;
        }
        let reshaped = scalars::with_an_axis(&mut model)?;
        let config = config_text(&name, &model, settings.max_batch_size.unwrap_or(MAX_BATCH_SIZE))?;
        let version_folder = root.join(&name).join("1");
        create(&version_folder)?;
        let storage = if component.external.is_empty() {
            Storage::Inline
        } else {
            Storage::External { file_name: format!("{MODEL_FILE}_data"), chunk_bytes: None }
        };
        let data = onnx::save(&model, &version_folder.join(MODEL_FILE), &storage)?;
        let size_bytes = size_of(&version_folder, data.iter().map(String::as_str).chain([MODEL_FILE]))?;
        write_text(&root.join(&name).join("config.pbtxt"), &config)?;
        if component.role.is_decoder() && processor.is_none() {
            processor = Some(format!("{name}/processor"));
        }
        models.insert(name, ExportedModel { reshaped, ..ExportedModel::new(component, &model, size_bytes) });
    }
    let mut files = BTreeMap::new();
    for asset in bundle.assets() {
        if AssetKind::is_licence(&asset.file) {
            copy(bundle, asset, root, asset.file.clone(), &mut files)?;
        }
        let (Some(folder), AssetKind::Config | AssetKind::Tokenizer) = (&processor, asset.kind) else { continue };
        copy(bundle, asset, root, format!("{folder}/{}", asset.file), &mut files)?;
    }
    Ok(Written { settings, models, files, notes: Vec::new(), inputs: BTreeMap::new(), weights: None })
}

fn file_name(stem: &str) -> String {
    match stem.rsplit_once('/') {
        // Layouts with one folder per component name every file `model`.
        Some((folder, "model")) if folder != "onnx" => folder.rsplit('/').next().unwrap_or(folder).to_string(),
        Some((_, name)) => name.to_string(),
        None => stem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_after_its_file_or_its_folder() {
        for (stem, want) in [
            ("onnx/decoder_model_merged", "decoder_model_merged"),
            ("onnx/model", "model"),
            ("decoder/model", "decoder"),
            ("model", "model"),
        ] {
            assert_eq!(file_name(stem), want);
        }
    }
}
