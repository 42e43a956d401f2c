//! Writes finetuned weights into the graphs of a model, as a new folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use crate::analysis;
use crate::base::{Cancel, Error, MappedFile, Provenance, Result, ScratchDir, folder_of};
use crate::bundle::{Bundle, BundleWriter, Component, Record, RecordedStep, Role, Tower};
use crate::checkpoint::{Checkpoint, Tuned};
use crate::graft::{self, Absent, GraftTable, Part};
use crate::ir::{Body, Model, TensorData, ValueId};
use crate::onnx;

/// Input of a graft.
pub struct Graft<'a> {
    /// The model whose graphs get the weights.
    pub bundle: &'a Bundle,
    /// The checkpoint that the graphs were exported from.
    pub base: &'a Checkpoint,
    /// The finetuned weights.
    pub tuned: &'a Tuned,
    /// Beginnings of names of tensors that these graphs do not have.
    pub leave_out: &'a [String],
}

/// A loaded component.
struct Loaded<'a> {
    component: &'a Component,
    model: Model,
    layers: HashMap<String, usize>,
}

/// Finds the place of every finetuned tensor, and writes nothing.
///
/// Errors: as `onnx::load` and [`graft::find`](crate::graft::find).
pub fn plan_graft(request: &Graft, cancel: &Cancel) -> Result<GraftTable> {
    let loaded = load(request.bundle)?;
    find(request, &loaded, cancel)
}

/// Writes the model with the finetuned weights as a new folder.
///
/// Errors: as [`plan_graft`] and [`GraftTable::check`]; `Error::Invalid` when nothing was finetuned or the target exists.
/// Nothing is left under the target's name then.
pub fn graft(request: &Graft, target: &Path, cancel: &Cancel) -> Result<GraftTable> {
    let bundle = request.bundle;
    bundle.check_output(target)?;
    let mut writer = BundleWriter::create(bundle, target)?;
    let mut loaded = load(bundle)?;
    let table = find(request, &loaded, cancel)?;
    table.check()?;
    if !table.weights.iter().any(|weight| weight.changed) {
        return Err(Error::invalid("the finetuned weights", "are those of the base")
            .remedy("give the finetuned checkpoint or the adapter with `--tuned`"));
    }
    let parent = folder_of(target);
    let scratch = ScratchDir::create_in(parent)?;
    let file = scratch.path().join("weights");
    let places = write_weights(request, &table, &loaded, &file, cancel)?;
    let file = Arc::new(MappedFile::open(&file)?);
    for (part, weights) in places {
        let Loaded { component, model, .. } = &mut loaded[part];
        replace(&mut model.graph.body, &weights, &file);
        writer.save(component, model)?;
    }
    let tensors: BTreeSet<&String> =
        table.weights.iter().filter(|weight| weight.changed).flat_map(|weight| &weight.tensors).collect();
    writer.push_step(RecordedStep::Graft { tensors: tensors.len() as u64 });
    let inputs = BTreeMap::from([
        ("model".to_string(), bundle.digest()?),
        ("base".to_string(), request.base.digest()?),
        ("tuned".to_string(), request.tuned.digest()?),
    ]);
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, inputs, &json!({}))?)?;
    Ok(table)
}

/// Offset and length in the file of each weight's new bytes.
type Ranges = HashMap<ValueId, (u64, u64)>;

/// Writes the new bytes of every changed weight one behind the other; the ranges by component.
fn write_weights(
    request: &Graft,
    table: &GraftTable,
    loaded: &[Loaded],
    path: &Path,
    cancel: &Cancel,
) -> Result<BTreeMap<usize, Ranges>> {
    let mut file = File::create(path).map_err(|e| Error::io("create", path, e))?;
    let mut offset = 0;
    let mut places: BTreeMap<usize, Ranges> = BTreeMap::new();
    graft::apply(table, &parts(loaded), request.base, request.tuned, |part, id, bytes| {
        cancel.check("nothing was written")?;
        file.write_all(&bytes).map_err(|e| Error::io("write", path, e))?;
        let length = bytes.len() as u64;
        places.entry(part).or_default().insert(id, (offset, length));
        offset += length;
        Ok(())
    })?;
    Ok(places)
}

fn replace(body: &mut Body, weights: &Ranges, file: &Arc<MappedFile>) {
    for (id, tensor) in &mut body.initializers {
        if let Some(&(offset, length)) = weights.get(id) {
            tensor.data = TensorData::Mapped { file: file.clone(), offset, length, external: true };
        }
    }
    for node in &mut body.nodes {
        node.bodies_mut().for_each(|inner| replace(inner, weights, file));
    }
}

/// Every component, all variants.
fn load(bundle: &Bundle) -> Result<Vec<Loaded<'_>>> {
    let history = bundle.record()?.map(|record| record.history).unwrap_or_default();
    let load = |component| {
        let model = onnx::load(&bundle.path_of(component))?;
        let tower = if component.role == Role::VisionEncoder { Tower::Vision } else { Tower::Text };
        let layers = layers(&model, &history, tower);
        Ok(Loaded { component, model, layers })
    };
    bundle.components().iter().map(load).collect()
}

/// The layer of each weight that one layer alone reads; none for graphs whose layers are not understood, which only
/// decides between tensors of the same content.
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

fn parts<'a>(loaded: &'a [Loaded]) -> Vec<Part<'a>> {
    let part = |loaded: &'a Loaded| Part {
        file: &loaded.component.file,
        model: &loaded.model,
        vision: loaded.component.role == Role::VisionEncoder,
        layers: loaded.layers.clone(),
    };
    loaded.iter().map(part).collect()
}

fn find(request: &Graft, loaded: &[Loaded], cancel: &Cancel) -> Result<GraftTable> {
    let record = request.bundle.record()?;
    let layers: BTreeSet<usize> = record
        .iter()
        .flat_map(|record| &record.history)
        .filter_map(|step| match step {
            RecordedStep::Prune { tower: Tower::Text, dropped_original, .. } => Some(dropped_original),
            _ => None,
        })
        .flatten()
        .copied()
        .collect();
    let absent = Absent { layers, names: request.leave_out.to_vec() };
    graft::find(&parts(loaded), request.base, request.tuned, &absent, cancel)
}
