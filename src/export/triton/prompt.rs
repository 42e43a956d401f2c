//! `merge_embeddings`: all that the decoder reads for a prompt, from the outputs of token embedding and vision encoder.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::ir::{DataType, Dim, Model, ValueId};
use crate::prompt::IMAGE_GRID_THW;
use crate::rewrite::{JoinScope, Joined};
use crate::runtime::{InputKind, Port};

use super::super::generate::embedding::EmbeddingPorts;
use super::super::generate::graph::{Carried, Graphs, INPUT_IDS, TokenIds, fed};
use super::super::generate::merge::{Rows, VisionPorts, at_image_tokens};
use super::super::generate::ports::DecoderPorts;
use super::super::generate::positions::{self, Grids};
use super::super::generate::sides::Tokens;
use super::super::nodes::{cast, graph_input, inputs_of, ints, refused, scalar, symbol, tensor};

/// The position of the token behind the prompt, an output of the same name for positions in three rows.
pub(super) const NEXT_POSITION: &str = "next_position";

/// What an input of [`Merge`] is fed.
pub(super) enum MergeInput {
    /// The prompt's token ids.
    Ids,
    /// An output of the token embedding.
    Embedding(String),
    /// An output of the vision encoder.
    Vision(String),
    /// An input of the vision encoder.
    Picture(String),
}

/// The graph and what its inputs are fed, in order.
pub(super) struct Merge {
    pub model: Model,
    pub sources: Vec<(String, MergeInput)>,
}

/// The graph's inputs.
struct Inputs {
    joined: Joined,
    sources: Vec<(String, MergeInput)>,
}

impl Inputs {
    fn add(&mut self, name: String, port: &Port, shape: &[Dim], source: MergeInput) -> ValueId {
        self.sources.push((name.clone(), source));
        graph_input(&mut self.joined, &name, port.dtype, shape)
    }

    /// An output of the token embedding for one prompt of any length; the other sizes are the embedding's.
    fn of_embedding(&mut self, port: &Port) -> ValueId {
        let shape: Vec<Dim> = sequence().into_iter().chain(port.shape.iter().skip(2).cloned()).collect();
        self.add(format!("token_{}", port.name), port, &shape, MergeInput::Embedding(port.name.clone()))
    }

    /// The outputs of the vision encoder, in its order.
    fn of_vision(&mut self, pictures: &VisionPorts) -> Vec<ValueId> {
        let levels = pictures.levels.iter().map(|(place, _, port)| (*place, port));
        let ports = std::iter::once((pictures.main.0, &pictures.main.1)).chain(levels);
        let mut outputs: Vec<(usize, ValueId)> = Vec::new();
        for (place, port) in ports {
            let name = format!("vision_{}", port.name);
            outputs.push((place, self.add(name, port, &port.shape, MergeInput::Vision(port.name.clone()))));
        }
        outputs.sort_by_key(|(place, _)| *place);
        outputs.into_iter().map(|(_, value)| value).collect()
    }

    /// The pictures' grids, from which three rows of positions come.
    ///
    /// Errors: `Error::Unsupported` naming what is missing for them.
    fn grids(&mut self, positions: &Port, vision: &Model, ids: &TokenIds<'_>) -> Result<(Grids, DataType)> {
        let of = |(_, input): &(ValueId, crate::runtime::Input)| input.kind() == InputKind::Image(IMAGE_GRID_THW);
        let grids = inputs_of("vision_encoder", vision)?.into_iter().find(of);
        let lacks = |what: &str| refused(positions, &format!("has three rows, and {what}"));
        let (_, grids) = grids.ok_or_else(|| lacks("the vision encoder reads no `image_grid_thw`"))?;
        let merge = ids.merge.ok_or_else(|| lacks("the config names no `spatial_merge_size`"))?;
        let image = ids.image.ok_or_else(|| lacks("the config names no image token"))?;
        let port = &grids.port;
        let grids = self.add(port.name.clone(), port, &port.shape, MergeInput::Picture(port.name.clone()));
        Ok((Grids { grids, image, merge }, port.dtype))
    }
}

fn sequence() -> [Dim; 2] {
    [Dim::Known(1), symbol("sequence")]
}

/// Token ids `[1, T]`, their embeddings `[1, T, D]`, the vision encoder's outputs and the pictures' grids -> the decoder's inputs for
/// the whole prompt, empty caches among them, under the decoder's own names. A prompt without image tokens ignores the features.
///
/// Errors: `Error::Unsupported` naming an input of the decoder that is not computed from these, or a component that the
/// model lacks.
pub(super) fn merge_embeddings(graphs: &Graphs<'_>, ids: &TokenIds<'_>) -> Result<Merge> {
    let decoder = DecoderPorts::of_decoder(graphs.decoder)?;
    let (Some(embedding), Some(vision)) = (graphs.embedding, graphs.vision) else {
        return Err(Error::unsupported("the model", "has no separate token embedding and vision encoder")
            .remedy("export it with `embed_tokens.onnx` and `vision_encoder.onnx`"));
    };
    if decoder.reads(InputKind::InputIds).is_some() {
        return Err(Error::unsupported(
            "the decoder",
            "embeds token ids itself, so features of pictures cannot be added",
        )
        .remedy("export the decoder with `inputs_embeds` and the embedding as a graph of its own"));
    }
    let own = EmbeddingPorts::of(embedding)?;
    let pictures = VisionPorts::of(vision)?;
    let mut joined = Joined::default();
    joined.model.ir_version = graphs.decoder.ir_version;
    let opset = graphs.decoder.opset_imports.get("").copied().unwrap_or(1);
    joined.model.opset_imports.insert(String::new(), opset);
    joined.model.producer_name = "interlace".into();
    joined.model.graph.body.name = "merge_embeddings".into();
    let input_ids = graph_input(&mut joined, INPUT_IDS, own.ids.1, &sequence());
    let mut inputs = Inputs { joined, sources: vec![(INPUT_IDS.to_string(), MergeInput::Ids)] };
    let main = &own.main.1;
    let values = inputs.of_embedding(main);
    let per_layer = own.per_layer.as_ref().filter(|_| decoder.reads(InputKind::PerLayerInputs).is_some());
    let per_layer = per_layer.map(|(_, port)| (inputs.of_embedding(port), port.dtype));
    let given = inputs.of_vision(&pictures);
    let three = decoder.reads(InputKind::PositionIds).filter(|port| port.rank() == 3);
    let grids = three.map(|positions| inputs.grids(positions, vision, ids)).transpose()?;
    let Inputs { mut joined, sources } = inputs;
    let mut scope = JoinScope::new(&mut joined);
    let input_ids = cast(&mut scope, input_ids, own.ids.1, DataType::Int64);
    let grids = grids.map(|(own, dtype)| Grids { grids: cast(&mut scope, own.grids, dtype, DataType::Int64), ..own });
    let rows = Rows { ids: input_ids, values, dtype: main.dtype, width: main.width() };
    let merged = at_image_tokens(&mut scope, &rows, &decoder, &pictures, ids.image, |_| Ok(given))?;
    let tokens = Tokens {
        ids: input_ids,
        in_prompt: true,
        image: ids.image,
        deepstack: Some(&merged.deepstack),
        per_layer,
        width: main.width(),
        types: ids.token_types,
    };
    let start = Carried::start(&mut scope, &decoder, &tokens, (Some(merged.values), grids), ids.head_dim)?;
    let first = scalar(&mut scope, "first", 0);
    let next = three.map(|_| positions::behind(&mut scope, start.positions, NEXT_POSITION));
    let given = fed(&mut scope, &decoder, &start, first, Some(main.dtype));
    let outputs = named(&mut scope, &decoder, &given, input_ids)?;
    let nodes = scope.nodes;
    let graph = &mut joined.model.graph;
    graph.body.nodes.extend(nodes);
    for (output, port) in outputs {
        if graph.name(output) != port.name {
            let problem = format!("has the name of another value, `{}`", port.name);
            return Err(Error::unsupported(format!("input {} of the decoder", port.described()), problem)
                .remedy("give it another name in the exporter"));
        }
        graph.values[output.index()].ty = Some(tensor(port.dtype, &port.shape));
        graph.body.outputs.push(output);
    }
    if let Some(next) = next {
        graph.values[next.index()].ty = Some(tensor(DataType::Int64, &[Dim::Known(1)]));
        graph.body.outputs.push(next);
    }
    crate::ir::check(&joined.model)?;
    Ok(Merge { model: joined.model, sources })
}

/// A value for each input of the decoder, under its name. `ids` are the prompt's.
///
/// Errors: `Error::Invalid` for an input without a value.
fn named<'a>(
    scope: &mut JoinScope<'_>,
    decoder: &'a DecoderPorts,
    given: &HashMap<ValueId, ValueId>,
    ids: ValueId,
) -> Result<Vec<(ValueId, &'a Port)>> {
    let value_of = |id: ValueId, port: &Port| {
        let value = given.get(&id).copied();
        value.ok_or_else(|| Error::invalid(format!("input {}", port.described()), "is not computed for a prompt"))
    };
    let mut outputs = Vec::new();
    for (id, input) in &decoder.inputs {
        // A value may be an input, or stand for two of the decoder's inputs.
        let value = value_of(*id, &input.port)?;
        outputs.push((scope.op(&input.port.name, "Identity", &[value], &[]), &input.port));
    }
    let (start, none) = (ints(scope, "first_row", &[0]), no_tokens(scope, ids));
    for (id, port, _) in &decoder.caches {
        let value = value_of(*id, port)?;
        let output = match grows(port) {
            true => {
                let axis = ints(scope, "rows", &[ROWS as i64]);
                scope.op(&port.name, "Slice", &[value, start, none, axis], &[])
            }
            false => scope.op(&port.name, "Identity", &[value], &[]),
        };
        outputs.push((output, port));
    }
    Ok(outputs)
}

/// The axis of a cache that has a row for each token.
const ROWS: usize = 2;

/// True for a cache that has a row for each token, and none before the first.
fn grows(port: &Port) -> bool {
    port.rank() == 4 && port.fixed_size(ROWS).is_none()
}

/// `[0]`, computed from the prompt. ONNX Runtime would infer that a cache cut at a constant 0 has the size 0; Triton knows no
/// such size, and its back end refuses another.
fn no_tokens(scope: &mut JoinScope<'_>, ids: ValueId) -> ValueId {
    let shape = scope.op("prompt_shape", "Shape", &[ids], &[]);
    let along = ints(scope, "time", &[1]);
    let tokens = scope.op("prompt_tokens", "Gather", &[shape, along], &[]);
    scope.op("no_tokens", "Sub", &[tokens, tokens], &[])
}
