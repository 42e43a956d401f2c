//! Compiled sub-graphs of control-flow operators.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::kernel::{Args, OpError, OpResult, SubGraph, moved_to};
use super::step::{CompiledNode, store};
use super::wiring::{BodyWiring, Repetition, Slot};

/// Declared type and shape of a sub-graph's output.
pub(super) struct Declared {
    pub kind: Kind,
    pub shape: Vec<i64>,
}

/// Slots of a sub-graph's inputs and outputs.
pub(super) struct Ports {
    pub inputs: Vec<Slot>,
    pub outputs: Vec<Slot>,
    /// One entry per output.
    pub declared: Vec<Option<Declared>>,
}

/// A compiled sub-graph.
pub struct CompiledSubGraph {
    steps: Vec<CompiledNode>,
    ports: Ports,
    constants: Vec<(Slot, Tensor)>,
    captures: Vec<(Slot, usize)>,
    /// For each step, the slots that no later step reads.
    frees: Vec<Vec<Slot>>,
    device: Device,
}

impl CompiledSubGraph {
    pub(super) fn new(
        steps: Vec<CompiledNode>,
        ports: Ports,
        constants: Vec<(Slot, Tensor)>,
        captures: Vec<(Slot, usize)>,
        device: Device,
    ) -> Self {
        let mut last: HashMap<Slot, usize> = HashMap::new();
        for (number, step) in steps.iter().enumerate() {
            for &slot in step.inputs.iter().chain(&step.outputs).flatten() {
                last.insert(slot, number);
            }
        }
        let mut frees = vec![Vec::new(); steps.len()];
        for (slot, number) in last {
            if !ports.outputs.contains(&slot) {
                frees[number].push(slot);
            }
        }
        CompiledSubGraph { steps, ports, constants, captures, frees, device }
    }

    /// The body without its kernels.
    pub(super) fn wiring(&self, repetition: Repetition) -> BodyWiring {
        BodyWiring {
            repetition,
            steps: self.steps.iter().map(CompiledNode::wiring).collect(),
            inputs: self.ports.inputs.clone(),
            outputs: self.ports.outputs.clone(),
            constants: self.constants.iter().map(|(slot, _)| *slot).collect(),
            captures: self.captures.clone(),
        }
    }
}

impl SubGraph for CompiledSubGraph {
    fn input_count(&self) -> usize {
        self.ports.inputs.len()
    }

    fn output_count(&self) -> usize {
        self.ports.outputs.len()
    }

    fn declared(&self, index: usize) -> Option<(Kind, Vec<i64>)> {
        let declared = self.ports.declared.get(index)?.as_ref()?;
        Some((declared.kind, declared.shape.clone()))
    }

    fn run(&self, args: &Args, inputs: Vec<Tensor>) -> OpResult<Vec<Tensor>> {
        let mut values: HashMap<Slot, Tensor> = self.ports.inputs.iter().copied().zip(inputs).collect();
        values.extend(self.constants.iter().map(|(slot, tensor)| (*slot, tensor.shallow_clone())));
        for &(slot, position) in &self.captures {
            values.insert(slot, args.get(position)?.shallow_clone());
        }
        for (step, frees) in self.steps.iter().zip(&self.frees) {
            let outputs = {
                let inputs: Vec<Option<&Tensor>> =
                    step.inputs.iter().map(|slot| slot.and_then(|slot| values.get(&slot))).collect();
                let mut mover = |_: Slot, tensor: &Tensor| Ok(moved_to(tensor, self.device)?);
                step.call(&inputs, self.device, &mut mover)
                    .map_err(|error| OpError::new(step.error(error, &inputs).to_string()))?
            };
            store(step, outputs, |slot, tensor| {
                values.insert(slot, tensor);
            })
            .map_err(|error| OpError::new(error.to_string()))?;
            for slot in frees {
                values.remove(slot);
            }
        }
        self.ports
            .outputs
            .iter()
            .map(|slot| {
                values
                    .get(slot)
                    .map(Tensor::shallow_clone)
                    .ok_or_else(|| OpError::new("an output of the sub-graph has no value"))
            })
            .collect()
    }
}
