//! A language decoder: one step of prefill or decoding, with its KV cache.

use crate::base::{Error, Result, list_preview};
use crate::ir::Dim;
use crate::rewrite::ADDED_PREFIX;

use super::session::{Outputs, Port, Session};
use super::tensor::Tensor;

/// How the names of a cache input and of the output that replaces it relate: prefix of one, prefix of the other.
const CACHE_NAMES: &[(&str, &str)] = &[
    ("past_key_values.", "present."),
    ("past_key_values.", "present_key_values."),
    ("input.past_key_values.", "output.past_key_values."),
    ("key_cache.", "updated_key_cache."),
    ("value_cache.", "updated_value_cache."),
    ("past_key_", "present_key_"),
    ("past_value_", "present_value_"),
    ("past_conv.", "present_conv."),
    ("past_recurrent.", "present_recurrent."),
];

/// What an input of the graph is fed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    InputsEmbeds,
    InputIds,
    AttentionMask,
    /// Shape `[B, T]`.
    PositionIds,
    /// Shape `[3, B, T]`: temporal, height and width positions of multimodal rotary embedding.
    PositionRows,
    /// Shape `[T]`: columns of the cache that this step writes.
    CachePosition,
    /// True when the cache is read (`If`-merged decoders).
    UseCacheBranch,
    /// How many of the last positions get logits.
    LogitsToKeep,
    /// Cache slot of this number.
    Past(usize),
    /// A cache input that no output of the graph replaces, always empty.
    EmptyPast,
    /// An input that a rewrite added; the caller gives it.
    Added,
}

/// One cache slot.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheSlot {
    pub past: Port,
    pub present: Port,
}

impl CacheSlot {
    /// The size of an axis of the cache, where the graph fixes it.
    pub fn fixed_size(&self, axis: usize) -> Option<usize> {
        self.past.fixed_size(axis).or_else(|| self.present.fixed_size(axis))
    }
}

/// A decoder graph with every input understood.
#[derive(Debug)]
pub struct Decoder {
    session: Session,
    roles: Vec<Role>,
    slots: Vec<CacheSlot>,
    head_dim: Option<usize>,
    logits: String,
}

/// Keys and values of the positions seen so far, as the graph gave them.
#[derive(Debug)]
pub struct KvCache {
    tensors: Vec<Tensor>,
    length: usize,
}

impl KvCache {
    /// Positions in it, padding included.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One tensor per cache slot, in the order of `Decoder::slots`.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
}

/// What a step reads for its `T` new positions.
#[derive(Debug)]
pub enum StepTokens<'a> {
    /// `inputs_embeds`, shape `[B, T, D]` in row-major order.
    Embeds { data: &'a [f32], hidden_size: usize },
    /// `input_ids`, shape `[B, T]`.
    Ids(&'a [i64]),
}

/// One step for a batch of `B` rows and `T` new positions each.
#[derive(Debug)]
pub struct Step<'a> {
    pub batch: usize,
    pub tokens: StepTokens<'a>,
    /// Shape `[B, past + T]`: 1 where a position is real, 0 where it is padding on the left.
    pub attention_mask: &'a [i64],
    /// Shape `[B, T]`, or `[3, B, T]` when `position_rows` is 3.
    pub position_ids: &'a [i64],
    /// 1, or 3 for graphs with multimodal rotary positions.
    pub position_rows: usize,
    /// Logits of the last position only, where the graph lets a caller say so.
    pub last_only: bool,
}

impl Decoder {
    /// Understands a graph's inputs. `head_dim` is used where the graph leaves that axis of its cache open.
    ///
    /// Errors: `Error::Unsupported` naming an input whose meaning is not known, or a cache input that no output replaces.
    pub fn new(session: Session, head_dim: Option<usize>) -> Result<Self> {
        Self::understand(session, head_dim, false)
    }

    /// A graph that only prefills, for [`Decoder::prefill_outputs`]: its cache inputs, if any, stay empty.
    ///
    /// Errors: `Error::Unsupported` naming an input whose meaning is not known.
    pub fn prefill_only(session: Session, head_dim: Option<usize>) -> Result<Self> {
        Self::understand(session, head_dim, true)
    }

    fn understand(session: Session, head_dim: Option<usize>, prefill_only: bool) -> Result<Self> {
        let mut slots = Vec::new();
        let mut roles = Vec::new();
        for port in session.inputs() {
            let rank = port.shape.len();
            let role = match port.name.as_str() {
                "inputs_embeds" => Role::InputsEmbeds,
                "input_ids" => Role::InputIds,
                "attention_mask" => Role::AttentionMask,
                "position_ids" if rank == 3 => Role::PositionRows,
                "position_ids" => Role::PositionIds,
                "cache_position" => Role::CachePosition,
                "use_cache_branch" => Role::UseCacheBranch,
                "num_logits_to_keep" | "logits_to_keep" => Role::LogitsToKeep,
                name if prefill_only && name.starts_with(ADDED_PREFIX) => Role::Added,
                name if prefill_only && CACHE_NAMES.iter().any(|(past, _)| name.starts_with(past)) => Role::EmptyPast,
                name => {
                    let present = present_of(&session, name).ok_or_else(|| unknown_input(&session, port))?;
                    slots.push(CacheSlot { past: port.clone(), present });
                    Role::Past(slots.len() - 1)
                }
            };
            roles.push(role);
        }
        if !roles.iter().any(|role| matches!(role, Role::InputsEmbeds | Role::InputIds)) {
            return Err(Error::unsupported(
                session.subject(),
                "has neither `inputs_embeds` nor `input_ids` as an input",
            ));
        }
        let taken: Vec<&str> = slots.iter().map(|slot| slot.present.name.as_str()).collect();
        let others: Vec<&str> =
            session.outputs().iter().map(|port| port.name.as_str()).filter(|name| !taken.contains(name)).collect();
        let logits = match others.iter().find(|name| **name == "logits").or(others.first()) {
            Some(name) => name.to_string(),
            None => return Err(Error::unsupported(session.subject(), "has no output besides its cache")),
        };
        Ok(Decoder { session, roles, slots, head_dim, logits })
    }

    /// The session behind it.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Cache slots in input order; two per layer (key, value) for plain attention.
    pub fn slots(&self) -> &[CacheSlot] {
        &self.slots
    }

    /// True for graphs that take `inputs_embeds` rather than `input_ids`.
    pub fn takes_embeds(&self) -> bool {
        self.roles.contains(&Role::InputsEmbeds)
    }

    /// 3 for graphs with multimodal rotary positions, else 1.
    pub fn position_rows(&self) -> usize {
        if self.roles.contains(&Role::PositionRows) { 3 } else { 1 }
    }

    /// The batch that the graph is made for, where it takes no other.
    pub fn fixed_batch(&self) -> Option<usize> {
        let batch = |(port, role): (&Port, &Role)| match role {
            Role::InputsEmbeds | Role::InputIds | Role::Past(_) => port.shape.first().and_then(known_size),
            _ => None,
        };
        self.session.inputs().iter().zip(&self.roles).find_map(batch)
    }

    /// True when padding on the left can be told to the graph: it has a mask, and positions that follow it.
    pub fn takes_padding(&self) -> bool {
        self.roles.contains(&Role::AttentionMask)
            && self.roles.iter().any(|role| matches!(role, Role::PositionIds | Role::PositionRows))
    }

    /// Runs one step. `cache` is what the step before gave, `None` for prefill.
    ///
    /// Returns logits of shape `[B, T, V]` (or `[B, 1, V]`) in CPU memory and the longer cache.
    ///
    /// Errors: `Error::Invalid` when the lengths disagree; `Error::Engine` when ONNX Runtime fails.
    pub fn step(&mut self, step: &Step<'_>, cache: Option<KvCache>) -> Result<(Tensor, KvCache)> {
        let fresh = self.feeds(step, cache.as_ref().map(KvCache::length))?;
        let cache = match cache {
            Some(cache) => cache,
            None => self.empty_cache(step.batch)?,
        };
        let length = cache.length + self.time_of(step)?;
        let presents: Vec<&str> = self.slots.iter().map(|slot| slot.present.name.as_str()).collect();
        let feeds = joined(&fresh, &self.slots, &cache);
        let mut outputs = self.session.run_keeping(&feeds, |name| presents.contains(&name))?;
        let tensors = presents.iter().map(|name| outputs.take(name)).collect::<Result<_>>()?;
        Ok((outputs.take(&self.logits)?, KvCache { tensors, length }))
    }

    /// Runs one prefill for all outputs of the graph, whatever they are; caches begin empty and none is handed on.
    ///
    /// Errors: as `step`.
    pub fn prefill_outputs(&mut self, step: &Step<'_>) -> Result<Outputs> {
        self.prefill_added(step, &[], None)
    }

    /// [`Decoder::prefill_outputs`] for the `wanted` outputs, of a graph with inputs that a rewrite added.
    ///
    /// Errors: as `step`.
    pub fn prefill_added(
        &mut self,
        step: &Step<'_>,
        added: &[(&str, &Tensor)],
        wanted: Option<&[&str]>,
    ) -> Result<Outputs> {
        let fresh = self.feeds(step, None)?;
        let cache = self.empty_cache(step.batch)?;
        let mut feeds = joined(&fresh, &self.slots, &cache);
        feeds.extend_from_slice(added);
        self.session.run(&feeds, wanted)
    }

    /// Every input of a step but the cache. `past` is the cache's length, `None` for prefill.
    ///
    /// Errors: `Error::Invalid` when the lengths disagree; `Error::Unsupported` when a graph without cache inputs is
    /// to go on from one.
    pub fn feeds(&self, step: &Step<'_>, past: Option<usize>) -> Result<Vec<(String, Tensor)>> {
        let time = self.time_of(step)?;
        if past.is_some() && self.slots.is_empty() {
            let problem = "has no cache inputs, so it cannot go on from a prefill";
            return Err(Error::unsupported(self.session.subject(), problem));
        }
        let has_cache = past.is_some();
        let past = past.unwrap_or(0);
        let sized = |what: &str, found: usize, want: usize| match found == want {
            true => Ok(()),
            false => Err(Error::invalid(
                self.session.subject(),
                format!("{what} holds {found} elements, a batch of {} takes {want}", step.batch),
            )),
        };
        sized("attention_mask", step.attention_mask.len(), step.batch * (past + time))?;
        sized("position_ids", step.position_ids.len(), step.position_rows * step.batch * time)?;
        let mut fresh = Vec::with_capacity(self.roles.len());
        for (port, role) in self.session.inputs().iter().zip(&self.roles) {
            if !matches!(role, Role::Past(_) | Role::Added) {
                fresh.push((port.name.clone(), self.feed(port, *role, step, time, past, has_cache)?));
            }
        }
        Ok(fresh)
    }

    /// New positions per row of a step.
    fn time_of(&self, step: &Step<'_>) -> Result<usize> {
        let elements = match &step.tokens {
            StepTokens::Embeds { data, hidden_size } => data.len().checked_div(*hidden_size).unwrap_or(0),
            StepTokens::Ids(ids) => ids.len(),
        };
        match elements.checked_div(step.batch) {
            Some(time) if time > 0 && time * step.batch == elements => Ok(time),
            _ => Err(Error::invalid(
                self.session.subject(),
                format!("a step of {elements} tokens does not make a batch of {}", step.batch),
            )),
        }
    }

    /// The cache before the first token.
    ///
    /// Errors: `Error::Unsupported` when the graph leaves open how large a cache input is.
    pub fn empty_cache(&self, batch: usize) -> Result<KvCache> {
        let tensors = self.slots.iter().map(|slot| self.empty_past(&slot.past, batch)).collect::<Result<_>>()?;
        Ok(KvCache { tensors, length: 0 })
    }

    fn feed(
        &self,
        port: &Port,
        role: Role,
        step: &Step<'_>,
        time: usize,
        past: usize,
        has_cache: bool,
    ) -> Result<Tensor> {
        let batch = step.batch;
        let mismatch =
            |want: &str| Error::invalid(self.session.subject(), format!("input `{}` wants {want}", port.name));
        match role {
            Role::InputsEmbeds => match step.tokens {
                StepTokens::Embeds { data, hidden_size } => {
                    Tensor::from_f32(port.dtype, &[batch, time, hidden_size], data.to_vec())
                }
                StepTokens::Ids(_) => Err(mismatch("embeddings, got token ids")),
            },
            Role::InputIds => match step.tokens {
                StepTokens::Ids(ids) => Tensor::from_i64(port.dtype, &[batch, time], ids.to_vec()),
                StepTokens::Embeds { .. } => Err(mismatch("token ids, got embeddings")),
            },
            Role::AttentionMask => Tensor::from_i64(port.dtype, &[batch, past + time], step.attention_mask.to_vec()),
            Role::PositionIds if step.position_rows == 1 => {
                Tensor::from_i64(port.dtype, &[batch, time], step.position_ids.to_vec())
            }
            Role::PositionIds => Err(mismatch("positions of shape [B, T]")),
            Role::PositionRows => {
                let rows =
                    if step.position_rows == 3 { step.position_ids.to_vec() } else { step.position_ids.repeat(3) };
                Tensor::from_i64(port.dtype, &[3, batch, time], rows)
            }
            Role::CachePosition => {
                Tensor::from_i64(port.dtype, &[time], (past..past + time).map(|at| at as i64).collect())
            }
            Role::UseCacheBranch => Tensor::new(&[1], vec![has_cache]),
            Role::LogitsToKeep => {
                // 0 asks for the logits of every position, as in transformers.
                let shape: &[usize] = if port.shape.is_empty() { &[] } else { &[1] };
                Tensor::from_i64(port.dtype, shape, vec![i64::from(step.last_only)])
            }
            Role::EmptyPast => self.empty_past(port, batch),
            Role::Past(_) => Err(mismatch("a cache")),
            Role::Added => Err(mismatch("what the caller gives")),
        }
    }

    /// The empty cache of prefill: the batch axis is set, the position axis is 0, heads and head size are the graph's.
    fn empty_past(&self, port: &Port, batch: usize) -> Result<Tensor> {
        let open = |axis: usize| {
            Error::unsupported(
                self.session.subject(),
                format!("axis {axis} of input `{}` has no fixed size", port.name),
            )
        };
        let rank = port.shape.len();
        let mut shape = Vec::with_capacity(rank);
        for axis in 0..rank {
            let known = known_size(&port.shape[axis]);
            shape.push(match (axis, known) {
                (0, None) => batch,
                (0, Some(size)) if size != batch => {
                    let problem = format!("input `{}` is made for a batch of {size}, got {batch}", port.name);
                    return Err(Error::unsupported(self.session.subject(), problem));
                }
                (_, Some(size)) => size,
                (2, None) if rank == 4 => 0,
                (3, None) if rank == 4 => self.head_dim.ok_or_else(|| open(axis))?,
                _ => return Err(open(axis)),
            });
        }
        if shape.contains(&0) {
            return Tensor::empty(port.dtype, &shape);
        }
        // A state of fixed size (convolution, recurrence) begins as zeros.
        let count = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim)).ok_or_else(|| open(0))?;
        Tensor::from_f32(port.dtype, &shape, vec![0.0; count])
    }

    /// The output that holds the logits.
    pub fn logits_name(&self) -> &str {
        &self.logits
    }

    /// The size of the hidden state that `inputs_embeds` names, where it is fixed.
    pub fn hidden_size(&self) -> Option<usize> {
        self.session.input("inputs_embeds").and_then(|port| port.shape.last()).and_then(known_size)
    }

    /// The vocabulary that the logits name, where it is fixed.
    pub fn vocabulary(&self) -> Option<usize> {
        self.session.output(&self.logits).and_then(|port| port.shape.last()).and_then(known_size)
    }
}

/// All inputs of a step: the fresh ones and the cache.
fn joined<'a>(fresh: &'a [(String, Tensor)], slots: &'a [CacheSlot], cache: &'a KvCache) -> Vec<(&'a str, &'a Tensor)> {
    let fresh = fresh.iter().map(|(name, tensor)| (name.as_str(), tensor));
    fresh.chain(slots.iter().map(|slot| slot.past.name.as_str()).zip(&cache.tensors)).collect()
}

/// The size of an axis: a number, or a symbol that spells one (some exporters write `"16"` as a name).
pub(super) fn known_size(dim: &Dim) -> Option<usize> {
    match dim {
        Dim::Known(size) => usize::try_from(*size).ok(),
        Dim::Symbol(name) => name.parse().ok(),
        Dim::Unknown => None,
    }
}

fn present_of(session: &Session, name: &str) -> Option<Port> {
    CACHE_NAMES.iter().find_map(|(past, present)| {
        let rest = name.strip_prefix(past)?;
        session.output(&format!("{present}{rest}")).cloned()
    })
}

fn unknown_input(session: &Session, port: &Port) -> Error {
    let outputs: Vec<&str> = session.outputs().iter().map(|port| port.name.as_str()).collect();
    let problem = format!(
        "input `{}` ({}) is neither a known input nor a cache that one of the outputs {} replaces",
        port.name,
        port.dtype,
        list_preview(&outputs, 4)
    );
    Error::unsupported(session.subject(), problem)
}
