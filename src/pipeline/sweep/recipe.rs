//! The recipe of a sweep: a TOML file. An unknown key is an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Error, Result};
use crate::bundle::Variants;
use crate::data::{DataOptions, DataPart, ImageSettings, Turns};
use crate::finetune::{DEFAULT_RECIPE, RecipeRow, Settings};
use crate::hub::HubName;

use super::super::comparison::{DenseRecipe, DenseSection, OtherData, check_names, parts};
use super::super::export_section::ExportSection;
use super::super::prune_section::PruneSection;
use super::super::recipe::{BenchSection, Calibration, read_file};
use super::super::steps::EvalSettings;
use super::super::strategies::check_strategies;

/// `sweep.toml`. Paths are relative to the file's own folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// The dense model: a folder, one `.onnx` decoder, or `hf:OWNER/NAME[@REVISION]`.
    pub model: PathBuf,
    /// Precision variant of every component of the model, such as `fp16` or `q4`, or one for each that is named, as in
    /// `decoder=q4,vision_encoder=fp16`; the most precise ones by default. `sweep --variant` overrides it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variants>,
    /// Folder for everything that the sweep makes; `sweep -o` overrides it.
    pub output: PathBuf,
    /// `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "cpu")]
    pub device: String,
    /// Parts of the decoder's layers to drop, each rounded down to whole layers.
    pub drop_ratios: Vec<f64>,
    /// Names of the strategies to compare.
    pub strategies: Vec<String>,
    /// Let `interlace-tn`, `random` and `consecutive` choose the last layer too, as the authors' released code does.
    #[serde(default)]
    pub as_released: bool,
    /// Go on where the packs of `interlace`, `interlace-oa` and `interlace-tn` run out: with pairs for `interlace-oa`, then
    /// with single frozen layers.
    #[serde(default)]
    pub beyond_structure: bool,
    /// Each decides the draw of the `random` strategy, and the draw and order of the finetuning samples.
    #[serde(default = "default_seeds")]
    pub seeds: Vec<u64>,
    /// Data on which `score` measures the layers.
    pub calibration: Calibration,
    /// Settings of the graph rewrite.
    #[serde(default)]
    pub prune: PruneSection,
    /// Data and recipes of finetuning.
    pub finetune: SweepFinetune,
    /// Benchmark on which all models are compared.
    pub eval: SweepEval,
    /// Keeps every healed model; without it one is removed when its answers are in, and healed again when other questions
    /// are asked. All models are made before the first answer, so there must be room for all of them either way.
    #[serde(default)]
    pub keep_models: bool,
    /// Measures each pruned model's speed; by default the table has the ideal speed-up.
    #[serde(default = "no_bench")]
    pub bench: BenchSection,
    /// Precisions in which every healed model has a row of its own, and targets for which each is written, with the first seed's
    /// models. Needs `keep_models = true`.
    #[serde(default, skip_serializing_if = "ExportSection::is_empty")]
    pub export: ExportSection,
}

/// Data and recipes of finetuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepFinetune {
    /// Conversations in parquet or JSON: a file, a folder or a pattern.
    pub data: PathBuf,
    /// Make one sample of a conversation (`conversation`), or one of each turn (`separate`).
    #[serde(default)]
    pub turns: Turns,
    /// The least values of columns of ratings; other rows are not used.
    #[serde(default)]
    pub min_ratings: BTreeMap<String, f64>,
    /// Columns or keys to ignore.
    #[serde(default)]
    pub ignore_keys: Vec<String>,
    /// The first row that cannot be read ends the run.
    #[serde(default)]
    pub strict: bool,
    /// Image settings that override the model's own files.
    #[serde(default, skip_serializing_if = "ImageSettings::is_default")]
    pub images: ImageSettings,
    /// Number of samples to draw; all by default.
    #[serde(default)]
    pub samples: Option<usize>,
    /// Named recipes.
    #[serde(default = "default_recipes")]
    pub recipes: Vec<String>,
    /// Settings of all recipes, in place of their own.
    #[serde(default)]
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Settings of single recipes, by name, in place of those: each recipe's own best learning rate, for instance.
    #[serde(default)]
    pub recipe_settings: BTreeMap<String, BTreeMap<String, serde_json::Value>>,
    /// The dense model, finetuned on the same samples beside each recipe.
    #[serde(default)]
    pub dense: DenseSection,
    /// Hold back this fraction of the rows, at least 0 and below 1: no model is scored, trained or fitted on them, and the
    /// table has every model's loss on them.
    #[serde(default)]
    pub held_back: f64,
}

impl SweepFinetune {
    /// Options for reading this part of the data; running text in sequences of the default length.
    pub(super) fn data_options(&self, part: DataPart) -> DataOptions {
        let min_ratings = self.min_ratings.clone();
        let ignore_keys = self.ignore_keys.clone();
        DataOptions {
            turns: self.turns,
            min_ratings,
            ignore_keys,
            strict: self.strict,
            images: self.images,
            part,
            ..DataOptions::default()
        }
    }
}

/// Benchmarks that compare the models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepEval {
    /// VLMEvalKit TSV files; they are first read when all models are made.
    pub benchmarks: Vec<PathBuf>,
    #[serde(default)]
    pub settings: EvalSettings,
    /// Data of other kinds than the models are healed on, a column each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<OtherData>,
}

fn cpu() -> String {
    "cpu".to_string()
}

fn default_seeds() -> Vec<u64> {
    vec![42, 43, 44]
}

fn default_recipes() -> Vec<String> {
    vec![DEFAULT_RECIPE.to_string()]
}

fn no_bench() -> BenchSection {
    BenchSection { enabled: false, ..BenchSection::default() }
}

impl Sweep {
    /// Reads a sweep. Its paths become relative to the working folder.
    ///
    /// Errors: as `Recipe::read`.
    pub fn read(path: &Path) -> Result<Self> {
        read_file(path, Self::parse)
    }

    fn parse(text: &str, folder: &Path) -> Result<Self> {
        let mut sweep: Sweep = toml::from_str(text).map_err(|e| Error::invalid("sweep", e.to_string().trim_end()))?;
        sweep.check()?;
        let resolve = |path: &mut PathBuf| *path = folder.join(&*path);
        let resolve_model = |path: &mut PathBuf| *path = HubName::or_in(folder, path);
        resolve_model(&mut sweep.model);
        resolve(&mut sweep.output);
        resolve(&mut sweep.calibration.data);
        resolve(&mut sweep.finetune.data);
        sweep.export.base.iter_mut().for_each(resolve_model);
        sweep.eval.benchmarks.iter_mut().for_each(resolve);
        sweep.eval.other.iter_mut().for_each(|other| resolve(&mut other.data));
        Ok(sweep)
    }

    fn check(&self) -> Result<()> {
        self.device.parse::<Device>()?;
        self.calibration.check()?;
        check_strategies("sweep", &self.strategies)?;
        self.prune.check(&self.strategies)?;
        fn distinct<T: PartialEq + std::fmt::Display>(name: &str, values: &[T]) -> Result<()> {
            if values.is_empty() {
                return Err(Error::invalid("sweep", format!("`{name}` is empty")).remedy("name at least one"));
            }
            let twice = values.iter().enumerate().find(|(place, value)| values[..*place].contains(value));
            twice.map_or(Ok(()), |(_, value)| {
                Err(Error::invalid("sweep", format!("`{name}` has {value} twice")).remedy("name it once"))
            })
        }
        distinct("drop_ratios", &self.drop_ratios)?;
        distinct("seeds", &self.seeds)?;
        distinct("recipes", &self.finetune.recipes)?;
        if let Some(ratio) = self.drop_ratios.iter().find(|ratio| !(**ratio > 0.0 && **ratio < 1.0)) {
            return Err(Error::invalid(format!("drop ratio {ratio}"), "must be between 0 and 1, both excluded")
                .remedy("0.25 drops a quarter of the layers"));
        }
        if let Some(name) = self.finetune.recipe_settings.keys().find(|name| !self.finetune.recipes.contains(name)) {
            return Err(Error::invalid(format!("`recipe_settings.{name}`"), "is of a recipe that `recipes` lacks")
                .remedy("add it to `recipes`, or take the section out"));
        }
        if self.eval.benchmarks.is_empty() {
            return Err(Error::invalid("eval", "`benchmarks` is empty").remedy("name at least one file"));
        }
        check_names(&self.eval.benchmarks, &self.eval.other)?;
        self.export.check()?;
        if !self.export.is_empty() && !self.keep_models {
            return Err(Error::invalid("export", "is made of healed models, which the sweep removes")
                .remedy("set `keep_models = true`, or take the section out"));
        }
        parts(self.finetune.held_back)?;
        self.finetune.recipes.iter().try_for_each(|recipe| {
            self.settings_of(recipe, 0)?.check()?;
            self.dense_beside(recipe, 0).map(|_| ())
        })
    }

    /// How the dense model is finetuned beside healing by a recipe, where it is.
    ///
    /// Errors: as `DenseSection::beside`.
    pub(super) fn dense_beside(&self, recipe: &str, seed: u64) -> Result<Option<DenseRecipe>> {
        let dense = &self.finetune.dense;
        let settings = self.settings_of(recipe, seed)?;
        let with = |name: &str| self.settings_of(name, seed);
        dense.enabled.then(|| dense.beside(recipe, &settings, with)).transpose()
    }

    /// A recipe's settings for one seed: its own, overridden by those for all recipes, then by those for this recipe.
    ///
    /// Errors: `Error::Invalid` for an unknown recipe or setting.
    pub fn settings_of(&self, recipe: &str, seed: u64) -> Result<Settings> {
        let own = self.finetune.recipe_settings.get(recipe);
        let tables = std::iter::once(&self.finetune.settings).chain(own).map(|settings| {
            toml::Table::try_from(settings).map_err(|e| Error::invalid("finetune settings", e.to_string()))
        });
        let tables = tables.collect::<Result<Vec<_>>>()?;
        Ok(RecipeRow::named(recipe)?.settings_with(tables)?.with(|settings| settings.seed = seed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWEEP: &str = r#"
        model = "model"
        output = "../out"
        drop_ratios = [0.1, 0.25]
        strategies = ["interlace", "interlace-loss"]
        calibration = { data = "data/train.parquet", samples = 100 }
        [finetune]
        data = "data/train.parquet"
        recipes = ["paper", "best"]
        settings = { optimizer = { learning_rate = 1e-3 }, schedule = { epochs = 2 } }
        recipe_settings = { best = { optimizer = { learning_rate = 2e-3 } } }
        [eval]
        benchmarks = ["data/bench.tsv"]
    "#;

    #[test]
    fn settings_of_a_recipe_override_settings_of_the_sweep() {
        let sweep = Sweep::parse(SWEEP, Path::new("fixtures")).unwrap();
        assert_eq!(sweep.finetune.data, Path::new("fixtures/data/train.parquet"));
        assert_eq!((sweep.seeds.len(), sweep.bench.enabled), (3, false));
        let paper = sweep.settings_of("paper", 7).unwrap();
        assert_eq!((paper.peak_rate(), paper.schedule.epochs, paper.seed, paper.losses().len()), (1e-3, 2, 7, 1));
        let best = sweep.settings_of("best", 8).unwrap();
        assert_eq!((best.peak_rate(), best.schedule.epochs, best.losses().len()), (2e-3, 2, 2));
    }

    #[test]
    fn invalid_sweep_files_are_refused_with_a_reason() {
        let cases = [
            ("[0.1, 0.25]", "[]", "`drop_ratios` is empty"),
            ("model = \"model\"", "model = \"model\"\nvariant = \"int4\"", "writes the variant `q4`"),
            ("[0.1, 0.25]", "[0.1, 1.5]", "drop ratio 1.5"),
            ("[0.1, 0.25]", "[0.1, 0.1]", "0.1 twice"),
            ("\"interlace-loss\"", "\"magic\"", "strategy `magic`"),
            ("\"paper\", \"best\"", "\"paper\"", "recipe_settings.best"),
            ("\"paper\"", "\"worst\"", "recipe `worst`"),
            ("epochs = 2", "epoch = 2", "epoch"),
            ("epochs = 2", "epochs = 0", "`schedule.epochs`"),
            ("samples = 100", "sample = 100", "unknown field `sample`"),
            ("[eval]", "[export]\nprecision = [\"int4\"]\n[eval]", "keep_models = true"),
            ("[eval]", "[export]\nprecision = [\"int3\"]\n[eval]", "`int3` is none of"),
        ];
        for (from, to, want) in cases {
            assert!(SWEEP.contains(from), "{from}");
            let error = Sweep::parse(&SWEEP.replacen(from, to, 1), Path::new("")).unwrap_err().to_string();
            assert!(error.contains(want), "{to}: {error}");
        }
    }
}
