//! Loads a model from its folder.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::Value;

use crate::base::{Error, Result, Sha256Digest, sha256_file, sha256_json};
use crate::bundle::{Bundle, Component, ModelConfig, Role, image_token_entry, whole_number};
use crate::ir::Model;
use crate::onnx;
use crate::rewrite::with_head;

use super::decoder::Decoder;
use super::embedding::TokenEmbedding;
use super::features::FeatureCache;
use super::inputs::presents_of;
use super::session::{Runtime, Session, SessionOptions};
use super::token_pruner::TokenPruner;
use super::vision::VisionEncoder;
use super::vlm::{TokenTypes, Vision, VlmSession, VlmSettings};

impl VlmSession {
    /// Loads a folder's components, each in its most precise variant. Several models may share `cache`.
    ///
    /// Errors: `Error::Invalid` when the folder lacks a decoder or a config, or its components do not fit together;
    /// `Error::Engine` when ONNX Runtime rejects a file.
    pub fn open(
        runtime: &Runtime,
        bundle: &Bundle,
        options: &SessionOptions,
        cache: &Arc<FeatureCache>,
    ) -> Result<Self> {
        bundle.require_config()?;
        let decoder = Decoder::open(runtime, bundle, options)?;
        VlmSession::with_decoder(runtime, bundle, decoder, options, cache)
    }

    /// Loads a folder's components with another decoder in place of its own (a part of it, or one
    /// that is not written yet).
    ///
    /// A folder may lack configs; the missing settings stay unset.
    ///
    /// Errors: as `open`.
    pub fn with_decoder(
        runtime: &Runtime,
        bundle: &Bundle,
        decoder: Decoder,
        options: &SessionOptions,
        cache: &Arc<FeatureCache>,
    ) -> Result<Self> {
        let settings = match bundle.config() {
            Some(_) => VlmSettings::of(bundle)?,
            None => VlmSettings::default(),
        };
        let session = |part: &Component| runtime.session(&bundle.path_of(part), options);
        let embed = bundle.component(Role::EmbedTokens);
        let embed = embed.map(|part| TokenEmbedding::new(session(part)?)).transpose()?;
        let vision = Vision::open(runtime, bundle, options, cache)?;
        let pruner = bundle.component(Role::TokenPruner);
        let pruner = pruner.map(|part| TokenPruner::new(session(part)?)).transpose()?;
        let file = bundle.component(Role::Decoder).map(|part| format!("`{}`", bundle.path_of(part).display()));
        let mut model = VlmSession::new(vision, embed, decoder, settings)?;
        model.decoder_file = file;
        model.set_token_pruner(pruner)?;
        Ok(model)
    }

    /// Puts a vision encoder that is not written yet in the place of the folder's own. Its features stay in a cache of
    /// `cache_bytes`.
    ///
    /// Errors: as `Runtime::session_of` and `VisionEncoder::new`.
    pub fn replace_vision(
        &mut self,
        runtime: &Runtime,
        bundle: &Bundle,
        encoder: &Model,
        options: &SessionOptions,
        cache_bytes: usize,
    ) -> Result<()> {
        let session = runtime.session_of(encoder, options)?;
        let encoder = VisionEncoder::new(session, Sha256Digest::default(), FeatureCache::new(cache_bytes))?;
        let encoder = match bundle.component(Role::Projector) {
            Some(part) => encoder.with_projector(runtime.session(&bundle.path_of(part), options)?)?,
            None => encoder,
        };
        self.vision = Some(Vision::Known(Box::new(encoder)));
        self.given_features = None;
        Ok(())
    }

    /// Puts the folder's own vision encoder back.
    ///
    /// Errors: as `open`.
    pub fn restore_vision(
        &mut self,
        runtime: &Runtime,
        bundle: &Bundle,
        options: &SessionOptions,
        cache: &Arc<FeatureCache>,
    ) -> Result<()> {
        self.vision = Vision::open(runtime, bundle, options, cache)?;
        self.given_features = None;
        Ok(())
    }

    /// Puts another decoder in the place of this one.
    pub fn replace_decoder(&mut self, decoder: Decoder) {
        self.decoder = decoder;
    }

    /// Puts another token embedding in the place of this one.
    ///
    /// Errors: as `TokenEmbedding::new`.
    pub fn replace_embedding(&mut self, session: Session) -> Result<()> {
        self.embed = Some(TokenEmbedding::new(session)?);
        Ok(())
    }
}

impl Vision {
    /// A folder's vision encoder with its projector; `None` without one.
    ///
    /// Errors: `Error::Engine` when ONNX Runtime rejects a file.
    fn open(
        runtime: &Runtime,
        bundle: &Bundle,
        options: &SessionOptions,
        cache: &Arc<FeatureCache>,
    ) -> Result<Option<Self>> {
        let session = |part: &Component| runtime.session(&bundle.path_of(part), options);
        let Some(part) = bundle.component(Role::VisionEncoder) else { return Ok(None) };
        let projector = bundle.component(Role::Projector);
        let digest = content_digest(bundle, [part].into_iter().chain(projector))?;
        let encoder = VisionEncoder::new(session(part)?, digest, Arc::clone(cache));
        let encoder = match (encoder, projector) {
            (Ok(encoder), Some(projector)) => encoder.with_projector(session(projector)?),
            (encoder, _) => encoder,
        };
        match encoder {
            Ok(encoder) => Ok(Some(Vision::Known(Box::new(encoder)))),
            Err(error @ Error::Unsupported { .. }) => Ok(Some(Vision::Unknown(error))),
            Err(error) => Err(error),
        }
    }
}

impl Decoder {
    /// Loads a folder's decoder in its most precise variant.
    ///
    /// Errors: as `VlmSession::open`.
    pub fn open(runtime: &Runtime, bundle: &Bundle, options: &SessionOptions) -> Result<Self> {
        let part = bundle.require(Role::Decoder)?;
        let head_dim = bundle.config().and_then(|config| config.head_size());
        let session = match bundle.component(Role::LmHead) {
            None => runtime.session(&bundle.path_of(part), options)?,
            Some(_) => runtime.session_of(&headed(bundle, onnx::load(&bundle.path_of(part))?)?, options)?,
        };
        Decoder::new(session, head_dim)
    }
}

/// A folder's decoder, joined with its head when the head is a component of its own; any other decoder unchanged.
///
/// Errors: as `onnx::load` and `rewrite::with_head`; `Error::Invalid` when all outputs of the decoder are caches.
pub fn headed(bundle: &Bundle, decoder: Model) -> Result<Model> {
    let Some(part) = bundle.component(Role::LmHead) else { return Ok(decoder) };
    let graph = &decoder.graph;
    let caches: HashSet<String> = graph.body.inputs.iter().flat_map(|&id| presents_of(graph.name(id))).collect();
    let hidden = graph.body.outputs.iter().copied().find(|&id| !caches.contains(graph.name(id)));
    let hidden = hidden.ok_or_else(|| {
        Error::invalid(format!("graph `{}`", graph.body.name), "has no output that its head could read")
    })?;
    with_head(&decoder, hidden, &onnx::load(&bundle.path_of(part))?)
}

impl TokenTypes {
    /// Meaning of the ids, by model type.
    pub fn of(config: &ModelConfig) -> Self {
        match config.model_type.as_str() {
            "paligemma" => TokenTypes::Answer,
            _ => TokenTypes::Image,
        }
    }
}

impl VlmSettings {
    /// Reads the settings from a folder's configs.
    ///
    /// Errors: `Error::Invalid` when there is no config, it has no end token, or a value is malformed.
    pub fn of(bundle: &Bundle) -> Result<Self> {
        let config = bundle.require_config()?;
        let source = || format!("`{}` of `{}`", config.source, bundle.root().display());
        if config.eos_token_ids.is_empty() {
            return Err(Error::invalid(source(), "names no `eos_token_id`, so no answer would end")
                .remedy("add it to `config.json` or `generation_config.json`"));
        }
        let generation = bundle.read_json("generation_config.json")?.unwrap_or(Value::Null);
        if let Some(id) = config.image_token_id.filter(|&id| id < 0) {
            let key = image_token_entry(&config.raw).map_or("image_token_id", |(key, _)| key);
            return Err(Error::invalid(source(), format!("`{key}` is {id}, expected the id of a token"))
                .remedy("give the id that the tokenizer has for a picture's features"));
        }
        Ok(VlmSettings {
            image_token_id: config.image_token_id,
            eos_token_ids: config.eos_token_ids.clone(),
            spatial_merge_size: config.spatial_merge_size,
            max_new_tokens: whole_number("generation_config.json", "max_new_tokens", generation.get("max_new_tokens"))?,
            context_tokens: config.context_tokens,
            token_types: TokenTypes::of(config),
        })
    }
}

/// One digest over the bytes of components' files, independent of file names.
pub fn content_digest<'a>(bundle: &Bundle, parts: impl IntoIterator<Item = &'a Component>) -> Result<Sha256Digest> {
    let files = parts.into_iter().flat_map(|part| std::iter::once(&part.file).chain(&part.external));
    let digests = files.map(|file| sha256_file(&bundle.root().join(file))).collect::<Result<Vec<_>>>()?;
    sha256_json(&digests)
}
