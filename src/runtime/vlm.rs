//! A whole vision-language model: computes decoder inputs or generated tokens from pictures and token ids.

use std::sync::Arc;
use std::time::Duration;

use crate::base::{Error, Result};
use crate::prompt::{ImageArrays, Prompt, TensorBatch};

use super::decoder::Decoder;
use super::embedding::TokenEmbedding;
use super::features::Features;
use super::inputs::{Input, InputKind};
use super::positions::multimodal_positions;
use super::profile::NetworkTimes;
use super::projector::Unprojected;
use super::session::Outputs;
use super::step::{Embedded, SideValues, Step};
use super::token_pruner::TokenPruner;
use super::vision::VisionEncoder;

/// Meaning of `token_type_ids`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenTypes {
    /// 1 at image tokens, which attend to each other in both directions (Gemma 3).
    #[default]
    Image,
    /// 1 at answer tokens; all tokens before them attend to each other in both directions (PaliGemma).
    Answer,
}

/// Settings from the model's configs for inputs and generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VlmSettings {
    /// Id of the placeholder token for one row of image features.
    pub image_token_id: Option<i64>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<i64>,
    /// Patches per side that the encoder merges into one token (multimodal rotary positions).
    pub spatial_merge_size: Option<usize>,
    /// Longest answer, in tokens.
    pub max_new_tokens: Option<usize>,
    /// Maximum context in tokens, prompt and answer together.
    pub context_tokens: Option<usize>,
    /// Meaning of `token_type_ids`.
    pub token_types: TokenTypes,
}

/// A model's vision encoder.
#[derive(Debug)]
pub enum Vision {
    /// An encoder that can run.
    Known(Box<VisionEncoder>),
    /// The reason why it cannot run. Prompts without pictures do not need it.
    Unknown(Error),
}

/// The loaded components of a model.
#[derive(Debug)]
pub struct VlmSession {
    pub(super) vision: Option<Vision>,
    pub(super) embed: Option<TokenEmbedding>,
    /// Features of the most recently used batch of ready tensors.
    pub(super) given_features: Option<(Arc<TensorBatch>, Arc<Features>)>,
    pub(super) decoder: Decoder,
    /// Leaves out image tokens; `None` keeps all.
    pub(super) pruner: Option<TokenPruner>,
    pub(super) settings: VlmSettings,
    pub(super) padding_works: Option<bool>,
    /// The decoder's file as messages name it; `None` where the model was not opened from a folder.
    pub(super) decoder_file: Option<String>,
}

impl VlmSession {
    /// Assembles a model from its components.
    ///
    /// Errors: `Error::Invalid` when the model has a vision encoder and no graph that takes its features.
    pub fn new(
        vision: Option<Vision>,
        embed: Option<TokenEmbedding>,
        decoder: Decoder,
        settings: VlmSettings,
    ) -> Result<Self> {
        let subject = decoder.session().subject().to_string();
        if vision.is_some() && !decoder.takes_embeds() && !decoder.takes(InputKind::ImageFeatures) {
            return Err(Error::invalid(subject, "takes token ids, so image features cannot be merged in")
                .remedy("export the decoder with `inputs_embeds` in place of `input_ids`"));
        }
        Ok(VlmSession {
            vision,
            embed,
            given_features: None,
            decoder,
            pruner: None,
            settings,
            padding_works: None,
            decoder_file: None,
        })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The decoder, for running steps.
    pub fn decoder_mut(&mut self) -> &mut Decoder {
        &mut self.decoder
    }

    /// Returns the decoder.
    pub fn into_decoder(self) -> Decoder {
        self.decoder
    }

    /// Accumulated time in the networks.
    pub fn times(&self) -> NetworkTimes {
        NetworkTimes {
            vision_encoder: match &self.vision {
                Some(Vision::Known(vision)) => vision.elapsed(),
                _ => Duration::ZERO,
            },
            embedding: self.embed.as_ref().map_or(Duration::ZERO, TokenEmbedding::elapsed),
            decoder: self.decoder.session().elapsed(),
        }
    }

    /// Keeps what the projector reads, in [`SideValues::unprojected`]. Without a projector nothing changes.
    pub fn keep_unprojected(&mut self) {
        if let Some(Vision::Known(vision)) = &mut self.vision {
            vision.keep_unprojected();
        }
    }

    /// Settings of the configs.
    pub fn settings(&self) -> &VlmSettings {
        &self.settings
    }

    /// True for a model that takes pictures, through a vision encoder or one of its other graphs.
    pub fn reads_pictures(&self) -> bool {
        self.vision.is_some()
            || self.embed.as_ref().is_some_and(TokenEmbedding::takes_pictures)
            || self.decoder.takes_pictures()
    }

    /// True when the decoder's rows are wider than one embedding.
    fn packs_deepstack(&self) -> bool {
        let own = self.embed.as_ref().and_then(TokenEmbedding::width);
        own.zip(self.decoder.hidden_size()).is_some_and(|(own, width)| width > own)
    }

    /// Embeds a text at positions from `first` on.
    ///
    /// Errors: `Error::Engine` when a run fails.
    pub fn embed_text(&mut self, input_ids: &[i64], first: i64) -> Result<Embedded> {
        let mut embedded = Embedded::text(input_ids, 0, Vec::new(), first, self.decoder.position_rows());
        self.fill(&mut embedded)?;
        Ok(embedded)
    }

    /// Embeds a prompt, with its pictures' features at the image tokens.
    ///
    /// Errors: `Error::Invalid` when the number of feature rows differs from that of image tokens, or their width from
    /// that of the embeddings.
    pub fn embed(&mut self, prompt: &Prompt) -> Result<Embedded> {
        let mut embedded = self.embed_all(std::slice::from_ref(prompt))?;
        embedded.pop().ok_or_else(|| Error::invalid("prompt", "is empty"))
    }

    /// [`VlmSession::embed`] for several prompts. New pictures share runs of the vision encoder.
    ///
    /// Errors: as `embed`.
    pub fn embed_all(&mut self, prompts: &[Prompt]) -> Result<Vec<Embedded>> {
        if prompts.iter().any(|prompt| prompt.input_ids.is_empty()) {
            return Err(Error::invalid("prompt", "has no tokens").remedy("give a prompt with at least one token"));
        }
        let pictures: Vec<&ImageArrays> =
            prompts.iter().flat_map(|prompt| prompt.pictures.iter().map(Arc::as_ref)).collect();
        if !pictures.is_empty() && !self.reads_pictures() {
            return Err(Error::invalid(
                self.decoder.session().subject(),
                "belongs to a model without a vision encoder, but the prompt has pictures",
            )
            .remedy("use prompts without pictures, or put the vision encoder's graph into the decoder's folder"));
        }
        if !pictures.is_empty() && self.settings.image_token_id.is_none() {
            let problem = "belongs to a model whose config names no image token, but the prompt has pictures";
            return Err(Error::invalid(self.decoder.session().subject(), problem)
                .remedy("add `image_token_id` to `config.json`"));
        }
        let features = match &mut self.vision {
            Some(Vision::Known(vision)) => vision.encode(&pictures)?,
            Some(Vision::Unknown(error)) if !pictures.is_empty() => {
                return Err(Error::unsupported("pictures", error.to_string())
                    .remedy("prompts without pictures need no vision encoder"));
            }
            _ => Vec::new(),
        };
        let mut features = features.as_slice();
        let mut embedded = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let count = if self.vision.is_some() { prompt.pictures.len() } else { 0 };
            let (own, rest) = features.split_at(count);
            features = rest;
            let whole = match &prompt.given {
                Some(given) => self.embed_given(prompt, given)?,
                None => self.merge(prompt, own)?,
            };
            embedded.push(self.without_pruned(whole, prompt, own)?);
        }
        Ok(embedded)
    }

    /// Runs one prefill of the decoder and returns all its outputs.
    ///
    /// Errors: as `embed` and `Decoder::prefill_outputs`.
    pub fn prefill(&mut self, prompt: &Prompt, last_only: bool) -> Result<Outputs> {
        let embedded = self.embed(prompt)?;
        self.decoder.prefill_outputs(&Step::prefill(&[&embedded], last_only)?)
    }

    fn merge(&mut self, prompt: &Prompt, features: &[Arc<Features>]) -> Result<Embedded> {
        let ids = &prompt.input_ids;
        let image_token = self.settings.image_token_id;
        let image: Vec<bool> = ids.iter().map(|&id| Some(id) == image_token).collect();
        let tokens = image.iter().filter(|&&image| image).count();
        let rows: usize = features.iter().map(|item| item.tokens()).sum();
        if self.vision.is_some() && tokens != rows {
            return Err(Error::invalid(
                "prompt",
                format!("has {tokens} image tokens, its pictures give {rows} rows of features"),
            )
            .remedy("check that the processor's settings and the vision encoder belong together"));
        }
        let grids = prompt.pictures.iter().map(|picture| picture.grid_thw()).collect();
        let (positions, next_position) = self.positions_of(ids, grids)?;
        let side = SideValues { types: self.token_types(prompt, &image), ..SideValues::default() };
        let mut embedded = Embedded { input_ids: ids.clone(), positions, next_position, side, ..Embedded::default() };
        self.complete(&mut embedded, image, features, &prompt.pictures)?;
        Ok(embedded)
    }

    /// Adds embeddings and image data to a prompt with known ids, positions and types.
    pub(super) fn complete(
        &mut self,
        embedded: &mut Embedded,
        image: Vec<bool>,
        features: &[Arc<Features>],
        pictures: &[Arc<ImageArrays>],
    ) -> Result<()> {
        let side = &mut embedded.side;
        if image.contains(&true) {
            side.image = image;
            let merging = self.decoder.takes(InputKind::ImageFeatures)
                || self.embed.as_ref().is_some_and(TokenEmbedding::takes_features);
            if merging && side.features.is_empty() {
                side.features = features.iter().flat_map(|item| item.data.iter().copied()).collect();
            }
            if self.decoder.takes(InputKind::Deepstack) || self.packs_deepstack() {
                (side.deepstack, side.levels) = levels(features)?;
            }
            if self.vision.is_none() {
                side.pictures = pictures.to_vec();
            }
        }
        self.fill(embedded)?;
        let merged_by_graph = self.vision.is_none() || !embedded.side.features.is_empty();
        if !merged_by_graph && embedded.hidden_size > 0 {
            self.write_features(embedded, features)?;
        }
        let unprojected: Vec<Arc<Unprojected>> = features.iter().filter_map(|item| item.unprojected.clone()).collect();
        if !unprojected.is_empty() && unprojected.len() == features.len() {
            check_unchanged(embedded, features)?;
            embedded.side.unprojected = unprojected;
        }
        // The decoder does not read the data for the embedding component.
        if !self.decoder.takes(InputKind::ImageFeatures) {
            embedded.side.features = Vec::new();
        }
        if !self.decoder.takes_pictures() {
            embedded.side.pictures = Vec::new();
        }
        Ok(())
    }

    /// Adds the output of the token embedding component.
    fn fill(&mut self, embedded: &mut Embedded) -> Result<()> {
        if !self.decoder.takes_embeds() {
            return Ok(());
        }
        let Some(embed) = &mut self.embed else {
            let problem = "takes `inputs_embeds`, but the model has no token embedding component";
            let subject = self.decoder_file.as_deref().unwrap_or(self.decoder.session().subject());
            return Err(Error::invalid(subject, problem).remedy(
                "put `embed_tokens.onnx`, `prepare_inputs_embeds.onnx` or Mobius's `embedding/model.onnx` into the model's \
                 folder, or give `inputs_embeds` as ready tensors",
            ));
        };
        let rows = embed.run(embedded)?;
        (embedded.hidden_size, embedded.data) = (rows.hidden_size, rows.data);
        if self.decoder.takes(InputKind::PerLayerInputs) {
            embedded.side.per_layer = rows.per_layer;
        }
        Ok(())
    }

    /// Writes the features over the embeddings of the image tokens. Features as wide as the decoder's rows contain the
    /// DeepStack features already.
    fn write_features(&self, embedded: &mut Embedded, features: &[Arc<Features>]) -> Result<()> {
        let width = features.first().map_or(embedded.hidden_size, |item| item.hidden_size);
        if width > embedded.hidden_size && self.decoder.hidden_size() == Some(width) {
            let mut wide = Vec::with_capacity(embedded.len() * width);
            for row in embedded.data.chunks_exact(embedded.hidden_size) {
                wide.extend_from_slice(row);
                wide.resize(wide.len() + width - embedded.hidden_size, 0.0);
            }
            (embedded.data, embedded.hidden_size) = (wide, width);
        }
        let hidden_size = embedded.hidden_size;
        let mut source = features.iter().flat_map(|item| item.data.chunks_exact(item.hidden_size));
        let targets = embedded.data.chunks_exact_mut(hidden_size).zip(&embedded.side.image);
        for (target, _) in targets.filter(|(_, image)| **image) {
            match source.next() {
                Some(row) if row.len() == hidden_size => target.copy_from_slice(row),
                row => {
                    let found = row.map_or(0, <[f32]>::len);
                    return Err(Error::invalid(
                        "image features",
                        format!("are {found} wide, token embeddings {hidden_size}"),
                    )
                    .remedy("use a vision encoder and a decoder of the same export"));
                }
            }
        }
        Ok(())
    }

    pub(super) fn token_types(&self, prompt: &Prompt, image: &[bool]) -> Vec<i64> {
        if !self.decoder.takes(InputKind::TokenTypes) {
            return Vec::new();
        }
        match self.settings.token_types {
            TokenTypes::Image => image.iter().map(|&image| i64::from(image)).collect(),
            TokenTypes::Answer => {
                let end = prompt.question.unwrap_or(prompt.input_ids.len());
                (0..prompt.input_ids.len()).map(|at| i64::from(at >= end)).collect()
            }
        }
    }

    /// Positions of the ids, and the next position. `grids` are those of the pictures, `None`
    /// for a picture without one.
    pub(super) fn positions_of(&self, ids: &[i64], grids: Vec<Option<[i64; 3]>>) -> Result<(Vec<Vec<i64>>, i64)> {
        let length = ids.len() as i64;
        if self.decoder.position_rows() == 1 || grids.is_empty() {
            let row: Vec<i64> = (0..length).collect();
            return Ok((vec![row; self.decoder.position_rows()], length));
        }
        let subject = self.decoder.session().subject();
        let grids: Option<Vec<[i64; 3]>> = grids.into_iter().collect();
        let grids = grids.ok_or_else(|| {
            Error::invalid(subject, "takes three rows of positions, but a picture has no grid of patches")
                .remedy("give `image_grid_thw` or `position_ids` where tensors are made by another program")
        })?;
        let merge = self.settings.spatial_merge_size.ok_or_else(|| {
            Error::invalid(subject, "takes three rows of positions, but the config names no `spatial_merge_size`")
                .remedy("add it to `vision_config` in `config.json`")
        })?;
        let image_token = self.settings.image_token_id.unwrap_or(-1);
        let (rows, next) = multimodal_positions(ids, image_token, &grids, merge)?;
        Ok((rows.into(), next))
    }

    /// Inputs of the token embedding component.
    pub(super) fn embedding_inputs(&self) -> &[Input] {
        self.embed.as_ref().map_or(&[], TokenEmbedding::inputs)
    }
}

/// Largest difference, relative to the largest number, between a row of features and the row that takes its place among the
/// embeddings: those of 16-bit graphs are rounded.
const ROUNDING: f32 = 1e-2;

/// Checks that the rows at image tokens are the projector's output, which training computes anew.
///
/// Errors: `Error::Unsupported` when the graph of the embeddings changes them.
fn check_unchanged(embedded: &Embedded, features: &[Arc<Features>]) -> Result<()> {
    let width = embedded.hidden_size.max(1);
    let rows = embedded.data.chunks_exact(width).zip(&embedded.side.image).filter(|(_, image)| **image);
    let found = rows.flat_map(|(row, _)| row);
    let want = || features.iter().flat_map(|item| &item.data);
    let largest = want().fold(0f32, |largest, number| largest.max(number.abs()));
    let count = embedded.side.image.iter().filter(|image| **image).count() * width;
    if count == want().count() && found.zip(want()).all(|(a, b)| (a - b).abs() <= ROUNDING * largest) {
        return Ok(());
    }
    Err(Error::unsupported("training the connector", "the graph of the embeddings changes the connector's output")
        .remedy("leave the connector as it is with `--lora-layers trained`"))
}

/// DeepStack features of all pictures by level, and the levels' numbers; empty when the pictures have none.
fn levels(features: &[Arc<Features>]) -> Result<(Vec<Vec<f32>>, Vec<usize>)> {
    let numbers = features.first().map(|item| item.levels.clone()).unwrap_or_default();
    if features.iter().any(|item| item.levels != numbers) {
        return Err(Error::invalid("DeepStack features", "pictures have different levels"));
    }
    let level = |level: usize| features.iter().flat_map(|item| item.deepstack[level].iter().copied()).collect();
    Ok(((0..numbers.len()).map(level).collect(), numbers))
}
