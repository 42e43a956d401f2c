//! Writes a changed folder: changed components, rewritten configs, and copies of everything else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::base::{AtomicFile, Error, Provenance, Result, StagedDir, resolved_path, write_json};
use crate::ir::Model;
use crate::onnx::{self, Metadata, Storage};

use super::components::{TOKEN_PRUNER, beside};
use super::json::{Document, Edit, JsonKind};
use super::layers::{self, LayerEdit};
use super::record::{Deepstack, Record, RecordedStep, TapChange};
use super::{
    AssetKind, Bundle, Component, RECORD_FILE, Role, SINGLE_FILE, card, chunks, export_json, is_external_data_of,
    pictures, read_text, readers,
};

/// Size in bytes above which a variant's weights continue in a new file: browsers hold at most 2 GiB in one buffer.
const VARIANT_CHUNK_BYTES: u64 = 2_000_000_000;
/// Configs of other tools whose layer keys are in the table.
const FOREIGN_CONFIGS: &[&str] = &["params.json"];

/// A new folder in the same layout as its source bundle, not yet complete. Dropped without `commit`, it is removed.
#[derive(Debug)]
pub struct BundleWriter<'a> {
    bundle: &'a Bundle,
    staged: Staged,
    /// New content of configs, by path.
    texts: BTreeMap<String, String>,
    /// Rewritten components: path, and the number of external data files now.
    written: BTreeMap<String, usize>,
    /// New variants: file name, and the number of external data files.
    variants: BTreeMap<String, usize>,
    /// Components that are left out of the new folder.
    set_aside: BTreeSet<String>,
    steps: Vec<RecordedStep>,
}

struct Staged(StagedDir);

impl std::fmt::Debug for Staged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.path().display())
    }
}

impl<'a> BundleWriter<'a> {
    /// Begins a folder that will become `target`.
    ///
    /// Errors: as `StagedDir::create`.
    pub fn create(bundle: &'a Bundle, target: &Path) -> Result<Self> {
        Ok(BundleWriter {
            bundle,
            staged: Staged(StagedDir::create(target)?),
            texts: BTreeMap::new(),
            written: BTreeMap::new(),
            variants: BTreeMap::new(),
            set_aside: BTreeSet::new(),
            steps: Vec::new(),
        })
    }

    /// Writes a changed component. Weights stay inline or external as in the source.
    ///
    /// Errors: as `onnx::save`.
    pub fn save(&mut self, component: &Component, model: &Model) -> Result<()> {
        self.save_with(component, model, || Ok(Metadata::new()))
    }

    /// As [`BundleWriter::save`], with additional metadata as in `onnx::save_with`.
    ///
    /// Errors: as `onnx::save_with`.
    pub fn save_with(
        &mut self,
        component: &Component,
        model: &Model,
        metadata: impl FnOnce() -> Result<Metadata>,
    ) -> Result<()> {
        let path = self.target(&component.file)?;
        let storage = self.storage(component)?;
        let data = onnx::save_with(model, &path, &storage, metadata)?;
        self.written.insert(component.file.clone(), data.len());
        Ok(())
    }

    /// Writes a component in another precision: as a file of its own, with the suffix in its name, or in place of the component.
    /// Weights are inline or external as in the source. Returns the file and its bytes, external data included.
    ///
    /// Errors: as `onnx::save`.
    pub fn save_variant(
        &mut self,
        component: &Component,
        suffix: Option<&str>,
        model: &Model,
    ) -> Result<(String, u64)> {
        let Some(suffix) = suffix else {
            self.save(component, model)?;
            let names = std::iter::once(component.file.clone()).chain(component.external.iter().cloned());
            return Ok((component.file.clone(), self.bytes_of(names)?));
        };
        let file = format!("{}_{suffix}.onnx", component.stem);
        let (folder, name) = file.rsplit_once('/').map_or(("", file.as_str()), |(folder, name)| (folder, name));
        let storage = match component.external.is_empty() {
            true => Storage::Inline,
            false => Storage::External { file_name: format!("{name}_data"), chunk_bytes: Some(VARIANT_CHUNK_BYTES) },
        };
        let data = onnx::save(model, &self.target(&file)?, &storage)?;
        self.variants.insert(name.to_string(), data.len());
        let slash = if folder.is_empty() { "" } else { "/" };
        let names = std::iter::once(file.clone()).chain(data.iter().map(|name| format!("{folder}{slash}{name}")));
        let bytes = self.bytes_of(names)?;
        Ok((file, bytes))
    }

    /// Bytes of files of the new folder that are there.
    fn bytes_of(&self, files: impl Iterator<Item = String>) -> Result<u64> {
        let mut bytes = 0;
        for file in files {
            let path = self.staged.0.path().join(file);
            if path.exists() {
                bytes += fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
            }
        }
        Ok(bytes)
    }

    /// Adds a JSON file about the model.
    ///
    /// Errors: `Error::Io` when it cannot be written.
    pub fn add_json<T: serde::Serialize>(&self, file: &str, value: &T) -> Result<()> {
        write_json(&self.target(file)?, value)
    }

    /// Leaves a component out of the new folder.
    pub fn set_aside(&mut self, file: &str) {
        self.set_aside.insert(file.to_string());
    }

    /// Limits each external data file to the size of the source's first file, when the source has several.
    fn storage(&self, component: &Component) -> Result<Storage> {
        let Some(first) = component.external.first() else { return Ok(Storage::Inline) };
        let path = self.bundle.root().join(first);
        let size = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
        let chunked = component.external.len() > 1
            && component.external.iter().all(|file| is_external_data_of(file, &component.file));
        Ok(Storage::External { file_name: Self::external_name(component), chunk_bytes: chunked.then_some(size.max(1)) })
    }

    /// File name for a component's external data: the source's name, or `X.onnx_data`, which transformers.js expects.
    pub fn external_name(component: &Component) -> String {
        let file_name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_string();
        match component.external.as_slice() {
            [single] => file_name(single),
            _ => format!("{}_data", file_name(&component.file)),
        }
    }

    /// Rewrites every config for removed layers and records the step, with its changes to outputs.
    ///
    /// Errors: `Error::Invalid` and `Error::Unsupported` from the table of layer keys, naming file and key.
    pub fn drop_layers(&mut self, edit: &LayerEdit, deepstack: Option<Deepstack>, taps: Vec<TapChange>) -> Result<()> {
        let rewritten = rewritten_configs(self.bundle, &self.texts, edit)?;
        self.texts.extend(rewritten);
        let mut history = self.history()?;
        let before = Record::original_layers(&history, edit.tower, edit.total)?;
        let original = edit.dropped().iter().filter_map(|&layer| before.get(layer).copied()).collect();
        let step = RecordedStep::Prune {
            tower: edit.tower,
            layers_before: edit.total,
            dropped: edit.dropped().to_vec(),
            dropped_original: original,
            deepstack,
            compensated: Vec::new(),
            bridged: Vec::new(),
            mlps: Vec::new(),
            taps,
        };
        history.push(step.clone());
        self.steps.push(step);
        Ok(())
    }

    /// Records the layers whose MLPs were removed, after [`BundleWriter::drop_layers`] without a layer.
    pub fn drop_mlps(&mut self, layers: &[usize]) {
        if let Some(RecordedStep::Prune { mlps, .. }) = self.steps.last_mut() {
            *mlps = layers.to_vec();
        }
    }

    /// Records the layers whose weights make up for those that [`BundleWriter::drop_layers`] dropped, and those behind which
    /// added nodes do so.
    pub fn compensate(&mut self, folded: &[usize], added_behind: &[usize]) {
        if let Some(RecordedStep::Prune { compensated, bridged, .. }) = self.steps.last_mut() {
            (*compensated, *bridged) = (folded.to_vec(), added_behind.to_vec());
        }
    }

    /// Sets keys of the image processor's config, in every file that has a copy of it, and records the step.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a config that is not JSON, or where no file has the config.
    pub fn set_pictures(&mut self, keys: &serde_json::Map<String, serde_json::Value>) -> Result<()> {
        let mut count = 0;
        for (file, nested) in [("preprocessor_config.json", false), ("processor_config.json", true)] {
            if self.bundle.asset_path(file).is_none() {
                continue;
            }
            let old = document(self.bundle, &self.texts, file)?;
            let subject = format!("`{}`", self.bundle.root().join(file).display());
            if let Some(text) = pictures::with_keys(subject, old.text().to_string(), nested, keys)? {
                self.texts.insert(file.to_string(), text);
                count += 1;
            }
        }
        if count == 0 {
            let problem = "has no config of an image processor";
            return Err(Error::invalid(format!("`{}`", self.bundle.root().display()), problem)
                .remedy("add `preprocessor_config.json` of the model"));
        }
        self.steps.push(RecordedStep::Pictures { keys: keys.clone() });
        Ok(())
    }

    /// Adds the graph that leaves image tokens out, beside the decoder and in place of one that is there, and records the step;
    /// without a graph the folder gets none.
    ///
    /// Errors: `Error::Invalid` for a model without a decoder; as `onnx::save`.
    pub fn set_token_pruner(&mut self, keep: f64, pruner: Option<&Model>) -> Result<()> {
        let old = self.bundle.component(Role::TokenPruner).map(|component| component.file.clone());
        self.set_aside.extend(old);
        if let Some(pruner) = pruner {
            let decoder = self.bundle.components().iter().find(|component| component.role.is_decoder());
            let decoder = decoder.map_or_else(|| self.bundle.require(Role::Decoder), Ok)?;
            let file = format!("{}.onnx", beside(&decoder.file, TOKEN_PRUNER));
            onnx::save(pruner, &self.target(&file)?, &Storage::Inline)?;
        }
        self.steps.push(RecordedStep::ImageTokens { keep });
        Ok(())
    }

    /// Adds a preface about the changes to the model cards, which describe the unchanged model.
    ///
    /// Errors: `Error::Io` and `Error::Invalid` when a card cannot be read as text.
    fn preface_cards(&mut self, record: &Record) -> Result<()> {
        if record.history.is_empty() {
            return Ok(());
        }
        let base = card::name_of(self.bundle.root());
        for asset in self.bundle.assets().iter().filter(|asset| card::is_card(&asset.file)) {
            let text = read_text(&self.bundle.root().join(&asset.file))?;
            let text = card::with_preface(&text, &base, &record.history, &record.provenance.tool);
            self.texts.insert(asset.file.clone(), text);
        }
        Ok(())
    }

    /// Gives the configs what readers other than transformers 5 look for in them.
    fn complete_for_readers(&mut self) {
        let read = |file: &str| self.texts.get(file).cloned().or_else(|| self.bundle.read_text(file).ok().flatten());
        let completed = readers::completed(self.bundle, &read);
        self.texts.extend(completed.into_iter().map(|(file, text)| (file.to_string(), text)));
    }

    /// Records a step other than dropping layers.
    pub fn push_step(&mut self, step: RecordedStep) {
        self.steps.push(step);
    }

    /// Content of the new `interlace.json`: the bundle's history and the steps recorded here.
    ///
    /// Errors: as `Bundle::record`.
    pub fn record(&self, provenance: Provenance) -> Result<Record> {
        Ok(Record {
            provenance: provenance
                .with_hub("model", self.bundle.hub_name())
                .with_variants("model", self.bundle.chosen_variants()),
            history: self.history()?,
            carried: self.bundle.carried().map(str::to_string).collect(),
            left_out: self.bundle.left_out().to_vec(),
        })
    }

    /// Copies unchanged files, writes configs and `interlace.json`, and gives the folder its final name.
    ///
    /// Errors: `Error::Io` when a file cannot be written; the partial folder is removed.
    pub fn commit(mut self, provenance: Provenance) -> Result<()> {
        let record = self.record(provenance)?;
        self.keep_chunk_counts_true()?;
        self.count_chunks_of_variants()?;
        self.preface_cards(&record)?;
        self.complete_for_readers();
        for component in self.bundle.components() {
            if !self.written.contains_key(&component.file) && !self.set_aside.contains(&component.file) {
                for file in std::iter::once(&component.file).chain(&component.external) {
                    self.copy(file)?;
                }
            }
        }
        let mut done: BTreeSet<&str> = BTreeSet::new();
        for (file, text) in &self.texts {
            let mut target = AtomicFile::create(&self.target(file)?)?;
            target.write_all(text.as_bytes())?;
            target.commit()?;
            done.insert(file);
        }
        for asset in self.bundle.assets() {
            if asset.kind != AssetKind::Record && !done.contains(asset.file.as_str()) {
                self.copy(&asset.file)?;
            }
        }
        write_json(&self.target(RECORD_FILE)?, &record)?;
        self.staged.0.commit()
    }

    /// Adds the number of external data files of each new variant to `config.json`, where transformers.js looks for it.
    fn count_chunks_of_variants(&mut self) -> Result<()> {
        let named = self.bundle.asset_path("config.json").is_some() && self.bundle.layout().name == "transformers.js";
        if self.variants.is_empty() || !named {
            return Ok(());
        }
        let document = document(self.bundle, &self.texts, "config.json")?;
        let name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_string();
        let others = self.bundle.components().iter().map(|it| (name(&it.file), it.external.len())).collect();
        if let Some(edit) = chunks::counted(&document, &self.variants, &others) {
            let text = document.apply(vec![edit])?;
            self.texts.insert("config.json".into(), text);
        }
        Ok(())
    }

    fn history(&self) -> Result<Vec<RecordedStep>> {
        let mut history = self.bundle.record()?.map(|record| record.history).unwrap_or_default();
        history.extend(self.steps.iter().cloned());
        Ok(history)
    }

    fn target(&self, file: &str) -> Result<PathBuf> {
        let path = self.staged.0.path().join(file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
        }
        Ok(path)
    }

    fn copy(&self, file: &str) -> Result<()> {
        let (source, target) = (self.bundle.root().join(file), self.target(file)?);
        fs::copy(&source, &target).map_err(|e| Error::io("write", &target, e))?;
        let written = fs::File::open(&target).and_then(|file| file.sync_all());
        written.map_err(|e| Error::io("write", &target, e))?;
        let mut permissions = fs::metadata(&target).map_err(|e| Error::io("read", &target, e))?.permissions();
        if permissions.readonly() {
            use std::os::unix::fs::PermissionsExt;
            permissions.set_mode(permissions.mode() | 0o200);
            fs::set_permissions(&target, permissions).map_err(|e| Error::io("set permissions of", &target, e))?;
        }
        Ok(())
    }

    /// Updates `transformers.js_config.use_external_data_format`, the number of external data files of each component
    /// (by file name or stem, or one value for all).
    fn keep_chunk_counts_true(&mut self) -> Result<()> {
        if self.bundle.asset_path("config.json").is_none() {
            return Ok(());
        }
        let document = document(self.bundle, &self.texts, "config.json")?;
        let node = document.root().get("transformers.js_config").and_then(|js| js.get("use_external_data_format"));
        let Some(node) = node else { return Ok(()) };
        let chunks =
            |component: &Component| self.written.get(&component.file).copied().unwrap_or(component.external.len());
        let file_name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_string();
        let mut edits = Vec::new();
        match &node.kind {
            JsonKind::Object(members) => {
                for (key, value) in members {
                    let bare = key.strip_suffix(".onnx").unwrap_or(key);
                    let by_file =
                        self.bundle.components().iter().find(|c| file_name(&c.file) == format!("{bare}.onnx"));
                    let by_stem = self.bundle.components().iter().filter(|c| file_name(&c.stem) == *bare);
                    let counts: BTreeSet<usize> = match by_file.filter(|_| key.ends_with(".onnx")) {
                        Some(component) => [chunks(component)].into(),
                        None => by_stem.map(chunks).collect(),
                    };
                    // A stem covers all variants, and transformers.js requests the largest number of files among them.
                    if let Some(&count) = counts.last() {
                        push_count(&document, &mut edits, value, count);
                    }
                }
            }
            _ => {
                let counts: BTreeSet<usize> = self.bundle.components().iter().map(chunks).collect();
                if counts.len() == 1 {
                    push_count(&document, &mut edits, node, counts.first().copied().unwrap_or(0));
                } else {
                    let entries: serde_json::Map<String, serde_json::Value> = self
                        .bundle
                        .components()
                        .iter()
                        .map(|component| (file_name(&component.file), chunks(component).into()))
                        .collect();
                    edits.push(Edit { span: node.span.clone(), text: serde_json::Value::from(entries).to_string() });
                }
            }
        }
        if !edits.is_empty() {
            let text = document.apply(edits)?;
            self.texts.insert("config.json".into(), text);
        }
        Ok(())
    }
}

/// A file of the folder as JSON, or its new text if it has one.
fn document(bundle: &Bundle, texts: &BTreeMap<String, String>, file: &str) -> Result<Document> {
    let path = bundle.root().join(file);
    let text = match texts.get(file) {
        Some(text) => text.clone(),
        None => read_text(&path)?,
    };
    Document::parse(format!("`{}`", path.display()), text)
}

/// New texts, by path, of the configs of a model that loses layers. Texts in `texts` replace those of the folder.
fn rewritten_configs(
    bundle: &Bundle,
    texts: &BTreeMap<String, String>,
    edit: &LayerEdit,
) -> Result<BTreeMap<String, String>> {
    let mut rewritten = BTreeMap::new();
    for asset in bundle.assets() {
        let document = match asset.kind {
            AssetKind::Config => document(bundle, texts, &asset.file)?,
            AssetKind::Other if asset.file.ends_with(".json") => {
                match foreign_config(bundle, texts, &asset.file, edit)? {
                    Some(document) => document,
                    None => continue,
                }
            }
            _ => continue,
        };
        let text = match asset.file.as_str() {
            "export.json" => export_json::rewrite(&document, edit)?,
            _ => layers::rewrite(&document, edit)?,
        };
        rewritten.extend(text.map(|text| (asset.file.clone(), text)));
    }
    Ok(rewritten)
}

/// A JSON file of another tool that counts the tower's layers and must be rewritten; `None` when it counts no layers.
///
/// Errors: `Error::Invalid` when the table of layer keys does not cover the file, so that a copy would be wrong.
fn foreign_config(
    bundle: &Bundle,
    texts: &BTreeMap<String, String>,
    file: &str,
    edit: &LayerEdit,
) -> Result<Option<Document>> {
    // A file that is not JSON is not a config, even if its name suggests one.
    let Ok(document) = document(bundle, texts, file) else { return Ok(None) };
    let Some(key) = layers::counting_key(&document, edit) else { return Ok(None) };
    if FOREIGN_CONFIGS.contains(&file) {
        return Ok(Some(document));
    }
    let problem = format!("says `{key}` is {}, and nothing is known about the file", edit.total);
    Err(Error::invalid(document.subject(), problem)
        .remedy("it would be wrong about the new model: move it out of the folder"))
}

/// A model's `config.json` after layers were dropped, whatever folder it is in.
///
/// Errors: as [`BundleWriter::drop_layers`]; `Error::Io` when it cannot be read.
pub fn config_without_layers(path: &Path, edits: &[LayerEdit]) -> Result<String> {
    let mut text = read_text(path)?;
    for edit in edits {
        let document = Document::parse(format!("`{}`", path.display()), text.clone())?;
        text = layers::rewrite(&document, edit)?.unwrap_or(text);
    }
    Ok(text)
}

impl Bundle {
    /// Checks that an output folder is outside of the model folder: inside of it, no verb would know its files. Other
    /// files beside a single `.onnx` file do not matter.
    ///
    /// Errors: `Error::Invalid`; `Error::Io` when the folder cannot be read.
    pub fn check_output(&self, target: &Path) -> Result<()> {
        if self.layout().name == SINGLE_FILE.name {
            return Ok(());
        }
        let (place, root) = (resolved_path(target)?, resolved_path(self.root())?);
        if !place.starts_with(&root) {
            return Ok(());
        }
        let problem = match place == root {
            true => "is the model folder itself".to_string(),
            false => format!("lies inside the model folder `{}`", self.root().display()),
        };
        Err(Error::invalid(format!("output `{}`", target.display()), problem).remedy("name a folder outside of it"))
    }

    /// Checks whether the configs can be adapted, as [`BundleWriter::drop_layers`] does.
    ///
    /// Errors: as there.
    pub fn check_drop(&self, edit: &LayerEdit) -> Result<()> {
        rewritten_configs(self, &BTreeMap::new(), edit).map(drop)
    }
}

/// Adds an edit for a number of data files (`false` is 0, `true` is 1) unless the value is already right.
fn push_count(document: &Document, edits: &mut Vec<Edit>, node: &super::json::JsonNode, count: usize) {
    let old = document.text().get(node.span.clone()).unwrap_or_default();
    let holds = old == count.to_string() || (count == 0 && old == "false") || (count == 1 && old == "true");
    if !holds {
        edits.push(Edit { span: node.span.clone(), text: count.to_string() });
    }
}
