//! Plan of a run, computed from its graphs and its first samples.

use crate::base::{Device, Error, Result, free_disk_bytes, free_memory_bytes, thread_count};
use crate::bundle::{Bundle, Role};
use crate::finetune::checkpoint::cached_bytes;
use crate::finetune::cut::{Cut, FitTarget, SideInputs, Suffix, side_inputs};
use crate::finetune::data::{Dense, Source, Teacher};
use crate::finetune::loss;
use crate::finetune::plan::{
    KeptRows, Limits, PlanInputs, PlannedConnector, PlannedData, Point, RunPlan, Sessions, Sizes, session_bytes,
};
use crate::finetune::settings::{LoraLayers, Settings};
use crate::ir::Model;
use crate::runtime::headed;
use crate::torch::Ranks;

use super::frozen::FrozenLayers;
use super::request::Request;

/// The graphs of a run and the facts that follow from them alone.
pub struct Opened {
    pub decoder: Model,
    pub cut: Cut,
    pub suffix: Suffix,
    pub side: SideInputs,
    pub sizes: Sizes,
    /// The connector, where it is a graph of its own and all layers get adapters.
    pub connector: Option<PlannedConnector>,
    /// Products to fit in each trained layer.
    pub targets: Vec<FitTarget>,
    /// Points that loss terms compare, and those that only the fit compares.
    pub points: Vec<Point>,
    pub fit_points: Vec<Point>,
    pub dense: Option<Dense>,
    /// Bytes of the models that ONNX Runtime runs. Whether the dense model computes the frozen layers' output is not known
    /// without its digest; here it is assumed where the pruned model keeps all layers before the trained ones.
    pub sessions: Sessions,
    /// Limits of the user, and the free memory of the GPU where the user set none.
    pub limits: Limits,
    /// Maximum number of bytes of this process's rows on disk when the user set no limit. It is taken once, so that a run
    /// that has written its rows is not refused for the space that they take.
    pub cache_bytes: u64,
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
        let mut connector = None;
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
                connector = add_connector(&mut cut, request.bundle, lora.rank)?;
            }
            let written: &[FitTarget] = if settings.fit.enabled { &targets } else { &[] };
            cut.adapt(lora, written)?;
        } else {
            cut.expand_trained()?;
        }
        cut.check_writable(settings.write_trained)?;
        let (suffix, first) = (cut.suffix()?, cut.first);
        let mut side = side_inputs(&cut.analysis.model.graph, &suffix)?;
        side.connector = cut.connector.as_ref().map(|connector| connector.input);
        let mut sizes = Sizes::of(&cut, &suffix, heads_of(request), settings.precision_on(request.device));
        sizes.side_width = side.widths.total() as u64;
        if let (Some(connector), Some(sizes)) = (&mut connector, &sizes.connector) {
            (connector.matrices, connector.parameters) = (sizes.matrices, sizes.elements);
        }
        let dense = teacher.map(Dense::open).transpose()?;
        let points_of = |settings: &Settings| -> Vec<Point> {
            let both = dense.as_ref().zip(teacher);
            both.map_or(Vec::new(), |(dense, teacher)| dense.points(teacher, request.layers, first, settings))
        };
        let points = points_of(&settings.clone().with(|s| s.fit.enabled = false));
        let fit_points = points_of(settings).into_iter().filter(|point| !points.contains(point)).collect();
        let prefix = FrozenLayers::new(request, &cut)?;
        let on_gpu = request.device != Device::Cpu;
        let sessions = Sessions {
            prefix: prefix.session_bytes(on_gpu) + embedding_bytes(request.bundle, on_gpu)?,
            dense: match (&dense, teacher) {
                (Some(dense), Some(teacher)) => dense.session_bytes(on_gpu) + embedding_bytes(teacher.bundle, on_gpu)?,
                _ => 0,
            },
            in_dense: teacher.is_some_and(|teacher| teacher.kept.iter().take(first).copied().eq(0..first)),
        };
        let rows = cached_bytes(request.work)?;
        let cache_bytes = cache_bytes(free_disk_bytes(request.work)?, rows, request.ranks.map_or(1, Ranks::size));
        let limits = with_free_memory(request.limits, request.device, crate::torch::free_gpu_memory);
        Ok(Opened {
            decoder,
            cut,
            suffix,
            side,
            sizes,
            connector,
            targets,
            points,
            fit_points,
            dense,
            sessions,
            limits,
            cache_bytes,
        })
    }

    /// Inputs of a plan that come from the graphs and the machine.
    pub fn parts(&self) -> Parts<'_> {
        Parts {
            sizes: &self.sizes,
            connector: self.connector.as_ref(),
            targets: &self.targets,
            points: &self.points,
            fit_points: &self.fit_points,
            sessions: self.sessions,
            limits: self.limits,
            cache_bytes: self.cache_bytes,
            layer_count: self.cut.analysis.map.layers.len(),
            first: self.cut.first,
        }
    }
}

/// Makes the folder's connector a part of the network in training, where it is a graph of its own; says why not where it cannot
/// be.
///
/// Errors: as `onnx::load` and [`Cut::add_connector`].
fn add_connector(cut: &mut Cut, bundle: &Bundle, rank: u32) -> Result<Option<PlannedConnector>> {
    let Some(part) = bundle.component(Role::Projector) else { return Ok(None) };
    let left_out = match bundle.component(Role::VisionEncoder) {
        Some(_) => cut.add_connector(&crate::onnx::load(&bundle.path_of(part))?, rank)?,
        None => Some("the folder has no vision encoder whose features it reads".to_string()),
    };
    Ok(Some(PlannedConnector { file: part.file.clone(), left_out, ..PlannedConnector::default() }))
}

/// The limits, with the GPU's free memory as the limit of memory where the user set none. A plan for a GPU that this machine
/// lacks has no such limit.
fn with_free_memory(limits: Limits, device: Device, free: impl FnOnce(usize) -> Result<u64>) -> Limits {
    let memory = match (limits.memory, device) {
        (None, Device::Cuda(gpu)) => free(gpu as usize).ok(),
        (memory, _) => memory,
    };
    Limits { memory, ..limits }
}

/// Bytes that ONNX Runtime holds of the components that turn prompts into embeddings: the vision encoder with its projector,
/// and the embeddings of tokens.
///
/// Errors: as `onnx::load`.
fn embedding_bytes(bundle: &Bundle, on_gpu: bool) -> Result<u64> {
    let roles = [Role::VisionEncoder, Role::Projector, Role::EmbedTokens];
    let parts = roles.into_iter().filter_map(|role| bundle.component(role));
    let bytes = parts.map(|part| Ok(session_bytes(&crate::onnx::load(&bundle.path_of(part))?.graph, on_gpu)));
    bytes.sum()
}

/// Inputs of a plan that come from the graphs and the machine.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    pub sizes: &'a Sizes,
    pub connector: Option<&'a PlannedConnector>,
    pub targets: &'a [FitTarget],
    pub points: &'a [Point],
    pub fit_points: &'a [Point],
    pub sessions: Sessions,
    pub limits: Limits,
    pub cache_bytes: u64,
    pub layer_count: usize,
    pub first: usize,
}

/// Makes the plan. `rows` is `Some` when it is already decided which rows are on disk.
pub fn resolve(request: &Request<'_>, parts: &Parts<'_>, data: PlannedData, rows: Option<KeptRows>) -> RunPlan {
    RunPlan::resolve(&PlanInputs {
        device: request.device,
        cores: thread_count() as u64,
        settings: request.settings,
        layers: request.layers,
        layer_count: parts.layer_count,
        first: parts.first,
        sizes: parts.sizes,
        connector: parts.connector,
        fitted: parts.targets,
        points: parts.points,
        fit_points: parts.fit_points,
        sessions: parts.sessions,
        host_bytes: free_memory_bytes(),
        data,
        limits: parts.limits,
        cache_bytes: parts.cache_bytes,
        rows,
    })
}

/// Bytes of rows that a process may keep: its share of a fifth of the disk that is `free` or holds `rows` already. Each of
/// the `processes` keeps rows of its own, all in one work folder.
fn cache_bytes(free: u64, rows: u64, processes: usize) -> u64 {
    (free.saturating_add(rows) / 5 / processes.max(1) as u64).min(MOST_CACHE_BYTES)
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

/// Estimates the token counts of all samples from the first ones. `bundle` names the image token.
///
/// Errors: those of a sample.
pub fn estimated(source: &dyn Source, bundle: &Bundle) -> Result<PlannedData> {
    let image_token = bundle.config().and_then(|config| config.image_token_id);
    let (mut seen, mut tokens, mut answers, mut longest, mut image) = (0u64, 0u64, 0u64, 0u64, 0u64);
    let (mut image_share, mut answer_share) = (0f64, 0f64);
    for sample in source.samples()?.take(ESTIMATED_FROM) {
        let sample = sample?;
        let length = sample.prompt.input_ids.len() as u64;
        let own = sample.prompt.input_ids.iter().filter(|&&id| Some(id) == image_token).count() as u64;
        (image, image_share) = (image + own, image_share.max(own as f64 / length.max(1) as f64));
        (seen, tokens, longest) = (seen + 1, tokens + length, longest.max(length));
        let own = sample.answer_mask.iter().filter(|answer| **answer).count() as u64;
        (answers, answer_share) = (answers + own, answer_share.max(own as f64 / length.max(1) as f64));
    }
    let samples = source.count();
    let all = |some: u64| (u128::from(some) * u128::from(samples) / u128::from(seen.max(1))) as u64;
    let (tokens, answer_tokens, image_tokens) = (all(tokens), all(answers), all(image));
    let (longest_tokens, estimated) = (longest, true);
    Ok(PlannedData {
        samples,
        tokens,
        answer_tokens,
        answer_share,
        longest_tokens,
        image_tokens,
        image_share,
        estimated,
    })
}

/// Plans a run without running it: trained layers, order, data, memory and disk.
///
/// Errors: as [`finetune`](super::finetune), for the checks that do not read the data.
pub fn plan_run(request: &Request<'_>, teacher: Option<&Teacher<'_>>) -> Result<RunPlan> {
    request.settings.check()?;
    let losses = request.settings.losses();
    loss::check_teacher(losses.keys().copied(), request.settings.fit.enabled, teacher.is_some())?;
    let opened = Opened::new(request, teacher)?;
    Ok(resolve(request, &opened.parts(), estimated(request.data, request.bundle)?, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_free_memory_of_a_gpu_limits_a_run_without_a_limit() {
        let of = |memory, device| {
            with_free_memory(Limits { memory, ..Limits::default() }, device, |gpu| Ok(1000 + gpu as u64)).memory
        };
        assert_eq!(of(None, Device::Cuda(1)), Some(1001));
        assert_eq!(of(Some(7), Device::Cuda(1)), Some(7));
        assert_eq!(of(None, Device::Cpu), None);
        let none = |_| Err(Error::unsupported("device cuda:0", "no GPU was found"));
        assert_eq!(with_free_memory(Limits::default(), Device::Cuda(0), none).memory, None);
    }

    /// Layer by layer, rows of a fifth of the disk were allowed and then refused, since they had taken that fifth; and eight
    /// processes took eight fifths.
    #[test]
    fn rows_on_disk_do_not_lower_their_own_limit_and_processes_share_it() {
        let free = 60_000_000_000;
        let limit = cache_bytes(free, 0, 1);
        assert_eq!((limit, cache_bytes(free - limit, limit, 1)), (12_000_000_000, limit));
        assert_eq!(8 * cache_bytes(free, 0, 8), limit);
        let each = cache_bytes(free, 0, 8);
        assert_eq!(cache_bytes(free - 8 * each, 8 * each, 8), each);
        assert_eq!(cache_bytes(u64::MAX, 5, 1), MOST_CACHE_BYTES);
    }

    /// The fixture's vision encoder and embeddings are in f32, so ONNX Runtime makes no copies.
    #[test]
    fn components_that_embed_prompts_are_counted() {
        let bundle = Bundle::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")).unwrap();
        let [vision, embed] = [Role::VisionEncoder, Role::EmbedTokens].map(|role| bundle.component(role).unwrap());
        let files = bundle.size_bytes(vision).unwrap() + bundle.size_bytes(embed).unwrap();
        let counted = embedding_bytes(&bundle, false).unwrap();
        assert!(counted <= files && counted > files * 9 / 10, "{counted} of {files}");
        assert_eq!(embedding_bytes(&bundle, true).unwrap(), counted);
    }
}
