//! The three graphs in the form that ONNX Runtime GenAI feeds: a decoder with numbered caches, a vision encoder with one
//! row per image token, and an embedding that puts these rows into the prompt.

use std::collections::{HashMap, HashSet};

use crate::analysis::{self, PortRole};
use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, DataType, Dim, Model, Tensor, ValueId};
use crate::rewrite::{JoinScope, Joined};
use crate::runtime::{Input, InputKind, Port};

use super::super::nodes::{
    cast, graph_input, inputs_of, ints, no_logits, only_output, scalar, symbol, tensor, undeclared, with_rows_at,
};

/// Names of the decoder's cache inputs and outputs; `%d` is the number of the layer.
pub(super) const PAST_KEY: &str = "past_key_values.%d.key";
pub(super) const PAST_VALUE: &str = "past_key_values.%d.value";
pub(super) const PRESENT_KEY: &str = "present.%d.key";
pub(super) const PRESENT_VALUE: &str = "present.%d.value";
/// The features of the pictures, output of the vision encoder and input of the embedding.
pub(super) const IMAGE_FEATURES: &str = "image_features";
/// Output of the embedding and input of the decoder.
pub(super) const INPUTS_EMBEDS: &str = "inputs_embeds";

/// What the config says of a decoder.
#[derive(Debug, Default)]
pub(super) struct GenaiFigures {
    pub layers: usize,
    /// Heads of keys and values, and their width.
    pub heads: (usize, usize),
    /// Width of `inputs_embeds` and its type; `None` when the decoder reads token ids.
    pub embeddings: Option<(Option<usize>, DataType)>,
    /// Rows of the head, where the graph fixes them.
    pub vocabulary: Option<usize>,
    /// True when positions have a temporal, a height and a width row.
    pub multimodal_positions: bool,
    /// Names of the inputs other than caches.
    pub inputs: Vec<String>,
    /// True when one operator reads and extends each cache, so that past and present may be one buffer.
    pub grouped_query: bool,
}

/// What to do with a model that GenAI does not run.
pub(super) const ELSEWHERE: &str = "export it with `--to generate` or `--to triton`, whose graphs compute it, or with `--to openvino` for a \
     program of your own";

/// The error of an input that GenAI does not feed, or not so.
fn unfed(port: &Port, problem: &str) -> Error {
    Error::unsupported(format!("input {}", port.described()), problem).remedy(ELSEWHERE)
}

/// What an input holds that GenAI does not feed.
fn held_by(kind: InputKind) -> &'static str {
    match kind {
        InputKind::TokenTypes => "holds token types",
        InputKind::PerLayerInputs => "holds embeddings for each layer",
        InputKind::Deepstack => "holds DeepStack features",
        InputKind::ImageMask => "marks the image tokens",
        _ => "is no input that every decoder has",
    }
}

/// The decoder with caches named by layer, and its figures.
///
/// Errors: `Error::Unsupported` naming an input that GenAI does not feed, or a layer whose cache is not keys and values
/// of the same size as the other layers'.
pub(super) fn decoder(model: &Model, head_dim: Option<usize>) -> Result<(Model, GenaiFigures)> {
    let mut figures = GenaiFigures::default();
    let mut written = model.clone();
    let mut types: Vec<(String, DataType)> = Vec::new();
    for (id, input) in inputs_of("decoder", model)? {
        match input.kind() {
            InputKind::Past => continue,
            InputKind::InputIds => {}
            InputKind::InputsEmbeds => figures.embeddings = Some((input.port.width(), input.port.dtype)),
            InputKind::AttentionMask => types.push((input.port.name.clone(), input.port.dtype)),
            InputKind::PositionIds => {
                figures.multimodal_positions = input.port.rank() == 3;
                types.push((input.port.name.clone(), input.port.dtype));
            }
            // Zero asks for the logits of all positions.
            InputKind::LogitsToKeep => {
                let dims = vec![1; input.port.rank()];
                let bytes = vec![0; input.port.dtype.byte_len(1).unwrap_or(8) as usize];
                let body = &mut written.graph.body;
                body.inputs.retain(|other| *other != id);
                body.initializers.push((id, Tensor::from_bytes(input.port.dtype, &dims, bytes)));
                continue;
            }
            kind => {
                let problem = format!(
                    "{}, and ONNX Runtime GenAI feeds a decoder embeddings or token ids, mask, positions and caches alone",
                    held_by(kind)
                );
                return Err(unfed(&input.port, &problem));
            }
        }
        figures.inputs.push(input.port.name.clone());
    }
    if let [(mask, one), (positions, other)] = &types[..]
        && one != other
    {
        let problem = format!("is of {other}, `{mask}` of {one}; ONNX Runtime GenAI wants one type for both");
        return Err(Error::unsupported(format!("input `{positions}`"), problem).remedy("export both with one type"));
    }
    name_caches(&mut written, model, head_dim, &mut figures)?;
    let outputs = &written.graph.body.outputs;
    let logits =
        outputs.iter().find(|id| written.graph.name(**id) == "logits").ok_or_else(|| no_logits(&written.graph))?;
    figures.vocabulary = Port::of_value(&written.graph, *logits).and_then(|port| port.width());
    crate::ir::check(&written)?;
    Ok((written, figures))
}

fn name_caches(written: &mut Model, model: &Model, head_dim: Option<usize>, figures: &mut GenaiFigures) -> Result<()> {
    let analysis = analysis::analyse(model)?;
    let named = |id: ValueId| {
        let name = analysis.model.graph.name(id);
        let ids = model.graph.body.inputs.iter().chain(&model.graph.body.outputs);
        ids.copied().find(|other| model.graph.name(*other) == name)
    };
    let mut names: HashMap<ValueId, String> = HashMap::new();
    for (number, layer) in analysis.map.layers.iter().enumerate() {
        let subject = || format!("layer {number} of the decoder");
        let of = |role: PortRole| layer.ports.iter().find(|port| port.role == role);
        let pair = |role: PortRole| of(role).and_then(|port| Some((named(port.past?)?, named(port.present?)?)));
        let (Some(key), Some(value), 2) = (pair(PortRole::Key), pair(PortRole::Value), layer.ports.len()) else {
            let found: Vec<String> = layer.ports.iter().map(|port| port.role.label()).collect();
            let found = if found.is_empty() { "nothing".to_string() } else { found.join(", ") };
            let problem = format!("caches {found}; ONNX Runtime GenAI keeps keys and values of every layer");
            return Err(Error::unsupported(subject(), problem).remedy(ELSEWHERE));
        };
        for (past, present, [past_name, present_name]) in
            [(key.0, key.1, [PAST_KEY, PRESENT_KEY]), (value.0, value.1, [PAST_VALUE, PRESENT_VALUE])]
        {
            let heads = heads(model, past, head_dim)?;
            if number > 0 && heads != figures.heads {
                let problem = format!(
                    "caches {} heads of {}, other layers {} of {}; ONNX Runtime GenAI has one size for all",
                    heads.0, heads.1, figures.heads.0, figures.heads.1
                );
                return Err(Error::unsupported(subject(), problem).remedy(ELSEWHERE));
            }
            figures.heads = heads;
            names.insert(past, past_name.replace("%d", &number.to_string()));
            names.insert(present, present_name.replace("%d", &number.to_string()));
        }
    }
    figures.layers = analysis.map.layers.len();
    let cached = |id: &ValueId| names.contains_key(id);
    let readers = model.graph.body.nodes.iter().filter(|node| node.present_inputs().any(|id| cached(&id)));
    figures.grouped_query = readers.clone().count() == figures.layers
        && readers.clone().all(|node| node.op_type == "GroupQueryAttention" && node.domain == "com.microsoft");
    rename(written, names);
    Ok(())
}

/// Heads and head size of a cache `[B, heads, past, size]`.
fn heads(model: &Model, past: ValueId, head_dim: Option<usize>) -> Result<(usize, usize)> {
    let port = Port::of_value(&model.graph, past)
        .ok_or_else(|| undeclared(format!("input `{}` of the decoder", model.graph.name(past))))?;
    match (port.rank(), port.fixed_size(1), port.fixed_size(3).or(head_dim)) {
        (4, Some(heads), Some(size)) => Ok((heads, size)),
        _ => Err(unfed(
            &port,
            "has no fixed number of heads and head size; ONNX Runtime GenAI wants [batch, heads, past, size]",
        )),
    }
}

/// Gives values new names. Other values of these names get fresh ones.
fn rename(model: &mut Model, names: HashMap<ValueId, String>) {
    let renamed: HashSet<usize> = names.keys().map(|id| id.index()).collect();
    let wanted: HashSet<&String> = names.values().collect();
    let others = model.graph.values.iter().enumerate();
    let taken: Vec<usize> = others
        .filter(|(index, value)| !renamed.contains(index) && wanted.contains(&value.name))
        .map(|(index, _)| index)
        .collect();
    for index in taken {
        let name = model.graph.fresh_name(&format!("{}.inner", model.graph.values[index].name));
        model.graph.values[index].name = name;
    }
    for (id, name) in names {
        model.graph.values[id.index()].name = name;
    }
}

/// The vision encoder with one output `image_features` of `rank` axes, and the names of its inputs.
///
/// Errors: `Error::Unsupported` for another output, a width that the graph does not fix, or a rank that it cannot have.
pub(super) fn vision(model: &Model, rank: usize) -> Result<(Model, Vec<Input>)> {
    let mut inputs = Vec::new();
    for (_, input) in inputs_of("vision_encoder", model)? {
        if !matches!(input.kind(), InputKind::Image(_)) {
            return Err(unfed(&input.port, "is no array of pictures"));
        }
        inputs.push(input);
    }
    let output = only_output("the vision encoder", model)?;
    let mut written = model.clone();
    if output.rank() == rank {
        let id = written.graph.body.outputs[0];
        rename(&mut written, HashMap::from([(id, IMAGE_FEATURES.to_string())]));
        return Ok((written, inputs));
    }
    let (2, Some(width)) = (rank, output.width()) else {
        let problem = format!("gives {}, expected {rank} axes and a fixed width", output.described());
        return Err(Error::unsupported("the vision encoder", problem).remedy("export it with a fixed width"));
    };
    let mut joined = Joined::default();
    let part = joined.part("vision", model)?;
    let mut bound = HashMap::new();
    for (id, input) in inputs_of("vision_encoder", model)? {
        bound.insert(id, graph_input(&mut joined, &input.port.name, input.port.dtype, &input.port.shape));
    }
    let mut scope = JoinScope::new(&mut joined);
    let features = scope.inline(&part, "encoder", &bound)?[0];
    let shape = ints(&mut scope, "rows_of_features", &[-1, width as i64]);
    let features = scope.op("features", "Reshape", &[features, shape], &[]);
    let shape = [symbol("image_tokens"), Dim::Known(width as i64)];
    Ok((finished(scope, "vision", features, (IMAGE_FEATURES, output.dtype, &shape))?, inputs))
}

/// Names the nodes' last value as the only output of the model.
fn finished(
    scope: JoinScope<'_>,
    name: &str,
    output: ValueId,
    (output_name, dtype, shape): (&str, DataType, &[Dim]),
) -> Result<Model> {
    let JoinScope { joined, nodes } = scope;
    let mut model = std::mem::take(&mut joined.model);
    model.producer_name = "interlace".into();
    model.graph.body.name = name.into();
    model.graph.body.nodes = nodes;
    model.graph.body.outputs.push(output);
    model.graph.values[output.index()].ty = Some(tensor(dtype, shape));
    rename(&mut model, HashMap::from([(output, output_name.to_string())]));
    crate::ir::check(&model)?;
    Ok(model)
}

/// Axes of the features that an embedding reads; `None` for an embedding of tokens alone.
///
/// Errors: `Error::Unsupported` naming an input that GenAI does not feed to an embedding.
pub(super) fn merges(model: &Model) -> Result<Option<Port>> {
    let mut features = None;
    for (_, input) in inputs_of("embedding", model)? {
        match input.kind() {
            InputKind::InputIds => {}
            InputKind::ImageFeatures => features = Some(input.port),
            _ => return Err(unfed(&input.port, "is not fed to an embedding by ONNX Runtime GenAI")),
        }
    }
    Ok(features)
}

/// An embedding that merges features already, with the names that GenAI expects.
pub(super) fn renamed_embedding(model: &Model) -> Result<Model> {
    let mut written = model.clone();
    only_output("the embedding", model)?;
    let mut names = HashMap::from([(written.graph.body.outputs[0], INPUTS_EMBEDS.to_string())]);
    for (id, input) in inputs_of("embedding", model)? {
        if input.kind() == InputKind::ImageFeatures {
            names.insert(id, IMAGE_FEATURES.to_string());
        }
    }
    rename(&mut written, names);
    crate::ir::check(&written)?;
    Ok(written)
}

/// The embedding `input_ids` `[B, T]`, `image_features` `[N, D]` -> `inputs_embeds` `[B, T, D]`, with one row of features
/// at each image token. `features` is the vision encoder's output, `embeddings` the decoder's input.
///
/// Errors: `Error::Unsupported` when the token embedding has another output than the decoder reads.
pub(super) fn merging_embedding(
    model: &Model,
    features: DataType,
    (decoder_width, decoder_type): (Option<usize>, DataType),
    image: i64,
) -> Result<Model> {
    let output = only_output("the token embedding", model)?;
    let width = output.width().or(decoder_width).ok_or_else(|| {
        Error::unsupported("the token embedding", "does not declare its width").remedy("export it with a fixed width")
    })?;
    if decoder_width.is_some_and(|wanted| wanted != width) {
        let problem = format!("gives rows of {width}, the decoder reads rows of {}", decoder_width.unwrap_or(0));
        return Err(Error::unsupported("the token embedding", problem).remedy("export both from one model"));
    }
    let mut joined = Joined::default();
    let part = joined.part("embedding", model)?;
    let width = Dim::Known(width as i64);
    let shape = [symbol("batch"), symbol("sequence")];
    let ids = graph_input(&mut joined, "input_ids", DataType::Int64, &shape);
    let rows = graph_input(&mut joined, IMAGE_FEATURES, features, &[symbol("image_tokens"), width.clone()]);
    let mut scope = JoinScope::new(&mut joined);
    let mut bound = HashMap::new();
    for (id, input) in inputs_of("embedding", model)? {
        bound.insert(id, cast(&mut scope, ids, DataType::Int64, input.port.dtype));
    }
    let embedded = scope.inline(&part, "tokens", &bound)?[0];
    let embedded = cast(&mut scope, embedded, output.dtype, decoder_type);
    // Behind the prompt there are no features, and a token that the model chose is no picture.
    let count = scope.op("rows", "Shape", &[rows], &[("end", AttributeKind::Int(1))]);
    let zero = ints(&mut scope, "no_rows", &[0]);
    let pictured = scope.op("has_rows", "Greater", &[count, zero], &[]);
    let image = scalar(&mut scope, "image_id", image);
    let is_image = scope.op("is_image", "Equal", &[ids, image], &[]);
    let mut with = JoinScope::new(&mut *scope.joined);
    let rows = cast(&mut with, rows, features, decoder_type);
    let merged = with_rows_at(&mut with, embedded, is_image, rows);
    let with = Body { name: "with_pictures".into(), nodes: with.nodes, outputs: vec![merged], ..Body::default() };
    let mut without = JoinScope::new(&mut *scope.joined);
    let same = without.op("text", "Identity", &[embedded], &[]);
    let without = Body { name: "text_only".into(), nodes: without.nodes, outputs: vec![same], ..Body::default() };
    let merged = scope.joined.value("merged");
    scope.control("If", &[pictured], &[merged], vec![("then_branch", with), ("else_branch", without)]);
    let [batch, sequence] = shape;
    finished(scope, "embedding", merged, (INPUTS_EMBEDS, decoder_type, &[batch, sequence, width]))
}
