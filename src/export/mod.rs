//! Layouts to serve a model from. A target is a row of [`TARGETS`] that carries its function.

mod components;
mod record;
pub mod transformers_js;
pub mod triton;

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::{Error, Provenance, Result, StagedDir, write_json};
use crate::bundle::Bundle;

use record::Written;
pub use record::{EXPORT_FILE, EXPORT_SCHEMA_VERSION, Export, ExportSettings, ExportedModel};

/// A setting that some targets read.
type Setting = (&'static str, fn(&ExportSettings) -> bool);

const MAX_BATCH_SIZE: Setting = ("--max-batch-size", |settings| settings.max_batch_size.is_some());
const VARIANT: Setting = ("--variant", |settings| settings.variant.is_some());
const MAX_IR_VERSION: Setting = ("--max-ir-version", |settings| settings.max_ir_version.is_some());
const SETTINGS: &[Setting] = &[MAX_BATCH_SIZE, VARIANT, MAX_IR_VERSION];

/// A layout that `export` writes.
#[derive(Clone, Copy, Debug)]
pub struct ExportTarget {
    /// As `--to` takes it.
    pub name: &'static str,
    /// What it is, in one line.
    pub summary: &'static str,
    /// The program that its output was tried with.
    pub consumer: &'static str,
    /// Those that it reads; another one that is set is an error.
    settings: &'static [Setting],
    /// Writes the files below a folder that exists, and says what they are.
    write: fn(&Bundle, &ExportSettings, &Path) -> Result<Written>,
}

/// Every target there is.
pub const TARGETS: &[ExportTarget] = &[
    ExportTarget {
        name: "triton",
        summary: "A model repository of Triton Inference Server, one model per component",
        consumer: "tritonserver 2.51",
        settings: &[MAX_BATCH_SIZE, VARIANT, MAX_IR_VERSION],
        write: triton::write,
    },
    ExportTarget {
        name: "transformers-js",
        summary: "A folder that transformers.js loads, in Node or a page",
        consumer: "@huggingface/transformers 4.3",
        settings: &[VARIANT, MAX_IR_VERSION],
        write: transformers_js::write,
    },
];

/// The target of a name.
///
/// Errors: the names there are.
pub fn target_named(name: &str) -> Result<&'static ExportTarget, String> {
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.ok_or_else(|| format!("`{name}` is none of {}", names.join(", ")))
}

/// Writes a model for a target as a new folder, with a record of what was written.
///
/// Errors: `Error::Invalid` when the folder exists or a setting is given that the target does not read; `Error::Unsupported`
/// for what the target cannot take, with the reason; `Error::Io`. Nothing is left under the folder's name then.
pub fn export(bundle: &Bundle, target: &ExportTarget, settings: &ExportSettings, folder: &Path) -> Result<Export> {
    let read = |name: &str| target.settings.iter().any(|(own, _)| *own == name);
    if let Some((name, _)) = SETTINGS.iter().find(|(name, is_set)| is_set(settings) && !read(name)) {
        return Err(Error::invalid(format!("`{name}`"), format!("is not read by the target `{}`", target.name))
            .remedy("leave it out"));
    }
    let staged = StagedDir::create(folder)?;
    let Written { settings, models, files, notes } = (target.write)(bundle, settings, staged.path())?;
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?)]);
    let provenance = Provenance::new(EXPORT_SCHEMA_VERSION, inputs, &settings)?;
    let export = Export { provenance, target: target.name.to_string(), models, files, notes };
    write_json(&staged.path().join(EXPORT_FILE), &export)?;
    staged.commit()?;
    Ok(export)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_a_target_does_not_read_is_an_error() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
        let settings = ExportSettings { max_batch_size: Some(4), ..ExportSettings::default() };
        let target = target_named("transformers-js").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let error = export(&Bundle::open(&path).unwrap(), target, &settings, &out).unwrap_err().to_string();
        assert!(error.contains("--max-batch-size") && error.contains("transformers-js"), "{error}");
        assert!(!out.exists());
        assert!(target_named("polish").unwrap_err().contains("triton"));
    }
}
