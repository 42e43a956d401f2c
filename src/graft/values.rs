//! Finetuned values of the base's tensors.

use std::rc::Rc;

use crate::base::Result;
use crate::checkpoint::{Checkpoint, Tuned, floats};
use crate::ir::Tensor;

use super::compose::composed;
use super::index::RowPlace;
use super::matching::{Match, WeightPiece};

/// Finetuned values of the base's tensors, the last one kept.
pub struct Values<'a> {
    /// The checkpoint of the graphs.
    pub base: &'a Checkpoint,
    tuned: &'a Tuned,
    /// Names of the tensors by number.
    pub names: &'a [&'a str],
    last: Option<(usize, Rc<Vec<f32>>)>,
}

impl<'a> Values<'a> {
    /// Nothing has been read yet.
    pub fn new(base: &'a Checkpoint, tuned: &'a Tuned, names: &'a [&'a str]) -> Self {
        Values { base, tuned, names, last: None }
    }

    /// The values of a tensor.
    ///
    /// Errors: as `Tuned::floats`.
    pub fn of(&mut self, number: usize) -> Result<Rc<Vec<f32>>> {
        if let Some((last, values)) = &self.last
            && *last == number
        {
            return Ok(values.clone());
        }
        let values = Rc::new(self.tuned.floats(self.names[number], self.base)?);
        self.last = Some((number, values.clone()));
        Ok(values)
    }

    /// True when the finetuned rows of a piece are the same at both places.
    pub fn same(&mut self, piece: &WeightPiece, a: RowPlace, b: RowPlace) -> Result<bool> {
        let range = |place: RowPlace| place.row * piece.length..(place.row + piece.rows) * piece.length;
        let (left, right) = (self.of(a.tensor)?, self.of(b.tensor)?);
        Ok(left[range(a)] == right[range(b)])
    }
}

/// The values of a matrix, row by row.
pub fn rows_of(
    matrix: &Tensor,
    found: &Match,
    places: &[RowPlace],
    values: impl FnMut(usize) -> Result<Rc<Vec<f32>>>,
) -> Result<Vec<f32>> {
    let bytes = composed(matrix, found, places, values)?;
    floats(&Tensor::from_bytes(matrix.dtype, &matrix.dims, bytes))
}
