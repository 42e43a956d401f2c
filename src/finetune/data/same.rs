//! Compares the computations of two graphs, and what feeds two decoders.

use std::collections::HashMap;

use crate::base::Result;
use crate::bundle::{Bundle, Role};
use crate::ir::{AttributeKind, DataType, Graph, Node, ValueId};
use crate::runtime::content_digest;

/// Components whose outputs the decoder reads.
const FEEDING: &[Role] = &[Role::EmbedTokens, Role::VisionEncoder, Role::Projector, Role::TokenPruner];

/// True when both decoders are fed by the same files: a step may have dropped layers of the vision encoder, or trained the
/// connector.
///
/// Errors: `Error::Io` when a file cannot be read.
pub(super) fn fed_alike(a: &Bundle, b: &Bundle) -> Result<bool> {
    let digest = |bundle: &Bundle| content_digest(bundle, FEEDING.iter().filter_map(|role| bundle.component(*role)));
    Ok(digest(a)? == digest(b)?)
}

/// True when two graphs compute the same: the same operators in the same order, with equal attributes, wired alike, and
/// initializers of the same bytes. Nodes with bodies count as different.
pub(super) fn same_computation(a: &Graph, b: &Graph) -> bool {
    let (left, right) = (wired(a), wired(b));
    let alike = |(Wired { node: x, inputs: from }, Wired { node: y, inputs: to }): (&Wired<'_>, &Wired<'_>)| {
        (&x.domain, &x.op_type, &x.overload) == (&y.domain, &y.op_type, &y.overload)
            && from == to
            && x.outputs.len() == y.outputs.len()
            && x.attributes.len() == y.attributes.len()
            && x.attributes.iter().all(|(name, one)| {
                let other = y.attributes.iter().find(|(other, _)| other == name);
                other.is_some_and(|(_, other)| same_attribute(&one.kind, &other.kind))
            })
    };
    left.len() == right.len() && left.iter().zip(&right).all(alike)
}

/// A node with the sources of its inputs.
struct Wired<'a> {
    node: &'a Node,
    inputs: Vec<Wire<'a>>,
}

/// Source of a node's input.
#[derive(PartialEq)]
enum Wire<'a> {
    Absent,
    Weight(DataType, &'a [u64], &'a [u8]),
    /// Number of the value among the graph's inputs and the outputs of its nodes, in order.
    Value(Option<usize>),
}

/// The nodes of a graph with the sources of their inputs.
fn wired(graph: &Graph) -> Vec<Wired<'_>> {
    let made = graph.body.nodes.iter().flat_map(|node| node.outputs.iter().flatten());
    let numbers: HashMap<ValueId, usize> =
        graph.body.inputs.iter().chain(made).enumerate().map(|(number, &id)| (id, number)).collect();
    let wire = |input: &Option<ValueId>| match input.map(|id| (id, graph.body.initializer(id))) {
        None => Wire::Absent,
        Some((_, Some(weight))) => Wire::Weight(weight.dtype, &weight.dims, weight.bytes()),
        Some((id, None)) => Wire::Value(numbers.get(&id).copied()),
    };
    graph.body.nodes.iter().map(|node| Wired { node, inputs: node.inputs.iter().map(wire).collect() }).collect()
}

fn same_attribute(a: &AttributeKind, b: &AttributeKind) -> bool {
    use AttributeKind::{Float, Floats, Int, Ints, String, Strings, Tensor};
    match (a, b) {
        (Int(a), Int(b)) => a == b,
        (Float(a), Float(b)) => a.to_bits() == b.to_bits(),
        (String(a), String(b)) => a == b,
        (Ints(a), Ints(b)) => a == b,
        (Floats(a), Floats(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
        (Strings(a), Strings(b)) => a == b,
        (Tensor(a), Tensor(b)) if a.dtype != DataType::String => {
            (a.dtype, &a.dims, a.bytes()) == (b.dtype, &b.dims, b.bytes())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Attribute;
    use crate::onnx;

    fn decoder() -> Graph {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model/onnx/decoder_model_merged.onnx");
        onnx::load(&path).unwrap().graph
    }

    #[test]
    fn a_changed_attribute_or_wire_makes_another_computation() {
        let graph = decoder();
        assert!(same_computation(&graph, &graph.clone()));
        let mut changed = graph.clone();
        let node = changed.body.nodes.iter_mut().find(|node| node.op_type == "Softmax").unwrap();
        for (_, attribute) in &mut node.attributes {
            *attribute = Attribute::from(AttributeKind::Int(0));
        }
        assert!(!same_computation(&graph, &changed));
        let mut crossed = graph.clone();
        let mut adds = crossed.body.nodes.iter_mut().filter(|node| node.op_type == "Sub" || node.op_type == "MatMul");
        let node = adds.find(|node| node.inputs[0] != node.inputs[1]).unwrap();
        node.inputs.swap(0, 1);
        assert!(!same_computation(&graph, &crossed));
    }

    #[test]
    fn models_with_another_vision_encoder_are_fed_differently() {
        const FILES: [&str; 4] =
            ["config.json", "onnx/decoder_model_merged.onnx", "onnx/embed_tokens.onnx", "onnx/vision_encoder.onnx"];
        let folder = tempfile::tempdir().unwrap();
        let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
        let copy = |name: &str, changed: &str| {
            let target = folder.path().join(name);
            std::fs::create_dir_all(target.join("onnx")).unwrap();
            for file in FILES {
                let mut bytes = std::fs::read(source.join(file)).unwrap();
                *bytes.last_mut().unwrap() ^= u8::from(file == changed);
                std::fs::write(target.join(file), bytes).unwrap();
            }
            Bundle::open(&target).unwrap()
        };
        let dense = copy("dense", "");
        assert!(fed_alike(&copy("decoder", FILES[1]), &dense).unwrap());
        assert!(!fed_alike(&copy("embeddings", FILES[2]), &dense).unwrap());
        assert!(!fed_alike(&copy("tower", FILES[3]), &dense).unwrap());
    }
}
