//! Producers and consumers of each value of a body.

use std::collections::HashMap;

use super::{Body, Graph, ValueId};

/// Producer of a value of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Producer {
    /// Input number of the body.
    Input(usize),
    /// Initializer number of the body.
    Initializer(usize),
    /// Output number of a node.
    Node {
        /// Position in the body's `nodes`.
        node: usize,
        /// Position in the node's `outputs`.
        output: usize,
    },
}

/// One reader of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Node number in the body.
    pub node: usize,
    /// Input number of the node; `None` when a body inside the node captures the value.
    pub input: Option<usize>,
}

/// Producers and readers of one body's values. A snapshot: any change to the body makes it stale.
#[derive(Debug, Default)]
pub struct GraphIndex {
    producers: HashMap<ValueId, Producer>,
    uses: HashMap<ValueId, Vec<Use>>,
    outputs: HashMap<ValueId, usize>,
}

impl GraphIndex {
    /// Index of a graph's top-level body.
    pub fn new(graph: &Graph) -> Self {
        Self::of_body(&graph.body)
    }

    /// Index of one body. Values captured from outside have readers and no producer.
    pub fn of_body(body: &Body) -> Self {
        let mut index = GraphIndex::default();
        for (position, &id) in body.inputs.iter().enumerate() {
            index.producers.insert(id, Producer::Input(position));
        }
        // An initializer that is also an input (a default value) counts as an initializer.
        for (position, (id, _)) in body.initializers.iter().enumerate() {
            index.producers.insert(*id, Producer::Initializer(position));
        }
        for (number, node) in body.nodes.iter().enumerate() {
            for (position, output) in node.outputs.iter().enumerate() {
                if let Some(id) = output {
                    index.producers.insert(*id, Producer::Node { node: number, output: position });
                }
            }
            for (position, input) in node.inputs.iter().enumerate() {
                if let Some(id) = input {
                    index.uses.entry(*id).or_default().push(Use { node: number, input: Some(position) });
                }
            }
            for inner in node.bodies() {
                for id in captured(inner) {
                    index.uses.entry(id).or_default().push(Use { node: number, input: None });
                }
            }
        }
        for (position, &id) in body.outputs.iter().enumerate() {
            index.outputs.entry(id).or_insert(position);
        }
        index
    }

    /// Producer of the value; `None` when an outer body defines it.
    pub fn producer(&self, id: ValueId) -> Option<Producer> {
        self.producers.get(&id).copied()
    }

    /// The node and output number that produce the value.
    pub fn node_of(&self, id: ValueId) -> Option<(usize, usize)> {
        match self.producers.get(&id) {
            Some(Producer::Node { node, output }) => Some((*node, *output)),
            _ => None,
        }
    }

    /// Every reader of the value inside the body.
    pub fn uses(&self, id: ValueId) -> &[Use] {
        self.uses.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The position among the body's outputs, if the value is one.
    pub fn output_position(&self, id: ValueId) -> Option<usize> {
        self.outputs.get(&id).copied()
    }

    /// True for weights and other constants of this body.
    pub fn is_initializer(&self, id: ValueId) -> bool {
        matches!(self.producers.get(&id), Some(Producer::Initializer(_)))
    }
}

/// Values that a body reads and does not define, in order of first appearance.
pub fn captured(body: &Body) -> Vec<ValueId> {
    let mut defined: std::collections::HashSet<ValueId> = body.inputs.iter().copied().collect();
    defined.extend(body.initializers.iter().map(|(id, _)| *id));
    let mut seen = std::collections::HashSet::new();
    let mut captures = Vec::new();
    let mut read = |id: ValueId, defined: &std::collections::HashSet<ValueId>| {
        if !defined.contains(&id) && seen.insert(id) {
            captures.push(id);
        }
    };
    for node in &body.nodes {
        for id in node.present_inputs() {
            read(id, &defined);
        }
        for inner in node.bodies() {
            for id in captured(inner) {
                read(id, &defined);
            }
        }
        defined.extend(node.present_outputs());
    }
    for &id in &body.outputs {
        read(id, &defined);
    }
    captures
}
