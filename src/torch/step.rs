//! One compiled node: its operator and the slots of its inputs and outputs.

use std::collections::HashSet;
use std::sync::Arc;

use tch::{Device, Tensor};

use crate::base::{Error, Result};

use super::kernel::{Args, Kernel, OpError, OpResult};
use super::operator::Operator;
use super::wiring::{BodyWiring, Slot, StepWiring};

/// One compiled node.
pub(super) struct CompiledNode {
    /// Name of the node in messages.
    pub label: String,
    pub row: &'static Operator,
    pub kernel: Kernel,
    /// Slots of the node's inputs, then of its captured values.
    pub inputs: Vec<Option<Slot>>,
    /// Positions of inputs that a body of the node reads on the host.
    pub body_on_host: Vec<usize>,
    pub bodies: Vec<Arc<BodyWiring>>,
    pub outputs: Vec<Option<Slot>>,
}

/// Moves a step's tensor to the device and caches the copies of constants.
pub(super) type Mover<'a> = dyn FnMut(Slot, &Tensor) -> OpResult<Tensor> + 'a;

impl CompiledNode {
    /// Runs the operator. When the program's device is a GPU and any input is on it, the other inputs are moved to it,
    /// except those that the operator reads on the host.
    pub fn call(&self, inputs: &[Option<&Tensor>], device: Device, mover: &mut Mover) -> OpResult<Vec<Tensor>> {
        if device == Device::Cpu {
            return self.compute(&Args { inputs });
        }
        let on_device = |tensor: &Tensor| tensor.device() != Device::Cpu;
        let placed = |index: usize| !self.row.reads_on_host(index) && !self.row.shape_only;
        let any = inputs.iter().enumerate().any(|(index, input)| placed(index) && input.is_some_and(on_device));
        if !any {
            return self.compute(&Args { inputs });
        }
        let mut moved: Vec<Option<Tensor>> = Vec::with_capacity(inputs.len());
        for (index, input) in inputs.iter().enumerate() {
            moved.push(match (input, self.inputs[index]) {
                (Some(tensor), Some(slot)) if placed(index) && !on_device(tensor) => Some(mover(slot, tensor)?),
                _ => None,
            });
        }
        let inputs: Vec<Option<&Tensor>> =
            inputs.iter().zip(&moved).map(|(input, moved)| moved.as_ref().or(*input)).collect();
        self.compute(&Args { inputs: &inputs })
    }

    /// Runs the operator. In tests, a read on the host that the row does not name is a panic: on a GPU it would be a copy from
    /// the device that [`super::host_reads`] does not know of.
    fn compute(&self, args: &Args) -> OpResult<Vec<Tensor>> {
        #[cfg(test)]
        let outer = super::kernel::take_reads();
        let results = (self.kernel)(args);
        #[cfg(test)]
        for index in super::kernel::put_reads(outer) {
            let known = index.map_or(self.row.waits, |index| self.reads_on_host(index));
            assert!(known, "{} reads input {index:?} on the host", self.label);
        }
        results
    }

    /// True when the operator itself, or a body of it, reads input `index` on the host.
    pub(super) fn reads_on_host(&self, index: usize) -> bool {
        let own = match self.row.op_type {
            "If" => index == 0,
            "Loop" => index < 2,
            "Scan" => false,
            _ => self.row.reads_on_host(index),
        };
        own || self.body_on_host.contains(&index)
    }

    /// The step without its kernel.
    pub(super) fn wiring(&self) -> StepWiring {
        let on_host = (0..self.inputs.len()).filter(|&index| self.reads_on_host(index)).collect();
        let (inputs, outputs, bodies) = (self.inputs.clone(), self.outputs.clone(), self.bodies.clone());
        StepWiring { row: self.row, inputs, outputs, on_host, bodies }
    }

    /// The error for a failure of this step.
    pub fn error(&self, error: OpError, inputs: &[Option<&Tensor>]) -> Error {
        let shapes: Vec<String> = inputs
            .iter()
            .map(|input| match input {
                Some(tensor) => match tensor.f_kind() {
                    Ok(kind) => format!("{kind:?}{:?}", tensor.size()),
                    Err(_) => format!("{:?}", tensor.size()),
                },
                None => "-".into(),
            })
            .collect();
        Error::invalid(self.label.clone(), format!("{} (inputs: {})", error.0, shapes.join(", ")))
    }
}

/// Slots that a step reads on the host, and those that a step reads elsewhere: flags, lengths and shapes are among the first
/// alone.
pub(super) fn places_read(steps: &[CompiledNode]) -> [HashSet<Slot>; 2] {
    let (mut on_host, mut elsewhere) = (HashSet::new(), HashSet::new());
    for step in steps.iter().filter(|step| !step.row.shape_only) {
        for (index, slot) in step.inputs.iter().enumerate() {
            let place = if step.reads_on_host(index) { &mut on_host } else { &mut elsewhere };
            place.extend(slot);
        }
    }
    [on_host, elsewhere]
}

/// Passes a step's results to `put`.
///
/// Errors: `Error::Invalid` when the operator returned fewer results than the node has connected outputs.
pub(super) fn store(step: &CompiledNode, outputs: Vec<Tensor>, mut put: impl FnMut(Slot, Tensor)) -> Result<()> {
    let given = outputs.len();
    let mut outputs = outputs.into_iter();
    for (position, slot) in step.outputs.iter().enumerate() {
        let tensor = outputs.next().filter(Tensor::defined);
        match (slot, tensor) {
            (Some(slot), Some(tensor)) => put(*slot, tensor),
            (None, _) => {}
            (Some(_), None) => {
                let problem = format!("output {position} is wanted, {given} are computed");
                return Err(Error::invalid(step.label.clone(), problem));
            }
        }
    }
    Ok(())
}
