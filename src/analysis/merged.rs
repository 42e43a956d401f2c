//! Merged decoders: two branches of one `If`, one with a cache and one without, over the same weights.

use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, Graph, GraphIndex, Model};

use super::layer::LayerMap;
use super::{canonical, layers};

/// A model whose outputs all come from one `If`.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The unchanged model.
    pub original: Model,
    /// The `If` in its top-level body.
    pub node: usize,
    /// One per branch of the `If`.
    pub branches: Vec<Branch>,
}

/// One branch as a graph of its own over the model's inputs and weights. Ids below the length of the original arena
/// denote the same values in both.
#[derive(Clone, Debug)]
pub struct Branch {
    /// Position among the attributes of the `If`.
    pub attribute: usize,
    /// The branch as a model of its own.
    pub model: Model,
    /// Layers of `model`.
    pub map: LayerMap,
}

/// The `If` that produces every output, if the graph has one.
pub fn merging_node(model: &Model) -> Option<usize> {
    let body = &model.graph.body;
    let index = GraphIndex::of_body(body);
    let mut node = None;
    for &output in &body.outputs {
        let (number, _) = index.node_of(output)?;
        if body.nodes[number].op_type != "If" || *node.get_or_insert(number) != number {
            return None;
        }
    }
    node
}

/// Turns each branch into a model and finds its layers.
///
/// Errors: as `analyse`; `Error::Unsupported` when the branches do not have the same number of layers.
pub fn analyse_branches(model: &Model, node: usize) -> Result<Merged> {
    let outer = &model.graph.body;
    let mut branches: Vec<Branch> = Vec::new();
    for (attribute, (_, content)) in outer.nodes[node].attributes.iter().enumerate() {
        let AttributeKind::Graph(inner) = &content.kind else { continue };
        let mut laid_open = Model { graph: Graph::default(), ..model.clone() };
        laid_open.graph.values.clone_from(&model.graph.values);
        laid_open.graph.body = Body {
            name: inner.name.clone(),
            inputs: outer.inputs.clone(),
            outputs: inner.outputs.clone(),
            initializers: outer.initializers.iter().chain(&inner.initializers).cloned().collect(),
            nodes: outer.nodes[..node].iter().chain(&inner.nodes).cloned().collect(),
            ..Body::default()
        };
        canonical::unfuse_skip_norms(&mut laid_open);
        let map = layers(&laid_open.graph)?;
        branches.push(Branch { attribute, model: laid_open, map });
    }
    let counts: Vec<usize> = branches.iter().map(|branch| branch.map.layers.len()).collect();
    if counts.is_empty() || counts.iter().any(|&count| count != counts[0]) {
        return Err(Error::unsupported(
            outer.nodes[node].describe(&model.graph),
            format!("its branches have {counts:?} layers, expected the same number in each"),
        )
        .remedy("export prefill and decode from one model"));
    }
    Ok(Merged { original: model.clone(), node, branches })
}

impl Merged {
    /// The branch that reads a cache, or the first one.
    pub fn cached(&self) -> Option<&Branch> {
        let has_past =
            |branch: &&Branch| branch.map.layers.iter().flat_map(|layer| &layer.ports).any(|port| port.past.is_some());
        self.branches.iter().find(has_past).or_else(|| self.branches.first())
    }
}
