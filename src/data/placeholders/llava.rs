//! Placeholder of LLaVA-1.5, FastVLM and Moondream: one feature token per patch of the frame, plus the class token if
//! the model keeps it.

use serde_json::Value;

use crate::base::Result;

use super::placeholder::{Files, Placeholder};

/// Chat template for Moondream, which has none: questions and answers in the format of its training.
const MOONDREAM: &str = "\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- for part in message.content -%}{{- ' ' + part.text -}}{%- endfor -%}
{%- else -%}
{%- if not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}
{%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n\\n' -}}{%- endfor -%}
{{- 'Question: ' -}}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- '\\n\\nAnswer:' -}}
{%- endif -%}
{%- endfor -%}";

pub(super) fn open(files: &mut Files) -> Result<Placeholder> {
    let token = files.feature("image_token", "<image>")?;
    let additional = files.settings.count("num_additional_image_tokens", 0)?;
    let strategy = files.settings.text("vision_feature_select_strategy", "")?;
    let (patch, additional, less) = match files.settings.count("patch_size", 1)? {
        Some(patch) => (patch, additional.unwrap_or(0), usize::from(strategy == "default")),
        // Older files do not count features in the processor; the model's config has the values.
        None => {
            let vision = files.model.get("vision_config");
            let patch = vision.and_then(|vision| vision.get("patch_size")).and_then(Value::as_u64);
            let patch = patch.filter(|patch| (1..=65536).contains(patch)).ok_or_else(|| {
                files.settings.contradiction("has no `patch_size`, nor has the `vision_config` of config.json")
            })?;
            let text = |value: Option<&Value>, key: &str| {
                value.and_then(|value| value.get(key)).and_then(Value::as_str).unwrap_or_default().to_string()
            };
            let strategy =
                if strategy.is_empty() { text(Some(files.model), "vision_feature_select_strategy") } else { strategy };
            let class_token = usize::from(text(vision, "model_type") == "clip_vision_model");
            (patch as usize, class_token, class_token * usize::from(strategy != "full"))
        }
    };
    let feature = token.clone();
    let mut placeholder = Placeholder::new(&token, move |layout, _| {
        let [height, width] = layout.frame;
        feature.repeat(((height / patch) * (width / patch) + additional).saturating_sub(less))
    });
    if files.model.get("model_type").and_then(Value::as_str) == Some("moondream1") {
        placeholder.template = Some(MOONDREAM);
    }
    Ok(placeholder)
}
