//! Protobuf messages to the graph in memory.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use onnx_protobuf as pb;
use pb::attribute_proto::AttributeType;
use pb::type_proto;
use protobuf::Message;

use crate::base::{Error, Result};
use crate::ir::{
    Attribute, AttributeKind, Body, DataType, Dim, Function, Graph, Model, Node, Tensor, TensorData, Value, ValueId,
    ValueType,
};

use super::external::Sources;
use super::opaque;
use super::wire::Scan;

/// A scanned file as a model.
///
/// Errors: `Error::Invalid` for what no ONNX file may hold, `Error::Unsupported` for sparse and training parts.
pub fn model(scan: &Scan, sources: &mut Sources, path: &Path) -> Result<Model> {
    let subject = || format!("`{}`", path.display());
    let proto = pb::ModelProto::parse_from_bytes(&scan.skeleton)
        .map_err(|e| Error::invalid(subject(), format!("is no ONNX model: {e}")))?;
    if !proto.training_info.is_empty() {
        return Err(Error::unsupported(subject(), "holds a training graph").remedy("export the inference graph alone"));
    }
    let graph = proto.graph.into_option().ok_or_else(|| Error::invalid(subject(), "holds no graph"))?;
    let functions = proto.functions.into_iter().map(|item| function(item, sources)).collect::<Result<_>>()?;
    let mut arena = Arena::new(sources);
    arena.payloads = scan.payloads.iter().map(|range| range.clone().map(|r| (r.start, r.len()))).collect();
    let body = arena.body(graph, true)?;
    Ok(Model {
        ir_version: proto.ir_version,
        opset_imports: opsets(proto.opset_import),
        producer_name: proto.producer_name,
        producer_version: proto.producer_version,
        domain: proto.domain,
        model_version: proto.model_version,
        doc_string: proto.doc_string,
        metadata: pairs(proto.metadata_props),
        functions,
        graph: Graph { values: arena.values, body },
        extra: opaque::take(proto.special_fields),
    })
}

fn function(proto: pb::FunctionProto, sources: &mut Sources) -> Result<Function> {
    let mut arena = Arena::new(sources);
    arena.scopes.push(HashMap::new());
    let mut body = Body { name: proto.name.clone(), ..Body::default() };
    for name in &proto.input {
        let id = arena.define(name)?;
        body.inputs.push(id);
    }
    let attribute_defaults =
        proto.attribute_proto.into_iter().map(|item| arena.attribute(item)).collect::<Result<_>>()?;
    body.nodes = proto.node.into_iter().map(|item| arena.node(item)).collect::<Result<_>>()?;
    for name in &proto.output {
        body.outputs.push(arena.lookup(name));
    }
    arena.value_infos(proto.value_info);
    Ok(Function {
        name: proto.name,
        domain: domain(proto.domain),
        overload: proto.overload,
        opset_imports: opsets(proto.opset_import),
        attributes: proto.attribute,
        attribute_defaults,
        doc_string: proto.doc_string,
        metadata: pairs(proto.metadata_props),
        graph: Graph { values: arena.values, body },
        extra: opaque::take(proto.special_fields),
    })
}

fn domain(name: String) -> String {
    if name == "ai.onnx" { String::new() } else { name }
}

fn opsets(imports: Vec<pb::OperatorSetIdProto>) -> BTreeMap<String, i64> {
    imports.into_iter().map(|item| (domain(item.domain), item.version)).collect()
}

fn pairs(entries: Vec<pb::StringStringEntryProto>) -> Vec<(String, String)> {
    entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
}

/// Values by name, innermost scope last.
struct Arena<'a> {
    values: Vec<Value>,
    scopes: Vec<HashMap<String, ValueId>>,
    payloads: Vec<Option<(usize, usize)>>,
    sources: &'a mut Sources,
}

impl<'a> Arena<'a> {
    fn new(sources: &'a mut Sources) -> Self {
        Arena { values: Vec::new(), scopes: Vec::new(), payloads: Vec::new(), sources }
    }

    fn find(&self, name: &str) -> Option<ValueId> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name)).copied()
    }

    /// The value of this name; a name that nothing has defined yet gets a value that `ir::check` will miss.
    fn lookup(&mut self, name: &str) -> ValueId {
        match self.find(name) {
            Some(id) => id,
            None => self.insert(name),
        }
    }

    fn insert(&mut self, name: &str) -> ValueId {
        let mut holder = Graph { values: std::mem::take(&mut self.values), body: Body::default() };
        let id = holder.add_value(Value { name: name.to_string(), ..Value::default() });
        self.values = holder.values;
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_string(), id);
        }
        id
    }

    fn define(&mut self, name: &str) -> Result<ValueId> {
        if name.is_empty() {
            return Err(Error::invalid("a graph input or initializer", "has no name"));
        }
        if self.scopes.last().is_some_and(|scope| scope.contains_key(name)) {
            return Err(Error::invalid(format!("value `{name}`"), "is defined twice"));
        }
        Ok(self.insert(name))
    }

    fn body(&mut self, proto: pb::GraphProto, top: bool) -> Result<Body> {
        if let Some(sparse) = proto.sparse_initializer.first() {
            return Err(Error::unsupported(format!("initializer `{}`", sparse.values.name), "it is sparse")
                .remedy("export the model with dense weights"));
        }
        self.scopes.push(HashMap::new());
        let mut body = Body {
            name: proto.name.clone(),
            doc_string: proto.doc_string.clone(),
            metadata: pairs(proto.metadata_props),
            ..Body::default()
        };
        let kept = pb::GraphProto {
            quantization_annotation: proto.quantization_annotation,
            special_fields: proto.special_fields,
            ..pb::GraphProto::default()
        };
        body.extra = kept.write_to_bytes().unwrap_or_default();
        for info in proto.input {
            let id = self.define(&info.name)?;
            self.describe(id, info);
            body.inputs.push(id);
        }
        for (position, tensor) in proto.initializer.into_iter().enumerate() {
            let known = self.scopes.last().and_then(|scope| scope.get(&tensor.name)).copied();
            let id = match known {
                Some(id) if body.inputs.contains(&id) => id,
                _ => self.define(&tensor.name)?,
            };
            let payload = if top { self.payloads.get(position).copied().flatten() } else { None };
            let decoded = self.tensor(tensor, payload)?;
            body.initializers.push((id, decoded));
        }
        for node in proto.node {
            let node = self.node(node)?;
            body.nodes.push(node);
        }
        for info in proto.output {
            let id = self.lookup(&info.name);
            self.describe(id, info);
            body.outputs.push(id);
        }
        self.value_infos(proto.value_info);
        self.scopes.pop();
        Ok(body)
    }

    /// Notes what the file says of values that exist; entries for names that nothing defines are dropped.
    fn value_infos(&mut self, infos: Vec<pb::ValueInfoProto>) {
        for info in infos {
            if let Some(id) = self.scopes.last().and_then(|scope| scope.get(&info.name)).copied() {
                self.describe(id, info);
            }
        }
    }

    fn describe(&mut self, id: ValueId, info: pb::ValueInfoProto) {
        let value = &mut self.values[id.index()];
        value.ty = info.type_.into_option().map(value_type);
        value.doc_string = info.doc_string;
        value.metadata = pairs(info.metadata_props);
    }

    fn node(&mut self, proto: pb::NodeProto) -> Result<Node> {
        let inputs = proto.input.iter().map(|name| (!name.is_empty()).then(|| self.lookup(name))).collect();
        let attributes = proto.attribute.into_iter().map(|item| self.attribute(item)).collect::<Result<_>>()?;
        let mut outputs = Vec::with_capacity(proto.output.len());
        for name in &proto.output {
            outputs.push(if name.is_empty() { None } else { Some(self.output(name)?) });
        }
        Ok(Node {
            name: proto.name,
            op_type: proto.op_type,
            domain: domain(proto.domain),
            overload: proto.overload,
            inputs,
            outputs,
            attributes,
            doc_string: proto.doc_string,
            metadata: pairs(proto.metadata_props),
            extra: opaque::take(proto.special_fields),
        })
    }

    /// A node output defines its name in the innermost scope, unless a reader met the name there before.
    fn output(&mut self, name: &str) -> Result<ValueId> {
        match self.scopes.last().and_then(|scope| scope.get(name)).copied() {
            Some(id) => Ok(id),
            None => Ok(self.insert(name)),
        }
    }

    fn attribute(&mut self, proto: pb::AttributeProto) -> Result<(String, Attribute)> {
        let subject = || format!("attribute `{}`", proto.name);
        let name = proto.name.clone();
        let doc_string = proto.doc_string.clone();
        let number = proto.type_.value();
        if !proto.ref_attr_name.is_empty() {
            let kind = AttributeKind::Reference { name: proto.ref_attr_name, type_number: number };
            return Ok((name, Attribute { kind, doc_string }));
        }
        let declared = proto
            .type_
            .enum_value()
            .map_err(|number| Error::invalid(subject(), format!("has type {number}, which ONNX does not define")))?;
        let missing =
            || Error::invalid(format!("attribute `{}`", proto.name), format!("says {declared:?} and holds none"));
        let kind = match declared {
            AttributeType::INT => AttributeKind::Int(proto.i),
            AttributeType::FLOAT => AttributeKind::Float(proto.f),
            AttributeType::STRING => AttributeKind::String(proto.s),
            AttributeType::INTS => AttributeKind::Ints(proto.ints),
            AttributeType::FLOATS => AttributeKind::Floats(proto.floats),
            AttributeType::STRINGS => AttributeKind::Strings(proto.strings),
            AttributeType::TENSOR => {
                let tensor = proto.t.clone().into_option().ok_or_else(missing)?;
                AttributeKind::Tensor(self.tensor(tensor, None)?)
            }
            AttributeType::TENSORS => AttributeKind::Tensors(
                proto.tensors.into_iter().map(|item| self.tensor(item, None)).collect::<Result<_>>()?,
            ),
            AttributeType::GRAPH => {
                let graph = proto.g.clone().into_option().ok_or_else(missing)?;
                AttributeKind::Graph(self.body(graph, false)?)
            }
            AttributeType::GRAPHS => AttributeKind::Graphs(
                proto.graphs.into_iter().map(|item| self.body(item, false)).collect::<Result<_>>()?,
            ),
            AttributeType::UNDEFINED => {
                return Err(Error::invalid(subject(), "has no type").remedy("export with a current exporter"));
            }
            _ => AttributeKind::Other(proto.write_to_bytes().unwrap_or_default()),
        };
        Ok((name, Attribute { kind, doc_string }))
    }

    fn tensor(&mut self, proto: pb::TensorProto, payload: Option<(usize, usize)>) -> Result<Tensor> {
        let subject = || format!("tensor `{}`", proto.name);
        let dtype = DataType::from_number(proto.data_type)
            .ok_or_else(|| Error::unsupported(subject(), format!("element type number {}", proto.data_type)))?;
        if proto.segment.is_some() {
            return Err(Error::unsupported(subject(), "it is split into segments"));
        }
        let dims = proto
            .dims
            .iter()
            .map(|&dim| u64::try_from(dim).map_err(|_| Error::invalid(subject(), format!("has a dimension of {dim}"))))
            .collect::<Result<Vec<u64>>>()?;
        let want = dims
            .iter()
            .try_fold(1u64, |count, &dim| count.checked_mul(dim))
            .and_then(|count| dtype.byte_len(count))
            .ok_or_else(|| Error::invalid(subject(), format!("shape {dims:?} overflows")))?;
        let external = proto.data_location.value() == 1;
        let data = if external {
            let entries: Vec<(&str, &str)> =
                proto.external_data.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect();
            self.sources.external(&proto.name, &entries, want)?
        } else if let Some((offset, length)) = payload {
            self.sources.inside(offset, length)
        } else if dtype == DataType::String {
            TensorData::Strings(proto.string_data.into())
        } else if !proto.raw_data.is_empty() || want == 0 {
            TensorData::Bytes(proto.raw_data.into())
        } else {
            TensorData::Bytes(typed_bytes(&proto, dtype).into())
        };
        let tensor = Tensor {
            dtype,
            dims,
            data,
            doc_string: proto.doc_string,
            metadata: pairs(proto.metadata_props),
            extra: opaque::take(proto.special_fields),
        };
        if dtype != DataType::String && tensor.byte_len() != want {
            return Err(Error::invalid(
                format!("tensor `{}`", proto.name),
                format!("holds {} bytes, {} of shape {:?} takes {want}", tensor.byte_len(), dtype, tensor.dims),
            ));
        }
        Ok(tensor)
    }
}

/// The typed fields of a tensor as raw bytes, as onnx.proto says which type lives in which field.
fn typed_bytes(proto: &pb::TensorProto, dtype: DataType) -> Vec<u8> {
    use DataType::*;
    match dtype {
        Float | Complex64 => proto.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Double | Complex128 => proto.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Int64 => proto.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Uint32 => proto.uint64_data.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        Uint64 => proto.uint64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Int32 => proto.int32_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Int16 | Uint16 | Float16 | Bfloat16 => {
            proto.int32_data.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect()
        }
        // One byte of content per number, sub-byte types packed inside it.
        _ => proto.int32_data.iter().map(|&v| v as u8).collect(),
    }
}

fn value_type(proto: pb::TypeProto) -> ValueType {
    match proto.value {
        Some(type_proto::Value::TensorType(ref tensor)) if proto.denotation.is_empty() => {
            let Some(dtype) = DataType::from_number(tensor.elem_type) else {
                return ValueType::Other(proto.write_to_bytes().unwrap_or_default());
            };
            let shape = tensor.shape.as_ref().map(|shape| {
                shape
                    .dim
                    .iter()
                    .map(|dim| match &dim.value {
                        Some(pb::tensor_shape_proto::dimension::Value::DimValue(size)) => Dim::Known(*size),
                        Some(pb::tensor_shape_proto::dimension::Value::DimParam(name)) if !name.is_empty() => {
                            Dim::Symbol(name.clone())
                        }
                        _ => Dim::Unknown,
                    })
                    .collect()
            });
            ValueType::Tensor { dtype, shape }
        }
        _ => ValueType::Other(proto.write_to_bytes().unwrap_or_default()),
    }
}
