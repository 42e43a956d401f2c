//! Looks every weight of the graphs up in a checkpoint.

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::base::{Cancel, Error, Progress, Result, list_preview};
use crate::checkpoint::{Checkpoint, floats};
use crate::ir::{Tensor, ValueId};
use crate::quantised::{Blocks, Channels, RANGES, SCHEMES, block_matrices, channel_matrices};

use super::index::RowPlace;
use super::matching::{Match, Matcher};
use super::part::{ModelPart, weights_of};
use super::table::{Target, Unmatched};
use super::values::rows_of;

/// A weight of the graphs.
pub(super) enum Seen {
    /// It is made of tensors of the checkpoint.
    Made(Made),
    /// It is not.
    Other(Other),
}

/// A weight that is made of tensors of the checkpoint.
pub(super) struct Made {
    /// Number of its part.
    pub part: usize,
    /// What it is in the graph.
    pub target: Target,
    /// Sizes of its axes.
    pub dims: Vec<u64>,
    /// How it is made.
    pub found: Match,
}

/// A weight that is not made of tensors of the checkpoint.
pub(super) struct Other {
    /// Number of its part.
    pub part: usize,
    /// Its initializer.
    pub id: ValueId,
    /// Sizes of its axes.
    pub dims: Vec<u64>,
    /// Reason where it is not only that the numbers are nowhere.
    pub reason: Option<String>,
}

impl Other {
    /// Its line in a table.
    pub fn described(&self, parts: &[ModelPart]) -> Unmatched {
        let part = &parts[self.part];
        Unmatched {
            component: Some(part.file.to_string()),
            name: part.model.graph.name(self.id).to_string(),
            shape: self.dims.clone(),
            nearest: None,
            reason: self.reason.clone(),
        }
    }
}

/// Looks up every weight of floating-point numbers with two elements and more, and every quantised matrix.
///
/// Errors: `Error::Invalid` when no matrix of the graphs is in the checkpoint, so that it is not theirs;
/// `Error::Interrupted` on Ctrl-C.
pub(super) fn scan(parts: &[ModelPart], base: &Checkpoint, cancel: &Cancel) -> Result<Vec<Seen>> {
    let mut scanner = Scanner { matcher: Matcher::new(base), base, part: 0 };
    let mut all = Vec::new();
    let total: usize = parts.iter().map(|part| weights_of(&part.model.graph.body).len()).sum();
    let progress = Progress::new("matching weights", "weights", total as u64);
    for (number, part) in parts.iter().enumerate() {
        scanner.part = number;
        let blocks = block_matrices(&part.model.graph.body);
        let channels = channel_matrices(&part.model.graph.body);
        for matrix in &blocks {
            cancel.check("nothing was written")?;
            all.push(scanner.blocks(part, matrix)?);
        }
        for matrix in &channels {
            cancel.check("nothing was written")?;
            all.push(scanner.channels(part, matrix)?);
        }
        let of_blocks = blocks.iter().flat_map(|m| [Some(m.numbers), Some(m.scales), m.zeros]);
        let of_channels = channels.iter().flat_map(|m| [Some(m.numbers), Some(m.scales), m.zeros]);
        let inside: BTreeSet<ValueId> = of_blocks.chain(of_channels).flatten().collect();
        for (id, weight) in weights_of(&part.model.graph.body) {
            cancel.check("nothing was written")?;
            progress.advance(1);
            if weight.dtype.is_float() && weight.element_count() > 1 && !inside.contains(&id) {
                all.push(scanner.floats(id, weight)?);
            }
        }
    }
    let is_matrix = |made: &Made| made.dims.iter().filter(|&&size| size > 1).count() > 1;
    if !all.iter().any(|seen| matches!(seen, Seen::Made(made) if is_matrix(made))) {
        return Err(Error::invalid(format!("`{}`", base.path().display()), "holds none of the matrices of the graphs")
            .remedy("give as base the checkpoint that the ONNX files were exported from"));
    }
    Ok(all)
}

struct Scanner<'a> {
    matcher: Matcher<'a>,
    base: &'a Checkpoint,
    part: usize,
}

impl Scanner<'_> {
    fn made(&self, target: Target, dims: Vec<u64>, found: Match) -> Seen {
        Seen::Made(Made { part: self.part, target, dims, found })
    }

    fn other(&self, id: ValueId, dims: Vec<u64>, reason: Option<String>) -> Seen {
        Seen::Other(Other { part: self.part, id, dims, reason })
    }

    fn floats(&mut self, id: ValueId, weight: &Tensor) -> Result<Seen> {
        let dims = weight.dims.clone();
        Ok(match self.matcher.find(weight)? {
            Some(found) => self.made(Target::Floats(id), dims, found),
            None => self.other(id, dims, None),
        })
    }

    fn blocks(&mut self, part: &ModelPart, blocks: &Blocks) -> Result<Seen> {
        let body = &part.model.graph.body;
        let dims = blocks.shape().dims;
        let (values, steps) = blocks.dequantised(body)?;
        let Some(found) = self.matcher.find_near(&values, &steps, blocks.columns)? else {
            return Ok(self.other(blocks.numbers, dims, None));
        };
        Ok(match blocks.scheme(&self.original(&blocks.shape(), &found)?, body)? {
            Some(scheme) => self.made(Target::Blocks(blocks.clone(), scheme), dims, found),
            None => {
                let schemes = SCHEMES.iter().map(|scheme| scheme.name).collect();
                self.other(blocks.numbers, dims, Some(self.unknown_rounding(&found, schemes)))
            }
        })
    }

    fn channels(&mut self, part: &ModelPart, channels: &Channels) -> Result<Seen> {
        let body = &part.model.graph.body;
        for channels in [Some(channels.clone()), channels.turned()].into_iter().flatten() {
            let dims = channels.shape().dims;
            let (values, steps) = channels.dequantised(body)?;
            let Some(found) = self.matcher.find_near(&values, &steps, channels.columns())? else { continue };
            return Ok(match channels.scheme(&self.original(&channels.shape(), &found)?, body)? {
                Some(range) => self.made(Target::Channels(channels, range), dims, found),
                None => {
                    let schemes = RANGES.iter().map(|range| range.name).collect();
                    self.other(channels.numbers, dims, Some(self.unknown_rounding(&found, schemes)))
                }
            });
        }
        Ok(self.other(channels.numbers, channels.shape().dims, None))
    }

    /// The checkpoint's values of a quantised matrix, row by row.
    fn original(&self, matrix: &Tensor, found: &Match) -> Result<Vec<f32>> {
        let first: Vec<RowPlace> = found.pieces.iter().map(|piece| piece.places[0]).collect();
        let tensors: Vec<&Tensor> = self.base.tensors().values().collect();
        rows_of(matrix, found, &first, |number| Ok(Rc::new(floats(tensors[number])?)))
    }

    /// Why a quantised matrix whose rounding is not known is no match.
    fn unknown_rounding(&self, found: &Match, schemes: Vec<&str>) -> String {
        let number = found.pieces[0].places[0].tensor;
        let tensor = self.base.tensors().keys().nth(number).map_or("", String::as_str);
        let known = list_preview(&schemes, 6);
        format!("it is made of `{tensor}`, but no known rounding ({known}) gives its bytes")
    }
}
