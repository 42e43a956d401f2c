//! Weights, scales and activations that are not finite are refused.

use crate::base::{Error, Result};
use crate::ir::DataType;

/// Errors: `Error::Invalid` that names the weight when one of its numbers is infinite or not a number.
pub(super) fn require_finite(file: &str, name: &str, values: &[f32]) -> Result<()> {
    let Some(first) = values.iter().find(|value| !value.is_finite()) else { return Ok(()) };
    let count = values.iter().filter(|value| !value.is_finite()).count();
    let problem = format!("has {count} numbers of {} that are not finite, the first is {first}", values.len());
    Err(Error::invalid(format!("`{file}`: weight `{name}`"), problem)
        .remedy("repair the float model: its training or its export went wrong"))
}

/// Scales and rounded numbers of a weight whose own numbers are finite.
///
/// Errors: `Error::Invalid` that names the weight when the type of the scales is too narrow for its numbers.
pub(super) fn require_scales(
    file: &str,
    name: &str,
    values: &[f32],
    scale_type: DataType,
    scales: &[f32],
    found: &[f32],
) -> Result<()> {
    if scales.iter().chain(found).all(|value| value.is_finite()) {
        return Ok(());
    }
    let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let (range, remedy) = match scale_type {
        DataType::Float16 => ("float16", "take int4, whose scales are float32"),
        _ => ("float32", "leave the model in floats"),
    };
    let problem = format!("has numbers up to {largest:e}, whose scale is beyond the range of {range}");
    Err(Error::invalid(format!("`{file}`: weight `{name}`"), problem).remedy(remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_scales_that_are_not_finite_are_named() {
        require_finite("model.onnx", "head", &[0.0, -1e38]).unwrap();
        for (value, want) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
            let error = require_finite("model.onnx", "head", &[1.0, value, value]).unwrap_err().to_string();
            let found =
                format!("`model.onnx`: weight `head`: has 2 numbers of 3 that are not finite, the first is {want}");
            assert!(error.starts_with(&found), "{error}");
        }
        let scales = |dtype, scale| require_scales("model.onnx", "head", &[1.0, -2e6], dtype, &[scale], &[1.0]);
        scales(DataType::Float, 3e5).unwrap();
        let error = scales(DataType::Float16, f32::INFINITY).unwrap_err().to_string();
        assert!(error.contains("numbers up to 2e6, whose scale is beyond the range of float16"), "{error}");
    }
}
