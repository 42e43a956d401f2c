//! Sorts nodes into execution order.
//!
//! The format requires that order, but some conversion tools append nodes at the end (casts around an f16 network that
//! keeps f32 inputs and outputs), and ONNX Runtime reads such files. Only a cycle has no order.

use std::collections::{HashMap, HashSet};

use onnx_protobuf as pb;

use crate::base::{Error, Result};

/// The nodes of one scope, each after the nodes whose outputs it or its subgraphs read. Nodes already in order keep
/// their places; a node that comes too late moves before its first reader.
///
/// Errors: `Error::Invalid` naming the nodes of a cycle.
pub fn sorted(nodes: Vec<pb::NodeProto>) -> Result<Vec<pb::NodeProto>> {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    for (number, node) in nodes.iter().enumerate() {
        for name in node.output.iter().filter(|name| !name.is_empty()) {
            producers.entry(name).or_insert(number);
        }
    }
    let needs: Vec<Vec<usize>> = nodes
        .iter()
        .map(|node| reads(node).into_iter().filter_map(|name| producers.get(name).copied()).collect())
        .collect();
    if needs.iter().enumerate().all(|(number, needs)| needs.iter().all(|&need| need < number)) {
        return Ok(nodes);
    }
    let order = depth_first(&needs).map_err(|circle| in_a_circle(&nodes, &circle))?;
    let mut nodes: Vec<Option<pb::NodeProto>> = nodes.into_iter().map(Some).collect();
    Ok(order.into_iter().filter_map(|number| nodes[number].take()).collect())
}

/// Numbers in their given order, each after the numbers that it depends on.
///
/// Errors: the numbers of a cycle, the first repeated at the end.
fn depth_first(needs: &[Vec<usize>]) -> std::result::Result<Vec<usize>, Vec<usize>> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let mut marks = vec![Mark::New; needs.len()];
    let mut order = Vec::with_capacity(needs.len());
    for start in 0..needs.len() {
        // Open numbers, each with the count of its dependencies visited so far.
        let mut open: Vec<(usize, usize)> = Vec::new();
        if marks[start] == Mark::New {
            marks[start] = Mark::Open;
            open.push((start, 0));
        }
        while let Some((number, next)) = open.last_mut() {
            let number = *number;
            let Some(&need) = needs[number].get(*next) else {
                marks[number] = Mark::Done;
                order.push(number);
                open.pop();
                continue;
            };
            *next += 1;
            match marks[need] {
                Mark::Done => {}
                Mark::New => {
                    marks[need] = Mark::Open;
                    open.push((need, 0));
                }
                Mark::Open => {
                    let from = open.iter().position(|&(other, _)| other == need).unwrap_or(0);
                    return Err(open[from..].iter().map(|&(other, _)| other).chain([need]).collect());
                }
            }
        }
    }
    Ok(order)
}

fn in_a_circle(nodes: &[pb::NodeProto], circle: &[usize]) -> Error {
    const SHOWN: usize = 6;
    let describe = |&number: &usize| {
        let node = &nodes[number];
        match node.output.first() {
            _ if !node.name.is_empty() => format!("`{}` ({})", node.name, node.op_type),
            Some(output) => format!("node of `{output}` ({})", node.op_type),
            None => node.op_type.clone(),
        }
    };
    let mut names: Vec<String> = circle.iter().take(SHOWN).map(describe).collect();
    if circle.len() > SHOWN {
        names.push(format!(".. ({} nodes)", circle.len() - 1));
    }
    Error::invalid(
        format!("nodes {}", names.join(" <- ")),
        "each read an output of the next, in a circle: none can run first",
    )
    .remedy("export the model again")
}

/// Names that a node reads: its inputs, and the outer names that its subgraphs read.
fn reads(node: &pb::NodeProto) -> Vec<&str> {
    let mut names: Vec<&str> = node.input.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    for attribute in &node.attribute {
        attribute.g.iter().chain(&attribute.graphs).for_each(|graph| names.extend(captured(graph)));
    }
    names
}

/// Names that a subgraph reads and does not define.
fn captured(graph: &pb::GraphProto) -> HashSet<&str> {
    let outputs = graph.node.iter().flat_map(|node| &node.output).map(String::as_str);
    let given = graph.input.iter().map(|info| info.name.as_str());
    let weights = graph.initializer.iter().map(|tensor| tensor.name.as_str());
    let own: HashSet<&str> = outputs.chain(given).chain(weights).collect();
    let read = graph.node.iter().flat_map(reads).chain(graph.output.iter().map(|info| info.name.as_str()));
    read.filter(|name| !name.is_empty() && !own.contains(name)).collect()
}
