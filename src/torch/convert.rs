//! Converts between the graph's tensors and LibTorch's.

use std::path::Path;

use tch::{Kind, Tensor};

use crate::base::{Error, Result};
use crate::ir::{self, DataType};

/// The LibTorch kind of an ONNX element type; `None` for types that LibTorch lacks (strings, sub-byte
/// and wide unsigned types).
pub fn kind_of(dtype: DataType) -> Option<Kind> {
    Some(match dtype {
        DataType::Float => Kind::Float,
        DataType::Uint8 => Kind::Uint8,
        DataType::Int8 => Kind::Int8,
        DataType::Int16 => Kind::Int16,
        DataType::Int32 => Kind::Int,
        DataType::Int64 => Kind::Int64,
        DataType::Bool => Kind::Bool,
        DataType::Float16 => Kind::Half,
        DataType::Double => Kind::Double,
        DataType::Bfloat16 => Kind::BFloat16,
        _ => return None,
    })
}

/// The kind in which the interpreter computes with tensors of a kind: 16-bit floats become f32. ONNX Runtime does the
/// same on a CPU; LibTorch multiplies f16 matrices there eighty times slower, and gradients in f16 underflow.
pub(super) fn computed_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        kind => kind,
    }
}

/// A constant in the kind of [`computed_kind`].
///
/// Errors: as [`tensor_from_ir`].
pub(super) fn constant_from_ir(name: &str, tensor: &ir::Tensor) -> Result<Tensor> {
    computed(name, tensor_from_ir(name, tensor)?)
}

/// The tensor in the kind of [`computed_kind`].
pub(super) fn computed(name: &str, tensor: Tensor) -> Result<Tensor> {
    let widened = tensor.f_kind().and_then(|kind| tensor.f_to_kind(computed_kind(kind)));
    widened.map_err(|e| Error::engine("LibTorch", format!("tensor `{name}`"), e))
}

/// The ONNX element type of a LibTorch kind; `None` for kinds that ONNX lacks.
pub fn data_type_of(kind: Kind) -> Option<DataType> {
    Some(match kind {
        Kind::Float => DataType::Float,
        Kind::Uint8 => DataType::Uint8,
        Kind::Int8 => DataType::Int8,
        Kind::Int16 => DataType::Int16,
        Kind::Int => DataType::Int32,
        Kind::Int64 => DataType::Int64,
        Kind::Bool => DataType::Bool,
        Kind::Half => DataType::Float16,
        Kind::Double => DataType::Double,
        Kind::BFloat16 => DataType::Bfloat16,
        _ => return None,
    })
}

/// A copy of a constant as a CPU tensor. 4-bit types become one byte per element.
///
/// Errors: `Error::Unsupported` for element types without a LibTorch kind, `Error::Invalid` when the number of bytes
/// does not match the shape.
pub fn tensor_from_ir(name: &str, tensor: &ir::Tensor) -> Result<Tensor> {
    let subject = || format!("tensor `{name}`");
    let dims = dims_of(name, tensor)?;
    let count = count_of(&dims);
    let bytes = tensor.bytes();
    let (kind, unpacked) = match tensor.dtype {
        DataType::Uint4 => (Kind::Uint8, Some(unpack4(bytes, count, false))),
        DataType::Int4 => (Kind::Int8, Some(unpack4(bytes, count, true))),
        dtype => {
            let kind = kind_of(dtype)
                .ok_or_else(|| Error::unsupported(subject(), format!("LibTorch has no element type for {dtype}")))?;
            (kind, None)
        }
    };
    let bytes = unpacked.as_deref().unwrap_or(bytes);
    let wanted = count.and_then(|count| count.checked_mul(kind.elt_size_in_bytes()));
    if wanted != Some(bytes.len()) {
        return Err(Error::invalid(
            subject(),
            format!("{} bytes do not fill {} of shape {dims:?}", bytes.len(), tensor.dtype),
        ));
    }
    Tensor::f_from_data_size(bytes, &dims, kind).map_err(|e| Error::engine("LibTorch", subject(), e))
}

/// A tensor as a constant of the graph, converted to `dtype`.
///
/// Errors: `Error::Unsupported` when LibTorch lacks the element type, `Error::Engine` when the copy fails.
pub fn tensor_to_ir(name: &str, tensor: &Tensor, dtype: DataType) -> Result<ir::Tensor> {
    let subject = || format!("tensor `{name}`");
    let kind = kind_of(dtype)
        .ok_or_else(|| Error::unsupported(subject(), format!("LibTorch has no element type for {dtype}")))?;
    let engine = |e| Error::engine("LibTorch", subject(), e);
    let host = tensor.detach().f_to_device(tch::Device::Cpu).and_then(|t| t.f_to_kind(kind)).map_err(engine)?;
    let count = host.numel();
    let mut bytes = vec![0u8; count * kind.elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, count).map_err(engine)?;
    let dims: Vec<u64> = host.size().iter().map(|&dim| dim as u64).collect();
    Ok(ir::Tensor::from_bytes(dtype, &dims, bytes))
}

/// The arrays of an `.npz` file by name, in file order.
///
/// Errors: `Error::Invalid` when the file cannot be read or an array has an element type that ONNX lacks.
pub fn read_npz(path: &Path) -> Result<Vec<(String, ir::Tensor)>> {
    let subject = || format!("`{}`", path.display());
    let arrays = Tensor::read_npz(path).map_err(|e| {
        Error::invalid(subject(), format!("is not an .npz file: {e}")).remedy("write the arrays with `numpy.savez`")
    })?;
    arrays
        .into_iter()
        .map(|(name, tensor)| {
            let dtype = tensor.f_kind().ok().and_then(data_type_of);
            let dtype = dtype.ok_or_else(|| {
                Error::invalid(subject(), format!("array `{name}` has no ONNX type"))
                    .remedy("store the array in an element type that ONNX has")
            })?;
            let tensor = tensor_to_ir(&name, &tensor, dtype)?;
            Ok((name, tensor))
        })
        .collect()
}

/// The shape in LibTorch's integer type.
pub(super) fn dims_of(name: &str, tensor: &ir::Tensor) -> Result<Vec<i64>> {
    tensor
        .dims
        .iter()
        .map(|&dim| i64::try_from(dim))
        .collect::<Result<_, _>>()
        .map_err(|_| Error::invalid(format!("tensor `{name}`"), format!("shape {:?} is out of range", tensor.dims)))
}

/// Number of elements of a shape; `None` on overflow.
pub(super) fn count_of(dims: &[i64]) -> Option<usize> {
    dims.iter().try_fold(1usize, |count, &dim| count.checked_mul(usize::try_from(dim).ok()?))
}

fn unpack4(bytes: &[u8], count: Option<usize>, signed: bool) -> Vec<u8> {
    let sign = |nibble: u8| if signed && nibble & 8 != 0 { nibble | 0xf0 } else { nibble };
    bytes.iter().flat_map(|&byte| [sign(byte & 15), sign(byte >> 4)]).take(count.unwrap_or(0)).collect()
}
