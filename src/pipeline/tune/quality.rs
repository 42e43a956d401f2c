//! What every choice costs in quality: the loss of right answers on calibration samples, measured once.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::{self, Analysis};
use crate::base::{Cancel, Error, Progress, Provenance, Result};
use crate::bundle::{Bundle, Role, Tower};
use crate::data::{
    Amount, DataOptions, DataPart, Dataset, Encoded, ImageSettings, Processor, Sample, Subset, picture_budgets,
};
use crate::method::select::{Measures, Strategy};
use crate::method::{AnswerMeter, EmbeddedAnswers, Plan, Scores};
use crate::onnx;
use crate::pipeline::recipe::Calibration;
use crate::pipeline::stages::Stages;
use crate::pipeline::steps::{self, HowMany, Meter, PlanSettings};
use crate::pipeline::store::Finished;
use crate::rewrite::drop_layers;

/// Picture budgets that are kept, the model's own aside.
const MOST_BUDGETS: usize = 5;
/// Parts of the image tokens that are tried.
const KEPT_PARTS: [f64; 3] = [0.75, 0.5, 0.25];

/// `quality.json`: the choices on every axis with their losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Quality {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Calibration samples that were used.
    pub samples: usize,
    /// Index in the data of the sample whose question times are measured with: of median length under the model's own
    /// settings.
    pub question: usize,
    /// Mean loss of an answer token of the unchanged model, in nats.
    pub loss: f64,
    /// Choices by axis, in the order of `AXES`; the first choice on each axis changes nothing.
    pub axes: Vec<Vec<Choice>>,
    /// Loss without each layer of the vision tower alone, in nats, `null` for one that cannot be dropped; empty where the
    /// tower is not searched.
    pub tower_layers: Vec<Option<f64>>,
    /// Why an axis has no choice, and samples that were left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Quality {
    /// Version of the schema of `quality.json`.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// A choice on an axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Dropped layers of the axis's tower.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<usize>,
    /// Strategy that chose the decoder's layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<String>,
    /// The picture budget.
    #[serde(default, skip_serializing_if = "ImageSettings::is_default")]
    pub images: ImageSettings,
    /// Part of each picture's tokens that the decoder reads; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_image_tokens: Option<f64>,
    /// Keys of the image processor's config with the effect of `images`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub keys: serde_json::Map<String, serde_json::Value>,
    /// Mean loss of an answer token with this choice alone, in nats.
    pub loss: f64,
}

impl Choice {
    fn new(loss: f64) -> Self {
        let (images, keys) = (ImageSettings::default(), serde_json::Map::new());
        Choice { dropped: Vec::new(), strategy: None, images, keep_image_tokens: None, keys, loss }
    }
}

/// A row of the table of axes.
pub struct Axis {
    /// Name in reports.
    pub name: &'static str,
    /// Measures its choices, without the one that changes nothing.
    choices: fn(&mut Measuring) -> Result<Vec<Choice>>,
}

/// All axes.
pub const AXES: [Axis; 3] = [
    Axis { name: "decoder depth", choices: decoder_depth },
    Axis { name: "tower depth", choices: tower_depth },
    Axis { name: "picture budget", choices: picture_tokens },
];

/// How quality is measured.
#[derive(Clone, Debug, Serialize)]
pub struct QualitySettings {
    /// Options for reading the data.
    pub data: DataOptions,
    /// Calibration samples at most.
    pub samples: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// Strategies that choose layers of the decoder.
    pub strategies: Vec<String>,
}

/// The model on its calibration samples.
struct Measuring<'s, 'a> {
    stages: &'s mut Stages<'a>,
    settings: &'s QualitySettings,
    calibration: &'s Calibration,
    scores: Finished,
    meter: AnswerMeter,
    samples: Vec<Sample>,
    answers: EmbeddedAnswers,
    /// Tokens of all samples under the model's own settings.
    tokens: usize,
    tower_layers: Vec<Option<f64>>,
    notes: Vec<String>,
}

/// A sample and its number of tokens.
type CountedSample = (Sample, usize);

/// Samples for a part of the data, with their number of tokens under the model's own settings, and how many were left out.
///
/// Errors: as `Dataset::open_for`; `Error::Unsupported` for data without conversations; `Error::Invalid` where no sample
/// can be used.
pub fn samples_of(
    bundle: &Bundle,
    calibration: &Calibration,
    part: DataPart,
    most: usize,
) -> Result<(Dataset, Vec<CountedSample>, usize)> {
    let subject = || format!("data `{}`", calibration.data.display());
    let dataset = Dataset::open_for(&calibration.data, bundle, &calibration.data_options(part))?;
    if dataset.holds_tensors() || dataset.holds_text() {
        return Err(Error::unsupported(subject(), "holds no conversations, and times depend on the picture processor")
            .remedy("give questions about pictures with their answers"));
    }
    let processor = Processor::open(bundle)?;
    let subset = Subset { amount: Amount::Samples(most.min(dataset.len())), seed: calibration.seed };
    let mut found = Vec::new();
    let (mut left_out, mut reason) = (0, None);
    for sample in dataset.read(&dataset.draw(subset)?)? {
        match sample.and_then(|sample| processor.encode_conversation(&sample).map(|encoded| (sample, encoded.len()))) {
            Ok(sample) => found.push(sample),
            Err(error @ (Error::Invalid { .. } | Error::Io { .. })) => {
                left_out += 1;
                reason.get_or_insert(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    if found.is_empty() {
        let problem = format!("no sample can be used: {}", reason.unwrap_or_else(|| "there is none".to_string()));
        return Err(Error::invalid(subject(), problem).remedy("look at the data"));
    }
    Ok((dataset, found, left_out))
}

/// Conversations under image settings.
pub fn encoded<'s>(processor: &'s Processor, samples: &'s [Sample]) -> impl Iterator<Item = Result<Encoded>> + 's {
    samples.iter().map(|sample| processor.encode_conversation(sample))
}

/// Measures all choices.
///
/// Errors: as [`samples_of`], `method::score`, `steps::plan` and `AnswerMeter`.
pub fn measure(stages: &mut Stages, settings: &QualitySettings, calibration: &Calibration) -> Result<Quality> {
    let (dataset, found, left_out) = samples_of(&stages.bundle, calibration, stages.part, settings.samples)?;
    let (samples, tokens): (Vec<Sample>, Vec<usize>) = found.into_iter().unzip();
    let question = question(&samples, &tokens);
    let counts: Vec<usize> = (1..stages.dense.num_layers).collect();
    let calibration = &Calibration { samples: Some(settings.samples.min(dataset.len())), ..calibration.clone() };
    let scores = stages.scores(calibration, &settings.strategies, &counts)?;
    let mut meter = AnswerMeter::open(&stages.bundle, &stages.runtime()?, stages.features())?;
    let answers = meter.answers(encoded(&Processor::open(&stages.bundle)?, &samples), stages.cancel)?;
    let loss = meter.loss(&answers, &[], stages.cancel)?;
    let mut notes = Vec::new();
    if left_out > 0 {
        notes.push(format!("{left_out} calibration samples cannot be read and are left out"));
    }
    let count = samples.len();
    let inputs =
        BTreeMap::from([("model".to_string(), stages.dense.digest.clone()), ("data".to_string(), dataset.digest()?)]);
    let tokens = tokens.iter().sum();
    let question = samples[question].index;
    let mut measuring = Measuring {
        stages,
        settings,
        calibration,
        scores,
        meter,
        samples,
        answers,
        tokens,
        tower_layers: Vec::new(),
        notes,
    };
    let mut axes = Vec::with_capacity(AXES.len());
    for axis in &AXES {
        let mut choices = vec![Choice::new(loss)];
        choices.extend((axis.choices)(&mut measuring)?);
        measuring.stages.note(&format!("{}: {} choices", axis.name, choices.len()));
        axes.push(choices);
    }
    let Measuring { tower_layers, notes, .. } = measuring;
    let provenance = stages.named(Provenance::new(Quality::SCHEMA_VERSION, inputs, settings)?);
    Ok(Quality { provenance, samples: count, question, loss, axes, tower_layers, notes })
}

/// The sample of median length, of those with a picture where there are any.
fn question(samples: &[Sample], tokens: &[usize]) -> usize {
    let mut order: Vec<usize> = (0..samples.len()).filter(|&at| !samples[at].images.is_empty()).collect();
    if order.is_empty() {
        order = (0..samples.len()).collect();
    }
    order.sort_by_key(|&at| tokens[at]);
    order.get(order.len() / 2).copied().unwrap_or(0)
}

/// Sets of decoder layers by their number, of each strategy; of several sets of one number the one with the least loss.
fn decoder_depth(own: &mut Measuring) -> Result<Vec<Choice>> {
    let mut best: BTreeMap<usize, Choice> = BTreeMap::new();
    let cancel = own.stages.cancel;
    for name in &own.settings.strategies {
        let sets = sets_of(own, Strategy::named(name)?)?;
        let progress = Progress::new("decoder depth", "choices", sets.len() as u64);
        for dropped in sets {
            let loss = own.meter.loss(&own.answers, &dropped, cancel)?;
            progress.advance(1);
            let count = dropped.len();
            if best.get(&count).is_none_or(|known| loss < known.loss) {
                best.insert(count, Choice { dropped, strategy: Some(name.clone()), ..Choice::new(loss) });
            }
        }
    }
    Ok(best.into_values().collect())
}

/// The sets that a strategy drops, by rising number, as far as it goes. One that measures losses removes layer by layer,
/// up to half of them.
fn sets_of(own: &mut Measuring, strategy: &Strategy) -> Result<Vec<Vec<usize>>> {
    let scores = Scores::read(&own.scores.path)?;
    let layers = own.stages.dense.num_layers;
    let settings = |count: usize| PlanSettings {
        strategy: strategy.name.to_string(),
        how_many: HowMany::DropCount(count),
        seed: own.settings.seed,
        samples: None,
        fit_tokens: None,
        data: None,
        modality_weights: None,
        as_released: false,
        beyond_structure: strategy.goes_beyond,
    };
    let digest = own.scores.digest.clone();
    let plan = |count: usize, meter: Option<&mut Meter>| -> Result<Option<Plan>> {
        match steps::plan(&own.stages.dense, Some((&scores, digest.clone())), &settings(count), meter) {
            Ok(plan) => Ok(Some(plan)),
            // The strategy finds no set of this number.
            Err(Error::Invalid { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    };
    if strategy.measures == Measures::Nothing {
        let mut sets = Vec::new();
        // A decoder of one layer cannot be analysed again.
        for count in 1..layers.saturating_sub(1) {
            match plan(count, None)? {
                Some(plan) => sets.push(plan.drop),
                None => break,
            }
        }
        return Ok(sets);
    }
    let options = own.calibration.data_options(own.stages.part);
    let data = (own.calibration.data.as_path(), &options);
    let drawn = (own.calibration.samples, own.settings.seed, crate::method::FIT_TOKENS);
    let mut meter = Meter::open(&own.stages.bundle, strategy, data, drawn, own.stages.device, own.stages.cancel)?;
    for count in [layers / 2, layers / 3, layers / 4, 1] {
        let Some(plan) = plan(count.max(1), Some(&mut meter))? else { continue };
        let mut sets: Vec<Vec<usize>> = Vec::new();
        for group in &plan.groups {
            let mut set = sets.last().cloned().unwrap_or_default();
            set.extend(&group.drop);
            set.sort_unstable();
            sets.push(set);
        }
        return Ok(sets);
    }
    Ok(Vec::new())
}

/// The vision encoder's graph with its layers; `None`, with the reason, where the tower cannot be searched.
fn tower(bundle: &Bundle, has_pictures: bool) -> Result<std::result::Result<Analysis, String>> {
    let Some(component) = bundle.component(Role::VisionEncoder) else {
        let reason = "losses are measured by exchanging the vision encoder's graph, and the model has none of its own";
        return Ok(Err(reason.to_string()));
    };
    if !has_pictures {
        return Ok(Err("no calibration sample has a picture".to_string()));
    }
    Ok(match analysis::analyse(&onnx::load(&bundle.path_of(component))?) {
        Ok(analysis) if analysis.map.layers.len() < 2 => Err("the vision encoder has one layer".to_string()),
        Ok(analysis) => Ok(analysis),
        Err(error) => Err(error.to_string()),
    })
}

/// Sets of tower layers by their number, up to half of the tower: those whose removal alone raises the loss least.
fn tower_depth(own: &mut Measuring) -> Result<Vec<Choice>> {
    let has_pictures = own.samples.iter().any(|sample| !sample.images.is_empty());
    let analysis = match tower(&own.stages.bundle, has_pictures)? {
        Ok(analysis) => analysis,
        Err(reason) => {
            own.notes.push(format!("tower depth is not searched: {reason}"));
            return Ok(Vec::new());
        }
    };
    let count = analysis.map.layers.len();
    let bundle = own.stages.bundle.clone();
    let processor = Processor::open(&bundle)?;
    let mut usable = Vec::new();
    let most = count / 2;
    let progress = Progress::new("tower depth", "choices", (count + most) as u64);
    for layer in 0..count {
        let loss = match steps::drop_refusal(&bundle, &analysis, Tower::Vision, &[layer]) {
            Some(error) => {
                own.notes.push(format!("layer {layer} of the tower stays: {error}"));
                None
            }
            None => match own.without_tower_layers(&analysis, &[layer], &processor) {
                Ok(loss) => Some(loss),
                // The decoder reads a feature of this layer, and there is none without it.
                Err(error @ Error::Invalid { .. }) => {
                    own.notes.push(format!("layer {layer} of the tower stays: {error}"));
                    None
                }
                Err(error) => return Err(error),
            },
        };
        usable.extend(loss.map(|loss| (layer, loss)));
        own.tower_layers.push(loss);
        progress.advance(1);
    }
    usable.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut choices = Vec::new();
    for number in 1..=most.min(usable.len()) {
        let mut dropped: Vec<usize> = usable[..number].iter().map(|(layer, _)| *layer).collect();
        dropped.sort_unstable();
        if steps::drop_refusal(&bundle, &analysis, Tower::Vision, &dropped).is_some() {
            break;
        }
        let loss = if number == 1 { usable[0].1 } else { own.without_tower_layers(&analysis, &dropped, &processor)? };
        choices.push(Choice { dropped, ..Choice::new(loss) });
        progress.advance(1);
    }
    own.meter.replace_vision(&analysis.model)?;
    Ok(choices)
}

impl Measuring<'_, '_> {
    fn without_tower_layers(&mut self, analysis: &Analysis, layers: &[usize], processor: &Processor) -> Result<f64> {
        self.meter.replace_vision(&drop_layers(analysis, layers)?)?;
        self.loss_of(processor)
    }

    /// The loss with the vision encoder as it is now, and a processor.
    fn loss_of(&mut self, processor: &Processor) -> Result<f64> {
        let cancel: &Cancel = self.stages.cancel;
        let answers = self.meter.answers(encoded(processor, &self.samples), cancel)?;
        self.meter.loss(&answers, &[], cancel)
    }
}

/// Picture budgets, and behind them parts of the image tokens that the decoder reads.
fn picture_tokens(own: &mut Measuring) -> Result<Vec<Choice>> {
    let mut choices = picture_budget(own)?;
    choices.extend(fewer_tokens(own)?);
    Ok(choices)
}

/// Parts of each picture's tokens, chosen by the token pruner.
fn fewer_tokens(own: &mut Measuring) -> Result<Vec<Choice>> {
    let bundle = own.stages.bundle.clone();
    let reason = match bundle.component(Role::TokenPruner) {
        _ if own.samples.iter().all(|sample| sample.images.is_empty()) => "no calibration sample has a picture".into(),
        Some(part) => format!("`{}` does so already", part.file),
        None => match steps::token_pruner_of(&bundle, KEPT_PARTS[0]) {
            Ok(_) => String::new(),
            Err(error @ (Error::Unsupported { .. } | Error::Invalid { .. })) => error.to_string(),
            Err(error) => return Err(error),
        },
    };
    if !reason.is_empty() {
        own.notes.push(format!("image tokens are not left out behind the tower: {reason}"));
        return Ok(Vec::new());
    }
    let processor = Processor::open(&bundle)?;
    let mut choices = Vec::new();
    for keep in KEPT_PARTS {
        own.meter.keep_image_tokens(Some(keep))?;
        let loss = own.loss_of(&processor)?;
        choices.push(Choice { keep_image_tokens: Some(keep), ..Choice::new(loss) });
    }
    own.meter.keep_image_tokens(None)?;
    Ok(choices)
}

/// Picture budgets with fewer tokens than the model's own one, by falling number of tokens.
fn picture_budget(own: &mut Measuring) -> Result<Vec<Choice>> {
    let picture = own.samples.iter().find_map(|sample| sample.images.first()).cloned();
    let Some(picture) = picture else {
        own.notes.push("picture budgets are not searched: no calibration sample has a picture".to_string());
        return Ok(Vec::new());
    };
    let mut by_tokens: BTreeMap<usize, (Processor, Choice)> = BTreeMap::new();
    for budget in picture_budgets(&own.stages.bundle, &picture)? {
        let processor = Processor::open_with(&own.stages.bundle, &budget.settings)?;
        let tokens: Result<usize> = encoded(&processor, &own.samples).map(|one| one.map(|one| one.len())).sum();
        match tokens {
            Ok(tokens) if tokens < own.tokens => {
                let choice = Choice { images: budget.settings, keys: budget.keys, ..Choice::new(0.0) };
                by_tokens.entry(tokens).or_insert((processor, choice));
            }
            Ok(_) | Err(Error::Invalid { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    if by_tokens.is_empty() {
        let problem = "no setting of this model's image processor gives these pictures fewer tokens";
        own.notes.push(format!("picture budgets are not searched: {problem}"));
    }
    let all: Vec<(Processor, Choice)> = by_tokens.into_values().rev().collect();
    let stride = all.len().div_ceil(MOST_BUDGETS).max(1);
    let progress = Progress::new("picture budgets", "choices", all.len().div_ceil(stride) as u64);
    let mut choices = Vec::new();
    // The smallest budget is always among them.
    let first = all.len().saturating_sub(1) % stride;
    for (processor, choice) in all.into_iter().skip(first).step_by(stride) {
        match own.loss_of(&processor) {
            Ok(loss) => choices.push(Choice { loss, ..choice }),
            Err(error @ (Error::Engine { .. } | Error::Invalid { .. })) => {
                own.notes.push(format!("a picture budget is left out, since the graphs do not take it: {error}"));
            }
            Err(error) => return Err(error),
        }
        progress.advance(1);
    }
    Ok(choices)
}
