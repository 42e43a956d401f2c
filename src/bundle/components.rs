//! Assigns the ONNX files of a folder to components.

use std::path::Path;

use serde_json::Value;

use crate::base::{Error, Result, contained_path};

use super::component::Component;
use super::layout::{Components, FolderLayout, Role, VARIANTS};
use super::listing::Listing;
use super::text::read_json;

/// Sections of `genai_config.json` that name a graph, under `model`.
const GENAI_SECTIONS: &[(&str, Role)] = &[
    ("vision", Role::VisionEncoder),
    ("speech", Role::AudioEncoder),
    ("embedding", Role::EmbedTokens),
    ("decoder", Role::Decoder),
];

/// Stem of the token pruner's file.
pub(super) const TOKEN_PRUNER: &str = "token_pruner";

/// Components of `export.json`.
const EXPORT_COMPONENTS: &[(&str, Role)] = &[
    ("prefill", Role::DecoderPrefill),
    ("decode", Role::DecoderWithPast),
    ("model", Role::Decoder),
    ("decoder", Role::Decoder),
    ("forward", Role::Decoder),
    ("language_model", Role::DecoderPrefill),
    ("lm_head", Role::LmHead),
    ("image_encoder", Role::VisionEncoder),
    ("multi_modal_projector", Role::Projector),
    ("connector", Role::Projector),
    ("vision", Role::VisionEncoder),
    ("vision_encoder", Role::VisionEncoder),
    ("embed_tokens", Role::EmbedTokens),
    ("embedding", Role::EmbedTokens),
    ("audio_encoder", Role::AudioEncoder),
    ("audio_tower", Role::AudioEncoder),
];

/// The folder's components according to its layout, without their external data.
///
/// Errors: `Error::Io` and `Error::Invalid` when the file that lists them cannot be read or lists a missing file;
/// `Error::Unsupported` for unknown components.
pub(super) fn find(layout: &FolderLayout, root: &Path, listing: &Listing) -> Result<Vec<Component>> {
    let mut components = match layout.components {
        Components::Stems(rows) => components_by_stem(listing, rows),
        Components::GenaiConfig => components_of_genai(root, listing)?,
        Components::ExportJson => components_of_export(root, listing)?,
    };
    components.extend(token_pruner(&components, listing));
    Ok(components)
}

/// The token pruner of every layout, a file beside the decoder's.
fn token_pruner(components: &[Component], listing: &Listing) -> Option<Component> {
    let decoder = components.iter().find(|component| component.role.is_decoder())?;
    let (stem, variant) = (beside(&decoder.file, TOKEN_PRUNER), String::new());
    let file = format!("{stem}.onnx");
    listing.has(&file).then(|| Component { role: Role::TokenPruner, stem, variant, file, external: Vec::new() })
}

/// A path in the folder of another file.
pub(super) fn beside(file: &str, name: &str) -> String {
    file.rsplit_once('/').map_or(name.to_string(), |(folder, _)| format!("{folder}/{name}"))
}

fn components_by_stem(listing: &Listing, rows: &[(&str, Role)]) -> Vec<Component> {
    let mut components = Vec::new();
    for &(stem, role) in rows {
        for &variant in VARIANTS {
            let file = if variant.is_empty() { format!("{stem}.onnx") } else { format!("{stem}_{variant}.onnx") };
            if listing.has(&file) {
                let (stem, variant) = (stem.to_string(), variant.to_string());
                components.push(Component { role, stem, variant, file, external: Vec::new() });
            }
        }
    }
    components
}

/// The component in `file`, which the config file `by` names.
fn named_component(root: &Path, listing: &Listing, role: Role, file: &str, by: &str) -> Result<Component> {
    let subject = || format!("{by} in `{}`", root.display());
    if !listing.remote {
        contained_path(root, file)?;
    }
    if !listing.has(file) {
        return Err(Error::invalid(subject(), format!("names `{file}`, which is not there"))
            .remedy("download the model's whole folder"));
    }
    let stem = file.strip_suffix(".onnx").ok_or_else(|| {
        Error::invalid(subject(), format!("names `{file}`, expected an .onnx file")).remedy("correct the name")
    })?;
    let (file, stem) = (file.to_string(), stem.to_string());
    Ok(Component { role, stem, variant: String::new(), file, external: Vec::new() })
}

fn components_of_genai(root: &Path, listing: &Listing) -> Result<Vec<Component>> {
    let path = root.join("genai_config.json");
    let subject = || format!("`{}`", path.display());
    let config = read_json(&path)?;
    let model = config
        .get("model")
        .ok_or_else(|| Error::invalid(subject(), "has no `model`").remedy("correct the file, or download it again"))?;
    let mut components = Vec::new();
    for &(section, role) in GENAI_SECTIONS {
        let Some(entry) = model.get(section) else { continue };
        if entry.get("pipeline").is_some() {
            return Err(Error::unsupported(
                subject(),
                format!("`model.{section}.pipeline`, a model in several stages"),
            )
            .remedy("export the model as one decoder graph"));
        }
        if let Some(file) = entry.get("filename").and_then(Value::as_str).filter(|file| !file.is_empty()) {
            components.push(named_component(root, listing, role, file, "genai_config.json")?);
        }
    }
    if model.get("encoder").is_some_and(|entry| entry.get("filename").is_some()) {
        return Err(Error::unsupported(subject(), "a `model.encoder` component, so the model is an encoder-decoder")
            .remedy("layers can be dropped from models whose decoder reads pictures as tokens"));
    }
    Ok(components)
}

fn components_of_export(root: &Path, listing: &Listing) -> Result<Vec<Component>> {
    let path = root.join("export.json");
    let subject = || format!("`{}`", path.display());
    let config = read_json(&path)?;
    let entries = config.get("components").and_then(Value::as_object);
    let entries = entries.ok_or_else(|| {
        Error::invalid(subject(), "has no `components`").remedy("correct the file, or download it again")
    })?;
    let mut components = Vec::new();
    for (name, entry) in entries {
        let role = EXPORT_COMPONENTS.iter().find(|(key, _)| key == name).map(|(_, role)| *role).ok_or_else(|| {
            let known: Vec<&str> = EXPORT_COMPONENTS.iter().map(|(key, _)| *key).collect();
            Error::unsupported(subject(), format!("component `{name}`; known are {}", known.join(", ")))
                .remedy("give the path of its decoder's .onnx file alone")
        })?;
        let file = entry.get("file").and_then(Value::as_str);
        let file = file.ok_or_else(|| {
            Error::invalid(subject(), format!("component `{name}` has no `file`"))
                .remedy("correct the file, or download it again")
        })?;
        components.push(named_component(root, listing, role, file, "export.json")?);
    }
    Ok(components)
}
