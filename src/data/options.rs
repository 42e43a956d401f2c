//! Options for reading a data set: the rows to use and the extent of a sample.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::base::Error;

use super::images::ImageSettings;

/// Default number of tokens in a sequence of running text.
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

/// The part of a data set that is read. A hash determines the part of a row, independent of later draws and their seeds, and in
/// every file the same: of its pictures where it has some (of several the least hash of one), else of its text. So no picture is
/// trained on under one question and held back under another; ids do not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataPart {
    /// All rows.
    #[default]
    All,
    /// All rows except the held-back fraction.
    Train(f64),
    /// The held-back fraction of the rows.
    HeldBack(f64),
}

impl DataPart {
    /// True when all rows are read.
    pub fn is_all(&self) -> bool {
        *self == DataPart::All
    }

    /// True when a row is in this part. `hash` is a hash of the row's pictures or text.
    pub(super) fn has(self, hash: u64) -> bool {
        // The upper 53 bits as a fraction from 0 to 1. An f64 represents 53 bits exactly.
        let place = (hash >> 11) as f64 / (1u64 << 53) as f64;
        match self {
            DataPart::All => true,
            DataPart::Train(fraction) => place >= fraction,
            DataPart::HeldBack(fraction) => place < fraction,
        }
    }
}

/// Options for reading a data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// Whether a sample is a whole conversation or a single turn.
    pub turns: Turns,
    /// Minimum value by rating column. A row is used only if it reaches every minimum; for a list, each of its values
    /// must reach it. A row without a value is not used.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub min_ratings: BTreeMap<String, f64>,
    /// Columns or keys to ignore, in addition to those that are known to hold no part of a conversation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore_keys: Vec<String>,
    /// True: the first row that cannot be read is an error.
    pub strict: bool,
    /// The part of the rows that is read.
    #[serde(skip_serializing_if = "DataPart::is_all")]
    pub part: DataPart,
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
            part: DataPart::All,
            sequence_length: SEQUENCE_LENGTH,
            images: ImageSettings::default(),
        }
    }
}
