//! The graph in memory to protobuf messages. Large payloads are handed to a [`Placement`], which says where they go.

use onnx_protobuf as pb;
use pb::attribute_proto::AttributeType;
use pb::type_proto;
use protobuf::{EnumOrUnknown, Message, MessageField};

use crate::base::{Error, Result};
use crate::ir::{
    Attribute, AttributeKind, Body, DataType, Dim, Function, Graph, Model, Node, Tensor, TensorData, Value, ValueType,
};

use super::opaque;

/// Where the content of an initializer went.
pub enum Placed {
    /// Put it into the message.
    Inline,
    /// It is in a file beside the model.
    External { location: String, offset: u64, length: u64 },
}

/// Decides where an initializer's content goes, and may write it there.
pub type Placement<'a> = dyn FnMut(&str, &Tensor) -> Result<Placed> + 'a;

/// The whole message but for the initializers of the top-level graph.
pub fn model_without_initializers(model: &Model, place: &mut Placement) -> Result<pb::ModelProto> {
    let functions = model.functions.iter().map(function).collect::<Result<_>>()?;
    Ok(pb::ModelProto {
        ir_version: model.ir_version,
        opset_import: opsets(&model.opset_imports),
        producer_name: model.producer_name.clone(),
        producer_version: model.producer_version.clone(),
        domain: model.domain.clone(),
        model_version: model.model_version,
        doc_string: model.doc_string.clone(),
        graph: MessageField::some(body(&model.graph, &model.graph.body, place, true)?),
        metadata_props: pairs(&model.metadata),
        functions,
        special_fields: opaque::put(&model.extra),
        ..pb::ModelProto::default()
    })
}

/// Sets metadata of the model, replacing values under the same keys.
pub fn set_metadata(model: &mut pb::ModelProto, entries: &[(String, String)]) {
    model.metadata_props.retain(|prop| !entries.iter().any(|(key, _)| key == &prop.key));
    model.metadata_props.extend(pairs(entries));
}

/// One initializer; the content of an inline one only if `with_content`.
pub fn initializer(name: &str, tensor: &Tensor, placed: &Placed, with_content: bool) -> pb::TensorProto {
    let mut proto = pb::TensorProto {
        name: name.to_string(),
        dims: tensor.dims.iter().map(|&dim| dim as i64).collect(),
        data_type: tensor.dtype as i32,
        doc_string: tensor.doc_string.clone(),
        metadata_props: pairs(&tensor.metadata),
        special_fields: opaque::put(&tensor.extra),
        ..pb::TensorProto::default()
    };
    match placed {
        Placed::External { location, offset, length } => {
            proto.data_location = EnumOrUnknown::from_i32(1);
            let entries =
                [("location", location.clone()), ("offset", offset.to_string()), ("length", length.to_string())];
            proto.external_data = entries.into_iter().map(|(key, value)| entry(key, &value)).collect();
        }
        Placed::Inline => match &tensor.data {
            TensorData::Strings(items) => proto.string_data = items.to_vec(),
            _ if with_content => proto.raw_data = tensor.bytes().to_vec(),
            _ => {}
        },
    }
    proto
}

fn entry(key: &str, value: &str) -> pb::StringStringEntryProto {
    pb::StringStringEntryProto { key: key.to_string(), value: value.to_string(), ..Default::default() }
}

fn pairs(entries: &[(String, String)]) -> Vec<pb::StringStringEntryProto> {
    entries.iter().map(|(key, value)| entry(key, value)).collect()
}

fn opsets(imports: &std::collections::BTreeMap<String, i64>) -> Vec<pb::OperatorSetIdProto> {
    imports
        .iter()
        .map(|(domain, &version)| pb::OperatorSetIdProto { domain: domain.clone(), version, ..Default::default() })
        .collect()
}

fn function(function: &Function) -> Result<pb::FunctionProto> {
    let graph = &function.graph;
    let name = |id: &crate::ir::ValueId| graph.name(*id).to_string();
    Ok(pb::FunctionProto {
        name: function.name.clone(),
        input: graph.body.inputs.iter().map(name).collect(),
        output: graph.body.outputs.iter().map(name).collect(),
        attribute: function.attributes.clone(),
        attribute_proto: function
            .attribute_defaults
            .iter()
            .map(|(name, item)| attribute(graph, name, item, &mut inline))
            .collect::<Result<_>>()?,
        node: graph.body.nodes.iter().map(|item| node(graph, item, &mut inline)).collect::<Result<_>>()?,
        doc_string: function.doc_string.clone(),
        opset_import: opsets(&function.opset_imports),
        domain: function.domain.clone(),
        overload: function.overload.clone(),
        value_info: infos(graph, produced(&graph.body)),
        metadata_props: pairs(&function.metadata),
        special_fields: opaque::put(&function.extra),
    })
}

fn inline(_: &str, _: &Tensor) -> Result<Placed> {
    Ok(Placed::Inline)
}

fn body(graph: &Graph, body: &Body, place: &mut Placement, top: bool) -> Result<pb::GraphProto> {
    let mut proto = pb::GraphProto::parse_from_bytes(&body.extra)
        .map_err(|e| Error::invalid(format!("graph `{}`", body.name), format!("carried fields: {e}")))?;
    let known: std::collections::HashSet<&str> =
        body.initializers.iter().map(|(id, _)| *id).chain(produced(body)).map(|id| graph.name(id)).collect();
    proto.quantization_annotation.retain(|item| known.contains(item.tensor_name.as_str()));
    proto.name = body.name.clone();
    proto.doc_string = body.doc_string.clone();
    proto.metadata_props = pairs(&body.metadata);
    proto.input = body.inputs.iter().map(|&id| info(graph.value(id))).collect();
    proto.output = body.outputs.iter().map(|&id| info(graph.value(id))).collect();
    let outputs: std::collections::HashSet<_> = body.outputs.iter().copied().collect();
    proto.value_info = infos(graph, produced(body).filter(|id| !outputs.contains(id)));
    if !top {
        for (id, tensor) in &body.initializers {
            let name = graph.name(*id);
            let placed = place(name, tensor)?;
            proto.initializer.push(initializer(name, tensor, &placed, true));
        }
    }
    proto.node = body.nodes.iter().map(|item| node(graph, item, place)).collect::<Result<_>>()?;
    Ok(proto)
}

fn produced(body: &Body) -> impl Iterator<Item = crate::ir::ValueId> + '_ {
    body.nodes.iter().flat_map(|node| node.outputs.iter().flatten().copied())
}

/// What the graph says of some values, where it says anything.
fn infos(graph: &Graph, ids: impl Iterator<Item = crate::ir::ValueId>) -> Vec<pb::ValueInfoProto> {
    ids.map(|id| graph.value(id))
        .filter(|value| value.ty.is_some() || !value.metadata.is_empty() || !value.doc_string.is_empty())
        .map(info)
        .collect()
}

fn info(value: &Value) -> pb::ValueInfoProto {
    pb::ValueInfoProto {
        name: value.name.clone(),
        type_: value.ty.as_ref().map(value_type).into(),
        doc_string: value.doc_string.clone(),
        metadata_props: pairs(&value.metadata),
        ..Default::default()
    }
}

fn value_type(ty: &ValueType) -> pb::TypeProto {
    match ty {
        // The bytes were written by the decoder, so they parse.
        ValueType::Other(bytes) => pb::TypeProto::parse_from_bytes(bytes).unwrap_or_default(),
        ValueType::Tensor { dtype, shape } => {
            let shape = shape
                .as_ref()
                .map(|dims| pb::TensorShapeProto { dim: dims.iter().map(dimension).collect(), ..Default::default() });
            let tensor = type_proto::Tensor { elem_type: *dtype as i32, shape: shape.into(), ..Default::default() };
            pb::TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }
        }
    }
}

fn dimension(dim: &Dim) -> pb::tensor_shape_proto::Dimension {
    use pb::tensor_shape_proto::dimension::Value::{DimParam, DimValue};
    let value = match dim {
        Dim::Known(size) => Some(DimValue(*size)),
        Dim::Symbol(name) => Some(DimParam(name.clone())),
        Dim::Unknown => None,
    };
    pb::tensor_shape_proto::Dimension { value, ..Default::default() }
}

fn node(graph: &Graph, node: &Node, place: &mut Placement) -> Result<pb::NodeProto> {
    let names = |ids: &[Option<crate::ir::ValueId>]| {
        ids.iter().map(|id| id.map_or(String::new(), |id| graph.name(id).to_string())).collect()
    };
    Ok(pb::NodeProto {
        input: names(&node.inputs),
        output: names(&node.outputs),
        name: node.name.clone(),
        op_type: node.op_type.clone(),
        domain: node.domain.clone(),
        overload: node.overload.clone(),
        attribute: node
            .attributes
            .iter()
            .map(|(name, item)| attribute(graph, name, item, place))
            .collect::<Result<_>>()?,
        doc_string: node.doc_string.clone(),
        metadata_props: pairs(&node.metadata),
        special_fields: opaque::put(&node.extra),
    })
}

fn attribute(graph: &Graph, name: &str, item: &Attribute, place: &mut Placement) -> Result<pb::AttributeProto> {
    let mut proto = pb::AttributeProto::default();
    let tensor = |tensor: &Tensor| initializer("", tensor, &Placed::Inline, true);
    let ty = match &item.kind {
        AttributeKind::Other(bytes) => {
            return pb::AttributeProto::parse_from_bytes(bytes)
                .map_err(|e| Error::invalid(format!("attribute `{name}`"), e.to_string()));
        }
        AttributeKind::Reference { name, type_number } => {
            proto.ref_attr_name = name.clone();
            proto.type_ = EnumOrUnknown::from_i32(*type_number);
            None
        }
        AttributeKind::Int(value) => {
            proto.i = *value;
            Some(AttributeType::INT)
        }
        AttributeKind::Float(value) => {
            proto.f = *value;
            Some(AttributeType::FLOAT)
        }
        AttributeKind::String(value) => {
            proto.s = value.clone();
            Some(AttributeType::STRING)
        }
        AttributeKind::Ints(values) => {
            proto.ints = values.clone();
            Some(AttributeType::INTS)
        }
        AttributeKind::Floats(values) => {
            proto.floats = values.clone();
            Some(AttributeType::FLOATS)
        }
        AttributeKind::Strings(values) => {
            proto.strings = values.clone();
            Some(AttributeType::STRINGS)
        }
        AttributeKind::Tensor(value) => {
            proto.t = MessageField::some(tensor(value));
            Some(AttributeType::TENSOR)
        }
        AttributeKind::Tensors(values) => {
            proto.tensors = values.iter().map(tensor).collect();
            Some(AttributeType::TENSORS)
        }
        AttributeKind::Graph(inner) => {
            proto.g = MessageField::some(body(graph, inner, place, false)?);
            Some(AttributeType::GRAPH)
        }
        AttributeKind::Graphs(inner) => {
            proto.graphs = inner.iter().map(|item| body(graph, item, place, false)).collect::<Result<_>>()?;
            Some(AttributeType::GRAPHS)
        }
    };
    proto.name = name.to_string();
    proto.doc_string = item.doc_string.clone();
    if let Some(ty) = ty {
        proto.type_ = ty.into();
    }
    Ok(proto)
}

/// True where the content is numbers, so that it may live outside the message.
pub fn is_numeric(tensor: &Tensor) -> bool {
    tensor.dtype != DataType::String
}
