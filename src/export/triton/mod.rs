//! Triton Inference Server: a model repository with one model per component, and models that answer a request whole.
//!
//! ```text
//! REPOSITORY/
//!   interlace-export.json        the record of the export, with digests
//!   vision_encoder/config.pbtxt
//!   vision_encoder/1/model.onnx  and its data file
//!   embed_tokens/...
//!   decoder_model_merged/...
//!   decoder_model_merged/processor/   tokenizer, processor and configs, for clients; the server ignores it
//!   merge_embeddings/...         the decoder's inputs for a prompt
//!   prefill/config.pbtxt         the ensemble of these four: a prompt to logits and caches
//!   generate/...                 one graph that answers
//!   generate_stream/1/model.py   the same token by token
//! ```

mod config;
mod outputs;
mod prompt;
mod rules;
mod scalars;
mod serving;
mod whole;

mod schema;

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{Cancel, Result, sha256_file};
use crate::bundle::{AssetKind, Bundle, Component, Role};
use crate::ir::Model;
use crate::onnx::{self, Storage};

use super::components::{chosen, convert, copy, create, size_of, write as write_text};
use super::generate::graph::generation_graph;
use super::generate::{LoadedGraphs, token_ids};
use super::nodes::same_name;
use super::record::{ExportSettings, ExportedModel, Written};
use schema::ModelConfig;
use whole::{GENERATE, MERGE, STREAM_FILE, STREAM_TEXT, Served};

pub use config::{MODEL_FILE, config_text};
pub use serving::{Accelerator, InstanceKind, Serving, Versions};

/// Default for the largest batch.
pub const MAX_BATCH_SIZE: u32 = 8;
/// Weights of up to this many bytes stay inside the ONNX file.
const INLINE_BYTES: u64 = 256 << 20;

/// Writes a model repository into the folder `root`.
///
/// Errors: `Error::Invalid` when the bundle lacks the requested variant or two components would get the same name;
/// `Error::Unsupported` for inputs of a type that Triton lacks and for weights that the IR version lacks; `Error::Io`
/// when writing fails.
pub(super) fn write(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let settings =
        ExportSettings { max_batch_size: Some(settings.max_batch_size.unwrap_or(MAX_BATCH_SIZE)), ..settings.clone() };
    let mut repository = Repository { settings: &settings, cancel, root, models: BTreeMap::new(), notes: Vec::new() };
    let mut parts = Vec::new();
    for component in chosen(bundle, settings.variant.as_deref())? {
        let name = file_name(&component.stem);
        let model = onnx::load(&bundle.path_of(component))?;
        let inline = component.external.is_empty();
        parts.push((component.role, repository.add(name, component, model, inline)?));
    }
    let decoder = parts.iter().find(|(role, _)| role.is_decoder());
    let processor = decoder.map(|(_, served)| format!("{}/processor", served.name));
    repository.add_whole(bundle, &parts)?;
    let Repository { models, notes, .. } = repository;
    let mut files = BTreeMap::new();
    for name in models.keys().map(String::as_str).chain([whole::PREFILL, whole::STREAM]) {
        for file in ["config.pbtxt".to_string(), format!("1/{STREAM_FILE}")] {
            let path = root.join(name).join(&file);
            if path.is_file() {
                files.insert(format!("{name}/{file}"), sha256_file(&path)?);
            }
        }
    }
    for asset in bundle.assets() {
        if AssetKind::is_licence(&asset.file) {
            copy(bundle, asset, root, asset.file.clone(), &mut files)?;
        }
        let (Some(folder), AssetKind::Config | AssetKind::Tokenizer) = (&processor, asset.kind) else { continue };
        copy(bundle, asset, root, format!("{folder}/{}", asset.file), &mut files)?;
    }
    Ok(Written { settings, models, files, notes, inputs: BTreeMap::new(), weights: None })
}

/// A repository that is being written.
struct Repository<'a> {
    settings: &'a ExportSettings,
    cancel: &'a Cancel,
    root: &'a Path,
    models: BTreeMap<String, ExportedModel>,
    notes: Vec<String>,
}

impl Repository<'_> {
    /// Writes a graph as a model of the ONNX Runtime back end.
    fn add(&mut self, name: String, component: &Component, mut model: Model, inline: bool) -> Result<Served> {
        if let Some(other) = self.models.get(&name) {
            return Err(same_name(&name, &other.source, &component.file));
        }
        convert(&name, &mut model, self.settings, self.cancel)?;
        let reshaped = scalars::with_an_axis(&mut model)?;
        let version_folder = self.root.join(&name).join("1");
        create(&version_folder)?;
        let storage = match inline {
            true => Storage::Inline,
            false => Storage::External { file_name: format!("{MODEL_FILE}_data"), chunk_bytes: None },
        };
        if let Err(error) = outputs::note_inferred(&mut model) {
            self.notes.push(format!(
                "the sizes of the outputs of model `{name}` are those of its file, which the server compares with its own: \
                 ONNX Runtime on the processor does not load it here: {error}"
            ));
        }
        let data = onnx::save(&model, &version_folder.join(MODEL_FILE), &storage)?;
        let size_bytes = size_of(&version_folder, data.iter().map(String::as_str).chain([MODEL_FILE]))?;
        let batch = self.settings.max_batch_size.unwrap_or(MAX_BATCH_SIZE);
        let mut config = config::model_config(&name, &model, batch)?;
        self.settings.serving.apply(&mut config);
        if self.settings.serving.warm_up && !Serving::add_warm_up(&mut config, &model) {
            self.notes.push(format!("model `{name}` is not warmed up: zeros are no valid input of it"));
        }
        self.configure(&name, &config)?;
        self.models
            .insert(name.clone(), ExportedModel { reshaped, ..ExportedModel::new(component, &model, size_bytes) });
        Ok(Served { name, model })
    }

    fn configure(&self, name: &str, config: &ModelConfig) -> Result<()> {
        let text = config::text(config)?;
        create(&self.root.join(name))?;
        write_text(&self.root.join(name).join("config.pbtxt"), &text)
    }

    /// Adds the models that answer a request whole, as far as the layout allows; notes say what it does not.
    ///
    /// Errors: as [`Repository::add`].
    fn add_whole(&mut self, bundle: &Bundle, parts: &[(Role, Served)]) -> Result<()> {
        let ids = token_ids(bundle);
        let loaded = LoadedGraphs::open(bundle, self.settings.variant.as_deref());
        let whole = loaded.and_then(|loaded| Ok((generation_graph(&loaded.graphs(), &ids)?, loaded)));
        let (generate, loaded) = match whole {
            Ok(whole) => whole,
            Err(error) => {
                let note = "the repository has the components alone, and the client runs the loop";
                self.notes.push(format!("{note}: {error}"));
                return Ok(());
            }
        };
        let graphs = loaded.graphs();
        let component = loaded.source();
        let inline = bundle.size_bytes(component)? <= INLINE_BYTES && component.external.is_empty();
        let generate = self.add(GENERATE.into(), component, generate, inline)?;
        let of = |role: Role| parts.iter().find(|(own, _)| *own == role).map(|(_, served)| served);
        let (Some(vision), Some(embedding), Some(decoder)) =
            (of(Role::VisionEncoder), of(Role::EmbedTokens), of(Role::Decoder))
        else {
            self.notes.push("the repository has no `prefill`, which joins pictures and text".into());
            return Ok(());
        };
        let (merge, sources) = match prompt::merge_embeddings(&graphs, &ids) {
            Ok(merge) => (self.add(MERGE.into(), component, merge.model, true)?, merge.sources),
            Err(error) => {
                self.notes.push(format!("the repository has no `prefill` and no `generate_stream`: {error}"));
                return Ok(());
            }
        };
        let mut prefill = whole::prefill(vision, embedding, (&merge, &sources), decoder)?;
        self.settings.serving.apply_versions(&mut prefill);
        create(&self.root.join(whole::PREFILL).join("1"))?;
        self.configure(whole::PREFILL, &prefill)?;
        let mut stream = match whole::stream(&generate, embedding, decoder, &graphs, &ids) {
            Ok(stream) => stream,
            Err(error) => {
                self.notes.push(format!("the repository has no `generate_stream`: {error}"));
                return Ok(());
            }
        };
        self.settings.serving.apply(&mut stream);
        let folder = self.root.join(whole::STREAM).join("1");
        create(&folder)?;
        write_text(&folder.join(STREAM_FILE), STREAM_TEXT)?;
        self.configure(whole::STREAM, &stream)
    }
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
