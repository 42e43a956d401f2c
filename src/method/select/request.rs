//! Input and output of a strategy.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Progress, Result};
use crate::method::scores::Similarities;

/// One choice of a strategy: layers that go, layers that make up for them, and the layer that closes the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Layers to drop, by their index in the dense model.
    pub drop: Vec<usize>,
    /// Layers to finetune.
    pub finetune: Vec<usize>,
    /// The frozen layer that closes a triplet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<usize>,
    /// Value by which the group was ranked: a similarity, an angle over pi, or a loss in nats; absent without a ranking.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

/// Measures losses on calibration data for models without some layers.
pub trait MeasureLosses {
    /// Number of forward passes for one loss.
    fn passes(&self) -> u64;

    /// The losses without `removed` (ascending) and each of `candidates` in turn. `progress` advances by
    /// [`MeasureLosses::passes`] for each candidate.
    ///
    /// Errors: those of a pass; `Error::Interrupted` on Ctrl-C.
    fn losses(&mut self, removed: &[usize], candidates: &[usize], progress: &Progress) -> Result<Vec<f64>>;
}

/// Input of a strategy.
pub struct SelectionRequest<'a, 'm> {
    /// Decoder layers of the dense model.
    pub num_layers: usize,
    /// Layers to drop.
    pub count: usize,
    /// Allows the last layer to be dropped or finetuned.
    pub include_last: bool,
    /// Lets `interlace-tn`, `random` and `consecutive` choose the last layer too, as the authors' released code does.
    pub as_released: bool,
    /// Goes on where a strategy's packs run out: pairs for `interlace-oa`, then single frozen layers.
    pub beyond_structure: bool,
    /// Why these layers cannot be dropped together; `None` where they can.
    pub refusal: &'a dyn Fn(&[usize]) -> Option<String>,
    /// Mean similarities by pack size; empty for strategies that do not use them.
    pub similarities: &'a Similarities,
    /// Seed, for strategies that draw at random.
    pub seed: u64,
    /// The layers that the user listed, for `explicit`.
    pub layers: &'a [usize],
    /// Measures losses, for strategies that use them.
    pub measure: Option<&'m mut dyn MeasureLosses>,
}

impl SelectionRequest<'_, '_> {
    /// Layers that may be dropped or finetuned: `0..usable`.
    pub(super) fn usable(&self) -> usize {
        self.num_layers.saturating_sub(usize::from(!self.include_last))
    }

    /// Layers that the ablations may choose: all of them in the released code, where only triplets spare the last one.
    pub(super) fn reach(&self) -> usize {
        if self.as_released { self.num_layers } else { self.usable() }
    }

    /// True where these layers can be dropped together.
    pub(super) fn can_drop(&self, layers: &[usize]) -> bool {
        (self.refusal)(layers).is_none()
    }

    /// Number of packs of `size` layers that contain only usable layers.
    pub(super) fn starts(&self, size: usize) -> usize {
        (self.usable() + 1).saturating_sub(size)
    }

    /// Mean similarity of the pack of `size` layers from `start` on; `select` has checked the lengths.
    pub(super) fn sim(&self, size: usize, start: usize) -> f64 {
        self.similarities.get(&size).and_then(|values| values.get(start)).copied().unwrap_or(f64::NEG_INFINITY)
    }

    /// Starts of packs of `size` layers, the most similar first; the lower index first on ties.
    pub(super) fn ranked(&self, size: usize) -> Vec<usize> {
        let mut starts: Vec<usize> = (0..self.starts(size)).collect();
        starts.sort_by(|&a, &b| self.sim(size, b).total_cmp(&self.sim(size, a)));
        starts
    }
}
