//! The steps of a tuning.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::base::{Cancel, Device, Error, Provenance, Result, read_json, table, write_json};
use crate::bundle::{BundleWriter, ModelSource, Record, variant_flag};
use crate::data::{DataPart, Sample};
use crate::eval::StageOptions;
use crate::pipeline::recipe::Calibration;
use crate::pipeline::stages::Stages;
use crate::pipeline::store::Finished;

use super::candidates::{Healed, Healer, HeldBack, heal, made, measured, with_fewer_tokens};
use super::costs::{self, Costs};
use super::predict::Predictor;
use super::quality::{self, AXES, Quality, QualitySettings, samples_of};
use super::report::{Candidate, NamedPlan, TunePlan, TuneReport};
use super::solve::{TunePoint, front, points, ranked};
use super::target::{TuneTarget, all_met};

/// Name of the report in the work folder, without extension.
pub const TUNE_FILE: &str = "tune";

/// Times that stricter plans are made when no candidate meets the target by measurement.
const ATTEMPTS: usize = 3;
/// Plans whose held-back loss is measured before the best are made.
const SHORTLIST: usize = 12;
/// The part of a target that stricter plans leave free.
const MARGIN: f64 = 0.98;

/// Input of a tuning.
pub struct Tune<'a> {
    /// The model.
    pub model: &'a ModelSource,
    /// Calibration data with its draw.
    pub calibration: Calibration,
    /// Calibration samples at most, and as many held-back ones.
    pub samples: usize,
    /// Fraction of the rows on which candidates are compared; nothing else reads them.
    pub held_back: f64,
    /// Strategies that choose layers of the decoder.
    pub strategies: Vec<String>,
    /// The limits, all of which must hold.
    pub targets: Vec<TuneTarget>,
    /// Rounds, generated tokens and threads of every measurement.
    pub options: StageOptions,
    /// Device of every run.
    pub device: Device,
    /// Models to make and measure.
    pub candidates: usize,
    /// Data and recipe for healing.
    pub healed: Option<Healed>,
    /// Folder of measurements and candidates.
    pub work: &'a Path,
    /// The folder to write; `None` to plan from what the work folder holds alone.
    pub output: Option<&'a Path>,
}

/// Settings of a tuning as they are recorded.
#[derive(Serialize)]
struct Recorded<'a> {
    targets: &'a [TuneTarget],
    quality: &'a QualitySettings,
    held_back: f64,
    times: StageOptions,
    healed: Option<&'a Healed>,
}

struct Search<'t, 'a> {
    tune: &'t Tune<'a>,
    stages: Stages<'t>,
    healer: Option<Healer>,
    settings: QualitySettings,
}

/// Finds, makes and writes the model; the unchanged one where that is within the limits. `on_step` gets a line for every step.
///
/// Errors: `Error::Invalid` when no plan or no candidate is within the limits (saying what can be reached), when the work
/// folder is of another model or another process works in it, or, without an output, lacks measurements; those of the
/// steps. On an error the output does not exist.
pub fn tune(tune: &Tune, healer: Option<Healer>, cancel: &Cancel, on_step: &mut dyn FnMut(&str)) -> Result<TuneReport> {
    tuned(tune, healer, cancel, on_step).map_err(|error| error.kept_in(tune.work))
}

fn tuned(tune: &Tune, healer: Option<Healer>, cancel: &Cancel, on_step: &mut dyn FnMut(&str)) -> Result<TuneReport> {
    if let Some(output) = tune.output {
        if output.exists() {
            return Err(Error::invalid(format!("output `{}`", output.display()), "exists").remedy("name a new folder"));
        }
        tune.model.open()?.check_output(output)?;
    }
    if tune.output.is_none() && !tune.work.join(format!("{COSTS}.json")).is_file() {
        return Err(nothing_stored(tune.work));
    }
    let part = DataPart::Train(tune.held_back);
    let mut search = Search {
        tune,
        stages: Stages::open(tune.work, tune.model, tune.device, part, cancel, on_step)?,
        healer,
        settings: QualitySettings {
            data: tune.calibration.data_options(part),
            samples: tune.samples,
            seed: tune.calibration.seed,
            strategies: tune.strategies.clone(),
        },
    };
    search.check_work()?;
    let quality = search.quality()?;
    let costs = search.costs(&quality)?;
    let predictor = Predictor::new(&quality, &costs)?;
    let mut report = search.planned(&predictor, &quality, &costs)?;
    match tune.output {
        Some(output) if report.best.is_whole() => search.write(tune.model, &report, output)?,
        Some(output) => search.make(&predictor, &mut report, &quality, output)?,
        None => {}
    }
    write_json(&search.stages.store.folder().join(format!("{TUNE_FILE}.json")), &report)?;
    Ok(report)
}

const QUALITY: &str = "quality";
const COSTS: &str = "costs";

fn nothing_stored(work: &Path) -> Error {
    Error::invalid(
        format!("work folder `{}`", work.display()),
        "holds no measurements of this model with these settings",
    )
    .remedy("leave `--replan` out once, with the same data and settings")
}

impl Search<'_, '_> {
    /// Errors: `Error::Invalid` when the work folder holds measurements of another model.
    fn check_work(&self) -> Result<()> {
        let folder = self.stages.store.folder();
        let found = [(QUALITY, Quality::SCHEMA_VERSION), (COSTS, Costs::SCHEMA_VERSION)];
        for (name, version) in found {
            let path = folder.join(format!("{name}.json"));
            if !path.is_file() {
                continue;
            }
            // Another file than a run recorded is measured again.
            let Ok(head) = read_json::<Provenance>(&path, version) else { continue };
            let bundle = &self.stages.bundle;
            let (theirs, own) = (head.variants.get("model").map(String::as_str), bundle.chosen_variants());
            let same = head.inputs.get("model") == Some(&self.stages.dense.digest);
            if same && theirs == own {
                continue;
            }
            // Of one commit on the hub, other variants are other files.
            let of_one_commit = bundle.hub_name().is_some_and(|name| head.hub.get("model") == Some(&name));
            let problem = match theirs != own && (same || of_one_commit) {
                true => format!("holds measurements with {}, not with {}", variant_flag(theirs), variant_flag(own)),
                false => "holds measurements of another model".to_string(),
            };
            return Err(
                Error::invalid(format!("`{}`", path.display()), problem).remedy("name another folder with `--work`")
            );
        }
        Ok(())
    }

    /// Losses of all choices, measured or kept.
    fn quality(&mut self) -> Result<Quality> {
        let part = self.stages.part;
        let calibration = &self.tune.calibration;
        let options = calibration.data_options(part);
        let data = crate::data::Dataset::open_for(&calibration.data, &self.stages.bundle, &options)?.digest()?;
        let model = self.stages.dense.digest.clone();
        let inputs = [("model", model.as_str()), ("data", data.as_str())];
        let mut found = None;
        if !self.stages.store.is_done(QUALITY, &inputs, &self.settings)? {
            if self.tune.output.is_none() {
                return Err(nothing_stored(self.tune.work));
            }
            self.stages.store.check_output(QUALITY, &format!("{QUALITY}.json"))?;
            found = Some(quality::measure(&mut self.stages, &self.settings, calibration)?);
        }
        let done = self.stages.store.step(QUALITY, &format!("{QUALITY}.json"), &inputs, &self.settings, |path| {
            found.as_ref().map_or(Ok(()), |found| write_json(path, found))
        })?;
        read_json(&done.path, Quality::SCHEMA_VERSION)
    }

    /// Times and bytes, measured or kept.
    fn costs(&mut self, quality: &Quality) -> Result<Costs> {
        let options = self.tune.options;
        let settings = (options, self.stages.device.to_string());
        let model = self.stages.dense.digest.clone();
        let choices = crate::base::sha256_json(quality)?;
        let inputs = [("model", model.as_str()), (QUALITY, choices.as_str())];
        let mut found = None;
        if !self.stages.store.is_done(COSTS, &inputs, &settings)? {
            if self.tune.output.is_none() {
                return Err(nothing_stored(self.tune.work));
            }
            self.stages.store.check_output(COSTS, &format!("{COSTS}.json"))?;
            let question = self.question(quality)?;
            self.stages.note("measuring what each part costs here");
            found = Some(costs::measure(&mut self.stages, quality, &question, &options)?);
        }
        let done = self.stages.store.step(COSTS, &format!("{COSTS}.json"), &inputs, &settings, |path| {
            found.as_ref().map_or(Ok(()), |found| write_json(path, found))
        })?;
        read_json(&done.path, Costs::SCHEMA_VERSION)
    }

    /// The sample that times are measured with.
    fn question(&self, quality: &Quality) -> Result<Sample> {
        let (_, samples, _) =
            samples_of(&self.stages.bundle, &self.tune.calibration, self.stages.part, self.tune.samples)?;
        let found = samples.into_iter().map(|(sample, _)| sample).find(|sample| sample.index == quality.question);
        found.ok_or_else(|| Error::invalid("calibration data", "has changed").remedy("use a new folder with `--work`"))
    }

    /// The report before anything is made.
    fn planned(&mut self, predictor: &Predictor, quality: &Quality, costs: &Costs) -> Result<TuneReport> {
        let targets = &self.tune.targets;
        let sizes = predictor.sizes();
        let whole = predictor.figures([0; 3]);
        let best = match all_met(targets, &whole, 1.0)? {
            true => Some([0; 3]),
            false => self.within(predictor, 1.0, &|_| true)?.first().copied(),
        };
        let Some(best) = best else {
            self.stages.note(&table(&costs.cells()));
            return Err(unreachable(targets, predictor)?);
        };
        let main = targets.first().map(TuneTarget::row).transpose()?;
        let cost = |point: TunePoint| {
            let figures = predictor.figures(point);
            main.map_or(
                figures.ttft_ms,
                |row| if row.at_most { (row.figure)(&figures) } else { -(row.figure)(&figures) },
            )
        };
        let plans = front(sizes, |point| predictor.loss(point), cost);
        let mut single_axis = Vec::new();
        for (axis, row) in AXES.iter().enumerate() {
            let alone = |point: TunePoint| (0..3).all(|other| other == axis || point[other] == 0);
            if best != [0; 3]
                && let Some(&point) = self.within(predictor, 1.0, &alone)?.first()
            {
                single_axis.push(NamedPlan { name: row.name.to_string(), plan: TunePlan::of(predictor, point) });
            }
        }
        let mut inputs = quality.provenance.inputs.clone();
        inputs.retain(|name, _| name == "model" || name == "data");
        Ok(TuneReport {
            provenance: self.stages.named(Provenance::new(TuneReport::SCHEMA_VERSION, inputs, &self.recorded())?),
            targets: targets.clone(),
            costs: costs.clone(),
            whole: TunePlan::of(predictor, [0; 3]),
            best: TunePlan::of(predictor, best),
            front: plans.into_iter().map(|point| TunePlan::of(predictor, point)).collect(),
            single_axis,
            quarters: quarters(predictor, costs)
                .into_iter()
                .map(|(name, point)| NamedPlan { name, plan: TunePlan::of(predictor, point) })
                .collect(),
            candidates: Vec::new(),
            chosen: None,
            held_back_loss: None,
            notes: quality.notes.clone(),
        })
    }

    fn recorded(&self) -> Recorded<'_> {
        let Tune { targets, held_back, options, healed, .. } = self.tune;
        Recorded { targets, quality: &self.settings, held_back: *held_back, times: *options, healed: healed.as_ref() }
    }

    /// Combinations within the limits, those with the least loss first, but not the unchanged model.
    fn within(
        &self,
        predictor: &Predictor,
        margin: f64,
        allowed: &dyn Fn(TunePoint) -> bool,
    ) -> Result<Vec<TunePoint>> {
        let targets = &self.tune.targets;
        for target in targets {
            target.row()?;
        }
        let fits = |point: TunePoint| {
            point != [0; 3] && allowed(point) && all_met(targets, &predictor.figures(point), margin).unwrap_or(false)
        };
        let time = |point: TunePoint| predictor.figures(point).ttft_ms;
        Ok(ranked(predictor.sizes(), fits, |point| predictor.loss(point), time))
    }

    /// Makes and measures candidates until one is within the limits, and writes it.
    fn make(&mut self, predictor: &Predictor, report: &mut TuneReport, quality: &Quality, output: &Path) -> Result<()> {
        let part = DataPart::HeldBack(self.tune.held_back);
        let mut held_back = HeldBack::open(&self.stages, &self.tune.calibration, part, self.tune.samples)?;
        let whole_loss = held_back.loss(&self.stages, predictor, [0; 3])?.unwrap_or(f64::NAN);
        report.held_back_loss = Some(whole_loss);
        self.compare(predictor, report, &mut held_back)?;
        let question = self.question(quality)?;
        let mut made: BTreeMap<TunePoint, Finished> = BTreeMap::new();
        let mut margin = 1.0;
        for attempt in 0..ATTEMPTS {
            let chosen = self.shortlist(predictor, &mut held_back, margin, attempt == 0)?;
            if chosen.is_empty() {
                break;
            }
            for (point, depth_alone) in chosen {
                if made.contains_key(&point) {
                    continue;
                }
                let (model, candidate) =
                    self.candidate(predictor, &held_back, (point, depth_alone), &question, whole_loss)?;
                made.insert(point, model);
                report.candidates.push(candidate);
            }
            let met = report.candidates.iter().enumerate().filter(|(_, own)| own.meets);
            report.chosen =
                met.min_by(|a, b| a.1.held_back_loss.total_cmp(&b.1.held_back_loss)).map(|(number, _)| number);
            if report.chosen.is_some() {
                break;
            }
            margin *= MARGIN / self.least_excess(report)?.max(1.0);
        }
        report.notes.append(&mut held_back.notes);
        report.notes.extend(drift(report));
        let Some(number) = report.chosen else {
            self.stages.note(&table(&report.candidate_cells()));
            return Err(missed(&self.tune.targets, report)?);
        };
        let model = made.get(&report.candidates[number].plan.point).map(Finished::model);
        let model = model.ok_or_else(|| Error::invalid("the chosen candidate", "was not made"))?;
        self.write(&model, report, output)
    }

    /// How far the nearest candidate's measured figures are from the limits.
    fn least_excess(&self, report: &TuneReport) -> Result<f64> {
        let mut least = f64::INFINITY;
        for own in &report.candidates {
            let mut most: f64 = 0.0;
            for target in &self.tune.targets {
                most = most.max(target.excess(&own.measured)?);
            }
            least = least.min(most);
        }
        Ok(least)
    }

    /// Held-back losses of the compared plans.
    fn compare(&mut self, predictor: &Predictor, report: &mut TuneReport, held_back: &mut HeldBack) -> Result<()> {
        let named = report.single_axis.iter_mut().chain(&mut report.quarters).map(|named| &mut named.plan);
        for plan in named.chain([&mut report.whole, &mut report.best]) {
            plan.held_back_loss = held_back.loss(&self.stages, predictor, plan.point)?;
        }
        Ok(())
    }

    /// The best plans by their held-back loss, of those with the least predicted one; with the best one of decoder depth
    /// alone for comparison, which is the second value.
    fn shortlist(
        &mut self,
        predictor: &Predictor,
        held_back: &mut HeldBack,
        margin: f64,
        compare: bool,
    ) -> Result<Vec<(TunePoint, bool)>> {
        let mut list = self.within(predictor, margin, &|_| true)?;
        list.truncate(SHORTLIST.max(self.tune.candidates));
        let mut losses = Vec::with_capacity(list.len());
        for point in list {
            losses.extend(held_back.loss(&self.stages, predictor, point)?.map(|loss| (loss, point)));
        }
        losses.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut found: Vec<(TunePoint, bool)> =
            losses.into_iter().take(self.tune.candidates).map(|(_, point)| (point, false)).collect();
        if compare {
            let alone = self.within(predictor, margin, &|point| point[1] == 0 && point[2] == 0)?.first().copied();
            match found.iter_mut().find(|(point, _)| Some(*point) == alone) {
                Some(known) => known.1 = true,
                None => found.extend(alone.map(|point| (point, true))),
            }
        }
        Ok(found)
    }

    fn candidate(
        &mut self,
        predictor: &Predictor,
        held_back: &HeldBack,
        (point, depth_alone): (TunePoint, bool),
        question: &Sample,
        whole_loss: f64,
    ) -> Result<(Finished, Candidate)> {
        let plan = TunePlan::of(predictor, point);
        self.stages.note(&format!("candidate {}", plan.shown()));
        let mut model = made(&mut self.stages, predictor, point)?;
        if let Some(healed) = &self.tune.healed {
            let healer = self.healer.ok_or_else(|| {
                Error::invalid("healing", "computes in LibTorch, which this program does not have")
                    .remedy("run it with `interlace-torch`")
            })?;
            let scores = self.stages.store.folder().join("scores.json");
            let digest = crate::base::sha256_file(&scores)?;
            let scores = Finished { path: scores, digest, reused: true, variants: None };
            model = heal(&mut self.stages, healer, healed, (predictor, point), &scores, &model)?;
        }
        let model = with_fewer_tokens(&mut self.stages, predictor, point, model)?;
        let (own, whole) = measured(&self.stages, &model, question, &self.tune.options)?;
        let loss = held_back.loss_of(&self.stages, &model)?;
        let candidate = Candidate {
            plan,
            depth_alone,
            healed: self.tune.healed.is_some(),
            measured: own,
            whole_measured: whole,
            held_back_loss: loss,
            held_back_kept: (whole_loss - loss).exp(),
            meets: all_met(&self.tune.targets, &own, 1.0)?,
        };
        Ok((model, candidate))
    }

    /// Writes the chosen candidate as the output, with a record of the tuning.
    fn write(&self, model: &ModelSource, report: &TuneReport, output: &Path) -> Result<()> {
        self.stages.cancel.check("the work folder keeps everything; the same call continues")?;
        let bundle = model.open()?;
        let writer = BundleWriter::create(&bundle, output)?;
        let head = Provenance::new(Record::SCHEMA_VERSION, report.provenance.inputs.clone(), &self.recorded())?;
        writer.commit(self.stages.named(head))
    }
}

/// About a quarter of the decoder's layers, of the image tokens and of the tower's layers left out, as near as the choices
/// come.
fn quarters(predictor: &Predictor, costs: &Costs) -> Vec<(String, TunePoint)> {
    let [decoder, tower, pictures] = predictor.sizes();
    let choice = |axis: usize, size: usize, layers: usize| {
        let wanted = (layers as f64 / 4.0).round() as usize;
        (1..size).find(|&index| {
            let mut point = [0; 3];
            point[axis] = index;
            predictor.choice(axis, point).dropped.len() == wanted
        })
    };
    let whole = costs.budgets.first().map_or(0, |budget| budget.image_tokens).max(1) as f64;
    let gone = |index: usize| 1.0 - costs.budgets[index].image_tokens as f64 / whole;
    let picture = (1..pictures).min_by(|&a, &b| (gone(a) - 0.25).abs().total_cmp(&(gone(b) - 0.25).abs()));
    let (depth, tower) = (choice(0, decoder, costs.decoder_layers), choice(1, tower, costs.tower_layers));
    let percent = |part: f64, of: &str| format!("{:.0}% of the {of}", 100.0 * part);
    let depth_name = |index: usize| {
        percent(predictor.choice(0, [index, 0, 0]).dropped.len() as f64 / costs.decoder_layers as f64, "decoder")
    };
    let mut found = Vec::new();
    found.extend(depth.map(|index| (depth_name(index), [index, 0, 0])));
    found.extend(picture.map(|index| (percent(gone(index), "image tokens"), [0, 0, index])));
    found.extend(depth.zip(picture).map(|(index, picture)| ("both".to_string(), [index, 0, picture])));
    found.extend(tower.map(|index| {
        let part = predictor.choice(1, [0, index, 0]).dropped.len() as f64 / costs.tower_layers as f64;
        (percent(part, "tower"), [0, index, 0])
    }));
    found
}

/// The error for limits that no plan meets, with the best that can be reached.
fn unreachable(targets: &[TuneTarget], predictor: &Predictor) -> Result<Error> {
    let mut worst: Option<(f64, &TuneTarget, TunePoint)> = None;
    for target in targets {
        let mut nearest: Option<(f64, TunePoint)> = None;
        for point in points(predictor.sizes()) {
            let excess = target.excess(&predictor.figures(point))?;
            if nearest.is_none_or(|(least, _)| excess < least) {
                nearest = Some((excess, point));
            }
        }
        if let Some((excess, point)) = nearest
            && worst.as_ref().is_none_or(|(most, ..)| excess > *most)
        {
            worst = Some((excess, target, point));
        }
    }
    let Some((excess, target, point)) = worst else {
        return Ok(Error::invalid("targets", "are missing").remedy("set `--ttft`, `--tokens-per-s` or `--size`"));
    };
    let row = target.row()?;
    if excess <= 1.0 {
        return Ok(Error::invalid("the targets together", "cannot be reached, though each of them can")
            .remedy("set a weaker one"));
    }
    let (reached, plan) = ((row.show)((row.figure)(&predictor.figures(point))), TunePlan::of(predictor, point));
    Ok(Error::invalid(
        format!("target of {}", target.shown()?),
        format!(
            "cannot be reached: the {} plan reaches {reached} ({}) and keeps {:.1}% of the likelihood of an answer token, both \
             predicted",
            row.best_is,
            plan.shown(),
            100.0 * plan.predicted_kept
        ),
    )
    .remedy(if row.is_time {
        "set a weaker target, use a faster device or a smaller precision, or, if the machine was busy while times were \
         measured, measure again in a new `--work` folder"
    } else {
        "set a weaker target, or use a smaller precision"
    }))
}

/// A note where the whole model's time to the first token is no longer that of the stored costs, by more than a tenth.
fn drift(report: &TuneReport) -> Option<String> {
    let then = report.whole.predicted.ttft_ms;
    let now = report.candidates.last()?.whole_measured.ttft_ms;
    ((now / then - 1.0).abs() > 0.1).then(|| {
        format!(
            "the whole model takes {now:.1} ms to the first token now and took {then:.1} ms when costs were measured: the \
             machine's load has changed, so predicted times are off by as much; measure again in a new `--work` folder"
        )
    })
}

/// The error for candidates of which none is within the limits by measurement.
fn missed(targets: &[TuneTarget], report: &TuneReport) -> Result<Error> {
    let shown = targets.iter().map(TuneTarget::shown).collect::<Result<Vec<_>>>()?.join(" and ");
    let mut nearest = Vec::new();
    for target in targets {
        let row = target.row()?;
        let mut figures: Vec<f64> = report.candidates.iter().map(|own| (row.figure)(&own.measured)).collect();
        figures.sort_by(f64::total_cmp);
        let best = if row.at_most { figures.first() } else { figures.last() };
        nearest.extend(best.map(|&figure| (row.show)(figure)));
    }
    Ok(Error::invalid(
        format!("target of {shown}"),
        format!(
            "{} models were made that should meet it, and none does by measurement: the best is {}{}",
            report.candidates.len(),
            nearest.join(" and "),
            drift(report).map(|note| format!(" ({note})")).unwrap_or_default()
        ),
    )
    .remedy("set a weaker target, or measure again in a new `--work` folder when the machine is less busy"))
}
