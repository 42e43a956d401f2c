//! The artifact of selection: the role of every decoder layer.

use std::collections::BTreeSet;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, read_artifact};
use crate::data::LeftOut;

use super::select::Group;

/// Version of `plan.json`.
pub const PLAN_SCHEMA_VERSION: u32 = 1;

/// What of a layer is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All of it.
    #[default]
    Layer,
    /// Its MLP; its attention, its cache and its number stay.
    Mlp,
}

impl Part {
    /// True for whole layers.
    pub fn is_layer(&self) -> bool {
        *self == Part::Layer
    }
}

/// `plan.json`: which decoder layers are dropped, which are finetuned, which stay frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Name of the strategy that chose.
    pub strategy: String,
    /// What of the dropped layers goes.
    #[serde(default, skip_serializing_if = "Part::is_layer")]
    pub part: Part,
    /// Decoder layers of the dense model.
    pub num_layers: usize,
    /// Dropped layers, ascending, by their index in the dense model.
    pub drop: Vec<usize>,
    /// Finetuned layers, ascending, by their index in the dense model.
    pub finetune: Vec<usize>,
    /// The same finetuned layers, ascending, by their index in the pruned model.
    pub finetune_pruned: Vec<usize>,
    /// The choices in the order in which they were made.
    pub groups: Vec<Group>,
    /// Every layer of the dense model.
    pub layers: Vec<LayerPlan>,
    /// Ids of the samples that losses were measured on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<String>,
    /// Samples that were drawn for losses and not used.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
}

/// The plan for one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerPlan {
    /// Index in the dense model.
    pub index: usize,
    /// Index in the pruned model; absent for a layer that is dropped whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pruned_index: Option<usize>,
    /// Dropped, finetuned, or frozen and why.
    pub role: LayerRole,
}

/// The role of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LayerRole {
    /// Taken out of the graph, or its MLP alone; see `Plan::part`.
    Drop,
    /// Kept, and the only ones whose weights move.
    Finetune,
    /// Kept frozen as the fixed point that closes a triplet.
    Anchor,
    /// Kept frozen.
    Freeze,
}

impl LayerRole {
    /// One character for strips of layers.
    pub fn letter(self) -> char {
        match self {
            LayerRole::Drop => 'D',
            LayerRole::Finetune => 'F',
            LayerRole::Anchor => 'A',
            LayerRole::Freeze => '.',
        }
    }
}

impl Plan {
    /// Derives the role of every layer from the groups that a strategy selected.
    ///
    /// Errors: `Error::Invalid` when a layer is outside the model or has two roles, or when none or all are dropped.
    pub fn new(
        provenance: Provenance,
        strategy: &str,
        part: Part,
        num_layers: usize,
        groups: Vec<Group>,
    ) -> Result<Self> {
        let mut roles = vec![LayerRole::Freeze; num_layers];
        for group in &groups {
            let members = group.drop.iter().map(|&layer| (layer, LayerRole::Drop));
            let members = members.chain(group.finetune.iter().map(|&layer| (layer, LayerRole::Finetune)));
            for (layer, role) in members.chain(group.anchor.map(|layer| (layer, LayerRole::Anchor))) {
                match roles.get_mut(layer) {
                    Some(slot) if *slot == LayerRole::Freeze => *slot = role,
                    Some(_) => {
                        return Err(Error::invalid(format!("layer {layer}"), "is in two groups of the plan")
                            .remedy("make the plan again"));
                    }
                    None => {
                        return Err(Error::invalid(
                            format!("layer {layer}"),
                            format!("the model has {num_layers} layers"),
                        )
                        .remedy("make the plan again for this model"));
                    }
                }
            }
        }
        let indices = |wanted: LayerRole| -> Vec<usize> {
            roles.iter().enumerate().filter(|(_, role)| **role == wanted).map(|(index, _)| index).collect()
        };
        let drop = indices(LayerRole::Drop);
        if drop.is_empty() || drop.len() >= num_layers {
            return Err(Error::invalid("plan", format!("drops {} of {num_layers} layers", drop.len()))
                .remedy("at least one layer must go and at least one must stay"));
        }
        let mut kept = 0;
        let layers: Vec<LayerPlan> = roles
            .iter()
            .enumerate()
            .map(|(index, &role)| {
                let stays = role != LayerRole::Drop || part == Part::Mlp;
                let pruned_index = stays.then_some(kept);
                kept += usize::from(stays);
                LayerPlan { index, pruned_index, role }
            })
            .collect();
        let finetune_pruned = layers
            .iter()
            .filter(|layer| layer.role == LayerRole::Finetune)
            .filter_map(|layer| layer.pruned_index)
            .collect();
        Ok(Plan {
            provenance,
            strategy: strategy.to_string(),
            part,
            num_layers,
            finetune: indices(LayerRole::Finetune),
            drop,
            finetune_pruned,
            groups,
            layers,
            samples: Vec::new(),
            left_out: LeftOut::default(),
        })
    }

    /// Reads `plan.json` and checks that its parts agree.
    ///
    /// Errors: those of `base::read_artifact`; `Error::Invalid` when groups and layers disagree.
    pub fn read(path: &Path) -> Result<Self> {
        let plan: Plan = read_artifact(path, PLAN_SCHEMA_VERSION, "a plan")?;
        if plan.layers.len() != plan.num_layers {
            return Err(Error::invalid(
                format!("`{}`", path.display()),
                format!("lists {} layers, num_layers is {}", plan.layers.len(), plan.num_layers),
            )
            .remedy("make the plan again; to choose layers by hand use `plan --drop`"));
        }
        let again =
            Plan::new(plan.provenance.clone(), &plan.strategy, plan.part, plan.num_layers, plan.groups.clone())?;
        let (samples, left_out) = (plan.samples.clone(), plan.left_out.clone());
        let again = Plan { samples, left_out, ..again };
        if again != plan {
            let subject = format!("`{}`", path.display());
            return Err(Error::invalid(subject, "its lists of layers and its groups disagree")
                .remedy("make the plan again; to choose layers by hand use `plan --drop`"));
        }
        Ok(plan)
    }

    /// One letter per layer: `D` dropped, `F` finetuned, `A` anchor, `.` frozen.
    pub fn strip(&self) -> String {
        self.layers.iter().map(|layer| layer.role.letter()).collect()
    }
}

/// Checks layers that a user named for dropping against the model.
///
/// Returns them ascending. Errors: as [`named_layers`], and `Error::Invalid` for all of them.
pub fn check_layers(layers: &[usize], num_layers: usize) -> Result<Vec<usize>> {
    let named = named_layers(layers, num_layers)?;
    if named.len() == num_layers {
        return Err(Error::invalid("list of layers", format!("names all {num_layers} layers, at least one must stay"))
            .remedy("name fewer layers"));
    }
    Ok(named)
}

/// Checks layers that a user named against the model.
///
/// Returns them ascending. Errors: `Error::Invalid` for none, a duplicate, or one outside the model.
pub fn named_layers(layers: &[usize], num_layers: usize) -> Result<Vec<usize>> {
    let mut set = BTreeSet::new();
    for &layer in layers {
        if layer >= num_layers {
            return Err(Error::invalid(
                format!("layer {layer}"),
                format!("the model has {num_layers} layers, 0 to {}", num_layers.saturating_sub(1)),
            )
            .remedy("name layers that exist; `interlace inspect` lists them"));
        }
        if !set.insert(layer) {
            return Err(Error::invalid(format!("layer {layer}"), "is named twice").remedy("name each layer once"));
        }
    }
    if set.is_empty() {
        return Err(Error::invalid("list of layers", "is empty").remedy("name at least one layer"));
    }
    Ok(set.into_iter().collect())
}
