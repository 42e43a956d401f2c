//! The table `[export]` of a recipe.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::export::{
    BudgetRequest, ExportSettings, ExportTarget, PrecisionRow, PrecisionSettings, precision_named, target_named,
};

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
    /// Largest KL divergence of each model in `int4` from its floats, in nats: parts get 8 bits or stay floats until it holds, as
    /// with `export --max-kl`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
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
    /// Largest number of bytes of a file of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_size: Option<u64>,
}

fn is_default(blocks: &PrecisionSettings) -> bool {
    *blocks == PrecisionSettings::default()
}

impl ExportSection {
    /// True when nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == ExportSection::default()
    }

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
            if precisions.len() > 1 && target.writes_graphs() && !target.writes_variants {
                let problem = format!("has {} names, and the target `{name}` has room for one", precisions.len());
                return Err(Error::invalid("export.precision", problem)
                    .remedy("name one precision, or leave the target to a recipe of its own"));
            }
        }
        if self.blocks != PrecisionSettings::default() && !precisions.iter().any(|row| row.in_blocks) {
            return Err(Error::invalid("export.blocks", "is read by none of `precision`")
                .remedy("name int4 or q4f16 in `precision`, or leave it out"));
        }
        if let Some(budget) = self.budget() {
            budget.check("export.max_kl")?;
            if !precisions.iter().any(|row| row.is_mixed()) {
                return Err(Error::invalid("export.max_kl", "is read by none of `precision`")
                    .remedy("name int4 in `precision`, or leave it out"));
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

    /// The limit of models in `int4`, where there is one.
    pub fn budget(&self) -> Option<BudgetRequest> {
        self.max_kl.map(|most| BudgetRequest { target_bytes: None, max_kl: Some(most) })
    }

    /// Keys of settings of the graphs, with the flags of `export` and whether they are set.
    fn graph_settings(&self) -> [(&'static str, &'static str, bool); 5] {
        [
            ("standard_ops", "--standard-ops", self.standard_ops),
            ("opset", "--opset", self.opset.is_some()),
            ("max_ir_version", "--max-ir-version", self.max_ir_version.is_some()),
            ("max_buffer", "--max-buffer", self.max_buffer.is_some()),
            ("shard_size", "--shard-size", self.shard_size.is_some()),
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
    pub fn targets(&self) -> Result<Vec<&'static ExportTarget>> {
        let named = |name: &String| target_named(name).map_err(|problem| Error::invalid("export.targets", problem));
        self.targets.iter().map(named).collect()
    }

    /// The settings that a target reads.
    pub fn settings(&self, target: &ExportTarget) -> ExportSettings {
        ExportSettings {
            standard_ops: self.standard_ops && target.reads("--standard-ops"),
            opset: self.opset.filter(|_| target.reads("--opset")),
            max_ir_version: self.max_ir_version.filter(|_| target.reads("--max-ir-version")),
            max_buffer_bytes: self.max_buffer.filter(|_| target.reads("--max-buffer")),
            shard_bytes: self.shard_size.filter(|_| target.reads("--shard-size")),
            ..ExportSettings::default()
        }
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
        assert_eq!(check("precision = [\"fp16\", \"int4\"]\nmax_kl = 0.01"), Ok(()));
        for (text, want) in [
            ("precision = [\"int3\"]", "`int3` is none of fp16"),
            ("precision = [\"int4\", \"int4\"]", "`int4` twice"),
            ("targets = [\"triton\"]\nprecision = [\"int4\", \"fp16\"]", "`triton` has room for one"),
            ("precision = [\"int8\"]\nblocks = { block_size = 128 }", "export.blocks: is read by none"),
            ("precision = [\"fp16\"]\nmax_kl = 0.01", "export.max_kl: is read by none"),
            ("precision = [\"int4\"]\nmax_kl = 0.0", "export.max_kl: is 0, expected nats above 0"),
            ("targets = [\"polish\"]", "`polish` is none of"),
            ("targets = [\"safetensors\"]", "export.base"),
            ("opset = 21", "export.opset: is read by none"),
            ("targets = [\"single-file\"]\nshard_size = 1000", "export.shard_size: is read by none"),
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
        let web = section("targets = [\"webgpu\", \"tract\"]\nmax_buffer = 134217728\nshard_size = 100000000").unwrap();
        web.check().unwrap();
        let settings = |name: &str| web.settings(target_named(name).unwrap());
        let found = |name: &str| (settings(name).max_buffer_bytes, settings(name).shard_bytes);
        assert_eq!((found("webgpu"), found("tract")), ((Some(134_217_728), Some(100_000_000)), (None, None)));
    }
}
