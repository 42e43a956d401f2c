//! Side inputs of the suffix: the graph inputs that it reads besides the residual stream, and the values per token that
//! are stored for them.

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::ir::{DataType, Graph, ValueId};
use crate::runtime::{Embedded, Input, InputKind, Port, Step, Training};
use crate::torch;

use super::suffix::Suffix;

/// Widths of the side values of a token. A row holds the embeddings, then the DeepStack levels, then the second
/// embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideWidths {
    /// Embeddings, when layers read them besides the residual stream; 0 otherwise.
    #[serde(default)]
    pub embeddings: usize,
    /// Number of DeepStack levels; 0 when the suffix reads none.
    pub levels: usize,
    /// Width of a level. Its values are 0 at text tokens.
    pub level_width: usize,
    /// Second embedding of the tokens; 0 when the suffix reads none.
    pub per_layer: usize,
}

impl SideWidths {
    /// Values per row.
    pub fn total(self) -> usize {
        self.embeddings + self.levels * self.level_width + self.per_layer
    }
}

/// How a connector takes the features of several pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectorInput {
    /// Width of a row of features.
    pub width: usize,
    /// 2 for rows, 3 for tiles of rows.
    pub rank: usize,
    /// True when each row of the output depends on the same row of features alone.
    pub row_wise: bool,
}

/// Decoder inputs whose values are stored, with their widths.
#[derive(Clone, Debug, Default)]
pub struct SideInputs {
    pub widths: SideWidths,
    /// DeepStack inputs, each level once, in ascending order.
    pub deepstack: Vec<Input>,
    /// The features that the connector reads, where it is a part of the network in training.
    pub connector: Option<ConnectorInput>,
}

impl SideInputs {
    /// Side values of a prompt, `[tokens, width]`, where the width is [`SideWidths::total`].
    ///
    /// Errors: `Error::Invalid` when the prompt lacks a value that the inputs need.
    pub fn rows(&self, embedded: &Embedded) -> Result<Vec<f32>> {
        let (time, widths) = (embedded.len(), self.widths);
        let step = Step::prefill(&[embedded], false)?;
        let mut parts: Vec<(usize, Vec<f32>)> = Vec::new();
        if widths.embeddings > 0 {
            parts.push((widths.embeddings, step.embedding_rows(widths.embeddings)?));
        }
        for input in &self.deepstack {
            let levels = input.deepstack_rows(&step, widths.level_width)?;
            parts.extend(levels.into_iter().map(|level| (widths.level_width, level)));
        }
        if widths.per_layer > 0 {
            parts.push((widths.per_layer, embedded.side.per_layer.clone()));
        }
        let total: usize = parts.iter().map(|(width, _)| width).sum();
        if total != widths.total() || parts.iter().any(|(width, data)| data.len() != width * time) {
            let problem =
                format!("takes {} numbers for each token besides the stream, a prompt has {total}", widths.total());
            return Err(Error::invalid("the trained part of the decoder", problem)
                .remedy("check that the components belong to one model"));
        }
        let mut rows = Vec::with_capacity(time * total);
        for token in 0..time {
            parts.iter().for_each(|(width, data)| rows.extend_from_slice(&data[token * width..][..*width]));
        }
        Ok(rows)
    }
}

impl SideWidths {
    /// The inverse of [`SideInputs::rows`]: a prompt with the side values of `rows`, where `image` is true at image
    /// tokens.
    pub fn prompt(self, rows: &[f32], positions: Vec<Vec<i64>>, image: Vec<bool>, types: Vec<i64>) -> Embedded {
        let mut prompt = Embedded { positions, hidden_size: self.embeddings, ..Embedded::default() };
        prompt.side.types = types;
        if image.contains(&true) {
            prompt.side.deepstack = vec![Vec::new(); self.levels];
        }
        for (row, &image) in rows.chunks_exact(self.total().max(1)).zip(&image) {
            let (embeddings, rest) = row.split_at(self.embeddings);
            let (deep, per_layer) = rest.split_at(self.levels * self.level_width);
            prompt.data.extend_from_slice(embeddings);
            if image {
                let levels = deep.chunks_exact(self.level_width.max(1));
                prompt.side.deepstack.iter_mut().zip(levels).for_each(|(level, own)| level.extend_from_slice(own));
            }
            prompt.side.per_layer.extend_from_slice(per_layer);
        }
        prompt.side.image = image;
        prompt
    }
}

/// Decoder inputs that hold the tokens, as ids or as embeddings.
pub fn token_inputs(graph: &Graph) -> Vec<ValueId> {
    inputs_with(graph, |input| input.row.training == Training::ShapeOnly)
}

/// Decoder inputs with numbers for each token besides the stream: DeepStack features, second embeddings, token types, masks
/// of pictures, and positions in several rows. A graph that takes them makes a session compute them, also where no frozen layer reads them.
pub fn row_inputs(graph: &Graph) -> Vec<ValueId> {
    inputs_with(graph, |input| match input.kind() {
        InputKind::Deepstack | InputKind::PerLayerInputs => true,
        InputKind::TokenTypes | InputKind::ImageMask | InputKind::ImageTokens => true,
        InputKind::PositionIds => input.port.rank() > 2,
        _ => false,
    })
}

/// Decoder inputs of one kind.
pub fn inputs_of_kind(graph: &Graph, kind: InputKind) -> Vec<ValueId> {
    inputs_with(graph, |input| input.kind() == kind)
}

fn inputs_with(graph: &Graph, wanted: impl Fn(&Input) -> bool) -> Vec<ValueId> {
    let of = |id: ValueId| Input::all("", [&Port::of_value(graph, id)?]).ok()?.pop();
    graph.body.inputs.iter().copied().filter(|&id| of(id).is_some_and(|input| wanted(&input))).collect()
}

/// Side inputs of the suffix.
///
/// Errors: `Error::Unsupported` for an unknown input, for token ids that are read besides the residual stream, or when
/// the graph does not fix a width.
pub fn side_inputs(graph: &Graph, suffix: &Suffix) -> Result<SideInputs> {
    let inputs = inputs_of(graph, suffix)?;
    let open = |input: &Input| {
        Error::unsupported(format!("decoder input {}", input.port.described()), "leaves its width open")
    };
    let mut side = SideInputs::default();
    for (_, input) in inputs {
        match input.kind() {
            InputKind::InputsEmbeds if suffix.reads_tokens => {
                side.widths.embeddings = input.port.width().ok_or_else(|| open(&input))?;
            }
            InputKind::InputIds if suffix.reads_tokens => {
                let problem = "is read past the residual stream, so the frozen layers before it cannot be left out";
                return Err(Error::unsupported(format!("decoder input {}", input.port.described()), problem));
            }
            InputKind::Deepstack => {
                let levels =
                    if input.is_stacked() { input.port.fixed_size(0) } else { Some(input.levels.len().max(1)) };
                (side.widths.levels, side.widths.level_width) =
                    levels.zip(input.port.width()).ok_or_else(|| open(&input))?;
                // Levels that the suffix does not read are stored too, so the other levels keep their indices.
                let all = |level: &usize| Input { number: Some(*level), ..input.clone() };
                side.deepstack = match input.levels.is_empty() {
                    true => vec![input],
                    false => input.levels.iter().map(all).collect(),
                };
            }
            InputKind::PerLayerInputs => {
                let sizes = (2..input.port.rank()).map(|axis| input.port.fixed_size(axis));
                side.widths.per_layer = sizes.product::<Option<usize>>().ok_or_else(|| open(&input))?;
            }
            _ => {}
        }
    }
    Ok(side)
}

/// Graph inputs that the suffix reads.
///
/// Errors: `Error::Unsupported` for an unknown input or element type.
pub fn inputs_of(graph: &Graph, suffix: &Suffix) -> Result<Vec<(ValueId, Input)>> {
    let mut known = Vec::new();
    for &id in &graph.body.inputs {
        let subject = || format!("decoder input `{}`", graph.name(id));
        match Port::of_value(graph, id) {
            Some(port) if torch::kind_of(port.dtype).is_some() && port.dtype != DataType::String => {
                known.push((id, port));
            }
            _ if !suffix.inputs.contains(&id) => {}
            Some(port) => return Err(Error::unsupported(subject(), format!("element type {}", port.dtype))),
            None => return Err(Error::unsupported(subject(), "has no element type and shape")),
        }
    }
    // Levels are numbered over all inputs, even when the suffix reads only the later ones.
    let inputs = Input::all("the decoder", known.iter().map(|(_, port)| port))?;
    let all = known.iter().map(|(id, _)| *id).zip(inputs);
    Ok(all.filter(|(id, _)| suffix.inputs.contains(id)).collect())
}
