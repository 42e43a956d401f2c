//! Assigns nodes and weights to the layers that use them.

use std::collections::{BTreeSet, HashMap};

use crate::ir::{Body, ValueId};

use super::chain::Chain;
use super::dataflow::data_inputs;
use super::layer::Layer;
use super::owner::Owner;

/// Owners of all nodes and weights of a body.
pub struct Owners {
    /// One per node of the body, in the same order.
    pub nodes: Vec<Owner>,
    /// One per initializer of the body.
    pub weights: HashMap<ValueId, Owner>,
}

impl Owners {
    /// A node on a layer's path belongs to that layer. Any other node belongs to the owners of its readers. A node
    /// whose outputs are only graph outputs (such as the last cast of a cache) belongs to the owners of its inputs. The
    /// stream's own nodes before, between and after the layers belong to no layer.
    pub fn new(body: &Body, chain: &Chain, layers: &[Layer]) -> Self {
        let mut fixed: HashMap<usize, usize> = HashMap::new();
        for layer in layers {
            fixed.extend(layer.path.iter().map(|&node| (node, layer.index)));
        }
        let mut nodes = vec![Owner::default(); body.nodes.len()];
        let mut readers: HashMap<ValueId, Owner> = HashMap::new();
        for number in (0..body.nodes.len()).rev() {
            let owner = match fixed.get(&number) {
                Some(&layer) => Owner { layers: BTreeSet::from([layer]), outside: false },
                None if chain.level[number].is_some() => Owner { layers: BTreeSet::new(), outside: true },
                None => {
                    let mut owner = Owner::default();
                    for output in body.nodes[number].present_outputs() {
                        if let Some(readers) = readers.get(&output) {
                            owner.merge(readers);
                        }
                    }
                    if owner == Owner::default() {
                        owner = inputs_owner(body, number, &fixed);
                    }
                    owner
                }
            };
            for input in data_inputs(body, number) {
                readers.entry(input).or_default().merge(&owner);
            }
            nodes[number] = owner;
        }
        let weights = body
            .initializers
            .iter()
            .map(|(id, _)| (*id, readers.remove(id).unwrap_or(Owner { layers: BTreeSet::new(), outside: true })))
            .collect();
        Owners { nodes, weights }
    }
}

/// The layer whose values an unread node reads, or outside.
fn inputs_owner(body: &Body, number: usize, fixed: &HashMap<usize, usize>) -> Owner {
    let mut owner = Owner::default();
    let inputs: BTreeSet<ValueId> = data_inputs(body, number).into_iter().collect();
    for (node, layer) in fixed {
        if body.nodes[*node].present_outputs().any(|output| inputs.contains(&output)) {
            owner.layers.insert(*layer);
        }
    }
    owner.outside = owner.layers.len() != 1;
    owner
}
