//! Export targets: layouts for serving a model. A target is a row of [`TARGETS`] that carries its function.

mod buffers;
mod card;
mod components;
mod configs;
mod genai;
mod generate;
mod hugging_face;
mod manifest;
mod nodes;
mod packing;
mod plain;
mod precision;
mod record;
pub mod transformers_js;
pub mod triton;
mod vocabulary;

use std::path::Path;

use crate::base::{Cancel, Error, Provenance, Result, StagedDir, sha256_file, write_json};
use crate::bundle::{Bundle, EXPORT_FILE, ExportManifest, MANIFEST_FILE, ModelSource, Role};
use crate::hub::commit_of;

use components::NOTHING;
pub use precision::{
    BudgetRequest, KeptOperators, KeptTensor, PRECISIONS, PartSensitivity, PrecisionBudget, PrecisionReport,
    PrecisionRequest, PrecisionRow, PrecisionSettings, QuantisedComponent, QuantisedTensor, RangeCalibration,
    Sensitivity, WeightForm, export_variants, precision_named, write_variants,
};
use record::Written;
pub use record::{CheckpointWeights, EXPORT_SCHEMA_VERSION, Export, ExportSettings, ExportedModel};
pub use vocabulary::{CutFile, VOCABULARY_FILE, VocabularyReport, write_vocabulary};

/// Name of the model card.
const CARD: &str = "README.md";

/// A setting that only some targets read: its name, and a function that is true when it is set.
type Setting = (&'static str, fn(&ExportSettings) -> bool);

const MAX_BATCH_SIZE: Setting = ("--max-batch-size", |settings| settings.max_batch_size.is_some());
const VARIANT: Setting = ("--variant", |settings| settings.variant.is_some());
const MAX_IR_VERSION: Setting = ("--max-ir-version", |settings| settings.max_ir_version.is_some());
const STANDARD_OPS: Setting = ("--standard-ops", |settings| settings.standard_ops);
const OPSET: Setting = ("--opset", |settings| settings.opset.is_some());
const MAX_BUFFER: Setting = ("--max-buffer", |settings| settings.max_buffer_bytes.is_some());
const BASE: Setting = ("--base", |settings| settings.base.is_some());
const DENSE: Setting = ("--dense", |settings| settings.dense.is_some());
const SHARD_SIZE: Setting = ("--shard-size", |settings| settings.shard_bytes.is_some());
const DYNAMIC_BATCHING: Setting = ("--dynamic-batching", |settings| settings.serving.batch_delay_us.is_some());
const INSTANCES: Setting = ("--instances", |settings| settings.serving.instances.is_some());
const INSTANCE_KIND: Setting = ("--instance-kind", |settings| settings.serving.instance_kind.is_some());
const ACCELERATOR: Setting = ("--accelerator", |settings| settings.serving.accelerator.is_some());
const VERSIONS: Setting = ("--versions", |settings| settings.serving.versions.is_some());
const WARM_UP: Setting = ("--warm-up", |settings| settings.serving.warm_up);
/// The setting of every target.
const REPORT: Setting = ("--report", |settings| !settings.reports.is_empty());

/// The settings that targets read; one of several targets comes several times.
fn settings_of_targets() -> impl Iterator<Item = &'static Setting> {
    TARGETS.iter().flat_map(|target| target.settings)
}

/// Settings of most targets that write graphs.
const GRAPHS: &[Setting] = &[VARIANT, MAX_IR_VERSION, STANDARD_OPS, OPSET, MAX_BUFFER];
/// The same of those that write data files beside the graphs.
const SPLIT_GRAPHS: &[Setting] = &[VARIANT, MAX_IR_VERSION, STANDARD_OPS, OPSET, MAX_BUFFER, SHARD_SIZE];

impl ExportSettings {
    /// The flag of a setting that is set and that targets read.
    pub fn first_set(&self) -> Option<&'static str> {
        settings_of_targets().chain([&REPORT]).find(|(_, is_set)| is_set(self)).map(|(name, _)| *name)
    }
}

/// A layout that `export` writes.
#[derive(Clone, Copy, Debug)]
pub struct ExportTarget {
    /// Value of `--to`.
    pub name: &'static str,
    /// One-line description.
    pub summary: &'static str,
    /// The program with which its output was tested.
    pub consumer: &'static str,
    /// `library_name` in the model card: the library that loads it.
    library: &'static str,
    /// True when it has room for a component in several precisions.
    pub writes_variants: bool,
    /// Why it cannot serve a model that leaves image tokens out; `None` where it can.
    without_token_pruner: Option<&'static str>,
    /// Those that it reads; another one that is set is an error.
    settings: &'static [Setting],
    /// Writes the files into an existing folder and returns their description.
    write: fn(&Bundle, &ExportSettings, &Path, &Cancel) -> Result<Written>,
}

impl ExportTarget {
    /// True when it reads this flag of `export`.
    pub fn reads(&self, flag: &str) -> bool {
        self.settings.iter().any(|(own, _)| *own == flag)
    }

    /// True when it writes graphs, which may have fewer bits or a smaller head; false for weights under the names of a checkpoint.
    pub fn writes_graphs(&self) -> bool {
        !self.reads(BASE.0)
    }
}

/// All targets.
pub const TARGETS: &[ExportTarget] = &[
    ExportTarget {
        name: "triton",
        summary: "A model repository of Triton Inference Server: the components, and models that answer a request whole",
        consumer: "tritonserver 2.51",
        library: "onnx",
        writes_variants: false,
        without_token_pruner: Some("its models read a prompt with one token for each row of features"),
        settings: &[
            MAX_BATCH_SIZE,
            VARIANT,
            MAX_IR_VERSION,
            STANDARD_OPS,
            OPSET,
            DYNAMIC_BATCHING,
            INSTANCES,
            INSTANCE_KIND,
            ACCELERATOR,
            VERSIONS,
            WARM_UP,
        ],
        write: triton::write,
    },
    ExportTarget {
        name: "transformers-js",
        summary: "A folder that transformers.js loads, in Node or a page",
        consumer: "@huggingface/transformers 4.3",
        library: "transformers.js",
        writes_variants: true,
        without_token_pruner: Some("transformers.js counts image tokens itself and runs no other graph"),
        settings: SPLIT_GRAPHS,
        write: transformers_js::write,
    },
    ExportTarget {
        name: "webgpu",
        summary: "The same for WebGPU: positions in int32, no weight above 1 GB, `device` set in the config",
        consumer: "@huggingface/transformers 4.3",
        library: "transformers.js",
        writes_variants: true,
        without_token_pruner: Some("transformers.js counts image tokens itself and runs no other graph"),
        settings: SPLIT_GRAPHS,
        write: transformers_js::webgpu,
    },
    ExportTarget {
        name: "generate",
        summary: "One ONNX graph from pictures and prompt to the ids of the answer",
        consumer: "onnxruntime 1.30",
        library: "onnx",
        writes_variants: false,
        without_token_pruner: None,
        settings: GRAPHS,
        write: generate::write,
    },
    ExportTarget {
        name: "genai",
        summary: "A folder that ONNX Runtime GenAI loads: decoder, vision encoder and embedding with genai_config.json",
        consumer: "onnxruntime-genai 0.18",
        library: "onnxruntime-genai",
        writes_variants: false,
        without_token_pruner: Some("ONNX Runtime GenAI counts image tokens itself and runs no other graph"),
        settings: SPLIT_GRAPHS,
        write: genai::write,
    },
    ExportTarget {
        name: "openvino",
        summary: "The components under their own names, for OpenVINO",
        consumer: "openvino 2026.4",
        library: "openvino",
        writes_variants: false,
        without_token_pruner: Some("no program is known that runs `token_pruner.onnx` between these components"),
        settings: SPLIT_GRAPHS,
        write: plain::openvino,
    },
    ExportTarget {
        name: "single-file",
        summary: "The components, each with its weights inside its .onnx file, for consumers that take one file or bytes",
        consumer: "onnxruntime 1.30 and ONNX Runtime Web 1.31, from bytes",
        library: "onnx",
        writes_variants: false,
        without_token_pruner: Some("no program is known that runs `token_pruner.onnx` between these components"),
        settings: GRAPHS,
        write: plain::single_file,
    },
    ExportTarget {
        name: "tract",
        summary: "The same as openvino for tract: standard operators, and no free sizes noted on inner values",
        consumer: "tract 0.23",
        library: "tract",
        writes_variants: false,
        without_token_pruner: Some("no program is known that runs `token_pruner.onnx` between these components"),
        settings: &[VARIANT, MAX_IR_VERSION, OPSET],
        write: plain::tract,
    },
    ExportTarget {
        name: "safetensors",
        summary: "A Hugging Face checkpoint, for transformers and what reads its checkpoints; needs --base",
        consumer: "transformers 5.24",
        library: "transformers",
        writes_variants: false,
        without_token_pruner: Some("a checkpoint has weights alone"),
        settings: &[VARIANT, BASE, DENSE, SHARD_SIZE],
        write: hugging_face::write,
    },
];

/// The target with this name.
///
/// Errors: a message with the known names.
pub fn target_named(name: &str) -> Result<&'static ExportTarget, String> {
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.ok_or_else(|| format!("`{name}` is none of {}", names.join(", ")))
}

/// Writes a model for a target as a new folder, with a record of the export.
///
/// Errors: `Error::Invalid` when the folder exists or the target does not read a given setting;
/// `Error::Unsupported`, with the reason, when the target cannot serve the model; `Error::Io` when writing fails;
/// `Error::Interrupted` on Ctrl-C. On an error no folder remains.
pub fn export(
    bundle: &Bundle,
    target: &ExportTarget,
    settings: &ExportSettings,
    folder: &Path,
    cancel: &Cancel,
) -> Result<Export> {
    export_model(bundle, target, settings, folder, (Vec::new(), None), cancel)
}

/// [`export`] of a model that was quantised before.
///
/// Errors: as there.
fn export_quantised(
    bundle: &Bundle,
    target: &ExportTarget,
    settings: &ExportSettings,
    folder: &Path,
    report: PrecisionReport,
    cancel: &Cancel,
) -> Result<Export> {
    export_model(bundle, target, settings, folder, (report.components, report.sensitivity), cancel)
}

fn export_model(
    bundle: &Bundle,
    target: &ExportTarget,
    settings: &ExportSettings,
    folder: &Path,
    (precision, sensitivity): (Vec<QuantisedComponent>, Option<Sensitivity>),
    cancel: &Cancel,
) -> Result<Export> {
    if let Some((name, _)) = settings_of_targets().find(|(name, is_set)| is_set(settings) && !target.reads(name)) {
        return Err(Error::invalid(format!("`{name}`"), format!("is not read by the target `{}`", target.name))
            .remedy("leave it out"));
    }
    if let (Some(pruner), Some(reason)) = (bundle.component(Role::TokenPruner), target.without_token_pruner) {
        let subject = format!("`{}` in the target `{}`", pruner.file, target.name);
        return Err(Error::unsupported(subject, reason)
            .remedy("export the model as it was before, or take it out with `interlace prune --keep-image-tokens 1`"));
    }
    components::check_texts(bundle)?;
    bundle.check_output(folder)?;
    cancel.check(NOTHING)?;
    let staged = StagedDir::create(folder)?;
    let Written { settings: recorded, models, mut files, mut notes, mut inputs, weights } =
        (target.write)(bundle, settings, staged.path(), cancel)?;
    cancel.check(NOTHING)?;
    let mut buffers = Vec::new();
    if let Some(limit) = recorded.max_buffer_bytes {
        buffers = buffers::measured((target.name, bundle, &recorded), staged.path(), limit, cancel)?;
        notes.extend(buffers::notes(&buffers, bundle.config()));
    }
    let model = bundle.digest()?;
    let (scores, reports) = manifest::scores(&settings.reports, &model)?;
    inputs.insert("model".to_string(), model);
    let provenance = Provenance::new(EXPORT_SCHEMA_VERSION, inputs, &recorded)?
        .with_hub("model", bundle.hub_name())
        .with_hub("base", settings.base.as_deref().and_then(commit_of))
        .with_hub("dense", settings.dense.as_ref().and_then(ModelSource::hub_name))
        .with_variants("model", bundle.chosen_variants())
        .with_variants("dense", settings.dense.as_ref().and_then(ModelSource::chosen).as_deref());
    let size = ExportManifest::size_bytes(staged.path())?;
    let text = card::text(bundle, target, &provenance.tool, &scores, size)?;
    components::write(&staged.path().join(CARD), &text)?;
    files.insert(CARD.to_string(), sha256_file(&staged.path().join(CARD))?);
    let target = target.name.to_string();
    let export = Export { provenance, target, models, files, notes, buffers, weights, precision, sensitivity };
    write_json(&staged.path().join(EXPORT_FILE), &export)?;
    let manifest = manifest::of(bundle, &export, (scores, reports), staged.path())?;
    write_json(&staged.path().join(MANIFEST_FILE), &manifest)?;
    cancel.check(NOTHING)?;
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
        let cancel = Cancel::default();
        let error = export(&Bundle::open(&path).unwrap(), target, &settings, &out, &cancel).unwrap_err().to_string();
        assert!(error.contains("--max-batch-size") && error.contains("transformers-js"), "{error}");
        assert!(!out.exists());
        assert!(target_named("polish").unwrap_err().contains("triton"));
    }

    /// The functions of the rows look at the flag themselves, not only [`export`] around them. `safetensors` needs a base.
    #[test]
    fn every_target_ends_when_the_user_asks_to_stop() {
        let bundle = Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")).unwrap();
        let (settings, cancel) = (ExportSettings::default(), Cancel::default());
        cancel.request();
        for target in TARGETS.iter().filter(|target| !target.reads("--base")) {
            let folder = tempfile::tempdir().unwrap();
            let written = (target.write)(&bundle, &settings, folder.path(), &cancel);
            assert!(matches!(written, Err(Error::Interrupted { .. })), "{}", target.name);
        }
    }
}
