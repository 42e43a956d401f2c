//! The order of the steps from a set of inputs to a set of outputs, and which results are cached between runs.

use std::collections::{HashMap, HashSet};

use tch::{Kind, Tensor};

use super::step::CompiledNode;
use super::wiring::Slot;

/// Frequency at which a step must run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Once per program: depends on frozen weights only.
    Constant,
    /// Once per set of input shapes.
    Static,
    /// In every run.
    Dynamic,
}

/// A step number, and the slots that no later step reads.
pub(super) struct ScheduledNode {
    pub step: usize,
    pub frees: Vec<Slot>,
}

/// Shapes and kinds of the inputs of a run.
pub(super) type Signature = Vec<(Vec<i64>, Kind)>;

/// Cached values for one signature of a schedule.
pub(super) struct ShapeCache {
    /// The schedule's number.
    pub schedule: usize,
    pub signature: Signature,
    pub values: HashMap<Slot, Tensor>,
}

impl ShapeCache {
    fn size_bytes(&self) -> usize {
        self.values.values().map(spanned_bytes).sum()
    }
}

/// Bytes from a tensor's first element to its last; an axis that is expanded without a copy counts once.
fn spanned_bytes(tensor: &Tensor) -> usize {
    if tensor.numel() == 0 {
        return 0;
    }
    let reach = |(size, stride): (&i64, &i64)| (size - 1).unsigned_abs().saturating_mul(stride.unsigned_abs());
    let last: u64 = tensor.size().iter().zip(&tensor.stride()).map(reach).fold(0, u64::saturating_add);
    let width = tensor.f_kind().map_or(8, |kind| kind.elt_size_in_bytes());
    usize::try_from(last).map_or(usize::MAX, |last| last.saturating_add(1).saturating_mul(width))
}

/// Bounds on the number and memory of a program's caches; the least recently used ones are evicted.
const MAX_CACHES: usize = 256;
pub(super) const MAX_CACHES_BYTES: usize = 64 << 20;

/// The caches of a program, the most recently used last.
#[derive(Default)]
pub(super) struct ShapeCaches(Vec<ShapeCache>);

impl ShapeCaches {
    /// The cache for a signature, which becomes the most recently used one.
    pub fn of(&mut self, schedule: usize, signature: &Signature) -> Option<&ShapeCache> {
        let position = self.0.iter().position(|cache| cache.schedule == schedule && cache.signature == *signature)?;
        let cache = self.0.remove(position);
        self.0.push(cache);
        self.0.last()
    }

    /// Adds a cache. One that alone exceeds the memory limit is not kept; its values are computed in every run.
    pub fn keep(&mut self, cache: ShapeCache) {
        if cache.size_bytes() > MAX_CACHES_BYTES {
            return;
        }
        self.0.push(cache);
        let mut total = 0usize;
        // From the most recent one, as many as the limits allow.
        let kept = self.0.iter().rev().take(MAX_CACHES).take_while(|cache| {
            total = total.saturating_add(cache.size_bytes());
            total <= MAX_CACHES_BYTES
        });
        let gone = self.0.len() - kept.count();
        self.0.drain(..gone);
    }

    /// Memory of all caches.
    #[cfg(test)]
    pub fn size_bytes(&self) -> usize {
        self.0.iter().map(ShapeCache::size_bytes).sum()
    }
}

/// The steps from a set of inputs to a set of outputs.
pub(super) struct ExecutionSchedule {
    pub inputs: Vec<Slot>,
    pub outputs: Vec<Slot>,
    /// Constant steps, which run once per program.
    pub constant: Vec<ScheduledNode>,
    /// Results of constant steps that other steps read.
    pub constant_kept: HashSet<Slot>,
    /// Steps of the first run with a signature: static and dynamic ones.
    pub full: Vec<ScheduledNode>,
    /// Steps of later runs: dynamic ones only.
    pub lean: Vec<ScheduledNode>,
    /// Results of static steps that dynamic steps or the caller read.
    pub static_kept: HashSet<Slot>,
    /// Weights that the steps or the caller read.
    pub weights: Vec<Slot>,
    /// Frozen weights and constants that are only read in the autocast kind.
    pub lowered: HashSet<Slot>,
}

/// Input for computing a schedule.
pub(super) struct ScheduleRequest<'a> {
    pub steps: &'a [CompiledNode],
    /// The step that produces each slot.
    pub producers: &'a HashMap<Slot, usize>,
    pub frozen: &'a dyn Fn(Slot) -> bool,
    pub trainable: &'a dyn Fn(Slot) -> bool,
    /// True when matrix products run in another kind than that of their operands.
    pub autocast: bool,
    /// True when quantised weights are dequantised in every run and not once.
    pub keeps_quantised: bool,
}

impl ExecutionSchedule {
    /// Computes the schedule. Errors: the slots that have no value.
    pub fn new(
        request: &ScheduleRequest,
        inputs: Vec<Slot>,
        outputs: Vec<Slot>,
    ) -> Result<ExecutionSchedule, Vec<Slot>> {
        let given: HashSet<Slot> = inputs.iter().copied().collect();
        let mut needed = vec![false; request.steps.len()];
        let mut seen = HashSet::new();
        let mut lacking = Vec::new();
        let mut weights = Vec::new();
        let mut stack: Vec<Slot> = outputs.clone();
        while let Some(slot) = stack.pop() {
            if given.contains(&slot) || !seen.insert(slot) {
                continue;
            }
            if let Some(&step) = request.producers.get(&slot) {
                needed[step] = true;
                stack.extend(request.steps[step].inputs.iter().flatten());
            } else if (request.frozen)(slot) || (request.trainable)(slot) {
                weights.push(slot);
            } else {
                lacking.push(slot);
            }
        }
        if !lacking.is_empty() {
            lacking.sort_unstable();
            return Err(lacking);
        }
        let order: Vec<usize> = (0..needed.len()).filter(|&step| needed[step]).collect();
        let classes = classify(request, &given, &order);
        let wanted: HashSet<Slot> = outputs.iter().copied().collect();
        let kept = |class: Class| -> HashSet<Slot> {
            let made: HashSet<Slot> = order
                .iter()
                .filter(|step| classes[*step] == class)
                .flat_map(|&step| request.steps[step].outputs.iter().flatten().copied())
                .collect();
            let read = order
                .iter()
                .filter(|step| classes[*step] != class)
                .flat_map(|&step| request.steps[step].inputs.iter().flatten().copied());
            read.chain(outputs.iter().copied()).filter(|slot| made.contains(slot)).collect()
        };
        let nodes = |keep: &dyn Fn(Class) -> bool| -> Vec<ScheduledNode> {
            let chosen: Vec<usize> = order.iter().copied().filter(|step| keep(classes[step])).collect();
            let mut last: HashMap<Slot, usize> = HashMap::new();
            for (node, &step) in chosen.iter().enumerate() {
                for &slot in request.steps[step].inputs.iter().chain(&request.steps[step].outputs).flatten() {
                    last.insert(slot, node);
                }
            }
            let mut nodes: Vec<ScheduledNode> =
                chosen.into_iter().map(|step| ScheduledNode { step, frees: Vec::new() }).collect();
            for (slot, node) in last {
                if !wanted.contains(&slot) {
                    nodes[node].frees.push(slot);
                }
            }
            nodes
        };
        let constant = nodes(&|class| class == Class::Constant);
        let full = nodes(&|class| class != Class::Constant);
        let lean = nodes(&|class| class == Class::Dynamic);
        let (constant_kept, static_kept) = (kept(Class::Constant), kept(Class::Static));
        let mut lowered = HashSet::new();
        if request.autocast {
            let exact: HashSet<Slot> = order.iter().flat_map(|&step| exact_inputs(&request.steps[step])).collect();
            let frozen = weights.iter().filter(|&&slot| (request.frozen)(slot));
            let fixed = frozen.chain(&constant_kept).copied();
            lowered.extend(fixed.filter(|slot| !exact.contains(slot) && !wanted.contains(slot)));
        }
        Ok(ExecutionSchedule { inputs, outputs, constant, constant_kept, full, lean, static_kept, weights, lowered })
    }
}

/// Inputs of a step that must keep their own element type.
fn exact_inputs(step: &CompiledNode) -> impl Iterator<Item = Slot> + '_ {
    step.inputs.iter().skip(if step.row.lowers { 2 } else { 0 }).flatten().copied()
}

/// Static knowledge about a value.
#[derive(Clone, Copy)]
pub(super) struct Known {
    /// The content depends on frozen weights only.
    constant: bool,
    /// The content depends on weights and input shapes only.
    pub content: bool,
    /// The shape depends on weights and input shapes only.
    shape: bool,
}

impl Known {
    /// What is known about the results of all steps, from these inputs.
    pub fn of(steps: &[CompiledNode], given: &HashSet<Slot>, frozen: &dyn Fn(Slot) -> bool) -> HashMap<Slot, Known> {
        let mut known = HashMap::new();
        for step in steps {
            Known::add(&mut known, step, given, frozen, false);
        }
        known
    }

    /// Adds what is known about the results of a step, and returns it. `anew`: the step runs every time.
    fn add(
        known: &mut HashMap<Slot, Known>,
        step: &CompiledNode,
        given: &HashSet<Slot>,
        frozen: &dyn Fn(Slot) -> bool,
        anew: bool,
    ) -> Known {
        let mut made = Known { constant: true, content: true, shape: true };
        for (index, slot) in step.inputs.iter().enumerate() {
            let Some(slot) = slot else { continue };
            let input = match known.get(slot) {
                _ if given.contains(slot) => Known { constant: false, content: false, shape: true },
                Some(known) => *known,
                None => Known { constant: frozen(*slot), content: frozen(*slot), shape: true },
            };
            made.constant &= input.constant;
            made.content &= input.content;
            made.shape &= input.shape && (input.content || !step.row.reads_on_host(index));
        }
        if anew {
            (made.constant, made.content) = (false, false);
        }
        if step.row.shape_only {
            made.content = made.shape;
        }
        for &slot in step.outputs.iter().flatten() {
            if !given.contains(&slot) {
                known.insert(slot, Known { shape: made.shape || made.content, ..made });
            }
        }
        made
    }
}

/// The frequency of each step in `order`, from what is known about its inputs.
fn classify(request: &ScheduleRequest, given: &HashSet<Slot>, order: &[usize]) -> HashMap<usize, Class> {
    let mut known = HashMap::new();
    let mut class_of = |step: &CompiledNode| {
        let anew = step.row.expands && request.keeps_quantised;
        match Known::add(&mut known, step, given, request.frozen, anew) {
            Known { constant: true, .. } => Class::Constant,
            Known { content: true, .. } => Class::Static,
            _ => Class::Dynamic,
        }
    };
    order.iter().map(|&number| (number, class_of(&request.steps[number]))).collect()
}
