//! Other precisions and layouts of a run's models.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::bundle::{Bundle, ModelSource};
use crate::checkpoint::{Checkpoint, checkpoint_on_disk};
use crate::data::{Amount, Dataset, Subset};
use crate::export::{
    ExportSettings, ExportTarget, PrecisionRequest, PrecisionRow, PrecisionSettings, RangeCalibration, export,
    precision_named, target_named, write_variants,
};

use super::recipe::Calibration;
use super::stages::Stages;
use super::store::Finished;

/// Samples on which ranges of activations are measured, and their longest length in tokens: the defaults of `export`.
const RANGE_SAMPLES: usize = 32;
const RANGE_TOKENS: usize = 8192;

/// Other layouts and precisions of the first strategy's finetuned model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSection {
    /// Names of targets, as `export --to` takes them.
    pub targets: Vec<String>,
    /// Checkpoint that the dense model was exported from, a folder or `hf:OWNER/NAME[@REVISION]`, for the target `safetensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// Precisions, as `export --precision` takes them. The dense model and the finetuned one are written in each, and both have a
    /// row in the table. Targets take these files in place of the floats, or beside them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub precision: Vec<String>,
    /// Blocks of weights in `int4` and `q4f16`.
    #[serde(skip_serializing_if = "is_default")]
    pub blocks: PrecisionSettings,
    /// Writes operators of ONNX Runtime's own domain as standard ones.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub standard_ops: bool,
    /// Raises the default operator set to this version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opset: Option<i64>,
    /// Lowers the IR version of newer files to this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ir_version: Option<i64>,
    /// Splits tables of embeddings and weights of products above this number of bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_buffer: Option<u64>,
}

fn is_default(blocks: &PrecisionSettings) -> bool {
    *blocks == PrecisionSettings::default()
}

impl ExportSection {
    /// Errors: `Error::Invalid` for unknown names, a target without its `base`, settings that no target reads, and more precisions
    /// than a target has room for.
    pub fn check(&self) -> Result<()> {
        let precisions = self.precisions()?;
        let targets = self.targets()?;
        for target in &targets {
            let name = target.name;
            if target.reads("--base") && self.base.is_none() {
                return Err(Error::invalid("export.base", format!("is missing, and the target `{name}` needs it"))
                    .remedy("name the checkpoint that the dense model was exported from"));
            }
            if precisions.len() > 1 && target.reads("--variant") && !target.writes_variants {
                let problem = format!("has {} names, and the target `{name}` has room for one", precisions.len());
                return Err(Error::invalid("export.precision", problem)
                    .remedy("name one precision, or leave the target to a recipe of its own"));
            }
        }
        for (key, flag, is_set) in self.graph_settings() {
            if is_set && !targets.iter().any(|target| target.reads(flag)) {
                return Err(Error::invalid(format!("export.{key}"), "is read by none of `targets`")
                    .remedy("name a target that writes graphs, or leave it out"));
            }
        }
        Ok(())
    }

    /// Keys of settings of the graphs, with the flags of `export` and whether they are set.
    fn graph_settings(&self) -> [(&'static str, &'static str, bool); 4] {
        [
            ("standard_ops", "--standard-ops", self.standard_ops),
            ("opset", "--opset", self.opset.is_some()),
            ("max_ir_version", "--max-ir-version", self.max_ir_version.is_some()),
            ("max_buffer", "--max-buffer", self.max_buffer.is_some()),
        ]
    }

    /// The precisions.
    ///
    /// Errors: `Error::Invalid` for an unknown name or one that occurs twice.
    pub fn precisions(&self) -> Result<Vec<&'static PrecisionRow>> {
        let twice = self.precision.iter().enumerate().find(|(place, name)| self.precision[..*place].contains(name));
        if let Some((_, name)) = twice {
            return Err(Error::invalid("export.precision", format!("has `{name}` twice")).remedy("name it once"));
        }
        let named =
            |name: &String| precision_named(name).map_err(|problem| Error::invalid("export.precision", problem));
        self.precision.iter().map(named).collect()
    }

    /// The targets.
    ///
    /// Errors: `Error::Invalid` for an unknown name.
    fn targets(&self) -> Result<Vec<&'static ExportTarget>> {
        let named = |name: &String| target_named(name).map_err(|problem| Error::invalid("export.targets", problem));
        self.targets.iter().map(named).collect()
    }

    /// The settings that a target reads.
    fn settings(&self, target: &ExportTarget) -> ExportSettings {
        let mut settings = ExportSettings::default();
        settings.standard_ops = self.standard_ops && target.reads("--standard-ops");
        settings.opset = self.opset.filter(|_| target.reads("--opset"));
        settings.max_ir_version = self.max_ir_version.filter(|_| target.reads("--max-ir-version"));
        settings.max_buffer_bytes = self.max_buffer.filter(|_| target.reads("--max-buffer"));
        settings
    }
}

/// A model with its precisions.
pub struct Quantised {
    /// The folder with all of them.
    pub made: Finished,
    /// Each precision, and the model in it.
    pub models: Vec<(&'static PrecisionRow, ModelSource)>,
}

impl Quantised {
    /// Suffix of the files of the only precision, where there is one.
    fn only_suffix(&self) -> Option<String> {
        match self.models.as_slice() {
            [(_, source)] => source.chosen(),
            _ => None,
        }
    }
}

impl Stages<'_> {
    /// A model in the precisions of the section, as step `precision-LABEL`; `None` where there are none.
    ///
    /// Errors: as `write_variants`.
    pub fn quantise(
        &mut self,
        label: &str,
        (model, digest): (&Path, &str),
        (section, calibration): (&ExportSection, &Calibration),
    ) -> Result<Option<Quantised>> {
        let precisions = section.precisions()?;
        if precisions.is_empty() {
            return Ok(None);
        }
        let options = calibration.data_options(self.part);
        let calibrated = precisions.iter().any(|row| row.calibrated);
        let dataset = calibrated.then(|| Dataset::open_for(&calibration.data, &self.bundle, &options)).transpose()?;
        let data_digest = dataset.as_ref().map(Dataset::digest).transpose()?;
        let mut inputs = vec![("model", digest)];
        inputs.extend(data_digest.iter().map(|digest| ("data", digest.as_str())));
        let (device, cancel) = (self.device, self.cancel);
        let ranges = dataset.as_ref().map(|dataset| RangeCalibration {
            dataset,
            subset: Subset { amount: Amount::Samples(RANGE_SAMPLES.min(dataset.len())), seed: calibration.seed },
            max_tokens: RANGE_TOKENS,
            device,
            cancel,
        });
        let request =
            PrecisionRequest { precisions: &precisions, settings: section.blocks, calibration: ranges, budget: None };
        let step = format!("precision-{label}");
        let key = (&section.precision, section.blocks, calibrated.then_some(calibration.seed));
        let made = self.store.step(&step, &step, &inputs, &key, |path| {
            write_variants(&Bundle::open(model)?, &request, path).map(|_| ())
        })?;
        self.report_step(&step, &made);
        let has_suffix = Bundle::open(&made.path)?.layout().names_variants();
        let source = |row: &'static PrecisionRow| {
            let suffix = has_suffix.then(|| row.suffix.parse()).transpose();
            let suffix = suffix.map_err(|problem: String| Error::invalid("export.precision", problem))?;
            Ok((row, ModelSource::new(&made.path, suffix)))
        };
        let models = precisions.into_iter().map(source).collect::<Result<Vec<_>>>()?;
        Ok(Some(Quantised { made, models }))
    }

    /// A model for every target of the section, in its precisions where the target takes them.
    ///
    /// Errors: as `export`.
    pub fn export(
        &mut self,
        (model, digest): (&Path, &str),
        quantised: Option<&Quantised>,
        section: &ExportSection,
    ) -> Result<()> {
        for target in section.targets()? {
            let mut settings = section.settings(target);
            let quantised = quantised.filter(|_| target.reads("--variant"));
            let source = quantised.map_or(model, |own| own.made.path.as_path());
            let mut inputs = vec![("model", quantised.map_or(digest, |own| &own.made.digest).to_string())];
            settings.variant = quantised.filter(|_| !target.writes_variants).and_then(Quantised::only_suffix);
            if let Some(base) = section.base.as_ref().filter(|_| target.reads("--base")) {
                let base = checkpoint_on_disk(base, self.cancel)?;
                inputs.push(("base", Checkpoint::open(&base)?.digest()?.to_string()));
                settings.base = Some(base);
                settings.dense = Some(self.model.to_path_buf());
            }
            let inputs: Vec<(&str, &str)> = inputs.iter().map(|(name, digest)| (*name, digest.as_str())).collect();
            let name = target.name;
            let done = self.store.step(name, name, &inputs, &settings, |path| {
                export(&Bundle::open(source)?, target, &settings, path).map(|_| ())
            })?;
            self.report_step(name, &done);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_met_are_refused_before_anything_runs() {
        let section = |text: &str| toml::from_str::<ExportSection>(text).map_err(|error| error.to_string());
        let check = |text: &str| section(text).and_then(|section| section.check().map_err(|error| error.to_string()));
        assert_eq!(check("targets = [\"transformers-js\"]\nprecision = [\"int4\", \"fp16\"]\nopset = 21"), Ok(()));
        assert_eq!(check("precision = [\"int4\"]\nblocks = { block_size = 128, zero_points = true }"), Ok(()));
        for (text, want) in [
            ("precision = [\"int3\"]", "`int3` is none of fp16"),
            ("precision = [\"int4\", \"int4\"]", "`int4` twice"),
            ("targets = [\"triton\"]\nprecision = [\"int4\", \"fp16\"]", "`triton` has room for one"),
            ("targets = [\"polish\"]", "`polish` is none of"),
            ("targets = [\"safetensors\"]", "export.base"),
            ("opset = 21", "export.opset: is read by none"),
            ("targets = [\"tract\"]\nstandard_ops = true", "export.standard_ops: is read by none"),
            ("max_size = 3", "unknown field `max_size`"),
        ] {
            let problem = check(text).unwrap_err();
            assert!(problem.contains(want), "{text}: {problem}");
        }
        let mixed = "targets = [\"triton\", \"tract\"]\nstandard_ops = true\nmax_ir_version = 9";
        let mixed = section(mixed).unwrap();
        mixed.check().unwrap();
        let settings = |name: &str| mixed.settings(target_named(name).unwrap());
        assert_eq!((settings("tract").standard_ops, settings("tract").max_ir_version), (false, Some(9)));
        assert!(settings("triton").standard_ops);
    }
}
