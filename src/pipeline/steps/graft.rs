//! Writes finetuned weights into the graphs of a model, as a new folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use crate::base::{Cancel, Error, MappedFile, Provenance, Result, ScratchDir, folder_of};
use crate::bundle::{Bundle, BundleWriter, Record, RecordedStep, Tower};
use crate::checkpoint::{Checkpoint, Tuned};
use crate::graft::{self, Absent, GraftTable, Loaded, ModelPart, history_of, load};
use crate::hub::commit_of;
use crate::ir::{Body, TensorData, ValueId};

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

/// Finds the place of every finetuned tensor, and writes nothing.
///
/// Errors: as `onnx::load` and [`graft::find`](crate::graft::find).
pub fn plan_graft(request: &Graft, cancel: &Cancel) -> Result<GraftTable> {
    let loaded = load_all(request)?;
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
    let mut loaded = load_all(request)?;
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
    let head =
        Provenance::new(Record::SCHEMA_VERSION, inputs, &json!({}))?.with_hub("base", commit_of(request.base.path()));
    writer.commit(head)?;
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
fn load_all<'a>(request: &Graft<'a>) -> Result<Vec<Loaded<'a>>> {
    let history = history(request)?;
    load(request.bundle.components(), request.bundle, &history)
}

/// The steps that changed the numbers of layers since the checkpoint.
fn history(request: &Graft) -> Result<Vec<RecordedStep>> {
    let history = request.bundle.record()?.map(|record| record.history).unwrap_or_default();
    Ok(history_of(&history, request.base))
}

fn parts<'a>(loaded: &'a [Loaded]) -> Vec<ModelPart<'a>> {
    loaded.iter().map(Loaded::part).collect()
}

fn find(request: &Graft, loaded: &[Loaded], cancel: &Cancel) -> Result<GraftTable> {
    let dropped = history(request)?.into_iter().filter_map(|step| match step {
        RecordedStep::Prune { tower: Tower::Text, dropped_original, .. } => Some(dropped_original),
        _ => None,
    });
    let absent = Absent { layers: dropped.flatten().collect(), names: request.leave_out.to_vec() };
    graft::find(&parts(loaded), request.base, request.tuned, &absent, cancel)
}
