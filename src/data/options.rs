//! Options for reading a data set: the rows to use and the extent of a sample.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::base::Error;

use super::images::ImageSettings;

/// Tokens in a sequence of running text by default.
pub const SEQUENCE_LENGTH: usize = 512;

/// Extent of a sample in a conversation of several turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Turns {
    /// One sample: each turn follows the turns before it, and all answers are learned.
    #[default]
    Conversation,
    /// A sample each, without the turns before it. A picture belongs to the turn that shows it and to all later ones.
    Separate,
}

impl FromStr for Turns {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "conversation" => Ok(Turns::Conversation),
            "separate" => Ok(Turns::Separate),
            _ => Err(Error::invalid(format!("turns `{text}`"), "are not known")
                .remedy("expected `conversation` or `separate`")),
        }
    }
}

/// Options for reading a data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// Make one sample of a conversation, or one of each turn.
    pub turns: Turns,
    /// Rows are used only if these columns have at least these values; of a list, if each of its values is at least
    /// that. A row without a value is not used.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub min_ratings: BTreeMap<String, f64>,
    /// Columns or keys that are ignored, besides those that are known to hold nothing of a conversation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore_keys: Vec<String>,
    /// The first row that cannot be read is an error.
    pub strict: bool,
    /// Tokens in each sequence of running text.
    pub sequence_length: usize,
    /// Image settings that override the model's own files.
    #[serde(skip_serializing_if = "ImageSettings::is_default")]
    pub images: ImageSettings,
}

impl Default for DataOptions {
    fn default() -> Self {
        DataOptions {
            turns: Turns::default(),
            min_ratings: BTreeMap::new(),
            ignore_keys: Vec::new(),
            strict: false,
            sequence_length: SEQUENCE_LENGTH,
            images: ImageSettings::default(),
        }
    }
}
