//! Which tensors of a checkpoint a weight of the graph was made of, found by content.

use std::collections::HashMap;

use crate::base::Result;
use crate::checkpoint::{Checkpoint, floats};
use crate::ir::{DataType, Tensor};
use crate::quantised::WeightLayout;

use super::index::{Change, RowIndex, RowPlace, converted, has_rows_of};

/// Rows of a weight that lie in the checkpoint one behind the other.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightPiece {
    /// Number of rows.
    pub rows: usize,
    /// Numbers in a row.
    pub length: usize,
    /// Difference between the checkpoint's numbers and the graph's.
    pub change: Change,
    /// Places of the first row; several where the checkpoint has the same rows more than once.
    pub places: Vec<RowPlace>,
}

/// How a weight is put together.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// Order of the weight's elements.
    pub layout: WeightLayout,
    /// All rows, from the first one.
    pub pieces: Vec<WeightPiece>,
}

/// Finds weights of graphs in a checkpoint.
pub struct Matcher<'a> {
    checkpoint: &'a Checkpoint,
    tensors: Vec<&'a Tensor>,
    indices: HashMap<(usize, DataType, bool), RowIndex>,
}

impl<'a> Matcher<'a> {
    /// A matcher that has looked at nothing yet.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Matcher { checkpoint, tensors: checkpoint.tensors().values().collect(), indices: HashMap::new() }
    }

    /// How a weight is made of tensors of the checkpoint; `None` when it is not.
    ///
    /// Errors: as [`floats`], for tensors of the checkpoint.
    pub fn find(&mut self, weight: &Tensor) -> Result<Option<Match>> {
        if !weight.dtype.is_float() || weight.element_count() < 2 {
            return Ok(None);
        }
        let width = weight.dtype.bits() / 8;
        for layout in WeightLayout::of(&weight.dims) {
            let length = layout.row_length(&weight.dims);
            if !self.tensors.iter().any(|tensor| has_rows_of(tensor, length)) {
                continue;
            }
            let rows = layout.rows(weight);
            let is_vector = layout == WeightLayout::Flat;
            for plus_one in [false, true] {
                if plus_one && !is_vector {
                    continue;
                }
                if let Some(pieces) = self.pieces(&rows, length, width, weight.dtype, plus_one)? {
                    return Ok(Some(Match { layout, pieces }));
                }
            }
        }
        let is_vector = weight.dims.iter().filter(|&&size| size != 1).count() == 1;
        if is_vector && let Some(pieces) = self.segments(weight)? {
            return Ok(Some(Match { layout: WeightLayout::Flat, pieces }));
        }
        Ok(None)
    }

    /// The tensors whose rows, one behind the other, are near these: those that may have been quantised to them.
    ///
    /// `steps` are the distances between two quantised numbers, or how far a clipped one may be off.
    ///
    /// Errors: as [`floats`], for tensors of the checkpoint.
    pub fn find_near(&self, values: &[f32], steps: &[f32], length: usize) -> Result<Option<Match>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < values.len() {
            let mut best: Option<WeightPiece> = None;
            for (number, tensor) in self.tensors.iter().enumerate() {
                let count = tensor.element_count() as usize;
                let longest = best.as_ref().map_or(0, |best| best.rows * best.length);
                if count > values.len() - at || count < longest || tensor.dims.len() < 2 || !has_rows_of(tensor, length)
                {
                    continue;
                }
                let near = |((value, step), base): ((&f32, &f32), &f32)| (value - base).abs() <= step * 1.01;
                if !values[at..].iter().zip(&steps[at..]).zip(&floats(tensor)?).all(near) {
                    continue;
                }
                let place = RowPlace { tensor: number, row: 0 };
                match &mut best {
                    Some(best) if best.rows * best.length == count => best.places.push(place),
                    _ => {
                        best = Some(WeightPiece {
                            rows: count / length,
                            length,
                            change: Change::None,
                            places: vec![place],
                        })
                    }
                }
            }
            let Some(piece) = best else { return Ok(None) };
            at += piece.rows * length;
            pieces.push(piece);
        }
        Ok(Some(Match { layout: WeightLayout::Rows, pieces }))
    }

    /// Runs of rows; `None` when a row is nowhere.
    fn pieces(
        &mut self,
        rows: &[u8],
        length: usize,
        width: usize,
        dtype: DataType,
        plus_one: bool,
    ) -> Result<Option<Vec<WeightPiece>>> {
        let change = if plus_one { Change::PlusOne } else { Change::None };
        if let std::collections::hash_map::Entry::Vacant(entry) = self.indices.entry((length, dtype, plus_one)) {
            entry.insert(RowIndex::new(self.checkpoint, length, dtype, change)?);
        }
        let index = &self.indices[&(length, dtype, plus_one)];
        let rows: Vec<&[u8]> = rows.chunks_exact(length * width).collect();
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < rows.len() {
            let starts = index.find(rows[at]);
            if starts.is_empty() {
                let end = (at..rows.len()).find(|&row| !index.find(rows[row]).is_empty()).unwrap_or(rows.len());
                let Some(piece) = self.scaled(&rows[at..end], length, dtype)? else { return Ok(None) };
                pieces.push(piece);
                at = end;
                continue;
            }
            let run = |start: &RowPlace| {
                let follows = |step: &usize| {
                    let place = RowPlace { tensor: start.tensor, row: start.row + step };
                    index.find(rows[at + step]).contains(&place)
                };
                1 + (1..rows.len() - at).take_while(follows).count()
            };
            let runs: Vec<usize> = starts.iter().map(run).collect();
            let longest = runs.iter().copied().max().unwrap_or(1);
            let places =
                starts.iter().zip(&runs).filter(|(_, run)| **run == longest).map(|(start, _)| *start).collect();
            pieces.push(WeightPiece { rows: longest, length, change, places });
            at += longest;
        }
        Ok(Some(pieces))
    }

    /// Rows that are a tensor of the checkpoint times one factor.
    fn scaled(&self, rows: &[&[u8]], length: usize, dtype: DataType) -> Result<Option<WeightPiece>> {
        let wanted = floats(&Tensor::from_bytes(dtype, &[(rows.len() * length) as u64], rows.concat()))?;
        for (number, tensor) in self.tensors.iter().enumerate() {
            if tensor.element_count() != wanted.len() as u64 || !has_rows_of(tensor, length) {
                continue;
            }
            if let Some(factor) = factor_between(&floats(tensor)?, &wanted, dtype) {
                let places = vec![RowPlace { tensor: number, row: 0 }];
                return Ok(Some(WeightPiece { rows: rows.len(), length, change: Change::Scale(factor), places }));
            }
        }
        Ok(None)
    }

    /// A vector that is several vectors of the checkpoint one behind the other.
    fn segments(&self, weight: &Tensor) -> Result<Option<Vec<WeightPiece>>> {
        let bytes = weight.bytes();
        let width = weight.dtype.bits() / 8;
        let vectors: Vec<(usize, Vec<u8>)> = self
            .tensors
            .iter()
            .enumerate()
            .filter(|(_, tensor)| {
                tensor.dtype.is_float()
                    && (2..weight.element_count()).contains(&tensor.element_count())
                    && tensor.dims.iter().filter(|&&size| size != 1).count() == 1
            })
            .map(|(number, tensor)| Ok((number, converted(tensor, weight.dtype, Change::None)?)))
            .collect::<Result<_>>()?;
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let fits = vectors.iter().filter(|(_, vector)| bytes[at..].starts_with(vector));
            let longest = fits.clone().map(|(_, vector)| vector.len()).max();
            let Some(longest) = longest else { return Ok(None) };
            let places = fits.filter(|(_, vector)| vector.len() == longest).map(|(number, _)| *number);
            let places = places.map(|tensor| RowPlace { tensor, row: 0 }).collect();
            pieces.push(WeightPiece { rows: 1, length: longest / width, change: Change::None, places });
            at += longest;
        }
        Ok(Some(pieces))
    }
}

/// The factor by which all numbers differ, within the rounding of the element type; `None` when there is none, it is 1,
/// or all wanted numbers are one and the same, which any constant would explain.
fn factor_between(base: &[f32], wanted: &[f32], dtype: DataType) -> Option<f32> {
    let rounding = match dtype {
        DataType::Float16 => f32::powi(2.0, -10),
        DataType::Bfloat16 => f32::powi(2.0, -7),
        _ => f32::powi(2.0, -22),
    };
    let largest = (0..base.len()).max_by(|&a, &b| base[a].abs().total_cmp(&base[b].abs()))?;
    let factor = wanted[largest] / base[largest];
    let varies = wanted.iter().any(|number| *number != wanted[0]);
    if !factor.is_finite() || factor == 0.0 || factor == 1.0 || !varies {
        return None;
    }
    let near =
        |(base, wanted): (&f32, &f32)| (wanted - factor * base).abs() <= rounding * wanted.abs() + f32::MIN_POSITIVE;
    base.iter().zip(wanted).all(near).then_some(factor)
}
