//! Sizes of what a graph computes, measured: every value of the graph is an output of a run without optimisations.
//!
//! A decoder runs prompts of several lengths. A value's size is a polynomial of the length of degree two at most, that of a score for
//! each pair of tokens, so three lengths give its size at every length.

use crate::base::{Result, human_bytes};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::{Model, Node, ValueId, ValueType};
use crate::onnx;
use crate::runtime::{Decoder, Optimisation, Runtime, SessionOptions, Step, TensorValue};

use super::agreement::{Probe, token_types_of};
use super::checks::{CheckStatus, Checks};
use super::pixels::pixel_feeds;
use super::probe::{noise_text, token_ids};

/// Name of the check.
const CHECK: &str = "buffers of activations";
/// Step between the lengths that are run, and the first of them, in tokens.
const STEP: usize = 8;
/// Lengths that are run.
const LENGTHS: [usize; 3] = [STEP, 2 * STEP, 3 * STEP];
/// Longer prompts are not told apart.
const LONGEST: u64 = 1 << 32;
/// Operators whose results are no tensors.
const NO_TENSORS: &[&str] = &[
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceInsert",
    "SequenceErase",
    "SequenceMap",
    "SplitToSequence",
    "Optional",
];

/// Checks the values that a component computes against a largest buffer.
pub(super) fn activations(bundle: &Bundle, part: &Component, limit: u64, runtime: &Runtime, checks: &mut Checks) {
    let found = match part.role {
        role if role.is_decoder() => of_decoder(bundle, part, limit, runtime),
        Role::VisionEncoder => of_vision(bundle, part, limit, runtime),
        _ => return,
    };
    match found {
        Ok((fits, detail)) => {
            let status = if fits { CheckStatus::Passed } else { CheckStatus::Failed };
            checks.add(CHECK, &part.file, status, detail);
        }
        // The graph cannot be fed or run here, which other checks say.
        Err(error) => checks.add(CHECK, &part.file, CheckStatus::Unavailable, error.to_string()),
    }
}

/// The longest prompt of which no value has more bytes than the limit.
fn of_decoder(bundle: &Bundle, part: &Component, limit: u64, runtime: &Runtime) -> Result<(bool, String)> {
    let path = bundle.path_of(part);
    let head_dim = bundle.config().and_then(|config| config.head_size());
    let decoder = Decoder::new(runtime.session(&path, &SessionOptions::default())?, head_dim)?;
    let shown = Shown::of(onnx::load(&path)?);
    let mut sizes = Vec::new();
    for length in LENGTHS {
        let ids = token_ids(length, decoder.vocabulary().unwrap_or(16), None);
        let probe = Probe::new(noise_text(&decoder, &ids, 0)?, &decoder, token_types_of(bundle));
        let mut feeds = decoder.feeds(&Step::prefill(&[&probe.0], false)?)?;
        let caches = decoder.empty_cache(1)?;
        for (slot, tensor) in decoder.slots().iter().zip(caches.tensors()) {
            let shape = tensor.shape();
            // States of convolutions have a fixed size.
            let past = match shape.iter().product() {
                0 => TensorValue::empty(slot.past.dtype, &shape)?,
                count => TensorValue::from_f32(slot.past.dtype, &shape, vec![0.0; count])?,
            };
            feeds.push((slot.past.name.clone(), past));
        }
        sizes.push(shown.sizes(&feeds, runtime)?);
    }
    let [first, second, third] = &sizes[..] else { return Ok((true, String::new())) };
    let longest = shown.names.iter().zip(first.iter().zip(second).zip(third));
    let longest = longest.map(|(name, ((&a, &b), &c))| (longest_prompt([a, b, c], limit), name));
    let limit = human_bytes(limit);
    Ok(match longest.min_by_key(|(tokens, _)| *tokens) {
        Some((0, name)) => (false, format!("{name} has more than {limit} at any length of the prompt")),
        Some((tokens, name)) if tokens < LONGEST => (
            true,
            format!("all values of a prompt of {tokens} tokens fit into {limit}; of a longer one {name} does not"),
        ),
        _ => (true, format!("no value grows beyond {limit} with the prompt")),
    })
}

/// The largest value of one picture.
fn of_vision(bundle: &Bundle, part: &Component, limit: u64, runtime: &Runtime) -> Result<(bool, String)> {
    let path = bundle.path_of(part);
    let (_, feeds) = pixel_feeds(bundle, runtime.session(&path, &SessionOptions::default())?)?;
    let shown = Shown::of(onnx::load(&path)?);
    let sizes = shown.sizes(&feeds, runtime)?;
    let largest = sizes.into_iter().zip(&shown.names).max_by_key(|(size, _)| *size);
    let Some((size, name)) = largest else { return Ok((true, "the graph computes nothing".into())) };
    let pixels = feeds.iter().find(|(name, _)| name.starts_with("pixel")).map(|(_, pixels)| pixels.shape());
    let (shape, has, limit_text) = (pixels.unwrap_or_default(), human_bytes(size), human_bytes(limit));
    let detail = format!("for pixels {shape:?} the largest value, {name}, has {has}; {limit_text} are allowed");
    Ok((size <= limit, detail))
}

/// A graph all of whose values are outputs.
struct Shown {
    model: Model,
    /// The values, as messages show them.
    names: Vec<String>,
    /// Their names as outputs.
    outputs: Vec<String>,
}

impl Shown {
    fn of(mut model: Model) -> Self {
        let graph = &mut model.graph;
        let is_shown = |node: &&Node| node.op_type != "Constant" && !NO_TENSORS.contains(&node.op_type.as_str());
        let computed = graph.body.nodes.iter().filter(is_shown);
        let computed =
            computed.flat_map(|node| node.outputs.iter().flatten().map(move |id| (*id, node.op_type.clone())));
        let tensor = |id: ValueId| matches!(graph.value(id).ty, None | Some(ValueType::Tensor { .. }));
        let computed: Vec<(ValueId, String)> = computed.filter(|(id, _)| tensor(*id)).collect();
        let names = computed.iter().map(|(id, operator)| format!("`{}` of {operator}", graph.name(*id))).collect();
        let outputs = computed.iter().map(|(id, _)| graph.name(*id).to_string()).collect();
        for (id, _) in &computed {
            if !graph.body.outputs.contains(id) {
                graph.body.outputs.push(*id);
            }
        }
        Shown { model, names, outputs }
    }

    /// Bytes of each value in a run.
    fn sizes(&self, feeds: &[(String, TensorValue)], runtime: &Runtime) -> Result<Vec<u64>> {
        let options = SessionOptions { optimisation: Optimisation::None, ..SessionOptions::default() };
        let mut session = runtime.session_of(&self.model, &options)?;
        let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let wanted: Vec<&str> = self.outputs.iter().map(String::as_str).collect();
        let found = session.run(&feeds, Some(&wanted))?;
        let bytes = |tensor: &TensorValue| -> Result<u64> {
            let count = tensor.shape().iter().map(|&size| size as u64).product();
            Ok(tensor.dtype()?.byte_len(count).unwrap_or(count))
        };
        found.iter().map(|(_, tensor)| bytes(tensor)).collect()
    }
}

/// The most tokens at which a value has at most `limit` bytes, from its bytes at [`LENGTHS`]; [`LONGEST`] without a bound.
fn longest_prompt([a, b, c]: [u64; 3], limit: u64) -> u64 {
    let [a, b, c] = [a, b, c].map(i128::from);
    let (slope, bend) = (b - a, (c - 2 * b + a).max(0));
    let step = STEP as i128;
    // Newton's polynomial through the three lengths, times `2 step^2`.
    let fits = |tokens: u64| {
        let (first, second) = (i128::from(tokens) - step, i128::from(tokens) - 2 * step);
        let size = 2 * step * step * a + 2 * step * first * slope + first * second * bend;
        size <= 2 * step * step * i128::from(limit)
    };
    if fits(LONGEST) {
        return LONGEST;
    }
    let (mut low, mut high) = (0, LONGEST);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prompt_is_that_of_the_polynomial_through_three_lengths() {
        let sizes = |size: fn(u64) -> u64| LENGTHS.map(|tokens| size(tokens as u64));
        for (size, limit, want) in [
            ((|_| 100) as fn(u64) -> u64, 100, LONGEST),
            (|_| 101, 100, 0),
            (|t| 4 * t, 100, 25),
            (|t| 4 * 839 * t, 1_000_000_000, 297_973),
            (|t| 16 * t * t, 1_000_000_000, 7905),
            (|t| 16 * t * t + 5 * t + 7, 1_000_000_000, 7905),
            (|t| 3 * t * t, 2, 0),
        ] {
            assert_eq!(longest_prompt(sizes(size), limit), want, "{limit}");
        }
    }
}
