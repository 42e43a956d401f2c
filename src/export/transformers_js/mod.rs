//! transformers.js: a folder in the layout of the hub's `onnx-community` models.
//!
//! ```text
//! FOLDER/
//!   config.json                  with the number of data files of each ONNX file
//!   preprocessor_config.json     flat, with `processor_class`
//!   tokenizer_config.json        with the chat template
//!   onnx/vision_encoder.onnx     the components under the expected names, with `_fp16`, `_q4` .. appended
//!   onnx/decoder_model_merged.onnx, onnx/decoder_model_merged.onnx_data
//! ```
//!
//! Source of the names: transformers.js 4.3, `models/session_config.js`, `utils/dtypes.js` and `utils/model-loader.js`.

mod configs;
mod rules;
mod webgpu;

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{Cancel, Result, sha256_file};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::WEBGPU_BUFFER_BYTES;
use crate::onnx;
use crate::rewrite::narrow_positions;

use super::components::{chosen, convert, copy, create, is_carried, size_of, storage, write as write_text};
use super::nodes::same_name;
use super::packing::Packing;
use super::record::{ExportSettings, ExportedModel, Written};

/// Largest data file in bytes: browsers hold at most 2 GiB in one buffer.
const CHUNK_BYTES: u64 = 2_000_000_000;
/// Weights of up to this many bytes stay inside the ONNX file.
const INLINE_BYTES: u64 = 256 << 20;

/// Writes a folder for transformers.js into `root`. Without a requested variant all variants
/// of a component are written.
///
/// Errors: `Error::Unsupported` for a model type, component, input or output that transformers.js does not support;
/// `Error::Invalid` when a processor class, tokenizer or template is missing.
pub(super) fn write(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    write_for(bundle, settings, root, Device::Any, cancel)
}

/// The same for WebGPU alone.
///
/// Errors: as [`write`]; `Error::Unsupported` for a graph that WebGPU does not compute, and for a weight above the largest buffer
/// that cannot be split.
pub(super) fn webgpu(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let limit = settings.max_buffer_bytes.unwrap_or(WEBGPU_BUFFER_BYTES);
    write_for(
        bundle,
        &ExportSettings { max_buffer_bytes: Some(limit), ..settings.clone() },
        root,
        Device::WebGpu,
        cancel,
    )
}

/// Where transformers.js runs the graphs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Device {
    /// On the device that the program names.
    Any,
    /// On WebGPU, unless the program names another.
    WebGpu,
}

fn write_for(
    bundle: &Bundle,
    settings: &ExportSettings,
    root: &Path,
    device: Device,
    cancel: &Cancel,
) -> Result<Written> {
    let kind = rules::class_of(bundle)?;
    let components: Vec<&Component> = match &settings.variant {
        Some(variant) => chosen(bundle, Some(variant))?,
        None => bundle.components().iter().collect(),
    };
    let packing = packing_of(bundle, &components)?;
    let folder = root.join("onnx");
    create(&folder)?;
    let mut models: BTreeMap<String, ExportedModel> = BTreeMap::new();
    let mut chunks = BTreeMap::new();
    let mut notes = Vec::new();
    for component in components {
        // The requested variant is written without a suffix.
        let suffix = match (&settings.variant, component.variant.as_str()) {
            (None, variant) if !variant.is_empty() => format!("_{variant}"),
            _ => String::new(),
        };
        let file = format!("{}{suffix}.onnx", rules::stem_of(kind, component)?);
        if let Some(other) = models.get(&file) {
            return Err(same_name(&format!("onnx/{file}"), &other.source, &component.file));
        }
        let mut model = onnx::load(&bundle.path_of(component))?;
        if let Some(packing) = &packing {
            packing.apply(component, &mut model)?;
            crate::ir::check(&model)?;
            notes.push("DeepStack features are packed into `inputs_embeds`".to_string());
        }
        rules::check_ports(component, &model, bundle.config(), packing.is_some(), &mut notes)?;
        narrow_positions(&mut model);
        convert(&file, &mut model, settings, cancel)?;
        if device == Device::WebGpu {
            webgpu::check(component, &model)?;
        }
        let inline = component.external.is_empty() && bundle.size_bytes(component)? <= INLINE_BYTES;
        let storage = storage(&model, settings, inline, format!("{file}_data"), Some(CHUNK_BYTES))?;
        let data = onnx::save(&model, &folder.join(&file), &storage)?;
        if !data.is_empty() {
            chunks.insert(file.clone(), data.len());
        }
        let size_bytes = size_of(&folder, data.iter().map(String::as_str).chain([file.as_str()]))?;
        models.insert(file, ExportedModel::new(component, &model, size_bytes));
    }
    let has_vision = bundle.component(Role::VisionEncoder).is_some();
    let device = (device == Device::WebGpu).then_some(webgpu::DEVICE);
    let texts = configs::rewritten(bundle, has_vision, &chunks, device)?;
    let mut files = BTreeMap::new();
    for (path, text) in &texts {
        write_text(&root.join(path), text)?;
        files.insert(path.clone(), sha256_file(&root.join(path))?);
    }
    for asset in bundle.assets() {
        if !is_carried(asset) || texts.contains_key(&asset.file) || rules::is_foreign(&asset.file) {
            continue;
        }
        copy(bundle, asset, root, asset.file.clone(), &mut files)?;
    }
    notes.sort();
    notes.dedup();
    Ok(Written { settings: settings.clone(), models, files, notes, inputs: BTreeMap::new(), weights: None })
}

/// How DeepStack features get to the decoder; `None` for a model without them.
///
/// Errors: as [`Packing::of`] and `onnx::load`.
fn packing_of(bundle: &Bundle, components: &[&Component]) -> Result<Option<Packing>> {
    let of = |role: Role| components.iter().find(|component| component.role == role);
    let load = |component: &&Component| onnx::load(&bundle.path_of(component));
    match (of(Role::Decoder), of(Role::EmbedTokens), of(Role::VisionEncoder)) {
        (Some(decoder), Some(embedding), Some(_)) => Packing::of(&load(decoder)?, &load(embedding)?),
        _ => Ok(None),
    }
}
