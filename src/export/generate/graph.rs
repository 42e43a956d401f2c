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

use crate::analysis;
use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, DataType, Dim, Model, Tensor, ValueId};
use crate::rewrite::{JoinScope, Joined, JoinedPart};
use crate::runtime::{Input, InputKind, Port};

use super::super::nodes::{
    any, cast, graph_input, inputs_of, ints, only_output, refused, scalar, symbol, tensor, with_rows_at,
};
use super::positions::{self, Grids, Pictures};
use super::pruned::kept_tokens;
use super::sampling::Sampling;

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
    if let Some(embedding) = &embedding {
        let own = embedding.rows(&mut main, "prompt", input_ids)?;
        rows = Some(match &vision {
            None => own,
            Some((part, model)) => {
                let rows = Rows {
                    ids: input_ids,
                    values: own,
                    dtype: embedding.output.dtype,
                    width: embedding.output.width(),
                };
                let pictures = Pictures::inputs(&mut main, model)?;
                let three = decoder.reads(InputKind::PositionIds).filter(|port| port.rank() == 3);
                let of = (ids.image, ids.merge);
                grids = three.map(|port| pictures.grids(&mut main, port, of)).transpose()?;
                let values = with_features(&mut main, (part, model), &pictures, ids.image, &rows)?;
                if let (Some((part, model)), Some(image)) = (&pruner, ids.image) {
                    kept = Some(kept_tokens(&mut main, (part, model), image, &Rows { values, ..rows })?);
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
    if ids.end.is_empty() {
        return Err(Error::unsupported("`generation_config.json`", "names no end token, so no answer would end")
            .remedy("add `eos_token_id`"));
    }
    let start = Carried::start(&mut main, &decoder, input_ids, (rows, grids), ids.head_dim)?;
    let start = match kept {
        Some(kept) => start.of_kept(&mut main, kept),
        None => start,
    };
    let tokens =
        answer_loop(&mut main, &decoder, &part, embedding.as_ref(), &start, &Request { limit, end, sampling })?;
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

/// The decoder's inputs and outputs.
pub(in crate::export) struct DecoderPorts {
    pub(in crate::export) inputs: Vec<(ValueId, Input)>,
    /// Cache inputs with the positions of their outputs in the graph's signature.
    pub(in crate::export) caches: Vec<(ValueId, Port, usize)>,
    /// Position of the logits in the graph's outputs.
    logits: usize,
    /// Element type of the logits.
    pub(in crate::export) logits_type: DataType,
}

impl DecoderPorts {
    /// Errors: `Error::Unsupported` for an input that the loop cannot compute, or without a cache.
    pub(in crate::export) fn of_decoder(model: &Model) -> Result<Self> {
        let graph = &model.graph;
        let analysis = analysis::analyse(model)?;
        let name = |id: ValueId| analysis.model.graph.name(id).to_string();
        let pairs = analysis.map.layers.iter().flat_map(|layer| &layer.ports);
        let pairs: HashMap<String, String> =
            pairs.filter_map(|port| Some((name(port.past?), name(port.present?)))).collect();
        let place = |name: &str| graph.body.outputs.iter().position(|&id| graph.name(id) == name);
        let mut caches = Vec::new();
        let mut inputs = Vec::new();
        for (id, input) in inputs_of("decoder", model)? {
            match input.kind() {
                InputKind::InputsEmbeds
                | InputKind::InputIds
                | InputKind::AttentionMask
                | InputKind::CachePosition
                | InputKind::UseCacheBranch
                | InputKind::LogitsToKeep => inputs.push((id, input)),
                InputKind::PositionIds if input.port.rank() == 2 => inputs.push((id, input)),
                InputKind::PositionIds
                    if input.port.rank() == 3 && input.port.fixed_size(0).is_none_or(|rows| rows == 3) =>
                {
                    inputs.push((id, input));
                }
                InputKind::Past => {
                    let present = pairs.get(graph.name(id)).and_then(|present| place(present));
                    let present = present.ok_or_else(|| refused(&input.port, "has no output that continues it"))?;
                    caches.push((id, input.port, present));
                }
                _ => return Err(refused(&input.port, "is not computed inside a loop")),
            }
        }
        let of = |kind: InputKind| inputs.iter().map(|(_, input)| input).find(|input| input.kind() == kind);
        if let (Some(rows), Some(columns)) = (of(InputKind::PositionIds), of(InputKind::CachePosition))
            && rows.port.rank() == 3
        {
            return Err(refused(&columns.port, "is not computed beside positions in three rows"));
        }
        if caches.is_empty() {
            return Err(Error::unsupported("the decoder", "has no cache inputs, so a loop cannot continue a prompt")
                .remedy("export the decoder with its cache"));
        }
        let logits = place("logits").ok_or_else(|| {
            Error::unsupported("the decoder", "has no output `logits`").remedy("name its output of logits `logits`")
        })?;
        let logits_type = Port::of_value(graph, graph.body.outputs[logits]).map_or(DataType::Float, |port| port.dtype);
        Ok(DecoderPorts { inputs, caches, logits, logits_type })
    }

    /// Axes of the positions: 3 for three rows.
    pub(in crate::export) fn position_rank(&self) -> usize {
        self.reads(InputKind::PositionIds).map_or(2, Port::rank)
    }

    pub(in crate::export) fn reads(&self, kind: InputKind) -> Option<&Port> {
        self.inputs.iter().find(|(_, input)| input.kind() == kind).map(|(_, input)| &input.port)
    }
}

/// The token embedding.
struct Embedding<'a> {
    part: JoinedPart<'a>,
    input: (ValueId, DataType),
    /// The embeddings.
    output: Port,
}

impl<'a> Embedding<'a> {
    fn new(joined: &mut Joined, model: &'a Model) -> Result<Self> {
        let inputs = inputs_of("embed_tokens", model)?;
        let ids = match &inputs[..] {
            [(id, input)] if input.kind() == InputKind::InputIds => (*id, input.port.dtype),
            _ => {
                let names: Vec<&str> = inputs.iter().map(|(_, input)| input.port.name.as_str()).collect();
                let problem = format!("reads {}, expected `input_ids` alone", names.join(", "));
                return Err(
                    Error::unsupported("the token embedding", problem).remedy("use the components of another target")
                );
            }
        };
        let output = only_output("the token embedding", model)?;
        Ok(Embedding { part: joined.part("embedding", model)?, input: ids, output })
    }

    /// `[1, T, D]` embeddings of `[1, T]` ids.
    fn rows(&self, scope: &mut JoinScope<'_>, copy: &str, ids: ValueId) -> Result<ValueId> {
        let ids = cast(scope, ids, DataType::Int64, self.input.1);
        let outputs = scope.inline(&self.part, &format!("embedding_{copy}"), &HashMap::from([(self.input.0, ids)]))?;
        Ok(outputs[0])
    }
}

/// The embeddings of a prompt.
pub(in crate::export) struct Rows {
    /// `[1, T]` token ids.
    pub ids: ValueId,
    /// `[1, T, D]` embeddings.
    pub values: ValueId,
    pub dtype: DataType,
    /// `D`, where the graph fixes it.
    pub width: Option<usize>,
}

/// The embeddings with the features of the pictures at the image tokens. Without image tokens the vision encoder does
/// not run.
fn with_features(
    scope: &mut JoinScope<'_>,
    (part, model): (&JoinedPart<'_>, &Model),
    pictures: &Pictures,
    image: Option<i64>,
    rows: &Rows,
) -> Result<ValueId> {
    let image = image.ok_or_else(|| {
        Error::invalid("`config.json`", "names no image token").remedy("add `image_token_id` to `config.json`")
    })?;
    let output = only_output("the vision encoder", model)?;
    let width = output.width().or(rows.width).ok_or_else(|| {
        Error::unsupported("the vision encoder", "does not declare the width of its features")
            .remedy("export it with a fixed width")
    })?;
    let features =
        |with: &mut JoinScope<'_>| Ok((with.inline(part, "vision_encoder", &pictures.bound)?[0], output.dtype));
    at_image_tokens(scope, rows, (image, width), features)
}

/// The embeddings with features `[.., width]` at the image tokens, and unchanged without image tokens, where the nodes of
/// `features` do not run.
pub(in crate::export) fn at_image_tokens(
    scope: &mut JoinScope<'_>,
    rows: &Rows,
    (image, width): (i64, usize),
    features: impl FnOnce(&mut JoinScope<'_>) -> Result<(ValueId, DataType)>,
) -> Result<ValueId> {
    let image = scalar(scope, "image_id", image);
    let is_image = scope.op("is_image", "Equal", &[rows.ids, image], &[]);
    let pictured = any(scope, is_image);
    let shape = ints(scope, "rows_of_features", &[-1, width as i64]);

    let mut with = JoinScope::new(&mut *scope.joined);
    let (features, dtype) = features(&mut with)?;
    let features = with.op("features", "Reshape", &[features, shape], &[]);
    let features = cast(&mut with, features, dtype, rows.dtype);
    let merged = with_rows_at(&mut with, rows.values, is_image, features);
    let with = Body { name: "with_pictures".into(), nodes: with.nodes, outputs: vec![merged], ..Body::default() };
    let mut without = JoinScope::new(&mut *scope.joined);
    let same = without.op("text", "Identity", &[rows.values], &[]);
    let without = Body { name: "text_only".into(), nodes: without.nodes, outputs: vec![same], ..Body::default() };
    let embedded = scope.joined.value("embedded");
    scope.control("If", &[pictured], &[embedded], vec![("then_branch", with), ("else_branch", without)]);
    Ok(embedded)
}

/// The loop's state before an iteration, in a fixed order: ids or embeddings, mask, position, caches.
pub(in crate::export) struct Carried {
    ids: Option<ValueId>,
    rows: Option<ValueId>,
    /// `[1, past + T]` of int64.
    mask: ValueId,
    /// `[1, T]` or `[3, 1, T]` of int64.
    positions: ValueId,
    pub(in crate::export) caches: Vec<ValueId>,
}

impl Carried {
    /// The whole prompt with an empty cache. `grids` are those of the pictures, for positions in three rows.
    pub(in crate::export) fn start(
        scope: &mut JoinScope<'_>,
        decoder: &DecoderPorts,
        input_ids: ValueId,
        (rows, grids): (Option<ValueId>, Option<Grids>),
        head_dim: Option<usize>,
    ) -> Result<Self> {
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
        Ok(Carried { ids: reads_ids.then_some(input_ids), rows, mask, positions, caches })
    }

    /// The tokens of the prompt at these positions, each with its place in the whole prompt.
    fn of_kept(self, scope: &mut JoinScope<'_>, kept: ValueId) -> Self {
        let mut of = |value: ValueId, axis: i64| {
            scope.op("kept", "Gather", &[value, kept], &[("axis", AttributeKind::Int(axis))])
        };
        Carried {
            ids: self.ids.map(|ids| of(ids, 1)),
            rows: self.rows.map(|rows| of(rows, 1)),
            mask: of(self.mask, 1),
            positions: of(self.positions, -1),
            caches: self.caches,
        }
    }

    /// All values in order.
    fn values(&self) -> Vec<ValueId> {
        let first = self.ids.iter().chain(&self.rows).copied();
        first.chain([self.mask, self.positions]).chain(self.caches.iter().copied()).collect()
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
    let here =
        start.inside(scope.joined, decoder, embedding.map_or(DataType::Float, |embedding| embedding.output.dtype));
    let (iteration, condition) = (scope.joined.value("iteration"), scope.joined.value("condition"));
    for (id, dtype) in [(iteration, DataType::Int64), (condition, DataType::Bool)] {
        scope.joined.model.graph.values[id.index()].ty = Some(tensor(dtype, &[]));
    }
    let mut body = JoinScope::new(&mut *scope.joined);
    let embeds = embedding.map(|embedding| embedding.output.dtype);
    let bound = fed(&mut body, decoder, &here, iteration, embeds);
    let outputs = body.inline(part, "step", &bound)?;
    let logits = (outputs[decoder.logits], decoder.logits_type);
    let (token, goes_on) = chosen(&mut body, logits, request, iteration);
    let answer = flat(&mut body, token);
    let rows = match (embedding, here.rows) {
        (Some(embedding), Some(_)) => Some(embedding.rows(&mut body, "step", token)?),
        _ => None,
    };
    let ones = body.joined.constant("ones", Tensor::from_i64(&[1, 1], &[1]));
    let along_time = [("axis", AttributeKind::Int(1))];
    let next = Carried {
        ids: here.ids.map(|_| token),
        rows,
        mask: body.op("next_mask", "Concat", &[here.mask, ones], &along_time),
        positions: positions::next(&mut body, here.positions, decoder.position_rank()),
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
    for (id, input) in &decoder.inputs {
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
