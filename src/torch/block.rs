//! Running steps: one call with its tensors on the right device, and the bodies of control-flow operators.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Result};

use super::compile::{Slot, Step};
use super::kernel::{Args, OpError, OpResult, axis_of};

/// Brings a step's tensor to the device; the place where copies of constants are remembered.
pub(super) type Mover<'a> = dyn FnMut(Slot, &Tensor) -> OpResult<Tensor> + 'a;

impl Step {
    /// Runs the operator. Where the program's device is a GPU and any input is there, the others are moved to it,
    /// except those that the operator reads on the host.
    pub fn call(&self, inputs: &[Option<&Tensor>], device: Device, mover: &mut Mover) -> OpResult<Vec<Tensor>> {
        if device == Device::Cpu {
            return (self.kernel)(&Args { inputs });
        }
        let on_device = |tensor: &Tensor| tensor.device() != Device::Cpu;
        let placed = |index: usize| !self.row.reads_on_host(index) && !self.row.shape_only;
        let any = inputs.iter().enumerate().any(|(index, input)| placed(index) && input.is_some_and(on_device));
        if !any {
            return (self.kernel)(&Args { inputs });
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
        (self.kernel)(&Args { inputs: &inputs })
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

/// Type and shape that a sub-graph says of an output.
pub(super) struct Declared {
    pub kind: Kind,
    pub shape: Vec<i64>,
}

/// Slots of the values that enter and leave a sub-graph.
pub(super) struct Ports {
    pub inputs: Vec<Slot>,
    pub outputs: Vec<Slot>,
    /// One entry per output.
    pub declared: Vec<Option<Declared>>,
}

/// A compiled sub-graph.
pub struct Block {
    steps: Vec<Step>,
    ports: Ports,
    constants: Vec<(Slot, Tensor)>,
    captures: Vec<(Slot, usize)>,
    /// After each step, what nobody reads any more.
    frees: Vec<Vec<Slot>>,
    device: Device,
}

impl Block {
    pub(super) fn new(
        steps: Vec<Step>,
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
        Block { steps, ports, constants, captures, frees, device }
    }

    /// Number of inputs of the body.
    pub fn input_count(&self) -> usize {
        self.ports.inputs.len()
    }

    /// Number of outputs of the body.
    pub fn output_count(&self) -> usize {
        self.ports.outputs.len()
    }

    /// A tensor without elements for output `index`, over whose steps `axis` runs, of a body that runs no time.
    ///
    /// Type and shape are those that the sub-graph says, as ONNX Runtime has it. Where it does not say them the body runs
    /// once on `inputs`.
    pub fn nothing(
        &self,
        args: &Args,
        index: usize,
        axis: i64,
        inputs: impl FnOnce() -> OpResult<Vec<Tensor>>,
    ) -> OpResult<Tensor> {
        let (kind, mut shape) = match self.ports.declared.get(index) {
            Some(Some(declared)) => (declared.kind, declared.shape.clone()),
            _ => {
                let untold = |e: OpError| {
                    OpError::new(format!(
                        "the body runs no time and does not say the type of its output {index}: {}",
                        e.0
                    ))
                };
                let outputs = inputs().and_then(|inputs| self.run(args, inputs)).map_err(untold)?;
                let output =
                    outputs.get(index).ok_or_else(|| OpError::new(format!("the body has no output {index}")))?;
                (output.f_kind()?, output.size())
            }
        };
        let axis = axis_of(axis, shape.len() + 1)?;
        shape.insert(axis as usize, 0);
        Ok(Tensor::f_zeros(&shape, (kind, Device::Cpu))?)
    }

    /// Runs the body: `inputs` are its own, `args` those of the node that carries it.
    pub fn run(&self, args: &Args, inputs: Vec<Tensor>) -> OpResult<Vec<Tensor>> {
        let mut values: HashMap<Slot, Tensor> = self.ports.inputs.iter().copied().zip(inputs).collect();
        values.extend(self.constants.iter().map(|(slot, tensor)| (*slot, tensor.shallow_clone())));
        for &(slot, position) in &self.captures {
            values.insert(slot, args.get(position)?.shallow_clone());
        }
        for (step, frees) in self.steps.iter().zip(&self.frees) {
            let outputs = {
                let inputs: Vec<Option<&Tensor>> =
                    step.inputs.iter().map(|slot| slot.and_then(|slot| values.get(&slot))).collect();
                let mut mover = |_: Slot, tensor: &Tensor| Ok(tensor.f_to_device(self.device)?);
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

/// Hands a step's results to `put`.
///
/// Errors: `Error::Invalid` when the operator gave fewer results than the node wants.
pub(super) fn store(step: &Step, outputs: Vec<Tensor>, mut put: impl FnMut(Slot, Tensor)) -> Result<()> {
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
