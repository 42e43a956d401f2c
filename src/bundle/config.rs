//! Values from a model's configs, parsed once.

use std::ops::RangeInclusive;

use serde::Serialize;
use serde_json::Value;

use crate::base::{Error, Result};

use super::Bundle;

/// The values that interlace reads from `config.json`, `generation_config.json` or `genai_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ModelConfig {
    /// The file that contains them.
    pub source: String,
    /// Name of the architecture, such as `qwen2_vl`; empty where the file has none.
    pub model_type: String,
    /// Decoder layers.
    pub num_hidden_layers: Option<usize>,
    /// Width of the residual stream.
    pub hidden_size: Option<usize>,
    /// Query heads of one attention layer.
    pub num_attention_heads: Option<usize>,
    /// Key-value heads of one attention layer; fewer than the query heads with grouped queries.
    pub num_key_value_heads: Option<usize>,
    /// Width of one head's queries and keys.
    pub head_dim: Option<usize>,
    /// Key-value heads of layers of another kind (such as global attention between sliding windows).
    pub other_key_value_heads: Vec<usize>,
    /// Head sizes of values, and head sizes of layers of another kind.
    pub other_head_dims: Vec<usize>,
    /// Sizes of multi-head latent attention, if the model uses it.
    pub latent_attention: Option<LatentAttention>,
    /// Rows of the embedding table, padding included.
    pub vocab_size: Option<usize>,
    /// Layers of the vision tower.
    pub vision_num_layers: Option<usize>,
    /// Id of the placeholder token for one image feature.
    pub image_token_id: Option<i64>,
    /// Patches a side that the vision tower merges into one feature.
    #[serde(skip)]
    pub spatial_merge_size: Option<usize>,
    /// Maximum context of the model in tokens.
    pub context_tokens: Option<usize>,
    /// Id of the token that begins a sequence.
    pub bos_token_id: Option<i64>,
    /// Id of the token that pads a batch.
    pub pad_token_id: Option<i64>,
    /// Ids of the tokens at which generation ends.
    pub eos_token_ids: Vec<i64>,
    /// The whole config.
    #[serde(skip)]
    pub raw: Value,
}

/// Sizes of multi-head latent attention, whose keys and values are computed from a latent that all heads share.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LatentAttention {
    /// Width of the shared latent.
    pub kv_lora_rank: usize,
    /// Part of a head's query and key width without rotary embedding.
    pub qk_nope_head_dim: usize,
    /// Part of a head's query and key width with rotary embedding.
    pub qk_rope_head_dim: usize,
    /// Width of one head's values.
    pub v_head_dim: usize,
}

/// Largest number of layers that a config may name.
const MAX_LAYERS: usize = 100_000;
/// Largest width, number of heads or head size that a config may name.
const MAX_WIDTH: usize = 1 << 24;
/// Largest side of a square of patches that become one feature.
const MAX_MERGE: usize = 256;
/// Largest id of a token, vocabulary and context: runtimes count them in 32 bits.
const MAX_COUNT: usize = i32::MAX as usize;

const GENAI: &str = "genai_config.json";
const GENERATION: &str = "generation_config.json";

/// Keys under which configs hold the language model.
pub(super) const TEXT_SECTIONS: &[&str] = &["text_config", "llm_config", "language_config", "thinker_config"];
/// Keys under which configs hold the vision tower.
pub(super) const VISION_SECTIONS: &[&str] =
    &["vision_config", "visual", "vision_tower_config", "vit_config", "vision_encoder", "vision"];

impl ModelConfig {
    pub(super) fn read(bundle: &Bundle) -> Result<Option<Self>> {
        if let Some(raw) = bundle.read_json("config.json")? {
            let generation = bundle.read_json("generation_config.json")?.unwrap_or(Value::Null);
            return Self::from_config(raw, &generation).map(Some);
        }
        bundle.read_json("genai_config.json")?.map(Self::from_genai).transpose()
    }

    fn from_config(raw: Value, generation: &Value) -> Result<Self> {
        let text = section(&raw, TEXT_SECTIONS).unwrap_or(&Value::Null);
        let vision = section(&raw, VISION_SECTIONS).unwrap_or(&Value::Null);
        let either = |key: &str| text.get(key).or_else(|| raw.get(key)).filter(|value| !value.is_null());
        let figure = |keys: &[&str], most| first(keys, |key| usize_of("config.json", key, either(key), most));
        let size = |keys: &[&str]| figure(keys, MAX_WIDTH);
        let sizes = |keys: &[&str]| -> Result<Vec<usize>> {
            let found = keys.iter().map(|key| size(&[*key])).collect::<Result<Vec<_>>>()?;
            Ok(found.into_iter().flatten().collect())
        };
        let id = |key: &str| Ok::<_, Error>(token_ids("config.json", key, either(key))?.first().copied());
        let generated = |key: &str| token_ids(GENERATION, key, generation.get(key));
        let named = |section: &Value| text_of("config.json", "model_type", section.get("model_type"));
        let model_types = [named(&raw)?, named(text)?];
        let eos = [
            generated("eos_token_id")?,
            token_ids("config.json", "eos_token_id", raw.get("eos_token_id"))?,
            token_ids("config.json", "eos_token_id", text.get("eos_token_id"))?,
        ];
        let config = ModelConfig {
            source: "config.json".into(),
            model_type: model_types.into_iter().find(|name| !name.is_empty()).unwrap_or_default(),
            num_hidden_layers: figure(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"], MAX_LAYERS)?,
            hidden_size: size(&["hidden_size", "n_embd", "d_model"])?,
            num_attention_heads: size(&["num_attention_heads", "n_head", "num_heads"])?,
            num_key_value_heads: size(&["num_key_value_heads"])?,
            head_dim: size(&["head_dim"])?,
            other_key_value_heads: [
                sizes(&["num_global_key_value_heads", "swa_num_key_value_heads"])?,
                of_layers(text, "num_key_value_heads"),
            ]
            .concat(),
            other_head_dims: [
                sizes(&["v_head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim"])?,
                of_layers(text, "head_dim"),
            ]
            .concat(),
            latent_attention: match sizes(&["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"])? {
                sizes if sizes.len() == 4 => Some(LatentAttention {
                    kv_lora_rank: sizes[0],
                    qk_nope_head_dim: sizes[1],
                    qk_rope_head_dim: sizes[2],
                    v_head_dim: sizes[3],
                }),
                _ => None,
            },
            vocab_size: figure(&["vocab_size"], MAX_COUNT)?,
            vision_num_layers: first(&["num_hidden_layers", "depth", "num_layers", "layers"], |key| {
                usize_of("config.json", key, vision.get(key), MAX_LAYERS)
            })?,
            image_token_id: image_token(&raw)?,
            bos_token_id: id("bos_token_id")?,
            pad_token_id: generated("pad_token_id")?.first().copied().or(id("pad_token_id")?),
            eos_token_ids: eos.into_iter().find(|ids| !ids.is_empty()).unwrap_or_default(),
            spatial_merge_size: merge_size("config.json", raw.get("vision_config"))?,
            context_tokens: context(text)?.map_or_else(|| context(&raw), |found| Ok(Some(found)))?,
            raw: Value::Null,
        };
        Ok(ModelConfig { raw, ..config })
    }

    fn from_genai(raw: Value) -> Result<Self> {
        let model = raw.get("model").unwrap_or(&Value::Null);
        let decoder = model.get("decoder").unwrap_or(&Value::Null);
        let size = |key: &str| usize_of(GENAI, key, decoder.get(key), MAX_WIDTH);
        let count = |key: &str| usize_of(GENAI, key, model.get(key), MAX_COUNT);
        let id = |key: &str| token_ids(GENAI, key, model.get(key));
        let config = ModelConfig {
            source: GENAI.into(),
            model_type: text_of(GENAI, "type", model.get("type"))?,
            num_hidden_layers: usize_of(GENAI, "num_hidden_layers", decoder.get("num_hidden_layers"), MAX_LAYERS)?,
            hidden_size: size("hidden_size")?,
            num_attention_heads: size("num_attention_heads")?,
            num_key_value_heads: size("num_key_value_heads")?,
            head_dim: size("head_size")?,
            other_key_value_heads: Vec::new(),
            other_head_dims: Vec::new(),
            latent_attention: None,
            vocab_size: count("vocab_size")?,
            vision_num_layers: None,
            image_token_id: image_token(model)?,
            bos_token_id: id("bos_token_id")?.first().copied(),
            pad_token_id: id("pad_token_id")?.first().copied(),
            eos_token_ids: id("eos_token_id")?,
            spatial_merge_size: merge_size(GENAI, model.get("vision"))?,
            context_tokens: count("context_length")?.filter(|&size| size > 0),
            raw: Value::Null,
        };
        Ok(ModelConfig { raw, ..config })
    }

    /// A required value.
    ///
    /// Errors: `Error::Invalid` naming the key when it is missing.
    pub fn require<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            Error::invalid(format!("`{}`", self.source), format!("has no `{key}`"))
                .remedy("add the key, with the model's own figure")
        })
    }

    /// The width of one attention head: `head_dim`, else `hidden_size / num_attention_heads`.
    pub fn head_size(&self) -> Option<usize> {
        self.head_dim.or_else(|| self.hidden_size?.checked_div(self.num_attention_heads?))
    }
}

fn section<'a>(raw: &'a Value, names: &[&str]) -> Option<&'a Value> {
    let found = names.iter().find_map(|name| raw.get(name).filter(|value| value.is_object()))?;
    // Audio-capable families nest the language model one level deeper.
    Some(names.iter().find_map(|name| found.get(name).filter(|value| value.is_object())).unwrap_or(found))
}

/// Values of single layers, from `per_layer_config`, which lists them by layer index.
fn of_layers(text: &Value, key: &str) -> Vec<usize> {
    let layers = text.get("per_layer_config").and_then(Value::as_object).into_iter().flat_map(|layers| layers.values());
    let figures = layers.filter_map(|layer| layer.get(key)?.as_u64().and_then(|figure| usize::try_from(figure).ok()));
    let figures = figures.filter(|&figure| figure <= MAX_WIDTH);
    let distinct: std::collections::BTreeSet<usize> = figures.collect();
    distinct.into_iter().collect()
}

fn text_of(source: &str, key: &str, value: Option<&Value>) -> Result<String> {
    match value {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value) => Err(unexpected(source, key, value, "a text")),
    }
}

fn first<T>(keys: &[&str], read: impl Fn(&str) -> Result<Option<T>>) -> Result<Option<T>> {
    for key in keys {
        if let Some(value) = read(key)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A size of at most `most`; a list (one entry per layer) counts as absent.
fn usize_of(source: &str, key: &str, value: Option<&Value>, most: usize) -> Result<Option<usize>> {
    match value {
        Some(Value::Array(_)) => Ok(None),
        value => whole_number_in(source, key, value, 0..=most),
    }
}

/// An integer of a config within a range; `None` when the key is absent or null.
///
/// Errors: `Error::Invalid` naming file and key for every other value.
fn whole_number_in(
    source: &str,
    key: &str,
    value: Option<&Value>,
    range: RangeInclusive<usize>,
) -> Result<Option<usize>> {
    let number = whole_number(source, key, value)?;
    match (number.filter(|number| !range.contains(number)), value) {
        (Some(_), Some(value)) => {
            let expected = format!("a whole number from {} to {}", range.start(), range.end());
            Err(unexpected(source, key, value, &expected))
        }
        _ => Ok(number),
    }
}

/// An integer of a config that is not negative; `None` when the key is absent or null.
///
/// Errors: `Error::Invalid` naming file and key for every other value.
pub fn whole_number(source: &str, key: &str, value: Option<&Value>) -> Result<Option<usize>> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
    number.map(Some).ok_or_else(|| unexpected(source, key, value, "a whole number"))
}

/// A boolean of a config; `None` when the key is absent or null.
///
/// Errors: `Error::Invalid` naming file and key for every other value.
pub fn flag(source: &str, key: &str, value: Option<&Value>) -> Result<Option<bool>> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    value.as_bool().map(Some).ok_or_else(|| unexpected(source, key, value, "true or false"))
}

fn unexpected(source: &str, key: &str, value: &Value, expected: &str) -> Error {
    Error::invalid(format!("`{source}`"), format!("`{key}` is {value}, expected {expected}"))
        .remedy("correct the config")
}

/// Token ids of a config: one id or a list. A negative number means no token.
///
/// Errors: `Error::Invalid` naming file and key for every other value.
pub fn token_ids(source: &str, key: &str, value: Option<&Value>) -> Result<Vec<i64>> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(Vec::new()) };
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let found: Option<Vec<i64>> = list.iter().map(token_id).collect();
    let found = found.ok_or_else(|| unexpected(source, key, value, "the id of a token or a list of ids"))?;
    Ok(found.into_iter().filter(|id| *id >= 0).collect())
}

/// An id of a token; a negative number stands for no token, or for a place without one.
fn token_id(value: &Value) -> Option<i64> {
    value.as_i64().filter(|&id| id <= MAX_COUNT as i64)
}

/// Keys of the placeholder's id for one image feature, in order of precedence.
const IMAGE_TOKENS: &[&str] = &["image_token_id", "image_token_index", "image_token"];

/// The key and value of the image token, if the config has one. The value of `image_token` may be a token's text, which
/// the tokenizer converts.
pub fn image_token_entry(config: &Value) -> Option<(&'static str, &Value)> {
    let mut entries = IMAGE_TOKENS.iter().filter_map(|&key| Some((key, config.get(key)?)));
    let is_text = |key: &str, value: &Value| key == "image_token" && value.is_string();
    entries.find(|(key, value)| !value.is_null() && !is_text(key, value))
}

fn image_token(config: &Value) -> Result<Option<i64>> {
    let Some((key, value)) = image_token_entry(config) else { return Ok(None) };
    token_id(value).map(Some).ok_or_else(|| unexpected("config.json", key, value, "the id of a token"))
}

fn merge_size(source: &str, vision: Option<&Value>) -> Result<Option<usize>> {
    let key = "spatial_merge_size";
    whole_number_in(source, key, vision.and_then(|vision| vision.get(key)), 1..=MAX_MERGE)
}

/// Context length: `max_position_embeddings`, or the length to which rotary scaling extends it.
fn context(section: &Value) -> Result<Option<usize>> {
    let number = |key: &str| whole_number_in("config.json", key, section.get(key), 0..=MAX_COUNT);
    let Some(most) = first(&["max_position_embeddings", "n_positions"], number)?.filter(|&most| most > 0) else {
        return Ok(None);
    };
    let rope =
        ["rope_scaling", "rope_parameters"].iter().find_map(|key| section.get(key).filter(|rope| rope.is_object()));
    let of = |key: &str| rope.and_then(|rope| rope.get(key)).and_then(Value::as_f64);
    let stretched = of("factor").map(|factor| of("original_max_position_embeddings").unwrap_or(most as f64) * factor);
    let context = stretched.map_or(most, |stretched| most.max(stretched as usize));
    if context > MAX_COUNT {
        let problem = format!("its rotary scaling makes a context of {context} tokens, expected at most {MAX_COUNT}");
        return Err(Error::invalid("`config.json`", problem).remedy("correct `factor` in the config"));
    }
    Ok(Some(context))
}
