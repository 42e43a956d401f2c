//! Leaves out image tokens between embedding and decoder, by the model's token pruner.

use crate::base::{Error, Result};
use crate::rewrite::{
    PRUNER_EMBEDS, PRUNER_IMAGE_MASK, PRUNER_KEPT_TOKENS, PRUNER_PICTURE_TOKENS, PRUNER_PIVOT_MASK, token_pruner,
};

use super::decoder::Decoder;
use super::inputs::{Input, InputKind};
use super::session::{Runtime, Session, SessionOptions};
use super::step::{Embedded, SideValues};
use super::tensor::TensorValue;

/// The graph of [`crate::rewrite::token_pruner()`], ready to run.
#[derive(Debug)]
pub struct TokenPruner {
    session: Session,
}

impl TokenPruner {
    /// Errors: `Error::Unsupported` when the graph has other inputs or outputs.
    pub fn new(session: Session) -> Result<Self> {
        let known = [PRUNER_EMBEDS, PRUNER_IMAGE_MASK, PRUNER_PIVOT_MASK, PRUNER_PICTURE_TOKENS];
        let found: Vec<&str> = session.inputs().iter().map(|port| port.name.as_str()).collect();
        let complete = known.iter().all(|name| found.contains(name)) && found.len() == known.len();
        if !complete || session.output(PRUNER_KEPT_TOKENS).is_none() {
            let problem = format!("has inputs {}, expected {}", found.join(", "), known.join(", "));
            return Err(Error::unsupported(session.subject(), problem)
                .remedy("write the token pruner with `interlace prune --keep-image-tokens`"));
        }
        Ok(TokenPruner { session })
    }

    /// One that keeps this part of each picture's tokens, above 0 and below 1, before a decoder.
    ///
    /// Errors: as `Runtime::session_of`.
    pub fn build(runtime: &Runtime, decoder: &Decoder, keep: f64, options: &SessionOptions) -> Result<Self> {
        let embeds = decoder.inputs().iter().find(|input| input.kind() == InputKind::InputsEmbeds);
        let dtype = embeds.map_or(crate::ir::DataType::Float, |input| input.port.dtype);
        TokenPruner::new(runtime.session_of(&token_pruner(keep, dtype)?, options)?)
    }

    /// Positions of the tokens of a prompt that stay, ascending. `question` is the number of tokens before the first answer,
    /// `pictures` the number of image tokens of each picture.
    ///
    /// Errors: `Error::Engine` when the run fails; `Error::Invalid` for a prompt without embeddings.
    pub fn kept(&mut self, embedded: &Embedded, question: usize, pictures: &[usize]) -> Result<Vec<usize>> {
        let (time, image) = (embedded.len(), &embedded.side.image);
        let dtype = self.session.input(PRUNER_EMBEDS).map_or(crate::ir::DataType::Float, |port| port.dtype);
        let pivots = image.iter().enumerate().map(|(at, &image)| !image && at < question).collect();
        let counts = pictures.iter().map(|&count| count as i64).collect();
        let embeds = TensorValue::from_f32(dtype, &[1, time, embedded.hidden_size], embedded.data.clone())?;
        let (image, pivots) = (TensorValue::new(&[1, time], image.clone())?, TensorValue::new(&[1, time], pivots)?);
        let counts = TensorValue::new::<i64>(&[pictures.len()], counts)?;
        let feeds = [
            (PRUNER_EMBEDS, &embeds),
            (PRUNER_IMAGE_MASK, &image),
            (PRUNER_PIVOT_MASK, &pivots),
            (PRUNER_PICTURE_TOKENS, &counts),
        ];
        let outputs = self.session.run(&feeds, None)?;
        Ok(outputs.get(PRUNER_KEPT_TOKENS)?.data::<i64>()?.iter().map(|&at| at as usize).collect())
    }
}

/// Checks whether image tokens can be left out before a decoder with these inputs, without a change to anything else.
///
/// Errors: `Error::Unsupported` naming the input that is in the way, or the one that is missing.
pub fn check_token_pruning(subject: &str, inputs: &[Input]) -> Result<()> {
    let refused = |problem: String| {
        Error::unsupported(format!("leaving out image tokens before {subject}"), problem)
            .remedy("give pictures fewer tokens by a picture budget of the image processor")
    };
    let has = |kind: InputKind| inputs.iter().any(|input| input.kind() == kind);
    if !has(InputKind::InputsEmbeds) {
        return Err(refused("it takes no `inputs_embeds`, so it merges the pictures' features itself".into()));
    }
    if !has(InputKind::PositionIds) {
        let problem = "it takes no `position_ids`, so tokens behind a picture would move to other positions";
        return Err(refused(problem.into()));
    }
    let in_the_way = |input: &&Input| {
        matches!(
            input.kind(),
            InputKind::ImageFeatures | InputKind::ImageTokens | InputKind::Image(_) | InputKind::Given
        )
    };
    match inputs.iter().find(in_the_way) {
        Some(input) => {
            Err(refused(format!("its input {} would have values for all image tokens", input.port.described())))
        }
        None => Ok(()),
    }
}

impl Embedded {
    /// Of values for each token of the whole prompt, those of the tokens that are here.
    pub fn of_kept<T: Copy>(&self, values: &[T]) -> Vec<T> {
        match &self.kept {
            Some(kept) => kept.iter().filter_map(|&at| values.get(at).copied()).collect(),
            None => values.to_vec(),
        }
    }

    /// The tokens at these ascending positions, each with its place in the whole prompt.
    pub(super) fn only(self, kept: Vec<usize>) -> Embedded {
        let time = self.len();
        let rows = |data: &[f32]| {
            let width = data.len().checked_div(time).unwrap_or(0);
            kept.iter().flat_map(|&at| data[at * width..(at + 1) * width].iter().copied()).collect::<Vec<f32>>()
        };
        let image = &self.side.image;
        // Among the image tokens, those that stay.
        let before = |at: usize| image.iter().take(at).filter(|&&image| image).count();
        let places: Vec<usize> = kept.iter().filter(|&&at| image[at]).map(|&at| before(at)).collect();
        let all = before(time);
        let level = |level: &Vec<f32>| {
            let width = level.len().checked_div(all).unwrap_or(0);
            places.iter().flat_map(|&at| level[at * width..(at + 1) * width].iter().copied()).collect::<Vec<f32>>()
        };
        let part = |values: &[i64]| kept.iter().filter_map(|&at| values.get(at).copied()).collect::<Vec<i64>>();
        Embedded {
            input_ids: part(&self.input_ids),
            hidden_size: self.hidden_size,
            data: rows(&self.data),
            positions: self.positions.iter().map(|row| part(row)).collect(),
            next_position: self.next_position,
            side: SideValues {
                image: kept.iter().map(|&at| image[at]).collect(),
                types: part(&self.side.types),
                deepstack: self.side.deepstack.iter().map(level).collect(),
                levels: self.side.levels.clone(),
                per_layer: rows(&self.side.per_layer),
                features: Vec::new(),
                pictures: Vec::new(),
                unprojected: Vec::new(),
                given: self.side.given.clone(),
            },
            kept: Some(kept),
        }
    }
}
