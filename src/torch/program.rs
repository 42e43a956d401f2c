//! Programs: compiled graphs.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Result, list_preview};
use crate::ir::{self, DataType, Dim, Model, ValueId, ValueType};

use super::compile::{Compiler, needed_nodes, value_ids};
use super::convert::{computed, computed_kind, data_type_of, kind_of, tensor_from_ir};
use super::host_reads::{HostFacts, HostReads};
use super::kernel::moved_to;
use super::op_error::{OpError, OpResult};
use super::options::Options;
use super::products::lowered;
use super::schedule::{ExecutionSchedule, ScheduleRequest, ScheduledNode, ShapeCache, ShapeCaches, Signature};
use super::step::{CompiledNode, places_read, store};
use super::weights::{self, FixedTensors, Hold, Shared};
use super::wiring::Slot;

/// A trainable weight: a leaf tensor with gradients. An optimiser may write to it in place between runs.
#[derive(Debug)]
pub struct Parameter {
    /// The initializer's value in the graph.
    pub id: ValueId,
    /// The initializer's name.
    pub name: String,
    /// Element type in the graph; the tensor itself is f32 or f64.
    pub dtype: DataType,
    /// Current value, in the shape of the initializer.
    pub tensor: Tensor,
}

impl Parameter {
    /// Another handle to the same weight.
    pub fn shared(&self) -> Self {
        let Parameter { id, name, dtype, tensor } = self;
        Parameter { id: *id, name: name.clone(), dtype: *dtype, tensor: tensor.shallow_clone() }
    }
}

/// A compiled graph. It can be sent to another thread; one thread at a time can use it.
pub struct Program {
    steps: Vec<CompiledNode>,
    producers: HashMap<Slot, usize>,
    names: Vec<String>,
    types: HashMap<Slot, ValueType>,
    by_name: HashMap<String, ValueId>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    frozen: HashMap<Slot, ir::Tensor>,
    parameters: Vec<Parameter>,
    trainable: HashMap<Slot, usize>,
    /// Slots that a step reads on the host, and those that a step reads elsewhere.
    places_read: [HashSet<Slot>; 2],
    /// Slots that are computed on the host, from shapes and small constants.
    resident: HashSet<Slot>,
    /// Slots on the host from which others are computed there.
    kept: HashSet<Slot>,
    device: Device,
    autocast: Option<Kind>,
    hold: Hold,
    /// Frozen weights and constants; programs that share weights hold the same tensors.
    shared: Arc<Shared>,
    state: RefCell<State>,
}

/// State that is kept between runs.
#[derive(Default)]
struct State {
    fixed: FixedTensors,
    /// Device copies of weights and constants that are stored on the host.
    moved: HashMap<Slot, Tensor>,
    schedules: Vec<ExecutionSchedule>,
    caches: ShapeCaches,
}

/// Moves the tensors of trainable and writable weights out of `frozen`. Also returns their positions by slot.
fn parameters_of(
    graph: &ir::Graph,
    options: &Options,
    frozen: &mut HashMap<Slot, ir::Tensor>,
) -> Result<(Vec<Parameter>, HashMap<Slot, usize>)> {
    let mut parameters = Vec::new();
    let mut trainable = HashMap::new();
    let leaves = options.trainable.iter().map(|id| (*id, true));
    for (id, gradient) in leaves.chain(options.writable.iter().map(|id| (*id, false))) {
        let name = graph.name(id);
        let Some(tensor) = frozen.remove(&id.index()) else {
            return Err(Error::invalid(
                format!("value `{name}`"),
                "is to be trained and is not an initializer, or is named twice",
            ));
        };
        if !tensor.dtype.is_float() {
            return Err(Error::invalid(
                format!("initializer `{name}`"),
                format!("is to be trained and has type {}", tensor.dtype),
            )
            .remedy("finetune the float model"));
        }
        let kind = if tensor.dtype == DataType::Double { Kind::Double } else { Kind::Float };
        let leaf = tensor_from_ir(name, &tensor)?
            .f_to_device(options.device)
            .and_then(|t| t.f_to_kind(kind))
            .and_then(|t| t.detach().f_set_requires_grad(gradient))
            .map_err(|e| Error::engine("LibTorch", format!("initializer `{name}`"), e))?;
        // The copy takes the place of what is in the file.
        tensor.release();
        trainable.insert(id.index(), parameters.len());
        parameters.push(Parameter { id, name: name.to_string(), dtype: tensor.dtype, tensor: leaf });
    }
    Ok((parameters, trainable))
}

impl Program {
    /// Compiles a graph, or the part of it between `options.inputs` and `options.outputs`.
    ///
    /// Errors: `Error::Unsupported` with the full list of unsupported operators (domain, operator, version, reason) or
    /// of unknown attributes; `Error::Invalid` when a trainable value is not a floating-point initializer.
    pub fn compile(model: &Model, options: &Options) -> Result<Program> {
        let graph = &model.graph;
        let body = &graph.body;
        let inputs = options.inputs.clone().unwrap_or_else(|| {
            body.inputs
                .iter()
                .copied()
                .filter(|&id| body.initializers.iter().all(|(weight, _)| *weight != id))
                .collect()
        });
        let outputs = options.outputs.clone().unwrap_or_else(|| body.outputs.clone());
        let mut compiler = Compiler::new(model, options.autocast, options.device);
        let steps = if options.inputs.is_none() && options.outputs.is_none() {
            compiler.top_level(body.nodes.iter(), &outputs)?
        } else {
            let needed = needed_nodes(model, &inputs, &outputs);
            let nodes = body.nodes.iter().zip(needed).filter(|(_, needed)| *needed).map(|(node, _)| node);
            compiler.top_level(nodes, &outputs)?
        };
        let mut producers = HashMap::new();
        for (number, step) in steps.iter().enumerate() {
            for &slot in step.outputs.iter().flatten() {
                producers.insert(slot, number);
            }
        }
        let names = compiler.into_names();
        let mut types = HashMap::new();
        for &id in &body.inputs {
            if let Some(ty) = &graph.value(id).ty {
                types.insert(id.index(), ty.clone());
            }
        }
        let mut frozen: HashMap<Slot, ir::Tensor> = HashMap::new();
        for (id, tensor) in &body.initializers {
            frozen.insert(id.index(), tensor.clone());
        }
        let (parameters, trainable) = parameters_of(graph, options, &mut frozen)?;
        // The first value of a name counts. Names in use are distinct.
        let mut by_name = HashMap::new();
        for (index, id) in value_ids(model) {
            by_name.entry(names[index].clone()).or_insert(id);
        }
        let mut program = Program {
            places_read: places_read(&steps),
            resident: HashSet::new(),
            kept: HashSet::new(),
            steps,
            producers,
            names,
            types,
            by_name,
            inputs,
            outputs,
            frozen,
            parameters,
            trainable,
            device: options.device,
            autocast: options.autocast,
            hold: options.hold,
            shared: Arc::default(),
            state: RefCell::default(),
        };
        HostReads { resident: program.resident, kept: program.kept, .. } = program.where_read(&|_| false);
        Ok(program)
    }

    /// The inputs from [`Options`], or the graph's inputs without a default.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The outputs from [`Options`], or the graph's outputs.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// The trainable weights, then the writable ones, each in the order of the options.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Replaces this program's weights by those of another program. Trainable weights are this program's own gradient
    /// leaves over the same memory, so both programs see an optimiser's updates. Each frozen weight and constant is one
    /// tensor, created by the first program that reads it.
    ///
    /// Errors: `Error::Invalid` unless both are compiled from the same graph and train the same initializers.
    pub fn share_weights(&mut self, other: &Program) -> Result<()> {
        let alike = (&self.names, self.device, self.autocast, self.hold)
            == (&other.names, other.device, other.autocast, other.hold);
        if !alike {
            return Err(Error::invalid("the program", "is of another graph than the one that it is to share with"));
        }
        self.shared = other.shared.clone();
        if !self.parameters.iter().map(|own| own.id).eq(other.parameters.iter().map(|theirs| theirs.id)) {
            return Err(Error::invalid("the program", "trains other weights than the one that it is to share with"));
        }
        for (own, theirs) in self.parameters.iter_mut().zip(&other.parameters) {
            own.tensor = theirs
                .tensor
                .f_detach()
                .and_then(|alias| alias.f_set_requires_grad(theirs.tensor.requires_grad()))
                .map_err(|e| Error::engine("LibTorch", format!("initializer `{}`", own.name), e))?;
        }
        Ok(())
    }

    /// Device of the program.
    pub fn device(&self) -> Device {
        self.device
    }

    /// True when an operator reads the value on the host, such as a flag or a length.
    pub fn reads_on_host(&self, id: ValueId) -> bool {
        self.places_read[0].contains(&id.index())
    }

    /// True for a value that is not moved to a GPU where a run is given it in host memory: one that an operator reads on the
    /// host, or a small one that such values are computed from.
    pub fn stays_on_host(&self, id: ValueId, tensor: &Tensor) -> bool {
        self.stays(id.index(), tensor)
    }

    fn stays(&self, slot: Slot, tensor: &Tensor) -> bool {
        self.places_read[0].contains(&slot)
            || self.resident.contains(&slot) && tensor.numel() as u64 <= weights::HOST_INTEGERS
    }

    /// True when an operator reads what the value holds, not only its shape.
    pub fn reads(&self, id: ValueId) -> bool {
        self.places_read.iter().any(|slots| slots.contains(&id.index()))
    }

    /// Values that operators read on the host and that are not there by themselves, as shapes and small constants are:
    /// those that depend on inputs for which `held` is true and on nothing on the GPU, which a program on the CPU can
    /// compute for this one, and the names of those that a run copies from the GPU.
    pub fn host_reads(&self, held: impl Fn(ValueId) -> bool) -> (Vec<ValueId>, Vec<&str>) {
        let ids: HashMap<Slot, ValueId> = self.by_name.values().map(|id| (id.index(), *id)).collect();
        let HostReads { ahead, copied, .. } = self.where_read(&|slot| ids.get(&slot).is_some_and(|id| held(*id)));
        let names = copied.into_iter().map(|slot| self.names[slot].as_str());
        (ahead.into_iter().filter_map(|slot| ids.get(&slot).copied()).collect(), names.collect())
    }

    fn where_read(&self, held: &dyn Fn(Slot) -> bool) -> HostReads {
        let named: HashSet<Slot> = self.by_name.values().map(|id| id.index()).collect();
        let facts = HostFacts {
            given: &self.inputs.iter().map(|id| id.index()).collect(),
            held,
            frozen: &|slot| self.frozen.contains_key(&slot),
            small: &|slot| self.frozen.get(&slot).is_some_and(weights::stays_on_host),
            named: &|slot| named.contains(&slot),
            read: &self.places_read,
        };
        HostReads::of(&self.steps, &facts)
    }

    /// The name of a value.
    pub fn name(&self, id: ValueId) -> &str {
        self.names.get(id.index()).map_or("", String::as_str)
    }

    /// The value with this name.
    ///
    /// Errors: `Error::Invalid` when the graph has no such value.
    pub fn value(&self, name: &str) -> Result<ValueId> {
        self.by_name
            .get(name)
            .copied()
            .filter(|_| !name.is_empty())
            .ok_or_else(|| Error::invalid("the graph", format!("has no value `{name}`")))
    }

    /// Computes `outputs` from `inputs`; both may be any values of the compiled part. A value among the inputs is not
    /// computed, so a program can be run in pieces. Gradients are tracked unless the call is inside `tch::no_grad`.
    ///
    /// Inputs may be on any device. Outputs are on the program's device, except small shape values, which stay on the
    /// host. For the graph's 16-bit floats, inputs may be 16-bit or f32, and outputs are f32. Outputs may share memory
    /// with inputs, but not with weights.
    ///
    /// Errors: `Error::Invalid` when an input is missing or does not match its declared type; when an operator rejects
    /// its tensors, naming the node.
    pub fn run(&self, inputs: &[(ValueId, Tensor)], outputs: &[ValueId]) -> Result<Vec<Tensor>> {
        let slots: Vec<Slot> = inputs.iter().map(|(id, _)| id.index()).collect();
        let wanted: Vec<Slot> = outputs.iter().map(|id| id.index()).collect();
        let (signature, mut values) = self.admit(inputs)?;
        let mut state = self.state.borrow_mut();
        let State { fixed, moved, schedules, caches } = &mut *state;
        let number = self.schedule_number(schedules, slots, wanted)?;
        let schedule = &schedules[number];
        for &slot in &schedule.weights {
            let (Some(tensor), None) = (self.frozen.get(&slot), fixed.get(slot, &schedule.lowered)) else { continue };
            let weight = self.shared.weight((slot, schedule.lowered.contains(&slot)), || {
                let name = &self.names[slot];
                let weight = weights::frozen(name, tensor, self.device, self.hold)?;
                let named = |e: OpError| Error::engine("LibTorch", format!("tensor `{name}`"), e.0);
                self.as_read(slot, &weight, &schedule.lowered).map_err(named)
            })?;
            fixed.insert(slot, weight, &schedule.lowered);
        }
        let mut trained: HashMap<Slot, Tensor> = HashMap::new();
        for &slot in &schedule.weights {
            if let Some(&number) = self.trainable.get(&slot) {
                trained.insert(slot, self.parameters[number].tensor.shallow_clone());
            }
        }
        if !schedule.constant_kept.iter().all(|&slot| fixed.get(slot, &schedule.lowered).is_some()) {
            let _guard = tch::no_grad_guard();
            let constants = self.shared.constants(&schedule.constant_kept, &schedule.lowered, || {
                let (mut made, mut constants) = (HashMap::new(), Vec::new());
                let weights = |slot: Slot| fixed.get(slot, &schedule.lowered);
                self.execute(
                    &schedule.constant,
                    &mut made,
                    &weights,
                    &schedule.lowered,
                    moved,
                    &mut |slot, tensor| {
                        if schedule.constant_kept.contains(&slot) {
                            let constant = self.as_read(slot, tensor, &schedule.lowered)?;
                            let narrowed = self.hold == Hold::Stored && !schedule.lowered.contains(&slot);
                            constants.push((slot, if narrowed { weights::narrowed(constant)? } else { constant }));
                        }
                        Ok(())
                    },
                )?;
                Ok(constants)
            })?;
            constants.into_iter().for_each(|(slot, tensor)| fixed.insert(slot, tensor, &schedule.lowered));
        }
        let fixed = |slot: Slot| trained.get(&slot).or_else(|| fixed.get(slot, &schedule.lowered));
        match caches.of(number, &signature) {
            Some(cache) => {
                for (&slot, tensor) in &cache.values {
                    values.insert(slot, tensor.shallow_clone());
                }
                self.execute(&schedule.lean, &mut values, &fixed, &schedule.lowered, moved, &mut |_, _| Ok(()))?;
            }
            None => {
                let mut cache = ShapeCache { schedule: number, signature, values: HashMap::new() };
                let kept = &schedule.static_kept;
                let stays =
                    |slot: Slot, tensor: &Tensor| match schedule.outputs.contains(&slot) || self.kept.contains(&slot) {
                        true => self.stays(slot, tensor),
                        false => self.places_read[0].contains(&slot),
                    };
                self.execute(&schedule.full, &mut values, &fixed, &schedule.lowered, moved, &mut |slot, tensor| {
                    if kept.contains(&slot) {
                        let place = if stays(slot, tensor) { tensor.device() } else { self.device };
                        cache.values.insert(slot, moved_to(tensor, place)?.detach());
                    }
                    Ok(())
                })?;
                caches.keep(cache);
            }
        }
        self.results(schedule, &values, &fixed)
    }

    /// The schedule's outputs; those that share memory with a weight are copied.
    fn results<'a>(
        &self,
        schedule: &ExecutionSchedule,
        values: &'a HashMap<Slot, Tensor>,
        fixed: &impl Fn(Slot) -> Option<&'a Tensor>,
    ) -> Result<Vec<Tensor>> {
        let mut results = Vec::with_capacity(schedule.outputs.len());
        for &slot in &schedule.outputs {
            let own = values.get(&slot);
            let tensor = own
                .or_else(|| fixed(slot))
                .ok_or_else(|| Error::invalid(format!("value `{}`", self.names[slot]), "was not computed"))?;
            let shared = own.is_none() || schedule.static_kept.contains(&slot);
            let result = if shared { copied(tensor, self.hold) } else { Ok(tensor.shallow_clone()) };
            results.push(result.map_err(|e| Error::engine("LibTorch", format!("value `{}`", self.names[slot]), e))?);
        }
        Ok(results)
    }

    /// Moves inputs to the program's device, unless they stay on the host, converts them to the computed kinds, and returns
    /// their shapes and kinds too.
    fn admit(&self, inputs: &[(ValueId, Tensor)]) -> Result<(Signature, HashMap<Slot, Tensor>)> {
        let mut signature: Signature = Vec::with_capacity(inputs.len());
        let mut values: HashMap<Slot, Tensor> = HashMap::with_capacity(64);
        for (id, tensor) in inputs {
            let engine = |e| Error::engine("LibTorch", format!("input `{}`", self.name(*id)), e);
            let kind = tensor.f_kind().map_err(engine)?;
            self.check_input(*id, tensor, kind)?;
            let kind = if Some(kind) == self.autocast { kind } else { computed_kind(kind) };
            signature.push((tensor.size(), kind));
            let device = if self.stays_on_host(*id, tensor) { tensor.device() } else { self.device };
            let tensor = moved_to(tensor, device).and_then(|tensor| tensor.f_to_kind(kind));
            values.insert(id.index(), tensor.map_err(engine)?);
        }
        Ok((signature, values))
    }

    /// The place of the schedule from these slots to those, which is made where there is none.
    fn schedule_number(
        &self,
        known: &mut Vec<ExecutionSchedule>,
        inputs: Vec<Slot>,
        outputs: Vec<Slot>,
    ) -> Result<usize> {
        match known.iter().position(|schedule| schedule.inputs == inputs && schedule.outputs == outputs) {
            Some(position) => Ok(position),
            None => {
                known.push(self.schedule(inputs, outputs)?);
                Ok(known.len() - 1)
            }
        }
    }

    fn schedule(&self, inputs: Vec<Slot>, outputs: Vec<Slot>) -> Result<ExecutionSchedule> {
        let request = ScheduleRequest {
            steps: &self.steps,
            producers: &self.producers,
            frozen: &|slot| self.frozen.contains_key(&slot),
            trainable: &|slot| self.trainable.contains_key(&slot),
            autocast: self.autocast.is_some(),
            keeps_quantised: self.hold == Hold::Stored,
        };
        ExecutionSchedule::new(&request, inputs, outputs).map_err(|lacking| {
            let names: Vec<&str> = lacking.iter().map(|&slot| self.names[slot].as_str()).collect();
            Error::invalid("the run", format!("no value for {}", list_preview(&names, 8)))
                .remedy("give these inputs, or compile the part of the graph that makes them")
        })
    }

    /// A frozen weight or a constant in the form that a schedule reads: for a lowered one, on the device and in the
    /// autocast kind.
    fn as_read(&self, slot: Slot, tensor: &Tensor, lowers: &HashSet<Slot>) -> OpResult<Tensor> {
        if lowers.contains(&slot) {
            return lowered(&tensor.f_to_device(self.device)?, self.autocast);
        }
        Ok(tensor.shallow_clone())
    }

    fn execute<'v>(
        &self,
        nodes: &[ScheduledNode],
        values: &mut HashMap<Slot, Tensor>,
        fixed: &dyn Fn(Slot) -> Option<&'v Tensor>,
        lowers: &HashSet<Slot>,
        moved: &mut HashMap<Slot, Tensor>,
        made: &mut dyn FnMut(Slot, &Tensor) -> OpResult<()>,
    ) -> Result<()> {
        for node in nodes {
            let step = &self.steps[node.step];
            let outputs = {
                let mut inputs: Vec<Option<&Tensor>> = step
                    .inputs
                    .iter()
                    .map(|slot| slot.and_then(|slot| values.get(&slot).or_else(|| fixed(slot))))
                    .collect();
                let widened = self.widened(step, &inputs, values, lowers)?;
                widened.iter().for_each(|(index, tensor)| inputs[*index] = Some(tensor));
                let mut mover = |slot: Slot, tensor: &Tensor| {
                    if values.contains_key(&slot) {
                        return Ok(moved_to(tensor, self.device)?);
                    }
                    if let Some(copy) = moved.get(&slot) {
                        return Ok(copy.shallow_clone());
                    }
                    let copy = moved_to(tensor, self.device)?;
                    moved.insert(slot, copy.shallow_clone());
                    Ok(copy)
                };
                step.call(&inputs, self.device, &mut mover).map_err(|error| step.error(error, &inputs))?
            };
            let mut failed = None;
            store(step, outputs, |slot, tensor| {
                if let Err(error) = made(slot, &tensor) {
                    failed = Some(error);
                }
                // A value from the caller is not replaced by the step's result.
                values.entry(slot).or_insert(tensor);
            })?;
            if let Some(error) = failed {
                return Err(step.error(error, &[]));
            }
            for slot in &node.frees {
                values.remove(slot);
            }
        }
        Ok(())
    }

    /// The inputs of a step that are stored in 16 bits, widened to the kind in which the step computes.
    fn widened(
        &self,
        step: &CompiledNode,
        inputs: &[Option<&Tensor>],
        values: &HashMap<Slot, Tensor>,
        lowers: &HashSet<Slot>,
    ) -> Result<Vec<(usize, Tensor)>> {
        let mut widened = Vec::new();
        if self.hold == Hold::Widened || step.row.shape_only {
            return Ok(widened);
        }
        for (index, (slot, tensor)) in step.inputs.iter().zip(inputs).enumerate() {
            let (Some(slot), Some(tensor)) = (slot, tensor) else { continue };
            if !values.contains_key(slot) && !lowers.contains(slot) {
                let wide = computed(&self.names[*slot], tensor.shallow_clone())?;
                widened.push((index, wide));
            }
        }
        Ok(widened)
    }

    fn check_input(&self, id: ValueId, tensor: &Tensor, kind: Kind) -> Result<()> {
        let Some(ValueType::Tensor { dtype, shape }) = self.types.get(&id.index()) else { return Ok(()) };
        let subject = || format!("input `{}`", self.name(id));
        let found = data_type_of(kind);
        let float = |dtype: Option<DataType>| dtype.is_some_and(DataType::is_float);
        let castable = self.autocast.is_some() && float(found) && dtype.is_float()
            || kind_of(*dtype).is_some_and(|declared| computed_kind(declared) == kind);
        if found != Some(*dtype) && !castable {
            return Err(Error::invalid(subject(), format!("is {kind:?}, the graph declares {dtype}"))
                .remedy("cast the array to that type"));
        }
        let size = tensor.size();
        if let Some(shape) = shape {
            let fits = shape.len() == size.len()
                && shape
                    .iter()
                    .zip(&size)
                    .all(|(dim, &size)| !matches!(dim, Dim::Known(known) if *known != size && *known >= 0));
            if !fits {
                let declared: Vec<String> = shape.iter().map(ToString::to_string).collect();
                let problem = format!("has shape {size:?}, the graph declares [{}]", declared.join(", "));
                return Err(Error::invalid(subject(), problem));
            }
        }
        Ok(())
    }
}

/// A copy of a tensor with its own memory.
fn copied(tensor: &Tensor, hold: Hold) -> std::result::Result<Tensor, tch::TchError> {
    let mut copy = tensor.f_zeros_like()?;
    copy.f_copy_(tensor)?;
    if hold == Hold::Stored { copy.f_to_kind(computed_kind(tensor.f_kind()?)) } else { Ok(copy) }
}

#[cfg(test)]
#[path = "host_reads_tests.rs"]
mod host_reads_tests;
#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
