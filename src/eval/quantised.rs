//! How far a graph that rounds activations to few bits may lie from itself.
//!
//! Rounding is a step: where a value lies next to a boundary, its last bit decides on which side it falls, and what follows
//! differs by a whole step. No two engines give the same last bits, so such graphs are compared with what the runtime shows
//! by itself: its outputs before and after its inputs change by a relative 1e-6.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::Result;
use crate::ir::{DataType, Model, Tensor as Weights};
use crate::runtime::{Decoder, Runtime, Session, Tensor};

use super::agreement::{Probe, decoders_differ, sessions_differ};
use super::exact::{EXACT, find_node};

/// The relative change of the inputs.
pub const CHANGE: f32 = 1e-6;
/// Changes that are tried, each of other signs.
const TRIES: u64 = 8;

/// Operators that round activations, by the beginnings of their names.
const ROUNDING: &[&str] = &["DynamicQuantize", "QuantizeLinear", "QLinear", "QGemm", "QAttention", "MatMulIntegerToFloat"];

/// An operator that rounds activations to few bits, if the graph has one.
pub fn rounding_operator(model: &Model) -> Option<&str> {
    find_node(&model.graph.body, &|node| ROUNDING.iter().any(|start| node.op_type.starts_with(start)))
        .map(|node| node.op_type.as_str())
}

/// The largest difference between the runtime's outputs before and after changes of a decoder's embeddings, or of the
/// graph's f32 weights where it takes ids.
///
/// Errors: as `Decoder::step`.
pub fn spread_of_decoder(
    model: &Model,
    decoder: &mut Decoder,
    probe: &Probe,
    head_dim: Option<usize>,
    runtime: &Runtime,
) -> Result<f64> {
    let mut largest = 0.0f64;
    for seed in 0..TRIES {
        let found = if probe.data.is_empty() {
            let mut changed = Decoder::new(runtime.session_of(&changed_weights(model, seed), &EXACT)?, head_dim)?;
            decoders_differ((decoder, probe), (&mut changed, probe))?
        } else {
            let mut data = probe.data.clone();
            change(&mut data, seed);
            let changed = Probe { ids: probe.ids.clone(), data, ..*probe };
            let mut again = Decoder::new(runtime.session_of(model, &EXACT)?, head_dim)?;
            decoders_differ((decoder, probe), (&mut again, &changed))?
        };
        largest = largest.max(found);
    }
    Ok(largest)
}

/// As [`spread_of_decoder`], of a graph that one run exercises.
///
/// Errors: as `Session::run`.
pub fn spread_of_session(
    model: &Model,
    session: &mut Session,
    feeds: &[(String, Tensor)],
    runtime: &Runtime,
) -> Result<f64> {
    let floats = feeds.iter().any(|(_, tensor)| tensor.dtype().is_ok_and(DataType::is_float));
    let mut largest = 0.0f64;
    for seed in 0..TRIES {
        let changed = feeds.iter().map(|(name, tensor)| {
            let dtype = tensor.dtype()?;
            if !dtype.is_float() {
                return Ok((name.clone(), Tensor::from_ir(&tensor.to_ir()?)?));
            }
            let mut data = tensor.to_f32()?.into_owned();
            change(&mut data, seed);
            Ok((name.clone(), Tensor::from_f32(dtype, &tensor.shape(), data)?))
        });
        let changed: Vec<(String, Tensor)> = changed.collect::<Result<_>>()?;
        let other = if floats { model.clone() } else { changed_weights(model, seed) };
        let mut other = runtime.session_of(&other, &EXACT)?;
        largest = largest.max(sessions_differ((session, feeds), (&mut other, &changed))?);
    }
    Ok(largest)
}

fn change(data: &mut [f32], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    data.iter_mut().for_each(|value| *value *= 1.0 + if rng.random() { CHANGE } else { -CHANGE });
}

/// The graph with every f32 weight changed.
fn changed_weights(model: &Model, seed: u64) -> Model {
    let mut changed = model.clone();
    for (number, (_, tensor)) in changed.graph.body.initializers.iter_mut().enumerate() {
        if tensor.dtype == DataType::Float {
            let (words, _) = tensor.bytes().as_chunks::<4>();
            let mut data: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
            change(&mut data, seed.wrapping_mul(0x9e37_79b9).wrapping_add(number as u64));
            *tensor = Weights::from_f32(&tensor.dims.clone(), &data);
        }
    }
    changed
}
