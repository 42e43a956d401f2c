//! The token embedding inside a joined graph.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::ir::{DataType, Model, ValueId};
use crate::rewrite::{JoinScope, Joined, JoinedPart};
use crate::runtime::{InputKind, Port, output_kind};

use super::super::nodes::{cast, inputs_of, undeclared};

/// The outputs of a token embedding, each with its place in the graph's signature.
pub(in crate::export) struct EmbeddingPorts {
    /// `[1, T, D]`.
    pub main: (usize, Port),
    /// Second embeddings `[1, T, L, P]`.
    pub per_layer: Option<(usize, Port)>,
    /// The graph's input and its element type.
    pub ids: (ValueId, DataType),
}

impl EmbeddingPorts {
    /// Errors: `Error::Unsupported` unless the graph reads ids alone and gives embeddings, and at most second ones beside them.
    pub(in crate::export) fn of(model: &Model) -> Result<Self> {
        const SUBJECT: &str = "the token embedding";
        let refused =
            |problem: String| Error::unsupported(SUBJECT, problem).remedy("use the components of another target");
        let inputs = inputs_of("embed_tokens", model)?;
        let ids = match &inputs[..] {
            [(id, input)] if input.kind() == InputKind::InputIds => (*id, input.port.dtype),
            _ => {
                let names: Vec<&str> = inputs.iter().map(|(_, input)| input.port.name.as_str()).collect();
                return Err(refused(format!("reads {}, expected `input_ids` alone", names.join(", "))));
            }
        };
        let graph = &model.graph;
        let (mut main, mut per_layer) = (Vec::new(), None);
        for (place, &id) in graph.body.outputs.iter().enumerate() {
            let port = Port::of_value(graph, id)
                .ok_or_else(|| undeclared(format!("output `{}` of the token embedding", graph.name(id))))?;
            match output_kind(&port) {
                Some((InputKind::PerLayerInputs, _)) => per_layer = Some((place, port)),
                _ => main.push((place, port)),
            }
        }
        let names: Vec<String> = main.iter().map(|(_, port)| port.name.clone()).collect();
        match <[(usize, Port); 1]>::try_from(main) {
            Ok([main]) => Ok(EmbeddingPorts { main, per_layer, ids }),
            Err(_) => Err(refused(format!("gives {}, expected one output of embeddings", names.join(", ")))),
        }
    }
}

/// The token embedding as a part of a joined graph.
pub(super) struct Embedding<'a> {
    part: JoinedPart<'a>,
    pub ports: EmbeddingPorts,
}

/// What it gives for some tokens.
pub(super) struct EmbeddedTokens {
    /// `[1, T, D]`.
    pub rows: ValueId,
    /// `[1, T, L, P]`, if the model has second embeddings.
    pub per_layer: Option<ValueId>,
}

impl<'a> Embedding<'a> {
    pub fn new(joined: &mut Joined, model: &'a Model) -> Result<Self> {
        let ports = EmbeddingPorts::of(model)?;
        Ok(Embedding { part: joined.part("embedding", model)?, ports })
    }

    /// Element type of the embeddings.
    pub fn dtype(&self) -> DataType {
        self.ports.main.1.dtype
    }

    /// Second embeddings with their type.
    pub fn second(&self, per_layer: Option<ValueId>) -> Option<(ValueId, DataType)> {
        per_layer.zip(self.ports.per_layer.as_ref().map(|(_, port)| port.dtype))
    }

    /// Embeddings of `[1, T]` ids.
    pub fn embedded(&self, scope: &mut JoinScope<'_>, copy: &str, ids: ValueId) -> Result<EmbeddedTokens> {
        let (input, dtype) = self.ports.ids;
        let ids = cast(scope, ids, DataType::Int64, dtype);
        let outputs = scope.inline(&self.part, &format!("embedding_{copy}"), &HashMap::from([(input, ids)]))?;
        let per_layer = self.ports.per_layer.as_ref().map(|(place, _)| outputs[*place]);
        Ok(EmbeddedTokens { rows: outputs[self.ports.main.0], per_layer })
    }
}
