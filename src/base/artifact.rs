//! JSON artifacts: each records its schema, tool version, inputs and settings.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::files::{AtomicFile, read_plain};
use super::hash::Sha256Digest;

/// The head of every JSON file that interlace writes; flattened into the artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Provenance {
    /// Version of this artifact's schema; readers refuse another one.
    pub schema_version: u32,
    /// `interlace` and its version.
    pub tool: String,
    /// SHA-256 of each input, by a name that says what it was (`model`, `data`, `scores`).
    pub inputs: BTreeMap<String, Sha256Digest>,
    /// The settings that made it, as the verb understood them.
    pub settings: serde_json::Value,
    /// Precision variants that were chosen with `--variant`, by the name of the input (`model`, `baseline`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub variants: BTreeMap<String, String>,
    /// Name on the hub and commit, `hf:OWNER/NAME@COMMIT`, of each input that is from there, by the name of the input.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hub: BTreeMap<String, String>,
}

impl Provenance {
    /// A head with this tool's version.
    ///
    /// Errors: `Error::Invalid` when the settings cannot be written as JSON.
    pub fn new<S: Serialize>(
        schema_version: u32,
        inputs: BTreeMap<String, Sha256Digest>,
        settings: &S,
    ) -> Result<Self> {
        Ok(Provenance {
            schema_version,
            tool: format!("interlace {}", env!("CARGO_PKG_VERSION")),
            inputs,
            settings: serde_json::to_value(settings).map_err(|e| Error::invalid("settings", e.to_string()))?,
            variants: BTreeMap::new(),
            hub: BTreeMap::new(),
        })
    }

    /// The same, with an input's name on the hub; unchanged for an input that is not from there.
    pub fn with_hub(mut self, input: &str, name: Option<String>) -> Self {
        self.hub.extend(name.map(|name| (input.to_string(), name)));
        self
    }

    /// The same, with the variants of an input; unchanged without any.
    pub fn with_variants(mut self, input: &str, variants: Option<&str>) -> Self {
        self.variants.extend(variants.map(|variants| (input.to_string(), variants.to_string())));
        self
    }
}

/// Writes a value as indented JSON under its final name in one step.
///
/// Errors: `Error::Io` when the file cannot be written; nothing is left then.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::invalid(format!("`{}`", path.display()), e.to_string()))?;
    text.push('\n');
    let mut file = AtomicFile::create(path)?;
    file.write_all(text.as_bytes())?;
    file.commit()
}

/// Kinds of artifacts: what one holds, a key that no kind before it has, and the verb that writes it.
const KINDS: &[(&str, &str, &str)] = &[
    ("scores", "sim_1", "score"),
    ("a plan", "finetune_pruned", "plan"),
    ("the record of a model", "history", "prune"),
    ("the report of a finetuning", "resumed_from_step", "finetune"),
    ("the plan of a finetuning", "frozen_before", "finetune --dry-run"),
    ("the layers of a model", "between_layers", "inspect"),
    ("a verification", "checks", "verify"),
    ("measured times", "cores", "bench"),
    ("a report", "model", "eval"),
];

/// Most bytes of an artifact.
const MOST_BYTES: u64 = 1 << 30;

/// Reads an artifact of the given schema version.
///
/// Errors: as [`read_plain`], for more than 1 GiB; `Error::Invalid` when it is not JSON of that type or of another version.
pub fn read_json<T: DeserializeOwned>(path: &Path, schema_version: u32) -> Result<T> {
    read(path, schema_version, None)
}

/// As [`read_json`], for a file that the user names, which may hold another kind of artifact. `expected` is a kind as
/// messages call it: `scores`, `a plan`.
///
/// Errors: as [`read_json`], and `Error::Invalid` with the kind that was found.
pub fn read_artifact<T: DeserializeOwned>(path: &Path, schema_version: u32, expected: &str) -> Result<T> {
    read(path, schema_version, Some(expected))
}

/// The error for a file with another kind of artifact than `expected`; `None` for that kind and for unknown ones.
fn other_kind(path: &Path, value: &serde_json::Value, expected: &str) -> Option<Error> {
    value.get("schema_version")?;
    let (found, ..) = KINDS.iter().find(|(_, key, _)| value.get(key).is_some())?;
    let (_, _, verb) = KINDS.iter().find(|(kind, ..)| *kind == expected)?;
    (*found != expected).then(|| {
        Error::invalid(format!("`{}`", path.display()), format!("holds {found}, expected {expected}"))
            .remedy(format!("name a file that `interlace {verb}` wrote"))
    })
}

fn read<T: DeserializeOwned>(path: &Path, schema_version: u32, expected: Option<&str>) -> Result<T> {
    let subject = || format!("`{}`", path.display());
    let bytes = read_plain(path, MOST_BYTES)?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| {
        Error::invalid(subject(), format!("not JSON: {e}")).remedy("make it again with the verb that writes it")
    })?;
    if let Some(error) = expected.and_then(|expected| other_kind(path, &value, expected)) {
        return Err(error);
    }
    match value.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(found) if found == u64::from(schema_version) => {}
        Some(found) => {
            return Err(Error::invalid(subject(), format!("schema_version is {found}, expected {schema_version}"))
                .remedy("make the file again with this version of interlace"));
        }
        None => {
            return Err(Error::invalid(subject(), "has no `schema_version`, so interlace did not write it")
                .remedy("name a file that interlace wrote"));
        }
    }
    serde_json::from_value(value)
        .map_err(|e| Error::invalid(subject(), e.to_string()).remedy("make it again with the verb that writes it"))
}
