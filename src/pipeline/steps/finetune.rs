//! Finetunes a pruned model and writes it as a new folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest, write_json};
use crate::bundle::{Bundle, BundleWriter, Record, RecordedStep, Role, Tower};
use crate::data::{DataOptions, Dataset, Encoder, Intake, Subset};
use crate::finetune::{
    Conversations, Limits, Report, Request, RunPlan, Settings, StepMetrics, Teacher, clear_work, plan_run,
    remove_unbegun,
};
use crate::method::{LayerRole, Plan};
use crate::runtime::FeatureCache;
use crate::torch::Ranks;

use super::needs::{Work, check as check_needs};

/// Name of the report in the work folder.
pub const FINETUNE_REPORT: &str = "finetune.json";

/// Input of a finetuning step.
pub struct Finetune<'a> {
    /// Folder of the pruned model.
    pub pruned: &'a Path,
    /// The plan by which it was pruned; it names the layers to finetune.
    pub plan: &'a Plan,
    /// Digest of the plan's file.
    pub plan_digest: Sha256Digest,
    /// Conversations or running text: a file, a folder or a pattern.
    pub data: &'a Path,
    /// Options for reading the data.
    pub options: &'a DataOptions,
    /// Samples to draw.
    pub subset: Subset,
    /// Losses, optimiser, schedule and stages.
    pub settings: &'a Settings,
    /// Device on which the trained layers are computed.
    pub device: Device,
    /// Folder for checkpoints, metrics and the report.
    pub work: &'a Path,
    /// Continues from the newest checkpoint in `work`.
    pub resume: bool,
    /// The processes that share the samples of every step; all of them see `work`.
    pub ranks: Option<&'a Ranks>,
    /// What the run may take of the machine.
    pub limits: Limits,
    /// Vision features by picture, shared with other steps.
    pub features: &'a Arc<FeatureCache>,
    /// The dense model, for the losses that need it.
    pub teacher: Option<&'a Path>,
}

#[derive(Serialize)]
struct Recorded<'a> {
    subset: Subset,
    /// How the data was read; `data` are the settings of that name.
    reading: &'a DataOptions,
    #[serde(flatten)]
    settings: &'a Settings,
}

/// Default folder of a run's checkpoints and metrics: `OUT.work` beside `OUT`.
pub fn default_work_folder(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(".work");
    target.with_file_name(name)
}

/// Decides a run and does nothing.
///
/// Errors: as [`finetune`], for what does not need all data to be read.
pub fn plan_finetune(request: &Finetune) -> Result<RunPlan> {
    let bundle = Bundle::open(request.pruned)?;
    check_plan(&bundle, request.plan)?;
    let dataset = Dataset::open_for(request.data, &bundle, request.options)?;
    let encoder = Encoder::open(&bundle, &dataset)?;
    let indices = drawn(request, &dataset)?;
    let intake = Intake::new(&dataset, &bundle, usize::MAX);
    let data = Conversations { encoder: &encoder, dataset: &dataset, indices: &indices, intake };
    let dense = request.teacher.map(Bundle::open).transpose()?;
    let (kept, anchors) = correspondence(request.plan);
    let teacher = dense.as_ref().map(|bundle| Teacher { bundle, kept: &kept, anchors: &anchors });
    plan_run(&training(request, &bundle, &data), teacher.as_ref())
}

/// The samples that are trained on.
fn drawn(request: &Finetune, dataset: &Dataset) -> Result<Vec<usize>> {
    let mut indices = dataset.draw(request.subset)?;
    indices.truncate((request.settings.data.share * indices.len() as f64).ceil() as usize);
    Ok(indices)
}

fn training<'a>(request: &'a Finetune, bundle: &'a Bundle, data: &'a Conversations) -> Request<'a> {
    Request {
        bundle,
        layers: &request.plan.finetune_pruned,
        data,
        settings: request.settings,
        device: request.device,
        work: request.work,
        resume: request.resume,
        limits: request.limits,
        ranks: request.ranks,
        features: request.features,
    }
}

/// Trains the plan's finetune layers of the pruned model and writes the result as a new folder.
///
/// Errors: `Error::Invalid` when the model was not pruned with this plan, the data holds nothing to learn from, or the
/// target exists; `Error::Unsupported` when other precision variants of the decoder would keep their old weights;
/// `Error::Interrupted` on Ctrl-C, a checkpoint left in the work folder. Nothing is left under the target's name then.
pub fn finetune(
    request: &Finetune,
    target: &Path,
    cancel: &Cancel,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Report> {
    let bundle = Bundle::open(request.pruned)?;
    check_plan(&bundle, request.plan)?;
    let component = bundle.require(Role::Decoder)?.clone();
    let work = if request.settings.looks_at_answers() { Work::FinetuneOnAnswers } else { Work::FinetuneOnStream };
    check_needs(&bundle, work)?;
    let dataset = Dataset::open_for(request.data, &bundle, request.options)?;
    let encoder = Encoder::open(&bundle, &dataset)?;
    let indices = drawn(request, &dataset)?;
    let data = Conversations {
        encoder: &encoder,
        dataset: &dataset,
        indices: &indices,
        intake: Intake::new(&dataset, &bundle, usize::MAX),
    };
    let writes = request.ranks.is_none_or(|ranks| ranks.rank() == 0);
    let writer = if writes { Some(BundleWriter::create(&bundle, target)?) } else { None };
    let dense = request.teacher.map(Bundle::open).transpose()?;
    let (kept, anchors) = correspondence(request.plan);
    let teacher = dense.as_ref().map(|bundle| Teacher { bundle, kept: &kept, anchors: &anchors });
    let training = training(request, &bundle, &data);
    let is_new = !request.work.exists();
    let outcome = crate::finetune::finetune_with_teacher(&training, teacher.as_ref(), cancel, observer);
    // What was refused has nothing to go on from.
    if let Err(Error::Invalid { .. } | Error::Unsupported { .. }) = &outcome
        && is_new
        && request.work.exists()
    {
        remove_unbegun(request.work)?;
    }
    let outcome = outcome?;
    let Some(mut writer) = writer else {
        // The first process writes the model; all have the same.
        let own = training.own_work();
        fs::remove_dir_all(&own).map_err(|e| Error::io("remove", &own, e))?;
        return Ok(outcome.report);
    };
    writer.save(&component, &outcome.decoder)?;
    let recorded = Recorded { subset: request.subset, reading: request.options, settings: request.settings };
    let recorded = serde_json::to_value(recorded).map_err(|e| Error::invalid("finetune settings", e.to_string()))?;
    writer.push_step(RecordedStep::Finetune {
        layers: request.plan.finetune_pruned.clone(),
        samples: outcome.report.samples,
        settings: recorded.clone(),
    });
    let model = outcome.report.provenance.inputs.get("model").cloned();
    let inputs = BTreeMap::from([
        ("model".to_string(), model.map_or_else(|| bundle.digest(), Ok)?),
        ("plan".to_string(), request.plan_digest.clone()),
        ("data".to_string(), dataset.digest()?),
    ]);
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, inputs, &recorded)?)?;
    write_json(&request.work.join(FINETUNE_REPORT), &outcome.report)?;
    clear_work(request.work)?;
    Ok(outcome.report)
}

/// The dense model's index of each layer that was kept, and the frozen anchors as the pruned model counts them.
fn correspondence(plan: &Plan) -> (Vec<usize>, Vec<usize>) {
    let kept = plan.layers.iter().filter(|layer| layer.pruned_index.is_some()).map(|layer| layer.index);
    let anchors = plan.layers.iter().filter(|layer| layer.role == LayerRole::Anchor);
    (kept.collect(), anchors.filter_map(|layer| layer.pruned_index).collect())
}

/// The folder's own record must say that it was pruned as the plan says.
fn check_plan(bundle: &Bundle, plan: &Plan) -> Result<()> {
    let subject = || format!("`{}`", bundle.root().display());
    let history = bundle.record()?.map(|record| record.history).unwrap_or_default();
    let pruned = history.iter().rev().find_map(|step| match step {
        RecordedStep::Prune { tower: Tower::Text, layers_before, dropped, .. } => Some((*layers_before, dropped)),
        _ => None,
    });
    match pruned {
        Some((layers, dropped)) if layers == plan.num_layers && *dropped == plan.drop => Ok(()),
        Some((layers, dropped)) => Err(Error::invalid(
            subject(),
            format!("lost layers {dropped:?} of {layers}, the plan drops {:?} of {}", plan.drop, plan.num_layers),
        )
        .remedy("give the plan that the model was pruned with")),
        None => {
            Err(Error::invalid(subject(), "was not pruned by interlace").remedy("prune the model with the plan first"))
        }
    }
}
