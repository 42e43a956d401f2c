//! Placeholder tokens of a picture in the text: one row per kind of processor, named as in transformers' `processor_class`.

mod gemma;
mod idefics3;
mod janus;
mod lfm2_vl;
mod llava;
mod llava_onevision;
mod minicpm_v;
mod pixtral;
mod run;
mod tiles;

use std::fmt;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::{Bundle, image_token_entry};

use super::families::family_of;
use super::images::{self, BackEnd, ImageLayout, Settings, VideoLayout};
use super::tokenizer::Tokenizer;

/// Builds what one picture takes in the text.
type Expand = Box<dyn Fn(&ImageLayout, Ordinal) -> String + Send + Sync>;

/// Which of how many pictures of a conversation one is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ordinal {
    pub index: usize,
    pub count: usize,
}

/// How pictures appear in a text.
pub(super) struct Placeholder {
    /// What a rendered conversation holds for a picture.
    pub marker: String,
    /// The token of which each occurrence takes one row of image features.
    pub feature: String,
    pub expand: Expand,
    /// Settings that the processor passes to its image processor whatever that one's config says.
    pub image_settings: Map<String, Value>,
    /// Whether the tokenizer adds its own begin token.
    pub special_tokens: bool,
    /// The chat template of a family that has none of its own.
    pub template: Option<&'static str>,
    /// How videos appear, for families that take them.
    pub video: Option<VideoPlaceholder>,
}

/// How videos appear in a text.
pub(super) struct VideoPlaceholder {
    /// What a rendered conversation holds for a video.
    pub marker: String,
    /// The token of which each occurrence takes one row of features.
    pub feature: String,
    pub expand: Box<dyn Fn(&VideoLayout) -> String + Send + Sync>,
}

impl fmt::Debug for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placeholder").field("marker", &self.marker).field("feature", &self.feature).finish()
    }
}

impl Placeholder {
    /// A picture is a token in the text, which is replaced by what `expand` makes of it.
    fn new(token: &str, expand: impl Fn(&ImageLayout, Ordinal) -> String + Send + Sync + 'static) -> Self {
        Placeholder {
            marker: token.to_string(),
            feature: token.to_string(),
            expand: Box::new(expand),
            image_settings: Map::new(),
            special_tokens: true,
            template: None,
            video: None,
        }
    }

    /// The processor that a model's files ask for.
    ///
    /// Errors: `Error::Unsupported` for a processor that is not known; `Error::Invalid` for a setting that nothing reads or
    /// that has the wrong kind.
    pub fn open(bundle: &Bundle, tokenizer: &Tokenizer, image: &Value, config: &Value) -> Result<Self> {
        let model = bundle.config().map_or(&Value::Null, |config| &config.raw);
        let row = row(bundle, image, config, model)?;
        let own = |key: &String| !NESTED.contains(&key.as_str());
        let map = config.as_object().cloned().unwrap_or_default();
        let map = map.into_iter().filter(|(key, _)| own(key)).collect();
        let settings = Settings::new("processor_config.json", map, BackEnd::Pil, None);
        let mut files = Files { tokenizer, settings, image, config, model };
        let placeholder = (row.open)(&mut files)?;
        files.settings.finish()?;
        Ok(placeholder)
    }
}

/// Keys of `processor_config.json` that belong to its parts.
const NESTED: &[&str] = &[
    "image_processor",
    "video_processor",
    "feature_extractor",
    "audio_processor",
    "tokenizer",
    "chat_template",
    "audio_seq_length",
    "video_token",
];

/// What a row reads.
struct Files<'a> {
    tokenizer: &'a Tokenizer,
    /// The processor's own settings, each taken once.
    settings: Settings,
    /// The image processor's config.
    image: &'a Value,
    /// The whole of `processor_config.json`.
    config: &'a Value,
    /// The whole of `config.json`.
    model: &'a Value,
}

impl Files<'_> {
    /// A token by the name that tokenizers and processors give it: the tokenizer's comes first.
    fn token(&mut self, name: &str, default: &str) -> Result<String> {
        let said = self.settings.text(name, default)?;
        Ok(self.tokenizer.named(name).map_or(said, str::to_string))
    }

    /// The token that takes an image feature: the model's `image_token_id`, else the tokenizer's `name`, else `default`.
    ///
    /// Errors: `Error::Invalid` when the tokenizer does not have it.
    fn feature(&mut self, name: &str, default: &str) -> Result<String> {
        let said = self.token(name, default)?;
        if let Some((key, id)) = image_token_entry(self.model) {
            let token = id.as_u64().and_then(|id| u32::try_from(id).ok()).and_then(|id| self.tokenizer.token(id));
            return token.ok_or_else(|| {
                Error::invalid("`config.json`", format!("`{key}` is {id}, which the tokenizer does not have"))
                    .remedy("restore `config.json` and `tokenizer.json` of the same model")
            });
        }
        if self.tokenizer.id(&said).is_none() {
            return Err(Error::invalid("`tokenizer.json`", format!("has no image token `{said}`"))
                .remedy("restore `tokenizer.json` and `processor_config.json` of the same model"));
        }
        Ok(said)
    }
}

pub(super) struct PlaceholderRow {
    pub classes: &'static [&'static str],
    open: fn(&mut Files) -> Result<Placeholder>,
}

/// Processors by class; `families::FAMILIES` says which model types have which.
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

/// The row of the class that the processor's, the image processor's or the tokenizer's config names; else of the model's
/// type; else of the image processor's class.
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
