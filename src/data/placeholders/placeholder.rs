//! Image placeholders in a prompt, and the configuration files that define them.

use std::fmt;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::image_token_entry;

use super::super::images::{ImageLayout, ProcessorSettings, VideoLayout};
use super::super::tokenizer::Tokenizer;

/// Builds the text of one image.
type Expand = Box<dyn Fn(&ImageLayout, Ordinal) -> String + Send + Sync>;

/// Index of an image in a conversation and the number of its images.
#[derive(Clone, Copy, Debug)]
pub(in crate::data) struct Ordinal {
    pub index: usize,
    pub count: usize,
}

/// Placeholder of images in a prompt.
pub(in crate::data) struct Placeholder {
    /// Text of an image in the rendered chat template; it is replaced by the result of `expand`.
    pub marker: String,
    /// Token that is replaced by one row of image features per occurrence.
    pub feature: String,
    pub expand: Expand,
    /// Settings that the processor passes to its image processor; they override that processor's config.
    pub image_settings: Map<String, Value>,
    /// True when the tokenizer adds its own special tokens to the text.
    pub special_tokens: bool,
    /// Chat template of a family whose models have none.
    pub template: Option<&'static str>,
    /// Placeholder of videos; `None` for families without video.
    pub video: Option<VideoPlaceholder>,
    /// Input of the vision encoder with the image sizes, when it is needed to pack the features of tiles.
    pub packed_by: Option<&'static str>,
}

/// Placeholder of videos in a prompt.
pub(in crate::data) struct VideoPlaceholder {
    /// Text of a video in the rendered chat template.
    pub marker: String,
    /// Token that is replaced by one row of video features per occurrence.
    pub feature: String,
    pub expand: Box<dyn Fn(&VideoLayout) -> String + Send + Sync>,
}

impl fmt::Debug for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placeholder").field("marker", &self.marker).field("feature", &self.feature).finish()
    }
}

impl Placeholder {
    /// A placeholder whose marker and feature token are both `token`; `expand` builds the replacement text.
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

/// Configuration files that a placeholder is built from.
pub(super) struct Files<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Settings of the processor; each may be read once.
    pub settings: ProcessorSettings,
    /// Configuration of the image processor.
    pub image: &'a Value,
    /// Content of `processor_config.json`.
    pub config: &'a Value,
    /// Content of `config.json`.
    pub model: &'a Value,
}

impl Files<'_> {
    /// Looks up a special token by its name in the tokenizer's config, then in the processor's config, and else returns
    /// `default`.
    ///
    /// Errors: `Error::Invalid` when the setting is not text.
    pub fn token(&mut self, name: &str, default: &str) -> Result<String> {
        let configured = self.settings.text(name, default)?;
        Ok(self.tokenizer.named(name).map_or(configured, str::to_string))
    }

    /// Looks up the token of image features: the model's `image_token_id`, else the special token `name`, else
    /// `default`.
    ///
    /// Errors: `Error::Invalid` when the tokenizer does not have the token.
    pub fn feature(&mut self, name: &str, default: &str) -> Result<String> {
        let configured = self.token(name, default)?;
        if let Some((key, id)) = image_token_entry(self.model) {
            let token = id.as_u64().and_then(|id| u32::try_from(id).ok()).and_then(|id| self.tokenizer.token(id));
            return token.ok_or_else(|| {
                Error::invalid("`config.json`", format!("`{key}` is {id}, which the tokenizer does not have"))
                    .remedy("restore `config.json` and `tokenizer.json` of the same model")
            });
        }
        if self.tokenizer.id(&configured).is_none() {
            return Err(Error::invalid("`tokenizer.json`", format!("has no image token `{configured}`"))
                .remedy("restore `tokenizer.json` and `processor_config.json` of the same model"));
        }
        Ok(configured)
    }
}
