//! One graph that answers: `generate.onnx` turns pictures and a prompt into the ids of the answer with nothing but ONNX
//! Runtime around it. The components are beside it, over the same file of weights.
//!
//! ```text
//! FOLDER/
//!   config.json, tokenizer.json ..   as in the model's folder
//!   onnx/generate.onnx               input_ids [1, T], max_new_tokens, pictures -> generated_ids [N]
//!   onnx/decoder.onnx ..             the components
//!   onnx/weights.onnx_data           the weights of all of them, once
//! ```

pub(super) mod embedding;
pub(super) mod graph;
pub(super) mod merge;
pub(super) mod ports;
pub(super) mod positions;
mod pruned;
mod sampling;
pub(super) mod sides;

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{Cancel, Result};
use crate::bundle::{AssetKind, Bundle, Component, Role};
use crate::ir::Model;
use crate::onnx;
use crate::rewrite::raise_opset;
use crate::runtime::{TokenTypes, headed};

use super::components::{chosen, convert, copy, create, decoder_of, size_of};
use super::nodes::same_name;
use super::record::{ExportSettings, ExportedModel, Written};
use graph::{Graphs, TokenIds, generation_graph};

const DATA_FILE: &str = "weights.onnx_data";
const GENERATE_FILE: &str = "generate.onnx";

/// A model's components, and its graphs in one version of the operator set.
pub(super) struct LoadedGraphs<'a> {
    /// As they are in the bundle, without those that no verb runs.
    parts: Vec<(&'a Component, Model)>,
    /// The component of the decoder.
    source: &'a Component,
    decoder: Model,
    embedding: Option<Model>,
    vision: Option<Model>,
    pruner: Option<Model>,
}

impl<'a> LoadedGraphs<'a> {
    /// Loads the components in the requested variants.
    ///
    /// Errors: `Error::Unsupported` without a decoder that reads and gives a cache, with a projector of its own, or for an
    /// operator whose version cannot be raised; as `chosen` and `onnx::load`.
    pub(super) fn open(bundle: &'a Bundle, variant: Option<&str>) -> Result<Self> {
        let mut parts: Vec<(&Component, Model)> = Vec::new();
        for component in chosen(bundle, variant)? {
            if !component.role.is_carried() {
                parts.push((component, onnx::load(&bundle.path_of(component))?));
            }
        }
        let of = |role: Role| parts.iter().find(|(component, _)| component.role == role);
        let (source, decoder) = decoder_of(&parts)?;
        let decoder = headed(bundle, decoder.clone())?;
        let (embedding, vision, pruner) = (of(Role::EmbedTokens), of(Role::VisionEncoder), of(Role::TokenPruner));
        let others = [embedding, vision, pruner].map(|part| part.map(|(_, model)| model));
        let all = [Some(&decoder)].into_iter().chain(others);
        let opset = all.flatten().filter_map(|model| model.opset_imports.get("")).max().copied().unwrap_or(1);
        let decoder = raise_opset(&decoder, opset)?;
        let embedding = embedding.map(|(_, model)| raise_opset(model, opset)).transpose()?;
        let vision = vision.map(|(_, model)| raise_opset(model, opset)).transpose()?;
        let pruner = pruner.map(|(_, model)| raise_opset(model, opset)).transpose()?;
        Ok(LoadedGraphs { source, decoder, embedding, vision, pruner, parts })
    }

    /// The graphs, all in one version of the operator set.
    pub(super) fn graphs(&self) -> Graphs<'_> {
        let [embedding, vision, pruner] = [&self.embedding, &self.vision, &self.pruner].map(Option::as_ref);
        Graphs { decoder: &self.decoder, embedding, vision, pruner }
    }

    /// The component of the decoder.
    pub(super) fn source(&self) -> &'a Component {
        self.source
    }
}

/// The ids that the graph compares with, from the model's configs.
pub(super) fn token_ids(bundle: &Bundle) -> TokenIds<'_> {
    let config = bundle.config();
    TokenIds {
        image: config.and_then(|config| config.image_token_id),
        end: config.map_or(&[], |config| &config.eos_token_ids),
        head_dim: config.and_then(|config| config.head_size()),
        merge: config.and_then(|config| config.spatial_merge_size).map(|merge| merge as i64),
        token_types: config.map(TokenTypes::of).unwrap_or_default(),
    }
}

/// Writes the folder into `root`.
///
/// Errors: `Error::Unsupported` naming an input, output or component that the graph cannot have; `Error::Invalid` when
/// a variant is missing; `Error::Io`.
pub(super) fn write(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let mut loaded = LoadedGraphs::open(bundle, settings.variant.as_deref())?;
    let mut generate = generation_graph(&loaded.graphs(), &token_ids(bundle))?;
    let folder = root.join("onnx");
    create(&folder)?;
    let mut files: Vec<(String, &mut Model)> = vec![(GENERATE_FILE.to_string(), &mut generate)];
    let mut sources = vec![loaded.source];
    for (component, model) in &mut loaded.parts {
        let stem = component.stem.rsplit('/').next().unwrap_or(&component.stem);
        files.push((format!("{stem}.onnx"), model));
        sources.push(component);
    }
    for (name, model) in &mut files {
        convert(name, model, settings, cancel)?;
    }
    let written: Vec<(&str, &Model)> = files.iter().map(|(name, model)| (name.as_str(), &**model)).collect();
    let data = onnx::save_sharing(&folder, &written, DATA_FILE)?;
    let mut models = BTreeMap::new();
    for ((name, model), source) in written.iter().zip(sources) {
        let own = data.iter().map(String::as_str).filter(|_| *name == GENERATE_FILE);
        let size_bytes = size_of(&folder, own.chain([*name]))?;
        if let Some(other) = models.insert(format!("onnx/{name}"), ExportedModel::new(source, model, size_bytes)) {
            return Err(same_name(&format!("onnx/{name}"), &other.source, &source.file));
        }
    }
    let mut files = BTreeMap::new();
    for asset in bundle.assets() {
        if matches!(asset.kind, AssetKind::Config | AssetKind::Tokenizer) {
            copy(bundle, asset, root, asset.file.clone(), &mut files)?;
        }
    }
    let notes =
        vec![format!("sizes of components other than {GENERATE_FILE} are without {DATA_FILE}, which all share")];
    Ok(Written { settings: settings.clone(), models, files, notes, inputs: BTreeMap::new(), weights: None })
}
