//! Batches of ready tensors from another program: arrays with the names of the graphs' inputs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ndarray::Slice;

use super::{Array, Axis};

/// A batch of `B` rows with up to `T` tokens each.
#[derive(Debug, PartialEq)]
pub struct TensorBatch {
    /// Name in errors.
    pub subject: String,
    /// Every array of the file except `labels`.
    pub arrays: BTreeMap<String, Array>,
    /// Number of tokens per row, `T`.
    pub time: usize,
    /// For each row, the tokens that are not padding.
    pub real: Vec<Range<usize>>,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenRow {
    /// The batch.
    pub batch: Arc<TensorBatch>,
    /// Index of the row in the batch.
    pub row: usize,
    /// The part of `T` that is used.
    pub tokens: Range<usize>,
}

impl Array {
    /// A range of an axis; empty when the range is outside the axis.
    pub fn part(&self, axis: usize, range: Range<usize>) -> Array {
        let size = self.shape().get(axis).copied().unwrap_or(0);
        let range = Slice::from(range.start.min(size)..range.end.min(size));
        match self {
            Array::Float(array) => Array::Float(array.slice_axis(Axis(axis), range).to_owned()),
            Array::Int(array) => Array::Int(array.slice_axis(Axis(axis), range).to_owned()),
            Array::Bool(array) => Array::Bool(array.slice_axis(Axis(axis), range).to_owned()),
        }
    }

    /// The array without its first axis, whose size is 1.
    pub fn without_front(&self) -> Array {
        match self {
            Array::Float(array) => Array::Float(array.index_axis(Axis(0), 0).to_owned()),
            Array::Int(array) => Array::Int(array.index_axis(Axis(0), 0).to_owned()),
            Array::Bool(array) => Array::Bool(array.index_axis(Axis(0), 0).to_owned()),
        }
    }

    /// All elements in row-major order as floats.
    pub fn to_floats(&self) -> Vec<f32> {
        match self {
            Array::Float(array) => array.iter().copied().collect(),
            Array::Int(array) => array.iter().map(|&x| x as f32).collect(),
            Array::Bool(array) => array.iter().map(|&x| f32::from(u8::from(x))).collect(),
        }
    }

    /// All elements in row-major order as integers; `None` for floats.
    pub fn to_ints(&self) -> Option<Vec<i64>> {
        match self {
            Array::Float(_) => None,
            Array::Int(array) => Some(array.iter().copied().collect()),
            Array::Bool(array) => Some(array.iter().map(|&x| i64::from(x)).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{ArrayD, IxDyn};

    use super::*;

    #[test]
    fn arrays_are_sliced_along_any_axis() {
        let array =
            Array::Int(ArrayD::from_shape_fn(IxDyn(&[3, 2, 4]), |at| (at[0] * 100 + at[1] * 10 + at[2]) as i64));
        let part = array.part(1, 1..2).part(2, 1..3);
        assert_eq!(part.shape(), [3, 1, 2]);
        assert_eq!(part.to_ints().unwrap(), [11, 12, 111, 112, 211, 212]);
        assert!(array.part(0, 7..9).is_empty());
    }
}
