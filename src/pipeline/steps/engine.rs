//! ONNX Runtime for evaluation, and the settings of a benchmark run.

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Peers, Provenance, Result, Sha256Digest};
use crate::bundle::{Bundle, ModelSource, Role};
use crate::data::{Benchmark, ImageSettings};
use crate::eval::{EvalOptions, Judge, LoadedModel, PromptStyle};
use crate::runtime::{Decoder, FeatureCache, Runtime, SessionOptions, VlmSession};

/// Limit in bytes on image features that models and questions share: 256 pictures with 256 tokens of width 1,024.
const FEATURE_CACHE_BYTES: usize = 256 << 20;
/// Seed of the bootstrap, equal in all verbs, so that reports agree.
pub(super) const BOOTSTRAP_SEED: u64 = 42;

/// Settings of a benchmark run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSettings {
    /// Questions that are answered together.
    pub batch_size: usize,
    /// Longest answer in tokens; the model's own setting without it.
    pub max_new_tokens: Option<usize>,
    /// Asks only the first questions.
    pub limit: Option<usize>,
    /// Wording of the questions.
    pub prompt_style: PromptStyle,
    /// The language model that judges answers, for benchmarks that need one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<Judge>,
    /// Image settings that override the model's own files.
    #[serde(skip_serializing_if = "ImageSettings::is_default")]
    pub images: ImageSettings,
}

impl Default for EvalSettings {
    fn default() -> Self {
        let EvalOptions { batch_size, max_new_tokens, limit, prompt_style, judge } = EvalOptions::default();
        EvalSettings { batch_size, max_new_tokens, limit, prompt_style, judge, images: ImageSettings::default() }
    }
}

/// ONNX Runtime on a device, and the cache that its models share.
pub struct Engine {
    pub(super) runtime: Runtime,
    pub(super) cache: Arc<FeatureCache>,
    peers: Option<Box<dyn Peers + Send>>,
}

impl Engine {
    /// Errors: as `Runtime::new`.
    pub fn new(device: Device) -> Result<Self> {
        Engine::with_peers(None, device)
    }

    /// An engine of one of several processes that share the questions and samples of every measurement.
    ///
    /// Errors: as `Runtime::new`.
    pub fn with_peers(peers: Option<Box<dyn Peers + Send>>, device: Device) -> Result<Self> {
        Ok(Engine { runtime: Runtime::new(device)?, cache: FeatureCache::new(FEATURE_CACHE_BYTES), peers })
    }

    /// The processes that share the work.
    pub fn peers(&self) -> Option<&dyn Peers> {
        self.peers.as_deref().map(|peers| peers as &dyn Peers)
    }

    /// Loads a model. Models share image features.
    ///
    /// Errors: as `LoadedModel::open`.
    pub fn load(&self, model: &ModelSource, images: &ImageSettings) -> Result<LoadedModel> {
        LoadedModel::open(model, &self.runtime, &SessionOptions::default(), &self.cache, images)
    }

    /// Loads a model for perplexity; its inputs may be ready tensors.
    ///
    /// Errors: as `VlmSession::open`.
    pub fn load_to_predict(&self, bundle: &Bundle) -> Result<VlmSession> {
        let options = SessionOptions::default();
        let head_dim = bundle.config().and_then(|config| config.head_size());
        let session = self.runtime.session(&bundle.path_of(bundle.require(Role::Decoder)?), &options)?;
        let decoder = Decoder::prefill_only(session, head_dim)?;
        VlmSession::with_decoder(&self.runtime, bundle, decoder, &options, &self.cache)
    }
}

/// The head of a report, with the variants of both models.
///
/// Errors: as `Provenance::new`.
pub(super) fn head<S: Serialize>(
    version: u32,
    inputs: BTreeMap<String, Sha256Digest>,
    settings: &S,
    model: &ModelSource,
    baseline: Option<&ModelSource>,
) -> Result<Provenance> {
    Ok(Provenance::new(version, inputs, settings)?
        .with_variants("model", model.chosen().as_deref())
        .with_variants("baseline", baseline.and_then(ModelSource::chosen).as_deref())
        .with_hub("model", model.hub_name())
        .with_hub("baseline", baseline.and_then(ModelSource::hub_name)))
}

/// Digests of the models and of the benchmark, in the form of a report's provenance.
///
/// Errors: as `ModelSource::open` and `Benchmark::digest`.
pub(super) fn digests(
    model: &ModelSource,
    baseline: Option<&ModelSource>,
    benchmark: &Benchmark,
) -> Result<BTreeMap<String, Sha256Digest>> {
    let mut inputs =
        BTreeMap::from([("model".to_string(), model.open()?.digest()?), ("data".to_string(), benchmark.digest()?)]);
    if let Some(path) = baseline {
        inputs.insert("baseline".to_string(), path.open()?.digest()?);
    }
    Ok(inputs)
}
