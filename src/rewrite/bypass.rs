//! A decoder with inputs that switch layers off and with the losses of selected tokens as output.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Analysis, Layer, LayerMap, head_input};
use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, DataType, Dim, GraphIndex, Model, Tensor, Value, ValueId, ValueType};

use super::build::{Builder, operator};
use super::removal::check_replaceable;
use super::tidy;

/// bool `[L]`: false skips a layer; none of its nodes runs.
pub const KEEP_INPUT: &str = "interlace.keep";
/// int64 `[1, N, 2]`: batch row and position of each selected row of the logits.
pub const ROWS_INPUT: &str = "interlace.rows";
/// int64 `[1, N, 1]`: the target token of each selected row.
pub const TARGETS_INPUT: &str = "interlace.targets";
/// float32 `[1, N, 1]`: cross-entropy of each row in nats.
pub const LOSS_OUTPUT: &str = "interlace.loss";
/// bool `[1]`: true reads the stream before the first layer from [`STREAM_INPUT`] instead of
/// computing it from the tokens.
pub const RESTART_INPUT: &str = "interlace.restart";
/// `[B, T, D]`: read when [`RESTART_INPUT`] is true; otherwise empty.
pub const STREAM_INPUT: &str = "interlace.stream";
/// Prefix of the outputs with the stream: this and `i` name the stream before layer `i`.
pub const STREAM_OUTPUT_PREFIX: &str = "interlace.stream_";

/// bool `[L]`, in graphs of [`bypass_layers_mapped`]: true where a layer's map is read.
pub const MAPPED_INPUT: &str = "interlace.mapped";
/// Prefix of the inputs with a layer's map, float32 `[D, D]`: what the layer's last block adds to the stream, or the stream
/// after the layer, times the map, is added to that stream. Empty where it is not read.
pub const MAP_INPUT_PREFIX: &str = "interlace.map_";
/// Prefix of the outputs with the stream after layer `i`, its map applied.
pub const BEHIND_OUTPUT_PREFIX: &str = "interlace.behind_";
/// Prefix of the float32 outputs with what the map of layer `i` multiplies.
pub const ADDED_OUTPUT_PREFIX: &str = "interlace.added_";

/// What a layer's map multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOf {
    /// What the layer's last block adds to the stream.
    Added,
    /// The stream after the layer.
    Stream,
}

/// Result of [`bypass_layers`].
#[derive(Clone, Debug)]
pub struct Bypass {
    /// The rewritten decoder.
    pub model: Model,
    /// True when a run can begin at a later layer. The caller passes the stream before layer `i` and switches the
    /// layers before `i` off; the run then continues as if they had run. This is impossible when the stream changes
    /// between layers (features added from outside) or when a layer reads a value computed inside an earlier layer.
    pub restarts: bool,
}

/// Puts each layer inside an `If` of its own and makes the losses of selected tokens an output.
/// Cache outputs are removed.
///
/// Errors: `Error::Unsupported` below opset 11, or when a layer's input and output have different types.
pub fn bypass_layers(analysis: &Analysis) -> Result<Bypass> {
    bypass(analysis, None)
}

/// [`bypass_layers`], with a linear map behind each layer ([`MAP_INPUT_PREFIX`]), and with outputs that show the stream around every layer: [`STREAM_OUTPUT_PREFIX`], [`BEHIND_OUTPUT_PREFIX`],
/// [`ADDED_OUTPUT_PREFIX`].
///
/// Errors: as `bypass_layers`.
pub fn bypass_layers_mapped(analysis: &Analysis, of: MapOf) -> Result<Bypass> {
    bypass(analysis, Some(of))
}

fn bypass(analysis: &Analysis, mapped: Option<MapOf>) -> Result<Bypass> {
    let mut model = analysis.model.clone();
    let map = &analysis.map;
    let mut build = Builder::new(&mut model, "bypass");
    if build.opset() < 11 {
        return Err(Error::unsupported(format!("opset {}", build.opset()), "has no GatherND and GatherElements")
            .remedy("convert the model to opset 11 or newer"));
    }
    let layers = map.layers.len();
    let keep = build.input(KEEP_INPUT, tensor_type(DataType::Bool, vec![Dim::Known(layers as i64)]));
    let mapped =
        mapped.map(|of| (of, build.input(MAPPED_INPUT, tensor_type(DataType::Bool, vec![Dim::Known(layers as i64)]))));
    let mut replacements = HashMap::new();
    let mut outputs = Vec::new();
    for layer in &map.layers {
        let flags = Flags::of(&mut build, layer.index, keep, mapped);
        let (output, added) = optional_layer(&mut build, map, layer, &flags)?;
        replacements.insert(layer.output, output);
        if let Some(added) = added {
            build.model.graph.values[added.index()].name = format!("{ADDED_OUTPUT_PREFIX}{}", layer.index);
            outputs.extend([added, named_output(&mut build, output, format!("{BEHIND_OUTPUT_PREFIX}{}", layer.index))]);
        }
    }
    tidy::replace_uses(&mut build.model.graph.body, &replacements);
    let restarts = restart(&mut build, map);
    let logits = chosen_logits(&mut build, map.result);
    let loss = cross_entropy(&mut build, logits);
    outputs.insert(0, loss);
    if restarts || mapped.is_some() {
        for layer in map.layers.iter().skip(1) {
            let stream = replacements.get(&layer.input).copied().unwrap_or(layer.input);
            outputs.push(named_output(&mut build, stream, format!("{STREAM_OUTPUT_PREFIX}{}", layer.index)));
        }
    }
    model.graph.body.outputs = outputs;
    tidy::remove_dead_code(&mut model.graph.body);
    tidy::finish(&mut model)?;
    Ok(Bypass { model, restarts })
}

fn tensor_type(dtype: DataType, shape: Vec<Dim>) -> ValueType {
    ValueType::Tensor { dtype, shape: Some(shape) }
}

/// A copy of a stream as an output.
fn named_output(build: &mut Builder, stream: ValueId, name: String) -> ValueId {
    let output = build.node("Identity", &[stream], &[]);
    let ty = build.model.graph.value(stream).ty.clone();
    let value = &mut build.model.graph.values[output.index()];
    (value.name, value.ty) = (name, ty);
    output
}

/// One layer's flags, scalars, and the input with its map.
struct Flags {
    keep: ValueId,
    mapped: Option<Mapped>,
}

/// The flag and the input of a layer's map.
#[derive(Clone, Copy)]
struct Mapped {
    of: MapOf,
    flag: ValueId,
    map: ValueId,
}

impl Flags {
    fn of(build: &mut Builder, layer: usize, keep: ValueId, mapped: Option<(MapOf, ValueId)>) -> Self {
        let index = build.constant(&format!("layer_{layer}"), Tensor::from_i64(&[], &[layer as i64]));
        let mut flag = |flags: ValueId| build.node("Gather", &[flags, index], &[("axis", AttributeKind::Int(0))]);
        let (keep, mapped) = (flag(keep), mapped.map(|(of, flags)| (of, flag(flags))));
        let square = tensor_type(DataType::Float, vec![Dim::Unknown, Dim::Unknown]);
        let mapped = mapped.map(|(of, flag)| {
            let map = build.input(&format!("{MAP_INPUT_PREFIX}{layer}"), square);
            Mapped { of, flag, map }
        });
        Flags { keep, mapped }
    }
}

/// Adds `If(keep[i], layer, carried)`. Values of the layer that other nodes read are also computed outside the `If`. The
/// second result is what its last block adds, where the layer has a map.
fn optional_layer(
    build: &mut Builder,
    map: &LayerMap,
    layer: &Layer,
    flags: &Flags,
) -> Result<(ValueId, Option<ValueId>)> {
    check_replaceable(&build.model.graph, layer, layer.output)?;
    let ty = build.model.graph.value(layer.output).ty.clone();
    let (then_body, else_body) = (layer_body(build, map, layer, flags.mapped), carry_body(build, layer, flags.mapped));
    let branches = [("then_branch", AttributeKind::Graph(then_body)), ("else_branch", AttributeKind::Graph(else_body))];
    let output = build.node("If", &[flags.keep], &branches);
    build.model.graph.values[output.index()].ty = ty;
    let added = flags.mapped.map(|_| {
        let added = build.value();
        let unknown = vec![Dim::Unknown, Dim::Unknown, Dim::Unknown];
        build.model.graph.values[added.index()].ty = Some(tensor_type(DataType::Float, unknown));
        added
    });
    if let Some(node) = build.model.graph.body.nodes.last_mut() {
        node.outputs.extend(added.map(Some));
    }
    Ok((output, added))
}

fn carry_body(build: &mut Builder, layer: &Layer, mapped: Option<Mapped>) -> Body {
    let output = build.value();
    let mut body = Body { name: format!("without_layer_{}", layer.index), outputs: vec![output], ..Body::default() };
    body.nodes.push(operator("Identity", &[layer.carried], output, &[]));
    if mapped.is_some() {
        // Read by nobody.
        let added = inner(build, &mut body, "Cast", &[layer.carried], &[to_float()]);
        body.outputs.push(added);
    }
    body
}

fn to_float() -> (&'static str, AttributeKind) {
    ("to", AttributeKind::Int(DataType::Float as i64))
}

/// Adds a node to a body inside the graph.
fn inner(
    build: &mut Builder,
    body: &mut Body,
    op_type: &str,
    inputs: &[ValueId],
    attributes: &[(&str, AttributeKind)],
) -> ValueId {
    let output = build.value();
    body.nodes.push(operator(op_type, inputs, output, attributes));
    output
}

/// Adds the map behind a layer: with `y` its output and `a` what is multiplied, `y` itself or what its last block adds to the
/// stream, the body gives `y + a map` where the map is read, and `a`.
fn with_map(build: &mut Builder, body: &mut Body, layer: &Layer, Mapped { of, flag, map }: Mapped) {
    let dtype = build.model.graph.value(layer.output).ty.as_ref().and_then(ValueType::dtype).unwrap_or(DataType::Float);
    let output = inner(build, body, "Cast", &[layer.output], &[to_float()]);
    let added = match of {
        MapOf::Stream => inner(build, body, "Identity", &[output], &[]),
        MapOf::Added => {
            let before = inner(build, body, "Cast", &[layer.last_block], &[to_float()]);
            inner(build, body, "Sub", &[output, before], &[])
        }
    };
    let mut moved = Body { name: format!("mapped_{}", layer.index), ..Body::default() };
    let product = inner(build, &mut moved, "MatMul", &[added, map], &[]);
    let sum = inner(build, &mut moved, "Add", &[output, product], &[]);
    let result = inner(build, &mut moved, "Cast", &[sum], &[("to", AttributeKind::Int(dtype as i64))]);
    moved.outputs = vec![result];
    let mut plain = Body { name: format!("unmapped_{}", layer.index), ..Body::default() };
    let result = inner(build, &mut plain, "Identity", &[layer.output], &[]);
    plain.outputs = vec![result];
    let branches = [("then_branch", AttributeKind::Graph(moved)), ("else_branch", AttributeKind::Graph(plain))];
    let chosen = inner(build, body, "If", &[flag], &branches);
    body.outputs = vec![chosen, added];
}

/// A copy of the layer's nodes and of the nodes that only this layer uses, with new values.
fn layer_body(build: &mut Builder, map: &LayerMap, layer: &Layer, mapped: Option<Mapped>) -> Body {
    let graph = &build.model.graph;
    let on_path: HashSet<usize> = layer.path.iter().copied().collect();
    let index = GraphIndex::of_body(&graph.body);
    let mut numbers = HashSet::new();
    let mut open = vec![layer.output];
    while let Some(value) = open.pop() {
        let Some((number, _)) = index.node_of(value) else { continue };
        // Nodes added for earlier layers have numbers past the end of the owners' list.
        let own = map.node_owners.get(number).is_some_and(|owner| owner.only() == Some(layer.index));
        if (own || on_path.contains(&number)) && numbers.insert(number) {
            let node = &graph.body.nodes[number];
            open.extend(node.present_inputs());
            open.extend(node.bodies().flat_map(crate::ir::captured));
        }
    }
    let mut numbers: Vec<usize> = numbers.into_iter().collect();
    numbers.sort_unstable();
    let nodes = numbers.iter().map(|&number| graph.body.nodes[number].clone()).collect();
    let mut body =
        Body { name: format!("layer_{}", layer.index), nodes, outputs: vec![layer.output], ..Body::default() };
    if let Some(mapped) = mapped {
        with_map(build, &mut body, layer, mapped);
    }
    let graph = &mut build.model.graph;
    let mut own = HashSet::new();
    defined(&body, &mut own);
    let mut renewed: HashMap<ValueId, ValueId> = HashMap::new();
    tidy::renew_body(&mut body, &mut |id| {
        if own.contains(id) {
            let old = graph.value(*id).clone();
            let count = graph.values.len();
            *id = *renewed
                .entry(*id)
                .or_insert_with(|| graph.add_value(Value { name: format!("interlace.bypass.{count}"), ..old }));
        }
    });
    body
}

/// Collects every value that a body or a nested body defines.
fn defined(body: &Body, own: &mut HashSet<ValueId>) {
    own.extend(body.inputs.iter().copied());
    own.extend(body.initializers.iter().map(|(id, _)| *id));
    for node in &body.nodes {
        own.extend(node.present_outputs());
        node.bodies().for_each(|inner| defined(inner, own));
    }
}

/// Makes the stream before the first layer an input. Returns false, without a change, when a run
/// cannot begin at a later layer.
fn restart(build: &mut Builder, map: &LayerMap) -> bool {
    let Some(first) = map.layers.first() else { return false };
    if map.layers.iter().any(|layer| !layer.beside.is_empty()) {
        return false;
    }
    let types: Vec<Option<&ValueType>> =
        map.layers.iter().map(|layer| build.model.graph.value(layer.input).ty.as_ref()).collect();
    let dtype = types[0].and_then(ValueType::dtype);
    let alike = types.iter().all(|ty| ty.and_then(ValueType::dtype) == dtype);
    let (Some(dtype), true, true) = (dtype, alike, map.glue.is_empty()) else { return false };
    let width = types[0].and_then(|ty| ty.shape()?.last().cloned()).unwrap_or(Dim::Unknown);
    let given = build.input(STREAM_INPUT, tensor_type(dtype, vec![Dim::Unknown, Dim::Unknown, width]));
    let flag = build.input(RESTART_INPUT, tensor_type(DataType::Bool, vec![Dim::Known(1)]));
    let mut copy = |name: &str, source: ValueId| {
        let output = build.value();
        let nodes = vec![operator("Identity", &[source], output, &[])];
        AttributeKind::Graph(Body { name: name.into(), nodes, outputs: vec![output], ..Body::default() })
    };
    let branches = [("then_branch", copy("given_stream", given)), ("else_branch", copy("own_stream", first.input))];
    let chosen = build.node("If", &[flag], &branches);
    build.model.graph.values[chosen.index()].ty = build.model.graph.value(first.input).ty.clone();
    let own = build.model.graph.body.nodes.pop();
    tidy::replace_uses(&mut build.model.graph.body, &HashMap::from([(first.input, chosen)]));
    build.model.graph.body.nodes.extend(own);
    true
}

/// The head at the selected rows alone: `[1, N, V]`.
fn chosen_logits(build: &mut Builder, logits: ValueId) -> ValueId {
    let shape = |last: i64| vec![Dim::Known(1), Dim::Unknown, Dim::Known(last)];
    let rows = build.input(ROWS_INPUT, tensor_type(DataType::Int64, shape(2)));
    let all = head_input(&build.model.graph, logits);
    let chosen = build.node("GatherND", &[all, rows], &[]);
    if all == logits {
        return chosen;
    }
    let own = build.model.graph.body.nodes.pop();
    tidy::replace_uses(&mut build.model.graph.body, &HashMap::from([(all, chosen)]));
    build.model.graph.body.nodes.extend(own);
    // The declared shapes of the values after it are those of all positions.
    let graph = &mut build.model.graph;
    let mut behind = HashSet::from([chosen]);
    for node in &graph.body.nodes {
        if node.present_inputs().any(|id| behind.contains(&id)) {
            behind.extend(node.present_outputs());
        }
    }
    for id in behind {
        graph.values[id.index()].ty = None;
    }
    logits
}

/// `-log softmax(logits)[target]` of each row, in float32.
fn cross_entropy(build: &mut Builder, logits: ValueId) -> ValueId {
    let shape = vec![Dim::Known(1), Dim::Unknown, Dim::Known(1)];
    let targets = build.input(TARGETS_INPUT, tensor_type(DataType::Int64, shape.clone()));
    let logits = build.node("Cast", &[logits], &[("to", AttributeKind::Int(DataType::Float as i64))]);
    let axis = ("axis", AttributeKind::Int(2));
    let log_probs = build.node("LogSoftmax", &[logits], std::slice::from_ref(&axis));
    let chosen = build.node("GatherElements", &[log_probs, targets], &[axis]);
    let loss = build.node("Neg", &[chosen], &[]);
    let value = &mut build.model.graph.values[loss.index()];
    value.name = LOSS_OUTPUT.into();
    value.ty = Some(tensor_type(DataType::Float, shape));
    loss
}
