//! Selects the initializers of a layer to train, and replaces initializers by trained ones.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Layer, LayerMap};
use crate::base::{Error, Result, list_preview};
use crate::ir::{DataType, Graph, Model, Tensor, ValueId};

/// Initializers to train for the given layers, layer by layer: all floating-point weights with more than one element
/// that only one layer reads.
///
/// Errors: `Error::Invalid` when `layers` is empty or a layer does not exist; `Error::Unsupported` for quantised
/// layers, for layers without floating-point weights of their own, and for weights that a trained layer shares with
/// another layer.
pub fn trained_weights(graph: &Graph, map: &LayerMap, layers: &[usize]) -> Result<Vec<ValueId>> {
    if layers.is_empty() {
        return Err(Error::invalid("finetune", "no layer is named").remedy("give a plan with layers to finetune"));
    }
    let mut trained = Vec::new();
    for &number in layers {
        let Some(layer) = map.layers.get(number) else {
            return Err(Error::invalid(
                format!("layer {number}"),
                format!("does not exist, the model has layers 0 to {}", map.layers.len().saturating_sub(1)),
            )
            .remedy("the plan counts layers of the pruned model here"));
        };
        refuse_quantised(graph, layer)?;
        refuse_shared(graph, map, layer)?;
        let own = layer.weights.iter().copied().filter(|&id| {
            graph.body.initializer(id).is_some_and(|tensor| tensor.dtype.is_float() && tensor.element_count() > 1)
        });
        let before = trained.len();
        trained.extend(own);
        if trained.len() == before {
            return Err(Error::unsupported(
                format!("layer {number}"),
                "has no floating-point weights of its own to train",
            ));
        }
    }
    Ok(trained)
}

fn refuse_quantised(graph: &Graph, layer: &Layer) -> Result<()> {
    const QUANTISED: &[&str] =
        &["MatMulNBits", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"];
    let node = layer
        .path
        .iter()
        .filter_map(|&number| graph.body.nodes.get(number))
        .find(|node| QUANTISED.contains(&node.op_type.as_str()));
    let packed = layer.weights.iter().find(|&&id| {
        graph.body.initializer(id).is_some_and(|tensor| {
            let bits = tensor.dtype.bits();
            !tensor.dtype.is_float()
                && tensor.dtype != DataType::Bool
                && (1..=8).contains(&bits)
                && tensor.element_count() > 1
        })
    });
    let what = match (node, packed) {
        (Some(node), _) => node.describe(graph),
        (None, Some(&id)) => format!("initializer `{}`", graph.name(id)),
        (None, None) => return Ok(()),
    };
    Err(Error::unsupported(
        format!("layer {}", layer.index),
        format!("its weights are quantised ({what}), which cannot be trained"),
    )
    .remedy("finetune the float model, then quantise"))
}

/// Refuses a layer that shares floating-point weights with other layers, because training would change these layers
/// too.
///
/// Exceptions, unless a product reads them: tables that every layer reads, such as rotary ones, and tables that the
/// layer reads only through nodes with other inputs, such as positions. They are not trained.
fn refuse_shared(graph: &Graph, map: &LayerMap, layer: &Layer) -> Result<()> {
    const PRODUCTS: &[&str] = &["MatMul", "Gemm", "FusedMatMul"];
    let shared: Vec<&str> = layer
        .shared_weights
        .iter()
        .copied()
        .filter(|&id| graph.body.initializer(id).is_some_and(|tensor| tensor.dtype.is_float()))
        .filter(|&id| {
            let everywhere = map.layers.iter().all(|other| other.shared_weights.contains(&id));
            let multiplied = layer.path.iter().filter_map(|&number| graph.body.nodes.get(number)).any(|node| {
                PRODUCTS.contains(&node.op_type.as_str()) && node.present_inputs().any(|input| input == id)
            });
            multiplied || !everywhere && meets_stream(graph, layer, id)
        })
        .map(|id| graph.name(id))
        .collect();
    if shared.is_empty() {
        return Ok(());
    }
    let problem = format!("shares the weights {} with other layers, which must not move", list_preview(&shared, 4));
    Err(Error::unsupported(format!("layer {}", layer.index), problem)
        .remedy("export the model without merging equal weights, or choose another layer"))
}

/// True when a node of the layer reads an initializer, directly or through nodes that read initializers alone.
fn meets_stream(graph: &Graph, layer: &Layer, id: ValueId) -> bool {
    let path: HashSet<usize> = layer.path.iter().copied().collect();
    let mut forms = HashSet::from([id]);
    for (number, node) in graph.body.nodes.iter().enumerate() {
        if !node.present_inputs().any(|input| forms.contains(&input)) {
            continue;
        }
        if path.contains(&number) {
            return true;
        }
        if node.present_inputs().all(|input| forms.contains(&input) || graph.body.initializer(input).is_some()) {
            forms.extend(node.present_outputs());
        }
    }
    false
}

/// The model with these initializers replaced and everything else unchanged.
///
/// Errors: `Error::Invalid` when a tensor has another type or shape than the initializer that it replaces, or when the
/// model has no such initializer.
pub fn replaced(model: &Model, tensors: Vec<(ValueId, Tensor)>) -> Result<Model> {
    let mut tensors: HashMap<ValueId, Tensor> = tensors.into_iter().collect();
    let mut changed = model.clone();
    for (id, old) in &mut changed.graph.body.initializers {
        let Some(new) = tensors.remove(id) else { continue };
        if new.dtype != old.dtype || new.dims != old.dims {
            let problem = format!("is {} {:?}, the trained one {} {:?}", old.dtype, old.dims, new.dtype, new.dims);
            return Err(Error::invalid(format!("initializer `{}`", model.graph.name(*id)), problem));
        }
        old.dtype = new.dtype;
        old.data = new.data;
    }
    match tensors.keys().next() {
        Some(&id) => Err(Error::invalid(
            format!("initializer `{}`", model.graph.name(id)),
            "was trained and is not in the model",
        )),
        None => Ok(changed),
    }
}
