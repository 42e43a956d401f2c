//! The recipe of a run: a TOML file. An unknown key is an error.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Error, Result};
use crate::bundle::Variants;
use crate::data::{Amount, DataOptions, DataPart, ImageSettings, Turns};
use crate::eval::BenchOptions;
use crate::finetune::{self, DEFAULT_RECIPE, RecipeRow};
use crate::hub::HubName;
use crate::method::select::DEFAULT_STRATEGY;
use crate::method::{ModalityWeights, check_weights};

use super::comparison::{DenseRecipe, DenseSection, OtherData, check_names, parts};
use super::export_section::ExportSection;
use super::prune_section::PruneSection;
use super::steps::{EvalSettings, HowMany};
use super::strategies::{AUTO, AutoSection};

/// `recipe.toml`. Paths are relative to the recipe's own folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The dense model: a folder, one `.onnx` decoder, or `hf:OWNER/NAME[@REVISION]`.
    pub model: PathBuf,
    /// Precision variant of every component of the model, such as `fp16` or `q4`, or one for each that is named, as in
    /// `decoder=q4,vision_encoder=fp16`; the most precise ones by default. `run --variant` overrides it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variants>,
    /// Folder for everything that the run makes; `run -o` overrides it.
    pub output: PathBuf,
    /// `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "cpu")]
    pub device: String,
    /// Data on which `score` measures the layers.
    pub calibration: Calibration,
    /// Number of layers to drop, and the strategies that choose them.
    pub plan: PlanSection,
    /// Settings of the graph rewrite.
    #[serde(default)]
    pub prune: PruneSection,
    /// Data and settings of finetuning.
    pub finetune: FinetuneSection,
    /// Benchmark on which all models are compared.
    pub eval: EvalSection,
    /// Settings of the speed measurement.
    #[serde(default)]
    pub bench: BenchSection,
    /// Other layouts and precisions of the first strategy's finetuned model.
    #[serde(default)]
    pub export: ExportSection,
}

/// Calibration data of the scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
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
    /// Number of samples to draw.
    #[serde(default)]
    pub samples: Option<usize>,
    /// Fraction of the samples to draw, above 0 and at most 1, in place of `samples`.
    #[serde(default)]
    pub fraction: Option<f64>,
    /// Seed of the draw.
    #[serde(default = "default_seed")]
    pub seed: u64,
}

/// Layers to drop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanSection {
    /// The part of the decoder's layers to drop, rounded down to whole layers.
    #[serde(default)]
    pub drop_ratio: Option<f64>,
    /// Number of layers to drop, in place of `drop_ratio`.
    #[serde(default)]
    pub drop_count: Option<usize>,
    /// As few layers as leave the model at most this many parameters.
    #[serde(default)]
    pub target_params: Option<u64>,
    /// As few layers as leave the model's files at most this many bytes.
    #[serde(default)]
    pub target_size: Option<u64>,
    /// As few layers as give the decoder this ideal speed-up, all layers over those that stay.
    #[serde(default)]
    pub target_speedup: Option<f64>,
    /// Strategies; the first is the one whose model the run is for, the others are compared with it. `auto` takes the one of
    /// `auto.candidates` that is best on held-back data after a short healing. By default `auto` where `[finetune]` has
    /// `held_back`, else `shortgpt`.
    #[serde(default)]
    pub strategies: Vec<String>,
    /// The choice of `auto`.
    #[serde(default, skip_serializing_if = "AutoSection::is_default")]
    pub auto: AutoSection,
    /// Seed of the `random` strategy.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Weights of the similarities over `image`, `text` and `all` tokens, each 0 or more; `all` alone by default.
    #[serde(default)]
    pub modality_weights: Option<ModalityWeights>,
    /// Let `interlace-tn`, `random` and `consecutive` choose the last layer too, as the authors' released code does.
    #[serde(default)]
    pub as_released: bool,
    /// Go on where the packs of `interlace`, `interlace-oa` and `interlace-tn` run out: with pairs for `interlace-oa`, then
    /// with single frozen layers.
    #[serde(default)]
    pub beyond_structure: bool,
}

/// Data and settings for finetuning the neighbours of dropped layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FinetuneSection {
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
    /// A named recipe of healing; `settings` change it.
    #[serde(default = "default_healing")]
    pub recipe: String,
    #[serde(default)]
    pub settings: finetune::Settings,
    /// The dense model, finetuned on the same samples.
    #[serde(default)]
    pub dense: DenseSection,
    /// Hold back this fraction of the rows, at least 0 and below 1: no model is scored, trained or fitted on them, and the
    /// table has every model's loss on them.
    #[serde(default)]
    pub held_back: f64,
}

/// Benchmarks that compare the models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalSection {
    /// VLMEvalKit TSV files; they are first read when all models are made.
    pub benchmarks: Vec<PathBuf>,
    #[serde(default)]
    pub settings: EvalSettings,
    /// Data of other kinds than the models are healed on, a column each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<OtherData>,
    /// The run ends with status 1 when the first strategy's finetuned model retains less of the average of the dense model
    /// finetuned on the same samples; of the dense model as it came, where there is no such row.
    #[serde(default)]
    pub min_retention: Option<f64>,
}

/// Measurement of the models' speed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BenchSection {
    /// False leaves the measurement out.
    pub enabled: bool,
    pub settings: BenchOptions,
}

impl Default for BenchSection {
    fn default() -> Self {
        BenchSection { enabled: true, settings: BenchOptions::default() }
    }
}

/// The settings of a table `[finetune]`: those of its recipe, overridden by its own keys.
pub(super) fn finetune_settings(recipe: &str, section: Option<&toml::Value>) -> Result<finetune::Settings> {
    let own = section.and_then(|section| section.get("settings")).and_then(toml::Value::as_table);
    RecipeRow::named(recipe)?.settings_with(own.cloned())
}

impl FinetuneSection {
    /// Options for reading this part of the data; running text in sequences of the default length.
    pub(super) fn data_options(&self, part: DataPart) -> DataOptions {
        DataOptions {
            turns: self.turns,
            min_ratings: self.min_ratings.clone(),
            ignore_keys: self.ignore_keys.clone(),
            strict: self.strict,
            images: self.images,
            part,
            ..DataOptions::default()
        }
    }

    /// How the dense model is finetuned beside healing, where it is.
    ///
    /// Errors: as `DenseSection::beside`.
    pub(super) fn dense_recipe(&self) -> Result<Option<DenseRecipe>> {
        let with = |name: &str| {
            if name == self.recipe { Ok(self.settings.clone()) } else { Ok(RecipeRow::named(name)?.settings()) }
        };
        self.dense.enabled.then(|| self.dense.beside(&self.recipe, &self.settings, with)).transpose()
    }
}

impl Calibration {
    /// Options for reading this part of the data; running text in sequences of the default length.
    pub(super) fn data_options(&self, part: DataPart) -> DataOptions {
        DataOptions {
            turns: self.turns,
            min_ratings: self.min_ratings.clone(),
            ignore_keys: self.ignore_keys.clone(),
            strict: self.strict,
            images: self.images,
            part,
            ..DataOptions::default()
        }
    }

    /// Number of samples to draw.
    pub(super) fn amount(&self) -> Amount {
        match (self.samples, self.fraction) {
            (Some(samples), _) => Amount::Samples(samples),
            (None, part) => Amount::Fraction(part.unwrap_or(1.0)),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        one_of("calibration", ("samples", self.samples.is_some()), ("fraction", self.fraction.is_some()))?;
        if self.samples == Some(0) || self.fraction.is_some_and(|part| !(part > 0.0 && part <= 1.0)) {
            return Err(Error::invalid("calibration", "`samples` must be above 0, `fraction` above 0 and at most 1")
                .remedy("write `samples = 512`, for instance"));
        }
        Ok(())
    }
}

impl PlanSection {
    /// All keys that set the number of layers to drop, with their values.
    pub(super) fn amounts(&self) -> [Option<(&'static str, HowMany)>; 5] {
        [
            self.drop_ratio.map(|ratio| ("drop_ratio", HowMany::DropRatio(ratio))),
            self.drop_count.map(|count| ("drop_count", HowMany::DropCount(count))),
            self.target_params.map(|most| ("target_params", HowMany::TargetParams(most))),
            self.target_size.map(|most| ("target_size", HowMany::TargetSize(most))),
            self.target_speedup.map(|least| ("target_speedup", HowMany::TargetSpeedup(least))),
        ]
    }
}

/// Reads a file of settings with `parse`, whose arguments are the text and the folder for relative
/// paths. Errors name the file.
pub(super) fn read_file<T>(path: &Path, parse: impl FnOnce(&str, &Path) -> Result<T>) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    parse(&text, folder).map_err(|problem| match problem {
        Error::Invalid { subject, problem, remedy } => {
            Error::Invalid { subject: format!("`{}`: {subject}", path.display()), problem, remedy }
        }
        other => other,
    })
}

impl Recipe {
    /// Reads a recipe. Its paths become relative to the working folder.
    ///
    /// Errors: `Error::Io` when unreadable; `Error::Invalid` for text that is not TOML, an unknown or missing key, a
    /// value out of range, or two values that exclude each other.
    pub fn read(path: &Path) -> Result<Self> {
        read_file(path, Self::parse)
    }

    fn parse(text: &str, folder: &Path) -> Result<Self> {
        let invalid = |e: toml::de::Error| {
            Error::invalid("recipe", e.to_string().trim_end())
                .remedy("correct the line; docs/recipes.md and schemas/recipe.schema.json list the keys")
        };
        let table: toml::Table = toml::from_str(text).map_err(invalid)?;
        let settings = table.get("finetune").and_then(|section| section.get("settings"));
        settings.and_then(toml::Value::as_table).map_or(Ok(()), finetune::refuse_moved)?;
        let mut recipe: Recipe = toml::from_str(text).map_err(invalid)?;
        if table.get("plan").and_then(|plan| plan.get("strategies")).is_none() {
            let name = if recipe.finetune.held_back > 0.0 { AUTO } else { DEFAULT_STRATEGY };
            recipe.plan.strategies = vec![name.to_string()];
        }
        recipe.finetune.settings = finetune_settings(&recipe.finetune.recipe, table.get("finetune"))?;
        recipe.check()?;
        let resolve = |path: &mut PathBuf| *path = folder.join(&*path);
        let resolve_model = |path: &mut PathBuf| *path = HubName::or_in(folder, path);
        resolve_model(&mut recipe.model);
        resolve(&mut recipe.output);
        resolve(&mut recipe.calibration.data);
        resolve(&mut recipe.finetune.data);
        recipe.export.base.iter_mut().for_each(resolve_model);
        recipe.eval.benchmarks.iter_mut().for_each(resolve);
        recipe.eval.other.iter_mut().for_each(|other| resolve(&mut other.data));
        Ok(recipe)
    }

    fn check(&self) -> Result<()> {
        self.export.check()?;
        self.device.parse::<Device>()?;
        self.calibration.check()?;
        let plan = &self.plan;
        let amounts: Vec<(&str, HowMany)> = plan.amounts().into_iter().flatten().collect();
        if amounts.len() != 1 {
            let found: Vec<&str> = amounts.iter().map(|(name, _)| *name).collect();
            let found = if found.is_empty() { "none is there".to_string() } else { found.join(" and ") };
            return Err(Error::invalid(
                "plan",
                format!(
                    "takes one of `drop_ratio`, `drop_count`, `target_params`, `target_size` and `target_speedup`, \
                     found {found}"
                ),
            )
            .remedy("write one of them"));
        }
        plan.auto.check(&plan.strategies, self.finetune.held_back)?;
        self.prune.check(&plan.auto.planned(&plan.strategies))?;
        plan.modality_weights.as_ref().map_or(Ok(()), check_weights)?;
        if self.eval.benchmarks.is_empty() {
            return Err(Error::invalid("eval", "`benchmarks` is empty").remedy("name at least one file"));
        }
        check_names(&self.eval.benchmarks, &self.eval.other)?;
        parts(self.finetune.held_back)?;
        self.finetune.settings.check()?;
        self.finetune.dense_recipe().map(|_| ())
    }
}

fn cpu() -> String {
    "cpu".to_string()
}

fn default_seed() -> u64 {
    42
}

fn default_healing() -> String {
    DEFAULT_RECIPE.to_string()
}

/// Errors: `Error::Invalid` unless exactly one of two keys, each with whether it is there, is there.
fn one_of(section: &str, first: (&str, bool), second: (&str, bool)) -> Result<()> {
    if first.1 != second.1 {
        return Ok(());
    }
    let found = if first.1 { "both are there" } else { "neither is there" };
    Err(Error::invalid(section, format!("takes `{}` or `{}`, {found}", first.0, second.0)).remedy("write one of them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: &str = r#"
        model = "model"
        output = "../out"
        [calibration]
        data = "data/train.parquet"
        samples = 100
        [plan]
        drop_ratio = 0.25
        strategies = ["interlace", "random"]
        [finetune]
        data = "data/train.parquet"
        settings = { optimizer = { learning_rate = 1e-3 } }
        [eval]
        benchmarks = ["data/bench.tsv"]
    "#;

    #[test]
    fn paths_are_relative_to_the_recipe() {
        let recipe = Recipe::parse(RECIPE, Path::new("fixtures")).unwrap();
        assert_eq!(recipe.model, Path::new("fixtures/model"));
        assert_eq!(recipe.eval.benchmarks, [Path::new("fixtures/data/bench.tsv")]);
        assert_eq!(recipe.finetune.settings.peak_rate(), 1e-3);
        assert_eq!(recipe.calibration.seed, 42);
    }

    #[test]
    fn a_recipe_without_strategies_chooses_on_held_back_data_where_there_is_some() {
        let without = RECIPE.replace("strategies = [\"interlace\", \"random\"]", "");
        let strategies = |text: &str| Recipe::parse(text, Path::new("")).map(|recipe| recipe.plan.strategies);
        assert_eq!(strategies(&without).unwrap(), [DEFAULT_STRATEGY]);
        assert_eq!(strategies(&without.replace("settings =", "held_back = 0.1\nsettings =")).unwrap(), [AUTO]);
        let none = RECIPE.replace("\"interlace\", \"random\"", "");
        assert!(strategies(&none).unwrap_err().to_string().contains("`strategies` is empty"));
    }

    #[test]
    fn settings_override_the_named_recipe() {
        let text = RECIPE.replace("settings =", "recipe = \"paper\"\nsettings =");
        let section = Recipe::parse(&text, Path::new("")).unwrap().finetune;
        assert_eq!((section.settings.peak_rate(), section.settings.losses().len()), (1e-3, 1));
        let section = Recipe::parse(RECIPE, Path::new("")).unwrap().finetune;
        assert_eq!((section.recipe.as_str(), section.settings.losses().len()), (DEFAULT_RECIPE, 2));
    }

    /// The dense model takes the healing recipe without the fit. A recipe without a loss on answers has no dense
    /// counterpart.
    #[test]
    fn the_dense_model_is_finetuned_on_answers_with_the_same_budget() {
        let dense = |text: &str| {
            let recipe = Recipe::parse(&RECIPE.replace("settings =", text), Path::new("")).unwrap();
            (recipe.finetune.dense_recipe().unwrap(), recipe.finetune)
        };
        let (found, section) = dense("recipe = \"best\"\nsettings =");
        let found = found.unwrap();
        assert_eq!(found.settings, section.settings.clone().with(|settings| settings.fit.enabled = false));
        assert_eq!(found.label("best", Some(4)), "dense, finetuned (4 layers)");
        let (found, section) = dense("recipe = \"fast\"\nsettings =");
        let found = found.unwrap();
        assert_eq!(found.label("fast", None), "dense, finetuned by paper");
        let paper = RecipeRow::named("paper").unwrap().settings();
        let wanted = paper.with(|settings| settings.data.step_tokens = section.settings.data.step_tokens);
        assert_eq!(found.settings, wanted);
        assert_eq!(dense("dense = { enabled = false }\nsettings =").0, None);
    }

    #[test]
    fn invalid_recipe_files_are_refused_with_a_reason() {
        let cases = [
            ("samples = 100", "sample = 100", "unknown field `sample`"),
            ("samples = 100", "", "takes `samples` or `fraction`, neither is there"),
            ("samples = 100", "samples = 100\nfraction = 0.1", "both are there"),
            ("drop_ratio = 0.25", "drop_ratio = 0.25\ntarget_speedup = 1.2", "found drop_ratio and target_speedup"),
            ("drop_ratio = 0.25", "", "found none"),
            ("\"random\"", "\"magic\"", "strategy `magic`"),
            ("\"random\"", "\"auto\"", "none is held back"),
            ("[plan]", "[plan.auto]\nstep_tokens = 5\n[plan]", "`strategies` has no `auto`"),
            ("\"random\"", "\"interlace\"", "occurs twice"),
            ("settings =", "recipe = \"worst\"\nsettings =", "recipe `worst`"),
            ("learning_rate = 1e-3", "learning_rate = -1.0", "`optimizer.learning_rate`"),
            ("{ learning_rate = 1e-3 }", "\"auto\"", "optimizer"),
            ("optimizer = { learning_rate = 1e-3 }", "batch_size = 3", "`[batch] size` for `batch_size`"),
            ("[\"data/bench.tsv\"]", "[]", "`benchmarks` is empty"),
            ("[plan]", "[prune]\ncompensate = \"cubic\"\n[plan]", "unknown variant `cubic`"),
            ("[plan]", "[prune]\ncompensate = \"scalar\"\nrank = 4\n[plan]", "compensation `scalar`: has no rank"),
            ("[plan]", "[prune]\nrank = 4\n[plan]", "has `rank` and no `compensate`"),
            ("settings =", "held_back = 1.0\nsettings =", "finetune.held_back: is 1"),
            ("settings =", "dense = { recipe = \"fast\" }\nsettings =", "no loss on answers"),
            ("[\"data/bench.tsv\"]", "[\"data/bench.tsv\"]\nother = [{ data = \"x/bench.tsv\" }]", "called `bench`"),
            ("model = \"model\"", "model = \"model\"\ndevice = \"tpu\"", "tpu"),
            ("model = \"model\"", "model = \"model\"\nvariant = \"q5\"", "`q5` is none of fp32"),
            ("model = \"model\"", "model = \"model\"\nvariant = \"tower=q4\"", "`tower` is none of vision_encoder"),
        ];
        for (from, to, want) in cases {
            assert!(RECIPE.contains(from), "{from}");
            let error = Recipe::parse(&RECIPE.replacen(from, to, 1), Path::new("")).unwrap_err().to_string();
            assert!(error.contains(want), "{to}: {error}");
        }
    }
}
