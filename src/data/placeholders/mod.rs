//! Placeholder tokens of images in a prompt: one row per processor, with the name of its `processor_class` in
//! transformers.

mod gemma;
mod idefics3;
mod janus;
mod lfm2_vl;
mod llava;
mod llava_onevision;
mod minicpm_v;
mod pixtral;
mod placeholder;
mod run;
mod tiles;

use serde_json::Value;

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::families::family_of;
use super::images::{self, BackEnd, ProcessorSettings};
use super::tokenizer::Tokenizer;

use placeholder::Files;
pub(super) use placeholder::{Ordinal, Placeholder};

/// Builds the placeholder for a model's files.
///
/// Errors: `Error::Unsupported` for an unknown processor; `Error::Invalid` for an unknown setting or one of the wrong
/// type.
pub(super) fn open(bundle: &Bundle, tokenizer: &Tokenizer, image: &Value, config: &Value) -> Result<Placeholder> {
    let model = bundle.config().map_or(&Value::Null, |config| &config.raw);
    let row = row(bundle, image, config, model)?;
    let own = |key: &String| !NESTED.contains(&key.as_str());
    let map = config.as_object().cloned().unwrap_or_default();
    let map = map.into_iter().filter(|(key, _)| own(key)).collect();
    let settings = ProcessorSettings::new("processor_config.json", map, BackEnd::Pil, None);
    let mut files = Files { tokenizer, settings, image, config, model };
    let placeholder = (row.open)(&mut files)?;
    // Only some rows read a token of videos.
    files.settings.take("video_token");
    files.settings.finish()?;
    Ok(placeholder)
}

/// Keys of `processor_config.json` that are not settings of the image placeholder: nested processors and audio.
const NESTED: &[&str] = &[
    "image_processor",
    "video_processor",
    "feature_extractor",
    "audio_processor",
    "tokenizer",
    "chat_template",
    "audio_seq_length",
];

/// A row of the table of processors.
pub(super) struct PlaceholderRow {
    pub classes: &'static [&'static str],
    open: fn(&mut Files) -> Result<Placeholder>,
}

/// All processors by class. `families::FAMILIES` maps model types to classes.
pub(super) const ROWS: &[PlaceholderRow] = &[
    PlaceholderRow { classes: &["Idefics3Processor", "SmolVLMProcessor"], open: idefics3::open },
    PlaceholderRow {
        classes: &["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Lfm3VlProcessor"],
        open: |files| run::open(files, "<|image_pad|>"),
    },
    PlaceholderRow { classes: &["Qwen3VLProcessor"], open: run::qwen3_vl },
    PlaceholderRow { classes: &["Glm4vProcessor", "Glm46VProcessor"], open: |files| run::open(files, "<|image|>") },
    PlaceholderRow { classes: &["PaddleOCRVLProcessor"], open: |files| run::open(files, "<|IMAGE_PLACEHOLDER|>") },
    PlaceholderRow { classes: &["LlavaProcessor"], open: llava::open },
    PlaceholderRow { classes: &["LlavaOnevisionProcessor"], open: llava_onevision::open },
    PlaceholderRow { classes: &["InternVLProcessor"], open: tiles::internvl },
    PlaceholderRow { classes: &["AyaVisionProcessor"], open: tiles::aya_vision },
    PlaceholderRow { classes: &["Gemma3Processor"], open: gemma::gemma3 },
    PlaceholderRow { classes: &["Gemma3nProcessor"], open: gemma::gemma3n },
    PlaceholderRow { classes: &["PaliGemmaProcessor"], open: gemma::paligemma },
    PlaceholderRow { classes: &["PixtralProcessor"], open: pixtral::open },
    PlaceholderRow { classes: &["Lfm2VlProcessor"], open: lfm2_vl::open },
    PlaceholderRow { classes: &["Gemma4Processor"], open: gemma::gemma4 },
    PlaceholderRow { classes: &["Ovis2Processor"], open: tiles::ovis2 },
    PlaceholderRow { classes: &["GraniteDoclingProcessor"], open: idefics3::granite_docling },
    PlaceholderRow { classes: &["MiniCPMV4_6Processor", "MiniCPMV4_7Processor"], open: minicpm_v::open },
    PlaceholderRow { classes: &["JanusProcessor"], open: janus::janus },
    PlaceholderRow { classes: &["DeepseekVLProcessor"], open: janus::deepseek_vl },
];

/// Row of the first class that the processor's, the image processor's or the tokenizer's config names, in this order;
/// else of the model type's class; else of the image processor's class.
///
/// Errors: `Error::Unsupported` when none of them is known.
fn row(bundle: &Bundle, image: &Value, config: &Value, model: &Value) -> Result<&'static PlaceholderRow> {
    let tokenizer = bundle.read_json("tokenizer_config.json")?.unwrap_or(Value::Null);
    let named = [config, image, &tokenizer].map(|config| config.get("processor_class").and_then(Value::as_str));
    let of_class = |class: &str| ROWS.iter().find(|row| row.classes.contains(&class));
    let model_type = model.get("model_type").and_then(Value::as_str);
    let named = named.into_iter().flatten().next();
    let row = named
        .and_then(of_class)
        .or_else(|| of_class(family_of(model_type?)?.class?))
        .or_else(|| of_class(images::processor_of(images::kind(image)?)?));
    row.ok_or_else(|| {
        let known: Vec<&str> = ROWS.iter().flat_map(|row| row.classes).copied().collect();
        let found = match (named, model_type) {
            (Some(class), _) => format!("processor `{class}`"),
            (None, Some(kind)) => format!("processor of model type `{kind}`"),
            (None, None) => "a processor without `processor_class`".to_string(),
        };
        Error::unsupported("`processor_config.json`", format!("{found}; known are {}", known.join(", ")))
            .remedy("use samples without pictures, or a model with one of these processors")
    })
}
