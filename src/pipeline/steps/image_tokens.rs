//! Adds the graph that leaves image tokens out to a model, as a new folder.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::base::{Error, Provenance, Result};
use crate::bundle::{Bundle, BundleWriter, Record, Role};
use crate::onnx;
use crate::rewrite::token_pruner;
use crate::runtime::{Input, InputKind, Port, check_token_pruning};

/// Output of `prune --keep-image-tokens --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageTokens {
    /// Part of each picture's tokens that stays.
    pub keep: f64,
    /// True where the new folder has the graph that leaves tokens out.
    pub pruner: bool,
}

/// Writes the model with a token pruner that keeps this part of each picture's tokens, above 0 and at most 1, as a new folder; 1
/// writes it without one.
///
/// Errors: `Error::Invalid` for another part, or when the target exists; `Error::Unsupported`, with the reason, for a model whose
/// image tokens cannot be left out.
pub fn keep_image_tokens(bundle: &Bundle, keep: f64, target: &Path) -> Result<ImageTokens> {
    let pruner = (keep < 1.0).then(|| token_pruner_of(bundle, keep)).transpose()?;
    bundle.check_output(target)?;
    let mut writer = BundleWriter::create(bundle, target)?;
    writer.set_token_pruner(keep, pruner.as_ref())?;
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?)]);
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, inputs, &json!({ "keep_image_tokens": keep }))?)?;
    Ok(ImageTokens { keep, pruner: pruner.is_some() })
}

/// The token pruner of a model for a part below 1.
///
/// Errors: as [`keep_image_tokens`].
pub fn token_pruner_of(bundle: &Bundle, keep: f64) -> Result<crate::ir::Model> {
    if !(keep > 0.0 && keep < 1.0) {
        return Err(Error::invalid("part of the image tokens", format!("is {keep}, expected a number above 0"))
            .remedy("give 0.5 to keep half of each picture's tokens"));
    }
    if bundle.layout().name == "genai" {
        let subject = format!("leaving out image tokens of `{}`", bundle.root().display());
        let problem = "ONNX Runtime GenAI, whose folder it is, counts image tokens itself and runs no other graph";
        return Err(Error::unsupported(subject, problem).remedy("export the model in another layout"));
    }
    bundle.require(Role::VisionEncoder)?;
    let decoder = bundle.require(Role::Decoder)?;
    let model = onnx::load(&bundle.path_of(decoder))?;
    let graph = &model.graph;
    let ports: Vec<Port> = graph.body.inputs.iter().filter_map(|&id| Port::of_value(graph, id)).collect();
    let inputs = Input::all(&format!("`{}`", decoder.file), &ports)?;
    check_token_pruning(&format!("`{}`", decoder.file), &inputs)?;
    let embeds = inputs.iter().find(|input| input.kind() == InputKind::InputsEmbeds);
    token_pruner(keep, embeds.map_or(crate::ir::DataType::Float, |input| input.port.dtype))
}
