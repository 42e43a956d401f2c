//! `manifest.json` of an export: every file with its digest, what it was made from, and what was measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, Sha256Digest, findings_preview, read_json, sha256_large_file};

use super::assets::{AssetKind, EXPORT_FILE, MANIFEST_FILE, MARKS, is_own_manifest};
use super::listing::is_left_out;
use super::record::RecordedStep;

/// Version of its schema.
pub const MANIFEST_SCHEMA_VERSION: u32 = 1;

/// What an export's folder holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExportManifest {
    /// Tool version, schema version, settings, and digests of the source, of what its last step was made from (`plan`, `data`)
    /// and of reports.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Name of the target.
    pub target: String,
    /// What was done to the model, oldest first; the settings of a finetuning step are its recipe.
    pub history: Vec<RecordedStep>,
    /// Scores of the model and of the one before, from the reports that were given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<ListedScores>,
    /// Licences and notices among the files.
    pub licences: Vec<String>,
    /// Every other file of the folder, by path.
    pub files: BTreeMap<String, ListedFile>,
}

/// One file of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListedFile {
    /// Its digest.
    pub sha256: Sha256Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// Scores on one benchmark, from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListedScores {
    /// Name of the benchmark.
    pub benchmark: String,
    /// Number of its questions.
    pub questions: u64,
    /// Score of the exported model.
    pub after: f64,
    /// Score of the report's baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<f64>,
}

impl ExportManifest {
    /// Reads the manifest of a folder; `None` where there is none of this tool.
    ///
    /// Errors: as `base::read_json`, for a manifest of this tool; `Error::Invalid` for a folder with the record of an export
    /// whose manifest is missing or damaged.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MANIFEST_FILE);
        if is_own_manifest(&path) {
            return read_json(&path, MANIFEST_SCHEMA_VERSION).map(Some);
        }
        if !folder.join(EXPORT_FILE).is_file() {
            return Ok(None);
        }
        let problem = match path.exists() {
            true => format!("is not the manifest that was written with `{EXPORT_FILE}`: it was cut or changed"),
            false => format!("is missing beside `{EXPORT_FILE}`"),
        };
        Err(Error::invalid(format!("`{}`", path.display()), problem)
            .remedy("restore it from where the export was copied, or export the model again"))
    }

    /// The target of an export according to the record beside its manifest; `None` without a readable one.
    pub fn target_in_record(folder: &Path) -> Option<String> {
        let record = serde_json::from_slice::<serde_json::Value>(&fs::read(folder.join(EXPORT_FILE)).ok()?).ok()?;
        Some(record.get("target")?.as_str()?.to_string())
    }

    /// Lists the files of a folder, the manifest itself left out, with the licences among them.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a name that is not UTF-8.
    pub fn list(folder: &Path) -> Result<(BTreeMap<String, ListedFile>, Vec<String>)> {
        let mut files = BTreeMap::new();
        for name in names(folder)? {
            let path = folder.join(&name);
            let size_bytes = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
            files.insert(name, ListedFile { sha256: sha256_large_file(&path)?, size_bytes });
        }
        let is_licence = |path: &&String| AssetKind::is_licence(path.rsplit('/').next().unwrap_or(path));
        let licences = files.keys().filter(is_licence).cloned().collect();
        Ok((files, licences))
    }

    /// Total size of a folder's files in bytes, the manifest left out.
    ///
    /// Errors: as [`ExportManifest::list`].
    pub fn size_bytes(folder: &Path) -> Result<u64> {
        let size = |name: &String| {
            let path = folder.join(name);
            fs::metadata(&path).map(|data| data.len()).map_err(|e| Error::io("read", &path, e))
        };
        names(folder)?.iter().map(size).sum()
    }

    /// What of a folder is not as listed: files that are missing, have other content, or are not listed. Hidden files and
    /// those that file managers leave may be added, as git and the hub do.
    ///
    /// Errors: as [`ExportManifest::list`].
    pub fn differences(&self, folder: &Path) -> Result<Vec<String>> {
        let (found, _) = Self::list(folder)?;
        let listed = self.files.iter().filter_map(|(name, listed)| match found.get(name) {
            None => Some(format!("`{name}` is missing")),
            Some(found) if found.size_bytes != listed.size_bytes => {
                Some(format!("`{name}` has {} bytes, expected {}", found.size_bytes, listed.size_bytes))
            }
            Some(found) if found.sha256 != listed.sha256 => Some(format!("`{name}` has other content")),
            Some(_) => None,
        });
        let is_mark = |name: &str| name.starts_with('.') || MARKS.contains(&name);
        let counts = |path: &&String| !is_mark(path.rsplit('/').next().unwrap_or(path));
        let added = found.keys().filter(|name| !self.files.contains_key(*name)).filter(counts);
        Ok(listed.chain(added.map(|name| format!("`{name}` is not listed"))).collect())
    }

    /// The differences in one line.
    pub fn described(differences: &[String]) -> String {
        findings_preview(differences, 4)
    }
}

/// Paths of all files below a folder, without those in folders that hold no part of a model.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut pending = vec![(folder.to_path_buf(), String::new())];
    while let Some((inner, prefix)) = pending.pop() {
        for entry in fs::read_dir(&inner).map_err(|e| Error::io("read", &inner, e))? {
            let entry = entry.map_err(|e| Error::io("read", &inner, e))?;
            if entry.path().is_dir() && entry.file_name().to_str().is_some_and(is_left_out) {
                continue;
            }
            let name = entry.file_name().into_string().map_err(|name| {
                Error::invalid(format!("`{}`", inner.display()), format!("file name {name:?} is not UTF-8"))
                    .remedy("rename the file")
            })?;
            let name = format!("{prefix}{name}");
            if entry.path().is_dir() {
                pending.push((entry.path(), format!("{name}/")));
            } else if name != MANIFEST_FILE {
                names.push(name);
            }
        }
    }
    names.sort();
    Ok(names)
}
