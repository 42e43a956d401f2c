//! Where the bodies of `If`, `Loop` and `Scan` compute their values in a program on a GPU, and for which of them a run waits.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::wiring::{BodyWiring, Repetition, Slot};

/// For each output of a node with bodies: true when it is computed on the host. `on_host` says so of the node's inputs, and
/// `copied` receives what the bodies compute on the GPU and read on the host: operands, conditions of loops, and the first
/// output of an operator that reads numbers of its own.
pub(super) fn outputs_on_host(
    inputs: &[Option<Slot>],
    bodies: &[Arc<BodyWiring>],
    on_host: &dyn Fn(Slot) -> bool,
    copied: &mut BTreeSet<Slot>,
) -> Vec<bool> {
    let given: Vec<bool> = inputs.iter().map(|slot| slot.is_none_or(on_host)).collect();
    let outputs = bodies.iter().map(|body| body.outputs_on_host(&given, copied));
    // The branches of `If` give the same outputs.
    outputs.reduce(|all, own| all.iter().zip(own).map(|(all, own)| *all && own).collect()).unwrap_or_default()
}

impl BodyWiring {
    fn outputs_on_host(&self, given: &[bool], copied: &mut BTreeSet<Slot>) -> Vec<bool> {
        // Inputs from `first` on return as outputs from `returned` on.
        let (first, returned, carried) = match self.repetition {
            Repetition::Once => (0, 0, 0),
            Repetition::Loop => (2, 1, self.inputs.len().saturating_sub(2)),
            Repetition::Scan { slices } => (0, 0, self.inputs.len().saturating_sub(slices)),
        };
        let loops = matches!(self.repetition, Repetition::Loop);
        let place = |position: usize| loops && position < first || given.get(position).copied().unwrap_or(false);
        let begun: Vec<bool> = (0..self.inputs.len()).map(place).collect();
        let mut received = begun.clone();
        loop {
            let (outputs, waits) = self.turn(given, &begun, &received);
            let returns = |position: usize| outputs.get(returned + position).copied().unwrap_or(false);
            let next = |position: usize, place: bool| match position.checked_sub(first) {
                Some(value) if value < carried => place && returns(value),
                _ => place,
            };
            let next: Vec<bool> = received.iter().enumerate().map(|(position, &place)| next(position, place)).collect();
            if next != received {
                // A turn receives what the one before computed.
                received = next;
                continue;
            }
            copied.extend(waits);
            if loops && outputs.first() == Some(&false) {
                copied.extend(self.outputs.first());
            }
            let last = &received[first.min(received.len())..][..carried];
            return last.iter().chain(outputs.iter().skip(returned + carried)).copied().collect();
        }
    }

    /// One turn: for each output, true when it is computed on the host; and the values for which the turn waits. Those that
    /// are on the GPU when the body begins are left to the scope outside.
    fn turn(&self, given: &[bool], begun: &[bool], received: &[bool]) -> (Vec<bool>, BTreeSet<Slot>) {
        let mut host: HashSet<Slot> = self.constants.iter().copied().collect();
        let mut outside: HashSet<Slot> = HashSet::new();
        let own = self.inputs.iter().zip(begun.iter().zip(received));
        let captured = self.captures.iter().map(|(slot, position)| (slot, (&given[*position], &given[*position])));
        for (slot, (begun, received)) in own.chain(captured) {
            if *received {
                host.insert(*slot);
            }
            if !begun {
                outside.insert(*slot);
            }
        }
        let mut waits = BTreeSet::new();
        for step in &self.steps {
            let on_host = |slot: &Slot| host.contains(slot);
            let read = step.on_host.iter().filter_map(|&index| step.inputs[index]);
            waits.extend(read.filter(|slot| !on_host(slot) && !outside.contains(slot)));
            let all = step.inputs.iter().flatten().all(on_host);
            if step.row.waits && !all {
                waits.extend(step.outputs.iter().flatten().next());
            }
            let places = match step.bodies.is_empty() {
                true => vec![step.row.shape_only || all; step.outputs.len()],
                false => outputs_on_host(&step.inputs, &step.bodies, &|slot| host.contains(&slot), &mut waits),
            };
            host.extend(step.outputs.iter().zip(places).filter(|(_, place)| *place).filter_map(|(slot, _)| *slot));
        }
        (self.outputs.iter().map(|slot| host.contains(slot)).collect(), waits)
    }
}
