//! ONNX Runtime GenAI: a folder that `onnxruntime_genai.Model` loads.
//!
//! ```text
//! FOLDER/
//!   genai_config.json        names of graphs and ports, ids, sizes
//!   model.onnx               the decoder, caches named by layer
//!   vision.onnx              pictures -> image_features [N, D]
//!   embedding.onnx           input_ids, image_features -> inputs_embeds
//!   genai_processor.json     the picture processor, for families that GenAI prepares pictures for
//!   tokenizer.json, config.json ..
//! ```

mod config;
mod graphs;
mod processor;

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{Cancel, Error, Result, sha256_file};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::Model;
use crate::onnx;
use crate::runtime::{Input, headed};

use super::components::{chosen, convert, copy, decoder_of, is_carried, size_of, storage, write as write_text};
use super::configs::{completed, object, pretty, with_chunks};
use super::nodes::only_output;
use super::packing::Packing;
use super::record::{ExportSettings, ExportedModel, Written};
use config::{DECODER_FILE, EMBEDDING_FILE, VISION_FILE};
use graphs::GenaiFigures;

/// Configs of other layouts, and those that are written anew.
const REWRITTEN: &[&str] = &["config.json", "genai_config.json", "export.json", "tokenizer_config.json"];
/// Weights of up to this many bytes stay inside the ONNX file.
const INLINE_BYTES: u64 = 256 << 20;

/// One graph of the folder.
struct Graph<'a> {
    file: &'static str,
    source: &'a Component,
    model: Model,
}

/// Writes the folder into `root`.
///
/// Errors: `Error::Unsupported` naming a component, input or cache that GenAI does not take; `Error::Invalid` when a
/// config lacks a key; `Error::Io`.
pub(super) fn write(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let mut parts: Vec<(&Component, Model)> = Vec::new();
    let mut notes = Vec::new();
    for component in chosen(bundle, settings.variant.as_deref())? {
        if component.role.is_carried() {
            notes.push(format!("`{}` is left out: it is no part of answers about pictures and text", component.file));
            continue;
        }
        parts.push((component, onnx::load(&bundle.path_of(component))?));
    }
    if pack(&mut parts)? {
        notes.push("DeepStack features are packed into `inputs_embeds`".to_string());
    }
    let (mut graphs, figures, pictures) = graphs_of(bundle, &parts)?;
    let mut models = BTreeMap::new();
    for Graph { file, source, model } in &mut graphs {
        convert(file, model, settings, cancel)?;
        let inline = source.external.is_empty() && bundle.size_bytes(source)? <= INLINE_BYTES;
        let storage = storage(model, settings, inline, format!("{file}.data"), None)?;
        let data = onnx::save(model, &root.join(*file), &storage)?;
        let size_bytes = size_of(root, data.iter().map(String::as_str).chain([*file]))?;
        models.insert((*file).to_string(), ExportedModel::new(source, model, size_bytes));
    }
    let mut files = BTreeMap::new();
    let mut add = |name: &str, text: &str| -> Result<()> {
        write_text(&root.join(name), text)?;
        files.insert(name.to_string(), sha256_file(&root.join(name))?);
        Ok(())
    };
    let processor = pictures.as_ref().map(|_| processor::config(bundle)).transpose()?.flatten();
    if let Some(processor) = &processor {
        add(config::PROCESSOR_FILE, &pretty(processor)?)?;
    } else if let Some(pictures) = &pictures {
        let names: Vec<&str> = pictures.iter().map(|input| input.port.name.as_str()).collect();
        notes.push(format!(
            "ONNX Runtime GenAI has no picture processor for this model: give {} and num_image_tokens as `NamedTensors`",
            names.join(", ")
        ));
    }
    add("genai_config.json", &config::text(bundle, &figures, pictures.as_deref(), processor.is_some())?)?;
    if let Some(mut config) = object(bundle, "config.json")? {
        with_chunks(&mut config, &BTreeMap::new());
        add("config.json", &pretty(&config)?)?;
    }
    if let Some(tokenizer) = completed(bundle, "tokenizer_config.json")? {
        add("tokenizer_config.json", &pretty(&tokenizer)?)?;
    }
    for asset in bundle.assets() {
        if is_carried(asset) && !REWRITTEN.contains(&asset.file.as_str()) {
            copy(bundle, asset, root, asset.file.clone(), &mut files)?;
        }
    }
    Ok(Written { settings: settings.clone(), models, files, notes, inputs: BTreeMap::new(), weights: None })
}

/// Puts DeepStack features behind the embeddings, because GenAI feeds the decoder nothing else from the vision encoder. True when
/// there are any.
///
/// Errors: as `Packing::of` and `Packing::apply`.
fn pack(parts: &mut [(&Component, Model)]) -> Result<bool> {
    let of = |role: Role| parts.iter().find(|(component, _)| component.role == role).map(|(_, model)| model);
    let packing = match (of(Role::Decoder), of(Role::EmbedTokens), of(Role::VisionEncoder)) {
        (Some(decoder), Some(embedding), Some(_)) => Packing::of(decoder, embedding)?,
        _ => None,
    };
    let Some(packing) = packing else { return Ok(false) };
    for (component, model) in parts {
        packing.apply(component, model)?;
        crate::ir::check(model)?;
    }
    Ok(true)
}

/// The graphs, the decoder's figures, and the vision encoder's inputs if the model takes pictures.
fn graphs_of<'a>(
    bundle: &Bundle,
    parts: &'a [(&'a Component, Model)],
) -> Result<(Vec<Graph<'a>>, GenaiFigures, Option<Vec<Input>>)> {
    let of = |role: Role| parts.iter().find(|(component, _)| component.role == role);
    let (source, decoder) = decoder_of(parts)?;
    let config = bundle.require_config()?;
    let (decoder, figures) = graphs::decoder(&headed(bundle, decoder.clone())?, config.head_size())?;
    let mut graphs = vec![Graph { file: DECODER_FILE, source, model: decoder }];
    let Some(embeddings) = figures.embeddings else {
        if let Some((component, _)) = of(Role::VisionEncoder) {
            let problem = "cannot be joined: the decoder embeds token ids itself";
            return Err(Error::unsupported(format!("`{}`", component.file), problem)
                .remedy("export the decoder with `inputs_embeds` and the embedding as a graph of its own"));
        }
        return Ok((graphs, figures, None));
    };
    let (Some((token_source, tokens)), Some((vision_source, vision))) =
        (of(Role::EmbedTokens), of(Role::VisionEncoder))
    else {
        let problem = "reads `inputs_embeds`; ONNX Runtime GenAI loads such a decoder only with a vision encoder and a \
                       token embedding";
        return Err(Error::unsupported(format!("`{}`", source.file), problem)
            .remedy("export the model with all its graphs, or a decoder that reads `input_ids`"));
    };
    let merges = graphs::merges(tokens)?;
    let (vision, inputs) = graphs::vision(vision, merges.as_ref().map_or(2, |port| port.rank()))?;
    let features = only_output("the vision encoder", &vision)?;
    let embedding = match merges {
        Some(port) if port.dtype != features.dtype => {
            let problem = format!("is of {}, the vision encoder's output of {}", port.dtype, features.dtype);
            return Err(Error::unsupported(format!("input `{}` of the embedding", port.name), problem)
                .remedy("choose variants of one type with `--variant`"));
        }
        Some(_) => graphs::renamed_embedding(tokens)?,
        None => {
            let image = config.require("image_token_id", config.image_token_id)?;
            graphs::merging_embedding(tokens, features.dtype, embeddings, image)?
        }
    };
    let output = only_output("the embedding", &embedding)?;
    if output.dtype != embeddings.1 {
        let problem = format!("is of {}, the decoder reads {}", output.dtype, embeddings.1);
        return Err(Error::unsupported("the embedding's output", problem)
            .remedy("choose variants of one type with `--variant`"));
    }
    graphs.push(Graph { file: VISION_FILE, source: vision_source, model: vision });
    graphs.push(Graph { file: EMBEDDING_FILE, source: token_source, model: embedding });
    Ok((graphs, figures, Some(inputs)))
}
