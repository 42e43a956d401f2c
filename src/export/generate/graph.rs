//! Builds one graph that answers: vision encoder, embedding and merge once, then the decoder in a `Loop` whose carried
//! values are the cache.
//!
//! ```text
//! input_ids [1, T], pictures ─► embeddings ─► features at the image tokens
//!                                                │
//!              Loop(max_new_tokens): decoder ─► last logits ─► choice ─► token ─► embedding ─┐
//!                        ▲ embeddings, mask, position, cache ◄───────────────────────────────┘
//! generated_ids [N] ◄─ tokens without the end token
//! ```
//!
//! The first iteration reads the whole prompt with an empty cache, each later one the token before it, so that the
//! decoder's nodes are in the graph once.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, DataType, Dim, Model, Tensor, ValueId};
use crate::rewrite::{JoinScope, Joined, JoinedPart};
use crate::runtime::{InputKind, Port, TokenTypes};

use super::super::nodes::{any, cast, graph_input, ints, refused, scalar, symbol, tensor};
use super::embedding::Embedding;
use super::merge::{Rows, VisionPorts, at_image_tokens, padded};
use super::ports::{DecoderPorts, is_side};
use super::positions::{self, Grids, Pictures};
use super::pruned::kept_tokens;
use super::sampling::Sampling;
use super::sides::Tokens;

/// Prompt token ids, `[1, T]`.
pub const INPUT_IDS: &str = "input_ids";
/// Most tokens of the answer, a scalar.
pub const MAX_NEW_TOKENS: &str = "max_new_tokens";
/// Ids of the answer without the end token, `[N]`.
pub const GENERATED_IDS: &str = "generated_ids";

/// The graphs of a model.
pub struct Graphs<'a> {
    /// The decoder, with its head.
    pub decoder: &'a Model,
    /// Token ids to embeddings; `None` when the decoder embeds ids itself.
    pub embedding: Option<&'a Model>,
    /// Pictures to features; `None` for a text model.
    pub vision: Option<&'a Model>,
    /// Embeddings to the positions of the tokens that stay; `None` where all do.
    pub pruner: Option<&'a Model>,
}

/// Settings of the model's configs.
pub struct TokenIds<'a> {
    /// Placeholder of one row of image features.
    pub image: Option<i64>,
    /// Tokens that end an answer.
    pub end: &'a [i64],
    /// Width of a head, where the graph does not fix it.
    pub head_dim: Option<usize>,
    /// Side of the square of patches that makes one token, for positions in three rows.
    pub merge: Option<i64>,
    /// Meaning of `token_type_ids`.
    pub token_types: TokenTypes,
}

/// One graph from pictures and prompt to the ids of the answer: the likeliest tokens, or drawn ones where the request has a
/// temperature.
///
/// Errors: `Error::Unsupported` naming an input or output that the loop cannot compute.
pub fn generation_graph(graphs: &Graphs<'_>, ids: &TokenIds<'_>) -> Result<Model> {
    let decoder = DecoderPorts::of_decoder(graphs.decoder)?;
    let mut joined = Joined::default();
    let part = joined.part("decoder", graphs.decoder)?;
    let embedding = graphs.embedding.map(|model| Embedding::new(&mut joined, model)).transpose()?;
    let vision = graphs.vision.map(|model| Ok::<_, Error>((joined.part("vision", model)?, model))).transpose()?;
    let pruner = graphs.pruner.map(|model| Ok::<_, Error>((joined.part("token_pruner", model)?, model))).transpose()?;
    joined.model.producer_name = "interlace".into();
    joined.model.graph.body.name = "generate".into();

    let input_ids = graph_input(&mut joined, INPUT_IDS, DataType::Int64, &[Dim::Known(1), symbol("sequence")]);
    let limit = graph_input(&mut joined, MAX_NEW_TOKENS, DataType::Int64, &[]);
    let sampling = Sampling::inputs(&mut joined);
    let end = joined.constant("end_ids", Tensor::from_i64(&[ids.end.len() as u64], ids.end));
    let mut main = JoinScope::new(&mut joined);
    let (mut rows, mut grids, mut kept) = (None, None, None);
    let width = embedding.as_ref().and_then(|embedding| embedding.ports.main.1.width());
    let mut tokens = Tokens {
        ids: input_ids,
        in_prompt: true,
        image: ids.image.filter(|_| vision.is_some()),
        deepstack: None,
        per_layer: None,
        width,
        types: ids.token_types,
    };
    let mut features = Vec::new();
    if let Some(embedding) = &embedding {
        let own = embedding.embedded(&mut main, "prompt", input_ids)?;
        tokens.per_layer = embedding.second(own.per_layer);
        let rows_of_ids = Rows { ids: input_ids, values: own.rows, dtype: embedding.dtype(), width };
        rows = Some(match &vision {
            None => padded(&mut main, (own.rows, embedding.dtype()), input_ids, packed_columns(&decoder, width)?),
            Some((part, model)) => {
                let pictures = Pictures::inputs(&mut main, model)?;
                let three = decoder.reads(InputKind::PositionIds).filter(|port| port.rank() == 3);
                let of = (ids.image, ids.merge);
                grids = three.map(|port| pictures.grids(&mut main, port, of)).transpose()?;
                let outputs = |with: &mut JoinScope<'_>| with.inline(part, "vision_encoder", &pictures.bound);
                let ports = VisionPorts::of(model)?;
                let merged = at_image_tokens(&mut main, &rows_of_ids, &decoder, &ports, ids.image, outputs)?;
                let values = merged.values;
                features = merged.deepstack;
                if let (Some((part, model)), Some(image)) = (&pruner, ids.image) {
                    kept = Some(kept_tokens(&mut main, (part, model), image, &Rows { values, ..rows_of_ids })?);
                }
                values
            }
        });
    } else if vision.is_some() {
        return Err(Error::unsupported(
            "the decoder",
            "embeds token ids itself, so features of pictures cannot be added",
        )
        .remedy("export the decoder with `inputs_embeds` and the embedding as a graph of its own"));
    }
    tokens.deepstack = Some(&features);
    if ids.end.is_empty() {
        return Err(Error::unsupported("`generation_config.json`", "names no end token, so no answer would end")
            .remedy("add `eos_token_id`"));
    }
    let start = Carried::start(&mut main, &decoder, &tokens, (rows, grids), ids.head_dim)?;
    let start = match kept {
        Some(kept) => start.of_kept(&mut main, &decoder, kept)?,
        None => start,
    };
    let request = Request { limit, end, sampling, token_types: ids.token_types };
    let tokens = answer_loop(&mut main, &decoder, &part, embedding.as_ref(), &start, &request)?;
    let output = without_end(&mut main, tokens, (end, ids.end.len()));
    let nodes = main.nodes;
    let graph = &mut joined.model.graph;
    graph.values[output.index()].name = GENERATED_IDS.into();
    graph.values[output.index()].ty = Some(tensor(DataType::Int64, &[symbol("answer")]));
    graph.body.nodes.extend(nodes);
    graph.body.outputs.push(output);
    crate::ir::check(&joined.model)?;
    Ok(joined.model)
}

/// Columns of DeepStack features behind embeddings of this width.
fn packed_columns(decoder: &DecoderPorts, width: Option<usize>) -> Result<usize> {
    Ok(decoder.packed_levels(width)? * width.unwrap_or(0))
}

/// The loop's state before an iteration, in a fixed order: ids or embeddings, mask, position, side inputs, caches.
pub(in crate::export) struct Carried {
    ids: Option<ValueId>,
    rows: Option<ValueId>,
    /// `[1, past + T]` of int64.
    mask: ValueId,
    /// `[1, T]` or `[3, 1, T]` of int64.
    pub(in crate::export) positions: ValueId,
    /// The decoder's side inputs, in their order and types.
    sides: Vec<ValueId>,
    pub(in crate::export) caches: Vec<ValueId>,
}

impl Carried {
    /// The whole prompt with an empty cache. `grids` are those of the pictures, for positions in three rows.
    pub(in crate::export) fn start(
        scope: &mut JoinScope<'_>,
        decoder: &DecoderPorts,
        tokens: &Tokens<'_>,
        (rows, grids): (Option<ValueId>, Option<Grids>),
        head_dim: Option<usize>,
    ) -> Result<Self> {
        let input_ids = tokens.ids;
        let shape = scope.op("prompt_shape", "Shape", &[input_ids], &[]);
        let one = Tensor::from_i64(&[1], &[1]);
        let mask = scope.op("mask", "ConstantOfShape", &[shape], &[("value", AttributeKind::Tensor(one))]);
        let positions = match (decoder.reads(InputKind::PositionIds), &grids) {
            (Some(port), None) if port.rank() == 3 => {
                return Err(refused(port, "has three rows, which are not computed without pictures' grids"));
            }
            (Some(port), Some(grids)) if port.rank() == 3 => positions::three_rows(scope, input_ids, grids),
            _ => positions::counted(scope, shape),
        };
        let mut caches = Vec::new();
        for (_, port, _) in &decoder.caches {
            let shape = empty_shape(port, head_dim)?;
            let shape = ints(scope, "empty_cache", &shape);
            let bytes = vec![0; port.dtype.byte_len(1).unwrap_or(8) as usize];
            let value = Tensor::from_bytes(port.dtype, &[1], bytes);
            caches.push(scope.op("cache", "ConstantOfShape", &[shape], &[("value", AttributeKind::Tensor(value))]));
        }
        let reads_ids = decoder.reads(InputKind::InputIds).is_some();
        if decoder.reads(InputKind::InputsEmbeds).is_some() && rows.is_none() {
            return Err(Error::unsupported("the model", "has no token embedding as a graph of its own")
                .remedy("add it to the model's folder as `embed_tokens.onnx`"));
        }
        let rows = rows.filter(|_| decoder.reads(InputKind::InputsEmbeds).is_some());
        let sides = tokens.sides(scope, decoder)?;
        Ok(Carried { ids: reads_ids.then_some(input_ids), rows, mask, positions, sides, caches })
    }

    /// The tokens of the prompt at these positions, each with its place in the whole prompt.
    ///
    /// Errors: `Error::Unsupported` for DeepStack features of the image tokens alone.
    fn of_kept(self, scope: &mut JoinScope<'_>, decoder: &DecoderPorts, kept: ValueId) -> Result<Self> {
        let mut of = |value: ValueId, axis: i64| {
            scope.op("kept", "Gather", &[value, kept], &[("axis", AttributeKind::Int(axis))])
        };
        let mut sides = Vec::new();
        for (input, value) in decoder.sides().zip(self.sides) {
            if input.kind() == InputKind::Deepstack && !input.is_by_token() {
                return Err(refused(&input.port, "has rows of image tokens alone, some of which are left out"));
            }
            sides.push(of(value, 1 + i64::from(input.is_stacked())));
        }
        Ok(Carried {
            ids: self.ids.map(|ids| of(ids, 1)),
            rows: self.rows.map(|rows| of(rows, 1)),
            mask: of(self.mask, 1),
            positions: of(self.positions, -1),
            sides,
            caches: self.caches,
        })
    }

    /// All values in order.
    fn values(&self) -> Vec<ValueId> {
        let first = self.ids.iter().chain(&self.rows).copied();
        let state = first.chain([self.mask, self.positions]).chain(self.sides.iter().copied());
        state.chain(self.caches.iter().copied()).collect()
    }

    /// The body's inputs for this state.
    fn inside(&self, joined: &mut Joined, decoder: &DecoderPorts, rows: DataType) -> Carried {
        let mut input = |name: &str, dtype: DataType, rank: usize| {
            let id = joined.value(name);
            joined.model.graph.values[id.index()].ty = Some(tensor(dtype, &vec![Dim::Unknown; rank]));
            id
        };
        Carried {
            ids: self.ids.map(|_| input("step_ids", DataType::Int64, 2)),
            rows: self.rows.map(|_| input("step_embeds", rows, 3)),
            mask: input("step_mask", DataType::Int64, 2),
            positions: input("step_positions", DataType::Int64, decoder.position_rank()),
            sides: decoder.sides().map(|side| input("step_side", side.port.dtype, side.port.rank())).collect(),
            caches: decoder.caches.iter().map(|(_, port, _)| input("step_past", port.dtype, port.rank())).collect(),
        }
    }
}

/// The shape of a cache before the first token, for a batch of one.
fn empty_shape(port: &Port, head_dim: Option<usize>) -> Result<Vec<i64>> {
    let size = |axis: usize| match (axis, port.fixed_size(axis)) {
        (0, None | Some(1)) => Some(1),
        (0, Some(_)) => None,
        (_, Some(size)) => Some(size as i64),
        (2, None) if port.rank() == 4 => Some(0),
        (3, None) if port.rank() == 4 => head_dim.map(|size| size as i64),
        _ => None,
    };
    let shape: Option<Vec<i64>> = (0..port.rank()).map(size).collect();
    shape.ok_or_else(|| refused(port, "has no fixed number of heads, head size, or batch of one"))
}

/// What one request asks for.
struct Request {
    /// Most tokens of the answer.
    limit: ValueId,
    /// `[E]` tokens that end an answer.
    end: ValueId,
    sampling: Sampling,
    token_types: TokenTypes,
}

/// Runs the decoder until it gives an end token or the most tokens; `[N, 1]` tokens.
fn answer_loop(
    scope: &mut JoinScope<'_>,
    decoder: &DecoderPorts,
    part: &JoinedPart<'_>,
    embedding: Option<&Embedding<'_>>,
    start: &Carried,
    request: &Request,
) -> Result<ValueId> {
    let begun = scope.joined.constant("begun", Tensor::from_bytes(DataType::Bool, &[], vec![1u8]));
    let here = start.inside(scope.joined, decoder, embedding.map_or(DataType::Float, Embedding::dtype));
    let (iteration, condition) = (scope.joined.value("iteration"), scope.joined.value("condition"));
    for (id, dtype) in [(iteration, DataType::Int64), (condition, DataType::Bool)] {
        scope.joined.model.graph.values[id.index()].ty = Some(tensor(dtype, &[]));
    }
    let mut body = JoinScope::new(&mut *scope.joined);
    let embeds = embedding.map(Embedding::dtype);
    let bound = fed(&mut body, decoder, &here, iteration, embeds);
    let outputs = body.inline(part, "step", &bound)?;
    let logits = (outputs[decoder.logits], decoder.logits_type);
    let (token, goes_on) = chosen(&mut body, logits, request, iteration);
    let answer = flat(&mut body, token);
    let width = embedding.and_then(|embedding| embedding.ports.main.1.width());
    let embedded = match (embedding, here.rows) {
        (Some(embedding), Some(_)) => Some((embedding, embedding.embedded(&mut body, "step", token)?)),
        _ => None,
    };
    let columns = packed_columns(decoder, width)?;
    let rows =
        embedded.as_ref().map(|(embedding, own)| padded(&mut body, (own.rows, embedding.dtype()), token, columns));
    let per_layer = embedded.as_ref().and_then(|(embedding, own)| embedding.second(own.per_layer));
    let types = request.token_types;
    let next = Tokens { ids: token, in_prompt: false, image: None, deepstack: None, per_layer, width, types };
    let sides = next.sides(&mut body, decoder)?;
    let ones = body.joined.constant("ones", Tensor::from_i64(&[1, 1], &[1]));
    let along_time = [("axis", AttributeKind::Int(1))];
    let next = Carried {
        ids: here.ids.map(|_| token),
        rows,
        mask: body.op("next_mask", "Concat", &[here.mask, ones], &along_time),
        positions: positions::next(&mut body, here.positions, decoder.position_rank()),
        sides,
        caches: decoder.caches.iter().map(|(_, _, present)| outputs[*present]).collect(),
    };
    let nodes = body.nodes;
    let inputs = [vec![iteration, condition], here.values()].concat();
    let outputs = [vec![goes_on], next.values(), vec![answer]].concat();
    let body = Body { name: "decode".into(), inputs, outputs, nodes, ..Body::default() };
    let mut after: Vec<ValueId> = start.values().iter().map(|_| scope.joined.value("after")).collect();
    let tokens = scope.joined.value("tokens");
    after.push(tokens);
    let given = [vec![request.limit, begun], start.values()].concat();
    scope.control("Loop", &given, &after, vec![("body", body)]);
    Ok(tokens)
}

/// Values for the decoder's inputs other than caches in one iteration, and its caches.
pub(in crate::export) fn fed(
    body: &mut JoinScope<'_>,
    decoder: &DecoderPorts,
    here: &Carried,
    iteration: ValueId,
    embeds: Option<DataType>,
) -> HashMap<ValueId, ValueId> {
    let mut bound = HashMap::new();
    let sides = decoder.inputs.iter().filter(|(_, input)| is_side(input.kind()));
    bound.extend(sides.zip(&here.sides).map(|((id, _), &value)| (*id, value)));
    for (id, input) in decoder.inputs.iter().filter(|(_, input)| !is_side(input.kind())) {
        let (dtype, rank) = (input.port.dtype, input.port.rank());
        let (value, from) = match input.kind() {
            InputKind::InputsEmbeds => (here.rows.unwrap_or(here.mask), embeds.unwrap_or(dtype)),
            InputKind::InputIds => (here.ids.unwrap_or(here.mask), DataType::Int64),
            InputKind::AttentionMask => (here.mask, DataType::Int64),
            InputKind::PositionIds => (here.positions, DataType::Int64),
            InputKind::CachePosition => (flat(body, here.positions), DataType::Int64),
            InputKind::LogitsToKeep => {
                let one = ints(body, "one_position", &[1]);
                (of_rank(body, one, rank), DataType::Int64)
            }
            _ => {
                let zero = scalar(body, "zero", 0);
                let later = body.op("later", "Greater", &[iteration, zero], &[]);
                (of_rank(body, later, rank), DataType::Bool)
            }
        };
        bound.insert(*id, cast(body, value, from, dtype));
    }
    bound.extend(decoder.caches.iter().zip(&here.caches).map(|((id, ..), &past)| (*id, past)));
    bound
}

/// The token behind the last position, `[1, 1]`, and whether it is no end token.
fn chosen(
    body: &mut JoinScope<'_>,
    (logits, dtype): (ValueId, DataType),
    request: &Request,
    iteration: ValueId,
) -> (ValueId, ValueId) {
    let (last, cell) = (ints(body, "last", &[-1]), ints(body, "cell", &[1, 1]));
    let logits = body.op("last_logits", "Gather", &[logits, last], &[("axis", AttributeKind::Int(1))]);
    let logits = cast(body, logits, dtype, DataType::Float);
    let token = request.sampling.token(body, logits, iteration);
    let token = body.op("token_cell", "Reshape", &[token, cell], &[]);
    let is_end = body.op("is_end", "Equal", &[token, request.end], &[]);
    let ended = any(body, is_end);
    (token, body.op("goes_on", "Not", &[ended], &[]))
}

/// All elements along one axis.
fn flat(scope: &mut JoinScope<'_>, value: ValueId) -> ValueId {
    let shape = ints(scope, "flat", &[-1]);
    scope.op("flat", "Reshape", &[value, shape], &[])
}

/// One element with as many axes as `rank`.
fn of_rank(scope: &mut JoinScope<'_>, value: ValueId, rank: usize) -> ValueId {
    let shape = ints(scope, "shape", &vec![1; rank]);
    scope.op("shaped", "Reshape", &[value, shape], &[])
}

/// The tokens but the end token, `[N]`.
fn without_end(scope: &mut JoinScope<'_>, tokens: ValueId, end: (ValueId, usize)) -> ValueId {
    let (end, count) = end;
    let is_end = scope.op("ends", "Equal", &[tokens, end], &[]);
    let is_end = cast(scope, is_end, DataType::Bool, DataType::Float);
    let ones = scope.joined.constant("sum", Tensor::from_f32(&[count as u64, 1], &vec![1.0; count]));
    let matches = scope.op("matches", "MatMul", &[is_end, ones], &[]);
    let half = scope.joined.constant("half", Tensor::from_f32(&[], &[0.5]));
    let is_answer = scope.op("is_answer", "Less", &[matches, half], &[]);
    let (is_answer, tokens) = (flat(scope, is_answer), flat(scope, tokens));
    scope.op(GENERATED_IDS, "Compress", &[tokens, is_answer], &[("axis", AttributeKind::Int(0))])
}
