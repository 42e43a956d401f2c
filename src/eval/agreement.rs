//! Compares two computations of the same values: one prefill with cached steps, or the interpreter with ONNX Runtime.

use std::collections::BTreeMap;

use crate::base::{Error, Result};
use crate::bundle::Bundle;
use crate::ir::{self, DataType, Model};
use crate::runtime::{Decoder, Embedded, InputKind, Session, Step, TensorValue, TokenTypes};
use crate::torch;

use super::probe::noise;

/// Tokens of the test prompt: enough for several positions, and fast for any model. The last one is also decoded alone.
pub const PROMPT_TOKENS: usize = 8;

/// Image tokens of the test prompt, for decoders that read data of image tokens.
pub const IMAGE_TOKENS: std::ops::Range<usize> = 2..5;

/// What the model's token types stand for.
pub(super) fn token_types_of(bundle: &Bundle) -> TokenTypes {
    bundle.config().map(TokenTypes::of).unwrap_or_default()
}

/// A synthetic prompt in the form of decoder inputs.
#[derive(Clone)]
pub struct Probe(pub Embedded);

impl Probe {
    /// The prompt, [`PROMPT_TOKENS`] long or longer. If the decoder reads DeepStack features or a mask of image tokens, some of
    /// the tokens are image tokens with synthetic features.
    pub fn new(mut embedded: Embedded, decoder: &Decoder, token_types: TokenTypes) -> Self {
        let levels = decoder.deepstack_levels();
        if levels.is_some() || decoder.takes(InputKind::ImageMask) || decoder.takes(InputKind::TokenTypes) {
            let tokens = embedded.len();
            let side = &mut embedded.side;
            side.image = (0..tokens).map(|token| IMAGE_TOKENS.contains(&token)).collect();
            side.types = match token_types {
                TokenTypes::Image => side.image.iter().map(|&image| i64::from(image)).collect(),
                // The last token, which is also decoded alone, belongs to the answer; the tokens before it attend in
                // both directions.
                TokenTypes::Answer => (0..tokens).map(|token| i64::from(token + 1 == tokens)).collect(),
            };
            let (count, width) = levels.unwrap_or((0, 0));
            side.deepstack = noise(count * IMAGE_TOKENS.len() * width)
                .chunks_exact((IMAGE_TOKENS.len() * width).max(1))
                .map(<[f32]>::to_vec)
                .collect();
        }
        Probe(embedded)
    }

    /// All tokens in one prefill.
    fn whole(&self) -> Result<Step> {
        Step::prefill(&[&self.0], false)
    }

    /// All tokens except the last, in one prefill.
    fn beginning(&self) -> Result<Step> {
        Step::prefill(&[&self.0.slice(0..PROMPT_TOKENS - 1)], false)
    }

    /// The last token, after the others.
    pub fn last(&self) -> Result<Step> {
        let last = self.0.slice(PROMPT_TOKENS - 1..PROMPT_TOKENS);
        Step::decode(&[&last], &[vec![1; PROMPT_TOKENS - 1]], false)
    }

    /// The last token after the others for a graph with a cache, otherwise all tokens.
    pub fn step(&self, with_cache: bool) -> Result<Step> {
        if with_cache { self.last() } else { self.whole() }
    }
}

/// Largest difference between the last token's logits from a cached step and from one prefill.
pub fn cached_step(decoder: &mut Decoder, probe: &Probe) -> Result<f64> {
    let (whole, _) = decoder.step(&probe.whole()?, None)?;
    let (_, cache) = decoder.step(&probe.beginning()?, None)?;
    let (one, _) = decoder.step(&probe.last()?, Some(cache))?;
    let (whole, one) = (whole.to_f32()?, one.to_f32()?);
    let tail = whole.len().checked_sub(one.len()).and_then(|start| whole.get(start..));
    let tail = tail.ok_or_else(|| {
        Error::invalid(decoder.session().subject(), "returns more logits for one token than for eight")
    })?;
    Ok(largest_difference(tail.iter().map(|&x| f64::from(x)), one.iter().map(|&x| f64::from(x))))
}

/// Largest difference between the interpreter and ONNX Runtime over all outputs of a prefill and a cached step.
pub fn interpreter_steps(model: &Model, decoder: &mut Decoder, probe: &Probe) -> Result<f64> {
    let program = torch::Program::compile(model, &torch::Options::default())?;
    let prefill = probe.beginning()?;
    let fresh = decoder.feeds(&prefill)?;
    let empty = decoder.empty_cache(1)?;
    let slots: Vec<_> = decoder.slots().to_vec();
    let mut feeds: Vec<(&str, &TensorValue)> = fresh.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    feeds.extend(slots.iter().map(|slot| slot.past.name.as_str()).zip(empty.tensors()));
    let mine = interpret(&program, &feeds)?;
    let (logits, cache) = decoder.step(&prefill, None)?;
    let mut difference = outputs_differ(decoder, &mine, &logits, cache.tensors())?;
    if slots.is_empty() {
        return Ok(difference);
    }
    let one = probe.last()?;
    let fresh = decoder.feeds(&one)?;
    let mut feeds: Vec<(&str, &TensorValue)> = fresh.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    feeds.extend(slots.iter().map(|slot| slot.past.name.as_str()).zip(cache.tensors()));
    let mine = interpret(&program, &feeds)?;
    let (logits, cache) = decoder.step(&one, Some(cache))?;
    difference = worse(difference, outputs_differ(decoder, &mine, &logits, cache.tensors())?);
    Ok(difference)
}

fn outputs_differ(
    decoder: &Decoder,
    mine: &BTreeMap<String, ir::Tensor>,
    logits: &TensorValue,
    cache: &[TensorValue],
) -> Result<f64> {
    let names =
        std::iter::once(decoder.logits_name()).chain(decoder.slots().iter().map(|slot| slot.present.name.as_str()));
    let mut difference = 0.0;
    for (name, theirs) in names.zip(std::iter::once(logits).chain(cache)) {
        let mine = mine.get(name).ok_or_else(|| Error::invalid("interpreter", format!("gave no output `{name}`")))?;
        difference = worse(difference, tensors_differ(mine, &theirs.to_ir()?));
    }
    Ok(difference)
}

/// Largest difference between the interpreter and ONNX Runtime over all outputs of one run.
pub fn interpreter_once(model: &Model, session: &mut Session, feeds: &[(String, TensorValue)]) -> Result<f64> {
    let feeds = borrowed(feeds);
    let program = torch::Program::compile(model, &torch::Options::default())?;
    let mine = interpret(&program, &feeds)?;
    let mut difference = 0.0;
    for (name, theirs) in session.run(&feeds, None)?.iter() {
        let mine = mine.get(name).ok_or_else(|| Error::invalid("interpreter", format!("gave no output `{name}`")))?;
        difference = worse(difference, tensors_differ(mine, &theirs.to_ir()?));
    }
    Ok(difference)
}

/// Difference of results from those computed in f32.
pub struct Rounding {
    pub difference: f64,
    /// The largest of the values in f32.
    pub largest: f64,
}

/// The logits of one prefill, from the original graph and from its f32 form.
pub fn rounding_step(decoder: &mut Decoder, reference: &mut Decoder, probe: &Probe) -> Result<Rounding> {
    let (mine, _) = decoder.step(&probe.whole()?, None)?;
    let (exact, _) = reference.step(&probe.whole()?, None)?;
    rounding([(&mine, &exact)])
}

/// All floating-point outputs of one run, from the original graph and from its f32 form.
pub fn rounding_once(
    (session, feeds): (&mut Session, &[(String, TensorValue)]),
    (reference, wide): (&mut Session, &[(String, TensorValue)]),
) -> Result<Rounding> {
    let (mine, exact) = (session.run(&borrowed(feeds), None)?, reference.run(&borrowed(wide), None)?);
    let pairs = mine.iter().zip(exact.iter()).map(|((_, mine), (_, exact))| (mine, exact));
    rounding(pairs.filter(|(mine, _)| mine.dtype().is_ok_and(DataType::is_float)))
}

/// All outputs of a prefill and a cached step.
pub fn decoder_outputs(decoder: &mut Decoder, probe: &Probe) -> Result<Vec<ir::Tensor>> {
    let (logits, cache) = decoder.step(&probe.beginning()?, None)?;
    let mut found = vec![logits.to_ir()?];
    if !decoder.slots().is_empty() {
        let (logits, cache) = decoder.step(&probe.last()?, Some(cache))?;
        found.push(logits.to_ir()?);
        found.extend(cache.tensors().iter().map(TensorValue::to_ir).collect::<Result<Vec<_>>>()?);
    }
    Ok(found)
}

/// All outputs of one run.
pub fn session_outputs(session: &mut Session, feeds: &[(String, TensorValue)]) -> Result<Vec<ir::Tensor>> {
    session.run(&borrowed(feeds), None)?.iter().map(|(_, tensor)| tensor.to_ir()).collect()
}

/// Largest difference between the outputs of two computations.
pub fn outputs_apart(a: &[ir::Tensor], b: &[ir::Tensor]) -> f64 {
    a.iter().zip(b).fold(0.0, |largest, (a, b)| worse(largest, tensors_differ(a, b)))
}

fn borrowed(feeds: &[(String, TensorValue)]) -> Vec<(&str, &TensorValue)> {
    feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect()
}

fn rounding<'a>(pairs: impl IntoIterator<Item = (&'a TensorValue, &'a TensorValue)>) -> Result<Rounding> {
    let mut found = Rounding { difference: 0.0, largest: 0.0 };
    for (mine, exact) in pairs {
        let exact = exact.to_ir()?;
        found.difference = worse(found.difference, tensors_differ(&mine.to_ir()?, &exact));
        // Tokens that a head never writes have logits of minus infinity.
        let finite = exact.to_f64s().unwrap_or_default().into_iter().filter(|x| x.is_finite());
        found.largest = finite.fold(found.largest, |most, x| most.max(x.abs()));
    }
    Ok(found)
}

/// All outputs of the interpreter by name.
fn interpret(program: &torch::Program, feeds: &[(&str, &TensorValue)]) -> Result<BTreeMap<String, ir::Tensor>> {
    let mut inputs = Vec::with_capacity(feeds.len());
    for (name, tensor) in feeds {
        inputs.push((program.value(name)?, torch::tensor_from_ir(name, &tensor.to_ir()?)?));
    }
    let results = program.run(&inputs, program.outputs())?;
    let mut outputs = BTreeMap::new();
    for (id, tensor) in program.outputs().iter().zip(&results) {
        let name = program.name(*id);
        outputs.insert(name.to_string(), torch::tensor_to_ir(name, tensor, DataType::Float)?);
    }
    Ok(outputs)
}

fn tensors_differ(mine: &ir::Tensor, theirs: &ir::Tensor) -> f64 {
    let numbers = |tensor: &ir::Tensor| {
        tensor.to_f64s().or_else(|| Some(tensor.to_i64s()?.into_iter().map(|x| x as f64).collect()))
    };
    match (numbers(mine), numbers(theirs)) {
        (Some(a), Some(b)) if mine.dims == theirs.dims => largest_difference(a.into_iter(), b.into_iter()),
        _ => f64::INFINITY,
    }
}

/// The largest absolute difference; NaN if an operand is NaN.
pub(super) fn largest_difference(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
    a.zip(b).fold(0.0, |largest, (a, b)| worse(largest, if a == b { 0.0 } else { (a - b).abs() }))
}

/// The larger difference; NaN if one is NaN.
pub(super) fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_tensors_of_different_shapes_never_agree() {
        let tensor = |dims: &[u64], values: &[f32]| ir::Tensor::from_f32(dims, values);
        assert_eq!(tensors_differ(&tensor(&[2], &[1.0, 2.0]), &tensor(&[2], &[1.5, 2.0])), 0.5);
        assert!(tensors_differ(&tensor(&[2], &[1.0, f32::NAN]), &tensor(&[2], &[1.0, 2.0])).is_nan());
        assert_eq!(tensors_differ(&tensor(&[2], &[1.0, 2.0]), &tensor(&[1, 2], &[1.0, 2.0])), f64::INFINITY);
        let infinite = tensor(&[1], &[f32::INFINITY]);
        assert_eq!(tensors_differ(&infinite, &infinite), 0.0);
    }
}
