//! What a decoder reads and gives in one iteration of a loop.

use std::collections::HashMap;

use crate::analysis;
use crate::base::{Error, Result};
use crate::ir::{DataType, Model, ValueId};
use crate::runtime::{Input, InputKind, Port};

use super::super::nodes::{inputs_of, no_logits, refused};

/// The decoder's inputs and outputs.
pub(in crate::export) struct DecoderPorts {
    pub(in crate::export) inputs: Vec<(ValueId, Input)>,
    /// Cache inputs with the positions of their outputs in the graph's signature.
    pub(in crate::export) caches: Vec<(ValueId, Port, usize)>,
    /// Position of the logits in the graph's outputs.
    pub(in crate::export) logits: usize,
    /// Element type of the logits.
    pub(in crate::export) logits_type: DataType,
}

impl DecoderPorts {
    /// Errors: `Error::Unsupported` for an input that the loop cannot compute, or without a cache.
    pub(in crate::export) fn of_decoder(model: &Model) -> Result<Self> {
        let graph = &model.graph;
        let analysis = analysis::analyse(model)?;
        let name = |id: ValueId| analysis.model.graph.name(id).to_string();
        let pairs = analysis.map.layers.iter().flat_map(|layer| &layer.ports);
        let pairs: HashMap<String, String> =
            pairs.filter_map(|port| Some((name(port.past?), name(port.present?)))).collect();
        let place = |name: &str| graph.body.outputs.iter().position(|&id| graph.name(id) == name);
        let mut caches = Vec::new();
        let mut inputs = Vec::new();
        for (id, input) in inputs_of("decoder", model)? {
            match input.kind() {
                InputKind::InputsEmbeds
                | InputKind::InputIds
                | InputKind::AttentionMask
                | InputKind::CachePosition
                | InputKind::UseCacheBranch
                | InputKind::LogitsToKeep
                | InputKind::Deepstack
                | InputKind::ImageMask
                | InputKind::TokenTypes
                | InputKind::PerLayerInputs => inputs.push((id, input)),
                InputKind::PositionIds if input.port.rank() == 2 => inputs.push((id, input)),
                InputKind::PositionIds
                    if input.port.rank() == 3 && input.port.fixed_size(0).is_none_or(|rows| rows == 3) =>
                {
                    inputs.push((id, input));
                }
                InputKind::Past => {
                    let present = pairs.get(graph.name(id)).and_then(|present| place(present));
                    let present = present.ok_or_else(|| refused(&input.port, "has no output that continues it"))?;
                    caches.push((id, input.port, present));
                }
                _ => {
                    let problem = "is not computed inside a loop, which feeds embeddings or token ids, mask, positions, caches, DeepStack \
                                   features with their mask, token types and per-layer inputs";
                    return Err(refused(&input.port, problem));
                }
            }
        }
        let of = |kind: InputKind| inputs.iter().map(|(_, input)| input).find(|input| input.kind() == kind);
        if let (Some(rows), Some(columns)) = (of(InputKind::PositionIds), of(InputKind::CachePosition))
            && rows.port.rank() == 3
        {
            return Err(refused(&columns.port, "is not computed beside positions in three rows"));
        }
        if caches.is_empty() {
            return Err(Error::unsupported("the decoder", "has no cache inputs, so a loop cannot continue a prompt")
                .remedy("export the decoder with its cache"));
        }
        let logits = place("logits").ok_or_else(|| no_logits(graph))?;
        let logits_type = Port::of_value(graph, graph.body.outputs[logits]).map_or(DataType::Float, |port| port.dtype);
        Ok(DecoderPorts { inputs, caches, logits, logits_type })
    }

    /// Axes of the positions: 3 for three rows.
    pub(in crate::export) fn position_rank(&self) -> usize {
        self.reads(InputKind::PositionIds).map_or(2, Port::rank)
    }

    /// Inputs that come beside the tokens of an iteration.
    pub(in crate::export) fn sides(&self) -> impl Iterator<Item = &Input> {
        self.inputs.iter().map(|(_, input)| input).filter(|input| is_side(input.kind()))
    }

    /// Those of DeepStack features, in the order of the graph's inputs.
    pub(in crate::export) fn deepstack(&self) -> impl Iterator<Item = &Input> {
        self.sides().filter(|input| input.kind() == InputKind::Deepstack)
    }

    /// Number of DeepStack levels that stand behind embeddings of this width in each row of `inputs_embeds`.
    ///
    /// Errors: `Error::Unsupported` unless the widths are those of one model.
    pub(in crate::export) fn packed_levels(&self, width: Option<usize>) -> Result<usize> {
        let Some(port) = self.reads(InputKind::InputsEmbeds) else { return Ok(0) };
        match (port.width(), width) {
            (Some(taken), Some(given)) if given == 0 || taken % given != 0 || taken < given => {
                Err(refused(port, &format!("has a width of {taken}, no multiple of that of the embeddings, {given}")))
            }
            (Some(taken), Some(given)) => Ok(taken / given - 1),
            _ => Ok(0),
        }
    }

    pub(in crate::export) fn reads(&self, kind: InputKind) -> Option<&Port> {
        self.inputs.iter().find(|(_, input)| input.kind() == kind).map(|(_, input)| &input.port)
    }
}

/// True for an input that is neither the tokens themselves nor their mask, positions or caches.
pub(in crate::export) fn is_side(kind: InputKind) -> bool {
    matches!(kind, InputKind::Deepstack | InputKind::ImageMask | InputKind::TokenTypes | InputKind::PerLayerInputs)
}
