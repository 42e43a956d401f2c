//! Which elements of a checkpoint have a place in the graphs.

use std::ops::Range;

use crate::base::Result;
use crate::checkpoint::Checkpoint;

use super::index::RowPlace;
use super::matching::{Match, WeightPiece};

/// Ranges of elements by tensor.
pub struct Covered {
    sizes: Vec<usize>,
    ranges: Vec<Vec<Range<usize>>>,
}

impl Covered {
    /// Nothing has a place yet.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        let sizes: Vec<usize> = checkpoint.tensors().values().map(|tensor| tensor.element_count() as usize).collect();
        Covered { ranges: vec![Vec::new(); sizes.len()], sizes }
    }

    /// Notes a match. Other places with the same finetuned values, such as a tied head's, count too.
    ///
    /// Errors: those of `same`.
    pub fn add(
        &mut self,
        found: &Match,
        places: &[RowPlace],
        mut same: impl FnMut(&WeightPiece, RowPlace, RowPlace) -> Result<bool>,
    ) -> Result<()> {
        for (piece, &chosen) in found.pieces.iter().zip(places) {
            for &place in &piece.places {
                if place == chosen || same(piece, chosen, place)? {
                    self.note_piece(piece, place);
                }
            }
        }
        Ok(())
    }

    /// Notes rows of a tensor.
    pub fn note_piece(&mut self, piece: &WeightPiece, place: RowPlace) {
        let begin = place.row * piece.length;
        self.note(place.tensor, begin..begin + piece.rows * piece.length);
    }

    fn note(&mut self, tensor: usize, range: Range<usize>) {
        let ranges = &mut self.ranges[tensor];
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }

    /// The elements of a tensor that have no place.
    pub fn missing(&self, tensor: usize) -> Vec<Range<usize>> {
        let mut ranges = self.ranges[tensor].clone();
        ranges.sort_by_key(|range| range.start);
        let mut missing = Vec::new();
        let mut at = 0;
        for range in ranges {
            if range.start > at {
                missing.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if at < self.sizes[tensor] {
            missing.push(at..self.sizes[tensor]);
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_ranges_are_the_gaps_between_covered_ranges() {
        let mut covered = Covered { sizes: vec![10], ranges: vec![Vec::new()] };
        assert_eq!(covered.missing(0), vec![std::ops::Range { start: 0, end: 10 }]);
        covered.note(0, 6..8);
        covered.note(0, 0..2);
        covered.note(0, 2..3);
        assert_eq!(covered.missing(0), [3..6, 8..10]);
        covered.note(0, 2..10);
        assert!(covered.missing(0).is_empty());
    }
}
