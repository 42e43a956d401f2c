//! Plan of a run, computed from its graphs and its first samples.

use crate::base::{Device, Error, Result, free_disk_bytes, thread_count};
use crate::bundle::{Bundle, Role};
use crate::finetune::cut::{Cut, FitTarget, SideInputs, Suffix, side_inputs};
use crate::finetune::data::{Dense, Source, Teacher};
use crate::finetune::loss;
use crate::finetune::plan::{PlanInputs, PlannedData, Point, RunPlan, Sizes};
use crate::finetune::settings::LoraLayers;
use crate::ir::Model;
use crate::runtime::headed;

use super::request::Request;

/// The graphs of a run and the facts that follow from them alone.
pub struct Opened {
    pub decoder: Model,
    pub cut: Cut,
    pub suffix: Suffix,
    pub side: SideInputs,
    pub sizes: Sizes,
    /// Products to fit in each trained layer.
    pub targets: Vec<FitTarget>,
    pub points: Vec<Point>,
    pub dense: Option<Dense>,
}

impl Opened {
    /// Loads the graphs, cuts the decoder and adds adapters if the settings ask for them.
    ///
    /// Errors: as [`finetune`](super::finetune), for the checks that need only the graphs.
    pub fn new(request: &Request<'_>, teacher: Option<&Teacher<'_>>) -> Result<Self> {
        let settings = request.settings;
        refuse_parallel_streams(request.bundle)?;
        refuse_token_pruner(request.bundle, teacher)?;
        let decoder = crate::onnx::load(&request.bundle.path_of(request.bundle.require(Role::Decoder)?))?;
        let whole = headed(request.bundle, decoder.clone())?;
        let mut cut = Cut::new(&whole, request.layers)?;
        if settings.train_head {
            cut.train_head()?;
        }
        let fits = settings.fit.enabled || settings.layer_by_layer();
        let mut targets = if fits { cut.targets(request.layers, !settings.trains())? } else { Vec::new() };
        if let Some(lora) = settings.lora() {
            if settings.lora.layers == LoraLayers::All {
                let all: Vec<usize> = (0..cut.analysis.map.layers.len()).collect();
                let after = cut.first;
                cut = Cut::new(&whole, &all)?;
                if settings.train_head {
                    cut.train_head()?;
                }
                targets.iter_mut().for_each(|target| target.layer += after);
            }
            let written: &[FitTarget] = if settings.fit.enabled { &targets } else { &[] };
            cut.adapt(lora, written)?;
        } else {
            cut.expand_trained()?;
        }
        cut.check_writable(settings.write_trained)?;
        let (suffix, first) = (cut.suffix()?, cut.first);
        let side = side_inputs(&cut.analysis.model.graph, &suffix)?;
        let mut sizes = Sizes::of(&cut, &suffix, heads_of(request));
        sizes.side_width = side.widths.total() as u64;
        let dense = teacher.map(Dense::open).transpose()?;
        let points = dense.as_ref().zip(teacher);
        let points = points.map(|(dense, teacher)| dense.points(teacher, request.layers, first, settings));
        Ok(Opened { decoder, cut, suffix, side, sizes, targets, points: points.unwrap_or_default(), dense })
    }
}

/// Inputs of a plan that come from the graphs.
pub struct Parts<'a> {
    pub sizes: &'a Sizes,
    pub targets: &'a [FitTarget],
    pub points: &'a [Point],
    pub teacher_bytes: u64,
    pub layer_count: usize,
    pub first: usize,
}

/// Makes the plan. `streamed` is `Some` when it is already decided whether rows are computed on demand.
///
/// Errors: `Error::Io` when the free disk space cannot be read.
pub fn resolve(request: &Request<'_>, parts: &Parts<'_>, data: PlannedData, streamed: Option<bool>) -> Result<RunPlan> {
    let cache_bytes = (free_disk_bytes(&request.own_work())? / 5).min(MOST_CACHE_BYTES);
    Ok(RunPlan::resolve(&PlanInputs {
        device: request.device.to_string(),
        on_gpu: request.device != Device::Cpu,
        cores: thread_count() as u64,
        settings: request.settings,
        layers: request.layers,
        layer_count: parts.layer_count,
        first: parts.first,
        sizes: parts.sizes,
        fitted: parts.targets,
        points: parts.points,
        teacher_bytes: parts.teacher_bytes,
        data,
        limits: request.limits,
        cache_bytes,
        streamed,
    }))
}

/// Targets and losses stand at the places of the whole prompt.
fn refuse_token_pruner(bundle: &Bundle, teacher: Option<&Teacher<'_>>) -> Result<()> {
    let pruner = |bundle: &Bundle| bundle.component(Role::TokenPruner).map(|part| bundle.path_of(part));
    match pruner(bundle).or_else(|| teacher.and_then(|teacher| pruner(teacher.bundle))) {
        Some(path) => Err(Error::unsupported(
            format!("finetuning with `{}`", path.display()),
            "the model leaves image tokens out, and training reads them all",
        )
        .remedy("finetune the model before `interlace prune --keep-image-tokens`")),
        None => Ok(()),
    }
}

/// Errors: `Error::Unsupported` for layers over several copies of the residual stream, as the configuration says (AltUp).
fn refuse_parallel_streams(bundle: &Bundle) -> Result<()> {
    let Some(config) = bundle.config() else { return Ok(()) };
    let text = config.raw.get("text_config").unwrap_or(&config.raw);
    match text.get("altup_num_inputs").and_then(serde_json::Value::as_u64) {
        Some(streams) if streams > 1 => {
            let problem =
                format!("its layers read {streams} residual streams (`altup_num_inputs` in `{}`)", config.source);
            Err(Error::unsupported("finetune", problem)
                .remedy("layers of several streams side by side are dropped, not healed"))
        }
        _ => Ok(()),
    }
}

/// Number of attention heads in the configuration; 0 when it states none.
fn heads_of(request: &Request<'_>) -> u64 {
    request.bundle.config().and_then(|config| config.num_attention_heads).unwrap_or(0) as u64
}

/// Maximum number of bytes of rows on disk when the user set no limit.
const MOST_CACHE_BYTES: u64 = 32_000_000_000;

/// Number of samples that an estimate reads.
const ESTIMATED_FROM: usize = 64;

/// Estimates the token counts of all samples from the first ones.
///
/// Errors: those of a sample.
pub fn estimated(source: &dyn Source) -> Result<PlannedData> {
    let (mut seen, mut tokens, mut answers, mut longest) = (0u64, 0u64, 0u64, 0u64);
    for sample in source.samples()?.take(ESTIMATED_FROM) {
        let sample = sample?;
        let length = sample.prompt.input_ids.len() as u64;
        (seen, tokens, longest) = (seen + 1, tokens + length, longest.max(length));
        answers += sample.answer_mask.iter().filter(|answer| **answer).count() as u64;
    }
    let samples = source.count();
    let all = |some: u64| (u128::from(some) * u128::from(samples) / u128::from(seen.max(1))) as u64;
    let (tokens, answer_tokens) = (all(tokens), all(answers));
    Ok(PlannedData { samples, tokens, answer_tokens, longest_tokens: longest, estimated: true })
}

/// Plans a run without running it: trained layers, order, data, memory and disk.
///
/// Errors: as [`finetune`](super::finetune), for the checks that do not read the data.
pub fn plan_run(request: &Request<'_>, teacher: Option<&Teacher<'_>>) -> Result<RunPlan> {
    request.settings.check()?;
    let losses = request.settings.losses();
    loss::check_teacher(losses.keys().copied(), request.settings.fit.enabled, teacher.is_some())?;
    let opened = Opened::new(request, teacher)?;
    let parts = Parts {
        sizes: &opened.sizes,
        targets: &opened.targets,
        points: &opened.points,
        teacher_bytes: opened.dense.as_ref().map_or(0, Dense::weight_bytes),
        layer_count: opened.cut.analysis.map.layers.len(),
        first: opened.cut.first,
    };
    resolve(request, &parts, estimated(request.data)?, None)
}
