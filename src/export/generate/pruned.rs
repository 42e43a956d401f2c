//! Leaves out image tokens of the prompt by the model's token pruner.

use std::collections::HashMap;

use crate::base::{Error, Result};
use crate::ir::{Body, DataType, Model, ValueId};
use crate::rewrite::{
    JoinScope, JoinedPart, PRUNER_EMBEDS, PRUNER_IMAGE_MASK, PRUNER_PICTURE_TOKENS, PRUNER_PIVOT_MASK,
};
use crate::runtime::Port;

use super::super::nodes::{any, cast, graph_input, ints, scalar, symbol};
use super::merge::Rows;

/// Positions of the prompt's tokens that stay, `[K]`; all of them for a prompt without pictures. The graph gets an input with the
/// number of image tokens of each picture.
///
/// Errors: `Error::Unsupported` for another graph than a token pruner.
pub fn kept_tokens(
    scope: &mut JoinScope<'_>,
    (part, model): (&JoinedPart<'_>, &Model),
    image: i64,
    rows: &Rows,
) -> Result<ValueId> {
    let counts = graph_input(scope.joined, PRUNER_PICTURE_TOKENS, DataType::Int64, &[symbol("pictures")]);
    let image = scalar(scope, "image_id", image);
    let is_image = scope.op("is_image", "Equal", &[rows.ids, image], &[]);
    let pictured = any(scope, is_image);

    let mut with = JoinScope::new(&mut *scope.joined);
    let is_text = with.op("is_text", "Not", &[is_image], &[]);
    let mut bound = HashMap::new();
    for name in [PRUNER_EMBEDS, PRUNER_IMAGE_MASK, PRUNER_PIVOT_MASK, PRUNER_PICTURE_TOKENS] {
        let id = model.graph.input(name).ok_or_else(|| {
            Error::unsupported("the token pruner", format!("has no input `{name}`"))
                .remedy("write it with `interlace prune --keep-image-tokens`")
        })?;
        let value = match name {
            PRUNER_EMBEDS => {
                let dtype = Port::of_value(&model.graph, id).map_or(DataType::Float, |port| port.dtype);
                cast(&mut with, rows.values, rows.dtype, dtype)
            }
            PRUNER_IMAGE_MASK => is_image,
            PRUNER_PIVOT_MASK => is_text,
            _ => counts,
        };
        bound.insert(id, value);
    }
    let kept = with.inline(part, "token_pruner", &bound)?[0];
    let with = Body { name: "with_pictures".into(), nodes: with.nodes, outputs: vec![kept], ..Body::default() };

    let mut without = JoinScope::new(&mut *scope.joined);
    let (zero, one) = (scalar(&mut without, "zero", 0), scalar(&mut without, "one", 1));
    let shape = without.op("prompt_shape", "Shape", &[rows.ids], &[]);
    let time = without.op("prompt_length", "Gather", &[shape, one], &[]);
    let all = without.op("range", "Range", &[zero, time, one], &[]);
    let without = Body { name: "text_only".into(), nodes: without.nodes, outputs: vec![all], ..Body::default() };
    let kept = scope.joined.value("kept");
    scope.control("If", &[pictured], &[kept], vec![("then_branch", with), ("else_branch", without)]);
    let flat = ints(scope, "flat", &[-1]);
    Ok(scope.op("kept", "Reshape", &[kept, flat], &[]))
}
