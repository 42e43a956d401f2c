//! What a finetuning run can be told, with the method's values as defaults.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

use crate::finetune::loss::{LossKind, Teacher};
use crate::finetune::optim::{Constants, OptimizerKind, Schedule};

/// Number format of the forward and backward pass; trained weights and the optimiser's state are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    F32,
    /// Matrix products in bf16, sums and weights in f32.
    Bf16,
}

/// Rank, scale and seed of adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    pub rank: u32,
    pub alpha: f64,
    pub seed: u64,
}

impl Lora {
    /// Factor of `A B`.
    pub fn scale(self) -> f64 {
        self.alpha / f64::from(self.rank.max(1))
    }
}

/// Layers with adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LoraLayers {
    /// Those that the plan names.
    #[default]
    Trained,
    /// Every layer that is left.
    All,
}

impl LoraLayers {
    fn is_trained(&self) -> bool {
        *self == LoraLayers::Trained
    }
}

/// A part of a run with loss terms of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Part of the steps; the shares of all stages make 1.
    pub share: f64,
    /// Loss terms and their weights.
    pub losses: BTreeMap<LossKind, f64>,
}

/// Everything that decides the result of a finetuning run, apart from the model, the layers and the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Peak learning rate. Networks of a few million parameters want 1e-4 to 2e-3 with AdamW, 1e-2 to 3e-2 with Muon.
    pub learning_rate: f64,
    /// Peak learning rates to choose from, in place of `learning_rate`: the one with the lowest loss in a pass of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub learning_rates: Vec<f64>,
    /// How gradients become steps: `adamw`, or `muon` for matrices with AdamW for all else.
    pub optimizer: OptimizerKind,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the gradients' mean: AdamW's first moment, Muon's momentum.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// AdamW's epsilon, added to the root of the second moment.
    pub epsilon: f64,
    /// How the learning rate moves over the steps.
    pub schedule: Schedule,
    /// Part of all steps over which the learning rate rises from 0 to its peak.
    pub warmup_ratio: f64,
    /// Gradients are scaled down to this global L2 norm; 0 leaves them as they are.
    pub max_grad_norm: f64,
    /// Samples in one forward pass.
    pub batch_size: u32,
    /// Forward passes per optimiser step.
    pub accumulation_steps: u32,
    /// Passes over the data.
    pub epochs: u32,
    /// Stops after this many optimiser steps, whatever `epochs` says; the schedule then spans these. Where layers are healed
    /// one after the other, each has an equal part of them and a schedule of its own.
    pub max_steps: Option<u64>,
    /// Samples with more tokens, images included, are left out and counted in the report.
    pub max_tokens: u32,
    /// Puts samples of about the same length into one batch, so that less is padded.
    pub group_by_length: bool,
    /// Seed of the order of the samples.
    pub seed: u64,
    /// Number format of matrix products.
    pub precision: Precision,
    /// Keeps only each layer's input and computes the layer again in the backward pass: less memory, more time. Unset, the
    /// run's plan decides: where frozen weights are widened in each product, or a memory limit asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_checkpointing: Option<bool>,
    /// Trains low-rank adapters of this rank beside the weights of the layers, in place of these weights; 0 trains the
    /// weights. What is written holds the sum of both.
    #[serde(skip_serializing_if = "none")]
    pub lora_rank: u32,
    /// Factor of the adapters, before it is divided by the rank.
    pub lora_alpha: f64,
    /// Beside which layers' weights adapters are: `trained` or `all` of the decoder.
    #[serde(skip_serializing_if = "LoraLayers::is_trained")]
    pub lora_layers: LoraLayers,
    /// Trains the weight of the head besides the layers. The authors' released code does so for models whose head is not tied
    /// to the embeddings.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub train_head: bool,
    /// Gives the mean of the weights behind this part of the steps, the last ones, in place of the weights behind the last
    /// step; 0 gives these. It wants a schedule that keeps the learning rate up.
    pub average_last: f64,
    /// Part of the drawn samples that is trained on.
    pub data_share: f64,
    /// Trains on as many of these, in the order of the draw, as hold this many tokens, images included; on all by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_tokens: Option<u64>,
    /// Before the first step, fits the products that each trained layer's output is a sum of to the dense model's stream
    /// by least squares; where layers are healed one after the other, the last product of each before its own first step.
    /// With no loss term the run ends there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fit: bool,
    /// Most tokens that the fit looks at, for each number that a product reads.
    pub fit_tokens_per_feature: u32,
    /// Most tokens that the fit looks at, in place of `fit_tokens_per_feature`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fit_tokens: Option<u64>,
    /// Loss terms and their weights. With terms that read the residual stream alone, such as `anchor` and `hidden`, each
    /// trained layer is healed by itself, one after the other, on the stream that those before it give in the end; every
    /// layer takes all `epochs`.
    pub losses: BTreeMap<LossKind, f64>,
    /// Parts of the run, one after the other, each with loss terms of its own, in place of `losses`. The learning rate
    /// moves over all of them as over one run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
    /// Softmax temperature of the `kd` term, for teacher and student alike.
    pub kd_temperature: f64,
    /// The `kd` term looks at the teacher's this many most likely tokens; the rest count as one more.
    pub kd_top_k: u32,
    /// Optimiser steps between two checkpoints; 0 leaves one only when the run is stopped.
    pub checkpoint_every: u64,
}

fn none(rank: &u32) -> bool {
    *rank == 0
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            learning_rate: 1e-5,
            learning_rates: Vec::new(),
            optimizer: OptimizerKind::AdamW,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.03,
            max_grad_norm: 1.0,
            batch_size: 16,
            accumulation_steps: 2,
            epochs: 1,
            max_steps: None,
            max_tokens: 8192,
            group_by_length: false,
            seed: 42,
            precision: Precision::F32,
            gradient_checkpointing: None,
            lora_rank: 0,
            lora_alpha: 16.0,
            lora_layers: LoraLayers::Trained,
            train_head: false,
            average_last: 0.0,
            data_share: 1.0,
            step_tokens: None,
            fit: false,
            fit_tokens_per_feature: 128,
            fit_tokens: None,
            losses: BTreeMap::from([(LossKind::Ce, 1.0)]),
            stages: Vec::new(),
            kd_temperature: 2.0,
            kd_top_k: 64,
            checkpoint_every: 100,
        }
    }
}

impl Settings {
    /// Checks every value's range.
    ///
    /// Errors: `Error::Invalid` naming the setting, what was given and what it must be.
    pub fn check(&self) -> Result<()> {
        let float = |name: &str, value: f64, fits: bool, want: &str| {
            if fits && value.is_finite() {
                return Ok(());
            }
            Err(Error::invalid(format!("finetune setting `{name}`"), format!("is {value}, must be {want}")))
        };
        float("learning_rate", self.learning_rate, self.learning_rate > 0.0, "above 0")?;
        self.learning_rates.iter().try_for_each(|&rate| float("learning_rates", rate, rate > 0.0, "above 0"))?;
        float("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "0 or more")?;
        float("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "at least 0 and below 1")?;
        float("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "at least 0 and below 1")?;
        float("epsilon", self.epsilon, self.epsilon > 0.0, "above 0")?;
        float("warmup_ratio", self.warmup_ratio, (0.0..=1.0).contains(&self.warmup_ratio), "between 0 and 1")?;
        float("max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0.0, "0 or more")?;
        float("kd_temperature", self.kd_temperature, self.kd_temperature > 0.0, "above 0")?;
        float("lora_alpha", self.lora_alpha, self.lora_alpha > 0.0, "above 0")?;
        let share = (0.0..=1.0).contains(&self.average_last);
        float("average_last", self.average_last, share, "between 0 and 1")?;
        float("data_share", self.data_share, self.data_share > 0.0 && self.data_share <= 1.0, "above 0 and at most 1")?;
        if self.trains() {
            self.check_losses()?;
        }
        if self.lora_layers == LoraLayers::All && (self.lora_rank == 0 || self.layer_by_layer() || !self.trains()) {
            let problem = "is `all`, which wants a `lora_rank` and a loss term that looks at answers";
            return Err(Error::invalid("finetune setting `lora_layers`", problem)
                .remedy("for instance `--recipe best --lora-rank 16 --lora-layers all`"));
        }
        if self.train_head && (self.layer_by_layer() || !self.trains()) {
            let problem = "is set, and no loss term looks at answers, which alone move the head";
            return Err(Error::invalid("finetune setting `train_head`", problem)
                .remedy("take a recipe with `ce`, such as `paper`, or leave it out"));
        }
        let counts = [
            ("batch_size", u64::from(self.batch_size)),
            ("accumulation_steps", u64::from(self.accumulation_steps)),
            ("epochs", u64::from(self.epochs)),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("max_tokens", u64::from(self.max_tokens)),
            ("kd_top_k", u64::from(self.kd_top_k)),
            ("fit_tokens_per_feature", u64::from(self.fit_tokens_per_feature)),
            ("fit_tokens", self.fit_tokens.unwrap_or(1)),
            ("step_tokens", self.step_tokens.unwrap_or(1)),
        ];
        for (name, value) in counts {
            if value == 0 {
                return Err(Error::invalid(format!("finetune setting `{name}`"), "is 0, must be at least 1"));
            }
        }
        Ok(())
    }

    fn check_losses(&self) -> Result<()> {
        let wrong = |name: &str, problem: String| Err(Error::invalid(format!("finetune setting `{name}`"), problem));
        if !self.stages.is_empty() && !self.losses.is_empty() {
            return wrong("stages", "stands beside `losses`, which it is in place of".to_string());
        }
        let single = [(self.losses.clone(), 1.0)];
        let stages = self.stages.iter().map(|stage| (stage.losses.clone(), stage.share));
        let stages: Vec<_> = if self.stages.is_empty() { single.to_vec() } else { stages.collect() };
        for (losses, share) in &stages {
            if !(*share > 0.0 && *share <= 1.0) {
                return wrong("stages", format!("a share is {share}, must be above 0 and at most 1"));
            }
            for (loss, weight) in losses {
                if !(weight.is_finite() && *weight >= 0.0) {
                    return wrong(&format!("losses.{}", loss.name()), format!("is {weight}, must be 0 or more"));
                }
            }
            if !losses.values().any(|&weight| weight > 0.0) {
                return Err(Error::invalid("finetune setting `losses`", "no term has a weight above 0")
                    .remedy("for instance `losses = { ce = 1.0 }`"));
            }
        }
        let sum: f64 = stages.iter().map(|(_, share)| share).sum();
        if (sum - 1.0).abs() > 1e-6 {
            return wrong("stages", format!("the shares make {sum}, must make 1"));
        }
        Ok(())
    }

    /// False for a run that ends with the fit, before any step.
    pub fn trains(&self) -> bool {
        !self.fit || !self.losses.is_empty() || !self.stages.is_empty()
    }

    /// True when no loss term looks at answers: each trained layer is then healed by itself, one after the other.
    pub fn layer_by_layer(&self) -> bool {
        let all = self.of_all_stages();
        let mut asked = all.losses.iter().filter(|(_, weight)| **weight > 0.0).peekable();
        asked.peek().is_some() && asked.all(|(kind, _)| kind.row().teacher == Teacher::Stream)
    }

    /// True when logits at the answers are needed: for a loss term, or to judge learning rates by.
    pub fn looks_at_answers(&self) -> bool {
        let all = self.of_all_stages();
        let mut asked = all.losses.iter().filter(|(_, weight)| **weight > 0.0);
        asked.any(|(kind, _)| kind.row().teacher != Teacher::Stream) || !self.learning_rates.is_empty()
    }

    /// The settings of each stage of a run of `total` steps, with the first step (counted from 0) behind it. A run
    /// without stages is one.
    pub fn by_stage(&self, total: u64) -> Vec<(u64, Settings)> {
        if self.stages.is_empty() {
            return vec![(total, self.clone())];
        }
        let mut done = 0.0;
        let stages = self.stages.iter().map(|stage| {
            done += stage.share;
            let losses = stage.losses.clone();
            let end = ((done * total as f64).round() as u64).min(total);
            (end, Settings { losses, stages: Vec::new(), ..self.clone() })
        });
        stages.collect()
    }

    /// The settings with every loss term that any stage asks for.
    pub fn of_all_stages(&self) -> Settings {
        let mut losses = self.losses.clone();
        for (&loss, &weight) in self.stages.iter().flat_map(|stage| &stage.losses) {
            let most = losses.entry(loss).or_insert(weight);
            *most = most.max(weight);
        }
        Settings { losses, stages: Vec::new(), ..self.clone() }
    }

    /// Most tokens that a fit looks at whose widest product reads `widest` numbers.
    pub fn fit_budget(&self, widest: u64) -> u64 {
        self.fit_tokens.unwrap_or(widest.saturating_mul(u64::from(self.fit_tokens_per_feature)))
    }

    /// The optimisers' constants.
    pub fn constants(&self) -> Constants {
        let Settings { beta1, beta2, epsilon, weight_decay, .. } = *self;
        Constants { beta1, beta2, epsilon, weight_decay }
    }

    /// Rank, scale and seed of the adapters, where there are any.
    pub fn lora(&self) -> Option<Lora> {
        let Settings { lora_rank: rank, lora_alpha: alpha, seed, .. } = *self;
        (rank > 0 && self.trains()).then_some(Lora { rank, alpha, seed })
    }

    /// Samples per optimiser step.
    pub fn samples_per_step(&self) -> usize {
        self.batch_size as usize * self.accumulation_steps as usize
    }

    /// True when a loss term reads this of the dense model.
    pub(crate) fn reads(&self, output: Teacher) -> bool {
        self.losses.iter().any(|(kind, weight)| *weight > 0.0 && kind.row().teacher == output)
    }

    /// Weight of a loss term; 0 where it is not asked for.
    pub fn weight(&self, loss: LossKind) -> f64 {
        self.losses.get(&loss).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_survive_json() {
        let settings = Settings::default();
        settings.check().unwrap();
        let text = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), settings);
        assert_eq!(serde_json::from_str::<Settings>("{}").unwrap(), settings);
    }

    #[test]
    fn a_setting_out_of_range_is_named() {
        type Case = (fn(&mut Settings), &'static str);
        let cases: [Case; 10] = [
            (|s| s.learning_rate = 0.0, "learning_rate"),
            (|s| s.learning_rate = f64::NAN, "learning_rate"),
            (|s| s.beta2 = 1.0, "beta2"),
            (|s| s.warmup_ratio = 1.5, "warmup_ratio"),
            (|s| s.batch_size = 0, "batch_size"),
            (|s| s.losses = BTreeMap::from([(LossKind::Ce, -1.0)]), "losses.ce"),
            (|s| s.losses.clear(), "losses"),
            (|s| s.data_share = 0.0, "data_share"),
            (|s| s.average_last = 1.5, "average_last"),
            (|s| s.stages = vec![Stage { share: 1.0, losses: s.losses.clone() }], "stages"),
        ];
        for (change, name) in cases {
            let mut settings = Settings::default();
            change(&mut settings);
            let message = settings.check().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
        }
    }

    #[test]
    fn stages_share_the_steps() {
        let losses = |kind| BTreeMap::from([(kind, 1.0)]);
        let stage = |share, kind| Stage { share, losses: losses(kind) };
        let staged = |stages| Settings { losses: BTreeMap::new(), stages, ..Settings::default() };
        let settings = staged(vec![stage(0.2, LossKind::Anchor), stage(0.5, LossKind::Ce), stage(0.3, LossKind::Kd)]);
        settings.check().unwrap();
        let ends = |total| settings.by_stage(total).iter().map(|(end, _)| *end).collect::<Vec<_>>();
        assert_eq!(ends(10), [2, 7, 10]);
        assert_eq!(ends(3), [1, 2, 3]);
        assert_eq!(settings.by_stage(10)[1].1.losses, losses(LossKind::Ce));
        assert_eq!(settings.of_all_stages().losses.len(), 3);
        assert_eq!(Settings::default().by_stage(7), [(7, Settings::default())]);
        let error = staged(vec![stage(0.2, LossKind::Ce)]).check().unwrap_err().to_string();
        assert!(error.contains("make 0.2, must make 1"), "{error}");
    }

    #[test]
    fn an_unknown_setting_is_refused() {
        let error = serde_json::from_str::<Settings>(r#"{"learning_rats": 1}"#).unwrap_err().to_string();
        assert!(error.contains("learning_rats"), "{error}");
    }
}
