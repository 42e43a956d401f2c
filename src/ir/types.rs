//! Element types, shapes and ids.

use std::fmt;

/// The id of a value in its graph's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(u32);

impl ValueId {
    pub(super) fn new(index: usize) -> Self {
        // No file can define 2^32 values: their names alone would exceed the size limit of the wire format.
        ValueId(u32::try_from(index).unwrap_or(u32::MAX))
    }

    /// Position in `Graph::values`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Fields of a message without a counterpart in the graph in memory; in wire format, written back unchanged.
pub type Opaque = Vec<u8>;

/// ONNX element types; the numbers are `TensorProto.DataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(i32)]
pub enum DataType {
    /// `float`: IEEE 754 binary32.
    Float = 1,
    /// `uint8`.
    Uint8 = 2,
    /// `int8`.
    Int8 = 3,
    /// `uint16`.
    Uint16 = 4,
    /// `int16`.
    Int16 = 5,
    /// `int32`.
    Int32 = 6,
    /// `int64`.
    Int64 = 7,
    /// `string`: variable length, so it has no size in bytes.
    String = 8,
    /// `bool`: one byte, 0 or 1.
    Bool = 9,
    /// `float16`: IEEE 754 binary16, 5 exponent and 10 mantissa bits.
    Float16 = 10,
    /// `double`: IEEE 754 binary64.
    Double = 11,
    /// `uint32`.
    Uint32 = 12,
    /// `uint64`.
    Uint64 = 13,
    /// `complex64`: two binary32 numbers, real part first.
    Complex64 = 14,
    /// `complex128`: two binary64 numbers, real part first.
    Complex128 = 15,
    /// `bfloat16`: the upper half of a binary32 number, 8 exponent and 7 mantissa bits.
    Bfloat16 = 16,
    /// `float8e4m3fn`: 4 exponent and 3 mantissa bits, no infinities (arXiv:2209.05433).
    Float8E4M3Fn = 17,
    /// `float8e4m3fnuz`: as above with no negative zero and a larger bias (arXiv:2206.02915).
    Float8E4M3Fnuz = 18,
    /// `float8e5m2`: 5 exponent and 2 mantissa bits, with infinities (arXiv:2209.05433).
    Float8E5M2 = 19,
    /// `float8e5m2fnuz`: as above, no infinities and no negative zero (arXiv:2206.02915).
    Float8E5M2Fnuz = 20,
    /// `uint4`: two elements in a byte.
    Uint4 = 21,
    /// `int4`: two elements in a byte.
    Int4 = 22,
    /// `float4e2m1`: two elements in a byte, the element type of MXFP4.
    Float4E2M1 = 23,
    /// `float8e8m0`: a power of two, the scale type of the MX formats.
    Float8E8M0 = 24,
    /// `uint2`: four elements in a byte.
    Uint2 = 25,
    /// `int2`: four elements in a byte.
    Int2 = 26,
}

const DATA_TYPES: &[(DataType, &str, usize)] = &[
    (DataType::Float, "float32", 32),
    (DataType::Uint8, "uint8", 8),
    (DataType::Int8, "int8", 8),
    (DataType::Uint16, "uint16", 16),
    (DataType::Int16, "int16", 16),
    (DataType::Int32, "int32", 32),
    (DataType::Int64, "int64", 64),
    (DataType::String, "string", 0),
    (DataType::Bool, "bool", 8),
    (DataType::Float16, "float16", 16),
    (DataType::Double, "float64", 64),
    (DataType::Uint32, "uint32", 32),
    (DataType::Uint64, "uint64", 64),
    (DataType::Complex64, "complex64", 64),
    (DataType::Complex128, "complex128", 128),
    (DataType::Bfloat16, "bfloat16", 16),
    (DataType::Float8E4M3Fn, "float8e4m3fn", 8),
    (DataType::Float8E4M3Fnuz, "float8e4m3fnuz", 8),
    (DataType::Float8E5M2, "float8e5m2", 8),
    (DataType::Float8E5M2Fnuz, "float8e5m2fnuz", 8),
    (DataType::Uint4, "uint4", 4),
    (DataType::Int4, "int4", 4),
    (DataType::Float4E2M1, "float4e2m1", 4),
    (DataType::Float8E8M0, "float8e8m0", 8),
    (DataType::Uint2, "uint2", 2),
    (DataType::Int2, "int2", 2),
];

impl DataType {
    /// From `TensorProto.DataType`; `None` for a number this version does not know.
    pub fn from_number(number: i32) -> Option<Self> {
        DATA_TYPES.iter().map(|row| row.0).find(|&ty| ty as i32 == number)
    }

    /// Bits per element; 0 for strings.
    pub fn bits(self) -> usize {
        self.row().2
    }

    /// Bytes that `count` elements take, sub-byte types packed; `None` on overflow.
    pub fn byte_len(self, count: u64) -> Option<u64> {
        Some(count.checked_mul(self.bits() as u64)?.div_ceil(8))
    }

    /// True for the floating-point types of 16 bits and more.
    pub fn is_float(self) -> bool {
        matches!(self, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double)
    }

    fn row(self) -> &'static (DataType, &'static str, usize) {
        DATA_TYPES.iter().find(|row| row.0 == self).unwrap_or(&DATA_TYPES[0])
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().1)
    }
}

/// One axis of a shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A fixed size; negative in a malformed file.
    Known(i64),
    /// A named size: the same name means the same size everywhere in the graph.
    Symbol(String),
    /// Neither a size nor a name.
    Unknown,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(size) => write!(f, "{size}"),
            Dim::Symbol(name) => f.write_str(name),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

/// Type of a value as the file declares it.
#[derive(Clone, Debug, PartialEq)]
pub enum ValueType {
    /// A dense tensor; `shape` is `None` when even the rank is unknown.
    Tensor {
        /// Type of the elements.
        dtype: DataType,
        /// Axes, outermost first.
        shape: Option<Vec<Dim>>,
    },
    /// Sequences, maps, optionals and sparse tensors: the type message, unchanged.
    Other(Opaque),
}

impl ValueType {
    /// Element type of a dense tensor.
    pub fn dtype(&self) -> Option<DataType> {
        match self {
            ValueType::Tensor { dtype, .. } => Some(*dtype),
            ValueType::Other(_) => None,
        }
    }

    /// Shape of a dense tensor where it is known.
    pub fn shape(&self) -> Option<&[Dim]> {
        match self {
            ValueType::Tensor { shape, .. } => shape.as_deref(),
            ValueType::Other(_) => None,
        }
    }
}
