//! Removes layers from every variant of a component and from the configs, as a new folder.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use serde::Serialize;

use crate::analysis::{self, Analysis};
use crate::base::{Error, Provenance, Result, Sha256Digest};
use crate::bundle::{Bundle, BundleWriter, Component, Deepstack, LayerEdit, Record, Role, SetAside, TapChange, Tower};
use crate::method::{GapChange, Part, Plan, named_layers};
use crate::onnx;
use crate::rewrite::{
    Behind, MovedTap, NamedWeights, change_behind, check_behind, drop_layers, drop_mlps, fold_map, has_additions,
    shift_additions, tap_changes, with_weights,
};

use super::compensate::{Compensated, CompensationReport};

use super::needs::of_another_model;

/// Output of `prune --json`.
#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pruned {
    /// The tower that lost layers.
    pub tower: Tower,
    /// Dropped layers by their index before.
    pub dropped: Vec<usize>,
    /// Layers whose MLPs were dropped alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mlps: Vec<usize>,
    /// Layers of the tower before pruning.
    pub layers_before: usize,
    /// Layers of the tower after pruning.
    pub layers_after: usize,
    /// Treatment of features that are added between layers; absent where none are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deepstack: Option<Deepstack>,
    /// What makes up for the dropped layers before the gaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compensation: Option<CompensationReport>,
    /// Outputs that show the residual stream and were renamed, or show it elsewhere now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taps: Vec<TapChange>,
    /// Components that were written anew.
    pub components: Vec<PrunedComponent>,
    /// Files beside the model that say nothing of the network, and graphs that no verb runs: written as they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<String>,
    /// What was not written: folders beside the model that hold nothing of it, and variants that `--variant` did not name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Variants that cannot be read or understood; the new folder does not have them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<SetAside>,
}

/// One rewritten component.
#[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrunedComponent {
    /// Path below the new folder.
    pub file: String,
    /// Nodes of the top-level graph before pruning.
    pub nodes_before: usize,
    /// Nodes of the top-level graph after pruning.
    pub nodes_after: usize,
    /// Bytes of the weights before pruning.
    pub weight_bytes_before: u64,
    /// Bytes of the weights after pruning.
    pub weight_bytes_after: u64,
}

/// The layers to drop, and their origin.
pub enum Drop<'a> {
    /// Layers that the user listed.
    Layers {
        /// Their tower.
        tower: Tower,
        /// Their indices, in any order.
        layers: &'a [usize],
    },
    /// The MLPs of decoder layers that the user listed.
    Mlps(&'a [usize]),
    /// A plan with the digest of its file.
    Plan {
        /// The plan; its layers are the decoder's.
        plan: &'a Plan,
        /// Digest of the plan's file.
        digest: Sha256Digest,
        /// The plan's file, for messages.
        file: &'a Path,
    },
}

impl Drop<'_> {
    /// The layers that lose something, and their tower.
    pub fn layers(&self) -> (Tower, &[usize]) {
        match self {
            Drop::Layers { tower, layers } => (*tower, *layers),
            Drop::Mlps(layers) => (Tower::Text, *layers),
            Drop::Plan { plan, .. } => (Tower::Text, plan.drop.as_slice()),
        }
    }

    /// What they lose.
    pub fn part(&self) -> Part {
        match self {
            Drop::Layers { .. } => Part::Layer,
            Drop::Mlps(_) => Part::Mlp,
            Drop::Plan { plan, .. } => plan.part,
        }
    }
}

#[derive(Clone, Copy, Serialize)]
struct PruneSettings<'a> {
    tower: Tower,
    drop: &'a [usize],
    #[serde(skip_serializing_if = "<[usize]>::is_empty")]
    mlps: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    deepstack: Option<Deepstack>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compensation: Option<&'a CompensationReport>,
}

/// Writes the model without these layers as a new folder in the same layout. `deepstack` is the treatment of features
/// that are added between layers; `compensated` is what changes behind the layers before the gaps. A variant of a component is
/// set aside when it cannot be read, or when it would lose layers that cannot be found in it, or when it cannot take such a
/// change, unless it is the most precise variant.
///
/// Errors: `Error::Invalid` when a layer does not exist, no layer would remain, the plan is of another model,
/// components have different numbers of layers, or the target exists; `Error::Unsupported` when the layers cannot be
/// found, or when maps meet `Deepstack::Shift`. On an error the target does not exist.
pub fn prune(
    bundle: &Bundle,
    drop: &Drop,
    deepstack: Deepstack,
    compensated: Option<&Compensated>,
    target: &Path,
) -> Result<Pruned> {
    bundle.check_output(target)?;
    let (tower, layers) = drop.layers();
    let (loaded, mut set_aside) = load(bundle, tower)?;
    let total = loaded.first().map_or(0, |(_, analysis)| analysis.map.layers.len());
    let (whole, mlps) = match drop.part() {
        Part::Layer => (layers, Vec::new()),
        Part::Mlp => (&[][..], checked_mlps(layers, total, compensated.is_some())?),
    };
    let edit = match LayerEdit::new(tower, total, whole) {
        Ok(edit) if edit.dropped().is_empty() && mlps.is_empty() => {
            return Err(Error::invalid("list of layers", "is empty").remedy("name at least one, as in `--drop 2,5`"));
        }
        Ok(edit) => edit,
        // A plan of another model is the more likely reason.
        Err(error) => return Err(inputs(bundle, bundle.digest()?, drop).err().unwrap_or(error)),
    };
    let loaded = with_features(loaded, deepstack, &edit)?;
    let deepstack = loaded.iter().any(|(_, analysis)| has_additions(&analysis.map)).then_some(deepstack);
    if compensated.is_some() && deepstack == Some(Deepstack::Shift) {
        return Err(Error::unsupported("maps before the gaps", "are fitted with features that keep their place")
            .remedy("leave `--deepstack shift` or the compensation out"));
    }
    let mut parts = Vec::with_capacity(loaded.len());
    for (component, analysis) in loaded {
        let changed = folded(&analysis, compensated).and_then(|changed| match mlps.is_empty() {
            true => Ok(changed),
            // A variant without such MLPs is set aside.
            false => drop_mlps(&analysis, &mlps).map(|_| changed),
        });
        match changed {
            Ok((weights, behind)) => parts.push(ToWrite { component, analysis, weights, behind }),
            Err(error) if bundle.is_most_precise(component) => return Err(error),
            Err(error) => set_aside.push(SetAside { file: component.file.clone(), problem: error.to_string() }),
        }
    }
    let mut taps: Vec<TapChange> = Vec::new();
    for tap in parts.iter().flat_map(|part| tap_changes(&part.analysis, edit.dropped())) {
        let MovedTap { output, output_now, before, before_now } = tap;
        let change = TapChange { output, output_now, before, before_now };
        // Variants of a component have the same outputs.
        if !taps.contains(&change) {
            taps.push(change);
        }
    }
    let mut writer = BundleWriter::create(bundle, target)?;
    let report = compensated.map(|compensated| &compensated.report);
    writer.drop_layers(&edit, deepstack, taps.clone())?;
    writer.drop_mlps(&mlps);
    let (folded, bridged): (Vec<_>, Vec<_>) =
        changes(compensated).partition(|(_, change)| matches!(change, GapChange::Fold(_)));
    let layers = |of: Vec<(usize, &GapChange)>| of.into_iter().map(|(layer, _)| layer).collect::<Vec<usize>>();
    writer.compensate(&layers(folded), &layers(bridged));
    set_aside.iter().for_each(|variant| writer.set_aside(&variant.file));
    // The digest reads every byte of the input, and so does writing, so they run in parallel.
    let components = thread::scope(|scope| {
        let digest = scope.spawn(|| bundle.digest());
        let settings = PruneSettings { tower, drop: edit.dropped(), mlps: &mlps, deepstack, compensation: report };
        write(writer, &edit, &settings, &parts, || match digest.join() {
            Ok(digest) => {
                let mut inputs = inputs(bundle, digest?, drop)?;
                inputs.extend(compensated.map(|own| ("data".to_string(), own.data.clone())));
                Ok(inputs)
            }
            Err(panic) => resume_unwind(panic),
        })
    })?;
    Ok(Pruned {
        tower,
        dropped: edit.dropped().to_vec(),
        mlps: mlps.clone(),
        layers_before: total,
        layers_after: edit.remaining(),
        deepstack,
        compensation: report.cloned(),
        taps,
        components,
        carried: bundle.carried().map(str::to_string).collect(),
        left_out: bundle.left_out().to_vec(),
        set_aside,
    })
}

/// The analyses with the features that are added between layers where `deepstack` wants them.
///
/// Errors: as `shift_additions`.
fn with_features<'a>(loaded: Vec<Analysed<'a>>, deepstack: Deepstack, edit: &LayerEdit) -> Result<Vec<Analysed<'a>>> {
    match deepstack {
        Deepstack::Keep => Ok(loaded),
        Deepstack::Shift => loaded
            .into_iter()
            .map(|(component, analysis)| match has_additions(&analysis.map) {
                true => Ok((component, shift_additions(&analysis, edit.dropped())?)),
                false => Ok((component, analysis)),
            })
            .collect(),
    }
}

/// The layers whose MLPs go, ascending.
///
/// Errors: `Error::Invalid` for none, a duplicate, or one that does not exist; `Error::Unsupported` with a compensation.
fn checked_mlps(layers: &[usize], total: usize, compensated: bool) -> Result<Vec<usize>> {
    if compensated {
        return Err(Error::unsupported(
            "dropping MLPs alone",
            "leaves no gap between layers that a compensation could close",
        )
        .remedy("leave the compensation out, and finetune the pruned model"));
    }
    named_layers(layers, total)
}

/// Digests of the inputs of the result.
///
/// Errors: `Error::Invalid` when a plan is of another model.
fn inputs(bundle: &Bundle, model: Sha256Digest, drop: &Drop) -> Result<BTreeMap<String, Sha256Digest>> {
    let mut inputs = BTreeMap::new();
    if let Drop::Plan { plan, digest, file } = drop {
        if plan.provenance.inputs.get("model") != Some(&model) {
            let subject = format!("plan `{}`", file.display());
            let remedy = "make a plan for this model, or name layers with `--drop`";
            return Err(of_another_model(subject, &plan.provenance, bundle, remedy));
        }
        inputs.insert("plan".to_string(), digest.clone());
    }
    inputs.insert("model".to_string(), model);
    Ok(inputs)
}

/// A component with the analysis of its graph.
type Analysed<'a> = (&'a Component, Analysis);

/// The components with the tower's layers, and the variants that are set aside.
///
/// Errors: as [`prune`], for a most precise variant that cannot be read, or for different numbers of layers.
fn load(bundle: &Bundle, tower: Tower) -> Result<(Vec<Analysed<'_>>, Vec<SetAside>)> {
    let mut loaded = Vec::new();
    let mut set_aside = Vec::new();
    for component in components(bundle, tower)? {
        match analysis_of(bundle, component, tower) {
            Ok(analysis) => loaded.push((component, analysis)),
            Err(error) if bundle.is_most_precise(component) => return Err(error),
            Err(error) => set_aside.push(SetAside { file: component.file.clone(), problem: error.to_string() }),
        }
    }
    // Components that are only copied must be sound too.
    for component in bundle.components() {
        let is_loaded = loaded.iter().any(|(other, _)| other.file == component.file);
        if is_loaded || set_aside.iter().any(|variant| variant.file == component.file) {
            continue;
        }
        match onnx::load(&bundle.path_of(component)) {
            Err(error) if bundle.is_most_precise(component) => return Err(error),
            Err(error) => set_aside.push(SetAside { file: component.file.clone(), problem: error.to_string() }),
            Ok(_) => {}
        }
    }
    let total = loaded.first().map_or(0, |(_, analysis): &(_, Analysis)| analysis.map.layers.len());
    if let Some((other, analysis)) = loaded.iter().find(|(_, analysis)| analysis.map.layers.len() != total) {
        return Err(Error::invalid(
            format!("component `{}`", other.file),
            format!("has {} layers, `{}` has {total}", analysis.map.layers.len(), loaded[0].0.file),
        )
        .remedy("all variants of a component must be of the same model: move the other one out of the folder"));
    }
    Ok((loaded, set_aside))
}

/// A component to write, with what makes up for its dropped layers.
struct ToWrite<'b> {
    component: &'b Component,
    analysis: Analysis,
    /// NamedWeights that maps were folded into.
    weights: NamedWeights,
    /// Changes of the stream, by layer before pruning.
    behind: Vec<(usize, Behind<'b>)>,
}

fn changes(compensated: Option<&Compensated>) -> impl Iterator<Item = (usize, &GapChange)> {
    let changes = compensated.into_iter().flat_map(|compensated| &compensated.compensation.changes);
    changes.map(|(&layer, change)| (layer, change))
}

/// Errors: as `fold_map` and `check_behind`.
fn folded<'c>(
    analysis: &Analysis,
    compensated: Option<&'c Compensated>,
) -> Result<(NamedWeights, Vec<(usize, Behind<'c>)>)> {
    let (mut weights, mut behind) = (NamedWeights::new(), Vec::new());
    for (layer, change) in changes(compensated) {
        match change {
            GapChange::Fold(map) => weights.extend(fold_map(analysis, layer, map)?),
            GapChange::Scale(factor) => behind.push((layer, Behind::Scale(*factor))),
            GapChange::Bridge { down, up } => behind.push((layer, Behind::Bridge { down, up })),
        }
    }
    if !behind.is_empty() {
        check_behind(analysis, &behind.iter().map(|(layer, _)| *layer).collect::<Vec<_>>())?;
    }
    Ok((weights, behind))
}

/// Writes the folder and gives it its final name. `inputs` is called as late as possible.
fn write(
    mut writer: BundleWriter,
    edit: &LayerEdit,
    settings: &PruneSettings,
    parts: &[ToWrite],
    inputs: impl FnOnce() -> Result<BTreeMap<String, Sha256Digest>>,
) -> Result<Vec<PrunedComponent>> {
    let mut inputs = Some(inputs);
    let mut record = writer.record(Provenance::new(Record::SCHEMA_VERSION, BTreeMap::new(), settings)?)?;
    let mut written = Vec::with_capacity(parts.len());
    for ToWrite { component, analysis, weights, behind } in parts {
        let pruned = match settings.mlps {
            [] => drop_layers(analysis, edit.dropped())?,
            mlps => drop_mlps(analysis, mlps)?,
        };
        let model = with_weights(&pruned, weights)?;
        let now = |layer: usize| layer - edit.dropped().iter().filter(|dropped| **dropped < layer).count();
        let behind: Vec<(usize, Behind)> = behind.iter().map(|(layer, change)| (now(*layer), *change)).collect();
        let model = change_behind(&model, &behind)?;
        written.push(PrunedComponent {
            file: component.file.clone(),
            nodes_before: analysis.model.graph.body.nodes.len(),
            nodes_after: model.graph.body.nodes.len(),
            weight_bytes_before: analysis.model.graph.body.weight_bytes(),
            weight_bytes_after: model.graph.body.weight_bytes(),
        });
        writer.save_with(component, &model, || {
            if let Some(inputs) = inputs.take() {
                record.provenance = Provenance::new(Record::SCHEMA_VERSION, inputs()?, settings)?;
            }
            record.metadata_props(edit.tower, edit.remaining())
        })?;
    }
    writer.commit(record.provenance)?;
    Ok(written)
}

/// The layers of a tower in a component. One graph can hold the language model and the vision tower.
///
/// Errors: as [`analysis::analyse`]; `Error::Invalid` when a decoder's graph contains no vision tower.
fn analysis_of(bundle: &Bundle, component: &Component, tower: Tower) -> Result<Analysis> {
    let analysis = analysis::analyse(&onnx::load(&bundle.path_of(component))?)?;
    if tower == Tower::Text || component.role == Role::VisionEncoder {
        return Ok(analysis);
    }
    let source = analysis.model.graph.name(analysis.map.source).to_string();
    analysis.into_vision().ok_or_else(|| {
        let problem =
            format!("has one tower, which begins at `{source}`, and the model has no separate vision encoder");
        Error::invalid(format!("`{}`", bundle.path_of(component).display()), problem)
            .remedy("leave `--component` out to drop layers of the decoder")
    })
}

/// All variants of every component with the tower's layers. For the vision tower of a model without a vision encoder,
/// these are the decoders.
fn components(bundle: &Bundle, tower: Tower) -> Result<Vec<&Component>> {
    let all = bundle.components();
    let of_role = |holds: &dyn Fn(Role) -> bool| all.iter().filter(|part| holds(part.role)).collect::<Vec<_>>();
    let mut found = match tower {
        Tower::Text => of_role(&Role::is_decoder),
        Tower::Vision => of_role(&|role| role == Role::VisionEncoder),
    };
    if found.is_empty() && tower == Tower::Vision {
        found = of_role(&Role::is_decoder);
    }
    if found.is_empty() {
        bundle.require(if tower == Tower::Text { Role::Decoder } else { Role::VisionEncoder })?;
    }
    Ok(found)
}
