//! A language decoder with its KV cache: runs one step of prefill or decoding.

use crate::base::{Error, Result, list_preview};

use super::inputs::{Input, InputKind, presents_of, unknown};
use super::port::Port;
use super::session::{Binding, Outputs, Session};
use super::step::Step;
use super::tensor::TensorValue;

/// One cache slot.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheSlot {
    /// Input with the state of the earlier tokens.
    pub past: Port,
    /// Output that is `past` of the next step.
    pub present: Port,
}

impl CacheSlot {
    /// The size of an axis of the cache, if the graph fixes it.
    pub fn fixed_size(&self, axis: usize) -> Option<usize> {
        self.past.fixed_size(axis).or_else(|| self.present.fixed_size(axis))
    }
}

/// A decoder graph whose inputs all have a known meaning.
#[derive(Debug)]
pub struct Decoder {
    session: Session,
    /// All inputs except the caches of `slots`.
    inputs: Vec<Input>,
    slots: Vec<CacheSlot>,
    head_dim: Option<usize>,
    logits: String,
}

/// Keys and values of the positions seen so far, in the graph's own layout.
#[derive(Debug)]
pub struct KvCache {
    tensors: Vec<TensorValue>,
    length: usize,
}

impl KvCache {
    /// Number of positions, padding included.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One tensor per cache slot, in the order of `Decoder::slots`.
    pub fn tensors(&self) -> &[TensorValue] {
        &self.tensors
    }
}

impl Decoder {
    /// Finds the meaning of a graph's inputs. `head_dim` is used when the graph does not fix that axis of its cache.
    ///
    /// Errors: `Error::Unsupported` naming an input without a known meaning, or a cache input
    /// without a matching output.
    pub fn new(session: Session, head_dim: Option<usize>) -> Result<Self> {
        Self::from_session(session, head_dim, false)
    }

    /// A graph for prefill only, for [`Decoder::prefill_outputs`]. Its cache inputs, if any, stay empty. Inputs without
    /// a known meaning take ready tensors; a step without such a tensor is an error.
    ///
    /// Errors: `Error::Unsupported` for a graph without tokens or outputs.
    pub fn prefill_only(session: Session, head_dim: Option<usize>) -> Result<Self> {
        Self::from_session(session, head_dim, true)
    }

    fn from_session(session: Session, head_dim: Option<usize>, prefill_only: bool) -> Result<Self> {
        let mut slots = Vec::new();
        let mut inputs = Vec::new();
        let all = match prefill_only {
            true => Input::all_or_given(session.inputs()),
            false => Input::all(session.subject(), session.inputs())?,
        };
        for input in all {
            match input.kind() {
                InputKind::Past if !prefill_only => {
                    let present = presents_of(&input.port.name).find_map(|name| session.output(&name).cloned());
                    let present = present.ok_or_else(|| not_replaced(&session, &input.port))?;
                    slots.push(CacheSlot { past: input.port, present });
                }
                _ => inputs.push(input),
            }
        }
        if !inputs.iter().any(|input| matches!(input.kind(), InputKind::InputsEmbeds | InputKind::InputIds)) {
            return Err(Error::unsupported(
                session.subject(),
                "has neither `inputs_embeds` nor `input_ids` as an input",
            )
            .remedy("give the decoder of a language model; `interlace inspect` lists a graph's inputs"));
        }
        let taken: Vec<&str> = slots.iter().map(|slot| slot.present.name.as_str()).collect();
        let others: Vec<&str> =
            session.outputs().iter().map(|port| port.name.as_str()).filter(|name| !taken.contains(name)).collect();
        let logits = match others.iter().find(|name| **name == "logits").or(others.first()) {
            Some(name) => name.to_string(),
            None => {
                return Err(Error::unsupported(session.subject(), "has no output besides its cache")
                    .remedy("export the decoder with its logits"));
            }
        };
        Ok(Decoder { session, inputs, slots, head_dim, logits })
    }

    /// The session that runs the graph.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Cache slots in input order; two per layer (key, value) for plain attention.
    pub fn slots(&self) -> &[CacheSlot] {
        &self.slots
    }

    /// True when an input is of this kind.
    pub fn takes(&self, kind: InputKind) -> bool {
        self.input(kind).is_some()
    }

    /// All inputs except the caches of [`Decoder::slots`].
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    fn input(&self, kind: InputKind) -> Option<&Input> {
        self.inputs.iter().find(|input| input.kind() == kind)
    }

    /// True for graphs that take `inputs_embeds` rather than `input_ids`.
    pub fn takes_embeds(&self) -> bool {
        self.takes(InputKind::InputsEmbeds)
    }

    /// True when the graph itself reads pixels.
    pub fn takes_pictures(&self) -> bool {
        self.inputs.iter().any(|input| matches!(input.kind(), InputKind::Image(_)))
    }

    /// Number of levels and width of DeepStack features that are inputs of their own; `None` when there are none or the
    /// graph does not fix both.
    pub fn deepstack_levels(&self) -> Option<(usize, usize)> {
        let input = self.input(InputKind::Deepstack)?;
        let levels = if input.is_stacked() { input.port.fixed_size(0)? } else { input.levels.len().max(1) };
        Some((levels, input.port.width().or(self.hidden_size())?))
    }

    /// Elements of each token's second embedding, if the graph fixes the number.
    pub fn per_layer_width(&self) -> Option<usize> {
        let port = &self.input(InputKind::PerLayerInputs)?.port;
        (2..port.rank()).map(|axis| port.fixed_size(axis)).product()
    }

    /// 3 for graphs with multimodal rotary positions, else 1.
    pub fn position_rows(&self) -> usize {
        match self.input(InputKind::PositionIds) {
            Some(input) if input.port.rank() == 3 => 3,
            _ => 1,
        }
    }

    /// The batch size, if the graph supports only one.
    pub fn fixed_batch(&self) -> Option<usize> {
        // The row order of ready tensors is unknown, so only one row is possible.
        if self.takes(InputKind::Given) {
            return Some(1);
        }
        let tokens = |input: &&Input| matches!(input.kind(), InputKind::InputsEmbeds | InputKind::InputIds);
        let ports = self.inputs.iter().filter(tokens).map(|input| &input.port);
        ports.chain(self.slots.iter().map(|slot| &slot.past)).find_map(|port| port.fixed_size(0))
    }

    /// True when the graph supports left padding: it has a mask and position ids.
    pub fn takes_padding(&self) -> bool {
        self.takes(InputKind::AttentionMask) && self.takes(InputKind::PositionIds)
    }

    /// Runs one step. `cache` is the result of the previous step, `None` for prefill.
    ///
    /// Returns logits of shape `[B, T, V]` (or `[B, 1, V]`) in CPU memory and the longer cache.
    ///
    /// Errors: `Error::Invalid` when the step, the cache and the graph do not match; `Error::Unsupported` for a step
    /// after prefill when the graph has no cache inputs; `Error::Engine` when ONNX Runtime fails.
    pub fn step(&mut self, step: &Step, cache: Option<KvCache>) -> Result<(TensorValue, KvCache)> {
        let fresh = self.feeds(step)?;
        if cache.as_ref().map(KvCache::length) != step.past() {
            let found = cache.as_ref().map_or(0, KvCache::length);
            let problem = format!("the step continues {} positions, the cache holds {found}", step.past().unwrap_or(0));
            return Err(Error::invalid(self.session.subject(), problem));
        }
        let cache = match cache {
            Some(cache) => cache,
            None => self.empty_cache(step.batch())?,
        };
        let length = cache.length + step.time();
        let presents: Vec<&str> = self.slots.iter().map(|slot| slot.present.name.as_str()).collect();
        let feeds = joined(&fresh, &self.slots, &cache);
        let mut outputs = self.session.run_keeping(&feeds, None, |name| presents.contains(&name))?;
        let tensors = presents.iter().map(|name| outputs.take(name)).collect::<Result<_>>()?;
        Ok((outputs.take(&self.logits)?, KvCache { tensors, length }))
    }

    /// Runs one prefill and returns all outputs of the graph. Caches begin empty and are not kept.
    ///
    /// Errors: as `step`.
    pub fn prefill_outputs(&mut self, step: &Step) -> Result<Outputs> {
        self.prefill_added(step, &[], None)
    }

    /// [`Decoder::prefill_outputs`] for the `wanted` outputs of a graph with inputs that a rewrite added.
    ///
    /// Errors: as `step`.
    pub fn prefill_added(
        &mut self,
        step: &Step,
        added: &[(&str, &TensorValue)],
        wanted: Option<&[&str]>,
    ) -> Result<Outputs> {
        let mut placed = self.place(step, added)?;
        self.prefill_placed(&mut placed, &[], wanted, |_| false)
    }

    /// The inputs of a prefill on the decoder's device, for several runs with other values of the inputs that a rewrite
    /// added. `added`: those of them that stay.
    ///
    /// Errors: as `feeds` and `Session::bind`.
    pub fn place(&self, step: &Step, added: &[(&str, &TensorValue)]) -> Result<Binding> {
        let fresh = self.feeds(step)?;
        let cache = self.empty_cache(step.batch())?;
        let mut feeds = joined(&fresh, &self.slots, &cache);
        feeds.extend_from_slice(added);
        self.session.bind(&feeds)
    }

    /// Runs a prefill of [`Decoder::place`] for the `wanted` outputs. Those for which `stay` is true remain on the
    /// decoder's device, for the next runs.
    ///
    /// Errors: as `step`.
    pub fn prefill_placed(
        &mut self,
        placed: &mut Binding,
        added: &[(&str, &TensorValue)],
        wanted: Option<&[&str]>,
        stay: impl Fn(&str) -> bool,
    ) -> Result<Outputs> {
        self.session.run_bound(placed, added, wanted, stay)
    }

    /// All inputs of a step except the cache and inputs that a rewrite added.
    ///
    /// Errors: `Error::Invalid` when the step lacks data for an input; `Error::Unsupported` when the step continues a
    /// cache and the graph has no cache inputs.
    pub fn feeds(&self, step: &Step) -> Result<Vec<(String, TensorValue)>> {
        if step.has_cache() && self.slots.is_empty() {
            let problem = "has no cache inputs, so it cannot go on from a prefill";
            return Err(Error::unsupported(self.session.subject(), problem)
                .remedy("export the decoder with its cache to generate text"));
        }
        let mut fresh = Vec::with_capacity(self.inputs.len());
        for input in &self.inputs {
            let tensor = match input.kind() {
                InputKind::Added => continue,
                InputKind::Past => self.empty_past(&input.port, step.batch())?,
                InputKind::Given if step.given(&input.port.name).is_none() => {
                    return Err(unknown(self.session.subject(), &input.port));
                }
                _ => TensorValue::from_array(input.port.dtype, input.make(step)?)?,
            };
            fresh.push((input.port.name.clone(), tensor));
        }
        Ok(fresh)
    }

    /// The cache before the first token.
    ///
    /// Errors: `Error::Unsupported` when the graph does not fix the size of a cache input.
    pub fn empty_cache(&self, batch: usize) -> Result<KvCache> {
        let tensors = self.slots.iter().map(|slot| self.empty_past(&slot.past, batch)).collect::<Result<_>>()?;
        Ok(KvCache { tensors, length: 0 })
    }

    /// The empty cache of a prefill: the batch axis is `batch`, the position axis is 0, heads and
    /// head size are the graph's.
    fn empty_past(&self, port: &Port, batch: usize) -> Result<TensorValue> {
        let open = |axis: usize| {
            Error::unsupported(
                self.session.subject(),
                format!("axis {axis} of input `{}` has no fixed size", port.name),
            )
            .remedy("export the graph with a fixed number of heads and a fixed head size")
        };
        let rank = port.rank();
        let mut shape = Vec::with_capacity(rank);
        for axis in 0..rank {
            shape.push(match (axis, port.fixed_size(axis)) {
                (0, None) => batch,
                (0, Some(size)) if size != batch => {
                    let problem = format!("input `{}` is made for a batch of {size}, got {batch}", port.name);
                    return Err(Error::unsupported(self.session.subject(), problem)
                        .remedy(format!("use a batch size of {size}, or export the graph with a free first axis")));
                }
                (_, Some(size)) => size,
                (2, None) if rank == 4 => 0,
                (3, None) if rank == 4 => self.head_dim.ok_or_else(|| open(axis))?,
                _ => return Err(open(axis)),
            });
        }
        if shape.contains(&0) {
            return TensorValue::empty(port.dtype, &shape);
        }
        // A state of fixed size (convolution, recurrence) starts as zeros.
        let count = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim)).ok_or_else(|| open(0))?;
        TensorValue::from_f32(port.dtype, &shape, vec![0.0; count])
    }

    /// Name of the output with the logits.
    pub fn logits_name(&self) -> &str {
        &self.logits
    }

    /// Width of `inputs_embeds`, if the graph fixes it.
    pub fn hidden_size(&self) -> Option<usize> {
        self.input(InputKind::InputsEmbeds).and_then(|input| input.port.width())
    }

    /// Width of the logits, if the graph fixes it.
    pub fn vocabulary(&self) -> Option<usize> {
        self.session.output(&self.logits).and_then(Port::width)
    }
}

/// All inputs of a step: the new ones and the cache.
fn joined<'a>(
    fresh: &'a [(String, TensorValue)],
    slots: &'a [CacheSlot],
    cache: &'a KvCache,
) -> Vec<(&'a str, &'a TensorValue)> {
    let fresh = fresh.iter().map(|(name, tensor)| (name.as_str(), tensor));
    fresh.chain(slots.iter().map(|slot| slot.past.name.as_str()).zip(&cache.tensors)).collect()
}

fn not_replaced(session: &Session, port: &Port) -> Error {
    let outputs: Vec<&str> = session.outputs().iter().map(|port| port.name.as_str()).collect();
    let problem = format!(
        "input {} is a cache that none of the outputs {} replaces",
        port.described(),
        list_preview(&outputs, 4)
    );
    Error::unsupported(session.subject(), problem).remedy(
        "export the decoder with an output for each cache input, as in `present.0.key` for `past_key_values.0.key`",
    )
}
