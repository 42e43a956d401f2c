//! How the server runs the models: batches, copies, accelerators, versions, warm-up.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ir::{Dim, Model};
use crate::runtime::{Input, InputKind, Port};

use super::schema::model_instance_group::Kind;
use super::schema::model_optimization_policy::{ExecutionAccelerators, execution_accelerators::Accelerator as Named};
use super::schema::model_version_policy::{All, Latest, PolicyChoice, Specific};
use super::schema::{
    ModelConfig, ModelDynamicBatching, ModelInstanceGroup, ModelOptimizationPolicy, ModelVersionPolicy, ModelWarmup,
    model_warmup,
};

/// Settings of a Triton repository.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Serving {
    /// Longest time in microseconds for which the server waits to fill a batch; none: no dynamic batching.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_delay_us: Option<u64>,
    /// Copies of each model on each device; none: the server's choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instances: Option<u32>,
    /// The devices of the copies; none: the server's choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_kind: Option<InstanceKind>,
    /// Accelerator of the ONNX Runtime back end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// Versions that the server loads; none: the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub versions: Option<Versions>,
    /// Runs each component once when it is loaded, before it is ready.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub warm_up: bool,
}

/// Devices of a model's copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceKind {
    /// The processor.
    Cpu,
    /// Every GPU that the server sees.
    Gpu,
}

impl FromStr for InstanceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(InstanceKind::Cpu),
            "gpu" => Ok(InstanceKind::Gpu),
            other => Err(format!("`{other}` is none of cpu, gpu")),
        }
    }
}

/// Accelerators of Triton's ONNX Runtime back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// TensorRT, on a GPU.
    Tensorrt,
    /// OpenVINO, on the processor.
    Openvino,
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tensorrt" => Ok(Accelerator::Tensorrt),
            "openvino" => Ok(Accelerator::Openvino),
            other => Err(format!("`{other}` is none of tensorrt, openvino")),
        }
    }
}

/// Versions of a model that the server loads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Versions {
    /// The newest ones, at most this many.
    Latest(u32),
    /// All that are there.
    All,
    /// These alone.
    Only(Vec<i64>),
}

impl FromStr for Versions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Versions::All);
        }
        if let Some(count) = text.strip_prefix("latest:") {
            let count = count.parse().ok().filter(|count| *count > 0);
            return count.map(Versions::Latest).ok_or_else(|| format!("`{text}` has no number of versions from 1 on"));
        }
        let numbers: Option<Vec<i64>> = text.split(',').map(|number| number.parse().ok()).collect();
        match numbers.filter(|numbers| numbers.contains(&1) && numbers.iter().all(|number| *number > 0)) {
            Some(numbers) => Ok(Versions::Only(numbers)),
            None => Err(format!(
                "`{text}` is none of all, latest:N, and a list of versions with 1 among them, which the export writes"
            )),
        }
    }
}

impl Serving {
    /// Sets what applies to a model of any back end but an ensemble.
    pub(super) fn apply(&self, config: &mut ModelConfig) {
        if self.instances.is_some() || self.instance_kind.is_some() {
            let kind = match self.instance_kind {
                None => Kind::Auto,
                Some(InstanceKind::Cpu) => Kind::Cpu,
                Some(InstanceKind::Gpu) => Kind::Gpu,
            };
            let count = self.instances.map_or(1, |count| i32::try_from(count).unwrap_or(i32::MAX));
            config.instance_group = vec![ModelInstanceGroup { count, kind: kind.into() }];
        }
        self.apply_versions(config);
        if config.max_batch_size > 0 {
            let batching = |delay| ModelDynamicBatching { max_queue_delay_microseconds: delay };
            config.dynamic_batching = self.batch_delay_us.map(batching);
        }
        self.apply_accelerator(config);
    }

    /// Sets the versions that the server loads.
    pub(super) fn apply_versions(&self, config: &mut ModelConfig) {
        let choice = self.versions.as_ref().map(|versions| match versions {
            Versions::Latest(count) => PolicyChoice::Latest(Latest { num_versions: *count }),
            Versions::All => PolicyChoice::All(All {}),
            Versions::Only(versions) => PolicyChoice::Specific(Specific { versions: versions.clone() }),
        });
        config.version_policy = choice.map(|choice| ModelVersionPolicy { policy_choice: Some(choice) });
    }

    fn apply_accelerator(&self, config: &mut ModelConfig) {
        if config.backend == "onnxruntime"
            && let Some(accelerator) = self.accelerator
        {
            let named = |name: &str| vec![Named { name: name.to_string() }];
            let accelerators = match accelerator {
                Accelerator::Tensorrt => ExecutionAccelerators {
                    gpu_execution_accelerator: named("tensorrt"),
                    ..ExecutionAccelerators::default()
                },
                Accelerator::Openvino => ExecutionAccelerators {
                    cpu_execution_accelerator: named("openvino"),
                    ..ExecutionAccelerators::default()
                },
            };
            config.optimization = Some(ModelOptimizationPolicy { execution_accelerators: Some(accelerators) });
        }
    }

    /// Adds a run on zeros: one token behind a cache of one. False when a size or the meaning of an input is unknown.
    pub(super) fn add_warm_up(config: &mut ModelConfig, model: &Model) -> bool {
        let batched = usize::from(config.max_batch_size > 0);
        let mut inputs = Vec::new();
        for port in &config.input {
            let own = model.graph.body.inputs.iter().find(|id| model.graph.name(**id) == port.name);
            let Some(own) = own.and_then(|id| Port::of_value(&model.graph, *id)) else { return false };
            let kind = Input::all_or_given([&own]).first().map(Input::kind);
            let fixed = own.shape.iter().skip(1).all(|dim| matches!(dim, Dim::Known(_)));
            let size = match kind {
                Some(InputKind::AttentionMask) => 2,
                // Zeros say nothing of grids and sizes.
                Some(InputKind::Image("pixel_values" | "pixel_attention_mask")) if fixed => 1,
                Some(InputKind::Image(_) | InputKind::Given | InputKind::Added) | None => return false,
                Some(_) => 1,
            };
            let of = |dim: &Dim| match dim {
                Dim::Known(size) => *size,
                _ => size,
            };
            let mut dims: Vec<i64> = own.shape.iter().skip(batched).map(of).collect();
            if kind == Some(InputKind::AttentionMask) && batched == 0 {
                dims[0] = 1;
            }
            if dims.is_empty() {
                dims.push(1);
            }
            let input = model_warmup::Input { data_type: port.data_type, dims, zero_data: true };
            inputs.push(model_warmup::Entry { key: port.name.clone(), value: Some(input) });
        }
        config.model_warmup = vec![ModelWarmup { name: "zeros".into(), batch_size: 1, inputs }];
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_all_the_latest_or_a_list_with_the_written_one() {
        assert_eq!("all".parse(), Ok(Versions::All));
        assert_eq!("latest:2".parse(), Ok(Versions::Latest(2)));
        assert_eq!("1,3".parse(), Ok(Versions::Only(vec![1, 3])));
        for text in ["latest:0", "latest", "2", "1,0", ""] {
            assert!(text.parse::<Versions>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_batched_models_get_dynamic_batching_and_only_graphs_an_accelerator() {
        let serving = Serving {
            batch_delay_us: Some(100),
            instances: Some(2),
            instance_kind: Some(InstanceKind::Cpu),
            accelerator: Some(Accelerator::Openvino),
            ..Serving::default()
        };
        let mut graph = ModelConfig { max_batch_size: 8, backend: "onnxruntime".into(), ..ModelConfig::default() };
        serving.apply(&mut graph);
        assert!(graph.dynamic_batching.is_some() && graph.optimization.is_some());
        assert_eq!((graph.instance_group[0].count, graph.instance_group[0].kind), (2, Kind::Cpu as i32));
        let mut script = ModelConfig { backend: "python".into(), ..ModelConfig::default() };
        serving.apply(&mut script);
        assert!(script.dynamic_batching.is_none() && script.optimization.is_none());
        assert_eq!(script.instance_group.len(), 1);
    }
}
