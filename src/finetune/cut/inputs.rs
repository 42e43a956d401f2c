//! What passes read besides the stream: which inputs of the graph, and what is kept for them of each token.

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::ir::{DataType, Graph, ValueId};
use crate::runtime::{Embedded, Input, InputKind, Port, Step, Training};
use crate::torch;

use super::suffix::Suffix;

/// Widths of what a pass reads for each token besides the stream, kept as rows of numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideWidths {
    /// The embeddings, where layers read them past the stream; 0 where none does.
    #[serde(default)]
    pub embeddings: usize,
    /// Levels of DeepStack features; 0 where the pass reads none.
    pub levels: usize,
    /// Width of a level; its numbers are 0 at text.
    pub level_width: usize,
    /// The tokens' second embedding; 0 where the pass reads none.
    pub per_layer: usize,
}

impl SideWidths {
    /// Numbers in a row.
    pub fn total(self) -> usize {
        self.embeddings + self.levels * self.level_width + self.per_layer
    }
}

/// The inputs of a decoder whose numbers are kept for passes, with their widths.
#[derive(Clone, Debug, Default)]
pub struct SideInputs {
    pub widths: SideWidths,
    /// Those of DeepStack features, each level once, in ascending order.
    pub deepstack: Vec<Input>,
}

impl SideInputs {
    /// A prompt's rows, one per token.
    ///
    /// Errors: `Error::Invalid` when the prompt does not hold what the inputs take.
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
    /// The other way round: what a prompt holds, from its rows and from where its image tokens are.
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

/// The inputs of a decoder that hold its tokens.
pub fn token_inputs(graph: &Graph) -> Vec<ValueId> {
    let tokens = |id: &ValueId| {
        let port = Port::of_value(graph, *id);
        let input = port.and_then(|port| Input::all("", [&port]).ok()?.pop());
        input.is_some_and(|input| input.row.training == Training::ShapeOnly)
    };
    graph.body.inputs.iter().copied().filter(tokens).collect()
}

/// What a pass reads for each token besides the stream.
///
/// Errors: `Error::Unsupported` for an input that is not known, or whose width the graph leaves open.
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
                // Those that the suffix does not read are kept too, so that the others keep their places.
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

/// The graph's inputs that the suffix reads.
///
/// Errors: `Error::Unsupported` for an input that is not known.
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
    // Levels of features are counted among all inputs, also where the suffix reads the later ones alone.
    let inputs = Input::all("the decoder", known.iter().map(|(_, port)| port))?;
    let all = known.iter().map(|(id, _)| *id).zip(inputs);
    Ok(all.filter(|(id, _)| suffix.inputs.contains(id)).collect())
}
