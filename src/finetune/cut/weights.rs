//! Selects the initializers of a layer to train, and replaces initializers by trained ones.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Layer, LayerMap};
use crate::base::{Error, Result, list_preview};
use crate::finetune::settings::WriteTrained;
use crate::ir::{DataType, Dim, Graph, Model, Node, Tensor, ValueId};
use crate::quantised::{QuantisedWeight, requantised, with_floats};

/// Weights to train for the given layers, layer by layer in file order: all floating-point weights with more than one
/// element that only one layer reads, and the float weights of those of its products that are `quantised`.
///
/// Errors: `Error::Invalid` when `layers` is empty or a layer does not exist; `Error::Unsupported` for layers quantised
/// in another form, for layers without weights of their own, and for weights that a trained layer shares with another
/// layer.
pub fn trained_weights(
    graph: &Graph,
    map: &LayerMap,
    layers: &[usize],
    quantised: &[QuantisedWeight],
) -> Result<Vec<ValueId>> {
    let parts: HashMap<ValueId, ValueId> =
        quantised.iter().flat_map(|weight| weight.form.parts().into_iter().map(|part| (part, weight.weight))).collect();
    let numbers: HashSet<ValueId> =
        quantised.iter().filter_map(|weight| weight.form.parts().first().copied()).collect();

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
        refuse_quantised(graph, layer, &parts)?;
        refuse_shared(graph, map, layer, &numbers)?;
        let float = |id: ValueId| {
            graph.body.initializer(id).is_some_and(|tensor| tensor.dtype.is_float() && tensor.element_count() > 1)
        };
        // The scales of a quantised weight are floats too, and no weights of their own.
        let own = layer.weights.iter().filter_map(|&id| match parts.get(&id) {
            Some(&weight) => numbers.contains(&id).then_some(weight),
            None => float(id).then_some(id),
        });
        let before = trained.len();
        trained.extend(own);
        if trained.len() == before {
            return Err(Error::unsupported(format!("layer {number}"), "has no weights of its own to train"));
        }
    }
    Ok(trained)
}

/// True for operators of quantised weights.
pub(super) fn quantised_operator(node: &Node) -> bool {
    const QUANTISED: &[&str] =
        &["MatMulNBits", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"];
    QUANTISED.contains(&node.op_type.as_str())
}

fn refuse_quantised(graph: &Graph, layer: &Layer, known: &HashMap<ValueId, ValueId>) -> Result<()> {
    let node =
        layer.path.iter().filter_map(|&number| graph.body.nodes.get(number)).find(|node| quantised_operator(node));
    let packed = layer.weights.iter().filter(|id| !known.contains_key(id)).find(|&&id| {
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
        format!("its weights are quantised in a form that cannot be trained ({what})"),
    )
    .remedy(
        "finetune the float model, then quantise, or quantise by MatMulNBits in 4 or 8 bits, by ONNX Runtime's \
         `quantize_dynamic`, or by its `quantize_static` in the QDQ format",
    ))
}

/// Refuses a layer that shares floating-point weights with other layers, because training would change these layers
/// too.
///
/// Exceptions, unless a product reads them: tables that every layer reads, such as rotary ones, and tables that the
/// layer reads only through nodes with other inputs, such as positions. They are not trained.
fn refuse_shared(graph: &Graph, map: &LayerMap, layer: &Layer, quantised: &HashSet<ValueId>) -> Result<()> {
    const PRODUCTS: &[&str] = &["MatMul", "Gemm", "FusedMatMul"];
    let shared: Vec<&str> = layer
        .shared_weights
        .iter()
        .copied()
        .filter(|&id| {
            let float = graph.body.initializer(id).is_some_and(|tensor| tensor.dtype.is_float());
            float || quantised.contains(&id)
        })
        .filter(|&id| {
            let everywhere = map.layers.iter().all(|other| other.shared_weights.contains(&id));
            let multiplied = layer.path.iter().filter_map(|&number| graph.body.nodes.get(number)).any(|node| {
                PRODUCTS.contains(&node.op_type.as_str()) && node.present_inputs().any(|input| input == id)
            });
            multiplied || quantised.contains(&id) || !everywhere && meets_stream(graph, layer, id)
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

/// Sizes of a weight: those of its initializer, or those declared for a quantised weight that a node expands.
pub fn dims_of(graph: &Graph, weight: ValueId) -> Option<Vec<u64>> {
    if let Some(tensor) = graph.body.initializer(weight) {
        return Some(tensor.dims.clone());
    }
    let shape = graph.value(weight).ty.as_ref()?.shape()?;
    let known = |dim: &Dim| if let Dim::Known(size) = dim { u64::try_from(*size).ok() } else { None };
    shape.iter().map(known).collect()
}

/// The model with trained weights in place of its own: float weights in their own type, quantised ones as `write` asks.
///
/// Errors: `Error::Unsupported` for weights that cannot be quantised again; as [`replaced`] and [`with_floats`].
pub fn written_back(
    model: &Model,
    trained: Vec<(ValueId, Tensor)>,
    quantised: &[QuantisedWeight],
    write: WriteTrained,
) -> Result<Model> {
    let known: HashMap<ValueId, &QuantisedWeight> = quantised.iter().map(|weight| (weight.weight, weight)).collect();
    let (packed, mut tensors): (Vec<_>, Vec<_>) = trained.into_iter().partition(|(id, _)| known.contains_key(id));
    let packed: Vec<(&QuantisedWeight, Tensor)> = packed.into_iter().map(|(id, tensor)| (known[&id], tensor)).collect();
    match write {
        WriteTrained::Float => with_floats(&replaced(model, tensors)?, &packed),
        WriteTrained::Quantised => {
            for (weight, tensor) in &packed {
                tensors.extend(requantised(model, weight, tensor)?);
            }
            replaced(model, tensors)
        }
    }
}

/// The model with these initializers replaced and everything else unchanged.
///
/// Errors: `Error::Invalid` when a tensor has another type or shape than the initializer that it replaces, or when the
/// model has no such initializer.
fn replaced(model: &Model, tensors: Vec<(ValueId, Tensor)>) -> Result<Model> {
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
