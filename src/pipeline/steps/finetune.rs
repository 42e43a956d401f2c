//! Finetunes a model, pruned or whole, and writes it as a new folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest, write_json};
use crate::bundle::{Bundle, BundleWriter, ModelSource, Record, RecordedStep, Role, Tower};
use crate::data::{DataOptions, Dataset, Encoder, Intake, Subset, within_tokens};
use crate::finetune::{
    Conversations, Limits, LoraLayers, Report, Request, RunPlan, Settings, StepMetrics, Teacher, clear_work,
    interrupted_at, plan_run, remove_cache_only_folder,
};
use crate::method::{LayerRole, Part, Plan, named_layers};
use crate::runtime::FeatureCache;
use crate::torch::Ranks;

use super::inspect::decoder_analysis;
use super::needs::{Work, check as check_needs};

/// Name of the report in the work folder.
pub const FINETUNE_REPORT: &str = "finetune.json";

/// The layers that a run trains.
#[derive(Clone, Copy)]
pub enum Trained<'a> {
    /// The finetune layers of the plan by which the model was pruned.
    Plan {
        /// The plan.
        plan: &'a Plan,
        /// Digest of the plan's file.
        digest: &'a Sha256Digest,
    },
    /// Layers by their index in the model as it is, which need not be pruned; `None` for all of them.
    Layers(Option<&'a [usize]>),
}

/// Input of a finetuning step.
pub struct Finetune<'a> {
    /// The model.
    pub model: &'a ModelSource,
    /// The layers to train.
    pub trained: Trained<'a>,
    /// Conversations or running text: a file, a folder or a pattern.
    pub data: &'a Path,
    /// Options for reading the data.
    pub options: &'a DataOptions,
    /// Samples to draw.
    pub subset: Subset,
    /// Losses, optimiser, schedule and stages.
    pub settings: &'a Settings,
    /// Device of the trained layers.
    pub device: Device,
    /// Folder for checkpoints, metrics and the report.
    pub work: &'a Path,
    /// Continues from the newest checkpoint in `work`.
    pub resume: bool,
    /// The processes that share the samples of every step. All of them can read and write `work`.
    pub ranks: Option<&'a Ranks>,
    /// Limits on memory and pass size.
    pub limits: Limits,
    /// Vision features by picture, shared with other steps.
    pub features: &'a Arc<FeatureCache>,
    /// The dense model, for the losses that need it.
    pub teacher: Option<&'a ModelSource>,
}

#[derive(Serialize)]
struct Recorded<'a> {
    subset: Subset,
    /// How the data was read; `data` are the settings of that name.
    reading: &'a DataOptions,
    #[serde(flatten)]
    settings: &'a Settings,
}

/// Default folder of a run's checkpoints and metrics: `OUT.work` next to `OUT`.
pub fn default_work_folder(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(".work");
    target.with_file_name(name)
}

/// Computes the plan of a run without running it.
///
/// Errors: as [`finetune`], except those that require reading all data.
pub fn plan_finetune(request: &Finetune, cancel: &Cancel) -> Result<RunPlan> {
    let bundle = request.model.open()?;
    let roles = Roles::of(&bundle, request)?;
    check_connector(&bundle, request.settings)?;
    let dataset = Dataset::open_for(request.data, &bundle, request.options)?;
    let encoder = Encoder::open(&bundle, &dataset)?;
    let indices = drawn(request, &dataset, &encoder, cancel)?;
    let intake = Intake::new(&dataset, &bundle, usize::MAX);
    let data = Conversations { encoder: &encoder, dataset: &dataset, indices: &indices, intake };
    let dense = request.teacher.map(ModelSource::open).transpose()?;
    dense.as_ref().map_or(Ok(()), |dense| check_family(&bundle, dense))?;
    let teacher = dense.as_ref().map(|bundle| Teacher { bundle, kept: &roles.kept, anchors: &roles.anchors });
    plan_run(&training(request, &roles, &bundle, &data), teacher.as_ref())
}

/// The samples that are trained on: those of the draw, as far as the budget of tokens goes.
fn drawn(request: &Finetune, dataset: &Dataset, encoder: &Encoder, cancel: &Cancel) -> Result<Vec<usize>> {
    let crate::finetune::DataSettings { share, step_tokens, max_tokens, .. } = request.settings.data;
    let mut indices = dataset.draw(request.subset)?;
    indices.truncate((share * indices.len() as f64).ceil() as usize);
    let Some(budget) = step_tokens else { return Ok(indices) };
    let taken = within_tokens((dataset, encoder), &indices, budget, u64::from(max_tokens), cancel)?;
    Ok(taken.into_iter().map(|(index, _)| index).collect())
}

fn training<'a>(request: &'a Finetune, roles: &'a Roles, bundle: &'a Bundle, data: &'a Conversations) -> Request<'a> {
    Request {
        bundle,
        layers: &roles.trained,
        data,
        settings: &roles.settings,
        device: request.device,
        work: request.work,
        resume: request.resume,
        limits: request.limits,
        ranks: request.ranks,
        features: request.features,
    }
}

/// Trains layers of the model and writes the result as a new folder.
///
/// Errors: `Error::Invalid` when the model was not pruned with this plan, no sample has tokens to train on, the work
/// folder holds a checkpoint and the run does not resume, or the target exists; `Error::Unsupported` when other precision
/// variants of the decoder would keep their old weights; `Error::Interrupted` on Ctrl-C, with a checkpoint in the work
/// folder. On an error the target does not exist.
pub fn finetune(
    request: &Finetune,
    target: &Path,
    cancel: &Cancel,
    observer: &mut dyn FnMut(&StepMetrics),
) -> Result<Report> {
    check_not_interrupted(request)?;
    let bundle = request.model.open()?;
    let roles = Roles::of(&bundle, request)?;
    let component = bundle.require(Role::Decoder)?.clone();
    let work = if request.settings.looks_at_answers() { Work::FinetuneOnAnswers } else { Work::FinetuneOnStream };
    check_needs(&bundle, work)?;
    check_connector(&bundle, request.settings)?;
    let dataset = Dataset::open_for(request.data, &bundle, request.options)?;
    let encoder = Encoder::open(&bundle, &dataset)?;
    let indices = drawn(request, &dataset, &encoder, cancel)?;
    let data = Conversations {
        encoder: &encoder,
        dataset: &dataset,
        indices: &indices,
        intake: Intake::new(&dataset, &bundle, usize::MAX),
    };
    let dense = request.teacher.map(ModelSource::open).transpose()?;
    dense.as_ref().map_or(Ok(()), |dense| check_family(&bundle, dense))?;
    for model in std::iter::once(&bundle).chain(&dense) {
        model.check_output(target)?;
        model.check_output(request.work)?;
    }
    let writes = request.ranks.is_none_or(|ranks| ranks.rank() == 0);
    let writer = if writes { Some(BundleWriter::create(&bundle, target)?) } else { None };
    let teacher = dense.as_ref().map(|bundle| Teacher { bundle, kept: &roles.kept, anchors: &roles.anchors });
    let training = training(request, &roles, &bundle, &data);
    let is_new = !request.work.exists();
    let outcome = crate::finetune::finetune_with_teacher(&training, teacher.as_ref(), cancel, observer);
    // A rejected run has no state from which to continue.
    if let Err(Error::Invalid { .. } | Error::Unsupported { .. }) = &outcome
        && is_new
        && request.work.exists()
    {
        remove_cache_only_folder(request.work)?;
    }
    let mut outcome = outcome?;
    let named = |head: Provenance| {
        head.with_hub("model", bundle.hub_name())
            .with_hub("teacher", request.teacher.and_then(ModelSource::hub_name))
            .with_variants("model", bundle.chosen_variants())
            .with_variants("teacher", request.teacher.and_then(ModelSource::chosen).as_deref())
    };
    outcome.report.provenance = named(outcome.report.provenance);
    let Some(mut writer) = writer else {
        // The first process writes the model, since all have the same weights.
        let own = training.own_work();
        fs::remove_dir_all(&own).map_err(|e| Error::io("remove", &own, e))?;
        return Ok(outcome.report);
    };
    writer.save(&component, &outcome.decoder)?;
    if let Some(connector) = &outcome.connector {
        writer.save(bundle.require(Role::Projector)?, connector)?;
    }
    let recorded = Recorded { subset: request.subset, reading: request.options, settings: &roles.settings };
    let recorded = serde_json::to_value(recorded).map_err(|e| Error::invalid("finetune settings", e.to_string()))?;
    writer.push_step(RecordedStep::Finetune {
        layers: outcome.report.layers.clone(),
        connector: outcome.connector.is_some(),
        samples: outcome.report.samples,
        settings: recorded.clone(),
    });
    let model = outcome.report.provenance.inputs.get("model").cloned();
    let mut inputs = BTreeMap::from([
        ("model".to_string(), model.map_or_else(|| bundle.digest(), Ok)?),
        ("data".to_string(), dataset.digest()?),
    ]);
    if let Trained::Plan { digest, .. } = request.trained {
        inputs.insert("plan".to_string(), digest.clone());
    }
    let head = Provenance::new(Record::SCHEMA_VERSION, inputs, &recorded)?;
    writer.commit(named(head))?;
    write_json(&request.work.join(FINETUNE_REPORT), &outcome.report)?;
    clear_work(request.work)?;
    Ok(outcome.report)
}

/// Errors: `Error::Invalid` where a new run would remove the checkpoint of an interrupted one.
fn check_not_interrupted(request: &Finetune) -> Result<()> {
    match interrupted_at(request.work)?.filter(|_| !request.resume) {
        Some(step) => Err(Error::invalid(
            format!("`{}`", request.work.display()),
            format!("holds step {step} of an interrupted run"),
        )
        .remedy("add `--resume` to continue, or remove the folder")),
        None => Ok(()),
    }
}

/// Errors: `Error::Invalid` where the configs of the dense model and of the trained one name different families.
fn check_family(bundle: &Bundle, dense: &Bundle) -> Result<()> {
    let (Some(own), Some(other)) = (bundle.config(), dense.config()) else { return Ok(()) };
    // Kinds of configs have names of their own for a family.
    let unnamed = own.model_type.is_empty() || other.model_type.is_empty();
    if own.source != other.source || unnamed || own.model_type == other.model_type {
        return Ok(());
    }
    let problem = format!("is {}, the model to train is {}", other.model_type, own.model_type);
    Err(Error::invalid(format!("teacher `{}`", dense.root().display()), problem)
        .remedy("give the dense model that the pruned one was made from"))
}

/// The layers of a model as a run sees them, and the settings that suit it.
struct Roles {
    /// Layers to train, ascending, as the model counts them.
    trained: Vec<usize>,
    /// The dense model's index of each layer.
    kept: Vec<usize>,
    /// The frozen anchors, as the model counts them.
    anchors: Vec<usize>,
    settings: Settings,
}

/// Errors: `Error::Unsupported` where the head is to be trained and is tied to the embeddings, which are a file of their own
/// or another reader of the same weight and stay frozen.
fn check_head(bundle: &Bundle, settings: &Settings) -> Result<()> {
    const KEYS: [&str; 2] = ["/tie_word_embeddings", "/text_config/tie_word_embeddings"];
    let tied = bundle.config().and_then(|config| {
        KEYS.into_iter().find(|key| config.raw.pointer(key).and_then(serde_json::Value::as_bool) == Some(true))
    });
    match tied.filter(|_| settings.train_head) {
        Some(key) => Err(Error::unsupported(
            "finetune setting `train_head`",
            format!(
                "the config ties the head to the embeddings (`{}`), which stay frozen",
                key.trim_start_matches('/')
            ),
        )
        .remedy("leave it out: the authors' released code does not train such a head either")),
        None => Ok(()),
    }
}

/// Errors: `Error::Unsupported` where the connector is to be trained and other precision variants of it would keep their old
/// weights.
fn check_connector(bundle: &Bundle, settings: &Settings) -> Result<()> {
    let files: Vec<&str> = bundle.variants(Role::Projector).map(|component| component.file.as_str()).collect();
    match files[..] {
        [first, _, ..] if settings.lora.layers == LoraLayers::All => Err(Error::unsupported(
            format!("finetuning `{first}` in `{}`", bundle.root().display()),
            format!(
                "the connector is there in several variants ({}), and the others would keep their old weights",
                files.join(", ")
            ),
        )
        .remedy(
            "name one with `--variant` and quantise the result afterwards, or leave the connector as it is with \
             `--lora-layers trained`",
        )),
        _ => Ok(()),
    }
}

impl Roles {
    fn of(bundle: &Bundle, request: &Finetune) -> Result<Self> {
        let settings = request.settings.clone().for_device(request.device);
        check_head(bundle, &settings)?;
        match request.trained {
            Trained::Plan { plan, .. } => {
                check_plan(bundle, plan)?;
                let kept = plan.layers.iter().filter(|layer| layer.pruned_index.is_some()).map(|layer| layer.index);
                let anchors = plan.layers.iter().filter(|layer| layer.role == LayerRole::Anchor);
                Ok(Roles {
                    trained: plan.finetune_pruned.clone(),
                    kept: kept.collect(),
                    anchors: anchors.filter_map(|layer| layer.pruned_index).collect(),
                    settings,
                })
            }
            Trained::Layers(named) => {
                let count = decoder_analysis(bundle)?.map.layers.len();
                let history = bundle.record()?.map(|record| record.history).unwrap_or_default();
                let kept = Record::original_layers(&history, Tower::Text, count)?;
                let whole = !history.iter().any(|step| matches!(step, RecordedStep::Prune { tower: Tower::Text, .. }));
                let trained = named.map_or_else(|| Ok((0..count).collect()), |layers| named_layers(layers, count))?;
                let settings = if whole { of_whole_model(settings)? } else { settings };
                Ok(Roles { trained, kept, anchors: Vec::new(), settings })
            }
        }
    }
}

/// Settings for a model that lost no layer: there is no gap in its stream that a fit could close.
///
/// Errors: `Error::Invalid` where the losses only compare the stream with the dense model's, which the model has already.
fn of_whole_model(settings: Settings) -> Result<Settings> {
    if settings.losses().iter().any(|(kind, weight)| *weight > 0.0 && kind.looks_at_answers()) {
        return Ok(settings.with(|settings| settings.fit.enabled = false));
    }
    let problem =
        "only compare the stream with the dense model's, and this model, which lost no layer, has that stream";
    Err(Error::invalid("the losses of this recipe", problem)
        .remedy("take a recipe with a loss on the answers, as `--recipe paper`"))
}

/// Checks that the folder's record agrees with the plan.
fn check_plan(bundle: &Bundle, plan: &Plan) -> Result<()> {
    let subject = || format!("`{}`", bundle.root().display());
    let record = bundle.record()?;
    // The record's inputs are those of its last step.
    if let Some(record) = &record
        && let Some(RecordedStep::Prune { tower: Tower::Text, .. }) = record.history.last()
        && let (Some(from), Some(planned)) =
            (record.provenance.inputs.get("model"), plan.provenance.inputs.get("model"))
        && from != planned
    {
        let (from, planned) = (from.get(..8).unwrap_or(from), planned.get(..8).unwrap_or(planned));
        return Err(Error::invalid(
            subject(),
            format!("was pruned from a model with digest {from}.., the plan was made for one with digest {planned}.."),
        )
        .remedy("give the plan that the model was pruned with"));
    }
    let history = record.map(|record| record.history).unwrap_or_default();
    let pruned = history.iter().rev().find_map(|step| match step {
        RecordedStep::Prune { tower: Tower::Text, layers_before, dropped, mlps, .. } => {
            Some((*layers_before, dropped, mlps))
        }
        _ => None,
    });
    let wanted = match plan.part {
        Part::Layer => (plan.drop.as_slice(), &[][..]),
        Part::Mlp => (&[][..], plan.drop.as_slice()),
    };
    let lost = |layers: &[usize], mlps: &[usize]| match mlps {
        [] => format!("layers {layers:?}"),
        _ => format!("the MLPs of layers {mlps:?}"),
    };
    match pruned {
        Some((layers, dropped, mlps)) if layers == plan.num_layers && (&dropped[..], &mlps[..]) == wanted => Ok(()),
        Some((layers, dropped, mlps)) => Err(Error::invalid(
            subject(),
            format!(
                "lost {} of {layers}, the plan drops {} of {}",
                lost(dropped, mlps),
                lost(wanted.0, wanted.1),
                plan.num_layers
            ),
        )
        .remedy("give the plan that the model was pruned with")),
        None => {
            Err(Error::invalid(subject(), "was not pruned by interlace").remedy("prune the model with the plan first"))
        }
    }
}
