//! What every part of the model costs in time and bytes here, measured once: the whole model beside one with fewer layers.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis;
use crate::base::{Error, Provenance, Result, ScratchDir};
use crate::bundle::{Bundle, Deepstack, ModelSource, Role, Tower};
use crate::data::{ImageSettings, Sample};
use crate::eval::{PictureSettings, Spread, StageOptions, StageTimes, stage_times};
use crate::onnx;
use crate::pipeline::stages::Stages;
use crate::pipeline::steps::{self, Drop};

use super::quality::{Choice, Quality};

/// `costs.json`: times on this machine and bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Costs {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Processor cores that the measuring process may use.
    pub cores: usize,
    /// Decoder layers of the model.
    pub decoder_layers: usize,
    /// Layers of the vision tower; 0 where it is not searched.
    pub tower_layers: usize,
    /// Decoder layers that the thinner model of the measurement lacks.
    pub without_decoder_layers: usize,
    /// Tower layers that it lacks.
    pub without_tower_layers: usize,
    /// Bytes of the components that are run.
    pub size_bytes: u64,
    /// Bytes of each decoder layer: its own weights, and its nodes, which are taken to be equally large in all layers.
    pub decoder_layer_bytes: Vec<u64>,
    /// The same of each tower layer.
    pub tower_layer_bytes: Vec<u64>,
    /// Times by picture budget, in the order of the choices in `quality.json`.
    pub budgets: Vec<BudgetCosts>,
}

impl Costs {
    /// Version of the schema of `costs.json`.
    pub const SCHEMA_VERSION: u32 = 1;

    /// Milliseconds that one image token takes, tower included, from the largest to the smallest budget; `None` with one
    /// budget.
    pub fn image_token_ms(&self) -> Option<f64> {
        let (first, last) = (self.budgets.first()?, self.budgets.iter().rfind(|own| own.keep_image_tokens.is_none())?);
        let tokens = first.image_tokens.checked_sub(last.image_tokens).filter(|&tokens| tokens > 0)?;
        Some((first.ttft_ms.median - last.ttft_ms.median) / tokens as f64)
    }
}

/// Times with one picture budget. A layer's time is the difference between the whole and the thinner model, by layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetCosts {
    /// The budget.
    #[serde(default, skip_serializing_if = "ImageSettings::is_default")]
    pub images: ImageSettings,
    /// Part of each picture's tokens that the decoder reads; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_image_tokens: Option<f64>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Image tokens among them.
    pub image_tokens: usize,
    /// From the encoded picture and the question to the first token, of the whole model.
    pub ttft_ms: Spread,
    /// One generated token of the whole model.
    pub step_ms: Spread,
    /// Decoding and scaling the picture, and the tokenizer.
    pub prepare_ms: f64,
    /// One tower layer.
    pub tower_layer_ms: f64,
    /// The vision encoder without its layers.
    pub tower_rest_ms: f64,
    /// One decoder layer over the prompt.
    pub decoder_layer_ms: f64,
    /// The decoder over the prompt without its layers: the head, the cache.
    pub decoder_rest_ms: f64,
    /// The token embedding and everything else.
    pub other_ms: f64,
    /// One decoder layer in one generated token.
    pub step_layer_ms: f64,
    /// One generated token without the decoder's layers.
    pub step_rest_ms: f64,
}

/// Bytes of the components that are run.
///
/// Errors: those of reading the files.
pub fn size_bytes(bundle: &Bundle) -> Result<u64> {
    let roles = [Role::EmbedTokens, Role::VisionEncoder, Role::Projector, Role::Decoder, Role::LmHead];
    roles.iter().filter_map(|&role| bundle.component(role)).map(|component| bundle.size_bytes(component)).sum()
}

/// Measures times and counts bytes.
///
/// Errors: as `steps::prune` and `eval::stage_times`; `Error::Invalid` where no decoder layer can be left out.
pub fn measure(stages: &mut Stages, quality: &Quality, question: &Sample, options: &StageOptions) -> Result<Costs> {
    let [decoder, tower, pictures] = &quality.axes[..] else {
        return Err(Error::invalid("`quality.json`", "has another number of axes").remedy("use a new work folder"));
    };
    let layers = stages.dense.num_layers;
    let fewer = decoder.get((decoder.len() - 1).min(layers.div_ceil(2))).filter(|choice| !choice.dropped.is_empty());
    let fewer = fewer.ok_or_else(|| {
        Error::invalid("decoder depth", "no layer of the decoder can be dropped, so its time cannot be measured")
            .remedy("give another strategy with `--strategy`")
    })?;
    let thin_tower = tower.last().filter(|choice| !choice.dropped.is_empty());
    let scratch = ScratchDir::create_in(stages.store.folder())?;
    let thin = scratch.path().join("thin");
    let first = Drop::Layers { tower: Tower::Text, layers: &fewer.dropped };
    steps::prune(&stages.bundle, &first, Deepstack::Keep, None, &thin)?;
    let mut models = vec![stages.model.clone(), ModelSource::from(thin.as_path())];
    let thinner = scratch.path().join("thinner");
    if let Some(choice) = thin_tower {
        let second = Drop::Layers { tower: Tower::Vision, layers: &choice.dropped };
        steps::prune(&Bundle::open(&thin)?, &second, Deepstack::Keep, None, &thinner)?;
        models[1] = ModelSource::from(thinner.as_path());
    }
    let settings =
        |choice: &Choice| PictureSettings { images: choice.images, keep_image_tokens: choice.keep_image_tokens };
    let settings: Vec<PictureSettings> = pictures.iter().map(settings).collect();
    let times = stage_times(&models, &settings, question, options, &stages.runtime()?, stages.cancel)?;
    let tower_weights = tower_bytes(&stages.bundle, tower.len() > 1)?;
    let decoder_weights: Vec<u64> = stages.dense.costs.layers.iter().map(|layer| layer.size_bytes).collect();
    let thin = Bundle::open(if thin_tower.is_some() { &thinner } else { &thin })?;
    let with_nodes = |role: Role, dropped: &[usize], weights: &[u64]| -> Result<Vec<u64>> {
        let nodes = node_bytes((&stages.bundle, &thin), role, dropped, weights)?;
        Ok(weights.iter().map(|weight| weight + nodes).collect())
    };
    let decoder_costs = with_nodes(Role::Decoder, &fewer.dropped, &decoder_weights)?;
    let tower_dropped = thin_tower.map_or(&[][..], |choice| &choice.dropped);
    let tower_costs = with_nodes(Role::VisionEncoder, tower_dropped, &tower_weights)?;
    let counts = Counts {
        decoder: layers,
        tower: tower_costs.len(),
        fewer: fewer.dropped.len(),
        fewer_tower: thin_tower.map_or(0, |choice| choice.dropped.len()),
    };
    let mut budgets = Vec::with_capacity(settings.len());
    for (at, pictures) in settings.iter().enumerate() {
        budgets.push(budget_costs(*pictures, &times[0][at], &times[1][at], &counts));
    }
    let inputs = BTreeMap::from([("model".to_string(), stages.dense.digest.clone())]);
    let provenance = stages.named(Provenance::new(Costs::SCHEMA_VERSION, inputs, options)?);
    Ok(Costs {
        provenance,
        device: stages.device.to_string(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        decoder_layers: layers,
        tower_layers: counts.tower,
        without_decoder_layers: counts.fewer,
        without_tower_layers: counts.fewer_tower,
        size_bytes: size_bytes(&stages.bundle)?,
        decoder_layer_bytes: decoder_costs,
        tower_layer_bytes: tower_costs,
        budgets,
    })
}

/// Bytes of each tower layer's own weights; none where the tower is not searched.
fn tower_bytes(bundle: &Bundle, searched: bool) -> Result<Vec<u64>> {
    let Some(component) = bundle.component(Role::VisionEncoder).filter(|_| searched) else { return Ok(Vec::new()) };
    let analysis = analysis::analyse(&onnx::load(&bundle.path_of(component))?)?;
    let body = &analysis.model.graph.body;
    Ok(analysis.map.layers.iter().map(|layer| layer.weight_bytes(body)).collect())
}

/// Bytes of one layer's nodes in the graph, the mean over `dropped`: what the file without these layers lacks besides their weights.
fn node_bytes((whole, thin): (&Bundle, &Bundle), role: Role, dropped: &[usize], weights: &[u64]) -> Result<u64> {
    let (Some(before), Some(after)) = (whole.component(role), thin.component(role)) else { return Ok(0) };
    let gone = whole.size_bytes(before)?.saturating_sub(thin.size_bytes(after)?);
    let of_weights: u64 = dropped.iter().filter_map(|&layer| weights.get(layer)).sum();
    Ok(gone.saturating_sub(of_weights) / dropped.len().max(1) as u64)
}

/// Layers of the model, and how many of them the thinner model lacks.
struct Counts {
    decoder: usize,
    tower: usize,
    fewer: usize,
    fewer_tower: usize,
}

fn budget_costs(pictures: PictureSettings, whole: &[StageTimes], thin: &[StageTimes], counts: &Counts) -> BudgetCosts {
    let spread = |part: fn(&StageTimes) -> f64| Spread::of(&whole.iter().map(part).collect::<Vec<_>>());
    // The median over rounds of the difference within a round, so that slow phases of the machine cancel. Noise can make a
    // cheap layer's time negative; no layer gives time back.
    let layer = |part: fn(&StageTimes) -> f64, fewer: usize| {
        let differences: Vec<f64> = whole.iter().zip(thin).map(|(a, b)| part(a) - part(b)).collect();
        if fewer == 0 { 0.0 } else { (Spread::of(&differences).median / fewer as f64).max(0.0) }
    };
    let median = |part: fn(&StageTimes) -> f64| spread(part).median;
    let (prompt_tokens, image_tokens) = whole.first().map_or((0, 0), |own| (own.prompt_tokens, own.image_tokens));
    let tower_layer_ms = layer(|times| times.vision_ms, counts.fewer_tower);
    let decoder_layer_ms = layer(|times| times.prefill_ms, counts.fewer);
    let step_layer_ms = layer(|times| times.decoder_step_ms, counts.fewer);
    let (vision, prefill) = (median(|times| times.vision_ms), median(|times| times.prefill_ms));
    let (ttft_ms, step_ms) = (spread(|times| times.ttft_ms), spread(|times| times.step_ms));
    let prepare_ms = median(|times| times.prepare_ms);
    BudgetCosts {
        images: pictures.images,
        keep_image_tokens: pictures.keep_image_tokens,
        prompt_tokens,
        image_tokens,
        prepare_ms,
        tower_layer_ms,
        tower_rest_ms: vision - tower_layer_ms * counts.tower as f64,
        decoder_layer_ms,
        decoder_rest_ms: prefill - decoder_layer_ms * counts.decoder as f64,
        other_ms: ttft_ms.median - prepare_ms - vision - prefill,
        step_layer_ms,
        step_rest_ms: step_ms.median - step_layer_ms * counts.decoder as f64,
        ttft_ms,
        step_ms,
    }
}
