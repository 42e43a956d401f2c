//! Ready tensors: batches of any other program, graph inputs by name, as samples of a data set.

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

/// What labels are where nothing is learned.
const NOT_LEARNED: i64 = -100;

/// A row of a file of ready tensors.
#[derive(Clone, Debug)]
pub struct TensorRow {
    /// Tokens and what the graphs read of them.
    pub given: GivenRow,
    /// Token ids; where the file has none, those of the labels, and 0 elsewhere.
    pub input_ids: Vec<i64>,
    /// True at tokens that have a label.
    pub answer_mask: Vec<bool>,
    /// Positions of image tokens.
    pub image_positions: Vec<usize>,
}

/// A `.safetensors` or `.npz` file that holds one batch.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    /// How ids name the file.
    name: String,
    archive: Archive,
    rows: usize,
    time: usize,
    image_token: Option<i64>,
    listed: Vec<Listed>,
}

/// True for the files that hold ready tensors.
pub(super) fn is_tensor_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors" || extension == "npz")
}

/// What says which tokens of a batch are used; `[B, T]` each.
struct Tokens {
    ids: Option<Vec<i64>>,
    labels: Option<Vec<i64>>,
    mask: Option<Vec<i64>>,
}

impl TensorFile {
    /// Checks all tensors against the model's graphs, and reads ids, labels and mask.
    ///
    /// Errors: as `Archive::open` and `GraphInputs::check`; `Error::Invalid` for a mask with holes, or labels that are
    /// not the ids.
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

    /// The rows that are used; they are not kept here.
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

    /// The tokens of a row that are no padding; its labels are looked at on the way.
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

    /// The rows with these ascending indices; the batch is read when the first is asked for.
    ///
    /// Errors of all items: as `Archive::read`.
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
    /// The row up to where its last answer begins; the whole of it where there is none, or it begins with one.
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
