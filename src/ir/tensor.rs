//! Constant tensors: bytes in memory, or a range of a mapped file.

use std::sync::Arc;

use crate::base::MappedFile;

use super::types::{DataType, Opaque};

/// Shared immutable bytes.
pub type Bytes = Arc<[u8]>;

/// A constant.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Type of the elements.
    pub dtype: DataType,
    /// Sizes of the axes; empty for a scalar.
    pub dims: Vec<u64>,
    /// The elements in row-major order, little-endian; 4-bit and 2-bit elements packed from the low bits up.
    pub data: TensorData,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Key-value pairs of `metadata_props`, in file order.
    pub metadata: Vec<(String, String)>,
    /// Unknown fields of the `TensorProto`.
    pub extra: Opaque,
}

/// Place of a constant's content. Numbers are little-endian; sub-byte types are packed low bits first.
#[derive(Clone, Debug)]
pub enum TensorData {
    /// Held in memory.
    Bytes(Bytes),
    /// A range of a mapped file: an external data file or the `.onnx` file itself.
    Mapped {
        /// The file, shared by all tensors in it.
        file: Arc<MappedFile>,
        /// First byte of the range.
        offset: u64,
        /// Bytes in the range.
        length: u64,
        /// True when the range is in another file than the model's own (external data).
        external: bool,
    },
    /// Elements of a string tensor.
    Strings(Arc<[Vec<u8>]>),
}

impl Tensor {
    /// A tensor held in memory.
    pub fn from_bytes(dtype: DataType, dims: &[u64], bytes: impl Into<Bytes>) -> Self {
        Tensor {
            dtype,
            dims: dims.to_vec(),
            data: TensorData::Bytes(bytes.into()),
            doc_string: String::new(),
            metadata: Vec::new(),
            extra: Opaque::new(),
        }
    }

    /// A 1-D or 0-D tensor of int64.
    pub fn from_i64(dims: &[u64], values: &[i64]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::from_bytes(DataType::Int64, dims, bytes)
    }

    /// A tensor of float32.
    pub fn from_f32(dims: &[u64], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::from_bytes(DataType::Float, dims, bytes)
    }

    /// The content in little-endian bytes; empty for string tensors. Mapped content is read from disk on access.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            TensorData::Bytes(bytes) => bytes,
            TensorData::Mapped { file, offset, length, .. } => {
                // The decoder has checked that the range is inside the file.
                file.get(*offset as usize..(*offset + *length) as usize).unwrap_or(&[])
            }
            TensorData::Strings(_) => &[],
        }
    }

    /// Takes mapped content out of the process's memory; the next access reads it from disk again.
    pub fn release(&self) {
        if let TensorData::Mapped { file, offset, length, .. } = &self.data {
            file.release(*offset, *length);
        }
    }

    /// Number of elements; the decoder has checked that it does not overflow.
    pub fn element_count(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Bytes of content.
    pub fn byte_len(&self) -> u64 {
        match &self.data {
            TensorData::Bytes(bytes) => bytes.len() as u64,
            TensorData::Mapped { length, .. } => *length,
            TensorData::Strings(items) => items.iter().map(|item| item.len() as u64).sum(),
        }
    }

    /// True when the content is in a file other than the model's own.
    #[cfg(test)]
    pub fn is_external(&self) -> bool {
        matches!(self.data, TensorData::Mapped { external: true, .. })
    }

    /// The elements of an integer or bool tensor widened to i64; `None` for other types.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        let bytes = self.bytes();
        Some(match self.dtype {
            DataType::Int64 => chunks(bytes).map(i64::from_le_bytes).collect(),
            DataType::Int32 => chunks(bytes).map(|b| i64::from(i32::from_le_bytes(b))).collect(),
            DataType::Uint32 => chunks(bytes).map(|b| i64::from(u32::from_le_bytes(b))).collect(),
            DataType::Int16 => chunks(bytes).map(|b| i64::from(i16::from_le_bytes(b))).collect(),
            DataType::Uint16 => chunks(bytes).map(|b| i64::from(u16::from_le_bytes(b))).collect(),
            DataType::Int8 => bytes.iter().map(|&b| i64::from(b as i8)).collect(),
            DataType::Uint8 | DataType::Bool => bytes.iter().map(|&b| i64::from(b)).collect(),
            _ => return None,
        })
    }

    /// The elements of a floating-point tensor as f64; `None` for other types.
    pub fn to_f64s(&self) -> Option<Vec<f64>> {
        let bytes = self.bytes();
        Some(match self.dtype {
            DataType::Float => chunks(bytes).map(|b| f64::from(f32::from_le_bytes(b))).collect(),
            DataType::Double => chunks(bytes).map(f64::from_le_bytes).collect(),
            DataType::Float16 => chunks(bytes).map(|b| half::f16::from_le_bytes(b).to_f64()).collect(),
            DataType::Bfloat16 => chunks(bytes).map(|b| half::bf16::from_le_bytes(b).to_f64()).collect(),
            _ => return None,
        })
    }
}

impl Tensor {
    /// Floating-point elements rounded to a type; `None` for other types.
    pub fn from_f64s(dtype: DataType, dims: &[u64], values: &[f64]) -> Option<Self> {
        let bytes: Vec<u8> = match dtype {
            DataType::Float => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
            DataType::Double => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::Float16 => values.iter().flat_map(|&x| half::f16::from_f64(x).to_le_bytes()).collect(),
            DataType::Bfloat16 => values.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes()).collect(),
            _ => return None,
        };
        Some(Tensor::from_bytes(dtype, dims, bytes))
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.chunks_exact(N).filter_map(|chunk| chunk.try_into().ok())
}
