//! Tensors in ONNX Runtime.

use std::borrow::Cow;

use half::{bf16, f16};
use ort::memory::Allocator;
use ort::value::{DynTensor, DynTensorValueType, DynValue, PrimitiveTensorElementType, TensorElementType};

use ndarray::ArrayD;

use crate::base::{Error, Result};
use crate::ir::DataType;
use crate::prompt::Array;

use super::ENGINE;

/// A dense tensor owned by ONNX Runtime, on the CPU or on a device. Passing it between calls does not copy it.
#[derive(Debug)]
pub struct TensorValue(DynTensor);

/// Rust types of tensor elements.
pub trait TensorElement: PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static {
    /// The ONNX type of `Self`.
    const DTYPE: DataType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {
        $(impl TensorElement for $ty {
            const DTYPE: DataType = DataType::$dtype;
        })*
    };
}

elements! {
    f32 => Float, f64 => Double, f16 => Float16, bf16 => Bfloat16, i64 => Int64, i32 => Int32, i16 => Int16, i8 => Int8, u8 => Uint8, bool => Bool,
}

const ELEMENT_TYPES: &[(DataType, TensorElementType)] = &[
    (DataType::Float, TensorElementType::Float32),
    (DataType::Double, TensorElementType::Float64),
    (DataType::Float16, TensorElementType::Float16),
    (DataType::Bfloat16, TensorElementType::Bfloat16),
    (DataType::Int64, TensorElementType::Int64),
    (DataType::Int32, TensorElementType::Int32),
    (DataType::Int16, TensorElementType::Int16),
    (DataType::Int8, TensorElementType::Int8),
    (DataType::Uint64, TensorElementType::Uint64),
    (DataType::Uint32, TensorElementType::Uint32),
    (DataType::Uint16, TensorElementType::Uint16),
    (DataType::Uint8, TensorElementType::Uint8),
    (DataType::Bool, TensorElementType::Bool),
    (DataType::String, TensorElementType::String),
];

/// The element type of an ONNX Runtime type; `None` for types that interlace does not use.
pub(super) fn data_type(ty: TensorElementType) -> Option<DataType> {
    ELEMENT_TYPES.iter().find(|row| row.1 == ty).map(|row| row.0)
}

/// The ONNX Runtime type of an element type.
pub(super) fn element_type(dtype: DataType) -> Result<TensorElementType> {
    let row = ELEMENT_TYPES.iter().find(|row| row.0 == dtype);
    row.map(|row| row.1)
        .ok_or_else(|| Error::unsupported(format!("tensor of {dtype}"), "cannot be fed to ONNX Runtime"))
}

impl TensorValue {
    /// A tensor of `shape` over `data` in row-major order.
    ///
    /// Errors: `Error::Invalid` when the shape does not have exactly `data.len()` elements.
    pub fn new<T: TensorElement>(shape: &[usize], data: Vec<T>) -> Result<Self> {
        let count = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
        if count != Some(data.len()) {
            return Err(Error::invalid("tensor", format!("shape {shape:?} does not hold {} elements", data.len())));
        }
        if data.is_empty() {
            return Self::empty(T::DTYPE, shape);
        }
        let tensor =
            ort::value::Tensor::from_array((shape.to_vec(), data)).map_err(|e| Error::engine(ENGINE, "a tensor", e))?;
        Ok(TensorValue(tensor.upcast()))
    }

    /// A tensor without elements: at least one axis of `shape` is 0.
    ///
    /// Errors: `Error::Invalid` when no axis is 0.
    pub fn empty(dtype: DataType, shape: &[usize]) -> Result<Self> {
        if !shape.contains(&0) {
            return Err(Error::invalid("empty tensor", format!("shape {shape:?} holds elements")));
        }
        let dims: Vec<i64> = shape.iter().map(|&dim| dim as i64).collect();
        let tensor = DynTensor::new(&Allocator::default(), element_type(dtype)?, dims)
            .map_err(|e| Error::engine(ENGINE, "a tensor", e))?;
        Ok(TensorValue(tensor))
    }

    pub(super) fn from_value(value: DynValue) -> Result<Self> {
        value
            .downcast::<DynTensorValueType>()
            .map(TensorValue)
            .map_err(|e| Error::engine(ENGINE, "a value that is not a tensor", e))
    }

    pub(super) fn value(&self) -> &DynTensor {
        &self.0
    }

    /// Element type.
    ///
    /// Errors: `Error::Unsupported` for unknown types.
    pub fn dtype(&self) -> Result<DataType> {
        let ty = *self.0.data_type();
        data_type(ty).ok_or_else(|| Error::unsupported("tensor", format!("element type {ty}")))
    }

    /// Axis lengths.
    pub fn shape(&self) -> Vec<usize> {
        self.0.shape().iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect()
    }

    /// The elements in row-major order.
    ///
    /// Errors: `Error::Engine` when the element type differs or the tensor is not in CPU memory.
    pub fn data<T: TensorElement>(&self) -> Result<&[T]> {
        self.0.try_extract_tensor::<T>().map(|(_, data)| data).map_err(|e| Error::engine(ENGINE, "a tensor", e))
    }

    /// A copy as a constant of the graph.
    ///
    /// Errors: `Error::Unsupported` for element types that cannot be copied; `Error::Engine` when the
    /// tensor is not in CPU memory.
    pub fn to_ir(&self) -> Result<crate::ir::Tensor> {
        let bytes: Vec<u8> = match self.dtype()? {
            DataType::Float => self.data::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Double => self.data::<f64>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Float16 => self.data::<f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Bfloat16 => self.data::<bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Int64 => self.data::<i64>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Int32 => self.data::<i32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Int16 => self.data::<i16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Int8 => self.data::<i8>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Uint8 => self.data::<u8>()?.to_vec(),
            DataType::Bool => self.data::<bool>()?.iter().map(|&x| u8::from(x)).collect(),
            dtype => return Err(Error::unsupported(format!("tensor of {dtype}"), "cannot be copied")),
        };
        let dims: Vec<u64> = self.shape().iter().map(|&dim| dim as u64).collect();
        Ok(crate::ir::Tensor::from_bytes(self.dtype()?, &dims, bytes))
    }

    /// A copy of a constant of the graph.
    ///
    /// Errors: `Error::Unsupported` for element types that cannot be copied; `Error::Invalid` when the number of bytes
    /// does not match the shape.
    pub fn from_ir(tensor: &crate::ir::Tensor) -> Result<Self> {
        let shape: Option<Vec<usize>> = tensor.dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let shape = shape.ok_or_else(|| Error::invalid("tensor", format!("shape {:?} is too large", tensor.dims)))?;
        let bytes = tensor.bytes();
        macro_rules! copy {
            ($ty:ty) => {
                TensorValue::new(&shape, bytes.as_chunks().0.iter().map(|chunk| <$ty>::from_le_bytes(*chunk)).collect())
            };
        }
        match tensor.dtype {
            DataType::Float => copy!(f32),
            DataType::Double => copy!(f64),
            DataType::Float16 => copy!(f16),
            DataType::Bfloat16 => copy!(bf16),
            DataType::Int64 => copy!(i64),
            DataType::Int32 => copy!(i32),
            DataType::Int16 => copy!(i16),
            DataType::Int8 => copy!(i8),
            DataType::Uint8 => copy!(u8),
            DataType::Bool => TensorValue::new(&shape, bytes.iter().map(|&byte| byte != 0).collect()),
            dtype => Err(Error::unsupported(format!("tensor of {dtype}"), "cannot be copied")),
        }
    }

    /// The elements of any floating-point type as f32; f32 elements are borrowed.
    ///
    /// Errors: `Error::Unsupported` for other types; `Error::Engine` when the tensor is not in CPU memory.
    pub fn to_f32(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match self.dtype()? {
            DataType::Float => Cow::Borrowed(self.data::<f32>()?),
            DataType::Double => self.data::<f64>()?.iter().map(|&x| x as f32).collect(),
            DataType::Float16 => self.data::<f16>()?.iter().map(|x| x.to_f32()).collect(),
            DataType::Bfloat16 => self.data::<bf16>()?.iter().map(|x| x.to_f32()).collect(),
            dtype => return Err(Error::unsupported(format!("tensor of {dtype}"), "is not floating-point")),
        })
    }

    /// An array's elements converted to an input's type.
    ///
    /// Errors: `Error::Unsupported` when this conversion is not possible; `Error::Invalid` when
    /// an element is out of range.
    pub fn from_array(dtype: DataType, array: Array) -> Result<Self> {
        let shape = array.shape().to_vec();
        match array {
            Array::Float(array) => TensorValue::from_f32(dtype, &shape, elements(array)),
            Array::Int(array) => TensorValue::from_i64(dtype, &shape, elements(array)),
            Array::Bool(array) => TensorValue::from_i64(dtype, &shape, array.iter().map(|&x| i64::from(x)).collect()),
        }
    }

    /// A floating-point tensor of type `dtype` from f32 elements.
    ///
    /// Errors: `Error::Unsupported` when `dtype` is not floating-point.
    pub fn from_f32(dtype: DataType, shape: &[usize], data: Vec<f32>) -> Result<Self> {
        match dtype {
            DataType::Float => TensorValue::new(shape, data),
            DataType::Double => TensorValue::new(shape, data.into_iter().map(f64::from).collect()),
            DataType::Float16 => TensorValue::new(shape, data.into_iter().map(f16::from_f32).collect()),
            DataType::Bfloat16 => TensorValue::new(shape, data.into_iter().map(bf16::from_f32).collect()),
            dtype => Err(Error::unsupported(format!("tensor of {dtype}"), "is not floating-point")),
        }
    }

    /// An integer or bool tensor of type `dtype` from i64 elements.
    ///
    /// Errors: `Error::Unsupported` for other types; `Error::Invalid` when an element is out of range.
    pub fn from_i64(dtype: DataType, shape: &[usize], data: Vec<i64>) -> Result<Self> {
        match dtype {
            DataType::Int64 => TensorValue::new(shape, data),
            DataType::Int32 => {
                let narrow: Option<Vec<i32>> = data.iter().map(|&x| i32::try_from(x).ok()).collect();
                TensorValue::new(
                    shape,
                    narrow.ok_or_else(|| Error::invalid("tensor of int32", "an element does not fit"))?,
                )
            }
            DataType::Bool => TensorValue::new(shape, data.into_iter().map(|x| x != 0).collect()),
            DataType::Float | DataType::Float16 | DataType::Bfloat16 => {
                TensorValue::from_f32(dtype, shape, data.into_iter().map(|x| x as f32).collect())
            }
            dtype => Err(Error::unsupported(format!("tensor of {dtype}"), "cannot be made from integers")),
        }
    }
}

/// The elements in row-major order, without a copy if they are stored in that order.
fn elements<T: Clone>(array: ArrayD<T>) -> Vec<T> {
    if !array.is_standard_layout() {
        return array.iter().cloned().collect();
    }
    let count = array.len();
    match array.into_raw_vec_and_offset() {
        (data, None | Some(0)) if data.len() == count => data,
        (data, offset) => data.into_iter().skip(offset.unwrap_or(0)).take(count).collect(),
    }
}
