//! Models of the repository that answer a request beyond one component: `prefill`, `generate` and `generate_stream`.

use serde_json::json;

use crate::base::{Error, Result};
use crate::ir::{DataType, Model};
use crate::runtime::{Input, InputKind, TokenTypes};

use super::super::generate::embedding::EmbeddingPorts;
use super::super::generate::graph::{Graphs, MAX_NEW_TOKENS, TokenIds};
use super::super::generate::ports::DecoderPorts;
use super::config::model_config;
use super::prompt::{MergeInput, NEXT_POSITION};
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

/// The ensemble: pictures and ids to logits and caches. `sources` are those of the inputs of `merge`.
///
/// Errors: as `model_config`.
pub(super) fn prefill(
    vision: &Served,
    embedding: &Served,
    (merge, sources): (&Served, &[(String, MergeInput)]),
    decoder: &Served,
) -> Result<ModelConfig> {
    // Names inside the ensemble: those of its inputs and outputs, the rest with the name of the model that gives it.
    let inner = |model: &str, name: &str| format!("{model}.{name}");
    let same = |name: &str| name.to_string();
    let ids = merge.inputs().next().unwrap_or_default().to_string();
    let pictures: Vec<&str> = vision.inputs().collect();
    let fed = |(name, source): &'_ (String, MergeInput)| {
        let tensor = match source {
            MergeInput::Ids => ids.clone(),
            MergeInput::Embedding(output) => inner("embedding", output),
            MergeInput::Vision(output) => inner("vision", output),
            MergeInput::Picture(input) => input.clone(),
        };
        Entry { key: name.clone(), value: tensor }
    };
    let of_prompt = |name: &str| match name {
        NEXT_POSITION => same(name),
        _ => inner("prompt", name),
    };
    let scheduling = ModelEnsembling {
        step: vec![
            step(
                vision,
                entries(pictures.iter().map(|name| (*name, same(name)))),
                entries(vision.outputs().map(|name| (name, inner("vision", name)))),
            ),
            step(
                embedding,
                entries(embedding.inputs().map(|name| (name, ids.clone()))),
                entries(embedding.outputs().map(|name| (name, inner("embedding", name)))),
            ),
            step(
                merge,
                sources.iter().map(fed).collect(),
                entries(merge.outputs().map(|name| (name, of_prompt(name)))),
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
    let mut output = of(decoder)?.output;
    output.extend(of(merge)?.output.into_iter().filter(|port| port.name == NEXT_POSITION));
    Ok(ModelConfig {
        name: PREFILL.into(),
        platform: "ensemble".into(),
        input,
        output,
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
    let own = graphs.embedding.map(EmbeddingPorts::of).transpose()?;
    let own = own.ok_or_else(|| {
        Error::unsupported("the model", "has no token embedding as a graph of its own")
            .remedy("add it to the model's folder as `embed_tokens.onnx`")
    })?;
    let width = own.main.1.width();
    let mut inputs = Vec::new();
    for (_, input) in &ports.inputs {
        let kind = match input.kind() {
            InputKind::InputsEmbeds => "embeddings",
            InputKind::PerLayerInputs => "second_embeddings",
            InputKind::AttentionMask => "mask",
            InputKind::PositionIds => "positions",
            InputKind::CachePosition => "cache_position",
            InputKind::LogitsToKeep => "one",
            InputKind::UseCacheBranch => "true",
            InputKind::TokenTypes if ids.token_types == TokenTypes::Answer => "one",
            InputKind::Deepstack | InputKind::ImageMask | InputKind::TokenTypes => "zero",
            _ => "ids",
        };
        // An input without axes has one in the repository.
        let axes = input.port.rank().max(1);
        let mut described =
            json!({"name": input.port.name, "kind": kind, "axes": axes, "type": numpy(input.port.dtype)?});
        if input.kind() == InputKind::Deepstack {
            described["shape"] = json!(shape_of_no_features(input, width)?);
        }
        inputs.push(described);
    }
    let outputs: Vec<&str> =
        graphs.decoder.graph.body.outputs.iter().map(|id| graphs.decoder.graph.name(*id)).collect();
    let caches: Vec<[&str; 2]> =
        ports.caches.iter().map(|(_, port, present)| [port.name.as_str(), outputs[*present]]).collect();
    let outputs_of_embedding = json!({
        "ids": graphs.embedding.map(|model| model.graph.name(own.ids.0)),
        "type": numpy(own.ids.1)?,
        "embeddings": own.main.1.name,
        "second_embeddings": own.per_layer.map(|(_, port)| port.name),
        "padding": ports.packed_levels(width)? * width.unwrap_or(0),
    });
    let pictures: Vec<&str> = generate.inputs().filter(|name| !["input_ids", MAX_NEW_TOKENS].contains(name)).collect();
    let settings = json!({
        "prefill": PREFILL, "embedding": embedding.name, "embedding_ports": outputs_of_embedding, "decoder": decoder.name,
        "decoder_inputs": inputs, "caches": caches, "pictures": pictures, "end_ids": ids.end,
        "positions_in_rows": ports.position_rank() == 3,
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

/// The shape of DeepStack features for a token of the answer.
fn shape_of_no_features(input: &Input, width: Option<usize>) -> Result<Vec<usize>> {
    let width = input.port.width().or(width).ok_or_else(|| {
        Error::unsupported(format!("input {}", input.port.described()), "does not declare the width of its features")
            .remedy("use the model `generate`, whose loop is in the graph")
    })?;
    let levels = match input.is_stacked() {
        true => Some(input.port.fixed_size(0).ok_or_else(|| {
            let problem = "does not declare its number of levels";
            Error::unsupported(format!("input {}", input.port.described()), problem)
                .remedy("export it with a fixed first axis")
        })?),
        false => None,
    };
    let tokens: &[usize] = if input.is_by_token() { &[1, 1] } else { &[0] };
    Ok(levels.into_iter().chain(tokens.iter().copied()).chain([width]).collect())
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
