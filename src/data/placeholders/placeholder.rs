//! How pictures appear in a text, and the files that say so.

use std::fmt;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::image_token_entry;

use super::super::images::{ImageLayout, Settings, VideoLayout};
use super::super::tokenizer::Tokenizer;

/// Builds what one picture takes in the text.
type Expand = Box<dyn Fn(&ImageLayout, Ordinal) -> String + Send + Sync>;

/// Which of how many pictures of a conversation one is.
#[derive(Clone, Copy, Debug)]
pub(in crate::data) struct Ordinal {
    pub index: usize,
    pub count: usize,
}

/// How pictures appear in a text.
pub(in crate::data) struct Placeholder {
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
    /// The input by which a vision encoder packs the features of tiles, for families that have no other place for it.
    pub packed_by: Option<&'static str>,
}

/// How videos appear in a text.
pub(in crate::data) struct VideoPlaceholder {
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
    pub fn new(token: &str, expand: impl Fn(&ImageLayout, Ordinal) -> String + Send + Sync + 'static) -> Self {
        Placeholder {
            marker: token.to_string(),
            feature: token.to_string(),
            expand: Box::new(expand),
            image_settings: Map::new(),
            special_tokens: true,
            template: None,
            video: None,
            packed_by: None,
        }
    }
}

/// What a row reads.
pub(super) struct Files<'a> {
    pub tokenizer: &'a Tokenizer,
    /// The processor's own settings, each taken once.
    pub settings: Settings,
    /// The image processor's config.
    pub image: &'a Value,
    /// The whole of `processor_config.json`.
    pub config: &'a Value,
    /// The whole of `config.json`.
    pub model: &'a Value,
}

impl Files<'_> {
    /// A token by the name that tokenizers and processors give it: the tokenizer's comes first.
    pub fn token(&mut self, name: &str, default: &str) -> Result<String> {
        let said = self.settings.text(name, default)?;
        Ok(self.tokenizer.named(name).map_or(said, str::to_string))
    }

    /// The token that takes an image feature: the model's `image_token_id`, else the tokenizer's `name`, else `default`.
    ///
    /// Errors: `Error::Invalid` when the tokenizer does not have it.
    pub fn feature(&mut self, name: &str, default: &str) -> Result<String> {
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
