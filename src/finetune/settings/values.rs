//! Settings of a finetuning run, one table for each concern. The defaults are the method's values.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Error, Result};

use super::learning_rate::LearningRate;
use crate::finetune::loss::{LossKind, TeacherOutput};
use crate::finetune::optim::{Constants, OptimizerKind, Schedule};

/// Largest `batch.size`, `batch.accumulation_steps` and `schedule.epochs`, and largest `schedule.max_steps`.
const MOST: u64 = 1 << 20;
const MOST_STEPS: u64 = 1 << 40;

/// Number format of the forward and backward passes. Trained weights and the optimiser's state are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision throughout.
    F32,
    /// Matrix products and activations in bf16; weights, gradients and losses in f32.
    Bf16,
}

impl Precision {
    /// The format of a run whose settings name none: bf16 on a GPU, of whatever compute capability, f32 on a CPU.
    pub fn usual(device: Device) -> Self {
        match device {
            Device::Cpu => Precision::F32,
            Device::Cuda(_) => Precision::Bf16,
        }
    }

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Bytes of a number of the residual stream.
    pub fn bytes(self) -> u64 {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// Rank, scale and seed of adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    pub rank: u32,
    pub alpha: f64,
    pub seed: u64,
}

impl Lora {
    /// Factor of the product `A B`: `alpha / rank`.
    pub fn scale(self) -> f64 {
        self.alpha / f64::from(self.rank.max(1))
    }
}

/// Layers with adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LoraLayers {
    /// The layers that the plan trains.
    #[default]
    Trained,
    /// Every layer of the pruned model.
    All,
}

/// Form in which trained weights of a quantised model are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WriteTrained {
    /// Float products in place of the quantised ones. No trained number is rounded.
    #[default]
    Float,
    /// Quantised again by the weight's own bits, blocks, range and zero points. Changes below half a step are lost.
    Quantised,
}

impl WriteTrained {
    fn is_float(&self) -> bool {
        *self == WriteTrained::Float
    }
}

/// A stage of a run with its own loss terms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Share of the steps; the shares of all stages add up to 1.
    #[serde(default = "whole")]
    pub share: f64,
    /// Loss terms and their weights. When all stages use only `anchor` and `hidden`, the layers are trained one after
    /// the other, each on the output stream of the finished layers before it; every layer takes all epochs.
    pub losses: BTreeMap<LossKind, f64>,
}

fn whole() -> f64 {
    1.0
}

/// Training samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataSettings {
    /// Share of the drawn samples to train on.
    pub share: f64,
    /// Maximum number of tokens per sample, image tokens included. Longer samples are left out and counted in the
    /// report.
    pub max_tokens: u32,
    /// Groups samples of similar length into batches, which reduces padding.
    pub group_by_length: bool,
    /// Number of tokens to train on, image tokens included. Takes drawn samples, in the order of the draw, up to this
    /// number; all by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_tokens: Option<u64>,
}

/// Number of samples of an optimiser step, and how they are computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchSettings {
    /// Samples per forward pass.
    pub size: u32,
    /// Forward passes per optimiser step.
    pub accumulation_steps: u32,
    /// Keeps only each layer's input and recomputes the layer in the backward pass: less memory, more time. When unset,
    /// the run's plan decides: it is on when the products convert frozen weights to f32, or when a memory limit
    /// requires it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_checkpointing: Option<bool>,
}

/// Optimiser and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSettings {
    /// `adamw`, `adamw-8bit`, or `muon` for matrices with AdamW for all other weights.
    pub kind: OptimizerKind,
    /// Peak learning rate: a number, a list of candidates that are each tried for a full pass, or `"auto"` for a search
    /// with short trials. Typical rates of networks with a few million parameters are 1e-4 to 2e-3 with AdamW and 1e-2
    /// to 3e-2 with Muon.
    pub learning_rate: LearningRate,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the gradients' running mean: AdamW's first moment, Muon's momentum.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// AdamW's epsilon, added to the square root of the second moment.
    pub epsilon: f64,
    /// Maximum global L2 norm of the gradients; larger gradients are scaled down to it. 0 disables clipping.
    pub max_grad_norm: f64,
    /// Share of the last steps over which the written weights are averaged; 0 writes the weights after the last step.
    /// Use it with a schedule that keeps the learning rate constant.
    pub average_last: f64,
}

/// Length of a run and schedule of the learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleSettings {
    /// Learning rate schedule.
    pub kind: Schedule,
    /// Share of all steps over which the learning rate rises from 0 to its peak.
    pub warmup_ratio: f64,
    /// Number of passes over the data.
    pub epochs: u32,
    /// Maximum number of optimiser steps. It overrides `epochs`, and the schedule spans these steps. When layers are
    /// trained one after the other, they divide the steps equally, each with its own schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Number of optimiser steps between two checkpoints; 0 writes one only when the run is stopped.
    pub checkpoint_every: u64,
}

/// The least-squares fit before the first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FitSettings {
    /// Fits the last products of each trained layer, whose results add up to the layer's output, to the dense model's
    /// stream by least squares before the first step. When layers are trained one after the other, it fits each layer's
    /// last product before the layer's first step. Without a stage the run ends after the fit.
    pub enabled: bool,
    /// Maximum number of tokens of the fit per input feature of the widest product.
    pub tokens_per_feature: u32,
    /// Maximum number of tokens of the fit; overrides `tokens_per_feature`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// Low-rank adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSettings {
    /// Rank of low-rank adapters that are trained instead of the weights; 0 trains the weights. The written model
    /// contains the sum of weights and adapters.
    pub rank: u32,
    /// Scale of the adapters before the division by the rank.
    pub alpha: f64,
    /// Layers with adapters: `trained`, or `all` layers of the decoder.
    pub layers: LoraLayers,
}

/// The `kd` term.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KdSettings {
    /// Softmax temperature of teacher and student.
    pub temperature: f64,
    /// Number of the teacher's most likely tokens that the term compares; the probabilities of all other tokens are
    /// added into one class.
    pub top_k: u32,
}

/// Settings of a finetuning run. Together with the model, the layers and the data they determine its result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Seed for the order of the samples and for the adapters.
    pub seed: u64,
    /// Number format of matrix products and activations: `f32` or `bf16`. When unset, the run takes bf16 on a GPU and f32 on
    /// a CPU, and its report names the one that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// Trains the weight of the head in addition to the layers. The authors' released code does so for models whose
    /// head is not tied to the embeddings.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub train_head: bool,
    /// Form in which trained weights of a quantised model are written: `float` or `quantised`.
    #[serde(skip_serializing_if = "WriteTrained::is_float")]
    pub write_trained: WriteTrained,
    /// Training samples.
    pub data: DataSettings,
    /// Number of samples of an optimiser step.
    pub batch: BatchSettings,
    /// Optimiser and its parameters.
    pub optimizer: OptimizerSettings,
    /// Length of the run and schedule of the learning rate.
    pub schedule: ScheduleSettings,
    /// The least-squares fit before the first step.
    pub fit: FitSettings,
    /// Low-rank adapters instead of the weights.
    pub lora: LoraSettings,
    /// The `kd` term.
    pub kd: KdSettings,
    /// Stages of the run, one after the other, each with its loss terms. The learning rate schedule spans all stages.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

impl Default for DataSettings {
    fn default() -> Self {
        DataSettings { share: 1.0, max_tokens: 8192, group_by_length: false, step_tokens: None }
    }
}

impl Default for BatchSettings {
    fn default() -> Self {
        BatchSettings { size: 16, accumulation_steps: 2, gradient_checkpointing: None }
    }
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        OptimizerSettings {
            kind: OptimizerKind::AdamW,
            learning_rate: LearningRate::One(1e-5),
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            average_last: 0.0,
        }
    }
}

impl Default for ScheduleSettings {
    fn default() -> Self {
        let kind = Schedule::Cosine;
        ScheduleSettings { kind, warmup_ratio: 0.03, epochs: 1, max_steps: None, checkpoint_every: 100 }
    }
}

impl Default for FitSettings {
    fn default() -> Self {
        FitSettings { enabled: false, tokens_per_feature: 128, tokens: None }
    }
}

impl Default for LoraSettings {
    fn default() -> Self {
        LoraSettings { rank: 0, alpha: 16.0, layers: LoraLayers::Trained }
    }
}

impl Default for KdSettings {
    fn default() -> Self {
        KdSettings { temperature: 2.0, top_k: 64 }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            seed: 42,
            precision: None,
            train_head: false,
            write_trained: WriteTrained::default(),
            data: DataSettings::default(),
            batch: BatchSettings::default(),
            optimizer: OptimizerSettings::default(),
            schedule: ScheduleSettings::default(),
            fit: FitSettings::default(),
            lora: LoraSettings::default(),
            kd: KdSettings::default(),
            stages: Stage::only([(LossKind::Ce, 1.0)]),
        }
    }
}

impl Stage {
    /// The single stage of a run with these loss terms.
    pub fn only(losses: impl IntoIterator<Item = (LossKind, f64)>) -> Vec<Stage> {
        vec![Stage { share: 1.0, losses: losses.into_iter().collect() }]
    }
}

impl Settings {
    /// Returns the settings with `change` applied.
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The number format of a run on `device`.
    pub fn precision_on(&self, device: Device) -> Precision {
        self.precision.unwrap_or_else(|| Precision::usual(device))
    }

    /// These settings with what a run on `device` takes where they leave it open.
    pub fn for_device(self, device: Device) -> Self {
        let precision = self.precision_on(device);
        self.with(|settings| settings.precision = Some(precision))
    }

    /// Checks the range of every value.
    ///
    /// Errors: `Error::Invalid` with the setting, its value and the allowed range.
    pub fn check(&self) -> Result<()> {
        let Settings { data, batch, optimizer, schedule, fit, lora, kd, .. } = self;
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        let numbers = [
            ("data.share", data.share, data.share > 0.0 && data.share <= 1.0, "above 0 and at most 1"),
            ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0.0, "0 or more"),
            ("optimizer.beta1", optimizer.beta1, below_one(optimizer.beta1), "at least 0 and below 1"),
            ("optimizer.beta2", optimizer.beta2, below_one(optimizer.beta2), "at least 0 and below 1"),
            ("optimizer.epsilon", optimizer.epsilon, optimizer.epsilon > 0.0, "above 0"),
            ("optimizer.max_grad_norm", optimizer.max_grad_norm, optimizer.max_grad_norm >= 0.0, "0 or more"),
            ("optimizer.average_last", optimizer.average_last, share(optimizer.average_last), "between 0 and 1"),
            ("schedule.warmup_ratio", schedule.warmup_ratio, share(schedule.warmup_ratio), "between 0 and 1"),
            ("kd.temperature", kd.temperature, kd.temperature > 0.0, "above 0"),
            ("lora.alpha", lora.alpha, lora.alpha > 0.0, "above 0"),
        ];
        let wrong = |name: &str, problem: String| Err(Error::invalid(format!("finetune setting `{name}`"), problem));
        // Steps compute in f32.
        let in_f32 = |value: f64| (value as f32).is_finite() && (value == 0.0 || value as f32 != 0.0);
        for (name, value, fits, want) in numbers {
            if !(fits && in_f32(value)) {
                let want = if fits && value.is_finite() { "in the range of f32" } else { want };
                return wrong(name, format!("is {value:?}, must be {want}"));
            }
        }
        optimizer.learning_rate.check()?;
        let counts = [
            ("data.max_tokens", u64::from(data.max_tokens), u64::MAX),
            ("batch.size", u64::from(batch.size), MOST),
            ("batch.accumulation_steps", u64::from(batch.accumulation_steps), MOST),
            ("schedule.epochs", u64::from(schedule.epochs), MOST),
            ("schedule.max_steps", schedule.max_steps.unwrap_or(1), MOST_STEPS),
            ("kd.top_k", u64::from(kd.top_k), u64::MAX),
            ("fit.tokens_per_feature", u64::from(fit.tokens_per_feature), u64::MAX),
            ("fit.tokens", fit.tokens.unwrap_or(1), u64::MAX),
            ("data.step_tokens", data.step_tokens.unwrap_or(1), u64::MAX),
        ];
        for (name, value, most) in counts {
            let problem = match value {
                0 => "is 0, must be at least 1".to_string(),
                value if value > most => format!("is {value}, must be at most {most}"),
                _ => continue,
            };
            return wrong(name, problem);
        }
        self.check_stages()?;
        if self.train_head && !self.losses().keys().any(|kind| kind.looks_at_answers()) {
            let problem = "is set, and no loss term looks at answers, which alone move the head";
            return Err(Error::invalid("finetune setting `train_head`", problem)
                .remedy("take a recipe with `ce`, such as `paper`, or leave it out"));
        }
        if lora.layers == LoraLayers::All && (lora.rank == 0 || self.layer_by_layer() || !self.trains()) {
            let problem = "is `all`, which wants a `lora.rank` and a loss term that looks at answers";
            return Err(Error::invalid("finetune setting `lora.layers`", problem)
                .remedy("for instance `--recipe best --lora-rank 16 --lora-layers all`"));
        }
        Ok(())
    }

    fn check_stages(&self) -> Result<()> {
        let wrong = |name: &str, problem: String| Err(Error::invalid(format!("finetune setting `{name}`"), problem));
        for Stage { share, losses } in &self.stages {
            if !(*share > 0.0 && *share <= 1.0) {
                return wrong("stage.share", format!("is {share}, must be above 0 and at most 1"));
            }
            for (loss, weight) in losses {
                if !(weight.is_finite() && *weight >= 0.0) {
                    return wrong(&format!("stage.losses.{}", loss.name()), format!("is {weight}, must be 0 or more"));
                }
            }
            if !losses.values().any(|&weight| weight > 0.0) {
                return Err(Error::invalid("finetune setting `stage.losses`", "no term has a weight above 0")
                    .remedy("for instance `[[stage]]` with `losses = { ce = 1.0 }`"));
            }
        }
        let sum: f64 = self.stages.iter().map(|stage| stage.share).sum();
        match (self.stages.is_empty(), self.fit.enabled) {
            (true, true) => Ok(()),
            (true, false) => Err(Error::invalid("finetune setting `stage`", "there is none, and no fit")
                .remedy("add `[[stage]]` with `losses = { ce = 1.0 }`, or set `fit.enabled`")),
            (false, _) if (sum - 1.0).abs() > 1e-6 => {
                wrong("stage.share", format!("the shares make {sum}, must make 1"))
            }
            (false, _) => Ok(()),
        }
    }

    /// True when the run has optimiser steps; false when it ends after the fit.
    pub fn trains(&self) -> bool {
        !self.stages.is_empty()
    }

    /// Loss terms of all stages, each with its largest weight.
    pub fn losses(&self) -> BTreeMap<LossKind, f64> {
        let mut losses = BTreeMap::new();
        for (&loss, &weight) in self.stages.iter().flat_map(|stage| &stage.losses).filter(|(_, weight)| **weight > 0.0)
        {
            let most = losses.entry(loss).or_insert(weight);
            *most = most.max(weight);
        }
        losses
    }

    /// True when no loss term reads answers. The layers are then trained one after the other.
    pub fn layer_by_layer(&self) -> bool {
        let losses = self.losses();
        !losses.is_empty() && losses.keys().all(|kind| kind.row().teacher == TeacherOutput::Stream)
    }

    /// True when a loss term reads this output of the dense model.
    pub(crate) fn reads(&self, output: TeacherOutput) -> bool {
        self.losses().iter().any(|(kind, weight)| *weight > 0.0 && kind.row().teacher == output)
    }

    /// True when logits at answer positions are needed, for a loss term or to compare learning rates.
    pub fn looks_at_answers(&self) -> bool {
        let asked = self.losses().keys().any(|kind| kind.row().teacher != TeacherOutput::Stream);
        asked || self.optimizer.learning_rate.is_searched()
    }

    /// Settings of each stage of a run of `total` steps, with the number of steps from the start of the run to the end
    /// of the stage.
    pub fn by_stage(&self, total: u64) -> Vec<(u64, Settings)> {
        let mut done = 0.0;
        let stages = self.stages.iter().map(|stage| {
            done += stage.share;
            let end = ((done * total as f64).round() as u64).min(total);
            (end, self.clone().with(|settings| settings.stages = vec![Stage { share: 1.0, ..stage.clone() }]))
        });
        stages.collect()
    }

    /// Weight of a loss term: the largest over the stages, 0 when no stage uses it.
    pub fn weight(&self, loss: LossKind) -> f64 {
        self.losses().get(&loss).copied().unwrap_or(0.0)
    }

    /// The peak learning rate; the first of several candidates.
    pub fn peak_rate(&self) -> f64 {
        self.optimizer.learning_rate.candidates(self.optimizer.kind).first().copied().unwrap_or_default()
    }

    /// Maximum number of tokens of a fit whose widest product has `widest` input features.
    pub fn fit_budget(&self, widest: u64) -> u64 {
        self.fit.tokens.unwrap_or(widest.saturating_mul(u64::from(self.fit.tokens_per_feature)))
    }

    /// The optimisers' constants.
    pub fn constants(&self) -> Constants {
        let OptimizerSettings { beta1, beta2, epsilon, weight_decay, .. } = self.optimizer;
        Constants { beta1, beta2, epsilon, weight_decay }
    }

    /// Rank, scale and seed of the adapters; `None` without adapters.
    pub fn lora(&self) -> Option<Lora> {
        let LoraSettings { rank, alpha, .. } = self.lora;
        (rank > 0 && self.trains()).then_some(Lora { rank, alpha, seed: self.seed })
    }

    /// The layers that get new weights, of `count` layers: all of them with adapters on all layers, else those asked for.
    pub fn trained_layers(&self, asked: &[usize], count: usize) -> Vec<usize> {
        match self.lora() {
            Some(_) if self.lora.layers == LoraLayers::All => (0..count).collect(),
            _ => asked.to_vec(),
        }
    }

    /// Samples per optimiser step.
    pub fn samples_per_step(&self) -> usize {
        (self.batch.size as usize).saturating_mul(self.batch.accumulation_steps as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_settings_are_valid_and_round_trip_through_json() {
        let settings = Settings::default();
        settings.check().unwrap();
        let text = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), settings);
        assert_eq!(serde_json::from_str::<Settings>("{}").unwrap(), settings);
    }

    #[test]
    fn products_are_in_bf16_on_a_gpu_and_in_f32_on_a_cpu_unless_the_settings_name_a_format() {
        let read = |text: &str| toml::from_str::<Settings>(text).unwrap();
        let both = |text: &str| [Device::Cpu, Device::Cuda(1)].map(|device| read(text).precision_on(device).name());
        assert_eq!(both(""), ["f32", "bf16"]);
        assert_eq!(both("precision = \"f32\""), ["f32", "f32"]);
        assert_eq!(both("precision = \"bf16\""), ["bf16", "bf16"]);
        // The settings of a run name what it took, and do so in the form of files that always named it.
        let taken = |device| toml::to_string(&Settings::default().for_device(device)).unwrap();
        assert!(taken(Device::Cpu).contains("precision = \"f32\""), "{}", taken(Device::Cpu));
        assert!(taken(Device::Cuda(0)).contains("precision = \"bf16\""), "{}", taken(Device::Cuda(0)));
        assert!(!toml::to_string(&Settings::default()).unwrap().contains("precision"));
        assert!(toml::from_str::<Settings>("precision = \"auto\"").is_err());
    }

    #[test]
    fn a_setting_out_of_range_is_named() {
        type Case = (fn(&mut Settings), &'static str);
        let cases: [Case; 11] = [
            (|s| s.optimizer.learning_rate = LearningRate::One(0.0), "optimizer.learning_rate"),
            (|s| s.optimizer.learning_rate = LearningRate::One(f64::NAN), "optimizer.learning_rate"),
            (|s| s.optimizer.learning_rate = LearningRate::Several(Vec::new()), "optimizer.learning_rate"),
            (|s| s.optimizer.beta2 = 1.0, "optimizer.beta2"),
            (|s| s.schedule.warmup_ratio = 1.5, "schedule.warmup_ratio"),
            (|s| s.batch.size = 0, "batch.size"),
            (|s| s.stages = Stage::only([(LossKind::Ce, -1.0)]), "stage.losses.ce"),
            (|s| s.stages[0].losses.clear(), "stage.losses"),
            (|s| s.stages.clear(), "stage"),
            (|s| s.data.share = 0.0, "data.share"),
            (|s| s.optimizer.average_last = 1.5, "optimizer.average_last"),
        ];
        for (change, name) in cases {
            let message = Settings::default().with(change).check().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
        }
    }

    #[test]
    fn stages_divide_the_steps_by_their_shares() {
        let stage = |share, kind| Stage { share, ..Stage::only([(kind, 1.0)])[0].clone() };
        let staged = |stages| Settings { stages, ..Settings::default() };
        let settings = staged(vec![stage(0.2, LossKind::Anchor), stage(0.5, LossKind::Ce), stage(0.3, LossKind::Kd)]);
        settings.check().unwrap();
        let ends = |total| settings.by_stage(total).iter().map(|(end, _)| *end).collect::<Vec<_>>();
        assert_eq!(ends(10), [2, 7, 10]);
        assert_eq!(ends(3), [1, 2, 3]);
        assert_eq!(settings.by_stage(10)[1].1.stages, Stage::only([(LossKind::Ce, 1.0)]));
        assert_eq!(settings.losses().len(), 3);
        assert_eq!(Settings::default().by_stage(7), [(7, Settings::default())]);
        let error = staged(vec![stage(0.2, LossKind::Ce)]).check().unwrap_err().to_string();
        assert!(error.contains("make 0.2, must make 1"), "{error}");
    }

    #[test]
    fn an_unknown_setting_is_refused() {
        for text in [r#"{"optimizer": {"learning_rats": 1}}"#, r#"{"learning_rats": 1}"#] {
            let error = serde_json::from_str::<Settings>(text).unwrap_err().to_string();
            assert!(error.contains("learning_rats"), "{error}");
        }
    }
}
