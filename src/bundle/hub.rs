//! Models on the hub: which of their files a verb needs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::base::{Cancel, Error, Result, list_preview};
use crate::hub::{HubName, Repository};
use crate::onnx::external_locations;

use super::assets::{self, AssetKind};
use super::card::is_card;
use super::component::Component;
use super::components;
use super::layout::{FolderLayout, LAYOUTS, Role};
use super::listing::Listing;
use super::variants::{ROLES, Variants};
use super::{MANIFEST_FILE, is_external_data_of};

/// Components that no verb runs and that a changed model carries along.
const CARRIED: &[Role] = &[Role::AudioEncoder, Role::ImageGenerator];

/// The folder of a model: a path as it is; for `hf:OWNER/NAME[@REVISION]` a folder in the hub's cache with configs, tokenizer,
/// templates, licences and the model card, and the graphs of these variants with their data, by default the most precise
/// one of each component. What is not in the cache is downloaded.
///
/// Errors: as `Repository::open` and `fetch`; `Error::Invalid` when no layout matches or a variant is not there.
pub fn model_on_disk(model: &Path, variants: &Variants, cancel: &Cancel) -> Result<PathBuf> {
    let Some(name) = HubName::of(model)? else { return Ok(model.to_path_buf()) };
    let repository = Repository::open(&name, cancel)?;
    let listing = Listing::on_hub(repository.files());
    let layout = LAYOUTS.iter().find(|layout| (layout.applies)(&listing)).ok_or_else(|| no_layout(&name, &listing))?;
    let mut files: Vec<String> = listing.files.iter().filter(|file| is_needed(file)).cloned().collect();
    let snapshot = repository.fetch(&files, cancel)?;
    let graphs = graphs(layout, &snapshot, &listing, variants)?;
    files.extend(graphs.iter().map(|graph| graph.file.clone()));
    repository.fetch(&files, cancel)?;
    let mut data = BTreeSet::new();
    for graph in &graphs {
        data.extend(data_of(graph, &snapshot, &listing)?);
    }
    files.extend(data);
    repository.fetch(&files, cancel)?;
    repository.selection(&files)
}

fn no_layout(name: &HubName, listing: &Listing) -> Error {
    let problem = format!("is no model in ONNX: it holds {}", list_preview(&listing.files, 6));
    Error::invalid(format!("`{name}`"), problem).remedy(format!(
        "expected .onnx files in one of the layouts {}; a checkpoint is exported to ONNX first",
        LAYOUTS.iter().map(|layout| layout.name).collect::<Vec<_>>().join(", ")
    ))
}

/// True for files besides the graphs that verbs read or carry along.
fn is_needed(file: &str) -> bool {
    if file == MANIFEST_FILE {
        return false;
    }
    match assets::named(file) {
        Some(AssetKind::Config | AssetKind::Tokenizer | AssetKind::Tooling | AssetKind::Record) => true,
        Some(AssetKind::Documentation) => {
            is_card(file) || AssetKind::is_licence(file.rsplit('/').next().unwrap_or(file))
        }
        Some(AssetKind::Other) | None => false,
    }
}

/// The graph of each component in its variant.
fn graphs(layout: &FolderLayout, snapshot: &Path, listing: &Listing, variants: &Variants) -> Result<Vec<Component>> {
    let found = components::find(layout, snapshot, listing)?;
    let mut graphs = Vec::new();
    for &role in ROLES.iter().chain(CARRIED) {
        let mut of_role: Vec<&Component> = found.iter().filter(|component| component.role == role).collect();
        of_role.sort_by_key(|component| super::rank(component));
        // No variant can be chosen for the carried ones, and each of them is a part of its own.
        if CARRIED.contains(&role) {
            let mut stems = BTreeSet::new();
            graphs.extend(of_role.into_iter().filter(|component| stems.insert(&component.stem)).cloned());
            continue;
        }
        graphs.extend(variants.choose(&of_role)?.cloned());
    }
    if graphs.iter().any(|graph| graph.role.is_decoder()) {
        return Ok(graphs);
    }
    let names: Vec<&str> = found.iter().map(|component| component.file.as_str()).collect();
    Err(Error::invalid(
        format!("a {} model on the hub", layout.name),
        format!("has no decoder; found {}", list_preview(&names, 6)),
    )
    .remedy("name another model or revision"))
}

/// Files with a graph's weights: those that it names, and those whose names say so.
fn data_of(graph: &Component, snapshot: &Path, listing: &Listing) -> Result<Vec<String>> {
    let folder = graph.file.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    let named = external_locations(&snapshot.join(&graph.file))?;
    let named = named.into_iter().map(|location| {
        let file = format!("{folder}{}", location.trim_start_matches("./"));
        match listing.has(&file) {
            true => Ok(file),
            false => Err(Error::invalid(
                format!("graph `{}`", graph.file),
                format!("names its weights in `{}`, which is not there", location.escape_debug()),
            )
            .remedy("name another model or revision")),
        }
    });
    let mut files = named.collect::<Result<Vec<String>>>()?;
    files.extend(listing.files.iter().filter(|file| is_external_data_of(file, &graph.file)).cloned());
    Ok(files)
}
