//! Models of the repository that answer a request beyond one component: `prefill`, `generate` and `generate_stream`.

use serde_json::json;

use crate::base::{Error, Result};
use crate::ir::{DataType, Model};
use crate::runtime::InputKind;

use super::super::generate::graph::{DecoderPorts, Graphs, MAX_NEW_TOKENS, TokenIds};
use super::config::model_config;
use super::prompt::{IMAGE_FEATURES, TOKEN_EMBEDS};
use super::schema::model_ensembling::{Entry, Step};
use super::schema::{
    self, ModelConfig, ModelEnsembling, ModelInput, ModelOutput, ModelParameter, ModelTransactionPolicy,
    model_parameter,
};

/// The ensemble from a prompt to logits and caches.
pub(super) const PREFILL: &str = "prefill";
/// The graph that computes the decoder's inputs for a prompt.
pub(super) const MERGE: &str = "merge_embeddings";
/// One graph that answers a request whole.
pub(super) const GENERATE: &str = "generate";
/// The same token by token.
pub(super) const STREAM: &str = "generate_stream";
/// The file of a model of the Python back end.
pub(super) const STREAM_FILE: &str = "model.py";
/// The loop of [`STREAM`].
pub(super) const STREAM_TEXT: &str = include_str!("generate_stream.py");
/// Key of the loop's settings in its configuration.
const STREAM_SETTINGS: &str = "interlace";

/// A component as the repository has it.
pub(super) struct Served {
    /// Name of the model.
    pub name: String,
    /// The graph as written.
    pub model: Model,
}

impl Served {
    fn inputs(&self) -> impl Iterator<Item = &str> {
        let body = &self.model.graph.body;
        let open = body.inputs.iter().filter(|id| body.initializer(**id).is_none());
        open.map(|id| self.model.graph.name(*id))
    }

    fn outputs(&self) -> impl Iterator<Item = &str> {
        self.model.graph.body.outputs.iter().map(|id| self.model.graph.name(*id))
    }
}

fn entries<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> Vec<Entry> {
    pairs.into_iter().map(|(key, value)| Entry { key: key.to_string(), value }).collect()
}

fn step(served: &Served, input_map: Vec<Entry>, output_map: Vec<Entry>) -> Step {
    // Version -1 is the newest.
    Step { model_name: served.name.clone(), model_version: -1, input_map, output_map }
}

/// The ensemble: pictures and ids to logits and caches.
///
/// Errors: as `model_config`.
pub(super) fn prefill(vision: &Served, embedding: &Served, merge: &Served, decoder: &Served) -> Result<ModelConfig> {
    // Names inside the ensemble: those of its inputs and outputs, the rest with the name of the model that gives it.
    let inner = |model: &str, name: &str| format!("{model}.{name}");
    let same = |name: &str| name.to_string();
    let (features, embeds) = (inner("vision", IMAGE_FEATURES), inner("embedding", TOKEN_EMBEDS));
    let ids = merge.inputs().next().unwrap_or_default().to_string();
    let pictures: Vec<&str> = vision.inputs().collect();
    let merged = |name: &str| match name {
        TOKEN_EMBEDS => embeds.clone(),
        IMAGE_FEATURES => features.clone(),
        _ => ids.clone(),
    };
    let scheduling = ModelEnsembling {
        step: vec![
            step(
                vision,
                entries(pictures.iter().map(|name| (*name, same(name)))),
                entries(vision.outputs().map(|name| (name, features.clone()))),
            ),
            step(
                embedding,
                entries(embedding.inputs().map(|name| (name, ids.clone()))),
                entries(embedding.outputs().map(|name| (name, embeds.clone()))),
            ),
            step(
                merge,
                entries(merge.inputs().map(|name| (name, merged(name)))),
                entries(merge.outputs().map(|name| (name, inner("prompt", name)))),
            ),
            step(
                decoder,
                entries(decoder.inputs().map(|name| (name, inner("prompt", name)))),
                entries(decoder.outputs().map(|name| (name, same(name)))),
            ),
        ],
    };
    // Without batches, so that all shapes are the graphs' own.
    let of = |served: &Served| model_config(&served.name, &served.model, 0);
    let mut input: Vec<ModelInput> = of(merge)?.input.into_iter().filter(|port| port.name == ids).collect();
    input.extend(of(vision)?.input);
    Ok(ModelConfig {
        name: PREFILL.into(),
        platform: "ensemble".into(),
        input,
        output: of(decoder)?.output,
        ensemble_scheduling: Some(scheduling),
        ..ModelConfig::default()
    })
}

/// The loop in the Python back end, which sends one response for each token. `generate` is the graph of [`GENERATE`],
/// whose inputs it takes.
///
/// Errors: `Error::Unsupported` for an element type that NumPy lacks.
pub(super) fn stream(
    generate: &Served,
    embedding: &Served,
    decoder: &Served,
    graphs: &Graphs<'_>,
    ids: &TokenIds<'_>,
) -> Result<ModelConfig> {
    let ports = DecoderPorts::of_decoder(graphs.decoder)?;
    numpy(ports.logits_type)?;
    let mut inputs = Vec::new();
    for (_, input) in &ports.inputs {
        let kind = match input.kind() {
            InputKind::InputsEmbeds => "embeddings",
            InputKind::AttentionMask => "mask",
            InputKind::PositionIds => "positions",
            InputKind::CachePosition => "cache_position",
            InputKind::LogitsToKeep => "one",
            InputKind::UseCacheBranch => "true",
            _ => "ids",
        };
        // An input without axes has one in the repository.
        let axes = input.port.rank().max(1);
        inputs.push(json!({"name": input.port.name, "kind": kind, "axes": axes, "type": numpy(input.port.dtype)?}));
    }
    let outputs: Vec<&str> =
        graphs.decoder.graph.body.outputs.iter().map(|id| graphs.decoder.graph.name(*id)).collect();
    let caches: Vec<[&str; 2]> =
        ports.caches.iter().map(|(_, port, present)| [port.name.as_str(), outputs[*present]]).collect();
    let embeds: Vec<&str> = embedding.inputs().chain(embedding.outputs()).collect();
    let pictures: Vec<&str> = generate.inputs().filter(|name| !["input_ids", MAX_NEW_TOKENS].contains(name)).collect();
    let settings = json!({
        "prefill": PREFILL, "embedding": embedding.name, "embedding_ports": embeds, "decoder": decoder.name,
        "decoder_inputs": inputs, "caches": caches, "pictures": pictures, "end_ids": ids.end,
    });
    let whole = model_config(GENERATE, &generate.model, 0)?;
    let token = ModelOutput {
        name: "generated_ids".into(),
        data_type: schema::DataType::TypeInt64.into(),
        dims: vec![1],
        ..ModelOutput::default()
    };
    let parameter = ModelParameter { string_value: settings.to_string() };
    Ok(ModelConfig {
        name: STREAM.into(),
        backend: "python".into(),
        input: whole.input,
        output: vec![token],
        default_model_filename: STREAM_FILE.into(),
        parameters: vec![model_parameter::Entry { key: STREAM_SETTINGS.into(), value: Some(parameter) }],
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: true }),
        ..ModelConfig::default()
    })
}

/// NumPy's name of an element type.
fn numpy(dtype: DataType) -> Result<&'static str> {
    Ok(match dtype {
        DataType::Float => "float32",
        DataType::Float16 => "float16",
        DataType::Int64 => "int64",
        DataType::Int32 => "int32",
        DataType::Bool => "bool",
        other => {
            return Err(Error::unsupported(format!("a decoder with {other}"), "NumPy has no such numbers")
                .remedy("use the model `generate`, whose loop is in the graph"));
        }
    })
}
