//! Data set of ready tensors: batches made by another program, with graph inputs by name.

mod archive;
mod check;
mod npy;

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::{Error, Result};
use crate::bundle::Bundle;
use crate::prompt::{GivenRow, TensorBatch};

use archive::Archive;
use check::LABELS;

pub(super) use check::GraphInputs;

use super::listing::{Listed, content_key};
use super::row::SourceRow;

/// Label of positions that are not trained on.
const NOT_LEARNED: i64 = -100;

/// One row of a batch of ready tensors.
#[derive(Clone, Debug)]
pub struct TensorRow {
    /// The row's graph inputs and its range of tokens without padding.
    pub given: GivenRow,
    /// Token ids `[tokens]`. Without ids in the file: the labels, and 0 at positions without a label.
    pub input_ids: Vec<i64>,
    /// True at tokens with a label, `[tokens]`.
    pub answer_mask: Vec<bool>,
    /// Positions of image tokens; empty when the file has no token ids.
    pub image_positions: Vec<usize>,
}

/// A `.safetensors` or `.npz` file with one batch.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    /// Name of the file in sample ids.
    name: String,
    archive: Archive,
    rows: usize,
    time: usize,
    image_token: Option<i64>,
    listed: Vec<Listed>,
}

/// True for files with the extension of ready tensors.
pub(super) fn is_tensor_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors" || extension == "npz")
}

/// Token ids, labels and attention mask of a batch, `[B, T]` each.
struct Tokens {
    ids: Option<Vec<i64>>,
    labels: Option<Vec<i64>>,
    mask: Option<Vec<i64>>,
}

impl TensorFile {
    /// Opens a file, checks all tensors against the model's graphs, and reads ids, labels and mask.
    ///
    /// Errors: those of `Archive::open` and `GraphInputs::check`; `Error::Invalid` for a mask with holes or for labels
    /// that differ from the ids.
    pub fn open(path: &Path, name: &str, bundle: &Bundle, graphs: &GraphInputs) -> Result<Self> {
        let archive = Archive::open(path)?;
        let subject = format!("`{}`", path.display());
        let (rows, time) = graphs.check(&subject, archive.entries())?;
        let image_token = bundle.config().and_then(|config| config.image_token_id);
        let (path, name) = (path.to_path_buf(), name.to_string());
        let mut file = TensorFile { path, name, archive, rows, time, image_token, listed: Vec::new() };
        let tokens = file.tokens()?;
        let embeds = match tokens.ids.is_none() && tokens.labels.is_none() {
            true => Some(file.archive.read("inputs_embeds")?),
            false => None,
        };
        for row in 0..rows {
            file.real(&tokens, row)?;
            let bytes = |all: &[i64]| all[row * time..][..time].iter().flat_map(|id| id.to_le_bytes()).collect();
            let mut texts: Vec<Vec<u8>> =
                [&tokens.ids, &tokens.labels, &tokens.mask].into_iter().flatten().map(|all| bytes(all)).collect();
            if let Some(embeds) = &embeds {
                texts.push(embeds.part(0, row..row + 1).to_floats().iter().flat_map(|x| x.to_le_bytes()).collect());
            }
            file.listed.push(Listed::new(&subject, row, 1, content_key(&texts))?);
        }
        Ok(file)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the list of rows out of the file.
    pub fn take_listed(&mut self) -> Vec<Listed> {
        std::mem::take(&mut self.listed)
    }

    fn subject(&self, row: usize) -> String {
        format!("row {row} of `{}`", self.name)
    }

    fn tokens(&self) -> Result<Tokens> {
        let read = |name: &str| -> Result<Option<Vec<i64>>> {
            match self.archive.entries().contains_key(name) {
                true => Ok(self.archive.read(name)?.to_ints()),
                false => Ok(None),
            }
        };
        Ok(Tokens { ids: read("input_ids")?, labels: read(LABELS)?, mask: read("attention_mask")? })
    }

    /// Range of a row's tokens without padding. Also checks the row's labels.
    ///
    /// Errors: `Error::Invalid` for a mask that is not one run of ones, or for a label that is negative, in the padding
    /// or different from the token id.
    fn real(&self, tokens: &Tokens, row: usize) -> Result<Range<usize>> {
        let own = |all: &Option<Vec<i64>>| all.as_ref().map(|all| all[row * self.time..][..self.time].to_vec());
        let wrong = |problem: String, remedy: &str| Err(Error::invalid(self.subject(row), problem).remedy(remedy));
        let range = match own(&tokens.mask) {
            None => 0..self.time,
            Some(mask) => {
                let first = mask.iter().position(|&real| real != 0).unwrap_or(0);
                let last = mask.iter().rposition(|&real| real != 0).map_or(0, |last| last + 1);
                if mask[first..last].iter().any(|&real| real != 1) || first == last {
                    let problem = "has an `attention_mask` that is not one run of ones".to_string();
                    return wrong(problem, "pad rows on one side with zeros; padding is left out, not computed");
                }
                first..last
            }
        };
        let Some(labels) = own(&tokens.labels) else { return Ok(range) };
        let ids = own(&tokens.ids);
        for (at, &label) in labels.iter().enumerate().filter(|(_, label)| **label != NOT_LEARNED) {
            if label < 0 || !range.contains(&at) {
                let place = if range.contains(&at) { "" } else { ", which is padding" };
                let problem = format!("has label {label} at position {at}{place}");
                return wrong(problem, "labels are token ids, or -100 where nothing is learned");
            }
            if let Some(id) = ids.as_ref().map(|ids| ids[at]).filter(|&id| id != label) {
                let problem = format!("has label {label} at position {at}, where its token is {id}");
                return wrong(
                    problem,
                    "labels are the tokens at their own positions: what predicts them is moved by one inside",
                );
            }
        }
        Ok(range)
    }

    /// Reads the rows with these ascending indices. The batch is read with the first row.
    ///
    /// Errors of each item: those of `Archive::read`.
    pub fn read(&self, rows: Vec<usize>) -> impl Iterator<Item = Result<SourceRow>> + '_ {
        let mut batch: Option<(Arc<TensorBatch>, Tokens)> = None;
        rows.into_iter().map(move |row| {
            let (batch, tokens) = match &mut batch {
                Some(read) => read,
                none => none.insert(self.batch()?),
            };
            Ok(SourceRow::of_tensors(self.subject(row), self.row(batch, tokens, row)))
        })
    }

    fn batch(&self) -> Result<(Arc<TensorBatch>, Tokens)> {
        let tokens = self.tokens()?;
        let real = (0..self.rows).map(|row| self.real(&tokens, row)).collect::<Result<_>>()?;
        let names = self.archive.entries().keys().filter(|name| *name != LABELS);
        let arrays = names.map(|name| Ok((name.clone(), self.archive.read(name)?)));
        let subject = format!("`{}`", self.name);
        let batch = TensorBatch { subject, arrays: arrays.collect::<Result<_>>()?, time: self.time, real };
        Ok((Arc::new(batch), tokens))
    }

    fn row(&self, batch: &Arc<TensorBatch>, tokens: &Tokens, row: usize) -> TensorRow {
        let range = batch.real[row].clone();
        let own = |all: &Option<Vec<i64>>| all.as_ref().map(|all| all[row * self.time..][range.clone()].to_vec());
        let labels = own(&tokens.labels);
        let input_ids =
            own(&tokens.ids).or_else(|| labels.as_ref().map(|labels| labels.iter().map(|&id| id.max(0)).collect()));
        let input_ids = input_ids.unwrap_or_else(|| vec![0; range.len()]);
        let answer_mask = match labels {
            Some(labels) => labels.iter().map(|&label| label != NOT_LEARNED).collect(),
            None => vec![false; range.len()],
        };
        let known = tokens.ids.is_some();
        let image = |(_, id): &(usize, &i64)| known && Some(**id) == self.image_token;
        let image_positions = input_ids.iter().enumerate().filter(image).map(|(at, _)| at).collect();
        let given = GivenRow { batch: Arc::clone(batch), row, tokens: range };
        TensorRow { given, input_ids, answer_mask, image_positions }
    }
}

impl TensorRow {
    /// The row up to the start of its last answer. The whole row when it has no answer or starts with it.
    pub(super) fn prompt(&self) -> TensorRow {
        let last = self.answer_mask.iter().rposition(|&answer| answer);
        let begin =
            last.map(|last| self.answer_mask[..last].iter().rposition(|&answer| !answer).map_or(0, |at| at + 1));
        let length = begin.filter(|&begin| begin > 0).unwrap_or(self.input_ids.len());
        let mut prompt = self.clone();
        prompt.given.tokens.end = prompt.given.tokens.start + length;
        prompt.input_ids.truncate(length);
        prompt.answer_mask = vec![false; length];
        prompt.image_positions.retain(|&at| at < length);
        prompt
    }
}
