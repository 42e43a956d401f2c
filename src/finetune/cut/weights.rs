//! Which initializers of a layer are its weights, and putting trained ones back.

use std::collections::{HashMap, HashSet};

use crate::analysis::{Layer, LayerMap};
use crate::base::{Error, Result, list_preview};
use crate::ir::{DataType, Graph, Model, Tensor, ValueId};

use super::packed::{PACKED_PRODUCT, Packed};

/// The initializers to train for the given layers, in file order.
///
/// All floating-point weights that only one layer reads, constants of one element aside; with `adapters` the packed weights
/// of 4-bit products too, which have adapters beside them.
///
/// Errors: `Error::Invalid` for a layer that does not exist; `Error::Unsupported` for quantised layers and for weights
/// that a trained layer shares with some other layer.
pub fn trained_weights(graph: &Graph, map: &LayerMap, layers: &[usize], adapters: bool) -> Result<Vec<ValueId>> {
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
        let packed = packed_weights(graph, map, layer, adapters)?;
        refuse_quantised(graph, layer, &packed)?;
        refuse_shared(graph, map, layer)?;
        let own = layer.weights.iter().copied().filter(|&id| {
            graph.body.initializer(id).is_some_and(|tensor| tensor.dtype.is_float() && tensor.element_count() > 1)
        });
        let before = trained.len();
        trained.extend(own);
        trained.extend(packed.iter().map(|packed| packed.weight));
        if trained.len() == before {
            return Err(Error::unsupported(format!("layer {number}"), "has no weights of its own to train"));
        }
    }
    Ok(trained)
}

/// The weights of the layer's 4-bit products, where adapters may be beside them.
fn packed_weights(graph: &Graph, map: &LayerMap, layer: &Layer, adapters: bool) -> Result<Vec<Packed>> {
    let nodes = layer.path.iter().filter_map(|&number| graph.body.nodes.get(number));
    let products = nodes.filter(|node| adapters && node.op_type == PACKED_PRODUCT);
    let mut found: Vec<Packed> = Vec::new();
    for node in products {
        let refused = |problem: String| {
            Error::unsupported(format!("layer {}", layer.index), format!("{}: {problem}", node.describe(graph)))
                .remedy("finetune the float model, then quantise")
        };
        let packed = Packed::of(graph, node).map_err(refused)?;
        let parts = || [Some(packed.weight), Some(packed.scales), packed.zero_points].into_iter().flatten();
        let shared = |id: ValueId| {
            let elsewhere = map.layers.iter().any(|other| other.index != layer.index && other.weights.contains(&id));
            let readers = graph.body.nodes.iter().filter(|node| node.present_inputs().any(|input| input == id)).count();
            elsewhere || layer.shared_weights.contains(&id) || readers > 1
        };
        if let Some(id) = parts().find(|&id| shared(id)) {
            return Err(refused(format!("shares `{}` with another product", graph.name(id))));
        }
        found.push(packed);
    }
    let place = |id: ValueId| graph.body.initializers.iter().position(|(other, _)| *other == id);
    found.sort_by_key(|packed| place(packed.weight));
    Ok(found)
}

fn refuse_quantised(graph: &Graph, layer: &Layer, adapted: &[Packed]) -> Result<()> {
    const QUANTISED: &[&str] =
        &["MatMulNBits", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"];
    let node = layer.path.iter().filter_map(|&number| graph.body.nodes.get(number)).find(|node| {
        let known = adapted.iter().any(|packed| node.inputs.get(1) == Some(&Some(packed.weight)));
        QUANTISED.contains(&node.op_type.as_str()) && !known
    });
    let parts: HashSet<ValueId> =
        adapted.iter().flat_map(|packed| [Some(packed.weight), packed.zero_points]).flatten().collect();
    let packed = layer.weights.iter().filter(|id| !parts.contains(id)).find(|&&id| {
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
    .remedy(
        "train adapters beside products of 4 bits (MatMulNBits) with `--lora-rank 16`, or finetune the float model, then quantise",
    ))
}

/// Tables (rotary ones) that every layer reads, or that meet the stream only by way of positions, stay as they are;
/// anything else that is shared would move other layers.
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

/// Whether the layer's own nodes read an initializer, as it is or through nodes that read initializers alone.
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

/// The model with these initializers in place of its own; everything else stays as it is.
///
/// Errors: `Error::Invalid` when a tensor does not fit the initializer that it replaces.
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
