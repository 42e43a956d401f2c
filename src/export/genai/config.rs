//! `genai_config.json`, and the picture processor's config in the form that ONNX Runtime GenAI reads.
//!
//! Source: `src/config.h`, `src/models/model_type.h` and `src/models/*_image_processor.cpp` of onnxruntime-genai 0.18.

use serde_json::{Map, Value, json};

use crate::base::{Error, Result};
use crate::bundle::{Bundle, ModelConfig, token_ids};
use crate::runtime::Input;

use super::graphs::{
    ELSEWHERE, GenaiFigures, IMAGE_FEATURES, INPUTS_EMBEDS, PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE,
};

/// Text models that GenAI knows by name; others are a `decoder`.
const TEXT: &[&str] = &[
    "chatglm",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gptoss",
    "granite",
    "granitemoehybrid",
    "hunyuandensev1",
    "internlm2",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi",
    "phi3",
    "phi3small",
    "phimoe",
    "qwen2",
    "qwen3",
    "smollm3",
];
/// Models whose positions have three rows, and the type by which GenAI computes them.
const THREE_ROWS: &[(&str, &str)] = &[
    ("qwen2_vl", "qwen2_5_vl"),
    ("qwen2_5_vl", "qwen2_5_vl"),
    ("qwen3_vl", "qwen3_vl"),
    ("qwen3vl", "qwen3_vl"),
    ("qwen3_vl_moe", "qwen3_vl"),
];
/// The type of every other model of pictures and text: a vision encoder, an embedding that merges, and a decoder whose
/// positions count tokens.
const PICTURES: &str = "gemma3";
/// File of the picture processor's config. The name of transformers' own file would be taken for that.
pub(super) const PROCESSOR_FILE: &str = "genai_processor.json";

/// File names of the graphs.
pub(super) const DECODER_FILE: &str = "model.onnx";
pub(super) const VISION_FILE: &str = "vision.onnx";
pub(super) const EMBEDDING_FILE: &str = "embedding.onnx";

/// GenAI's type for the model.
///
/// Errors: `Error::Unsupported` for positions in three rows that GenAI does not compute for this model.
pub(super) fn type_of(config: &ModelConfig, figures: &GenaiFigures, has_pictures: bool) -> Result<&'static str> {
    let own = config.model_type.as_str();
    if figures.multimodal_positions {
        let known = THREE_ROWS.iter().find(|(name, _)| has_pictures && *name == own);
        return known.map(|(_, kind)| *kind).ok_or_else(|| {
            let problem = format!("has positions in three rows, which ONNX Runtime GenAI does not compute for `{own}`");
            Error::unsupported("the decoder", problem).remedy(ELSEWHERE)
        });
    }
    Ok(match has_pictures {
        true => PICTURES,
        false => TEXT.iter().find(|name| **name == own).copied().unwrap_or("decoder"),
    })
}

/// The text of `genai_config.json`. `pictures` are the vision encoder's inputs; `has_processor` is true when the folder
/// has [`PROCESSOR_FILE`].
///
/// Errors: `Error::Invalid` naming a key that the model's config lacks.
pub(super) fn text(
    bundle: &Bundle,
    figures: &GenaiFigures,
    pictures: Option<&[Input]>,
    has_processor: bool,
) -> Result<String> {
    let config = bundle.require_config()?;
    let context = config.require("max_position_embeddings", config.context_tokens)?;
    if config.eos_token_ids.is_empty() {
        return Err(Error::invalid(format!("`{}`", config.source), "names no end token, so no answer would end")
            .remedy("add `eos_token_id` with the id of the token that ends an answer, or a list of ids"));
    }
    let end = match &config.eos_token_ids[..] {
        [one] => json!(one),
        ids => json!(ids),
    };
    let options = json!({"log_id": "onnxruntime-genai", "provider_options": []});
    let width = figures.embeddings.and_then(|(width, _)| width).or(config.hidden_size);
    let names =
        |names: &[String]| -> Map<String, Value> { names.iter().map(|name| (name.clone(), json!(name))).collect() };
    let mut inputs = names(&figures.inputs);
    inputs.insert("past_key_names".into(), json!(PAST_KEY));
    inputs.insert("past_value_names".into(), json!(PAST_VALUE));
    let mut model = json!({
        "type": type_of(config, figures, pictures.is_some())?,
        "context_length": context,
        "eos_token_id": end,
        "pad_token_id": config.pad_token_id.unwrap_or(config.eos_token_ids[0]),
        "vocab_size": config.require("vocab_size", figures.vocabulary.or(config.vocab_size))?,
        "decoder": {
            "session_options": options,
            "filename": DECODER_FILE,
            "head_size": figures.heads.1,
            "hidden_size": config.require("hidden_size", width)?,
            "num_hidden_layers": figures.layers,
            "num_key_value_heads": figures.heads.0,
            "num_attention_heads": config.num_attention_heads.unwrap_or(figures.heads.0),
            "inputs": inputs,
            "outputs": {
                "logits": "logits", "present_key_names": PRESENT_KEY, "present_value_names": PRESENT_VALUE,
            },
        },
    });
    if let Some(id) = config.bos_token_id {
        model["bos_token_id"] = json!(id);
    }
    if let Some(pictures) = pictures {
        add_pictures(&mut model, bundle, pictures, has_processor)?;
    }
    let search = json!({
        "do_sample": false, "max_length": context, "min_length": 0, "num_beams": 1, "num_return_sequences": 1,
        "past_present_share_buffer": figures.grouped_query, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 1,
        "top_p": 1.0,
    });
    let whole = json!({"model": model, "search": search});
    serde_json::to_string_pretty(&whole)
        .map(|text| text + "\n")
        .map_err(|e| Error::invalid("`genai_config.json`", e.to_string()))
}

/// Adds the sections of the vision encoder and the embedding, and the ids of the tokens around pictures.
fn add_pictures(model: &mut Value, bundle: &Bundle, pictures: &[Input], has_processor: bool) -> Result<()> {
    let config = bundle.require_config()?;
    model["image_token_id"] = json!(config.image_token_id);
    for key in ["vision_start_token_id", "video_token_id"] {
        let raw = bundle.read_json(&config.source)?;
        let ids = token_ids(&config.source, key, raw.as_ref().and_then(|raw| raw.get(key)))?;
        if let Some(id) = ids.first() {
            model[key] = json!(id);
        }
    }
    if model["type"] != PICTURES && model.get("vision_start_token_id").is_none() {
        return Err(Error::invalid(
            format!("`{}`", config.source),
            "has no `vision_start_token_id`, by which ONNX Runtime GenAI finds the pictures' positions",
        )
        .remedy("add the key, with the model's own figure"));
    }
    let own: Vec<String> = pictures.iter().map(|input| input.port.name.clone()).collect();
    let mut inputs = Map::new();
    for (key, names) in [("pixel_values", &["pixel_values"][..]), ("image_grid_thw", &["image_grid_thw", "grid_thw"])] {
        if let Some(name) = own.iter().find(|name| names.contains(&name.as_str())) {
            inputs.insert(key.into(), json!(name));
        }
    }
    model["vision"] = json!({
        "filename": VISION_FILE, "inputs": inputs, "outputs": {"image_features": IMAGE_FEATURES},
    });
    if let Some(merge) = config.spatial_merge_size {
        model["vision"]["spatial_merge_size"] = json!(merge);
    }
    if has_processor {
        model["vision"]["config_filename"] = json!(PROCESSOR_FILE);
    }
    model["embedding"] = json!({
        "filename": EMBEDDING_FILE,
        "inputs": {"input_ids": "input_ids", "image_features": IMAGE_FEATURES},
        "outputs": {"inputs_embeds": INPUTS_EMBEDS},
    });
    Ok(())
}
