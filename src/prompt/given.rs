//! Batches that another program made ready: arrays by the name of the graph's input that takes each.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ndarray::Slice;

use super::{Array, Axis};

/// A batch of `B` rows with up to `T` tokens each.
#[derive(Debug, PartialEq)]
pub struct TensorBatch {
    /// How errors name it.
    pub subject: String,
    /// Every array of the file but `labels`.
    pub arrays: BTreeMap<String, Array>,
    /// `T`.
    pub time: usize,
    /// The tokens of each row that are no padding.
    pub real: Vec<Range<usize>>,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenRow {
    /// The batch.
    pub batch: Arc<TensorBatch>,
    /// Its number in the batch.
    pub row: usize,
    /// The part of `T` that is used.
    pub tokens: Range<usize>,
}

impl Array {
    /// The part of an axis; none of it where the range is outside.
    pub fn part(&self, axis: usize, range: Range<usize>) -> Array {
        let size = self.shape().get(axis).copied().unwrap_or(0);
        let range = Slice::from(range.start.min(size)..range.end.min(size));
        match self {
            Array::Float(array) => Array::Float(array.slice_axis(Axis(axis), range).to_owned()),
            Array::Int(array) => Array::Int(array.slice_axis(Axis(axis), range).to_owned()),
            Array::Bool(array) => Array::Bool(array.slice_axis(Axis(axis), range).to_owned()),
        }
    }

    /// Without its first axis, which is 1.
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
    fn parts_are_cut_along_any_axis() {
        let array =
            Array::Int(ArrayD::from_shape_fn(IxDyn(&[3, 2, 4]), |at| (at[0] * 100 + at[1] * 10 + at[2]) as i64));
        let part = array.part(1, 1..2).part(2, 1..3);
        assert_eq!(part.shape(), [3, 1, 2]);
        assert_eq!(part.to_ints().unwrap(), [11, 12, 111, 112, 211, 212]);
        assert!(array.part(0, 7..9).is_empty());
    }
}
