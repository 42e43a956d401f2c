//! `merge_embeddings`: all that the decoder reads for a prompt, from token embeddings and features of pictures.

use crate::base::{Error, Result};
use crate::ir::{Dim, Model, ValueId};
use crate::rewrite::{JoinScope, Joined};
use crate::runtime::{InputKind, Port};

use super::super::generate::graph::{Carried, DecoderPorts, Graphs, INPUT_IDS, Rows, TokenIds, at_image_tokens, fed};
use super::super::nodes::{graph_input, inputs_of, only_output, scalar, symbol, tensor};

/// The token embeddings, `[1, T, D]`.
pub(super) const TOKEN_EMBEDS: &str = "token_embeds";
/// The vision encoder's output.
pub(super) const IMAGE_FEATURES: &str = "image_features";

/// `input_ids` `[1, T]`, `token_embeds` `[1, T, D]`, `image_features` -> the decoder's inputs for the whole prompt, empty
/// caches among them, under the decoder's own names. A prompt without image tokens ignores the features.
///
/// Errors: `Error::Unsupported` naming an input of the decoder that is not computed from these, or a component that the
/// model lacks.
pub(super) fn merge_embeddings(graphs: &Graphs<'_>, ids: &TokenIds<'_>) -> Result<Model> {
    let decoder = DecoderPorts::of_decoder(graphs.decoder)?;
    let (Some(embedding), Some(vision)) = (graphs.embedding, graphs.vision) else {
        return Err(Error::unsupported("the model", "has no separate token embedding and vision encoder"));
    };
    if decoder.reads(InputKind::InputIds).is_some() {
        return Err(Error::unsupported("the decoder", "embeds token ids itself"));
    }
    let image = ids.image.ok_or_else(|| {
        Error::invalid("`config.json`", "names no image token").remedy("add `image_token_id` to `config.json`")
    })?;
    let tokens = inputs_of("embed_tokens", embedding)?;
    let [(_, input)] = &tokens[..] else {
        return Err(Error::unsupported("the token embedding", "reads more than `input_ids`"));
    };
    let embeds = only_output("the token embedding", embedding)?;
    let features = only_output("the vision encoder", vision)?;
    let width = features.width().or(embeds.width()).ok_or_else(|| {
        Error::unsupported("the vision encoder", "does not declare the width of its features")
            .remedy("export it with a fixed width")
    })?;
    let mut joined = Joined::default();
    joined.model.ir_version = graphs.decoder.ir_version;
    let opset = graphs.decoder.opset_imports.get("").copied().unwrap_or(1);
    joined.model.opset_imports.insert(String::new(), opset);
    joined.model.producer_name = "interlace".into();
    joined.model.graph.body.name = "merge_embeddings".into();
    let sequence = || [Dim::Known(1), symbol("sequence")];
    let input_ids = graph_input(&mut joined, INPUT_IDS, input.port.dtype, &sequence());
    let [one, time] = sequence();
    let shape = [one, time, embeds.width().map_or(Dim::Unknown, |width| Dim::Known(width as i64))];
    let values = graph_input(&mut joined, TOKEN_EMBEDS, embeds.dtype, &shape);
    let pictures = graph_input(&mut joined, IMAGE_FEATURES, features.dtype, &features.shape);
    let mut scope = JoinScope::new(&mut joined);
    let input_ids = super::super::nodes::cast(&mut scope, input_ids, input.port.dtype, crate::ir::DataType::Int64);
    let rows = Rows { ids: input_ids, values, dtype: embeds.dtype, width: embeds.width() };
    let merged = at_image_tokens(&mut scope, &rows, (image, width), |_| Ok((pictures, features.dtype)))?;
    let start = Carried::start(&mut scope, &decoder, input_ids, (Some(merged), None), ids.head_dim)?;
    let first = scalar(&mut scope, "first", 0);
    let given = fed(&mut scope, &decoder, &start, first, Some(embeds.dtype));
    let ports = decoder.inputs.iter().map(|(id, input)| (*id, &input.port));
    let ports: Vec<(ValueId, &Port)> = ports.chain(decoder.caches.iter().map(|(id, port, _)| (*id, port))).collect();
    let mut outputs = Vec::new();
    for (id, port) in ports {
        let value = given
            .get(&id)
            .copied()
            .ok_or_else(|| Error::invalid(format!("input {}", port.described()), "is not computed for a prompt"))?;
        // A value may be an input, or stand for two of the decoder's inputs.
        outputs.push((scope.op(&port.name, "Identity", &[value], &[]), port));
    }
    let nodes = scope.nodes;
    let graph = &mut joined.model.graph;
    graph.body.nodes.extend(nodes);
    for (output, port) in outputs {
        if graph.name(output) != port.name {
            let problem = format!("has the name of another value, `{}`", port.name);
            return Err(Error::unsupported(format!("input {} of the decoder", port.described()), problem));
        }
        graph.values[output.index()].ty = Some(tensor(port.dtype, &port.shape));
        graph.body.outputs.push(output);
    }
    crate::ir::check(&joined.model)?;
    Ok(joined.model)
}
