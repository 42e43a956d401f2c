//! Describes a model: components, layers, boundaries, cache ports and shared weights.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::{self, Analysis, parameter_counts};
use crate::base::{Error, Provenance, Result};
use crate::bundle::{Bundle, Component, Record, RecordedStep, Role, SetAside, Tower};
use crate::data::Processor;
use crate::ir::{Graph, Model, ValueId};
use crate::onnx;
use crate::runtime::missing_deepstack;

use super::needs::{Verdict, verdicts};
use super::refusal::drop_refusal;

/// Version of the schema of `inspect --json`.
pub const LAYERS_SCHEMA_VERSION: u32 = 1;

/// Output of `inspect --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Inspection {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Name of the folder's layout.
    pub layout: String,
    /// `model_type` of the config.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_type: Option<String>,
    /// ONNX files of the folder, each with its figures.
    pub components: Vec<ComponentInfo>,
    /// Variants that cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<SetAside>,
    /// Output of the decoder that the residual stream ends in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Decoder layers.
    pub num_layers: usize,
    /// Decoder layers in order; empty where the layers are not understood.
    pub layers: Vec<LayerInfo>,
    /// Changes of the residual stream between decoder layers.
    pub between_layers: Vec<BetweenLayers>,
    /// Outputs beside the result that read the stream and are no cache.
    #[serde(default)]
    pub taps: Vec<TapInfo>,
    /// Layers of the vision tower; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<VisionInfo>,
    /// Whether the steps of a run work on the model.
    #[serde(default)]
    pub verdicts: Vec<Verdict>,
    /// Warnings about these graphs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// One ONNX file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ComponentInfo {
    pub role: Role,
    /// Precision variant; empty for full precision.
    pub variant: String,
    pub file: String,
    pub ir_version: i64,
    /// Opset by domain; the default domain is `ai.onnx`.
    pub opsets: BTreeMap<String, i64>,
    /// Exporter and its version, as the file says.
    pub producer: String,
    pub nodes: usize,
    /// Elements of all weights of the top-level graph.
    pub parameters: u64,
    /// Bytes on disk, external data included.
    pub size_bytes: u64,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerInfo {
    /// Position in the decoder, from 0.
    pub index: usize,
    /// Index in the model that was never pruned.
    pub original_index: usize,
    /// Kinds of its blocks, as in `attention + mlp`.
    pub kind: String,
    /// Layers of the same number have the same operators in the same arrangement.
    pub class: usize,
    /// Tensor of the residual stream before the layer.
    pub input: String,
    /// Tensor of the residual stream after it.
    pub output: String,
    /// Elements of the weights that only this layer reads.
    pub parameters: u64,
    /// Bytes of those weights in the file's own element types.
    pub weight_bytes: u64,
    /// Cache inputs and outputs of the layer; empty for a graph without a cache.
    pub kv_ports: Vec<PortInfo>,
    /// Weights that this layer and others read.
    pub shared_weights: Vec<String>,
    /// Values from outside the layer that it reads: masks, rotary tables, shapes.
    pub shared_values: Vec<String>,
    /// Why the layer cannot be dropped by itself; absent where it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
}

/// A cached tensor of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortInfo {
    /// `key`, `value` or `state N`.
    pub role: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub past: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<String>,
}

/// A change of the residual stream between two layers, such as features added from outside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BetweenLayers {
    /// The layer before; absent in front of the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<usize>,
    pub operators: Vec<String>,
    /// Graph inputs that come in here.
    pub inputs: Vec<String>,
}

/// An output computed from the residual stream that is no cache: a hidden state, features of some layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapInfo {
    /// Name of the graph output.
    pub output: String,
    /// Layers before which it reads the stream; the number of layers is behind the last one.
    pub before: Vec<usize>,
    /// Layers whose inside it reads.
    pub inside: Vec<usize>,
}

/// Layers of the vision tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VisionInfo {
    /// Layers of the vision tower.
    pub num_layers: usize,
    /// The layers in order.
    pub layers: Vec<LayerInfo>,
    /// Outputs of the tower that read the stream at some of its layers.
    #[serde(default)]
    pub taps: Vec<TapInfo>,
    /// Why no layers were found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The decoder component in which layers are counted: prefill and decode in one graph, or otherwise the prefill graph.
///
/// Errors: `Error::Invalid` when the model has no decoder.
pub fn decoder(bundle: &Bundle) -> Result<&Component> {
    match bundle.component(Role::Decoder) {
        Some(component) => Ok(component),
        None => bundle.component(Role::DecoderPrefill).map_or_else(|| bundle.require(Role::Decoder), Ok),
    }
}

/// Layers of the decoder's graph, checked against the config.
///
/// Errors: `Error::Unsupported` when no layers are found in the graph; `Error::Invalid` when the config has another
/// number of layers.
pub fn decoder_analysis(bundle: &Bundle) -> Result<Analysis> {
    let component = decoder(bundle)?;
    let analysis = analysis::analyse(&onnx::load(&bundle.path_of(component))?)?;
    check_count(bundle, component, analysis.map.layers.len())?;
    Ok(analysis)
}

fn check_count(bundle: &Bundle, component: &Component, found: usize) -> Result<()> {
    let Some(config) = bundle.config() else { return Ok(()) };
    match config.num_hidden_layers {
        Some(said) if said != found => Err(Error::invalid(
            format!("`{}`", bundle.path_of(component).display()),
            format!("has {found} layers, `{}` says {said}", config.source),
        )
        .remedy("mend the config, or give the folder that the graph belongs to")),
        _ => Ok(()),
    }
}

/// Describes every component.
///
/// Errors: `Error::Invalid` and `Error::Unsupported` when the most precise variant of a component does not load, no
/// layers are found in the decoder, or config and graph disagree. A vision tower without recognised layers is reported
/// and is not an error.
pub fn inspect(bundle: &Bundle) -> Result<Inspection> {
    let history = bundle.record()?.map(|record| record.history).unwrap_or_default();
    let decoder = decoder(bundle)?;
    let mut components = Vec::new();
    let mut set_aside = Vec::new();
    let mut found = None;
    let mut result = None;
    let mut vision = None;
    let mut warnings = Vec::new();
    let mut judged = Vec::new();
    let processor = Processor::open(bundle);
    for component in bundle.components() {
        let model = match onnx::load(&bundle.path_of(component)) {
            Err(error) if !bundle.is_most_precise(component) => {
                set_aside.push(SetAside { file: component.file.clone(), problem: error.to_string() });
                continue;
            }
            model => model?,
        };
        components.push(component_info(bundle, component, &model)?);
        if component.file == decoder.file {
            let analysis = analysis::analyse(&model)?;
            check_count(bundle, component, analysis.map.layers.len())?;
            warnings.extend(missing_deepstack(bundle, &model.graph));
            let originals = Record::original_layers(&history, Tower::Text, analysis.map.layers.len())?;
            let layers = layers(bundle, &analysis, Tower::Text, &originals);
            let droppable = layers.iter().any(|layer| layer.refusal.is_none());
            let undroppable = layers.iter().find_map(|layer| layer.refusal.clone()).filter(|_| !droppable);
            judged = verdicts(bundle, &analysis, &processor, undroppable);
            result = Some(outer_name(&analysis, analysis.map.result));
            found = Some((layers, between(&analysis), taps(&analysis)));
            if let Some(analysis) = analysis.into_vision() {
                vision = Some(vision_info(bundle, &analysis, &history)?);
            }
        } else if component.role == Role::VisionEncoder && vision.is_none() {
            vision = Some(match analysis::analyse(&model) {
                Ok(analysis) => vision_info(bundle, &analysis, &history)?,
                Err(error) => {
                    VisionInfo { num_layers: 0, layers: Vec::new(), taps: Vec::new(), problem: Some(error.to_string()) }
                }
            });
        }
    }
    if let Ok(processor) = &processor {
        warnings.extend(processor.warning());
        warnings.extend(processor.note(bundle)?);
    }
    let (layers, between_layers, taps) = found.unwrap_or_default();
    let inputs = BTreeMap::from([("model".to_string(), bundle.digest()?)]);
    Ok(Inspection {
        provenance: Provenance::new(LAYERS_SCHEMA_VERSION, inputs, &BTreeMap::<String, String>::new())?
            .with_hub("model", bundle.hub_name())
            .with_variants("model", bundle.chosen_variants()),
        layout: bundle.layout().name.to_string(),
        model_type: bundle.config().map(|config| config.model_type.clone()),
        components,
        set_aside,
        result,
        num_layers: layers.len(),
        layers,
        between_layers,
        taps,
        vision,
        verdicts: judged,
        warnings,
    })
}

fn component_info(bundle: &Bundle, component: &Component, model: &Model) -> Result<ComponentInfo> {
    let graph = &model.graph;
    let domain = |name: &str| if name.is_empty() { "ai.onnx" } else { name }.to_string();
    Ok(ComponentInfo {
        role: component.role,
        variant: component.variant.clone(),
        file: component.file.clone(),
        ir_version: model.ir_version,
        opsets: model.opset_imports.iter().map(|(name, version)| (domain(name), *version)).collect(),
        producer: format!("{} {}", model.producer_name, model.producer_version).trim().to_string(),
        nodes: graph.body.nodes.len(),
        parameters: parameter_counts(&graph.body).values().sum(),
        size_bytes: bundle.size_bytes(component)?,
        inputs: names(graph, &graph.body.inputs),
        outputs: names(graph, &graph.body.outputs),
    })
}

fn layers(bundle: &Bundle, analysis: &Analysis, tower: Tower, originals: &[usize]) -> Vec<LayerInfo> {
    let graph = &analysis.model.graph;
    let rows = analysis.map.layers.iter().zip(originals);
    rows.map(|(layer, &original_index)| LayerInfo {
        index: layer.index,
        original_index,
        kind: layer.kind.clone(),
        class: layer.class,
        input: graph.name(layer.input).to_string(),
        output: graph.name(layer.output).to_string(),
        parameters: layer.parameters(&graph.body),
        weight_bytes: layer.weight_bytes(&graph.body),
        kv_ports: layer
            .ports
            .iter()
            .map(|port| PortInfo {
                role: port.role.label(),
                past: port.past.map(|id| graph.name(id).to_string()),
                present: port.present.map(|id| graph.name(id).to_string()),
            })
            .collect(),
        shared_weights: names(graph, &layer.shared_weights),
        shared_values: names(graph, &layer.shared_values),
        refusal: drop_refusal(bundle, analysis, tower, &[layer.index]).map(|error| error.to_string()),
    })
    .collect()
}

fn between(analysis: &Analysis) -> Vec<BetweenLayers> {
    let graph = &analysis.model.graph;
    let rows = analysis.map.glue.iter().map(|glue| BetweenLayers {
        after: glue.after,
        operators: glue.operators.clone(),
        inputs: names(graph, &glue.inputs),
    });
    rows.collect()
}

fn vision_info(bundle: &Bundle, analysis: &Analysis, history: &[RecordedStep]) -> Result<VisionInfo> {
    let count = analysis.map.layers.len();
    let originals = Record::original_layers(history, Tower::Vision, count)?;
    Ok(VisionInfo {
        num_layers: count,
        layers: layers(bundle, analysis, Tower::Vision, &originals),
        taps: taps(analysis),
        problem: None,
    })
}

fn taps(analysis: &Analysis) -> Vec<TapInfo> {
    let taps = analysis.map.taps.iter();
    taps.map(|tap| TapInfo {
        output: outer_name(analysis, tap.output),
        before: tap.places.clone(),
        inside: tap.inside.clone(),
    })
    .collect()
}

/// An output's name. The branches of an `If` have names of their own; the model's names are
/// those of the `If`'s outputs.
fn outer_name(analysis: &Analysis, output: ValueId) -> String {
    let graph = &analysis.model.graph;
    let outer = || {
        let merged = analysis.merged.as_ref()?;
        let position = graph.body.outputs.iter().position(|id| *id == output)?;
        let outer = merged.original.graph.body.nodes[merged.node].outputs.get(position).copied().flatten()?;
        Some(merged.original.graph.name(outer).to_string())
    };
    outer().unwrap_or_else(|| graph.name(output).to_string())
}

fn names(graph: &Graph, ids: &[ValueId]) -> Vec<String> {
    ids.iter().map(|&id| graph.name(id).to_string()).collect()
}
