//! Builds `config.pbtxt` from typed messages.
//!
//! Source: Triton's model configuration, `ModelConfig` in its public `model_config.proto`.

use std::collections::HashSet;

use prost::Message;
use prost_reflect::text_format::FormatOptions;
use prost_reflect::{DescriptorPool, DynamicMessage};

use crate::base::{Error, Result};
use crate::ir::{self, Dim, ValueId, ValueType};

use super::rules;
use super::schema::{DataType, ModelConfig, ModelInput, ModelOutput, ModelTensorReshape};

/// Name of the model file in every version folder.
pub const MODEL_FILE: &str = "model.onnx";

/// The text of `config.pbtxt` for one model of the ONNX Runtime back end.
///
/// `max_batch_size` applies when every input and output has the same free first dimension. Otherwise the model gets 0,
/// which leaves batching to the client.
///
/// Errors: `Error::Unsupported` for an input or output of unknown rank or of a type that Triton lacks, and for a
/// configuration that the server would reject.
pub fn config_text(name: &str, model: &ir::Model, max_batch_size: u32) -> Result<String> {
    text(&model_config(name, model, max_batch_size)?)
}

/// A configuration as text.
///
/// Errors: as `rules::check`.
pub(super) fn text(config: &ModelConfig) -> Result<String> {
    rules::check(config)?;
    let name = &config.name;
    let pool = DescriptorPool::decode(include_bytes!(concat!(env!("OUT_DIR"), "/model_config.bin")).as_slice())
        .map_err(|e| Error::engine("prost", "the ModelConfig schema", e))?;
    let descriptor = pool
        .get_message_by_name("inference.ModelConfig")
        .ok_or_else(|| Error::engine("prost", "the ModelConfig schema", "lacks inference.ModelConfig"))?;
    let message = DynamicMessage::decode(descriptor, config.encode_to_vec().as_slice())
        .map_err(|e| Error::engine("prost", format!("the configuration of `{name}`"), e))?;
    let mut text = message.to_text_format_with_options(&FormatOptions::new().pretty(true));
    text.push('\n');
    Ok(text)
}

/// The configuration of a model of the ONNX Runtime back end.
pub(super) fn model_config(name: &str, model: &ir::Model, max_batch_size: u32) -> Result<ModelConfig> {
    let graph = &model.graph;
    let weights: HashSet<ValueId> = graph.body.initializers.iter().map(|(id, _)| *id).collect();
    // Before IR version 4 weights are also listed as inputs; clients do not send them.
    let inputs = graph.body.inputs.iter().copied().filter(|id| !weights.contains(id));
    let inputs = inputs.map(|id| port(graph, id)).collect::<Result<Vec<_>>>()?;
    let outputs = graph.body.outputs.iter().map(|&id| port(graph, id)).collect::<Result<Vec<_>>>()?;
    let batched = max_batch_size > 0 && share_a_free_first_dimension(inputs.iter().chain(&outputs));
    let input = |port: TritonPort<'_>| {
        let (dims, reshape) = dims(port.shape, batched);
        ModelInput { name: port.name, data_type: port.data_type.into(), dims, reshape }
    };
    let output = |port: TritonPort<'_>| {
        let (dims, reshape) = dims(port.shape, batched);
        ModelOutput { name: port.name, data_type: port.data_type.into(), dims, reshape }
    };
    Ok(ModelConfig {
        name: name.to_string(),
        max_batch_size: if batched { i32::try_from(max_batch_size).unwrap_or(i32::MAX) } else { 0 },
        input: inputs.into_iter().map(input).collect(),
        output: outputs.into_iter().map(output).collect(),
        default_model_filename: MODEL_FILE.to_string(),
        backend: "onnxruntime".to_string(),
        ..ModelConfig::default()
    })
}

struct TritonPort<'a> {
    name: String,
    data_type: DataType,
    shape: &'a [Dim],
}

fn port(graph: &ir::Graph, id: ValueId) -> Result<TritonPort<'_>> {
    let name = graph.name(id).to_string();
    let unsupported = |problem: String| Error::unsupported(format!("`{name}` in a Triton repository"), problem);
    let ty = graph.value(id).ty.as_ref();
    let Some(ValueType::Tensor { dtype, shape: Some(shape) }) = ty else {
        return Err(unsupported("its element type and rank must be known".to_string())
            .remedy("run shape inference over the graph first"));
    };
    let data_type = triton_type(*dtype).ok_or_else(|| {
        unsupported(format!("Triton has no type for {dtype}")).remedy("convert it inside the graph with a `Cast`")
    })?;
    Ok(TritonPort { name, data_type, shape })
}

fn triton_type(dtype: ir::DataType) -> Option<DataType> {
    Some(match dtype {
        ir::DataType::Bool => DataType::TypeBool,
        ir::DataType::Uint8 => DataType::TypeUint8,
        ir::DataType::Uint16 => DataType::TypeUint16,
        ir::DataType::Uint32 => DataType::TypeUint32,
        ir::DataType::Uint64 => DataType::TypeUint64,
        ir::DataType::Int8 => DataType::TypeInt8,
        ir::DataType::Int16 => DataType::TypeInt16,
        ir::DataType::Int32 => DataType::TypeInt32,
        ir::DataType::Int64 => DataType::TypeInt64,
        ir::DataType::Float16 => DataType::TypeFp16,
        ir::DataType::Float => DataType::TypeFp32,
        ir::DataType::Double => DataType::TypeFp64,
        ir::DataType::String => DataType::TypeString,
        ir::DataType::Bfloat16 => DataType::TypeBf16,
        _ => return None,
    })
}

/// True when all first dimensions are the same symbol, so that one batch dimension applies to the whole model.
fn share_a_free_first_dimension<'a>(ports: impl Iterator<Item = &'a TritonPort<'a>>) -> bool {
    let mut symbols = ports.map(|port| match port.shape.first() {
        Some(Dim::Symbol(name)) => Some(name),
        _ => None,
    });
    let first = symbols.next().flatten();
    first.is_some() && symbols.all(|symbol| symbol == first)
}

/// Triton's `dims`, -1 for free ones. A shape without dimensions after the batch becomes `[1]` with a reshape.
fn dims(shape: &[Dim], batched: bool) -> (Vec<i64>, Option<ModelTensorReshape>) {
    let own = &shape[usize::from(batched).min(shape.len())..];
    let dims = own.iter().map(|dim| match dim {
        Dim::Known(size) => *size,
        Dim::Symbol(_) | Dim::Unknown => -1,
    });
    match dims.collect::<Vec<_>>() {
        empty if empty.is_empty() => (vec![1], Some(ModelTensorReshape { shape: Vec::new() })),
        dims => (dims, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType as Ty, Graph, Model, Value};

    fn model(inputs: &[(&str, Ty, &[Dim])], outputs: &[(&str, Ty, &[Dim])]) -> Model {
        let mut graph = Graph::default();
        let mut add = |&(name, dtype, shape): &(&str, Ty, &[Dim])| {
            let ty = Some(ValueType::Tensor { dtype, shape: Some(shape.to_vec()) });
            graph.add_value(Value { name: name.to_string(), ty, ..Value::default() })
        };
        let inputs = inputs.iter().map(&mut add).collect();
        let outputs = outputs.iter().map(&mut add).collect();
        graph.body.inputs = inputs;
        graph.body.outputs = outputs;
        Model { graph, ..Model::default() }
    }

    fn symbol(name: &str) -> Dim {
        Dim::Symbol(name.to_string())
    }

    #[test]
    fn a_symbolic_first_dimension_shared_by_all_tensors_is_the_batch() {
        let shape = [symbol("batch"), symbol("sequence"), Dim::Known(64)];
        let model = model(&[("ids", Ty::Int64, &shape[..2])], &[("embeds", Ty::Float, &shape)]);
        let text = config_text("embed_tokens", &model, 8).unwrap();
        insta::assert_snapshot!(text, @r#"
        name: "embed_tokens"
        max_batch_size: 8
        input: [{
          name: "ids"
          data_type: TYPE_INT64
          dims: [-1]
        }]
        output: [{
          name: "embeds"
          data_type: TYPE_FP32
          dims: [-1, 64]
        }]
        default_model_filename: "model.onnx"
        backend: "onnxruntime"
        "#);
    }

    #[test]
    fn with_three_rows_of_positions_triton_does_not_batch() {
        let batch = symbol("batch");
        let positions = [Dim::Known(3), batch.clone(), symbol("sequence")];
        let logits = [batch, symbol("sequence"), Dim::Known(9)];
        let model = model(&[("position_ids", Ty::Int64, &positions)], &[("logits", Ty::Float16, &logits)]);
        let config = model_config("decoder", &model, 8).unwrap();
        assert_eq!(config.max_batch_size, 0);
        assert_eq!(config.input[0].dims, vec![3, -1, -1]);
        assert_eq!(config.output[0].dims, vec![-1, -1, 9]);
        assert_eq!(config.output[0].data_type, DataType::TypeFp16 as i32);
    }

    #[test]
    fn different_first_dimensions_are_not_a_batch() {
        let model = model(
            &[("pixel_values", Ty::Float, &[symbol("images"), Dim::Known(3)])],
            &[("image_features", Ty::Float, &[symbol("patches"), Dim::Known(4)])],
        );
        assert_eq!(model_config("vision", &model, 8).unwrap().max_batch_size, 0);
    }

    #[test]
    fn an_input_of_one_number_per_batch_row_is_reshaped() {
        let shape = [symbol("batch"), Dim::Known(4)];
        let model = model(&[("length", Ty::Int64, &shape[..1])], &[("y", Ty::Float, &shape)]);
        let config = model_config("m", &model, 8).unwrap();
        assert_eq!((config.max_batch_size, config.input[0].dims.as_slice()), (8, &[1][..]));
        assert_eq!(config.input[0].reshape, Some(ModelTensorReshape { shape: Vec::new() }));
        rules::check(&config).unwrap();
    }

    #[test]
    fn shapes_that_triton_refuses_are_refused_by_name() {
        let one = [Dim::Known(1)];
        for (name, shape) in [("use_cache", &[][..]), ("empty", &[Dim::Known(0)])] {
            let model = model(&[(name, Ty::Bool, shape)], &[("y", Ty::Float, &one)]);
            let error = config_text("m", &model, 8).unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}` in a Triton repository")), "{error}");
        }
    }

    #[test]
    fn a_type_that_triton_lacks_is_refused_by_name() {
        let model = model(&[("x", Ty::Int4, &[Dim::Known(2)])], &[("y", Ty::Float, &[Dim::Known(2)])]);
        let error = config_text("m", &model, 0).unwrap_err().to_string();
        assert!(error.contains("`x`") && error.contains("int4"), "{error}");
    }
}
