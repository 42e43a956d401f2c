//! `tune.json`: the prediction for every choice, the front, and the candidates that were made and measured.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Provenance, human_bytes};
use crate::data::ImageSettings;

use super::costs::Costs;
use super::predict::Predictor;
use super::solve::TunePoint;
use super::target::{Figures, TuneTarget};

/// The content of `tune.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TuneReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The limits.
    pub targets: Vec<TuneTarget>,
    /// What every part costs here.
    pub costs: Costs,
    /// The unchanged model.
    pub whole: TunePlan,
    /// The plan with the least predicted loss within the limits.
    pub best: TunePlan,
    /// Plans that no other plan beats in time and loss at once, the fastest first: by time to the first token, or by the
    /// first target.
    pub front: Vec<TunePlan>,
    /// The best plan within the limits that uses a single axis, for each axis that has one.
    pub single_axis: Vec<NamedPlan>,
    /// About a quarter of the layers or of the image tokens left out, one axis at a time and two.
    pub quarters: Vec<NamedPlan>,
    /// Models that were made and measured; empty after `--replan`.
    pub candidates: Vec<Candidate>,
    /// Index in `candidates` of the model that was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<usize>,
    /// Loss of the unchanged model on the held-back samples, in nats of an answer token; absent after `--replan`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_loss: Option<f64>,
    /// Axes without a choice, and why; samples that were left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl TuneReport {
    /// Version of the schema of `tune.json`.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// A combination of choices with its prediction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TunePlan {
    #[serde(skip)]
    pub(super) point: TunePoint,
    /// Dropped decoder layers.
    pub decoder: Vec<usize>,
    /// Dropped layers of the vision tower.
    pub tower: Vec<usize>,
    /// Picture budget; empty for the model's own.
    pub images: ImageSettings,
    /// Part of each picture's tokens that the decoder reads; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_image_tokens: Option<f64>,
    /// Image tokens of the measured question that the decoder reads.
    pub image_tokens: usize,
    /// Predicted figures.
    pub predicted: Figures,
    /// Predicted loss on the calibration samples, in nats of an answer token.
    pub predicted_loss: f64,
    /// Predicted likelihood of an answer token over that of the unchanged model.
    pub predicted_kept: f64,
    /// Loss on the held-back samples before any healing, in nats of an answer token; absent where it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_loss: Option<f64>,
}

/// A plan with a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NamedPlan {
    /// What it leaves out.
    pub name: String,
    /// The plan.
    pub plan: TunePlan,
}

/// A model that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// Its plan.
    pub plan: TunePlan,
    /// True for the best plan that uses decoder depth alone, made for comparison.
    pub depth_alone: bool,
    /// True after finetuning.
    pub healed: bool,
    /// Measured figures.
    pub measured: Figures,
    /// Figures of the unchanged model, measured in the same rounds.
    pub whole_measured: Figures,
    /// Loss on the held-back samples, after healing where it is healed, in nats of an answer token.
    pub held_back_loss: f64,
    /// Likelihood of an answer token on them over that of the unchanged model.
    pub held_back_kept: f64,
    /// True where the measured figures are within all limits.
    pub meets: bool,
}

impl TunePlan {
    /// The plan of a combination.
    pub(super) fn of(predictor: &Predictor, point: TunePoint) -> Self {
        TunePlan {
            point,
            decoder: predictor.choice(0, point).dropped.clone(),
            tower: predictor.choice(1, point).dropped.clone(),
            images: predictor.choice(2, point).images,
            keep_image_tokens: predictor.choice(2, point).keep_image_tokens,
            image_tokens: predictor.image_tokens(point),
            predicted: predictor.figures(point),
            predicted_loss: predictor.loss(point),
            predicted_kept: predictor.kept(point),
            held_back_loss: None,
        }
    }

    /// What it changes, in words: `without decoder layers 8 10 and tower layer 3, pictures with --max-pixels 50176`.
    pub fn shown(&self) -> String {
        let layers = |of: &str, list: &[usize]| {
            let numbers = list.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
            (!list.is_empty()).then(|| format!("{of} layer{} {numbers}", if list.len() == 1 { "" } else { "s" }))
        };
        let tokens = self.keep_image_tokens.map(|keep| format!("{:.0}% of the image tokens", 100.0 * (1.0 - keep)));
        let gone: Vec<String> =
            [layers("decoder", &self.decoder), layers("tower", &self.tower), tokens].into_iter().flatten().collect();
        let gone = (!gone.is_empty()).then(|| format!("without {}", gone.join(" and ")));
        let pictures = (!self.images.is_default()).then(|| format!("pictures with {}", images_in_words(&self.images)));
        let parts: Vec<String> = [gone, pictures].into_iter().flatten().collect();
        if parts.is_empty() { "nothing left out".to_string() } else { parts.join(", ") }
    }

    /// True for the unchanged model.
    pub fn is_whole(&self) -> bool {
        self.decoder.is_empty() && self.tower.is_empty() && self.images.is_default() && self.keep_image_tokens.is_none()
    }
}

/// Image settings as their flags.
pub fn images_in_words(images: &ImageSettings) -> String {
    let number = |flag: &str, value: Option<usize>| value.map(|value| format!("--{flag} {value}"));
    let parts = [
        number("min-pixels", images.min_pixels),
        number("max-pixels", images.max_pixels),
        number("image-size", images.image_size),
        images.tiles.map(|tiles| format!("--image-tiles {tiles}")),
        number("max-image-tiles", images.max_tiles),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

impl Costs {
    /// Time of every part, a row each, the first one a head.
    pub fn cells(&self) -> Vec<Vec<String>> {
        let Some(budget) = self.budgets.first() else { return Vec::new() };
        let ms = |value: f64| format!("{value:.3}");
        let mut rows = vec![["part", "ms to the first token", "ms of a further token"].map(String::from).to_vec()];
        let mut row = |name: String, first: f64, step: Option<f64>| {
            rows.push(vec![name, ms(first), step.map(ms).unwrap_or_default()]);
        };
        row("one decoder layer".to_string(), budget.decoder_layer_ms, Some(budget.step_layer_ms));
        if self.tower_layers > 0 {
            row("one tower layer".to_string(), budget.tower_layer_ms, None);
        }
        if let Some(token) = self.image_token_ms() {
            row("one image token, tower included".to_string(), token, None);
        }
        row("decoder without layers".to_string(), budget.decoder_rest_ms, Some(budget.step_rest_ms));
        row("tower without layers".to_string(), budget.tower_rest_ms, None);
        row("picture and tokenizer".to_string(), budget.prepare_ms, None);
        row("embedding and the rest".to_string(), budget.other_ms, None);
        let name = format!("whole model, {} prompt tokens, {} of pictures", budget.prompt_tokens, budget.image_tokens);
        row(name, budget.ttft_ms.median, Some(budget.step_ms.median));
        rows
    }

    /// True where a part's time is below 0, by noise.
    pub fn is_noisy(&self) -> bool {
        let rest = |own: &super::costs::BudgetCosts| {
            [own.decoder_rest_ms, own.step_rest_ms, own.tower_rest_ms, own.other_ms].into_iter().any(|time| time < 0.0)
        };
        self.budgets.first().is_some_and(rest) || self.image_token_ms().is_some_and(|time| time < 0.0)
    }
}

impl TuneReport {
    /// The plans, a row each, the first one a head.
    pub fn plan_cells(&self) -> Vec<Vec<String>> {
        let head =
            ["plan", "ms to first token", "tokens per s", "size", "image tokens", "loss", "kept", "held-back loss"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let mut add = |name: &str, plan: &TunePlan| {
            let Figures { ttft_ms, tokens_per_s, size_bytes } = plan.predicted;
            rows.push(vec![
                format!("{name}: {}", plan.shown()),
                format!("{ttft_ms:.2}"),
                format!("{tokens_per_s:.1}"),
                human_bytes(size_bytes),
                plan.image_tokens.to_string(),
                format!("{:.4}", plan.predicted_loss),
                format!("{:.1}%", 100.0 * plan.predicted_kept),
                plan.held_back_loss.map(|loss| format!("{loss:.4}")).unwrap_or_default(),
            ]);
        };
        add("whole model", &self.whole);
        add("best", &self.best);
        self.single_axis.iter().for_each(|named| add(&format!("{} alone", named.name), &named.plan));
        self.quarters.iter().for_each(|named| add(&named.name, &named.plan));
        rows
    }

    /// The front, a row each, the first one a head.
    pub fn front_cells(&self) -> Vec<Vec<String>> {
        let head = ["front", "ms to first token", "tokens per s", "size", "kept"];
        let mut rows = vec![head.map(String::from).to_vec()];
        rows.extend(self.front.iter().map(|plan| {
            vec![
                plan.shown(),
                format!("{:.2}", plan.predicted.ttft_ms),
                format!("{:.1}", plan.predicted.tokens_per_s),
                human_bytes(plan.predicted.size_bytes),
                format!("{:.1}%", 100.0 * plan.predicted_kept),
            ]
        }));
        rows
    }

    /// The measured models, a row each, the first one a head; empty without any.
    pub fn candidate_cells(&self) -> Vec<Vec<String>> {
        if self.candidates.is_empty() {
            return Vec::new();
        }
        let head = [
            "measured",
            "ms to first token",
            "predicted",
            "whole now",
            "tokens per s",
            "predicted",
            "size",
            "held-back loss",
            "kept",
            "",
        ];
        let mut rows = vec![head.map(String::from).to_vec()];
        for (number, own) in self.candidates.iter().enumerate() {
            let marks = [
                (self.chosen == Some(number), "chosen"),
                (own.healed, "healed"),
                (own.depth_alone, "depth alone"),
                (!own.meets, "misses the target"),
            ];
            let marks: Vec<&str> = marks.into_iter().filter(|(holds, _)| *holds).map(|(_, mark)| mark).collect();
            rows.push(vec![
                own.plan.shown(),
                format!("{:.2}", own.measured.ttft_ms),
                format!("{:.2}", own.plan.predicted.ttft_ms),
                format!("{:.2}", own.whole_measured.ttft_ms),
                format!("{:.1}", own.measured.tokens_per_s),
                format!("{:.1}", own.plan.predicted.tokens_per_s),
                human_bytes(own.measured.size_bytes),
                format!("{:.4}", own.held_back_loss),
                format!("{:.1}%", 100.0 * own.held_back_kept),
                marks.join(", "),
            ]);
        }
        rows
    }
}
