//! Tolerance for graphs that round activations to few bits.
//!
//! Rounding is a step function: the last bit of a value near a boundary decides the direction, and the results differ
//! by a whole step. Two engines never agree in all last bits, so for such graphs the tolerance is derived from the
//! runtime's own spread: the change of its outputs when its inputs change by a relative 1e-6.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::Result;
use crate::ir::{DataType, Model, Tensor};
use crate::runtime::{Decoder, Runtime, Session, TensorValue};

use super::agreement::{Probe, decoder_outputs, outputs_apart, session_outputs};
use super::exact::{EXACT, find_node};

/// The relative change of the inputs: about 16 roundings of f32 (2^-24 each).
pub const CHANGE: f32 = 1e-6;
/// Number of tested changes, each with random signs.
const TRIES: u64 = 8;

/// Operators that round activations, as prefixes of their names.
const ROUNDING: &[&str] =
    &["DynamicQuantize", "QuantizeLinear", "QLinear", "QGemm", "QAttention", "MatMulIntegerToFloat"];

/// An operator that rounds activations to few bits, if the graph has one.
pub fn rounding_operator(model: &Model) -> Option<&str> {
    find_node(&model.graph.body, &|node| ROUNDING.iter().any(|start| node.op_type.starts_with(start)))
        .map(|node| node.op_type.as_str())
}

/// The largest difference between the runtime's outputs before and after changes to a decoder's embeddings, or to the
/// graph's f32 weights when it takes ids.
///
/// Errors: as `Decoder::step`.
pub fn spread_of_decoder(
    model: &Model,
    decoder: &mut Decoder,
    probe: &Probe,
    head_dim: Option<usize>,
    runtime: &Runtime,
) -> Result<f64> {
    let before = decoder_outputs(decoder, probe)?;
    let mut largest = 0.0f64;
    for seed in 0..TRIES {
        let after = if probe.0.data.is_empty() {
            let mut changed = Decoder::new(runtime.session_of(&changed_weights(model, seed), &EXACT)?, head_dim)?;
            decoder_outputs(&mut changed, probe)?
        } else {
            let mut changed = probe.clone();
            change(&mut changed.0.data, seed);
            decoder_outputs(decoder, &changed)?
        };
        largest = largest.max(outputs_apart(&before, &after));
    }
    Ok(largest)
}

/// As [`spread_of_decoder`], for a graph that needs only one run.
///
/// Errors: as `Session::run`.
pub fn spread_of_session(
    model: &Model,
    session: &mut Session,
    feeds: &[(String, TensorValue)],
    runtime: &Runtime,
) -> Result<f64> {
    let floats = feeds.iter().any(|(_, tensor)| tensor.dtype().is_ok_and(DataType::is_float));
    let before = session_outputs(session, feeds)?;
    let mut largest = 0.0f64;
    for seed in 0..TRIES {
        let after = if floats {
            session_outputs(session, &changed_feeds(feeds, seed)?)?
        } else {
            let mut changed = runtime.session_of(&changed_weights(model, seed), &EXACT)?;
            session_outputs(&mut changed, feeds)?
        };
        largest = largest.max(outputs_apart(&before, &after));
    }
    Ok(largest)
}

fn changed_feeds(feeds: &[(String, TensorValue)], seed: u64) -> Result<Vec<(String, TensorValue)>> {
    let changed = feeds.iter().map(|(name, tensor)| {
        let dtype = tensor.dtype()?;
        if !dtype.is_float() {
            return Ok((name.clone(), TensorValue::from_ir(&tensor.to_ir()?)?));
        }
        let mut data = tensor.to_f32()?.into_owned();
        change(&mut data, seed);
        Ok((name.clone(), TensorValue::from_f32(dtype, &tensor.shape(), data)?))
    });
    changed.collect()
}

fn change(data: &mut [f32], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    data.iter_mut().for_each(|value| *value *= 1.0 + if rng.random() { CHANGE } else { -CHANGE });
}

/// The graph with a change to every f32 weight.
fn changed_weights(model: &Model, seed: u64) -> Model {
    let mut changed = model.clone();
    for (number, (_, tensor)) in changed.graph.body.initializers.iter_mut().enumerate() {
        if tensor.dtype == DataType::Float {
            let (words, _) = tensor.bytes().as_chunks::<4>();
            let mut data: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
            change(&mut data, seed.wrapping_mul(0x9e37_79b9).wrapping_add(number as u64));
            *tensor = Tensor::from_f32(&tensor.dims.clone(), &data);
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Device;
    use crate::eval::checks::{CheckStatus, Checks, TOLERANCE};
    use crate::ir::{Dim, Node, Value, ValueType};

    /// `DynamicQuantizeLinear`, with its result as floats.
    fn rounded() -> Model {
        let mut model = Model { ir_version: 8, opset_imports: [(String::new(), 17)].into(), ..Model::default() };
        let graph = &mut model.graph;
        let ty = |dtype| Some(ValueType::Tensor { dtype, shape: Some(vec![Dim::Known(3)]) });
        let mut value = |name: &str, ty| graph.add_value(Value { name: name.into(), ty, ..Value::default() });
        let (x, y) = (value("x", ty(DataType::Float)), value("y", ty(DataType::Uint8)));
        let (scale, zero) = (value("scale", None), value("zero", None));
        graph.body.nodes.push(Node {
            op_type: "DynamicQuantizeLinear".into(),
            inputs: vec![Some(x)],
            outputs: vec![Some(y), Some(scale), Some(zero)],
            ..Node::default()
        });
        graph.body.inputs = vec![x];
        graph.body.outputs = vec![y];
        model
    }

    #[test]
    fn the_spread_beside_a_rounding_boundary_is_one_quantisation_step() {
        let model = rounded();
        assert_eq!(rounding_operator(&model), Some("DynamicQuantizeLinear"));
        assert_eq!(rounding_operator(&Model::default()), None);
        let runtime = Runtime::new(Device::Cpu).unwrap();
        let mut session = runtime.session_of(&model, &EXACT).unwrap();
        let mut spread = |values: [f32; 3]| {
            let feeds = [("x".to_string(), TensorValue::from_f32(DataType::Float, &[3], values.to_vec()).unwrap())];
            spread_of_session(&model, &mut session, &feeds, &runtime).unwrap()
        };
        // One step is 1.
        assert_eq!(spread([0.0, 255.0, 2.5]), 1.0);
        assert_eq!(spread([0.0, 255.0, 2.25]), 0.0);
    }

    #[test]
    fn the_tolerance_grows_only_for_graphs_that_round_and_with_their_spread() {
        let ended = |difference: f64, operator: Option<&str>, spread: f64| {
            let mut checks = Checks(Vec::new());
            checks.engines(("interpreter", "x"), difference, "all".into(), (TOLERANCE, operator), || Ok(spread));
            (checks.0[0].status, checks.0[0].tolerance.unwrap())
        };
        let operator = Some("DynamicQuantizeLinear");
        assert_eq!(ended(1e-5, operator, f64::NAN), (CheckStatus::Passed, TOLERANCE));
        assert_eq!(ended(0.01, operator, 0.02), (CheckStatus::Passed, 0.04));
        assert_eq!(ended(0.01, operator, 1e-7), (CheckStatus::Failed, TOLERANCE));
        assert_eq!(ended(0.01, operator, f64::INFINITY), (CheckStatus::Failed, TOLERANCE));
        assert_eq!(ended(0.01, None, 0.02), (CheckStatus::Failed, TOLERANCE));
        assert_eq!(ended(f64::NAN, operator, 0.02).0, CheckStatus::Failed);
    }
}
