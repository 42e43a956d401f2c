//! DeepStack: features of the vision encoder's inner layers, added to the residual stream of
//! the decoder's first layers.

use serde_json::Value;

use crate::bundle::Bundle;
use crate::ir::Graph;

use super::inputs::{Input, InputKind};
use super::port::Port;

/// A warning for a decoder without inputs for DeepStack features although its config lists them; otherwise `None`.
pub fn missing_deepstack(bundle: &Bundle, decoder: &Graph) -> Option<String> {
    let config = bundle.config()?;
    let levels = config.raw.get("vision_config")?.get("deepstack_visual_indexes").and_then(Value::as_array)?;
    if levels.is_empty() {
        return None;
    }
    let takes = |port: &Port| match Input::all("", [port]).ok().and_then(|mut inputs| inputs.pop()) {
        Some(input) if input.kind() == InputKind::Deepstack => true,
        // Packed after each row of the embeddings.
        Some(input) if input.kind() == InputKind::InputsEmbeds => {
            port.width().zip(config.hidden_size).is_some_and(|(width, hidden)| width > hidden)
        }
        _ => false,
    };
    let taken = decoder.body.inputs.iter().filter_map(|&id| Port::of_value(decoder, id)).any(|port| takes(&port));
    (!taken).then(|| {
        format!(
            "`{}` names {} layers whose features go into the decoder (`deepstack_visual_indexes`), but the decoder graph \
             takes none: with pictures it does not compute what Hugging Face's model computes; export it with inputs \
             `deepstack_features_0` and so on",
            config.source,
            levels.len()
        )
    })
}
