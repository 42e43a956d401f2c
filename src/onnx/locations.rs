//! Names of the files with a graph's weights, which need not be there.

use std::collections::BTreeSet;
use std::path::Path;

use onnx_protobuf as pb;
use protobuf::Message as _;

use crate::base::{Error, MappedFile, Result};

use super::{DAMAGED, wire};

/// Locations of external data that a model names, relative to its folder, whether the files are there or not.
///
/// Errors: `Error::Io` when the model is missing or unreadable; `Error::Invalid` when the bytes are not an ONNX model.
pub fn external_locations(path: &Path) -> Result<BTreeSet<String>> {
    let file = MappedFile::open(path)?;
    let wrong = |problem: String| Error::invalid(format!("`{}`", path.display()), problem).remedy(DAMAGED);
    let scan = wire::scan(&file).map_err(|problem| wrong(problem.to_string()))?;
    let model = pb::ModelProto::parse_from_bytes(&scan.skeleton).map_err(|e| wrong(e.to_string()))?;
    let mut found = BTreeSet::new();
    model.graph.iter().for_each(|graph| of_graph(graph, &mut found));
    model.functions.iter().for_each(|function| of_nodes(&function.node, &mut found));
    Ok(found)
}

fn of_graph(graph: &pb::GraphProto, found: &mut BTreeSet<String>) {
    graph.initializer.iter().for_each(|tensor| of_tensor(tensor, found));
    of_nodes(&graph.node, found);
}

fn of_nodes(nodes: &[pb::NodeProto], found: &mut BTreeSet<String>) {
    for attribute in nodes.iter().flat_map(|node| &node.attribute) {
        attribute.t.iter().chain(&attribute.tensors).for_each(|tensor| of_tensor(tensor, found));
        attribute.g.iter().chain(&attribute.graphs).for_each(|graph| of_graph(graph, found));
    }
}

fn of_tensor(tensor: &pb::TensorProto, found: &mut BTreeSet<String>) {
    if tensor.data_location.value() == 1 {
        let entries = tensor.external_data.iter().filter(|entry| entry.key == "location");
        found.extend(entries.map(|entry| entry.value.clone()));
    }
}
