//! The connector in training: the graph between the vision encoder and the decoder, where it is a file of its own.
//!
//! Its nodes are put before those of the decoder. They read the vision encoder's features, and their rows take the places of
//! the image tokens among the embeddings, so the first layer's piece of the network computes them and gradients reach their
//! adapters.

use std::collections::{HashMap, HashSet};

use crate::analysis::position_wise_from;
use crate::base::{Error, Result};
use crate::finetune::settings::WriteTrained;
use crate::ir::{AttributeKind, DataType, Dim, Graph, GraphIndex, Model, Node, Tensor, Value, ValueId, ValueType};
use crate::quantised::{Activations, QuantisedWeight, float_products};
use crate::rewrite::{ADDED_PREFIX, JoinScope, Joined, raise_opset, replace_uses};
use crate::runtime::{InputKind, Port};

use super::Cut;
use super::adapters::reads_by_products;
use super::inputs::{ConnectorInput, inputs_of_kind};
use super::weights::{dims_of, quantised_operator, written_back};

/// A connector that is a part of the network in training.
pub struct Connector {
    /// The graph as it is in the file.
    pub stored: Model,
    /// Its quantised weights, with ids of `stored`.
    pub quantised: Vec<QuantisedWeight>,
    pub input: ConnectorInput,
    /// Input for the features.
    pub features: ValueId,
    /// Its output.
    pub output: ValueId,
    /// Input `[B, T]`: for each token the row that it takes, among the embeddings `[B * T, D]` with the connector's output
    /// after them.
    pub places: ValueId,
    /// The embeddings with the connector's output in its places.
    pub merged: ValueId,
    /// Ids in `stored` of the weights in the joined graph.
    own: HashMap<ValueId, ValueId>,
}

impl Connector {
    /// The id in [`Connector::stored`] of a weight in the joined graph; `None` for the decoder's.
    pub fn own(&self, weight: ValueId) -> Option<ValueId> {
        self.own.get(&weight).copied()
    }

    /// The graph of the file with trained weights, which have ids of the joined graph, in place of its own.
    ///
    /// Errors: as [`written_back`].
    pub fn written_back(&self, trained: Vec<(ValueId, Tensor)>, write: WriteTrained) -> Result<Model> {
        let own = trained.into_iter().filter_map(|(id, tensor)| Some((self.own(id)?, tensor)));
        written_back(&self.stored, own.collect(), &self.quantised, write)
    }

    /// Features per row of the output as far as the graph fixes it: rows of a tile before and after.
    pub fn rows(&self) -> Option<(usize, usize)> {
        let graph = &self.stored.graph;
        let weights: HashSet<ValueId> = graph.body.initializers.iter().map(|(id, _)| *id).collect();
        let input = graph.body.inputs.iter().find(|id| !weights.contains(id))?;
        let fixed = |id: ValueId| {
            let port = Port::of_value(graph, id)?;
            port.fixed_size(port.rank().checked_sub(2)?)
        };
        Some((fixed(*input)?, fixed(*graph.body.outputs.first()?)?))
    }
}

/// A connector joined with the decoder.
struct Grafted {
    model: Model,
    connector: Connector,
    /// Its quantised weights, with ids of `model`.
    quantised: Vec<QuantisedWeight>,
    /// The weights that get adapters.
    adapted: Vec<ValueId>,
    embeddings: ValueId,
}

impl Cut {
    /// Makes the connector a part of the network in training, which then starts at the decoder's embeddings, and adds to the
    /// trained weights those of its matrices that only products read and that have both sides above `rank`. Returns the reason
    /// where it gets no adapters; nothing changes then.
    ///
    /// Errors: `Error::Unsupported` for a connector that is quantised in a form that cannot be trained.
    pub fn add_connector(&mut self, connector: &Model, rank: u32) -> Result<Option<String>> {
        let grafted = match grafted(self, connector, rank)? {
            Ok(grafted) => grafted,
            Err(reason) => return Ok(Some(reason)),
        };
        let Grafted { model, connector, quantised, adapted, embeddings } = grafted;
        self.analysis.model = model;
        self.quantised.extend(quantised);
        self.trained.extend(adapted);
        self.streams[0] = embeddings;
        self.connector = Some(connector);
        Ok(None)
    }
}

/// Errors: as [`Cut::add_connector`]; the reason why the connector gets no adapters.
fn grafted(cut: &Cut, connector: &Model, rank: u32) -> Result<Result<Grafted, String>> {
    let decoder = &cut.analysis.model;
    let (embeddings, width) = match embeddings(&decoder.graph) {
        Ok(found) => found,
        Err(reason) => return Ok(Err(reason)),
    };
    let (input, port) = match features(&connector.graph) {
        Ok(found) => found,
        Err(reason) => return Ok(Err(reason)),
    };
    let raised = match raised(connector, decoder) {
        Ok(raised) => raised,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut joined = Joined { model: decoder.clone() };
    let name = format!("{ADDED_PREFIX}connector");
    let part = match joined.part(&name, &raised) {
        Ok(part) => part,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let mut add_input = |end: &str, dtype: DataType, shape: Vec<Dim>| {
        let graph = &mut joined.model.graph;
        let ty = Some(ValueType::Tensor { dtype, shape: Some(shape) });
        let id = graph.add_value(Value { name: format!("{name}.{end}"), ty, ..Value::default() });
        graph.body.inputs.push(id);
        id
    };
    let open = |rank: usize| vec![Dim::Unknown; rank];
    let shape = [open(port.rank() - 1), port.shape[port.rank() - 1..].to_vec()].concat();
    let features = add_input("features", port.dtype, shape);
    let places = add_input("places", DataType::Int64, open(2));
    let flat = joined.constant(&format!("{name}.flat"), Tensor::from_i64(&[2], &[-1, width as i64]));
    let mut scope = JoinScope::new(&mut joined);
    let output = scope.inline(&part, &name, &HashMap::from([(input, features)]))?.remove(0);
    let rows = scope.op(&format!("{name}.rows"), "Reshape", &[output, flat], &[]);
    let tokens = scope.op(&format!("{name}.tokens"), "Reshape", &[embeddings, flat], &[]);
    let rows = match decoder.opset_imports.get("").copied().unwrap_or(1) {
        // In 16 bits the stream keeps its type.
        15.. => scope.op(&format!("{name}.alike"), "CastLike", &[rows, tokens], &[]),
        _ => rows,
    };
    let axis = [("axis", AttributeKind::Int(0))];
    let all = scope.op(&format!("{name}.all"), "Concat", &[tokens, rows], &axis);
    let merged = scope.op(&format!("{name}.merged"), "Gather", &[all, places], &axis);
    let nodes = scope.nodes;
    let mut floats = raised.clone();
    let of_file = float_products(&mut floats, Activations::Rounded, &|_| true);
    if let Some(node) = quantised_on_path(&floats.graph, input) {
        return Err(Error::unsupported(
            "the connector",
            format!("its weights are quantised in a form that cannot be trained ({})", node.describe(&floats.graph)),
        )
        .remedy("leave it as it is with `--lora-layers trained`, or finetune the float model, then quantise"));
    }
    let mut own: HashMap<ValueId, ValueId> =
        raised.graph.body.initializers.iter().filter_map(|(id, _)| Some((part.weight(*id)?, *id))).collect();
    let mut model = joined.model;
    read_merged(&mut model, embeddings, merged);
    model.graph.body.nodes.splice(0..0, nodes);
    let quantised = float_products(&mut model, Activations::Rounded, &|_| true);
    own.extend(quantised.iter().zip(&of_file).map(|(joined, file)| (joined.weight, file.weight)));
    crate::ir::check(&model)?;

    let graph = &model.graph;
    let index = GraphIndex::new(graph);
    let float = |id: &ValueId| graph.body.initializer(*id).is_some_and(|tensor| tensor.dtype.is_float());
    let parts: HashSet<ValueId> = quantised.iter().flat_map(|weight| weight.form.parts()).collect();
    let floats = graph.body.initializers.iter().map(|(id, _)| *id).filter(|id| own.contains_key(id) && float(id));
    let floats = floats.filter(|id| !parts.contains(id));
    let large = |id: &ValueId| {
        dims_of(graph, *id).is_some_and(|dims| dims.len() == 2 && dims.iter().all(|&side| side > u64::from(rank)))
    };
    let all = floats.chain(quantised.iter().map(|weight| weight.weight));
    let adapted: Vec<ValueId> = all.filter(|id| large(id) && reads_by_products(graph, &index, *id)).collect();
    if adapted.is_empty() {
        return Ok(Err(format!("it has no matrix with both sides above the rank {rank}")));
    }
    let row_wise = position_wise_from(graph, &[features], output).is_some();
    let input = ConnectorInput { width: port.width().unwrap_or(0), rank: port.rank(), row_wise };
    let connector =
        Connector { stored: connector.clone(), quantised: of_file, input, features, output, places, merged, own };
    Ok(Ok(Grafted { model, connector, quantised, adapted, embeddings }))
}

/// The decoder's input for embeddings, with its width.
fn embeddings(decoder: &Graph) -> Result<(ValueId, usize), String> {
    if !inputs_of_kind(decoder, InputKind::ImageFeatures).is_empty() {
        return Err("the decoder's graph puts its output among the embeddings".to_string());
    }
    let [embeddings] = inputs_of_kind(decoder, InputKind::InputsEmbeds)[..] else {
        return Err("the decoder takes no `inputs_embeds`".to_string());
    };
    let width = Port::of_value(decoder, embeddings).and_then(|port| port.width());
    Ok((embeddings, width.ok_or_else(|| "the decoder leaves the width of `inputs_embeds` open".to_string())?))
}

/// The connector's input for features.
fn features(connector: &Graph) -> Result<(ValueId, Port), String> {
    let weights: HashSet<ValueId> = connector.body.initializers.iter().map(|(id, _)| *id).collect();
    let inputs: Vec<ValueId> = connector.body.inputs.iter().copied().filter(|id| !weights.contains(id)).collect();
    let (&[input], [_]) = (&inputs[..], &connector.body.outputs[..]) else {
        let outputs = connector.body.outputs.len();
        return Err(format!("it has {} inputs and {outputs} outputs, not one of features each", inputs.len()));
    };
    let port = Port::of_value(connector, input).ok_or_else(|| "its input has no type and shape".to_string())?;
    let form = matches!(port.rank(), 2 | 3) && port.fixed_size(0).is_none() && port.width().is_some();
    match form && port.dtype.is_float() {
        true => Ok((input, port)),
        false => Err(format!("its input {} is not of the form [any number, .., width]", port.described())),
    }
}

/// The connector in the decoder's operator set.
fn raised(connector: &Model, decoder: &Model) -> Result<Model, String> {
    match decoder.opset_imports.get("") {
        Some(&version) => raise_opset(connector, version).map_err(|error| error.to_string()),
        None => Ok(connector.clone()),
    }
}

/// An operator of quantised weights that the features pass through.
fn quantised_on_path(graph: &Graph, features: ValueId) -> Option<&Node> {
    let mut reached = HashSet::from([features]);
    graph.body.nodes.iter().find(|node| {
        let on_path = node.present_inputs().any(|id| reached.contains(&id));
        if on_path {
            reached.extend(node.present_outputs());
        }
        on_path && quantised_operator(node)
    })
}

/// All nodes that read `embeddings` read `merged`, but for those that read its shape alone, which is the same.
fn read_merged(model: &mut Model, embeddings: ValueId, merged: ValueId) {
    let body = &mut model.graph.body;
    let shapes: Vec<(usize, Node)> = body
        .nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.reads_shape_only())
        .map(|(n, node)| (n, node.clone()))
        .collect();
    replace_uses(body, &HashMap::from([(embeddings, merged)]));
    for (number, node) in shapes {
        body.nodes[number] = node;
    }
}
