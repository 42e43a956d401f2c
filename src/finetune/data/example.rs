//! Training samples without their stored rows.

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::runtime::SideValues;

/// A training sample without its stored rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    pub id: String,
    /// Index of the sample in its source.
    pub number: u64,
    /// Tokens, image tokens included.
    pub length: usize,
    /// Answer tokens that the loss counts.
    pub answers: usize,
    /// Data for a batch other than stored rows; None in an [`Example::summary`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<Box<Detail>>,
}

/// Data of one sample for a batch, other than stored rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    /// Positions whose logits predict an answer token, ascending.
    pub positions: Vec<u32>,
    /// Token id of the answer that each of `positions` predicts.
    pub targets: Vec<i64>,
    /// Three rows of position ids for graphs with multimodal rotary embedding; empty when positions count from 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rotary: Vec<Vec<i64>>,
    /// First position and length of each run of image tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image: Vec<[u32; 2]>,
    /// `token_type_ids`; empty when all are 0 or no input reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<i64>,
    /// Tiles of each picture, and rows of features of each tile, where a connector in training reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pictures: Vec<[u32; 2]>,
}

impl Example {
    /// An example whose answer tokens are marked by `answer_mask`. The first token is never one, because no position
    /// predicts it.
    ///
    /// Errors: `Error::Invalid` when the mask and the ids differ in length.
    pub fn new(id: String, input_ids: &[i64], answer_mask: &[bool]) -> Result<Self> {
        if input_ids.len() != answer_mask.len() {
            let problem = format!("has {} tokens and an answer mask of {}", input_ids.len(), answer_mask.len());
            return Err(Error::invalid(format!("sample `{id}`"), problem));
        }
        let answers = (1..input_ids.len()).filter(|&at| answer_mask[at]);
        let (positions, targets): (Vec<u32>, Vec<i64>) = answers.map(|at| (at as u32 - 1, input_ids[at])).unzip();
        let (length, answers) = (input_ids.len(), targets.len());
        let detail = Some(Box::new(Detail { positions, targets, ..Detail::default() }));
        Ok(Example { id, number: 0, length, answers, detail })
    }

    /// The sample without its [`Detail`].
    pub fn summary(&self) -> Example {
        Example { id: self.id.clone(), detail: None, ..*self }
    }

    /// Data for a batch other than stored rows; empty for an [`Example::summary`].
    pub fn detail(&self) -> &Detail {
        static NONE: Detail = Detail::NONE;
        self.detail.as_deref().unwrap_or(&NONE)
    }

    /// Stores position ids (None when they count from 0), the runs of image tokens and the token types.
    pub fn keep(&mut self, positions: Option<&[Vec<i64>]>, side: &SideValues) {
        let detail = self.detail.get_or_insert_default();
        detail.rotary = positions.map_or(Vec::new(), <[_]>::to_vec);
        let mut at = 0;
        for run in side.image.chunk_by(|a, b| a == b) {
            if run[0] {
                detail.image.push([at as u32, run.len() as u32]);
            }
            at += run.len();
        }
        detail.types.clone_from(&side.types);
        let pictures = side.unprojected.iter();
        detail.pictures = pictures.map(|picture| [picture.tiles as u32, picture.rows as u32]).collect();
    }

    /// True at image tokens; one element per token.
    pub(super) fn image_mask(&self) -> Vec<bool> {
        let mut image = vec![false; self.length];
        for &[start, count] in &self.detail().image {
            image.iter_mut().skip(start as usize).take(count as usize).for_each(|image| *image = true);
        }
        image
    }

    /// Position ids: one row, or three for multimodal rotary embedding.
    pub(super) fn position_rows(&self) -> Vec<Vec<i64>> {
        match self.detail().rotary.is_empty() {
            true => vec![(0..self.length as i64).collect()],
            false => self.detail().rotary.clone(),
        }
    }
}

impl Detail {
    const NONE: Detail = Detail {
        positions: Vec::new(),
        targets: Vec::new(),
        rotary: Vec::new(),
        image: Vec::new(),
        types: Vec::new(),
        pictures: Vec::new(),
    };
}

/// Sum of the counts before each item.
pub(super) fn running_sum(counts: impl Iterator<Item = usize>) -> Vec<u64> {
    let sums = counts.scan(0, |next, count| {
        let start = *next;
        *next += count as u64;
        Some(start)
    });
    sums.collect()
}

/// Total number of tokens.
pub fn total_tokens(examples: &[Example]) -> u64 {
    examples.iter().map(|example| example.length as u64).sum()
}
