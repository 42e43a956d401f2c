//! Sizes of what a graph computes, measured: every value of the graph is an output of a run without optimisations, and every value
//! of a body gives out its number of elements.
//!
//! A decoder and its head run prompts of several lengths. A value's size is a polynomial of the length of degree two at most,
//! that of a score for each pair of tokens, so three lengths give its size at every length.

use crate::base::{Cancel, Device, Error, Progress, Result, human_bytes, list_preview};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::{DataType, Model, ValueId};
use crate::onnx;
use crate::runtime::{Decoder, Optimisation, Outputs, Runtime, Session, SessionOptions, Step, TensorValue};

use super::agreement::{Probe, token_types_of};
use super::bodies::{self, Counted, Inside, computed};
use super::checks::{Check, CheckStatus, Checks};
use super::pixels::pixel_feeds;
use super::probe::{noise, noise_text, token_ids};

/// Name of the check.
pub(super) const ACTIVATIONS: &str = "buffers of activations";
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

/// What was found of a component.
struct Finding {
    status: CheckStatus,
    /// The most tokens of a prompt of which all values fit; `None` where no value grows beyond the limit, and of a picture.
    longest_prompt: Option<u64>,
    /// Bytes of the largest value of a picture.
    largest_bytes: Option<u64>,
    detail: String,
}

/// True for a component whose values are measured.
pub fn is_measured(role: Role) -> bool {
    role.is_decoder() || matches!(role, Role::LmHead | Role::VisionEncoder)
}

/// Checks the values that components compute against a largest buffer, on the processor, as `verify` does.
///
/// Errors: `Error::Interrupted`. Any other error is in the checks.
pub fn activation_checks(bundle: &Bundle, parts: &[&Component], limit: u64, cancel: &Cancel) -> Result<Vec<Check>> {
    let mut checks = Checks(Vec::new());
    let progress = Progress::new("measure", "files", parts.len() as u64);
    for part in parts {
        match Runtime::new(Device::Cpu) {
            Ok(runtime) => activations(bundle, part, limit, &runtime, cancel, &mut checks)?,
            Err(error) => checks.error(ACTIVATIONS, &part.file, &error),
        }
        progress.advance(1);
    }
    Ok(checks.0)
}

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
        Ok(Finding { status, longest_prompt, largest_bytes, detail }) => {
            checks.add(ACTIVATIONS, &part.file, status, detail);
            if let Some(check) = checks.0.last_mut() {
                (check.longest_prompt, check.largest_bytes) = (longest_prompt, largest_bytes);
            }
        }
        Err(error @ Error::Interrupted { .. }) => return Err(error),
        Err(error) => checks.error(ACTIVATIONS, &part.file, &error),
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
    let sizes = shown.sizes(&shown.session(runtime)?.run(&given, Some(&shown.wanted()))?)?;
    let largest = sizes.iter().zip(&shown.values).max_by_key(|(size, _)| **size);
    let Some((&size, ShownValue { name, .. })) = largest else {
        return Ok(shown.finding(true, None, "the graph computes nothing".into(), 0));
    };
    let pixels = feeds.iter().find(|(name, _)| name.starts_with("pixel")).map(|(_, pixels)| pixels.shape());
    let (shape, has, limit_text) = (pixels.unwrap_or_default(), human_bytes(size), human_bytes(limit));
    let detail = format!("for pixels {shape:?} the largest value, {name}, has {has}; {limit_text} are allowed");
    Ok(Finding { largest_bytes: Some(size), ..shown.finding(size <= limit, None, detail, shown.idle(&[&sizes])) })
}

/// A value of a graph.
struct ShownValue {
    /// As messages show it.
    name: String,
    /// The output with the value, or with its number of elements.
    output: String,
    /// Its element type, where the output is the number of its elements.
    counted: Option<DataType>,
}

/// A graph all of whose values are outputs.
struct Shown {
    model: Model,
    values: Vec<ShownValue>,
    /// Values whose sizes are not given out.
    uncounted: Vec<String>,
}

impl Shown {
    fn of(mut model: Model) -> Self {
        let graph = &mut model.graph;
        let own = computed(graph, &graph.body);
        let shown = |(id, operator): &(ValueId, String)| ShownValue {
            name: format!("`{}` of {operator}", graph.name(*id)),
            output: graph.name(*id).to_string(),
            counted: None,
        };
        let mut values: Vec<ShownValue> = own.iter().map(shown).collect();
        for (id, _) in &own {
            if !graph.body.outputs.contains(id) {
                graph.body.outputs.push(*id);
            }
        }
        let Inside { counted, mut uncounted } = bodies::count(&mut model);
        let inside = |Counted { name, dtype, output }| ShownValue { name, output, counted: Some(dtype) };
        values.extend(counted.into_iter().map(inside));
        uncounted.extend(model.functions.iter().map(|function| format!("the values of function `{}`", function.name)));
        Shown { model, values, uncounted }
    }

    fn session(&self, runtime: &Runtime) -> Result<Session> {
        let options = SessionOptions { optimisation: Optimisation::None, ..SessionOptions::default() };
        runtime.session_of(&self.model, &options)
    }

    fn wanted(&self) -> Vec<&str> {
        self.values.iter().map(|value| value.output.as_str()).collect()
    }

    /// Bytes of each value of a run.
    fn sizes(&self, found: &Outputs) -> Result<Vec<u64>> {
        let bytes = |(value, (_, tensor)): (&ShownValue, (&str, &TensorValue))| -> Result<u64> {
            let (count, dtype) = match value.counted {
                None => (tensor.shape().iter().map(|&size| size as u64).product(), tensor.dtype()?),
                Some(dtype) => (tensor.data::<i64>()?.first().map_or(0, |&count| count.max(0) as u64), dtype),
            };
            Ok(dtype.byte_len(count).unwrap_or(count))
        };
        self.values.iter().zip(found.iter()).map(bytes).collect()
    }

    /// Number of values of bodies that no run computed.
    fn idle(&self, runs: &[&[u64]]) -> usize {
        let idle = |at: usize| runs.iter().all(|sizes| sizes.get(at) == Some(&0));
        self.values.iter().enumerate().filter(|(at, value)| value.counted.is_some() && idle(*at)).count()
    }

    /// The finding with what was not measured: `idle` values of bodies that did not run, and values whose sizes are unknown, with
    /// which the graph is not known to fit.
    fn finding(&self, fits: bool, longest_prompt: Option<u64>, mut detail: String, idle: usize) -> Finding {
        match idle {
            0 => {}
            1 => detail.push_str("; 1 value of a branch that was not taken is not measured"),
            _ => detail.push_str(&format!("; {idle} values of branches that were not taken are not measured")),
        }
        if !self.uncounted.is_empty() {
            detail.push_str(&format!("; not measured: {}", list_preview(&self.uncounted, 3)));
        }
        let status = match (fits, self.uncounted.is_empty()) {
            (false, _) => CheckStatus::Failed,
            (true, true) => CheckStatus::Passed,
            (true, false) => CheckStatus::Warning,
        };
        Finding { status, longest_prompt, largest_bytes: None, detail }
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
            self.sizes(&run(length, &wanted)?)
        };
        let [first, second, third] = LENGTHS;
        let (first, second, third) = (run(first)?, run(second)?, run(third)?);
        let idle = self.idle(&[&first, &second, &third]);
        let longest = self.values.iter().zip(first.iter().zip(&second).zip(&third));
        let longest = longest.map(|(value, ((&a, &b), &c))| (longest_prompt([a, b, c], limit), &value.name));
        let limit = human_bytes(limit);
        Ok(match longest.min_by_key(|(tokens, _)| *tokens) {
            Some((0, name)) => {
                let detail = format!("{name} has more than {limit} at any length of the prompt");
                self.finding(false, Some(0), detail, idle)
            }
            Some((tokens, name)) if tokens < LONGEST => {
                let detail = format!(
                    "all values of a prompt of {tokens} tokens fit into {limit}; of a longer one {name} does not"
                );
                self.finding(true, Some(tokens), detail, idle)
            }
            _ => self.finding(true, None, format!("no value grows beyond {limit} with the prompt"), idle),
        })
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
    use std::path::Path;

    use super::*;

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
