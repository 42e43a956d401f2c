//! Converts rows of ready tensors to decoder inputs. Tensors from the file are used unchanged; the model's own
//! components compute the missing ones.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::base::{Error, Result};
use crate::ir::Dim;
use crate::prompt::{Array, GivenRow, ImageArrays, Prompt, TensorBatch};

use super::features::Features;
use super::inputs::{Input, InputKind};
use super::port::Port;
use super::step::{Embedded, SideValues};
use super::vlm::{Vision, VlmSession};

/// A row, with facts about its batch.
struct RowInBatch<'a> {
    given: &'a GivenRow,
    /// True at image tokens of each row of the batch, padding included.
    image: Vec<Vec<bool>>,
    /// The decoder's input for tokens; its axis names identify the axes of batch and tokens.
    tokens: Option<&'a Port>,
}

impl VlmSession {
    /// Embeds a row of ready tensors. Positions, token types and features that the file lacks are computed as for any
    /// other prompt.
    ///
    /// Errors: `Error::Invalid` naming the tensor that cannot be split into rows or does not match the others; as
    /// [`VlmSession::embed`].
    pub(super) fn embed_given(&mut self, prompt: &Prompt, given: &GivenRow) -> Result<Embedded> {
        let inputs: Vec<Input> = self.decoder.inputs().to_vec();
        let has = |kind: InputKind| inputs.iter().any(|input| input.kind() == kind && given.array(input).is_some());
        let embeds = has(InputKind::InputsEmbeds);
        let tokens = inputs.iter().find(|input| matches!(input.kind(), InputKind::InputsEmbeds | InputKind::InputIds));
        let image = image_tokens(&inputs, &given.batch, self.settings.image_token_id);
        let row = RowInBatch { given, image, tokens: tokens.map(|input| &input.port) };
        let own_image = row.own_image();
        let features = match embeds || has(InputKind::ImageFeatures) {
            true => Vec::new(),
            false => self.given_features(&row)?,
        };
        let pictures = match embeds || self.vision.is_some() {
            true => Vec::new(),
            false => row.pictures(self.picture_inputs())?,
        };
        let (positions, next_position) = self.given_positions(prompt, &row)?;
        let mut side = SideValues { types: self.token_types(prompt, &own_image), ..SideValues::default() };
        row.overlay(&inputs, &mut side)?;
        side.given.extend(row.others(self.embedding_inputs())?);
        let input_ids = prompt.input_ids.clone();
        let mut embedded = Embedded { input_ids, positions, next_position, side, ..Embedded::default() };
        if let Some(input) = inputs.iter().find(|input| embeds && input.kind() == InputKind::InputsEmbeds) {
            embedded.data = row.cut(&input.port, 0, 1)?.to_floats();
            embedded.hidden_size = embedded.data.len() / embedded.len().max(1);
            if own_image.contains(&true) {
                embedded.side.image = own_image;
            }
            return Ok(embedded);
        }
        self.complete(&mut embedded, own_image, &features, &pictures)?;
        // Tensors from the file have precedence over computed ones.
        row.overlay(&inputs, &mut embedded.side)?;
        embedded.side.given.retain(|name, _| inputs.iter().any(|input| input.port.name == *name));
        Ok(embedded)
    }

    /// Features of the row's image tokens, from one run of the vision encoder over all pictures of the batch.
    fn given_features(&mut self, row: &RowInBatch) -> Result<Vec<Arc<Features>>> {
        let (before, own, all) = row.image_counts();
        let Some(vision) = &mut self.vision else { return Ok(Vec::new()) };
        if all == 0 {
            return Ok(Vec::new());
        }
        let batch = &row.given.batch;
        let vision = match vision {
            Vision::Known(vision) => vision,
            Vision::Unknown(error) => {
                return Err(Error::unsupported(&batch.subject, error.to_string())
                    .remedy("give `inputs_embeds`, with the pictures' features in it"));
            }
        };
        let features = match &self.given_features {
            Some((known, features)) if Arc::ptr_eq(known, batch) => Arc::clone(features),
            _ => {
                let arrays = vision.inputs().iter().filter_map(|input| {
                    let name = match input.kind() {
                        InputKind::Image(name) => name,
                        _ => input.port.name.as_str(),
                    };
                    Some((name.to_string(), batch.arrays.get(&input.port.name)?.clone()))
                });
                let arrays: BTreeMap<String, Array> = arrays.collect();
                if arrays.is_empty() {
                    let names: Vec<&str> = vision.inputs().iter().map(|input| input.port.name.as_str()).collect();
                    let problem = format!("has {all} image tokens, but none of {}", names.join(", "));
                    return Err(Error::invalid(&batch.subject, problem)
                        .remedy("give what the vision encoder reads, or `inputs_embeds` with the features in it"));
                }
                let picture = ImageArrays::of_arrays(arrays)?;
                let found = vision.encode(&[&picture])?;
                found.into_iter().next().ok_or_else(|| Error::invalid(&batch.subject, "gave no features"))?
            }
        };
        self.given_features = Some((Arc::clone(batch), Arc::clone(&features)));
        if features.tokens() != all {
            let problem = format!("has {all} image tokens, its pictures give {} rows of features", features.tokens());
            return Err(Error::invalid(&batch.subject, problem)
                .remedy("give the pictures of all rows in the order of their tokens, and nothing else"));
        }
        Ok(if own == 0 { Vec::new() } else { vec![Arc::new(features.part(before..before + own))] })
    }

    /// Positions from the file, or otherwise computed by the rules of the model's config.
    fn given_positions(&self, prompt: &Prompt, row: &RowInBatch) -> Result<(Vec<Vec<i64>>, i64)> {
        let given = self.decoder.inputs().iter().find(|input| input.kind() == InputKind::PositionIds);
        if let Some(input) = given.filter(|input| row.given.array(input).is_some()) {
            let rows = input.port.rank() == 3;
            let array = if rows { row.cut(&input.port, 1, 2)? } else { row.cut(&input.port, 0, 1)? };
            let all = array.to_ints().unwrap_or_default();
            let positions: Vec<Vec<i64>> = all.chunks(row.given.tokens.len().max(1)).map(<[i64]>::to_vec).collect();
            let next = all.iter().max().map_or(0, |last| last + 1);
            return Ok((positions, next));
        }
        self.positions_of(&prompt.input_ids, row.grids(self.picture_inputs(), self.settings.spatial_merge_size))
    }

    /// Inputs of all graphs that take pictures.
    fn picture_inputs(&self) -> Vec<Input> {
        let vision = match &self.vision {
            Some(Vision::Known(vision)) => vision.inputs(),
            _ => &[],
        };
        let all = vision.iter().chain(self.embedding_inputs()).chain(self.decoder.inputs());
        all.filter(|input| matches!(input.kind(), InputKind::Image(_))).cloned().collect()
    }
}

impl RowInBatch<'_> {
    /// True at image tokens of this row.
    fn own_image(&self) -> Vec<bool> {
        self.image.get(self.given.row).and_then(|row| row.get(self.given.tokens.clone())).unwrap_or_default().to_vec()
    }

    /// Numbers of image tokens: before this row, in this row, in the whole batch.
    fn image_counts(&self) -> (usize, usize, usize) {
        let count = |row: &[bool]| row.iter().filter(|&&image| image).count();
        let counts: Vec<usize> = self.image.iter().map(|row| count(row)).collect();
        (counts.iter().take(self.given.row).sum(), count(&self.own_image()), counts.iter().sum())
    }

    fn array(&self, port: &Port) -> Result<&Array> {
        self.given.batch.arrays.get(&port.name).ok_or_else(|| self.wrong(port, "is not there".into()))
    }

    fn wrong(&self, port: &Port, problem: String) -> Error {
        Error::invalid(format!("tensor `{}` of {}", port.name, self.given.batch.subject), problem)
    }

    /// The row's part of an array with axes for rows and tokens.
    fn cut(&self, port: &Port, rows: usize, tokens: usize) -> Result<Array> {
        let array = self.array(port)?;
        let row = self.given.row;
        let part = array.part(rows, row..row + 1).part(tokens, self.given.tokens.clone());
        let whole = part.shape().get(rows) == Some(&1) && part.shape().get(tokens) == Some(&self.given.tokens.len());
        if !whole {
            let (count, last) = (self.given.batch.real.len(), self.given.tokens.end);
            let problem =
                format!("has shape {:?}, the batch has {count} rows, this one of {last} tokens", array.shape());
            return Err(self.wrong(port, problem).remedy("give all tensors of a batch the same rows and tokens"));
        }
        Ok(part)
    }

    /// The row's part of an array in which one axis counts the image tokens of the batch.
    fn cut_features(&self, port: &Port, axis: usize) -> Result<Array> {
        let (before, own, all) = self.image_counts();
        let array = self.array(port)?;
        if array.shape().get(axis) != Some(&all) {
            let problem = format!("has shape {:?}, but the batch has {all} image tokens", array.shape());
            return Err(self.wrong(port, problem).remedy("give a row for each image token, and where these are"));
        }
        Ok(array.part(axis, before..before + own))
    }

    /// Copies the file's tensors for decoder inputs other than embeddings, ids, masks and positions.
    fn overlay(&self, inputs: &[Input], side: &mut SideValues) -> Result<()> {
        let mut levels: Vec<(usize, Vec<f32>)> = Vec::new();
        for input in inputs.iter().filter(|input| self.given.array(input).is_some()) {
            let port = &input.port;
            match input.kind() {
                InputKind::TokenTypes => side.types = self.cut(port, 0, 1)?.to_ints().unwrap_or_default(),
                InputKind::PerLayerInputs => side.per_layer = self.cut(port, 0, 1)?.to_floats(),
                InputKind::ImageFeatures => side.features = self.cut_features(port, port.rank() - 2)?.to_floats(),
                InputKind::Deepstack => {
                    let stacked = usize::from(input.is_stacked());
                    let by_token = port.rank() - stacked == 3;
                    let array = match by_token {
                        true => self.cut(port, stacked, stacked + 1)?,
                        false => self.cut_features(port, stacked)?,
                    };
                    let count = if input.is_stacked() { array.shape()[0] } else { 1 };
                    for level in 0..count {
                        let own = if input.is_stacked() {
                            array.part(0, level..level + 1).without_front()
                        } else {
                            array.clone()
                        };
                        let rows = if by_token { self.at_images(&own) } else { own.to_floats() };
                        levels.push((input.number.unwrap_or(level), rows));
                    }
                }
                InputKind::Past => {
                    return Err(self.wrong(port, "is a cache, and caches begin empty".into()).remedy("leave it out"));
                }
                InputKind::Given => drop(side.given.insert(port.name.clone(), self.other(input)?)),
                _ => {}
            }
        }
        if !levels.is_empty() {
            levels.sort_by_key(|(number, _)| *number);
            (side.levels, side.deepstack) = levels.into_iter().unzip();
        }
        Ok(())
    }

    /// The rows of `[1, T, D]` at the row's image tokens.
    fn at_images(&self, array: &Array) -> Vec<f32> {
        let places = self.own_image().into_iter().enumerate().filter(|(_, image)| *image);
        places.flat_map(|(at, _)| array.part(1, at..at + 1).to_floats()).collect()
    }

    /// The file's tensors for other inputs of the token embedding graph than ids, features and pictures.
    fn others(&self, inputs: &[Input]) -> Result<BTreeMap<String, Array>> {
        let read = |input: &&Input| {
            matches!(input.kind(), InputKind::ImageTokens | InputKind::AudioFeatures | InputKind::Given)
                && self.given.array(input).is_some()
        };
        inputs.iter().filter(read).map(|input| Ok((input.port.name.clone(), self.other(input)?))).collect()
    }

    /// The row's part of an input of any meaning. The axis names of the graph identify the axes.
    fn other(&self, input: &Input) -> Result<Array> {
        let port = &input.port;
        let named = |axis: usize| match self.tokens.and_then(|tokens| tokens.shape.get(axis)) {
            Some(dim @ Dim::Symbol(_)) => Some(dim),
            _ => None,
        };
        let mut array = self.array(port)?.clone();
        let (count, row) = (self.given.batch.real.len(), self.given.row);
        let first = port.shape.first();
        if first.is_some() && first == named(0) {
            array = array.part(0, row..row + 1);
        } else if count > 1 {
            let problem = format!(
                "is {}: its axis names do not show which part belongs to which of {count} rows",
                port.described()
            );
            return Err(self.wrong(port, problem).remedy("write a file for each row"));
        }
        let time = self.given.batch.time;
        let cut = self.given.tokens != (0..time);
        for axis in 1..port.rank() {
            let dim = &port.shape[axis];
            if Some(dim) == named(1) {
                array = array.part(axis, self.given.tokens.clone());
            } else if cut && matches!(dim, Dim::Unknown) && array.shape().get(axis) == Some(&time) {
                let problem =
                    format!("is {}: its axis names do not show whether axis {axis} counts tokens", port.described());
                return Err(self
                    .wrong(port, problem)
                    .remedy("name the graph's axes, or give rows without padding, and without labels to `score`"));
            }
        }
        Ok(array)
    }

    /// Pictures of the row, for graphs that take them together with the tokens.
    fn pictures(&self, inputs: Vec<Input>) -> Result<Vec<Arc<ImageArrays>>> {
        let rows = self.given.batch.real.len();
        let mut arrays = BTreeMap::new();
        for input in inputs.iter().filter(|input| self.given.array(input).is_some()) {
            let array = self.array(&input.port)?;
            let array = match rows {
                1 => array.clone(),
                _ if array.shape().first() == Some(&rows) => array.part(0, self.given.row..self.given.row + 1),
                _ => {
                    let problem = format!("has shape {:?}, not a part for each of {rows} rows", array.shape());
                    return Err(self.wrong(&input.port, problem).remedy("write a file for each row"));
                }
            };
            if let InputKind::Image(name) = input.kind() {
                arrays.insert(name.to_string(), array);
            }
        }
        Ok(if arrays.is_empty() { Vec::new() } else { vec![Arc::new(ImageArrays::of_arrays(arrays)?)] })
    }

    /// Grids of the row's own pictures: those after the image tokens of the earlier rows.
    fn grids(&self, inputs: Vec<Input>, merge: Option<usize>) -> Vec<Option<[i64; 3]>> {
        let (before, own, _) = self.image_counts();
        let grid = |input: &&Input| input.kind() == InputKind::Image(crate::prompt::IMAGE_GRID_THW);
        let array = inputs.iter().find(grid).and_then(|input| self.given.array(input)).and_then(Array::to_ints);
        let merged = merge.unwrap_or(1).max(1).pow(2) as i64;
        let (mut place, mut found) = (0usize, Vec::new());
        for grid in array.unwrap_or_default().as_chunks::<3>().0 {
            let tokens = grid.iter().try_fold(1i64, |count, &size| count.checked_mul(size)).unwrap_or(0) / merged;
            if (before..before + own).contains(&place) {
                found.push(Some(*grid));
            }
            place = place.saturating_add(usize::try_from(tokens).unwrap_or(0));
        }
        if found.is_empty() && own > 0 { vec![None] } else { found }
    }
}

/// Positions of the image tokens in each row of a batch, without padding: from the file's mask,
/// or otherwise from the ids.
fn image_tokens(inputs: &[Input], batch: &TensorBatch, image_token: Option<i64>) -> Vec<Vec<bool>> {
    let mask =
        inputs.iter().find(|input| input.kind() == InputKind::ImageMask && batch.arrays.contains_key(&input.port.name));
    let ids = || batch.arrays.get("input_ids").and_then(Array::to_ints);
    let all: Option<Vec<bool>> = match mask {
        Some(input) => batch
            .arrays
            .get(&input.port.name)
            .and_then(Array::to_ints)
            .map(|mask| mask.iter().map(|&is| is != 0).collect()),
        None => ids().map(|ids| ids.iter().map(|&id| Some(id) == image_token).collect()),
    };
    let time = batch.time;
    let row = |(number, real): (usize, &Range<usize>)| {
        let own = all.as_ref().map(|all| all.get(number * time..(number + 1) * time).unwrap_or_default());
        let mut row = own.map_or_else(|| vec![false; time], <[bool]>::to_vec);
        row.resize(time, false);
        row.iter_mut().enumerate().filter(|(at, _)| !real.contains(at)).for_each(|(_, image)| *image = false);
        row
    };
    batch.real.iter().enumerate().map(row).collect()
}

trait Named {
    /// The batch's array for an input.
    fn array(&self, input: &Input) -> Option<&Array>;
}

impl Named for GivenRow {
    fn array(&self, input: &Input) -> Option<&Array> {
        self.batch.arrays.get(&input.port.name)
    }
}
