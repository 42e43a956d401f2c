//! Converts the graph in memory to protobuf messages. A [`Placement`] decides where large payloads are written.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use onnx_protobuf as pb;
use pb::attribute_proto::AttributeType;
use pb::type_proto;
use protobuf::{EnumOrUnknown, MessageField};

use crate::base::Result;
use crate::ir::{
    Attribute, AttributeKind, Body, DataType, Dim, Function, Graph, Model, Node, Tensor, TensorData, Value, ValueId,
    ValueType,
};

use super::decode::DEFAULT_DOMAIN;
use super::opaque;

/// Place of an initializer's content.
pub enum Placed {
    /// Inside the message.
    Inline,
    /// In a file next to the model.
    External {
        /// Path relative to the model's folder.
        location: String,
        /// First byte in that file.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// Decides where an initializer's content is written, and may write it there.
pub type Placement<'a> = dyn FnMut(&str, &Tensor) -> Result<Placed> + 'a;

/// The whole message except the initializers of the top-level graph.
pub fn model_without_initializers(model: &Model, place: &mut Placement) -> Result<pb::ModelProto> {
    let mut proto: pb::ModelProto = opaque::base(&model.extra);
    proto.ir_version = model.ir_version;
    set_opsets(&mut proto.opset_import, &model.opset_imports);
    proto.producer_name = model.producer_name.clone();
    proto.producer_version = model.producer_version.clone();
    proto.domain = model.domain.clone();
    proto.model_version = model.model_version;
    proto.doc_string = model.doc_string.clone();
    proto.graph = MessageField::some(body(&model.graph, &model.graph.body, place, true)?);
    proto.metadata_props.extend(pairs(&model.metadata));
    proto.functions = model.functions.iter().map(function).collect::<Result<_>>()?;
    Ok(proto)
}

/// Sets metadata of the model. Existing values under the same keys are replaced.
pub fn set_metadata(model: &mut pb::ModelProto, entries: &[(String, String)]) {
    model.metadata_props.retain(|prop| !entries.iter().any(|(key, _)| key == &prop.key));
    model.metadata_props.extend(pairs(entries));
}

/// One initializer. The content of an inline one is included only if `with_content`.
pub fn initializer(name: &str, tensor: &Tensor, placed: &Placed, with_content: bool) -> pb::TensorProto {
    let mut proto = constant(tensor, placed, with_content);
    proto.name = name.to_string();
    proto
}

/// A tensor under its name in the file, if it has one.
fn constant(tensor: &Tensor, placed: &Placed, with_content: bool) -> pb::TensorProto {
    let mut proto: pb::TensorProto = opaque::base(&tensor.extra);
    proto.dims = tensor.dims.iter().map(|&dim| dim as i64).collect();
    proto.data_type = tensor.dtype as i32;
    proto.doc_string = tensor.doc_string.clone();
    proto.metadata_props.extend(pairs(&tensor.metadata));
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

/// Updates the versions in the file's own entries, adds new domains and removes unused ones.
fn set_opsets(entries: &mut Vec<pb::OperatorSetIdProto>, imports: &BTreeMap<String, i64>) {
    let name = |entry: &pb::OperatorSetIdProto| match entry.domain.as_str() {
        DEFAULT_DOMAIN => String::new(),
        other => other.to_string(),
    };
    entries.retain(|entry| imports.contains_key(&name(entry)));
    for (domain, &version) in imports {
        let mut known = false;
        for entry in entries.iter_mut().filter(|entry| name(entry) == *domain) {
            entry.version = version;
            known = true;
        }
        if !known {
            entries.push(pb::OperatorSetIdProto { domain: domain.clone(), version, ..Default::default() });
        }
    }
}

/// Sets a domain. The default domain keeps the file's spelling.
fn set_domain(entry: &mut String, domain: &str) {
    if !domain.is_empty() || entry != DEFAULT_DOMAIN {
        *entry = domain.to_string();
    }
}

fn function(function: &Function) -> Result<pb::FunctionProto> {
    let graph = &function.graph;
    let name = |id: &ValueId| graph.name(*id).to_string();
    let mut proto: pb::FunctionProto = opaque::base(&function.extra);
    proto.name = function.name.clone();
    proto.input = graph.body.inputs.iter().map(name).collect();
    proto.output = graph.body.outputs.iter().map(name).collect();
    proto.attribute = function.attributes.clone();
    proto.attribute_proto = function
        .attribute_defaults
        .iter()
        .map(|(name, item)| attribute(graph, name, item, &mut inline))
        .collect::<Result<_>>()?;
    proto.node = graph.body.nodes.iter().map(|item| node(graph, item, &mut inline)).collect::<Result<_>>()?;
    proto.doc_string = function.doc_string.clone();
    set_opsets(&mut proto.opset_import, &function.opset_imports);
    set_domain(&mut proto.domain, &function.domain);
    proto.overload = function.overload.clone();
    let described = graph.body.inputs.iter().copied().chain(produced(&graph.body));
    set_infos(&mut proto.value_info, graph, described);
    proto.metadata_props.extend(pairs(&function.metadata));
    Ok(proto)
}

fn inline(_: &str, _: &Tensor) -> Result<Placed> {
    Ok(Placed::Inline)
}

fn body(graph: &Graph, body: &Body, place: &mut Placement, top: bool) -> Result<pb::GraphProto> {
    let mut proto: pb::GraphProto = opaque::base(&body.extra);
    proto.name = body.name.clone();
    proto.doc_string = body.doc_string.clone();
    proto.metadata_props.extend(pairs(&body.metadata));
    proto.input = body.inputs.iter().map(|&id| info(graph.value(id))).collect();
    proto.output = body.outputs.iter().map(|&id| info(graph.value(id))).collect();
    let ports: BTreeSet<ValueId> = body.inputs.iter().chain(&body.outputs).copied().collect();
    let weights = body.initializers.iter().map(|(id, _)| *id);
    let inner: Vec<ValueId> = weights.chain(produced(body)).filter(|id| !ports.contains(id)).collect();
    set_infos(&mut proto.value_info, graph, inner.iter().copied());
    proto.value_info.extend(ports.iter().filter_map(|&id| second_info(graph.value(id))));
    let mut annotated = HashSet::new();
    for &id in body.inputs.iter().chain(&inner).chain(&body.outputs) {
        let value = graph.value(id);
        if !value.quantization.is_empty() && annotated.insert(id) {
            let mut annotation: pb::TensorAnnotation = opaque::base(&value.quantization);
            annotation.tensor_name = value.name.clone();
            proto.quantization_annotation.push(annotation);
        }
    }
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

fn produced(body: &Body) -> impl Iterator<Item = ValueId> + '_ {
    body.nodes.iter().flat_map(|node| node.outputs.iter().flatten().copied())
}

/// Replaces the file's entries about these values by the graph's; entries of other names stay.
fn set_infos(entries: &mut Vec<pb::ValueInfoProto>, graph: &Graph, values: impl Iterator<Item = ValueId>) {
    let values: Vec<&Value> = values.map(|id| graph.value(id)).collect();
    if !entries.is_empty() {
        let names: HashSet<&str> = values.iter().map(|value| value.name.as_str()).collect();
        entries.retain(|entry| !names.contains(entry.name.as_str()));
    }
    let has_info = |value: &&&Value| {
        value.ty.is_some() || !value.metadata.is_empty() || !value.doc_string.is_empty() || !value.extra.is_empty()
    };
    entries.extend(values.iter().filter(has_info).map(|value| info(value)));
    entries.extend(values.iter().filter_map(|value| second_info(value)));
}

/// The file's second entry about a value; `None` when the value's type has changed since.
fn second_info(value: &Value) -> Option<pb::ValueInfoProto> {
    if value.described_again.is_empty() {
        return None;
    }
    let mut proto: pb::ValueInfoProto = opaque::base(&value.described_again);
    if let (Some(type_proto::Value::TensorType(tensor)), Some(dtype)) =
        (&proto.type_.value, value.ty.as_ref().and_then(ValueType::dtype))
        && tensor.elem_type != dtype as i32
    {
        return None;
    }
    proto.name = value.name.clone();
    Some(proto)
}

fn info(value: &Value) -> pb::ValueInfoProto {
    let mut proto: pb::ValueInfoProto = opaque::base(&value.extra);
    proto.name = value.name.clone();
    proto.doc_string = value.doc_string.clone();
    proto.metadata_props.extend(pairs(&value.metadata));
    match &value.ty {
        None => {}
        Some(ValueType::Other(bytes)) => proto.type_ = MessageField::some(opaque::base(bytes)),
        Some(ValueType::Tensor { dtype, shape }) => {
            let ty = proto.type_.mut_or_insert_default();
            let mut tensor = match ty.value.take() {
                Some(type_proto::Value::TensorType(tensor)) => tensor,
                _ => type_proto::Tensor::default(),
            };
            tensor.elem_type = *dtype as i32;
            match shape {
                None => tensor.shape = MessageField::none(),
                Some(shape) => set_shape(tensor.shape.mut_or_insert_default(), shape),
            }
            ty.value = Some(type_proto::Value::TensorType(tensor));
        }
    }
    proto
}

/// Sets sizes and names of the axes. Denotations stay when the rank is unchanged.
fn set_shape(proto: &mut pb::TensorShapeProto, shape: &[Dim]) {
    use pb::tensor_shape_proto::dimension::Value::{DimParam, DimValue};
    if proto.dim.len() != shape.len() {
        proto.dim = vec![Default::default(); shape.len()];
    }
    for (entry, dim) in proto.dim.iter_mut().zip(shape) {
        entry.value = match dim {
            Dim::Known(size) => Some(DimValue(*size)),
            Dim::Symbol(name) => Some(DimParam(name.clone())),
            Dim::Unknown => None,
        };
    }
}

fn node(graph: &Graph, node: &Node, place: &mut Placement) -> Result<pb::NodeProto> {
    let names = |ids: &[Option<ValueId>]| {
        ids.iter().map(|id| id.map_or(String::new(), |id| graph.name(id).to_string())).collect()
    };
    let mut proto: pb::NodeProto = opaque::base(&node.extra);
    proto.input = names(&node.inputs);
    proto.output = names(&node.outputs);
    proto.name = node.name.clone();
    proto.op_type = node.op_type.clone();
    set_domain(&mut proto.domain, &node.domain);
    proto.overload = node.overload.clone();
    proto.attribute =
        node.attributes.iter().map(|(name, item)| attribute(graph, name, item, place)).collect::<Result<_>>()?;
    proto.doc_string = node.doc_string.clone();
    proto.metadata_props.extend(pairs(&node.metadata));
    Ok(proto)
}

fn attribute(graph: &Graph, name: &str, item: &Attribute, place: &mut Placement) -> Result<pb::AttributeProto> {
    let mut proto: pb::AttributeProto = opaque::base(&item.extra);
    let tensor = |tensor: &Tensor| constant(tensor, &Placed::Inline, true);
    let ty = match &item.kind {
        AttributeKind::Other(bytes) => {
            return Ok(opaque::base(bytes));
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

/// True when the content is numeric, so that it may be written outside the message.
pub fn is_numeric(tensor: &Tensor) -> bool {
    tensor.dtype != DataType::String
}
