//! Converts protobuf messages to the graph in memory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem::take;
use std::path::Path;

use onnx_protobuf as pb;
use pb::attribute_proto::AttributeType;
use protobuf::{EnumOrUnknown, Message};

use crate::base::{Error, Result};
use crate::ir::{Attribute, AttributeKind, Body, Function, Graph, Model, Node, Opaque, Value, ValueId};

use super::external::Sources;
use super::opaque::{self, pairs};
use super::order;
use super::tensor::{tensor, value_type};
use super::wire::Scan;

/// The other spelling of the default domain, `""`.
pub const DEFAULT_DOMAIN: &str = "ai.onnx";

/// The newest version of the file format, and of each domain's operators, that this version supports. Other domains may
/// have any version.
///
/// Source: the versions table of ONNX 1.23; ONNX Runtime's own operators have one version.
const NEWEST_FORMAT: i64 = 14;
const NEWEST_OPSETS: &[(&str, i64)] =
    &[(DEFAULT_DOMAIN, 28), ("ai.onnx.ml", 5), ("ai.onnx.preview.training", 1), ("com.microsoft", 1)];

/// Converts a scanned file to a model.
///
/// Errors: `Error::Invalid` when the file breaks a rule of ONNX, `Error::Unsupported` for sparse and training parts and
/// for unknown versions.
pub fn model(scan: &Scan, sources: &mut Sources, path: &Path) -> Result<Model> {
    let subject = || format!("`{}`", path.display());
    let mut proto = pb::ModelProto::parse_from_bytes(&scan.skeleton)
        .map_err(|e| Error::invalid(subject(), format!("is not an ONNX model: {e}")))?;
    if !proto.training_info.is_empty() {
        return Err(Error::unsupported(subject(), "holds a training graph").remedy("export the inference graph alone"));
    }
    if proto.ir_version < 1 {
        let found = if proto.ir_version == 0 {
            "has no `ir_version`".into()
        } else {
            format!("has `ir_version` {}", proto.ir_version)
        };
        return Err(Error::invalid(subject(), format!("{found}, so its format version is unknown")).remedy(
            "export the model again, or set `ir_version` to that of the exporter's version of ONNX (8 for opset 17)",
        ));
    }
    if proto.ir_version > NEWEST_FORMAT {
        let problem = format!("has `ir_version` {}, and versions up to {NEWEST_FORMAT} are known", proto.ir_version);
        return Err(Error::unsupported(subject(), problem)
            .remedy("export the model again with a released version of ONNX, or correct the number"));
    }
    let opset_imports = opsets(&proto.opset_import, &subject())?;
    if opset_imports.is_empty() {
        return Err(Error::invalid(subject(), "has no `opset_import`, so the versions of its operators are unknown")
            .remedy("export the model again, or add the opset version that it was exported for"));
    }
    let graph = proto.graph.take().ok_or_else(|| Error::invalid(subject(), "holds no graph"))?;
    let functions =
        take(&mut proto.functions).into_iter().map(|item| function(item, sources)).collect::<Result<Vec<_>>>()?;
    let mut known = HashSet::new();
    for function in &functions {
        if !known.insert((&function.domain, &function.name, &function.overload)) {
            return Err(Error::invalid(format!("function `{}`", function.name), "is defined twice"));
        }
    }
    let mut arena = Arena::new(sources);
    arena.payloads = scan.payloads.iter().map(|range| range.clone().map(|r| (r.start, r.len()))).collect();
    let body = arena.body(graph, true)?;
    Ok(Model {
        ir_version: take(&mut proto.ir_version),
        opset_imports,
        producer_name: take(&mut proto.producer_name),
        producer_version: take(&mut proto.producer_version),
        domain: take(&mut proto.domain),
        model_version: take(&mut proto.model_version),
        doc_string: take(&mut proto.doc_string),
        metadata: pairs(&mut proto.metadata_props),
        functions,
        graph: Graph { values: arena.values, body },
        extra: opaque::rest(&proto),
    })
}

fn function(mut proto: pb::FunctionProto, sources: &mut Sources) -> Result<Function> {
    let mut arena = Arena::new(sources);
    arena.scopes.push(HashMap::new());
    let mut body = Body { name: proto.name.clone(), ..Body::default() };
    for name in take(&mut proto.input) {
        let id = arena.define(&name)?;
        body.inputs.push(id);
    }
    let attribute_defaults =
        take(&mut proto.attribute_proto).into_iter().map(|item| arena.attribute(item)).collect::<Result<_>>()?;
    let nodes = order::sorted(take(&mut proto.node))?;
    body.nodes = nodes.into_iter().map(|item| arena.node(item)).collect::<Result<_>>()?;
    for name in take(&mut proto.output) {
        body.outputs.push(arena.lookup(&name));
    }
    proto.value_info = arena.value_infos(take(&mut proto.value_info));
    Ok(Function {
        opset_imports: opsets(&proto.opset_import, &format!("function `{}`", proto.name))?,
        name: take(&mut proto.name),
        domain: domain(&mut proto.domain),
        overload: take(&mut proto.overload),
        attributes: take(&mut proto.attribute),
        attribute_defaults,
        doc_string: take(&mut proto.doc_string),
        metadata: pairs(&mut proto.metadata_props),
        graph: Graph { values: arena.values, body },
        extra: opaque::rest(&proto),
    })
}

/// The domain's name in the graph in memory. For the default domain the file's spelling stays in the message.
fn domain(name: &mut String) -> String {
    if name == DEFAULT_DOMAIN { String::new() } else { take(name) }
}

/// Versions by domain. The entries stay in the message, which preserves their order and spelling.
fn opsets(imports: &[pb::OperatorSetIdProto], subject: &str) -> Result<BTreeMap<String, i64>> {
    let mut versions = BTreeMap::new();
    for import in imports {
        let name = if import.domain.is_empty() { DEFAULT_DOMAIN } else { &import.domain };
        if import.version < 1 {
            let problem =
                format!("imports version {} of the operators of `{name}`, expected 1 or more", import.version);
            return Err(Error::invalid(subject, problem).remedy("export the model again"));
        }
        let newest = NEWEST_OPSETS.iter().find(|&&(domain, _)| domain == name).map(|&(_, newest)| newest);
        if let Some(newest) = newest.filter(|&newest| import.version > newest) {
            let problem = format!(
                "imports version {} of the operators of `{name}`, and versions up to {newest} are known",
                import.version
            );
            return Err(Error::unsupported(subject, problem).remedy(format!(
                "export the model again with `{name}` of version {newest} or older, or correct the number"
            )));
        }
        let key = if name == DEFAULT_DOMAIN { String::new() } else { name.to_string() };
        if let Some(other) = versions.insert(key, import.version).filter(|&other| other != import.version) {
            let problem = format!("imports versions {other} and {} of the operators of `{name}`", import.version);
            return Err(Error::invalid(subject, problem).remedy("export the model again, or keep the right one"));
        }
    }
    Ok(versions)
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

    /// The value of this name; an undefined name gets a placeholder, which `ir::check` reports.
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

    fn body(&mut self, mut proto: pb::GraphProto, top: bool) -> Result<Body> {
        if let Some(sparse) = proto.sparse_initializer.first() {
            return Err(Error::unsupported(format!("initializer `{}`", sparse.values.name), "it is sparse")
                .remedy("export the model with dense weights"));
        }
        self.scopes.push(HashMap::new());
        let mut body = Body {
            name: take(&mut proto.name),
            doc_string: take(&mut proto.doc_string),
            metadata: pairs(&mut proto.metadata_props),
            ..Body::default()
        };
        for info in take(&mut proto.input) {
            let id = self.define(&info.name)?;
            self.describe(id, info);
            body.inputs.push(id);
        }
        let inputs: HashSet<ValueId> = body.inputs.iter().copied().collect();
        for (position, item) in take(&mut proto.initializer).into_iter().enumerate() {
            let known = self.scopes.last().and_then(|scope| scope.get(&item.name)).copied();
            let id = match known {
                Some(id) if inputs.contains(&id) => id,
                _ => self.define(&item.name)?,
            };
            let payload = if top { self.payloads.get(position).copied().flatten() } else { None };
            let decoded = tensor(item, payload, true, self.sources)?;
            body.initializers.push((id, decoded));
        }
        for node in order::sorted(take(&mut proto.node))? {
            let node = self.node(node)?;
            body.nodes.push(node);
        }
        for info in take(&mut proto.output) {
            if info.name.is_empty() {
                return Err(Error::invalid(format!("an output of graph `{}`", body.name), "has no name"));
            }
            let id = self.lookup(&info.name);
            self.describe(id, info);
            body.outputs.push(id);
        }
        proto.value_info = self.value_infos(take(&mut proto.value_info));
        self.annotations(&mut proto.quantization_annotation);
        body.extra = opaque::rest(&proto);
        self.scopes.pop();
        Ok(body)
    }

    fn innermost(&self, name: &str) -> Option<ValueId> {
        self.scopes.last().and_then(|scope| scope.get(name)).copied()
    }

    /// Records the file's entries about existing values, and returns the entries whose names this scope does not
    /// define. The entry of an input or output takes precedence over one of `value_info`.
    fn value_infos(&mut self, infos: Vec<pb::ValueInfoProto>) -> Vec<pb::ValueInfoProto> {
        let mut others = Vec::new();
        for mut info in infos {
            match self.innermost(&info.name) {
                Some(id) if self.values[id.index()].ty.is_none() => self.describe(id, info),
                Some(id) if self.values[id.index()].described_again.is_empty() => {
                    info.name.clear();
                    self.values[id.index()].described_again = opaque::rest(&info);
                }
                Some(_) => {}
                None => others.push(info),
            }
        }
        others
    }

    /// Moves the annotations of this scope's values out of the list, one per value.
    fn annotations(&mut self, list: &mut Vec<pb::TensorAnnotation>) {
        for mut annotation in take(list) {
            match self.innermost(&annotation.tensor_name) {
                Some(id) if self.values[id.index()].quantization.is_empty() => {
                    annotation.tensor_name.clear();
                    self.values[id.index()].quantization = opaque::rest(&annotation);
                }
                _ => list.push(annotation),
            }
        }
    }

    /// Records the file's entry about a value. Of two entries the first counts.
    fn describe(&mut self, id: ValueId, mut info: pb::ValueInfoProto) {
        let value = &mut self.values[id.index()];
        info.name.clear();
        let doc_string = take(&mut info.doc_string);
        let metadata = pairs(&mut info.metadata_props);
        if value.ty.is_none() {
            value.ty = info.type_.take().map(|ty| {
                let (ty, rest) = value_type(ty);
                info.type_ = rest.into();
                ty
            });
            value.extra = opaque::rest(&info);
        }
        if value.doc_string.is_empty() {
            value.doc_string = doc_string;
        }
        if value.metadata.is_empty() {
            value.metadata = metadata;
        }
    }

    fn node(&mut self, mut proto: pb::NodeProto) -> Result<Node> {
        let subject = |proto: &pb::NodeProto| match proto.output.first() {
            _ if !proto.name.is_empty() => format!("node `{}`", proto.name),
            Some(output) => format!("node of `{output}`"),
            None => "a node without a name".to_string(),
        };
        if proto.op_type.is_empty() {
            return Err(Error::invalid(subject(&proto), "names no operator (`op_type` is empty)"));
        }
        let inputs = take(&mut proto.input);
        let inputs = inputs.iter().map(|name| (!name.is_empty()).then(|| self.lookup(name))).collect();
        let mut attributes: Vec<(String, Attribute)> = Vec::with_capacity(proto.attribute.len());
        for item in take(&mut proto.attribute) {
            let (name, attribute) = self.attribute(item)?;
            if name.is_empty() || attributes.iter().any(|(known, _)| *known == name) {
                let problem = if name.is_empty() {
                    "has an attribute without a name".into()
                } else {
                    format!("gives attribute `{name}` twice")
                };
                return Err(Error::invalid(subject(&proto), problem));
            }
            attributes.push((name, attribute));
        }
        let mut outputs = Vec::with_capacity(proto.output.len());
        for name in take(&mut proto.output) {
            outputs.push(if name.is_empty() { None } else { Some(self.output(&name)?) });
        }
        Ok(Node {
            name: take(&mut proto.name),
            op_type: take(&mut proto.op_type),
            domain: domain(&mut proto.domain),
            overload: take(&mut proto.overload),
            inputs,
            outputs,
            attributes,
            doc_string: take(&mut proto.doc_string),
            metadata: pairs(&mut proto.metadata_props),
            extra: opaque::rest(&proto),
        })
    }

    /// Defines the name of a node's output in the innermost scope, unless an earlier read has created it there.
    fn output(&mut self, name: &str) -> Result<ValueId> {
        match self.scopes.last().and_then(|scope| scope.get(name)).copied() {
            Some(id) => Ok(id),
            None => Ok(self.insert(name)),
        }
    }

    fn attribute(&mut self, mut proto: pb::AttributeProto) -> Result<(String, Attribute)> {
        let name = proto.name.clone();
        let subject = || format!("attribute `{name}`");
        let number = proto.type_.value();
        let kind = if proto.ref_attr_name.is_empty() {
            let declared = proto.type_.enum_value().map_err(|number| {
                Error::invalid(subject(), format!("has type {number}, which ONNX does not define"))
            })?;
            self.attribute_kind(declared, &mut proto)?
        } else {
            AttributeKind::Reference { name: take(&mut proto.ref_attr_name), type_number: number }
        };
        if let AttributeKind::Other(_) = kind {
            return Ok((name, Attribute { kind, doc_string: proto.doc_string, extra: Opaque::new() }));
        }
        proto.name.clear();
        proto.type_ = EnumOrUnknown::default();
        let doc_string = take(&mut proto.doc_string);
        Ok((name, Attribute { kind, doc_string, extra: opaque::rest(&proto) }))
    }

    /// Moves the content out of an attribute of this type.
    fn attribute_kind(&mut self, declared: AttributeType, proto: &mut pb::AttributeProto) -> Result<AttributeKind> {
        let subject = || format!("attribute `{}`", proto.name);
        let missing = || Error::invalid(subject(), format!("declares {declared:?} and has no value"));
        Ok(match declared {
            AttributeType::INT => AttributeKind::Int(take(&mut proto.i)),
            AttributeType::FLOAT => AttributeKind::Float(take(&mut proto.f)),
            AttributeType::STRING => AttributeKind::String(take(&mut proto.s)),
            AttributeType::INTS => AttributeKind::Ints(take(&mut proto.ints)),
            AttributeType::FLOATS => AttributeKind::Floats(take(&mut proto.floats)),
            AttributeType::STRINGS => AttributeKind::Strings(take(&mut proto.strings)),
            AttributeType::TENSOR => {
                let Some(item) = proto.t.take() else { return Err(missing()) };
                AttributeKind::Tensor(tensor(item, None, false, self.sources)?)
            }
            AttributeType::TENSORS => {
                let tensors = take(&mut proto.tensors).into_iter();
                AttributeKind::Tensors(
                    tensors.map(|item| tensor(item, None, false, self.sources)).collect::<Result<_>>()?,
                )
            }
            AttributeType::GRAPH => {
                let Some(graph) = proto.g.take() else { return Err(missing()) };
                AttributeKind::Graph(self.body(graph, false)?)
            }
            AttributeType::GRAPHS => {
                let graphs = take(&mut proto.graphs).into_iter();
                AttributeKind::Graphs(graphs.map(|item| self.body(item, false)).collect::<Result<_>>()?)
            }
            AttributeType::UNDEFINED => {
                return Err(Error::invalid(subject(), "has no type").remedy("export with a current exporter"));
            }
            _ => AttributeKind::Other(opaque::rest(proto)),
        })
    }
}
