//! Elements of tensors as f32 and back.

use half::{bf16, f16};

use crate::base::{Error, Result};
use crate::ir::{DataType, Tensor};

/// The elements of a floating-point tensor in row-major order; f64 is rounded to f32.
///
/// Errors: `Error::Invalid` for other element types.
pub fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    let bytes = tensor.bytes();
    Ok(match tensor.dtype {
        DataType::Float => bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect(),
        DataType::Float16 => bytes.as_chunks().0.iter().map(|chunk| f16::from_le_bytes(*chunk).to_f32()).collect(),
        DataType::Bfloat16 => bytes.as_chunks().0.iter().map(|chunk| bf16::from_le_bytes(*chunk).to_f32()).collect(),
        DataType::Double => bytes.as_chunks().0.iter().map(|chunk| f64::from_le_bytes(*chunk) as f32).collect(),
        dtype => return Err(not_float(dtype)),
    })
}

/// The bytes of numbers in an element type, each rounded to the nearest, ties to even.
///
/// Errors: `Error::Invalid` for element types that are no floating-point numbers.
pub fn from_floats(dtype: DataType, numbers: &[f32]) -> Result<Vec<u8>> {
    Ok(match dtype {
        DataType::Float => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
        DataType::Float16 => numbers.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes()).collect(),
        DataType::Bfloat16 => numbers.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes()).collect(),
        DataType::Double => numbers.iter().flat_map(|&number| f64::from(number).to_le_bytes()).collect(),
        dtype => return Err(not_float(dtype)),
    })
}

fn not_float(dtype: DataType) -> Error {
    Error::invalid(format!("a tensor of {dtype}"), "has no floating-point elements")
}
