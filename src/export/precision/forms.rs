//! The form of each weight of a graph whose weights are of 4 bits, of 8 bits or floats.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Form of a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WeightForm {
    /// As in the float graph.
    Float32,
    /// 8 bits in blocks. Products round their activations to 8 bits.
    Int8,
    /// 4 bits in blocks.
    #[default]
    Int4,
}

impl WeightForm {
    /// All forms, the largest first.
    pub(super) const ALL: [WeightForm; 3] = [WeightForm::Float32, WeightForm::Int8, WeightForm::Int4];

    /// Name in tables and reports.
    pub fn name(self) -> &'static str {
        match self {
            WeightForm::Float32 => "float32",
            WeightForm::Int8 => "int8",
            WeightForm::Int4 => "int4",
        }
    }
}

/// The forms of one graph's weights.
#[derive(Clone, Debug, Default)]
pub(super) struct WeightForms {
    /// Form of all weights without one of their own.
    others: WeightForm,
    /// By the name of the initializer.
    own: HashMap<String, WeightForm>,
}

impl WeightForms {
    /// All weights as floats, but for some.
    pub fn floats_but(own: HashMap<String, WeightForm>) -> Self {
        WeightForms { others: WeightForm::Float32, own }
    }

    /// True when no weight has fewer bits.
    pub fn is_float(&self) -> bool {
        self.others == WeightForm::Float32 && self.own.values().all(|form| *form == WeightForm::Float32)
    }

    /// The form of a weight.
    pub fn of(&self, name: &str) -> WeightForm {
        self.own.get(name).copied().unwrap_or(self.others)
    }
}
