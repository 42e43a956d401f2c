//! The plan of a run: frozen parts, fit, stages, targets, and the memory and disk that each needs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Device, Error, Result, human_bytes, human_count};
use crate::finetune::cut::FitTarget;
use crate::finetune::loss::{LOSSES, TeacherOutput};
use crate::finetune::settings::{Precision, Settings};
use crate::torch::{Hold, Ranks};

use super::limits::{Limits, MOST_BATCH_TOKENS};
use super::planned::{
    ANSWERS, KeptRows, ONNX_RUNTIME, Order, PROCESS, Phase, Place, PlannedBytes, PlannedConnector, PlannedData,
    PlannedFit, PlannedSearch, PlannedStage, PlannedTarget,
};
use super::points::Point;
use super::sessions::Sessions;
use super::sizes::Sizes;
use super::step_range::{StepRange, TrialPlan};

/// Above this size the f32 copies of frozen weights are not kept; each product makes its own copy, and the backward pass
/// frees it. Below, they cost less than what makes them in every pass (`docs/large-models.md`, "Weights in f32").
const MOST_WIDENED_BYTES: u64 = 256 << 20;
/// Above this size of the trained weights, one network trains on all cores, instead of one network per core with its
/// own gradients.
const MOST_GRADIENT_BYTES: u64 = 256 << 20;
/// Most tokens of one forward pass on a CPU, padding included; a longer sample forms a pass of its own. The value is large
/// enough to keep matrix products busy and small enough to limit the activations kept for the backward pass.
const CPU_BATCH_TOKENS: u64 = 640;
/// Rows below this size are written to disk even when the run reads them once, so that the next run can reuse them.
const SMALL_CACHE_BYTES: u64 = 64 << 20;
/// Readers of outputs other than loss terms.
const STEPS: &str = "steps";
pub(super) const FIT: &str = "fit";
/// Memory, in bytes, that the targets of a fit may always take.
const TARGET_BYTES: u64 = 1 << 30;

/// The plan of a run, made before it begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunPlan {
    /// Version of the schema.
    pub schema_version: u32,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Number format of the forward and backward passes.
    pub precision: Precision,
    /// Layers to train, in the pruned model's numbering.
    pub trained: Vec<u64>,
    /// Number of layers before the first trained one; ONNX Runtime runs them.
    pub frozen_before: u64,
    /// Number of layers from the first trained one on.
    pub layers_run: u64,
    /// Number of elements of the trained weights, or of the adapters.
    pub trained_parameters: u64,
    /// The connector, where it is a graph of its own and all layers get adapters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connector: Option<PlannedConnector>,
    /// Whether layers are trained together or one after the other.
    pub order: Order,
    /// The fit before the steps; absent without a fit.
    pub fit: Option<PlannedFit>,
    /// Trials of learning rates before the steps; absent when there is only one rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<PlannedSearch>,
    /// Stages of the steps with their losses.
    pub stages: Vec<PlannedStage>,
    /// The samples.
    pub data: PlannedData,
    /// Outputs of the dense model and of the frozen layers that the run needs.
    pub targets: Vec<PlannedTarget>,
    /// Number of networks that run in parallel.
    pub workers: u64,
    /// Threads per network.
    pub threads: u64,
    /// Maximum number of tokens of one forward pass, padding included. A longer sample forms a pass of its own.
    pub batch_tokens: u64,
    /// True when rows are computed when a step needs them and are not kept: those of the targets that are not `written`.
    #[serde(default)]
    pub streamed: bool,
    /// Maximum number of bytes of rows on disk.
    #[serde(default)]
    pub cache_limit_bytes: u64,
    /// True when every layer is recomputed in the backward pass.
    pub gradient_checkpointing: bool,
    /// True when frozen weights are held in the file's format and each product converts its own.
    pub frozen_as_stored: bool,
    /// Every item of memory and disk.
    pub bytes: Vec<PlannedBytes>,
    /// Largest memory of a phase.
    pub memory_bytes: u64,
    /// Bytes of disk in the work folder.
    pub disk_bytes: u64,
    /// The memory limit that the user set, in bytes.
    pub memory_limit_bytes: Option<u64>,
    /// False when the run exceeds the memory limit; absent without a limit.
    pub fits: Option<bool>,
}

/// Inputs of a plan.
pub struct PlanInputs<'a> {
    /// Device of the training passes.
    pub device: Device,
    /// Number of CPU cores.
    pub cores: u64,
    /// Settings of the run.
    pub settings: &'a Settings,
    /// Layers to train, in the pruned model's numbering.
    pub layers: &'a [usize],
    /// Number of decoder layers of the pruned model.
    pub layer_count: usize,
    /// The first trained layer.
    pub first: usize,
    /// Sizes of the graph's parts.
    pub sizes: &'a Sizes,
    /// The connector, where all layers get adapters.
    pub connector: Option<&'a PlannedConnector>,
    /// Products to fit in each trained layer.
    pub fitted: &'a [FitTarget],
    /// Points at which loss terms compare the stream with the dense model's.
    pub points: &'a [Point],
    /// Points that only the fit compares.
    pub fit_points: &'a [Point],
    /// Bytes of the models that ONNX Runtime runs.
    pub sessions: Sessions,
    /// Free memory of the host, in bytes; `None` where it is not known.
    pub host_bytes: Option<u64>,
    /// The samples.
    pub data: PlannedData,
    /// Limits that the user set.
    pub limits: Limits,
    /// Maximum number of bytes of rows on disk when the user set no limit.
    pub cache_bytes: u64,
    /// The rows that are on disk; `None` when the plan decides.
    pub rows: Option<KeptRows>,
}

impl RunPlan {
    /// Version of the plan's schema.
    pub const SCHEMA_VERSION: u32 = 1;

    /// Makes the plan. When the user set a memory limit, reduces passes and networks to fit it; `fits` has the result.
    ///
    /// [`RunPlan::check`] reports a plan that exceeds its limits.
    pub fn resolve(inputs: &PlanInputs<'_>) -> Self {
        // Rows on disk let the models that compute them go before the steps.
        let (first, others) = inputs.rows();
        let plan = Self::with_rows(inputs, first);
        match plan.fits {
            Some(false) => {
                let mut others = others.into_iter().map(|rows| Self::with_rows(inputs, rows));
                others.find(|other| other.fits == Some(true)).unwrap_or(plan)
            }
            _ => plan,
        }
    }

    /// The rows that are on disk for all samples.
    pub fn rows(&self) -> KeptRows {
        match (self.streamed, self.targets.iter().any(|target| target.written)) {
            (false, _) => KeptRows::All,
            (true, true) => KeptRows::Dense,
            (true, false) => KeptRows::Nothing,
        }
    }

    fn with_rows(inputs: &PlanInputs<'_>, rows: KeptRows) -> Self {
        let PlanInputs { settings, sizes, limits, data, .. } = inputs;
        let first = inputs.first;
        let stored = sizes.widened_bytes.saturating_sub(sizes.frozen_bytes) > MOST_WIDENED_BYTES;
        let trained = sizes.trained_elements();
        let one = inputs.on_gpu() || stored || 4 * trained > MOST_GRADIENT_BYTES;
        let longest = data.longest_tokens.max(1);
        let asked = limits.batch_tokens.unwrap_or(match inputs.on_gpu() {
            true => u64::from(settings.batch.size).saturating_mul(longest),
            false => CPU_BATCH_TOKENS,
        });
        let workers = if one { 1 } else { limits.workers.unwrap_or(inputs.cores).max(1) };
        let trained_layers = settings.trained_layers(inputs.layers, inputs.layer_count);
        let mut plan = RunPlan {
            schema_version: Self::SCHEMA_VERSION,
            device: inputs.device.to_string(),
            precision: settings.precision_on(inputs.device),
            trained: trained_layers.into_iter().map(|layer| layer as u64).collect(),
            frozen_before: first as u64,
            layers_run: (inputs.layer_count - first) as u64,
            trained_parameters: trained,
            connector: inputs.connector.cloned(),
            order: match (settings.trains(), settings.layer_by_layer()) {
                (false, _) => Order::FitOnly,
                (true, true) => Order::LayerByLayer,
                (true, false) => Order::Together,
            },
            fit: inputs.fit(),
            search: inputs.search(),
            stages: inputs.stages(),
            data: data.clone(),
            targets: inputs.targets(rows),
            workers,
            threads: (inputs.cores / workers).max(1),
            batch_tokens: asked.min(MOST_BATCH_TOKENS).max(longest),
            streamed: rows != KeptRows::All,
            cache_limit_bytes: inputs.cache_limit(),
            gradient_checkpointing: settings.batch.gradient_checkpointing.unwrap_or(stored),
            frozen_as_stored: limits.frozen.map_or(stored, |hold| hold == Hold::Stored),
            bytes: Vec::new(),
            memory_bytes: 0,
            disk_bytes: 0,
            memory_limit_bytes: limits.memory,
            fits: None,
        };
        plan.measure(inputs);
        if let Some(limit) = limits.memory {
            plan.shrink(inputs, limit, longest);
            plan.fits = Some(plan.memory_bytes <= limit);
        }
        plan
    }

    /// Reduces memory until the plan fits `limit`: first by gradient checkpointing, then by fewer tokens per pass, then
    /// by fewer networks.
    fn shrink(&mut self, inputs: &PlanInputs<'_>, limit: u64, longest: u64) {
        let fits = |plan: &mut Self| {
            plan.measure(inputs);
            plan.memory_bytes <= limit
        };
        if fits(self) {
            return;
        }
        if inputs.settings.batch.gradient_checkpointing.is_none() {
            self.gradient_checkpointing = true;
        }
        while !fits(self) && self.batch_tokens > longest && inputs.limits.batch_tokens.is_none() {
            self.batch_tokens = (self.batch_tokens / 2).max(longest);
        }
        while !fits(self) && self.workers > 1 {
            self.workers /= 2;
            self.threads = (inputs.cores / self.workers).max(1);
        }
    }

    /// Takes the numbers from the first process that determine how a step is cut into passes. All processes compute shares of
    /// the same passes.
    ///
    /// Errors: as `Ranks::from_first`.
    pub fn take_passes_of_first(&mut self, ranks: &Ranks) -> Result<()> {
        let own = [self.workers, self.batch_tokens, u64::from(self.gradient_checkpointing)];
        let first = ranks.from_first(&own.map(u64::to_le_bytes).concat())?;
        if let [workers, batch_tokens, checkpointing] = *first.as_chunks::<8>().0 {
            // The cores of this process, divided among the first one's number of networks.
            let (cores, workers) = (self.workers * self.threads, u64::from_le_bytes(workers).max(1));
            (self.workers, self.threads) = (workers, (cores / workers).max(1));
            self.batch_tokens = u64::from_le_bytes(batch_tokens);
            self.gradient_checkpointing = u64::from_le_bytes(checkpointing) == 1;
        }
        Ok(())
    }

    /// Bytes of all rows that steps read.
    fn row_bytes(&self) -> u64 {
        let read = |target: &&PlannedTarget| target.read_by.iter().any(|by| by != FIT);
        self.targets.iter().filter(read).map(|target| target.bytes).sum()
    }

    /// True when a loss term reads outputs of the dense model that are not on disk.
    pub(super) fn reads_dense(&self) -> bool {
        let computed = self.targets.iter().filter(|target| !target.written);
        computed.flat_map(|target| &target.read_by).any(|by| by != STEPS && by != FIT)
    }

    /// Errors: `Error::Invalid` when the plan exceeds the memory limit, or when layer-by-layer training needs more rows
    /// on disk than the limit allows.
    pub fn check(&self) -> Result<()> {
        let rows: u64 = self.targets.iter().filter(|target| target.written).map(|target| target.bytes).sum();
        if self.order == Order::LayerByLayer && rows > self.cache_limit_bytes {
            let problem = format!(
                "heals one layer after the other, which keeps {} on disk, and the limit is {}",
                human_bytes(rows),
                human_bytes(self.cache_limit_bytes)
            );
            return Err(Error::invalid("this run", problem)
                .remedy("allow more with `--cache-bytes`, draw fewer samples, or take the recipe `best`"));
        }
        match (self.fits, self.memory_limit_bytes) {
            (Some(false), Some(limit)) => Err(self.exceeds(limit)),
            _ => Ok(()),
        }
    }

    /// The error of a plan that exceeds the memory limit.
    fn exceeds(&self, limit: u64) -> Error {
        let in_memory = || self.bytes.iter().filter(|item| item.place == Place::Memory);
        let largest = in_memory().max_by_key(|item| item.bytes);
        let largest = largest.map(|item| format!("{} {}", item.what, human_bytes(item.bytes)));
        let mut problem = format!(
            "takes {} and the limit is {}; the largest part: {}",
            human_bytes(self.memory_bytes),
            human_bytes(limit),
            largest.unwrap_or_default()
        );
        let least = in_memory().filter(|item| item.what == PROCESS).map(|item| item.bytes).max().unwrap_or(0);
        if limit < least {
            let least = human_bytes(least);
            let remedy = format!("no setting goes below {least}: allow more with `--memory`");
            return Error::invalid("this run", problem).remedy(remedy);
        }
        let rows = self.row_bytes();
        let loaded = in_memory().find(|item| item.phase == Phase::Steps && item.what == ONNX_RUNTIME);
        let mut remedy = String::new();
        if let Some(loaded) = loaded.filter(|_| rows > self.cache_limit_bytes) {
            problem += &format!(
                ". {} of it are the models that compute rows between steps: {} of rows of {} tokens exceed the {} that may be \
                 kept on disk",
                human_bytes(loaded.bytes),
                human_bytes(rows),
                self.data.tokens,
                human_bytes(self.cache_limit_bytes)
            );
            remedy = format!(
                "keep the rows with `--cache-bytes {}`, draw fewer samples, ",
                format_args!("{}GB", rows.div_ceil(1_000_000_000))
            );
        }
        remedy += "set `--lora-rank`, train fewer layers, or allow more with `--memory`; `--dry-run` lists the parts";
        Error::invalid("this run", problem).remedy(remedy)
    }

    /// Summary of the plan in one line.
    pub fn line(&self) -> String {
        let limit = match (self.fits, self.memory_limit_bytes) {
            (Some(true), Some(limit)) => format!(" of {}", human_bytes(limit)),
            (Some(false), Some(limit)) => format!(", more than the limit of {}", human_bytes(limit)),
            _ => String::new(),
        };
        format!(
            "plan: {} trained parameters in {} of {} layers run{}, {} steps{} in {}, {} tokens a pass on {} networks{}, memory {}{limit}, disk {}",
            human_count(self.trained_parameters),
            self.trained.len(),
            self.layers_run,
            if self.connector.as_ref().is_some_and(|own| own.matrices > 0) { " and the connector" } else { "" },
            self.stages.iter().map(|stage| stage.steps).sum::<u64>(),
            self.search.as_ref().map_or(String::new(), |search| format!(
                " after at most {} trials of {} steps",
                search.learning_rates.len(),
                search.steps
            )),
            self.precision.name(),
            self.batch_tokens,
            self.workers,
            if self.gradient_checkpointing { " with gradient checkpointing" } else { "" },
            human_bytes(self.memory_bytes),
            human_bytes(self.disk_bytes)
        )
    }
}

impl PlanInputs<'_> {
    /// True for a run on a GPU.
    pub(super) fn on_gpu(&self) -> bool {
        self.device != Device::Cpu
    }

    /// Bytes that the dense model's stream for a fit may take. On a GPU it is kept in host memory. On a CPU it may take as
    /// much as the dense model itself, which would otherwise be loaded again during the fit.
    fn target_room(&self) -> u64 {
        let half = self.host_bytes.map_or(TARGET_BYTES, |bytes| bytes / 2);
        let most = if self.on_gpu() { half } else { self.sessions.dense.min(half) };
        most.max(TARGET_BYTES)
    }

    fn fit(&self) -> Option<PlannedFit> {
        if !self.settings.fit.enabled {
            return None;
        }
        let products: Vec<u64> =
            self.fitted.iter().flat_map(|target| &target.products).flatten().map(|p| p.width as u64).collect();
        let widest = products.iter().copied().max().unwrap_or(0);
        let most = self.settings.fit_budget(widest).min(super::FIT_TOKENS);
        let tokens = most.min(self.data.tokens);
        let elements = products.iter().sum::<u64>() * self.sizes.hidden_size;
        let kept = |layer: usize| self.points.iter().any(|point| point.student == self.first + layer + 1);
        let computed =
            self.fitted.iter().filter(|target| target.products.is_ok() && !kept(target.layer)).count() as u64;
        let each = 2 * tokens * self.sizes.hidden_size;
        let together = (self.target_room() / each.max(1)).clamp(1, computed.max(1));
        let (layers, products) = (self.fitted.len() as u64, products.len() as u64);
        Some(PlannedFit { layers, products, widest, tokens, elements, computed, together })
    }

    fn cache_limit(&self) -> u64 {
        self.limits.cache.unwrap_or(self.cache_bytes)
    }

    /// The rows to keep on disk, and the other choices, which are taken where the first one's models do not fit beside the
    /// steps. Rows that are read again are kept as far as they have room, first those of the dense model; rows that are read
    /// once only if they are small.
    fn rows(&self) -> (KeptRows, Vec<KeptRows>) {
        if let Some(decided) = self.rows {
            return (decided, Vec::new());
        }
        // Layer-by-layer training needs each layer's output for all samples as the next layer's input.
        if self.settings.layer_by_layer() {
            return (KeptRows::All, Vec::new());
        }
        let bytes = |rows: KeptRows| -> u64 {
            self.targets(rows).iter().filter(|target| target.written).map(|target| target.bytes).sum()
        };
        let mut choices = vec![KeptRows::All, KeptRows::Dense];
        choices.retain(|&rows| bytes(rows) <= self.cache_limit());
        if self.reads_again() || bytes(KeptRows::All) <= SMALL_CACHE_BYTES {
            choices.push(KeptRows::Nothing);
            (choices.remove(0), choices)
        } else {
            choices.reverse();
            (KeptRows::Nothing, choices)
        }
    }

    /// True when the run reads the rows of a sample more than once.
    fn reads_again(&self) -> bool {
        let settings = self.settings;
        let pass = super::order::steps_per_epoch(settings, self.data.samples as usize);
        let passes = match settings.schedule.max_steps {
            Some(steps) => steps > pass,
            None => settings.schedule.epochs > 1,
        };
        passes || settings.optimizer.learning_rate.is_searched()
    }

    fn search(&self) -> Option<PlannedSearch> {
        let settings = self.settings;
        let learning_rate = &settings.optimizer.learning_rate;
        if !learning_rate.is_searched() || !settings.trains() {
            return None;
        }
        let samples = self.data.samples as usize;
        let layers = if settings.layer_by_layer() { self.layers.len() } else { 1 };
        let TrialPlan { max_steps, held_out_steps } = TrialPlan::of(settings, samples, layers);
        let pass = super::order::steps_per_epoch(settings, samples) * layers as u64;
        let learning_rates = learning_rate.candidates(settings.optimizer.kind);
        Some(PlannedSearch { learning_rates, steps: max_steps.unwrap_or(pass), held_out_steps })
    }

    fn stages(&self) -> Vec<PlannedStage> {
        if !self.settings.trains() {
            return Vec::new();
        }
        let samples = self.data.samples as usize;
        let total = match self.settings.layer_by_layer() {
            true => StepRange::each(self.settings, samples, self.layers.len()).last().map_or(0, StepRange::end),
            false => StepRange::whole(self.settings, samples).steps,
        };
        let mut before = 0;
        let stages = self.settings.by_stage(total).into_iter().map(|(end, stage)| {
            let steps = end - before;
            before = end;
            let losses = stage.losses().iter().map(|(kind, weight)| (kind.name().to_string(), *weight)).collect();
            PlannedStage { steps, losses }
        });
        stages.collect()
    }

    /// Outputs of the frozen layers and of the dense model that the run needs. `rows` says which are written for all samples.
    fn targets(&self, rows: KeptRows) -> Vec<PlannedTarget> {
        let (keeps, keeps_dense) = (rows == KeptRows::All, rows != KeptRows::Nothing);
        let width = self.sizes.hidden_size;
        let PlannedData { tokens, answer_tokens, .. } = self.data;
        let first = self.first;
        let mut targets = vec![PlannedTarget {
            what: format!("stream before layer {first}"),
            read_by: vec![STEPS.to_string()],
            tokens,
            bytes: self.settings.precision_on(self.device).bytes() * tokens * width,
            written: keeps,
        }];
        if self.sizes.side_width > 0 {
            targets.push(PlannedTarget {
                what: "features of pictures and embeddings that layers read".to_string(),
                read_by: vec![STEPS.to_string()],
                tokens,
                bytes: 4 * tokens * self.sizes.side_width,
                written: keeps,
            });
        }
        if let Some(connector) = &self.sizes.connector {
            let rows = connector.rows_of(self.data.image_tokens);
            targets.push(PlannedTarget {
                what: "features of pictures that the connector reads".to_string(),
                read_by: vec![STEPS.to_string()],
                tokens: self.data.image_tokens,
                bytes: 4 * rows * connector.width,
                written: keeps,
            });
        }
        let by_terms = |wanted: TeacherOutput| -> Vec<String> {
            let asked = LOSSES.iter().filter(|row| self.settings.weight(row.kind) > 0.0 && row.teacher == wanted);
            asked.map(|row| row.name.to_string()).collect()
        };
        for (point, kept) in self.points.iter().map(|p| (p, true)).chain(self.fit_points.iter().map(|p| (p, false))) {
            let behind_trained = self.layers.contains(&(point.student - 1));
            let mut read_by = if kept { by_terms(TeacherOutput::Stream) } else { Vec::new() };
            if self.settings.fit.enabled && behind_trained {
                read_by.push(FIT.to_string());
            }
            let tokens = if kept { tokens } else { self.fit().map_or(0, |fit| fit.tokens) };
            let (what, bytes) = (format!("dense stream before layer {}", point.dense), 2 * tokens * width);
            targets.push(PlannedTarget { what, read_by, tokens, bytes, written: kept && keeps_dense });
        }
        let read_by = by_terms(TeacherOutput::Logits);
        if !read_by.is_empty() {
            // A graph that does not say the size of its vocabulary has no limit.
            let most = if self.sizes.vocabulary > 0 { self.sizes.vocabulary } else { u64::MAX };
            let bytes = (8 * u64::from(self.settings.kd.top_k).min(most)).saturating_mul(answer_tokens);
            let what = ANSWERS.to_string();
            targets.push(PlannedTarget { what, read_by, tokens: answer_tokens, bytes, written: keeps_dense });
        }
        targets
    }
}

#[cfg(test)]
#[path = "run_plan_tests.rs"]
mod tests;
