//! Values that operators read on the host, such as lengths and axes, in a program whose tensors are on a GPU: which of them
//! are there, which can be computed without the GPU, and which have to be copied from it, in bodies of `If`, `Loop` and
//! `Scan` too.
//!
//! Left out: a value of more than 4096 elements that depends on the inputs' shapes alone is on the GPU from the second run
//! with these shapes on, and a body that computes from it what it reads on the host waits then.

use std::collections::{BTreeSet, HashSet};

use super::bodies::outputs_on_host;
use super::schedule::Known;
use super::step::CompiledNode;
use super::wiring::Slot;

/// Where values are that steps read on the host.
#[derive(Debug, Default)]
pub(super) struct HostReads {
    /// Values that depend on what inputs hold that the caller has on the host, and on nothing on the GPU.
    pub ahead: Vec<Slot>,
    /// Values that depend on what is computed on the GPU, so that a run copies them from it and waits for it; also the first
    /// output of an operator that copies numbers of its own. Values of bodies are among them.
    pub copied: Vec<Slot>,
    /// Values, read or not, that are computed on the host where those of `ahead` are given.
    pub resident: HashSet<Slot>,
    /// Those from which others of them, or values in bodies, are computed in every run.
    pub kept: HashSet<Slot>,
}

/// Facts about the values of a program.
pub(super) struct HostFacts<'a> {
    /// Values that runs receive.
    pub given: &'a HashSet<Slot>,
    /// Those of which the caller has a copy on the host.
    pub held: &'a dyn Fn(Slot) -> bool,
    /// Frozen weights and constants.
    pub frozen: &'a dyn Fn(Slot) -> bool,
    /// Frozen values that are small enough to stay on the host.
    pub small: &'a dyn Fn(Slot) -> bool,
    /// Values that the caller can name.
    pub named: &'a dyn Fn(Slot) -> bool,
    /// Slots that a step reads on the host, and those that a step reads elsewhere.
    pub read: &'a [HashSet<Slot>; 2],
}

impl HostReads {
    /// `steps` in the order in which they run.
    pub fn of(steps: &[CompiledNode], facts: &HostFacts<'_>) -> Self {
        let HostFacts { given, held, frozen, small, named, read: [on_host, elsewhere] } = facts;
        let mut known = Known::of(steps, given, frozen);
        // Values that can be computed without the GPU.
        let mut free: HashSet<Slot> = HashSet::new();
        let mut reads = HostReads::default();
        let mut copied: BTreeSet<Slot> = BTreeSet::new();
        for step in steps {
            let inputs = || step.inputs.iter().flatten().copied();
            let shape_only = step.row.shape_only;
            let is_free = inputs().all(|slot| match given.contains(&slot) {
                true => shape_only || held(slot),
                false => frozen(slot) || free.contains(&slot),
            });
            let is_resident = |slot| match given.contains(&slot) {
                true => on_host.contains(&slot) && (held(slot) || !elsewhere.contains(&slot)),
                false => small(slot) || reads.resident.contains(&slot),
            };
            let all_resident = inputs().all(is_resident);
            let mut waits = BTreeSet::new();
            let places = match step.bodies.is_empty() {
                true => vec![shape_only || all_resident; step.outputs.len()],
                false => outputs_on_host(&step.inputs, &step.bodies, &is_resident, &mut waits),
            };
            if step.row.waits && !all_resident {
                waits.extend(step.outputs.iter().flatten().next());
            }
            let varies = |slot: &Slot| known.get(slot).is_some_and(|known| !known.content);
            let in_every_run = step.outputs.iter().flatten().any(varies);
            if in_every_run && !shape_only && (all_resident || !step.bodies.is_empty()) {
                let kept: Vec<Slot> = inputs().filter(|slot| is_resident(*slot)).collect();
                reads.kept.extend(kept);
            }
            let mut all_ahead = true;
            for (slot, is_resident) in step.outputs.iter().zip(places) {
                let Some(slot) = *slot else { continue };
                let varies = known.remove(&slot).is_some_and(|known| !known.content);
                let is_ahead = is_free && varies && on_host.contains(&slot) && named(slot);
                if is_free {
                    free.insert(slot);
                }
                if is_ahead {
                    reads.ahead.push(slot);
                }
                if is_resident || is_ahead {
                    reads.resident.insert(slot);
                }
                all_ahead &= is_ahead;
            }
            if !all_ahead {
                copied.extend(waits);
            }
        }
        let there = |slot: &Slot| match given.contains(slot) {
            // An input that the caller has on the host stays there for the steps that read it there.
            true => held(*slot),
            false => small(*slot) || reads.resident.contains(slot),
        };
        copied.extend(on_host.iter().filter(|slot| !there(slot)));
        reads.copied = copied.into_iter().collect();
        reads
    }
}
