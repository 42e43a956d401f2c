//! Model folders: components, configs, and writing a changed folder.

mod assets;
mod card;
mod chunks;
mod component;
mod components;
mod config;
mod export_json;
mod hub;
mod json;
mod layer_keys;
mod layers;
mod layout;
mod listing;
mod manifest;
mod pictures;
mod readers;
mod record;
mod shared_layers;
mod source;
mod text;
mod tower;
mod variants;
mod write;

pub use assets::{AssetKind, EXPORT_FILE, MANIFEST_FILE, RECORD_FILE};
pub use card::{base_in_card, changes, front_matter, is_card};
pub use component::Component;
pub use config::{LatentAttention, ModelConfig, flag, image_token_entry, token_ids, whole_number};
pub use hub::model_on_disk;
pub use layers::LayerEdit;
pub use layout::{FolderLayout, LAYOUTS, Role, SINGLE_FILE};
pub use manifest::{ExportManifest, ListedScores, MANIFEST_SCHEMA_VERSION};
pub use readers::MissedSetting;
pub use record::{Deepstack, Record, RecordedStep, TapChange};
pub use source::ModelSource;
pub use tower::Tower;
pub use variants::{PRECISION_VARIANTS, Variants, variant_flag};
pub use write::{BundleWriter, config_without_layers};

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::{Error, Result, Sha256Digest, folder_of, list_preview, sha256_json, sha256_large_file};
use crate::ir::{Body, TensorData};

use layout::VARIANTS;
use listing::Listing;
use text::{read_json, read_text};

/// A precision variant that cannot be worked on, while a more precise one of the same component can.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetAside {
    /// Path below the folder.
    pub file: String,
    /// Reason why it is unusable.
    pub problem: String,
}

/// A file that is not a component.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Asset {
    /// Path below the folder.
    pub file: String,
    /// Purpose of the file.
    pub kind: AssetKind,
}

/// A model folder (or one `.onnx` file) in which every file has a known purpose.
#[derive(Clone, Debug)]
pub struct Bundle {
    root: PathBuf,
    layout: &'static FolderLayout,
    components: Vec<Component>,
    assets: Vec<Asset>,
    left_out: Vec<String>,
    config: Option<ModelConfig>,
    /// Variants that were not chosen, where any were.
    unchosen: Vec<Component>,
    chosen_name: Option<String>,
}

impl Bundle {
    /// Opens a model folder, or one `.onnx` file.
    ///
    /// Errors: `Error::Io` when it cannot be read; `Error::Invalid` when no layout matches, a file has no known
    /// purpose, a component named by a config is missing, or a config cannot be read; for a single file, as
    /// `onnx::load`.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        if metadata.is_dir() { Self::open_folder(path) } else { Self::open_file(path) }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let subject = || format!("`{}`", path.display());
        if path.extension().is_none_or(|extension| extension != "onnx") {
            return Err(Error::invalid(subject(), "is neither a model folder nor an .onnx file")
                .remedy("give the model's folder, or its decoder as one .onnx file"));
        }
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name
            .ok_or_else(|| Error::invalid(subject(), "its name is not UTF-8").remedy("rename the file"))?
            .to_string();
        let external = external_files(path)?;
        let stem = name.trim_end_matches(".onnx").to_string();
        let component = Component { role: Role::Decoder, stem, variant: String::new(), file: name, external };
        Ok(Bundle {
            root: folder_of(path).to_path_buf(),
            layout: &SINGLE_FILE,
            components: vec![component],
            assets: Vec::new(),
            left_out: Vec::new(),
            config: None,
            unchosen: Vec::new(),
            chosen_name: None,
        })
    }

    fn open_folder(root: &Path) -> Result<Self> {
        let subject = || format!("`{}`", root.display());
        let listing = Listing::read(root)?;
        let layout = LAYOUTS.iter().find(|layout| (layout.applies)(&listing)).ok_or_else(|| {
            Error::invalid(subject(), format!("is not a model folder: it holds {}", list_preview(&listing.files, 6)))
                .remedy(format!(
                    "expected .onnx files in one of the layouts {}; `verify` also takes the folder of an export by its \
                     {MANIFEST_FILE}",
                    LAYOUTS.iter().map(|layout| layout.name).collect::<Vec<_>>().join(", ")
                ))
        })?;
        let mut components = components::find(layout, root, &listing)?;
        for component in &mut components {
            component.external =
                listing.files.iter().filter(|file| is_external_data_of(file, &component.file)).cloned().collect();
        }
        components.sort_by(|a, b| (a.role, &a.file).cmp(&(b.role, &b.file)));
        if components.is_empty() {
            return Err(Error::invalid(subject(), "no component of a model is in it")
                .remedy("expected a decoder such as onnx/decoder_model_merged.onnx"));
        }
        let claimed = |components: &[Component], file: &String| {
            components.iter().any(|c| c.file == *file || c.external.contains(file))
        };
        // Names usually show which data belongs to which component. Only when they do not, the graphs are read.
        let is_unclear = |file: &String| !claimed(&components, file) && assets::named(file).is_none();
        let reads_graphs = listing.files.iter().any(is_unclear);
        let unreadable = if reads_graphs { add_external_files(root, &mut components)? } else { None };
        let mut assets = Vec::new();
        for file in listing.files.iter().filter(|file| !claimed(&components, file)) {
            match assets::classify(root, file)? {
                Some(kind) => assets.push(Asset { file: file.clone(), kind }),
                None => return Err(assets::unclaimed(root, file, layout.name, unreadable.as_deref())),
            }
        }
        let left_out = listing.left_out;
        let root = root.to_path_buf();
        let (unchosen, chosen_name) = (Vec::new(), None);
        let mut bundle = Bundle { root, layout, components, assets, left_out, config: None, unchosen, chosen_name };
        bundle.config = ModelConfig::read(&bundle)?;
        Ok(bundle)
    }

    /// The folder that holds the files.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Name of the model: its name on the hub when the folder is a snapshot in the hub's cache, otherwise the folder's name.
    pub fn name(&self) -> String {
        card::name_of(&self.root)
    }

    /// `hf:OWNER/NAME@COMMIT` when the folder is in the hub's cache.
    pub fn hub_name(&self) -> Option<String> {
        crate::hub::commit_of(&self.root)
    }

    /// The naming scheme of the folder's files.
    pub fn layout(&self) -> &'static FolderLayout {
        self.layout
    }

    /// Every ONNX file, ordered by role, then by path; without the variants that were not chosen, where [`ModelSource`] chose.
    pub fn components(&self) -> &[Component] {
        &self.components
    }

    /// Every file that is not a component.
    pub fn assets(&self) -> &[Asset] {
        &self.assets
    }

    /// Files unrelated to the network, and graphs that no verb runs. They are copied unchanged
    /// and listed in the record.
    pub fn carried(&self) -> impl Iterator<Item = &str> {
        let graphs = self.components.iter().filter(|component| component.role.is_carried());
        let files = self.assets.iter().filter(|asset| asset.kind == AssetKind::Other);
        graphs.map(|component| component.file.as_str()).chain(files.map(|asset| asset.file.as_str()))
    }

    /// What is not copied: folders without a part of the model (version control, download caches), and variants that were
    /// not chosen.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Values from the configs; `None` for a single `.onnx` file and for folders without a config.
    pub fn config(&self) -> Option<&ModelConfig> {
        self.config.as_ref()
    }

    /// Values from the configs.
    ///
    /// Errors: `Error::Invalid` when there is no config.
    pub fn require_config(&self) -> Result<&ModelConfig> {
        self.config.as_ref().ok_or_else(|| {
            Error::invalid(format!("`{}`", self.root.display()), "has no config.json or genai_config.json")
                .remedy("give the model's whole folder")
        })
    }

    /// Variants of a role, full precision first.
    pub fn variants(&self, role: Role) -> impl Iterator<Item = &Component> {
        let mut found: Vec<&Component> = self.components.iter().filter(|component| component.role == role).collect();
        found.sort_by_key(|component| rank(component));
        found.into_iter()
    }

    /// True when no variant of the same component is more precise. Verbs that need one variant use this one, so it must
    /// be usable; other variants are set aside when they are not.
    pub fn is_most_precise(&self, component: &Component) -> bool {
        is_most_precise(&self.components, component)
    }

    /// The component of a role, in the variant that [`ModelSource`] chose or else the most precise one.
    pub fn component(&self, role: Role) -> Option<&Component> {
        self.variants(role).next()
    }

    /// The variants that were chosen, as `--variant` names them; `None` for the most precise ones.
    pub fn chosen_variants(&self) -> Option<&str> {
        self.chosen_name.as_deref()
    }

    /// As [`Bundle::component`], for a role that must exist.
    ///
    /// Errors: `Error::Invalid` naming the role when the folder has none.
    pub fn require(&self, role: Role) -> Result<&Component> {
        self.component(role).ok_or_else(|| {
            let found: Vec<&str> = self.components.iter().map(|component| component.file.as_str()).collect();
            Error::invalid(
                format!("`{}`", self.root.display()),
                format!("has no {} component; found {}", role.name(), list_preview(&found, 6)),
            )
            .remedy("give the model's whole folder")
        })
    }

    /// Path of a component's `.onnx` file.
    pub fn path_of(&self, component: &Component) -> PathBuf {
        self.root.join(&component.file)
    }

    /// Path of an asset; `None` when the folder lacks it.
    pub fn asset_path(&self, file: &str) -> Option<PathBuf> {
        self.assets.iter().find(|asset| asset.file == file).map(|asset| self.root.join(&asset.file))
    }

    /// The text of an asset; `None` when the folder lacks it.
    ///
    /// Errors: `Error::Io` when unreadable; `Error::Invalid` when larger than 64 MiB or not UTF-8.
    pub fn read_text(&self, file: &str) -> Result<Option<String>> {
        self.asset_path(file).map(|path| read_text(&path)).transpose()
    }

    /// A JSON asset; `None` when the folder lacks it.
    ///
    /// Errors: as `read_text`, and `Error::Invalid` when it is not JSON.
    pub fn read_json(&self, file: &str) -> Result<Option<Value>> {
        self.asset_path(file).map(|path| read_json(&path)).transpose()
    }

    /// Steps that interlace has run on this model; `None` for a model that it did not write.
    ///
    /// Errors: as `base::read_json`.
    pub fn record(&self) -> Result<Option<Record>> {
        self.asset_path(RECORD_FILE).map(|path| crate::base::read_json(&path, Record::SCHEMA_VERSION)).transpose()
    }

    /// Bytes of a component, external data included.
    ///
    /// Errors: `Error::Io` when a file is missing.
    pub fn size_bytes(&self, component: &Component) -> Result<u64> {
        let mut total = 0u64;
        for file in std::iter::once(&component.file).chain(&component.external) {
            let path = self.root.join(file);
            total = total.saturating_add(fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len());
        }
        Ok(total)
    }

    /// SHA-256 of each file on which the computation depends, by path. Documentation and
    /// interlace's own record are left out. A choice among variants that are on disk changes nothing, so that digests of one
    /// folder agree. Of a model on the hub the chosen files alone are there, and other variants have another digest.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    fn file_digests(&self) -> Result<BTreeMap<String, Sha256Digest>> {
        let components = self.components.iter().chain(&self.unchosen);
        let parts = components.flat_map(|c| std::iter::once(&c.file).chain(&c.external));
        let assets = self
            .assets
            .iter()
            .filter(|asset| matches!(asset.kind, AssetKind::Config | AssetKind::Tokenizer | AssetKind::Tooling));
        let files = parts.chain(assets.map(|asset| &asset.file));
        files.map(|file| Ok((file.clone(), sha256_large_file(&self.root.join(file))?))).collect()
    }

    /// One digest over `file_digests`: equal for equal models.
    ///
    /// Errors: as `file_digests`.
    pub fn digest(&self) -> Result<Sha256Digest> {
        sha256_json(&self.file_digests()?)
    }
}

/// Rank of a component's variant by precision; 0 is the most precise.
fn rank(component: &Component) -> usize {
    VARIANTS.iter().position(|variant| *variant == component.variant).unwrap_or(VARIANTS.len())
}

fn is_most_precise(components: &[Component], component: &Component) -> bool {
    let same = |other: &&Component| other.role == component.role && other.stem == component.stem;
    components.iter().filter(same).all(|other| rank(component) <= rank(other))
}

/// Adds to the components the external data that their graphs name. Returns the problem of the first graph that cannot
/// be read; that of a most precise variant is an error.
fn add_external_files(root: &Path, components: &mut [Component]) -> Result<Option<String>> {
    let mut unreadable = None;
    let all = &*components;
    let most_precise: Vec<bool> = all.iter().map(|component| is_most_precise(all, component)).collect();
    for (component, most_precise) in components.iter_mut().zip(most_precise) {
        let names = match external_files(&root.join(&component.file)) {
            Err(error) if !most_precise => {
                unreadable.get_or_insert_with(|| format!("`{}` cannot be read: {error}", component.file));
                continue;
            }
            names => names?,
        };
        let folder = component.file.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        component.external.extend(names.into_iter().map(|name| format!("{folder}{name}")));
        component.external.sort();
        component.external.dedup();
    }
    Ok(unreadable)
}

/// Files of external data that a graph reads, relative to its folder, sorted.
fn external_files(path: &Path) -> Result<Vec<String>> {
    fn visit(body: &Body, files: &mut BTreeSet<PathBuf>) {
        for (_, tensor) in &body.initializers {
            if let TensorData::Mapped { file, external: true, .. } = &tensor.data {
                files.insert(file.path().to_path_buf());
            }
        }
        body.nodes.iter().flat_map(|node| node.bodies()).for_each(|body| visit(body, files));
    }
    let model = crate::onnx::load(path)?;
    let mut files = BTreeSet::new();
    visit(&model.graph.body, &mut files);
    let folder = folder_of(path);
    let root = fs::canonicalize(folder).map_err(|e| Error::io("open", folder, e))?;
    // Data may be a link into a cache, so its name in the folder differs from its real path.
    let mut names_here = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))? {
        let entry = entry.map_err(|e| Error::io("read", folder, e))?;
        if let (Ok(place), Ok(name)) = (fs::canonicalize(entry.path()), entry.file_name().into_string()) {
            names_here.insert(place, name);
        }
    }
    let mut names = Vec::new();
    for file in files {
        let place = fs::canonicalize(&file).map_err(|e| Error::io("open", &file, e))?;
        let inside = || place.strip_prefix(&root).ok().and_then(Path::to_str).map(str::to_string);
        names.push(names_here.get(&place).cloned().or_else(inside).ok_or_else(|| {
            let problem = format!("its weights are in `{}`, outside its folder", file.display());
            Error::invalid(format!("`{}`", path.display()), problem)
                .remedy("put the weight file into the graph's folder")
        })?);
    }
    names.sort();
    Ok(names)
}

/// `X.onnx_data`, `X.onnx_data_3`, `X.onnx.data` for `X.onnx`.
fn is_external_data_of(file: &str, onnx: &str) -> bool {
    match file.strip_prefix(onnx) {
        Some("_data" | ".data") => true,
        Some(rest) => {
            rest.strip_prefix("_data_").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        }
        None => false,
    }
}

#[cfg(test)]
mod tests;
