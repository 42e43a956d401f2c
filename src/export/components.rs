//! Selects the components of an export.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::de::IgnoredAny;

use crate::base::{Cancel, Error, Result, Sha256Digest, human_bytes, sha256_file, shortened};
use crate::bundle::{Asset, AssetKind, Bundle, Component, RECORD_FILE, Role, Variants, is_card};
use crate::ir::{DataType, Model};
use crate::onnx::Storage;
use crate::rewrite::{raise_opset, split_buffers, standard_operators};

use super::record::ExportSettings;

/// What an interrupted export leaves.
pub(super) const NOTHING: &str = "nothing is written";

/// One component per role and stem, in the requested variants or, without a request, the most precise one.
///
/// Errors: `Error::Invalid` when `variant` names none or a component lacks its variant.
pub(super) fn chosen<'a>(bundle: &'a Bundle, variant: Option<&str>) -> Result<Vec<&'a Component>> {
    let parse = |text: &str| {
        let wrong =
            |problem| Error::invalid("`--variant`", problem).remedy("name one for all components, or decoder=q4");
        text.parse::<Variants>().map_err(wrong)
    };
    let variants = variant.map(parse).transpose()?.unwrap_or_default();
    let mut chosen: Vec<&Component> = Vec::new();
    for component in bundle.components() {
        if chosen.iter().any(|other| other.stem == component.stem) {
            continue;
        }
        let all: Vec<&Component> =
            bundle.variants(component.role).filter(|other| other.stem == component.stem).collect();
        match component.role.has_weights() {
            true => chosen.extend(variants.choose(&all)?),
            false => chosen.push(component),
        }
    }
    Ok(chosen)
}

/// The decoder among loaded components, for targets that join the other components with it.
///
/// Errors: `Error::Unsupported` without a decoder that takes both a prompt and a cache, or with a projector of its own.
pub(super) fn decoder_of<'p, 'b>(parts: &'p [(&'b Component, Model)]) -> Result<&'p (&'b Component, Model)> {
    let of = |role: Role| parts.iter().find(|(component, _)| component.role == role);
    if let Some((projector, _)) = of(Role::Projector) {
        return Err(Error::unsupported(
            format!("`{}`", projector.file),
            "is a projector of its own, which is not joined",
        )
        .remedy("export it within the vision encoder"));
    }
    of(Role::Decoder).ok_or_else(|| {
        Error::unsupported("the model", "has no decoder that takes both a prompt and a cache")
            .remedy("export its decoder as one graph")
    })
}

/// Writes a graph in the form that the settings ask for: with standard operators, in a later operator set, with smaller
/// buffers, in an earlier IR version.
///
/// Errors: `Error::Unsupported` naming what the form lacks; `Error::Interrupted` on Ctrl-C.
pub(super) fn convert(name: &str, model: &mut Model, settings: &ExportSettings, cancel: &Cancel) -> Result<()> {
    cancel.check(NOTHING)?;
    if settings.standard_ops {
        *model = standard_operators(model)?;
    }
    if let Some(opset) = settings.opset {
        *model = raise_opset(model, opset)?;
    }
    if let Some(limit) = settings.max_buffer_bytes {
        *model = split_buffers(model, limit)?.0;
    }
    if let Some(version) = settings.max_ir_version {
        cap_ir_version(name, model, version)?;
    }
    Ok(())
}

/// Where the weights of a graph are written: inside the `.onnx` file if `inline`, else in `data_file` and further files of at
/// most `chunk_bytes`. `--shard-size` limits the data files; weights that are larger in all leave the `.onnx` file for them.
///
/// Errors: `Error::Unsupported` naming a weight that alone is larger than `--shard-size`.
pub(super) fn storage(
    model: &Model,
    settings: &ExportSettings,
    inline: bool,
    data_file: String,
    chunk_bytes: Option<u64>,
) -> Result<Storage> {
    let Some(limit) = settings.shard_bytes else {
        return Ok(if inline { Storage::Inline } else { Storage::External { file_name: data_file, chunk_bytes } });
    };
    let body = &model.graph.body;
    if let Some((id, tensor)) = body.initializers.iter().find(|(_, tensor)| tensor.byte_len() > limit) {
        return Err(larger_than_shard(model.graph.name(*id), tensor.byte_len(), limit)
            .remedy("give a larger `--shard-size`, or split large weights with `--max-buffer`"));
    }
    Ok(match inline && body.weight_bytes() <= limit {
        true => Storage::Inline,
        false => Storage::External {
            file_name: data_file,
            chunk_bytes: Some(chunk_bytes.map_or(limit, |most| most.min(limit))),
        },
    })
}

/// The error for a weight that is larger than `--shard-size`; what to do is the caller's to say.
pub(super) fn larger_than_shard(name: &str, size: u64, limit: u64) -> Error {
    let problem = format!("has {}, and a data file may hold {}", human_bytes(size), human_bytes(limit));
    Error::unsupported(format!("weight `{name}`"), problem)
}

/// Refuses JSON files of the tokenizer and processor that their readers cannot read. They are copied as they are.
///
/// Errors: `Error::Invalid` naming a file that is not JSON or no object; `Error::Io`.
pub(super) fn check_texts(bundle: &Bundle) -> Result<()> {
    for asset in bundle.assets() {
        if asset.kind == AssetKind::Tokenizer && asset.file.ends_with(".json") {
            check_object(&asset.file, &bundle.root().join(&asset.file))?;
        }
    }
    Ok(())
}

/// Refuses a file that is not one JSON object.
///
/// Errors: as [`check_texts`].
pub(super) fn check_object(name: &str, path: &Path) -> Result<()> {
    let wrong =
        |problem: String| Error::invalid(format!("`{name}`"), problem).remedy("restore the file, or download it again");
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    serde_json::from_slice::<IgnoredAny>(&bytes).map_err(|e| wrong(format!("is not JSON: {e}")))?;
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => Ok(()),
        _ => Err(wrong(format!("holds {}, expected an object", shortened(String::from_utf8_lossy(&bytes).trim())))),
    }
}

/// True for a file of the bundle that a model folder for another consumer keeps. The export has a card of its own.
pub(super) fn is_carried(asset: &Asset) -> bool {
    let kinds = [AssetKind::Config, AssetKind::Tokenizer, AssetKind::Documentation];
    (kinds.contains(&asset.kind) || asset.file == RECORD_FILE) && !is_card(&asset.file)
}

/// Lowers a model's IR version to at most `version`.
///
/// Errors: `Error::Unsupported` when the model uses a feature of a later version.
pub(super) fn cap_ir_version(name: &str, model: &mut Model, version: i64) -> Result<()> {
    if model.ir_version <= version {
        return Ok(());
    }
    // Model-local functions need version 8; each element type below needs the version next to it.
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
            format!("it uses a feature of version {least}"),
        )
        .remedy(format!("give `--max-ir-version {least}` or more, to a consumer that reads it")));
    }
    model.ir_version = version;
    Ok(())
}

/// Total size of a folder's files, in bytes.
///
/// Errors: `Error::Io` when a file cannot be read.
pub(super) fn size_of<'a>(folder: &Path, files: impl Iterator<Item = &'a str>) -> Result<u64> {
    let mut size = 0;
    for file in files {
        let path = folder.join(file);
        size += fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
    }
    Ok(size)
}

pub(super) fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))
}

pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::io("write", path, e))
}

/// Copies a file of the bundle to `path` below `root`, a config with what other readers look for in it, and adds it to the digests
/// of what was written.
///
/// Errors: `Error::Io`.
pub(super) fn copy(
    bundle: &Bundle,
    asset: &Asset,
    root: &Path,
    path: String,
    files: &mut BTreeMap<String, Sha256Digest>,
) -> Result<()> {
    let target = root.join(&path);
    create(target.parent().unwrap_or(root))?;
    match bundle.completed_configs().into_iter().find(|(file, _)| *file == asset.file) {
        Some((_, text)) => write(&target, &text)?,
        None => drop(fs::copy(bundle.root().join(&asset.file), &target).map_err(|e| Error::io("write", &target, e))?),
    }
    files.insert(path, sha256_file(&target)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ir_version_is_lowered_only_if_the_model_allows_it() {
        let mut model = Model { ir_version: 11, ..Model::default() };
        cap_ir_version("m", &mut model, 10).unwrap();
        assert_eq!(model.ir_version, 10);
        cap_ir_version("m", &mut model, 12).unwrap();
        assert_eq!(model.ir_version, 10);
        model.functions.push(crate::ir::Function::default());
        assert!(cap_ir_version("m", &mut model, 7).unwrap_err().to_string().contains("version 8"));
    }
}
