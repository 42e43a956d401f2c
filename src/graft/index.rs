//! Where rows of numbers occur in a checkpoint.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::base::Result;
use crate::checkpoint::{Checkpoint, floats, from_floats};
use crate::ir::{DataType, Tensor};

/// The most places that are remembered of one row: rows of zeros and of ones are everywhere.
const MOST_PLACES: usize = 64;

/// A row of a tensor of the checkpoint, whose elements are seen as rows of the length in question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowPlace {
    /// Number of the tensor, in the order of names.
    pub tensor: usize,
    /// Number of the row.
    pub row: usize,
}

/// What is done to each number on the way from the checkpoint to the graph.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// Nothing.
    None,
    /// 1 is added: norms of Gemma are stored without it.
    PlusOne,
    /// A factor that the exporter folded in.
    Scale(f32),
}

impl Change {
    /// Applies it to a number.
    pub fn of(self, number: f32) -> f32 {
        match self {
            Change::None => number,
            Change::PlusOne => number + 1.0,
            Change::Scale(factor) => number * factor,
        }
    }

    /// The number that it was applied to, rounded.
    pub fn inverse(self, number: f32) -> f32 {
        match self {
            Change::None => number,
            Change::PlusOne => number - 1.0,
            Change::Scale(factor) => number / factor,
        }
    }
}

/// All rows of one length, as they are in one element type.
pub struct RowIndex {
    places: HashMap<u64, Vec<RowPlace>>,
}

impl RowIndex {
    /// Looks at every tensor of floating-point numbers whose last axes make rows of `length` numbers.
    ///
    /// Errors: none that an opened checkpoint causes.
    pub fn new(checkpoint: &Checkpoint, length: usize, dtype: DataType, change: Change) -> Result<Self> {
        let mut places: HashMap<u64, Vec<RowPlace>> = HashMap::new();
        for (number, tensor) in checkpoint.tensors().values().enumerate() {
            if !has_rows_of(tensor, length) {
                continue;
            }
            let bytes = converted(tensor, dtype, change)?;
            for (row, bytes) in bytes.chunks_exact(length * dtype.bits() / 8).enumerate() {
                let list = places.entry(hash(bytes)).or_default();
                if list.len() < MOST_PLACES {
                    list.push(RowPlace { tensor: number, row });
                }
            }
        }
        Ok(RowIndex { places })
    }

    /// Places of a row with these bytes.
    pub fn find(&self, row: &[u8]) -> &[RowPlace] {
        self.places.get(&hash(row)).map_or(&[], Vec::as_slice)
    }
}

/// True for tensors that are one row of this length, or whose last axis or last axes together have it.
pub fn has_rows_of(tensor: &Tensor, length: usize) -> bool {
    let mut product = 1u64;
    let mut ends = tensor.dims.iter().rev().map(|&size| {
        product = product.saturating_mul(size);
        product
    });
    tensor.dtype.is_float() && length > 0 && ends.any(|size| size == length as u64)
}

/// The bytes of a tensor's elements, changed and rounded to another element type.
///
/// Errors: as [`floats`].
pub fn converted(tensor: &Tensor, dtype: DataType, change: Change) -> Result<Vec<u8>> {
    if tensor.dtype == dtype && change == Change::None {
        return Ok(tensor.bytes().to_vec());
    }
    let mut numbers = floats(tensor)?;
    if change != Change::None {
        numbers.iter_mut().for_each(|number| *number = change.of(*number));
    }
    from_floats(dtype, &numbers)
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
