//! Makes, heals and measures the models of the best plans.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::analysis;
use crate::base::{Error, Provenance, Result, ScratchDir, sha256_json};
use crate::bundle::{Bundle, BundleWriter, Deepstack, Record, Role, Tower};
use crate::data::{DataOptions, DataPart, Processor, Sample};
use crate::eval::{PictureSettings, Spread, StageOptions, StageTimes, stage_times};
use crate::finetune;
use crate::method::select::{Measures, Strategy};
use crate::method::{AnswerMeter, EmbeddedAnswers, Plan as LayerPlan, Scores};
use crate::onnx;
use crate::pipeline::recipe::Calibration;
use crate::pipeline::stages::{Healing, Stages};
use crate::pipeline::steps::{self, Drop, HowMany, PlanSettings, Trained};
use crate::pipeline::store::Finished;
use crate::rewrite::drop_layers;

use super::costs::size_bytes;
use super::predict::Predictor;
use super::quality::{encoded, samples_of};
use super::report::images_in_words;
use super::solve::TunePoint;
use super::target::Figures;

/// Finetunes a candidate. A program that refers to [`with_torch`] links LibTorch.
#[derive(Clone, Copy)]
pub struct Healer(fn(&mut Stages, &Finished, &Healing) -> Result<Finished>);

/// The healer that trains in LibTorch.
pub fn with_torch() -> Healer {
    Healer(|stages, model, healing| stages.heal(model, healing))
}

/// Data and settings with which candidates are healed.
#[derive(Clone, Debug, Serialize)]
pub struct Healed {
    /// Conversations: a file, a folder or a pattern.
    pub data: PathBuf,
    /// Options for reading them; the part is set by the search.
    pub options: DataOptions,
    /// Samples to draw; all without it.
    pub samples: Option<usize>,
    /// The recipe's settings.
    pub settings: finetune::Settings,
}

/// Measures the held-back loss of combinations before they are written.
pub struct HeldBack {
    bundle: Bundle,
    meter: AnswerMeter,
    samples: Vec<Sample>,
    /// By tower choice and budget; `None` for a budget that leaves no pixel of a picture.
    answers: BTreeMap<(usize, usize), Option<EmbeddedAnswers>>,
    tower: usize,
    /// Budgets that a held-back picture does not fit, with the reason.
    pub notes: Vec<String>,
}

impl HeldBack {
    /// Reads the held-back samples.
    ///
    /// Errors: as `samples_of` and `AnswerMeter::open`.
    pub fn open(stages: &Stages, calibration: &Calibration, part: DataPart, most: usize) -> Result<Self> {
        let (_, samples, _) = samples_of(&stages.bundle, calibration, part, most)?;
        let samples = samples.into_iter().map(|(sample, _)| sample).collect();
        let meter = AnswerMeter::open(&stages.bundle, &stages.runtime()?, stages.features())?;
        Ok(HeldBack {
            bundle: stages.bundle.clone(),
            meter,
            samples,
            answers: BTreeMap::new(),
            tower: 0,
            notes: Vec::new(),
        })
    }

    /// The loss of an answer token with all choices of a combination, in nats; `None` where a held-back picture does not fit
    /// its budget.
    ///
    /// Errors: as `AnswerMeter`.
    pub fn loss(&mut self, stages: &Stages, predictor: &Predictor, point: TunePoint) -> Result<Option<f64>> {
        let key = (point[1], point[2]);
        if !self.answers.contains_key(&key) {
            if self.tower != point[1] {
                let component = self.bundle.require(Role::VisionEncoder)?;
                let analysis = analysis::analyse(&onnx::load(&self.bundle.path_of(component))?)?;
                match predictor.choice(1, point).dropped.as_slice() {
                    [] => self.meter.replace_vision(&analysis.model)?,
                    dropped => self.meter.replace_vision(&drop_layers(&analysis, dropped)?)?,
                }
                self.tower = point[1];
            }
            let pictures = predictor.choice(2, point);
            let processor = Processor::open_with(&self.bundle, &pictures.images)?;
            if pictures.keep_image_tokens.is_some() {
                self.meter.keep_image_tokens(pictures.keep_image_tokens)?;
            }
            let answers = self.meter.answers(encoded(&processor, &self.samples), stages.cancel);
            if pictures.keep_image_tokens.is_some() {
                self.meter.keep_image_tokens(None)?;
            }
            let answers = match answers {
                Ok(answers) => Some(answers),
                Err(error @ Error::Invalid { .. }) if !pictures.images.is_default() => {
                    let budget = images_in_words(&pictures.images);
                    self.notes
                        .push(format!("no plan with {budget} is made, since a held-back sample does not fit: {error}"));
                    None
                }
                Err(error) => return Err(error),
            };
            self.answers.insert(key, answers);
        }
        let Some(Some(answers)) = self.answers.get(&key) else { return Ok(None) };
        self.meter.loss(answers, &predictor.choice(0, point).dropped, stages.cancel).map(Some)
    }

    /// The loss of a written model.
    ///
    /// Errors: as `AnswerMeter`.
    pub fn loss_of(&self, stages: &Stages, model: &Finished) -> Result<f64> {
        let bundle = model.model().open()?;
        let mut meter = AnswerMeter::open(&bundle, &stages.runtime()?, stages.features())?;
        let answers = meter.answers(encoded(&Processor::open(&bundle)?, &self.samples), stages.cancel)?;
        meter.loss(&answers, &[], stages.cancel)
    }
}

/// Settings of a candidate's step.
#[derive(Serialize)]
struct Changes<'a> {
    decoder: &'a [usize],
    tower: &'a [usize],
    keys: &'a serde_json::Map<String, serde_json::Value>,
}

/// Writes the model of a combination into the work folder, unless it is there; the unchanged model where the combination leaves
/// out image tokens alone, which [`with_fewer_tokens`] does.
///
/// Errors: as `steps::prune` and `BundleWriter::set_pictures`.
pub fn made(stages: &mut Stages, predictor: &Predictor, point: TunePoint) -> Result<Finished> {
    let changes = Changes {
        decoder: &predictor.choice(0, point).dropped,
        tower: &predictor.choice(1, point).dropped,
        keys: &predictor.choice(2, point).keys,
    };
    if changes.decoder.is_empty() && changes.tower.is_empty() && changes.keys.is_empty() {
        return Ok(stages.dense_as_made());
    }
    let step = format!("model-{}", short(&sha256_json(&changes)?));
    let digest = stages.dense.digest.clone();
    let inputs = BTreeMap::from([("model".to_string(), digest.clone())]);
    let head = stages.named(Provenance::new(Record::SCHEMA_VERSION, inputs, &changes)?);
    let (bundle, folder) = (stages.bundle.clone(), stages.store.folder().to_path_buf());
    let done = stages.store.step(&step, &step, &[("model", &digest)], &changes, |target| {
        let scratch = ScratchDir::create_in(&folder)?;
        let mut model = bundle;
        let parts: [(&[usize], Tower); 2] = [(changes.decoder, Tower::Text), (changes.tower, Tower::Vision)];
        let steps_left =
            |from: usize| parts[from..].iter().any(|(layers, _)| !layers.is_empty()) || !changes.keys.is_empty();
        for (number, (layers, tower)) in parts.into_iter().enumerate().filter(|(_, (layers, _))| !layers.is_empty()) {
            let to = if steps_left(number + 1) { scratch.path().join(tower.name()) } else { target.to_path_buf() };
            steps::prune(&model, &Drop::Layers { tower, layers }, Deepstack::Keep, None, &to)?;
            model = Bundle::open(&to)?;
        }
        if changes.keys.is_empty() {
            return Ok(());
        }
        let mut writer = BundleWriter::create(&model, target)?;
        writer.set_pictures(changes.keys)?;
        writer.commit(head)
    })?;
    stages.report_step(&step, &done);
    Ok(done)
}

/// The model with the part of the image tokens that its combination reads, unless that is written; the model itself where it reads
/// all. It comes behind healing, which reads all.
///
/// Errors: as `steps::keep_image_tokens`.
pub fn with_fewer_tokens(
    stages: &mut Stages,
    predictor: &Predictor,
    point: TunePoint,
    model: Finished,
) -> Result<Finished> {
    let Some(keep) = predictor.choice(2, point).keep_image_tokens else { return Ok(model) };
    let step = format!("tokens-{}", short(&sha256_json(&(&model.digest, keep))?));
    let done = stages.store.step(&step, &step, &[("model", &model.digest)], &keep, |target| {
        steps::keep_image_tokens(&model.model().open()?, keep, target).map(drop)
    })?;
    stages.report_step(&step, &done);
    Ok(done)
}

/// Finetunes a candidate, unless that is done.
///
/// Errors: as `steps::finetune`.
pub fn heal(
    stages: &mut Stages,
    healer: Healer,
    healed: &Healed,
    (predictor, point): (&Predictor, TunePoint),
    scores: &Finished,
    model: &Finished,
) -> Result<Finished> {
    let choice = predictor.choice(0, point);
    let plan = match choice.strategy.as_deref() {
        None => None,
        Some(strategy) => Some(layer_plan(stages, strategy, &choice.dropped, scores)?),
    };
    let digest = plan.as_ref().map(sha256_json).transpose()?;
    let trained = match (&plan, &digest) {
        (Some(plan), Some(digest)) => Trained::Plan { plan, digest },
        _ => Trained::Layers(None),
    };
    let step = format!("healed-{}", short(&sha256_json(&(&model.digest, healed))?));
    let options = DataOptions { part: stages.part, ..healed.options.clone() };
    let healing = Healing {
        step: &step,
        work: &step,
        trained,
        key: ("plan", digest.as_deref().unwrap_or("all")),
        data: &healed.data,
        options: &options,
        samples: healed.samples,
        settings: &healed.settings,
    };
    (healer.0)(stages, model, &healing)
}

/// The plan of a set of layers: the strategy's own one, with the layers that it trains, or, for a strategy that measures
/// losses, that of the list.
fn layer_plan(stages: &Stages, strategy: &str, dropped: &[usize], scores: &Finished) -> Result<LayerPlan> {
    let row = Strategy::named(strategy)?;
    let own = row.measures == Measures::Nothing;
    let settings = PlanSettings {
        strategy: if own { strategy } else { "explicit" }.to_string(),
        how_many: if own { HowMany::DropCount(dropped.len()) } else { HowMany::Drop(dropped.to_vec()) },
        seed: 42,
        samples: None,
        fit_tokens: None,
        data: None,
        modality_weights: None,
        as_released: false,
        beyond_structure: own && row.goes_beyond,
    };
    let read = Scores::read(&scores.path)?;
    steps::plan(&stages.dense, Some((&read, scores.digest.clone())), &settings, None)
}

/// Figures of a model and of the unchanged one, measured in alternating rounds.
///
/// Errors: as `stage_times`.
pub fn measured(
    stages: &Stages,
    model: &Finished,
    question: &Sample,
    options: &StageOptions,
) -> Result<(Figures, Figures)> {
    let models = [model.model(), stages.model.clone()];
    let own = [PictureSettings::default()];
    let times = stage_times(&models, &own, question, options, &stages.runtime()?, stages.cancel)?;
    let figures = |times: &[StageTimes], size_bytes: u64| {
        let median = |part: fn(&StageTimes) -> f64| Spread::of(&times.iter().map(part).collect::<Vec<_>>()).median;
        let step = median(|times| times.step_ms).max(f64::MIN_POSITIVE);
        Figures { ttft_ms: median(|times| times.ttft_ms), tokens_per_s: 1000.0 / step, size_bytes }
    };
    let size = size_bytes(&model.model().open()?)?;
    Ok((figures(&times[0][0], size), figures(&times[1][0], size_bytes(&stages.bundle)?)))
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}
