//! Puts a weight of the graph together from tensors of a checkpoint.

use crate::base::Result;
use crate::checkpoint::from_floats;
use crate::ir::Tensor;

use super::index::RowPlace;
use super::matching::Match;

/// The bytes of a weight, with `values` for the elements of the checkpoint's tensors by number.
///
/// Errors: those of `values`.
pub fn composed(
    weight: &Tensor,
    found: &Match,
    chosen: &[RowPlace],
    mut values: impl FnMut(usize) -> Result<std::rc::Rc<Vec<f32>>>,
) -> Result<Vec<u8>> {
    let mut rows = Vec::with_capacity(weight.bytes().len());
    for (piece, place) in found.pieces.iter().zip(chosen) {
        let numbers = values(place.tensor)?;
        let begin = place.row * piece.length;
        let part = &numbers[begin..begin + piece.rows * piece.length];
        let changed: Vec<f32> = part.iter().map(|&number| piece.change.of(number)).collect();
        rows.extend(from_floats(weight.dtype, &changed)?);
    }
    Ok(found.layout.elements(&rows, &weight.dims, weight.dtype.bits() / 8))
}
