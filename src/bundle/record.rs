//! `interlace.json`: the steps that changed a model. Later steps and readers derive the original
//! index of each layer from it.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::{Error, Provenance, Result};

use super::tower::Tower;

/// One thing that was done to a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum RecordedStep {
    /// Layers were removed, or MLPs of layers.
    Prune {
        /// The tower that lost layers.
        tower: Tower,
        /// Layers just before this step.
        layers_before: usize,
        /// Indices just before this step.
        dropped: Vec<usize>,
        /// Indices in the model that was never pruned.
        dropped_original: Vec<usize>,
        /// Layers, by their index just before this step, whose MLPs were removed alone.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        mlps: Vec<usize>,
        /// Treatment of features that are added between layers; absent where none are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deepstack: Option<Deepstack>,
        /// Layers, by their index just before this step, whose weights a linear map was folded into, which makes up for
        /// the dropped ones after them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        compensated: Vec<usize>,
        /// Layers, by their index just before this step, behind which nodes were added that make up for the dropped ones
        /// after them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        bridged: Vec<usize>,
        /// Outputs that show the residual stream and were renamed, or show it elsewhere now.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        taps: Vec<TapChange>,
    },
    /// Layers were trained.
    Finetune {
        /// Indices just before this step.
        layers: Vec<usize>,
        /// True when the connector, a graph of its own, was trained with them.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        connector: bool,
        /// Samples seen.
        samples: u64,
        /// Optimiser, loss and schedule, as the verb understood them.
        settings: Value,
    },
    /// The model was written in other precisions, beside the floats or in their place.
    Quantise {
        /// Names of the precisions, as `export --precision` takes them.
        precisions: Vec<String>,
    },
    /// The head was cut to the tokens that a corpus uses.
    Vocabulary {
        /// Tokens that keep their logits.
        kept: usize,
        /// Tokens of the head before.
        of: usize,
    },
    /// Keys of the image processor's config were set.
    Pictures {
        /// The keys with their values now.
        keys: serde_json::Map<String, Value>,
    },
    /// Image tokens are left out between embedding and decoder, by a graph of their own.
    ImageTokens {
        /// Part of each picture's tokens that stays; 1 removed that graph.
        keep: f64,
    },
    /// Finetuned weights of a checkpoint were written into the graphs.
    Graft {
        /// Tensors of the checkpoint that changed something.
        tensors: u64,
    },
}

/// What dropped layers changed of an output that shows the residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapChange {
    /// Its name before.
    pub output: String,
    /// Its name now; absent where it went with its layer from a list with one output for every layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_now: Option<String>,
    /// Layers before which it read the stream; the number of layers is behind the last one.
    pub before: Vec<usize>,
    /// The same now, in the new numbers of the layers.
    pub before_now: Vec<usize>,
}

/// Treatment of features that are added after the first layers (DeepStack) when layers are dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Deepstack {
    /// They are added where they were, a dropped layer being the identity.
    #[default]
    Keep,
    /// They move on to the first layers that stay, as Hugging Face's network adds them with layers deleted from its list.
    Shift,
}

/// The content of `interlace.json` in a model folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Tool version, schema version, input digests and settings of the last step.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Oldest first.
    pub history: Vec<RecordedStep>,
    /// Files beside the model that say nothing of the network and were written as they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<String>,
    /// What was not written: folders beside the model that hold nothing of it (version control, download caches), and variants
    /// that `--variant` did not name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

impl Record {
    /// Version of the schema of `interlace.json`.
    pub const SCHEMA_VERSION: u32 = 1;

    /// For each current layer of a model, its index in the unpruned model.
    ///
    /// Errors: `Error::Invalid` when the history does not lead to `count` layers.
    pub fn original_layers(history: &[RecordedStep], tower: Tower, count: usize) -> Result<Vec<usize>> {
        let steps: Vec<(usize, &Vec<usize>)> = history
            .iter()
            .filter_map(|step| match step {
                RecordedStep::Prune { tower: of, layers_before, dropped, .. } if *of == tower => {
                    Some((*layers_before, dropped))
                }
                _ => None,
            })
            .collect();
        // The counts are derived from the graph's, so that a count in the file cannot cause a large allocation.
        let mut after = count;
        for (before, dropped) in steps.iter().rev() {
            let total = after.saturating_add(dropped.len());
            let distinct: BTreeSet<&usize> = dropped.iter().filter(|layer| **layer < total).collect();
            if total != *before || distinct.len() != dropped.len() {
                let problem = format!(
                    "its history drops {} of {before} layers of the {} tower, which leaves {after}",
                    dropped.len(),
                    tower.name()
                );
                return Err(Error::invalid("`interlace.json`", problem)
                    .remedy("remove the file to treat the model as never pruned"));
            }
            after = total;
        }
        let mut layers: Vec<usize> = (0..after).collect();
        for (_, dropped) in steps {
            let dropped: BTreeSet<usize> = dropped.iter().copied().collect();
            let kept = layers.iter().enumerate().filter(|(index, _)| !dropped.contains(index));
            layers = kept.map(|(_, &original)| original).collect();
        }
        Ok(layers)
    }

    /// The record as an ONNX file's `metadata_props`, so that a component without its folder keeps it.
    pub fn metadata_props(&self, tower: Tower, count: usize) -> Result<Vec<(String, String)>> {
        let layers = Self::original_layers(&self.history, tower, count)?;
        let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
        let mut props = vec![
            ("interlace.tool".to_string(), self.provenance.tool.clone()),
            ("interlace.original_layers".to_string(), layers.join(",")),
        ];
        for (name, digest) in &self.provenance.inputs {
            props.push((format!("interlace.input.{name}.sha256"), digest.clone()));
        }
        Ok(props)
    }
}
