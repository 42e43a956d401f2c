//! Sizes of what a graph computes, measured: every value of the graph is an output of a run without optimisations.
//!
//! A decoder and its head run prompts of several lengths. A value's size is a polynomial of the length of degree two at most,
//! that of a score for each pair of tokens, so three lengths give its size at every length.

use crate::base::{Cancel, Error, Result, human_bytes};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::{Model, Node, ValueId, ValueType};
use crate::onnx;
use crate::runtime::{Decoder, Optimisation, Outputs, Runtime, Session, SessionOptions, Step, TensorValue};

use super::agreement::{Probe, token_types_of};
use super::checks::{CheckStatus, Checks};
use super::pixels::pixel_feeds;
use super::probe::{noise, noise_text, token_ids};

/// Name of the check.
const CHECK: &str = "buffers of activations";
/// What remains after Ctrl-C.
const KEPT: &str = "no report is written";
/// Step between the lengths that are run, and the first of them, in tokens.
const STEP: usize = 8;
/// Lengths that are run.
const LENGTHS: [usize; 3] = [STEP, 2 * STEP, 3 * STEP];
/// Numbers of the hidden states that a head is given at most.
const MOST_NUMBERS: usize = 1 << 28;
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

/// True when all values fit, and the finding.
type Finding = (bool, String);

/// Checks the values that a component computes against a largest buffer.
///
/// Errors: `Error::Interrupted`. Any other error is in the checks: an unsupported graph is not measured, and one that this run
/// alone cannot load or compute is not known to fit, which fails.
pub(super) fn activations(
    bundle: &Bundle,
    part: &Component,
    limit: u64,
    runtime: &Runtime,
    cancel: &Cancel,
    checks: &mut Checks,
) -> Result<()> {
    let found = match part.role {
        Role::Decoder | Role::DecoderPrefill | Role::DecoderWithPast => {
            of_decoder(bundle, part, limit, runtime, cancel)
        }
        Role::LmHead => of_head(bundle, part, limit, runtime, cancel),
        Role::VisionEncoder => of_vision(bundle, part, limit, runtime, cancel),
        Role::EmbedTokens | Role::Projector | Role::TokenPruner | Role::AudioEncoder | Role::ImageGenerator => {
            let problem = "is not measured: this check runs decoders, their heads and vision encoders";
            Err(Error::unsupported(part.role.name(), problem))
        }
    };
    note(part, found, checks)
}

/// Adds the check of a measurement.
///
/// Errors: `Error::Interrupted`.
fn note(part: &Component, found: Result<Finding>, checks: &mut Checks) -> Result<()> {
    match found {
        Ok((true, detail)) => checks.add(CHECK, &part.file, CheckStatus::Passed, detail),
        Ok((false, detail)) => checks.add(CHECK, &part.file, CheckStatus::Failed, detail),
        Err(error @ Error::Interrupted { .. }) => return Err(error),
        Err(error) => checks.error(CHECK, &part.file, &error),
    }
    Ok(())
}

/// The longest prompt of which no value of the decoder has more bytes than the limit.
fn of_decoder(bundle: &Bundle, part: &Component, limit: u64, runtime: &Runtime, cancel: &Cancel) -> Result<Finding> {
    let shown = Shown::of(onnx::load(&bundle.path_of(part))?);
    let head_dim = bundle.config().and_then(|config| config.head_size());
    let mut decoder = Decoder::new(shown.session(runtime)?, head_dim)?;
    shown.longest(limit, cancel, |length, wanted| {
        let ids = token_ids(length, decoder.vocabulary().unwrap_or(16), None);
        let probe = Probe::new(noise_text(&decoder, &ids, 0)?, &decoder, token_types_of(bundle));
        decoder.prefill_added(&Step::prefill(&[&probe.0], false)?, &[], Some(wanted))
    })
}

/// The longest prompt of which no value of the head has more bytes than the limit. A head reads one input, hidden states
/// `[B, T, D]` or `[T, D]`.
fn of_head(bundle: &Bundle, part: &Component, limit: u64, runtime: &Runtime, cancel: &Cancel) -> Result<Finding> {
    let shown = Shown::of(onnx::load(&bundle.path_of(part))?);
    let mut session = shown.session(runtime)?;
    let unknown = |problem: String| Error::unsupported(session.subject(), problem);
    let [port] = session.inputs() else {
        return Err(unknown(format!("has {} inputs, a head has one", session.inputs().len())));
    };
    let (port, rank) = (port.clone(), port.rank());
    let Some(width) = port.width().filter(|&width| width > 0 && (2..=3).contains(&rank)) else {
        return Err(unknown(format!("does not read hidden states of a fixed width but {}", port.described())));
    };
    shown.longest(limit, cancel, |length, wanted| {
        let free = |axis: usize| if axis + 2 == rank { length } else { 1 };
        let mut shape: Vec<usize> =
            (0..rank - 1).map(|axis| port.fixed_size(axis).unwrap_or_else(|| free(axis))).collect();
        shape.push(width);
        // Sizes come from the file.
        let Some(count) =
            shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size)).filter(|&n| n <= MOST_NUMBERS)
        else {
            let problem = format!("reads hidden states {shape:?}, more than {MOST_NUMBERS} numbers");
            return Err(Error::unsupported(&part.file, problem));
        };
        let hidden = TensorValue::from_f32(port.dtype, &shape, noise(count))?;
        session.run(&[(&port.name, &hidden)], Some(wanted))
    })
}

/// The largest value of one picture.
fn of_vision(bundle: &Bundle, part: &Component, limit: u64, runtime: &Runtime, cancel: &Cancel) -> Result<Finding> {
    let path = bundle.path_of(part);
    let (_, feeds) = pixel_feeds(bundle, runtime.session(&path, &SessionOptions::default())?)?;
    cancel.check(KEPT)?;
    let shown = Shown::of(onnx::load(&path)?);
    let given: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let sizes = sizes(&shown.session(runtime)?.run(&given, Some(&shown.wanted()))?)?;
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

    fn session(&self, runtime: &Runtime) -> Result<Session> {
        let options = SessionOptions { optimisation: Optimisation::None, ..SessionOptions::default() };
        runtime.session_of(&self.model, &options)
    }

    fn wanted(&self) -> Vec<&str> {
        self.outputs.iter().map(String::as_str).collect()
    }

    /// The longest prompt of which no value has more bytes than the limit. `run` gives the wanted values of a prompt of a length
    /// in tokens.
    fn longest(
        &self,
        limit: u64,
        cancel: &Cancel,
        mut run: impl FnMut(usize, &[&str]) -> Result<Outputs>,
    ) -> Result<Finding> {
        let wanted = self.wanted();
        let mut run = |length: usize| {
            cancel.check(KEPT)?;
            sizes(&run(length, &wanted)?)
        };
        let [first, second, third] = LENGTHS;
        let (first, second, third) = (run(first)?, run(second)?, run(third)?);
        let longest = self.names.iter().zip(first.iter().zip(&second).zip(&third));
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
}

/// Bytes of each value of a run.
fn sizes(found: &Outputs) -> Result<Vec<u64>> {
    let bytes = |tensor: &TensorValue| -> Result<u64> {
        let count = tensor.shape().iter().map(|&size| size as u64).product();
        Ok(tensor.dtype()?.byte_len(count).unwrap_or(count))
    };
    found.iter().map(|(_, tensor)| bytes(tensor)).collect()
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
    use std::path::Path;

    use super::*;
    use crate::base::Device;

    fn decoder() -> (Bundle, Component) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
        let bundle = Bundle::open(&folder).expect("a model");
        let part = bundle.component(Role::Decoder).expect("a decoder").clone();
        (bundle, part)
    }

    #[test]
    fn a_measurement_that_cannot_run_fails_and_one_of_an_unsupported_graph_is_unavailable() {
        let (_, part) = decoder();
        for (error, status) in [
            (Error::engine("ONNX Runtime", "graph", "out of memory"), CheckStatus::Failed),
            (Error::invalid("graph", "is broken"), CheckStatus::Failed),
            (Error::unsupported("graph", "has an unknown input"), CheckStatus::Unavailable),
        ] {
            let mut checks = Checks(Vec::new());
            note(&part, Err(error), &mut checks).expect("noted");
            assert_eq!(checks.0.iter().map(|check| check.status).collect::<Vec<_>>(), [status]);
        }
    }

    #[test]
    fn a_measurement_ends_when_the_user_asks_to_stop() {
        let (bundle, part) = decoder();
        let (runtime, cancel) = (Runtime::new(Device::Cpu).expect("ONNX Runtime"), Cancel::default());
        cancel.request();
        let mut checks = Checks(Vec::new());
        let error = activations(&bundle, &part, 1, &runtime, &cancel, &mut checks).expect_err("stopped");
        assert!(matches!(error, Error::Interrupted { .. }) && checks.0.is_empty(), "{error}");
    }

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
