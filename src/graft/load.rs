//! Loads the graphs of a model folder, with the layer of each weight.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::analysis;
use crate::base::Result;
use crate::bundle::{Bundle, Component, Record, RecordedStep, Role, Tower};
use crate::checkpoint::Checkpoint;
use crate::ir::Model;
use crate::onnx;

use super::part::ModelPart;
use super::place::{is_vision, stack_of};

/// A loaded component.
pub struct Loaded<'a> {
    /// Its place in the folder.
    pub component: &'a Component,
    /// Its graph.
    pub model: Model,
    /// As [`ModelPart::layers`].
    layers: HashMap<String, usize>,
}

impl Loaded<'_> {
    /// What matching needs to know of it.
    pub fn part(&self) -> ModelPart<'_> {
        ModelPart {
            file: &self.component.file,
            model: &self.model,
            vision: self.component.role == Role::VisionEncoder,
            layers: self.layers.clone(),
        }
    }
}

/// Loads the chosen components. Layers are counted as in the model that was never pruned.
///
/// Errors: as `onnx::load` and `Bundle::record`.
pub fn load<'a>(
    components: impl IntoIterator<Item = &'a Component>,
    bundle: &Bundle,
    history: &[RecordedStep],
) -> Result<Vec<Loaded<'a>>> {
    let load = |component: &'a Component| {
        let model = onnx::load(&bundle.path_of(component))?;
        let tower = if component.role == Role::VisionEncoder { Tower::Vision } else { Tower::Text };
        let layers = layers(&model, history, tower);
        Ok(Loaded { component, model, layers })
    };
    components.into_iter().map(load).collect()
}

/// The layer of each weight that one layer alone reads; none for graphs whose layers are not understood.
fn layers(model: &Model, history: &[RecordedStep], tower: Tower) -> HashMap<String, usize> {
    let Ok(analysis) = analysis::analyse(model) else { return HashMap::new() };
    let Ok(original) = Record::original_layers(history, tower, analysis.map.layers.len()) else {
        return HashMap::new();
    };
    let owners = analysis.map.weight_owners.iter();
    owners
        .filter_map(|(id, owner)| Some((analysis.model.graph.name(*id).to_string(), *original.get(owner.only()?)?)))
        .collect()
}

/// The steps of a model's history by which a checkpoint's layers are counted: none of a tower's steps when the checkpoint
/// has as many layers as the tower has now, because it was pruned and renumbered too.
pub fn history_of(history: &[RecordedStep], checkpoint: &Checkpoint) -> Vec<RecordedStep> {
    let mut stacks: BTreeMap<(bool, &str), BTreeSet<usize>> = BTreeMap::new();
    for name in checkpoint.tensors().keys() {
        if let Some((prefix, layer, _)) = stack_of(name) {
            stacks.entry((is_vision(name), prefix)).or_default().insert(layer);
        }
    }
    let has = |tower: Tower, count: usize| {
        stacks.iter().any(|((vision, _), layers)| {
            *vision == (tower == Tower::Vision) && layers.len() == count && layers.last() == Some(&(count - 1))
        })
    };
    let is_renumbered = |tower: Tower| {
        let steps = history.iter().filter_map(|step| match step {
            RecordedStep::Prune { tower: of, layers_before, dropped, .. } if *of == tower => {
                Some((*layers_before, dropped.len()))
            }
            _ => None,
        });
        let steps: Vec<(usize, usize)> = steps.collect();
        let (Some((total, _)), Some((before, dropped))) = (steps.first(), steps.last()) else { return false };
        let now = before.saturating_sub(*dropped);
        now > 0 && !has(tower, *total) && has(tower, now)
    };
    let renumbered: Vec<Tower> =
        [Tower::Text, Tower::Vision].into_iter().filter(|tower| is_renumbered(*tower)).collect();
    let counts =
        |step: &&RecordedStep| !matches!(step, RecordedStep::Prune { tower, .. } if renumbered.contains(tower));
    history.iter().filter(counts).cloned().collect()
}
