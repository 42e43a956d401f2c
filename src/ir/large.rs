//! Constants above a size.

use super::{AttributeKind, Body, Graph, Model, Node};

/// Largest weight for WebGPU in bytes where the user names no limit. Chrome rounds a device's `maxStorageBufferBindingSize` down to
/// 128 MiB, 512 MiB, 1 GiB, 2 GiB or 4 GiB; this is below the third, which graphics cards of computers reach.
pub const WEBGPU_BUFFER_BYTES: u64 = 1_000_000_000;

/// Constants of more than `limit` bytes with their sizes in bytes: initializers of the graph, of bodies inside nodes and of
/// functions, and numbers in attributes. Each is described as messages show it.
pub fn large_constants(model: &Model, limit: u64) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for graph in std::iter::once(&model.graph).chain(model.functions.iter().map(|function| &function.graph)) {
        of_body(graph, &graph.body, None, limit, &mut found);
    }
    found
}

fn of_body(graph: &Graph, body: &Body, owner: Option<&Node>, limit: u64, found: &mut Vec<(String, u64)>) {
    let place = owner.map_or_else(String::new, |node| format!(" in {}", node.describe(graph)));
    for (id, tensor) in body.initializers.iter().filter(|(_, tensor)| tensor.byte_len() > limit) {
        found.push((format!("initializer `{}`{place}", graph.name(*id)), tensor.byte_len()));
    }
    for node in &body.nodes {
        for (name, attribute) in &node.attributes {
            let size = match &attribute.kind {
                AttributeKind::Tensor(tensor) => tensor.byte_len(),
                AttributeKind::Tensors(tensors) => tensors.iter().map(|tensor| tensor.byte_len()).max().unwrap_or(0),
                AttributeKind::Ints(numbers) => 8 * numbers.len() as u64,
                AttributeKind::Floats(numbers) => 4 * numbers.len() as u64,
                _ => 0,
            };
            if size > limit {
                found.push((format!("`{name}` of {}{place}", node.describe(graph)), size));
            }
        }
        for inner in node.bodies() {
            of_body(graph, inner, Some(node), limit, found);
        }
    }
}
