//! The towers of a model: stacks of layers.

use serde::{Deserialize, Serialize};

/// A stack of layers that can lose some.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tower {
    /// The language model's decoder.
    Text,
    /// The vision encoder.
    Vision,
}

impl Tower {
    /// Name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Tower::Text => "text",
            Tower::Vision => "vision",
        }
    }
}
