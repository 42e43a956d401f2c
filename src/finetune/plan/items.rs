//! The memory and disk of a run, item by item.

use crate::finetune::optim::state_bytes;
use crate::finetune::settings::{Precision, Settings};

use super::planned::{ANSWERS, ONNX_RUNTIME, Order, PROCESS, Phase, Place, PlannedBytes, PlannedData, PlannedFit};
use super::run_plan::{FIT, PlanInputs, RunPlan};
use super::sizes::ConnectorSizes;
use super::{CUDA_BYTES, LOGIT_BYTES, PROCESS_BYTES, WINDOW_BYTES, gradient_sum_bytes, sum_bytes};

/// Number of f32 copies of the logits that cross-entropy and its backward pass hold.
const LOGIT_COPIES: u64 = 4;

impl RunPlan {
    /// Lists every item anew, and sums them.
    pub(super) fn measure(&mut self, inputs: &PlanInputs<'_>) {
        self.bytes = items(self, inputs);
        let of = |phase: Phase| -> u64 {
            let own = self.bytes.iter().filter(|item| item.place == Place::Memory && item.phase == phase);
            own.map(|item| item.bytes).sum()
        };
        self.memory_bytes = [Phase::Teacher, Phase::Fit, Phase::Steps].map(of).into_iter().max().unwrap_or(0);
        let disk = self.bytes.iter().filter(|item| item.place == Place::Disk);
        self.disk_bytes = disk.map(|item| item.bytes).sum();
    }
}

/// Lists every item of memory and disk.
fn items(plan: &RunPlan, inputs: &PlanInputs<'_>) -> Vec<PlannedBytes> {
    let mut list = List { items: Vec::new(), plan, inputs };
    list.models();
    for phase in [Phase::Fit, Phase::Steps] {
        if phase == Phase::Fit && plan.fit.is_some() || phase == Phase::Steps && !plan.stages.is_empty() {
            list.weights(phase);
        }
    }
    if let Some(fit) = &plan.fit {
        list.fit(fit);
    }
    if !plan.stages.is_empty() {
        list.steps();
    }
    if plan.streamed {
        let formula = "computed together, longer steps aside".to_string();
        list.add(Phase::Steps, Place::Disk, "rows at hand", WINDOW_BYTES, formula);
        list.rows_of_fit();
    }
    for target in plan.targets.iter().filter(|target| target.written) {
        list.add(Phase::Teacher, Place::Disk, &target.what, target.bytes, format!("{} tokens", target.tokens));
    }
    list.items
}

/// Items that are being listed.
struct List<'a> {
    items: Vec<PlannedBytes>,
    plan: &'a RunPlan,
    inputs: &'a PlanInputs<'a>,
}

impl List<'_> {
    fn add(&mut self, phase: Phase, place: Place, what: &str, bytes: u64, formula: String) {
        if bytes > 0 {
            self.items.push(PlannedBytes { what: what.to_string(), phase, place, bytes, formula });
        }
    }

    /// Where tensors are kept that no product reads: a run on a GPU moves them to the host.
    fn aside(&self) -> Place {
        if self.inputs.on_gpu() { Place::Host } else { Place::Memory }
    }

    /// The process, and the models that ONNX Runtime runs.
    fn models(&mut self) {
        let (plan, inputs) = (self.plan, self.inputs);
        let (process, formula) = match inputs.on_gpu() {
            true => (CUDA_BYTES, "CUDA context, kernels and workspaces"),
            false => (PROCESS_BYTES, "code, graph, file buffers"),
        };
        for (phase, held) in
            [(Phase::Teacher, true), (Phase::Fit, plan.fit.is_some()), (Phase::Steps, !plan.stages.is_empty())]
        {
            let bytes = if held { process } else { 0 };
            self.add(phase, Place::Memory, PROCESS, bytes, formula.into());
        }
        let formula = "frozen layers before, or the dense model, with what embeds prompts".to_string();
        self.add(Phase::Teacher, Place::Memory, ONNX_RUNTIME, inputs.sessions.one_at_a_time(), formula);
        if plan.targets.iter().any(|target| target.what == ANSWERS) {
            // The result of a run of the head; on a CPU also the copy that is reduced to the likeliest tokens.
            let copies = if inputs.on_gpu() { 1 } else { 2 };
            let logits = LOGIT_BYTES.min(4 * plan.data.answer_tokens * inputs.sizes.vocabulary);
            let formula = format!("{copies} x at most {LOGIT_BYTES}");
            self.add(Phase::Teacher, Place::Memory, "logits of the dense model", copies * logits, formula);
        }
        let loaded = if plan.streamed { inputs.sessions.together(plan.reads_dense()) } else { 0 };
        let formula = "rows are computed between steps".to_string();
        self.add(Phase::Steps, Place::Memory, ONNX_RUNTIME, loaded, formula.clone());
        if let Some(fit) = &plan.fit {
            // Before steps, where they are loaded beside more, they go before the fit's matrices come.
            let until_the_end = if plan.stages.is_empty() { loaded } else { 0 };
            self.add(Phase::Fit, Place::Memory, ONNX_RUNTIME, until_the_end, formula);
            if fit.together < fit.computed {
                let formula = format!("targets of {} of {} layers at a time", fit.together, fit.computed);
                self.add(Phase::Fit, Place::Memory, "dense model", inputs.sessions.dense, formula);
            }
        }
    }

    /// The student's weights, which it holds in the fit and in the steps.
    fn weights(&mut self, phase: Phase) {
        let (plan, sizes) = (self.plan, self.inputs.sizes);
        let frozen = if plan.frozen_as_stored { sizes.frozen_bytes } else { sizes.widened_bytes };
        let form = if plan.frozen_as_stored { "as in the file, once" } else { "in f32, once" };
        let (in_connector, adapters) = sizes.connector.as_ref().map_or((0, 0), |own| {
            (if plan.frozen_as_stored { own.frozen_bytes } else { own.widened_bytes }, own.elements)
        });
        let elements = sizes.trained_elements() - adapters;
        self.add(phase, Place::Memory, "frozen weights", frozen - in_connector, form.to_string());
        self.add(phase, Place::Memory, "connector's weights", in_connector, form.to_string());
        self.add(phase, Place::Memory, "trained weights", 4 * elements, format!("4 x {elements}"));
        self.add(phase, Place::Memory, "connector's adapters", 4 * adapters, format!("4 x {adapters}"));
        let formula = format!("4 x {}, which no step moves", sizes.written);
        self.add(phase, Place::Memory, "fitted weights", 4 * sizes.written, formula);
        if plan.frozen_as_stored {
            let (kind, part) = if plan.precision == Precision::Bf16 { ("bf16", 2) } else { ("f32", 1) };
            // The backward pass reads the copies of all layers that it does not compute again.
            let (copies, of) = match plan.gradient_checkpointing {
                true => {
                    (sizes.layer_widened_bytes.max(sizes.head_widened_bytes), "one layer's weights, or of the head's")
                }
                false => (sizes.copied_bytes, "all layers' weights until the backward pass"),
            };
            let formula = format!("{kind} copies of {of}");
            self.add(phase, Place::Memory, "weights in use", plan.workers * copies / part, formula);
        }
    }

    fn fit(&mut self, fit: &PlannedFit) {
        let width = self.inputs.sizes.hidden_size;
        let each = sum_bytes(fit.widest, width);
        let normal = each * fit.widest * (fit.widest + width);
        let formula = format!("{0} x {1} x ({1} + {2})", 2 * each, fit.widest, width);
        self.add(Phase::Fit, Place::Memory, "normal matrices", 2 * normal, formula);
        let formula = format!("16 x {0} x {0}", fit.widest);
        self.add(Phase::Fit, Place::Memory, "solver", 16 * fit.widest * fit.widest, formula);
        let number = self.plan.precision.bytes();
        let formula = format!("{number} x {} x {width}", fit.tokens);
        self.add(Phase::Fit, Place::Memory, "streams of the fit", number * fit.tokens * width, formula);
        let together = fit.together.min(fit.computed);
        let formula = format!("2 x {} x {width} x {together} layers", fit.tokens);
        self.add(Phase::Fit, self.aside(), "targets of the fit", 2 * fit.tokens * width * together, formula);
        let formula = format!("4 x {}, until the fit ends", fit.elements);
        self.add(Phase::Fit, self.aside(), "weights before the fit", 4 * fit.elements, formula);
    }

    /// A fit goes over its samples once for each product, so a run that computes rows when they are needed keeps those of
    /// all its samples until the first step.
    fn rows_of_fit(&mut self) {
        let (plan, data) = (self.plan, &self.plan.data);
        let Some(fit) = &plan.fit else { return };
        // The dense model's stream that the fit alone reads is in memory.
        let computed = plan.targets.iter().filter(|target| !target.written);
        let kept = computed.filter(|target| target.read_by.iter().any(|reader| reader != FIT));
        let all: u64 = kept.map(|target| target.bytes).sum();
        let bytes = (u128::from(all) * u128::from(fit.tokens) / u128::from(data.tokens.max(1))) as u64;
        let formula = format!("{} tokens, until the first step", fit.tokens);
        self.add(Phase::Fit, Place::Disk, "rows of the fit", bytes, formula);
    }

    fn steps(&mut self) {
        let (plan, inputs) = (self.plan, self.inputs);
        let PlanInputs { settings, sizes, .. } = inputs;
        let (elements, workers) = (sizes.trained_elements(), plan.workers);
        let now = match plan.order {
            // Only one layer's state is held at a time.
            Order::LayerByLayer => elements.div_ceil(inputs.layers.len().max(1) as u64),
            _ => elements,
        };
        // Without checkpointing a pass has the gradients of all weights before they are added to those of earlier passes.
        let sum = gradient_sum_bytes(now);
        let each = match (passes_per_step(plan, settings), plan.gradient_checkpointing) {
            (0 | 1, _) => 4,
            (_, true) => sum,
            (_, false) => 4 + sum,
        };
        let formula = format!("{each} x {now} x {workers} networks");
        self.add(Phase::Steps, Place::Memory, "gradients", each * now * workers, formula);
        if plan.precision == Precision::Bf16 {
            let run = if plan.gradient_checkpointing { inputs.layers.len().max(1) as u64 } else { 1 };
            let (bytes, formula) = (2 * now.div_ceil(run), format!("2 x {}", now.div_ceil(run)));
            self.add(Phase::Steps, Place::Memory, "trained weights in bf16", bytes * workers, formula);
        }
        // In 128 bits: bytes times elements of two billion parameters do not fit into 64.
        let all = u128::from(state_bytes(settings.optimizer.kind, &sizes.trained));
        let state = u64::try_from(all * u128::from(now) / u128::from(elements.max(1))).unwrap_or(u64::MAX);
        self.add(Phase::Steps, Place::Memory, "optimiser state", state, "moments of each trained number".into());
        let mean = if settings.optimizer.average_last > 0.0 { 4 * now } else { 0 };
        self.add(Phase::Steps, Place::Memory, "mean of the weights", mean, format!("4 x {now}"));
        let (bytes, formula) = activations(plan, inputs);
        self.add(Phase::Steps, Place::Memory, "activations", workers.saturating_mul(bytes), formula);
        if let Some(connector) = &sizes.connector {
            let (bytes, formula) = connector_activations(plan, connector);
            self.add(Phase::Steps, Place::Memory, "connector's activations", workers.saturating_mul(bytes), formula);
        }
        if plan.search.is_some() {
            let written = elements + sizes.written;
            let formula = format!("4 x {written}, during the trials");
            self.add(Phase::Steps, self.aside(), "weights before the search", 4 * written, formula);
        }
        let layered = if plan.order == Order::LayerByLayer { 4 * elements } else { 0 };
        let checkpoint = 4 * now + state + mean + 4 * sizes.written + layered;
        self.add(Phase::Steps, Place::Disk, "checkpoint", checkpoint, "weights and state".to_string());
        let steps = plan.stages.iter().map(|stage| stage.steps).sum::<u64>();
        let every = settings.schedule.checkpoint_every;
        if steps.saturating_sub(1).checked_div(every).unwrap_or(0) > 1 {
            let formula = "until the next one is complete".to_string();
            self.add(Phase::Steps, Place::Disk, "checkpoint before it", checkpoint, formula);
        }
    }
}

/// Passes of one network in a step of samples of the usual length.
fn passes_per_step(plan: &RunPlan, settings: &Settings) -> u64 {
    let PlannedData { samples, tokens, .. } = plan.data;
    let tokens = (settings.samples_per_step() as u64).min(samples) * tokens / samples.max(1);
    tokens.div_ceil(plan.batch_tokens.saturating_mul(plan.workers).max(1))
}

/// Bytes of the activations of a connector in a pass of the samples with the largest share of image tokens, with the formula.
fn connector_activations(plan: &RunPlan, connector: &ConnectorSizes) -> (u64, String) {
    let width: u64 = if plan.precision == Precision::Bf16 { 2 } else { 4 };
    let tokens = (plan.batch_tokens as f64 * plan.data.image_share).ceil() as u64;
    let (rows, keys) = (connector.rows_of(tokens), connector.rows.0);
    let numbers = connector.width + connector.activations.kept.at(keys) + 2 * connector.activations.widest.at(keys);
    let formula = format!("{width} x {rows} rows of features x {numbers} numbers, for {tokens} image tokens");
    (width.saturating_mul(rows).saturating_mul(numbers), formula)
}

/// Bytes of activations and logits that a pass holds for its backward pass, with the formula.
fn activations(plan: &RunPlan, inputs: &PlanInputs<'_>) -> (u64, String) {
    let sizes = inputs.sizes;
    let tokens = plan.batch_tokens;
    let width: u64 = if plan.precision == Precision::Bf16 { 2 } else { 4 };
    let keys = plan.data.longest_tokens.min(tokens);
    let layers = sizes.layer_activations.iter().map(|layer| layer.kept.at(keys));
    let (sum, most) = (layers.clone().sum::<u64>(), layers.max().unwrap_or(0));
    // The backward pass holds the gradients of a value and of the value it was computed from.
    let widest = 2 * sizes.layer_activations.iter().map(|layer| layer.widest.at(keys)).max().unwrap_or(0);
    let kept = widest
        + match (plan.order, plan.gradient_checkpointing) {
            (Order::LayerByLayer, _) => most,
            (_, true) => most + (plan.layers_run + 2) * sizes.hidden_size,
            (_, false) => sum,
        };
    // A pass may have the samples with the largest share of answers alone, but no more answers than there are.
    let most = (tokens as f64 * plan.data.answer_share).ceil() as u64;
    let answers = most.min(plan.data.answer_tokens);
    let looks = inputs.settings.looks_at_answers();
    let logits = if looks { (4 * LOGIT_COPIES * answers).saturating_mul(sizes.vocabulary) } else { 0 };
    let formula =
        format!("{width} x {tokens} tokens x {kept} numbers, and 16 x {answers} answers x {}", sizes.vocabulary);
    ((width * tokens).saturating_mul(kept).saturating_add(logits), formula)
}
