//! A Hugging Face checkpoint: the graphs' weights under the names of the checkpoint that they were exported from.
//!
//! ```text
//! FOLDER/
//!   config.json                  the base's, without the dropped layers
//!   model.safetensors            or shards with `model.safetensors.index.json`
//!   tokenizer.json, ...          the base's tokenizer, processor, template, licence and code
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::base::{Cancel, Error, Result, list_preview, sha256_large_file};
use crate::bundle::{
    AssetKind, Bundle, Component, Deepstack, LayerEdit, ModelSource, RecordedStep, Tower, config_without_layers,
};
use crate::checkpoint::{Checkpoint, NamedTensor, save};
use crate::graft::{Extraction, ModelPart, extract, load, stack_of};
use crate::ir::DataType;
use crate::quantised::{block_matrices, channel_matrices};

use super::components::{check_object, chosen, larger_than_shard, write as write_text};
use super::record::{CheckpointWeights, ExportSettings, Written};

const CONFIG: &str = "config.json";
/// Largest weight file, as transformers writes them.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes a checkpoint into the folder `root`.
///
/// Errors: `Error::Invalid` without `base`, without `dense` for a model that was trained, and as `graft::extract`;
/// `Error::Unsupported` when transformers' network cannot compute what the graphs do; `Error::Io`.
pub(super) fn write(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let path = settings.base.as_deref().ok_or_else(|| {
        Error::invalid("`--base`", "is missing")
            .remedy("give the checkpoint that the ONNX files were exported from: the weights get its names")
    })?;
    let base = Checkpoint::open(path)?;
    if !path.join(CONFIG).is_file() {
        return Err(Error::invalid(format!("`{}`", path.display()), format!("has no `{CONFIG}`"))
            .remedy("give the checkpoint's whole folder"));
    }
    let dense = settings.dense.as_ref().map(ModelSource::open).transpose()?;
    let history = bundle.record()?.map(|record| record.history);
    let edits = edits(history.as_deref().unwrap_or_default())?;
    let config = config_without_layers(&path.join(CONFIG), &edits)?;
    check_deepstack(history.as_deref().unwrap_or_default(), &config)?;
    check_packed(&edits, &config)?;
    check_blocks(history.as_deref().unwrap_or_default())?;
    check_head(history.as_deref().unwrap_or_default())?;

    let components: Vec<&Component> = chosen(bundle, settings.variant.as_deref())?
        .into_iter()
        .filter(|component| !component.role.is_carried())
        .collect();
    let current = load(components.iter().copied(), bundle, history.as_deref().unwrap_or_default())?;
    let reference = match &dense {
        Some(dense) => {
            let history = dense.record()?.map(|record| record.history).unwrap_or_default();
            Some(load(counterparts(&components, dense)?, dense, &history)?)
        }
        None => None,
    };
    let current: Vec<ModelPart> = current.iter().map(|loaded| loaded.part()).collect();
    let reference: Option<Vec<ModelPart>> =
        reference.as_ref().map(|loaded| loaded.iter().map(|loaded| loaded.part()).collect());
    if dense.is_none() {
        let quantised = |part: &ModelPart| {
            let body = &part.model.graph.body;
            !block_matrices(body).is_empty() || !channel_matrices(body).is_empty()
        };
        check_untrained(history.as_deref().unwrap_or_default(), current.iter().any(quantised))?;
    }
    let taken = extract(reference.as_ref().unwrap_or(&current), &current, &base, cancel)?;
    if history.is_none() && dense.is_none() && !taken.missing.is_empty() {
        let problem = format!("are in none of the graphs: {}", list_preview(&taken.missing, 4));
        return Err(Error::invalid("tensors of the base", problem).remedy(
            "without a record of what was done to the model they could have changed: give the model as it was exported \
             from the base with `--dense`",
        ));
    }

    let names = names(&base, &taken, &edits)?;
    let wider = taken.changed().any(|name| taken.dtype(name) != Some(base.tensors()[name].dtype));
    let config = if wider { in_f32(&config)? } else { config };
    let tensors: Vec<NamedTensor> = names.iter().map(|(name, new)| named(&base, &taken, name, new)).collect();
    if let Some(limit) = settings.shard_bytes {
        check_shards(&tensors, limit)?;
    }
    let weights = CheckpointWeights {
        tensors: tensors.len(),
        changed: taken.changed().filter(|name| names.contains_key(name)).count(),
        from_base: names
            .keys()
            .filter(|name| taken.missing.iter().any(|other| other == *name))
            .map(|n| n.to_string())
            .collect(),
        unmatched: taken.unmatched.clone(),
    };
    let mut written = save(root, tensors, settings.shard_bytes.unwrap_or(SHARD_BYTES))?;
    write_text(&root.join(CONFIG), &config)?;
    written.push(CONFIG.to_string());
    written.extend(carry(path, bundle, root)?);
    let mut files = BTreeMap::new();
    for file in written {
        let digest = sha256_large_file(&root.join(&file))?;
        files.insert(file, digest);
    }
    let mut inputs = BTreeMap::from([("base".to_string(), base.digest()?)]);
    if let Some(dense) = &dense {
        inputs.insert("dense".to_string(), dense.digest()?);
    }
    let notes = notes(&weights, wider);
    Ok(Written { settings: settings.clone(), models: BTreeMap::new(), files, notes, inputs, weights: Some(weights) })
}

/// The dense model's components of the same files.
fn counterparts<'a>(components: &[&Component], dense: &'a Bundle) -> Result<Vec<&'a Component>> {
    let find = |component: &&Component| {
        dense.components().iter().find(|other| other.file == component.file).ok_or_else(|| {
            let subject = format!("`{}`", dense.root().display());
            Error::invalid(subject, format!("has no `{}`, which the model has", component.file))
                .remedy("give the dense model in the same layout, with `--variant` where it has several precisions")
        })
    };
    components.iter().map(find).collect()
}

/// Trained weights are found by their values before; without them no weight may have been trained.
fn check_untrained(history: &[RecordedStep], quantised: bool) -> Result<()> {
    let trained = |step: &RecordedStep| match step {
        RecordedStep::Prune { compensated, .. } => !compensated.is_empty(),
        RecordedStep::Finetune { .. } | RecordedStep::Graft { .. } => true,
        // Quantised weights are found by their rounded values.
        RecordedStep::Quantise { .. } => false,
        // `check_head` refuses a smaller head.
        RecordedStep::Vocabulary { .. } => false,
        // A config and a graph without weights.
        RecordedStep::Pictures { .. } | RecordedStep::ImageTokens { .. } => false,
    };
    if !history.iter().any(trained) {
        return Ok(());
    }
    let problem = "was trained, so its weights are no longer those of the base";
    let dense = "give the model before it was trained with `--dense`, pruned or not: its weights have the same names and the \
                 base's values";
    Err(Error::invalid("the model", problem).remedy(match quantised {
        true => format!(
            "heal the floats, then quantise: a checkpoint has floats, and those that were healed are more exact than \
             quantised ones. Export the healed floats, and {dense}"
        ),
        false => dense.to_string(),
    }))
}

/// The checkpoint's head has a row for every token.
fn check_head(history: &[RecordedStep]) -> Result<()> {
    for step in history {
        if let RecordedStep::Vocabulary { kept, of } = step {
            let problem = format!("its head was cut to {kept} of {of} rows; the checkpoint has a row for every token");
            return Err(Error::unsupported("the model", problem)
                .remedy("export the model as it was before `export --vocabulary`"));
        }
    }
    Ok(())
}

/// The dropped layers of each tower, counted as in the model that was never pruned.
fn edits(history: &[RecordedStep]) -> Result<Vec<LayerEdit>> {
    let mut towers: BTreeMap<Tower, (usize, Vec<usize>)> = BTreeMap::new();
    for step in history {
        if let RecordedStep::Prune { tower, layers_before, dropped_original, .. } = step {
            let (_, dropped) = towers.entry(*tower).or_insert((*layers_before, Vec::new()));
            dropped.extend_from_slice(dropped_original);
        }
    }
    let edits = towers.into_iter().filter(|(_, (_, dropped))| !dropped.is_empty());
    edits.map(|(tower, (total, dropped))| LayerEdit::new(tower, total, &dropped)).collect()
}

/// Some families keep a part for every layer in one tensor (Gemma 3n, Gemma 4), which has its old width when layers go.
fn check_packed(edits: &[LayerEdit], config: &str) -> Result<()> {
    const KEY: &str = "hidden_size_per_layer_input";
    let config: Value = serde_json::from_str(config).unwrap_or_default();
    let width = config.get("text_config").unwrap_or(&config).get(KEY).and_then(Value::as_u64).unwrap_or(0);
    if width == 0 || !edits.iter().any(|edit| edit.tower == Tower::Text) {
        return Ok(());
    }
    Err(Error::unsupported(
        format!("`{KEY}` of {width}"),
        "the checkpoint has tensors with a part for every layer, from which none can be taken out here",
    )
    .remedy("export the model with all layers of the language model"))
}

/// The network of transformers has an MLP in every layer, and nothing behind its layers.
fn check_blocks(history: &[RecordedStep]) -> Result<()> {
    for step in history {
        let RecordedStep::Prune { bridged, mlps, .. } = step else { continue };
        if let Some(layer) = mlps.first() {
            let problem = format!("layer {layer} lost its MLP alone; transformers' network has one in every layer");
            return Err(Error::unsupported("the pruned graph", problem).remedy("drop whole layers"));
        }
        if let Some(layer) = bridged.first() {
            let problem = format!(
                "nodes were added behind layer {layer} that make up for dropped layers; transformers' network has none there"
            );
            return Err(Error::unsupported("the pruned graph", problem)
                .remedy("prune with `--compensate linear`, which changes weights alone, or without a compensation"));
        }
    }
    Ok(())
}

/// transformers adds the features of DeepStack behind the first layers that there are, one behind each.
fn check_deepstack(history: &[RecordedStep], config: &str) -> Result<()> {
    let config: Value = serde_json::from_str(config).unwrap_or_default();
    let taps = config.pointer("/vision_config/deepstack_visual_indexes").and_then(Value::as_array);
    let Some(taps) = taps else { return Ok(()) };
    let distinct: BTreeSet<Option<u64>> = taps.iter().map(Value::as_u64).collect();
    if distinct.len() != taps.len() {
        let problem =
            "two of its features would come from one layer of the vision encoder, which transformers cannot do";
        return Err(Error::unsupported("`deepstack_visual_indexes`", problem)
            .remedy("keep the layers of the vision encoder that it names"));
    }
    for step in history {
        if let RecordedStep::Prune { tower: Tower::Text, dropped_original, deepstack: Some(Deepstack::Keep), .. } = step
            && let Some(layer) = dropped_original.iter().find(|layer| **layer < taps.len())
        {
            let problem = format!(
                "features of DeepStack are added in the place of layer {layer}, which was dropped; transformers adds them \
                 behind the layers that are left"
            );
            return Err(Error::unsupported("the pruned graph", problem)
                .remedy(format!("prune with `--deepstack shift`, or keep the first {} layers", taps.len())));
        }
    }
    Ok(())
}

/// The tensors that stay, with their new names.
fn names<'a>(base: &'a Checkpoint, taken: &Extraction, edits: &[LayerEdit]) -> Result<BTreeMap<&'a str, String>> {
    let mut names: BTreeMap<&str, String> =
        base.tensors().keys().map(|name| (name.as_str(), name.to_string())).collect();
    for edit in edits {
        let stacks = taken.stacks.get(&(edit.tower == Tower::Vision));
        let stacks = stacks.filter(|stacks| !stacks.is_empty()).ok_or_else(|| {
            let problem =
                format!("has no list of layers whose weights are those of the {} tower's layers", edit.tower.name());
            Error::unsupported("the base", problem)
                .remedy("give with `--dense` the model as it was exported from the base")
        })?;
        for (name, new) in &mut names {
            let Some((prefix, layer, rest)) = stack_of(name).filter(|(prefix, ..)| stacks.contains(*prefix)) else {
                continue;
            };
            // Layers behind those that the graphs have move down too.
            let moved = layer - edit.dropped().iter().filter(|dropped| **dropped < layer).count();
            *new = if edit.drops(layer) { String::new() } else { format!("{prefix}{moved}{rest}") };
        }
        names.retain(|_, new| !new.is_empty());
    }
    Ok(names)
}

fn named<'a>(base: &'a Checkpoint, taken: &'a Extraction, name: &'a str, new: &str) -> NamedTensor<'a> {
    let tensor = &base.tensors()[name];
    NamedTensor {
        name: new.to_string(),
        dtype: taken.dtype(name).unwrap_or(tensor.dtype),
        dims: tensor.dims.clone(),
        bytes: Box::new(move || Ok(taken.tensor(name)?.map_or_else(|| tensor.bytes().to_vec(), |own| own.bytes))),
    }
}

/// A file of the requested size has room for every tensor.
fn check_shards(tensors: &[NamedTensor], limit: u64) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.size_bytes() > limit) {
        None => Ok(()),
        Some(tensor) => Err(larger_than_shard(&tensor.name, tensor.size_bytes(), limit)
            .remedy("give a larger `--shard-size`: a checkpoint keeps each tensor in one file")),
    }
}

/// The config with f32 as element type, in which transformers then loads every tensor.
fn in_f32(config: &str) -> Result<String> {
    fn visit(value: &mut Value) {
        let Value::Object(members) = value else { return };
        for (key, value) in members {
            match value {
                Value::String(_) if key == "dtype" || key == "torch_dtype" => *value = "float32".into(),
                _ => visit(value),
            }
        }
    }
    let wrong = |problem: String| {
        Error::invalid(format!("`{CONFIG}` of the base"), problem).remedy("give the checkpoint's own config")
    };
    let mut value: Value = serde_json::from_str(config).map_err(|e| wrong(format!("is not JSON: {e}")))?;
    visit(&mut value);
    let members = value.as_object_mut().ok_or_else(|| wrong("is not a JSON object".into()))?;
    let keys = ["dtype", "torch_dtype"];
    if !keys.iter().any(|key| members.get(*key).is_some_and(Value::is_string)) {
        let key = if members.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        members.insert(key.to_string(), json!("float32"));
    }
    let text = serde_json::to_string_pretty(&value).map_err(|e| wrong(e.to_string()))?;
    Ok(text + "\n")
}

/// Copies the tokenizer, the processor, licences and code from the base; where it has no tokenizer, from the model.
fn carry(base: &Path, bundle: &Bundle, root: &Path) -> Result<Vec<String>> {
    let mut files: BTreeMap<String, std::path::PathBuf> = BTreeMap::new();
    let entries = fs::read_dir(base).map_err(|e| Error::io("read", base, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read", base, e))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let is_carried = AssetKind::named(&name) == Some(AssetKind::Tokenizer)
            || AssetKind::is_licence(&name)
            || name.ends_with(".py");
        if is_carried && entry.path().is_file() {
            files.insert(name, entry.path());
        }
    }
    if !files.keys().any(|name| name.starts_with("tokenizer") || name.ends_with(".model")) {
        for asset in bundle.assets().iter().filter(|asset| asset.kind == AssetKind::Tokenizer) {
            files.entry(asset.file.clone()).or_insert_with(|| bundle.root().join(&asset.file));
        }
    }
    for (name, source) in &files {
        if name.ends_with(".json") {
            check_object(name, source)?;
        }
        let target = root.join(name);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
        }
        fs::copy(source, &target).map_err(|e| Error::io("write", &target, e))?;
    }
    Ok(files.into_keys().collect())
}

fn notes(weights: &CheckpointWeights, wider: bool) -> Vec<String> {
    let mut notes = Vec::new();
    if !weights.from_base.is_empty() {
        let list = list_preview(&weights.from_base, 4);
        notes.push(format!("tensors that are in none of the graphs have the base's values: {list}"));
    }
    if !weights.unmatched.is_empty() {
        let names: Vec<&str> = weights.unmatched.iter().map(|weight| weight.name.as_str()).collect();
        notes
            .push(format!("weights of the graphs that are made of no tensor of the base: {}", list_preview(&names, 4)));
    }
    if wider {
        let dtype = DataType::Float;
        notes.push(format!("trained tensors are written as {dtype}, which the base's element type cannot hold"));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_with_a_part_for_every_layer_are_refused_only_when_layers_go() {
        let packed = r#"{"text_config": {"hidden_size_per_layer_input": 8}}"#;
        let edits = [LayerEdit::new(Tower::Text, 4, &[1]).unwrap()];
        let error = check_packed(&edits, packed).unwrap_err().to_string();
        assert!(error.contains("a part for every layer"), "{error}");
        assert!(check_packed(&[], packed).is_ok());
        assert!(check_packed(&[LayerEdit::new(Tower::Vision, 4, &[1]).unwrap()], packed).is_ok());
        assert!(check_packed(&edits, r#"{"text_config": {"hidden_size_per_layer_input": 0}}"#).is_ok());
    }

    #[test]
    fn folding_a_map_into_a_layer_counts_as_training() {
        let prune = |compensated: Vec<usize>| RecordedStep::Prune {
            tower: Tower::Text,
            layers_before: 4,
            dropped: vec![2],
            dropped_original: vec![2],
            deepstack: None,
            taps: Vec::new(),
            compensated,
            bridged: Vec::new(),
            mlps: Vec::new(),
        };
        assert!(check_untrained(&[prune(Vec::new())], false).is_ok());
        assert!(check_untrained(&[prune(vec![1])], false).unwrap_err().to_string().contains("was trained"));
        let quantised = check_untrained(&[prune(vec![1])], true).unwrap_err().to_string();
        assert!(quantised.contains("heal the floats, then quantise"), "{quantised}");
    }

    #[test]
    fn every_element_type_of_a_config_becomes_f32() {
        let config =
            in_f32(r#"{"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "dtype_x": "a"}"#).unwrap();
        let value: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(value, json!({"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "dtype_x": "a"}));
        let value: Value = serde_json::from_str(&in_f32("{}").unwrap()).unwrap();
        assert_eq!(value, json!({"torch_dtype": "float32"}));
    }
}
