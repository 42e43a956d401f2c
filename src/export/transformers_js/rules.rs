//! Requirements of transformers.js: model types, files, inputs and outputs.

use crate::base::{Error, Result, list_preview};
use crate::bundle::{Bundle, Component, ModelConfig, Role};
use crate::ir::{DataType, Model, ValueId, ValueType};
use crate::prompt::IMAGE_SIZES;

/// Kind of class with which transformers.js runs a model type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ModelClass {
    /// Pictures and text: `vision_encoder`, `embed_tokens`, `decoder_model_merged`.
    ImageText,
    /// Text alone: `model`.
    Text,
}

/// Model types whose class takes pictures and text. Source: transformers.js 4.3, `models/registry.js`.
const IMAGE_TEXT: &[&str] = &[
    "gemma3",
    "gemma3n",
    "gemma4",
    "glm_ocr",
    "idefics3",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_onevision",
    "llava_qwen2",
    "mistral3",
    "moondream1",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
];

/// Model types whose class takes text alone. Source: as for [`IMAGE_TEXT`].
const TEXT: &[&str] = &[
    "afmoe",
    "apertus",
    "arcee",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "deepseek_v4",
    "ernie4_5",
    "exaone",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm_moe_dsa",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoehybrid",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "jais",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4_text",
    "mbart",
    "ministral",
    "ministral3",
    "mistral",
    "mistral4",
    "mobilellm",
    "modernbert-decoder",
    "mpt",
    "nanochat",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "openelm",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "youtu",
    "zaya",
];

/// Inputs that its generic code passes to a decoder, besides the cache. Source: `models/modeling_utils.js`.
const DECODER_INPUTS: &[&str] =
    &["input_ids", "inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep", "per_layer_inputs"];

/// Prefixes of the caches that it passes from step to step.
const CACHES: &[&str] = &["past_key_values.", "past_conv.", "past_ssm.", "past_recurrent."];

/// Configs of other layouts, which would contradict the exported ones.
const FOREIGN: &[&str] = &["genai_config.json", "export.json"];

/// True for a config of another layout.
pub(super) fn is_foreign(file: &str) -> bool {
    FOREIGN.contains(&file)
}

/// The kind of the bundle's model type.
///
/// Errors: `Error::Unsupported` when transformers.js has no class for it; `Error::Invalid` without a `config.json`.
pub(super) fn class_of(bundle: &Bundle) -> Result<ModelClass> {
    let subject = format!("`{}`", bundle.root().display());
    if bundle.asset_path("config.json").is_none() {
        return Err(Error::invalid(subject, "has no `config.json`, by which transformers.js finds the model's class")
            .remedy("put the Hugging Face config into the folder of the ONNX files"));
    }
    let model_type = bundle.require_config()?.model_type.as_str();
    if IMAGE_TEXT.contains(&model_type) {
        return Ok(ModelClass::ImageText);
    }
    if TEXT.contains(&model_type) {
        return Ok(ModelClass::Text);
    }
    let problem = format!(
        "is of the model type `{model_type}`, for which transformers.js 4.3 has no class; of pictures and text it has {}",
        IMAGE_TEXT.join(", ")
    );
    Err(Error::unsupported(subject, problem)
        .remedy("export it with `--to generate`, `--to triton` or, for ONNX Runtime GenAI, `--to genai`"))
}

/// The file stem (no variant, no extension) under which transformers.js looks for a component.
///
/// Errors: `Error::Unsupported` for a component that it does not use.
pub(super) fn stem_of(kind: ModelClass, component: &Component) -> Result<&'static str> {
    match (kind, component.role) {
        (ModelClass::ImageText, Role::VisionEncoder) => Ok("vision_encoder"),
        (ModelClass::ImageText, Role::EmbedTokens) => Ok("embed_tokens"),
        (ModelClass::ImageText, Role::Decoder) => Ok("decoder_model_merged"),
        (ModelClass::ImageText, Role::AudioEncoder) => Ok("audio_encoder"),
        (ModelClass::Text, Role::Decoder) => Ok("model"),
        (_, role) => Err(Error::unsupported(
            format!("`{}`", component.file),
            format!("transformers.js does not support a separate {}", role.name()),
        )
        .remedy(
            "export the model with one decoder that reads and gives the cache, and features in the decoder's width",
        )),
    }
}

/// Checks the names and types of a component's inputs and outputs.
///
/// Errors: `Error::Unsupported` naming an input that transformers.js never passes, or a
/// missing output that it requires.
pub(super) fn check_ports(
    component: &Component,
    model: &Model,
    config: Option<&ModelConfig>,
    packed: bool,
    notes: &mut Vec<String>,
) -> Result<()> {
    let graph = &model.graph;
    let names = |values: &[ValueId]| -> Vec<String> { values.iter().map(|&id| graph.name(id).to_string()).collect() };
    let (inputs, outputs) = (names(&graph.body.inputs), names(&graph.body.outputs));
    let subject = || format!("`{}`", component.file);
    let wanted = match component.role {
        Role::VisionEncoder => "image_features",
        Role::EmbedTokens => "inputs_embeds",
        Role::Decoder => "logits",
        _ => return Ok(()),
    };
    if !outputs.iter().any(|name| name == wanted) {
        let list: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let problem =
            format!("has no output `{wanted}`, by which transformers.js finds it; it has {}", list_preview(&list, 6));
        return Err(Error::unsupported(subject(), problem).remedy("rename the output in the exporter"));
    }
    if component.role == Role::Decoder {
        let fed = |name: &str| DECODER_INPUTS.contains(&name) || CACHES.iter().any(|cache| name.starts_with(cache));
        if let Some(name) = inputs.iter().find(|name| !fed(name)) {
            let problem = format!(
                "reads `{name}`, which transformers.js never feeds: it feeds {} and caches",
                DECODER_INPUTS.join(", ")
            );
            let instead = match name.contains("deepstack") || name.contains("visual_pos") {
                true => "export the model with its DeepStack features packed into `inputs_embeds`",
                false => "export the model without this input",
            };
            let elsewhere = "or serve it with `--to generate` or `--to triton`, whose graphs compute it";
            return Err(Error::unsupported(subject(), problem).remedy(format!("{instead}, {elsewhere}")));
        }
    }
    // The processors there make one view of a picture and no sizes.
    if component.role == Role::VisionEncoder && inputs.iter().any(|name| name == IMAGE_SIZES) {
        let problem = format!("reads `{IMAGE_SIZES}`, which transformers.js never feeds");
        return Err(Error::unsupported(subject(), problem).remedy(
            "export the vision encoder for one view of a picture of one size, or use `--to generate` or `--to triton`",
        ));
    }
    if matches!(component.role, Role::EmbedTokens) && inputs != ["input_ids"] {
        let list: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let problem = format!(
            "reads {}; transformers.js feeds `input_ids` alone and merges features itself",
            list_preview(&list, 6)
        );
        return Err(Error::unsupported(subject(), problem).remedy("export the token embedding as a separate graph"));
    }
    let half = |id: &&ValueId| {
        matches!(
            graph.values[id.index()].ty,
            Some(ValueType::Tensor { dtype: DataType::Float16 | DataType::Bfloat16, .. })
        )
    };
    let ports = graph.body.inputs.iter().chain(&graph.body.outputs);
    if let Some(&id) = ports.filter(|id| !CACHES.iter().any(|cache| graph.name(**id).starts_with(cache))).find(half)
        && !graph.name(id).starts_with("present")
    {
        let problem =
            format!("has `{}` in half precision, and transformers.js feeds and reads float32 there", graph.name(id));
        return Err(Error::unsupported(subject(), problem)
            .remedy("keep inputs and outputs in float32 when you convert (`keep_io_types=True`)"));
    }
    if let (Role::Decoder, Some(config), false) = (component.role, config, packed) {
        let stacked = config.raw.get("vision_config").and_then(|vision| vision.get("deepstack_visual_indexes"));
        if stacked.is_some_and(|indexes| indexes.as_array().is_some_and(|list| !list.is_empty())) {
            notes.push("the config has DeepStack, the graph that transformers.js runs has not".to_string());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_type_tables_are_sorted_and_without_duplicates() {
        for table in [IMAGE_TEXT, TEXT] {
            assert!(table.windows(2).all(|pair| pair[0] < pair[1]), "{table:?}");
        }
        assert!(IMAGE_TEXT.iter().all(|name| !TEXT.contains(name)));
    }
}
