//! Folds a linear map of what a layer's last block adds to the stream into the weights that compute it.

use std::collections::{BTreeMap, HashSet};

use ndarray::{Array2, ArrayView2, Axis};

use crate::analysis::{Analysis, Layer, Projection};
use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, DataType, Graph, GraphIndex, Model, Node, Tensor, ValueId};

/// Weights by name.
pub type NamedWeights = BTreeMap<String, Tensor>;

/// The weights of layer `layer` with which its last block adds `a + a change` to the stream in place of `a`. The block must
/// be a sum of products with float weights of the layer's own, and of biases. In a merged decoder both branches change.
///
/// Errors: `Error::Unsupported` naming the layer and what else its sum consists of; `Error::Invalid` when `change` is not
/// as wide as the stream.
pub fn fold_map(analysis: &Analysis, layer: usize, change: &Array2<f32>) -> Result<NamedWeights> {
    let change = change.mapv(f64::from);
    let mut weights = NamedWeights::new();
    match &analysis.merged {
        Some(merged) => {
            for branch in &merged.branches {
                fold(&branch.model.graph, &branch.map.layers[layer], &change, &mut weights)?;
            }
        }
        None => fold(&analysis.model.graph, &analysis.map.layers[layer], &change, &mut weights)?,
    }
    Ok(weights)
}

/// The model with these weights in place of its own.
///
/// Errors: `Error::Invalid` for a weight that it does not have.
pub fn with_weights(model: &Model, weights: &NamedWeights) -> Result<Model> {
    let mut model = model.clone();
    let mut found = HashSet::new();
    let names: Vec<String> = model.graph.values.iter().map(|value| value.name.clone()).collect();
    replace(&mut model.graph.body, &names, weights, &mut found);
    match weights.keys().find(|name| !found.contains(*name)) {
        Some(name) => Err(Error::invalid(format!("weight `{name}`"), "is not in the graph")),
        None => Ok(model),
    }
}

fn replace<'w>(body: &mut Body, names: &[String], weights: &'w NamedWeights, found: &mut HashSet<&'w String>) {
    for (id, tensor) in &mut body.initializers {
        if let Some((name, own)) = names.get(id.index()).and_then(|name| weights.get_key_value(name)) {
            *tensor = own.clone();
            found.insert(name);
        }
    }
    for attribute in body.nodes.iter_mut().flat_map(|node| &mut node.attributes) {
        if let AttributeKind::Graph(inner) = &mut attribute.1.kind {
            replace(inner, names, weights, found);
        }
    }
}

/// Errors: as [`fold_map`], for any map.
pub fn check_fold(analysis: &Analysis, layer: usize) -> Result<()> {
    match &analysis.merged {
        Some(merged) => merged
            .branches
            .iter()
            .try_for_each(|branch| parts_of(&branch.model.graph, &branch.map.layers[layer]).map(|_| ())),
        None => parts_of(&analysis.model.graph, &analysis.map.layers[layer]).map(|_| ()),
    }
}

fn fold(graph: &Graph, layer: &Layer, change: &Array2<f64>, weights: &mut NamedWeights) -> Result<()> {
    for (id, part) in parts_of(graph, layer)? {
        let (name, tensor) = (graph.name(id), graph.body.initializer(id));
        let folded = tensor.and_then(|tensor| part.folded(tensor, change)).ok_or_else(|| {
            let what = tensor.map_or(String::new(), |tensor| format!(" of {:?} in {}", tensor.dims, tensor.dtype));
            Error::invalid(format!("weight `{name}`{what}"), format!("takes no map of {} rows", change.nrows()))
        })?;
        weights.insert(name.to_string(), folded);
    }
    Ok(())
}

/// The weights whose products and sums are what the layer's last block adds to the stream.
fn parts_of(graph: &Graph, layer: &Layer) -> Result<Vec<(ValueId, Part)>> {
    let index = GraphIndex::new(graph);
    let refuse = |problem: String| {
        Error::unsupported(
            format!("layer {}", layer.index),
            format!("a linear map cannot be folded into it: {problem}"),
        )
        .remedy("leave the compensation out, or drop other layers")
    };
    let mut parts: Vec<(ValueId, Part)> = Vec::new();
    let mut pending = vec![layer.output];
    let mut streams = 0;
    while let Some(id) = pending.pop() {
        if id == layer.last_block {
            streams += 1;
            continue;
        }
        if graph.body.initializer(id).is_some() {
            parts.push((id, Part::Bias));
            continue;
        }
        let Some((number, _)) = index.node_of(id) else {
            return Err(refuse(format!("its output is a sum with `{}`, which is computed elsewhere", graph.name(id))));
        };
        let node = &graph.body.nodes[number];
        let alone = id == layer.output || index.uses(id).len() == 1 && index.output_position(id).is_none();
        match node.op_type.as_str() {
            _ if !alone => {
                let problem = format!("{} in its sum is read elsewhere too", node.describe(graph));
                return Err(refuse(problem));
            }
            "Add" | "Sum" => pending.extend(node.present_inputs()),
            "Identity" | "Cast" | "Reshape" => pending.extend(node.present_inputs().next()),
            _ => {
                let product = Projection::of(graph, &index, node)
                    .ok_or_else(|| refuse(format!("its output is a sum with {}", node.describe(graph))))?;
                parts.push((product.weight, Part::Product { transposed: product.transposed }));
                parts.extend(bias(node).map_err(refuse)?.map(|bias| (bias, Part::Bias)));
            }
        }
    }
    if streams != 1 || !parts.iter().any(|(_, part)| matches!(part, Part::Product { .. })) {
        return Err(refuse("its output is not the stream and a product".to_string()));
    }
    let shared = parts.iter().find(|(id, _)| !layer.weights.contains(id) || index.uses(*id).len() != 1);
    match shared {
        Some((id, _)) => Err(refuse(format!("its weight `{}` is shared", graph.name(*id)))),
        None => Ok(parts),
    }
}

/// The bias of a `Gemm`.
fn bias(node: &Node) -> Result<Option<ValueId>, String> {
    let Some(bias) = node.inputs.get(2).copied().flatten() else { return Ok(None) };
    let beta = node.attribute("beta").map_or(Some(1.0), crate::ir::Attribute::as_float);
    if beta == Some(1.0) { Ok(Some(bias)) } else { Err(format!("a bias times {beta:?}")) }
}

/// A weight in the sum.
enum Part {
    Product { transposed: bool },
    Bias,
}

impl Part {
    /// The weight times `I + change` on the side of the stream's width; `None` where it is not so wide or not of floats.
    fn folded(&self, tensor: &Tensor, change: &Array2<f64>) -> Option<Tensor> {
        let values = tensor.to_f64s()?;
        let width = change.nrows();
        let dtype: DataType = tensor.dtype;
        let values = match self {
            Part::Product { transposed: true } => {
                let weight = ArrayView2::from_shape((width, values.len() / width), &values).ok()?;
                &weight + &change.t().dot(&weight)
            }
            Part::Product { transposed: false } => {
                let weight = ArrayView2::from_shape((values.len() / width, width), &values).ok()?;
                &weight + &weight.dot(change)
            }
            Part::Bias => {
                let bias = ArrayView2::from_shape((values.len() / width, width), &values).ok()?;
                &bias + &bias.dot(change)
            }
        };
        let last = *tensor.dims.last()?;
        let fits = match self {
            Part::Product { transposed: true } => tensor.dims.first() == Some(&(width as u64)),
            _ => last == width as u64,
        };
        let values: Vec<f64> = values.axis_iter(Axis(0)).flatten().copied().collect();
        fits.then(|| Tensor::from_f64s(dtype, &tensor.dims, &values)).flatten()
    }
}
