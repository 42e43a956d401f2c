//! The graph in memory. It knows no wire format: values are arena ids, weights are ranges of mapped files.
//!
//! One [`Graph`] owns one arena of [`Value`]s. The bodies of `If`, `Loop` and `Scan` nodes are [`Body`]s over the same
//! arena, so a captured outer value is an id that the outer body defines.

mod attribute;
mod check;
mod element_types;
mod index;
mod large;
mod names;
mod tensor;
mod typed;
mod types;

pub use attribute::{Attribute, AttributeKind};
pub use check::check;
pub use element_types::element_types;
pub use index::{GraphIndex, Producer, Use, captured};
pub use large::{WEBGPU_BUFFER_BYTES, large_constants};
pub use names::FreshNames;
pub use tensor::{Bytes, Tensor, TensorData};
pub use typed::of_type;
pub use types::{DataType, Dim, Opaque, ValueId, ValueType};

use std::collections::BTreeMap;

/// A whole ONNX model.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Version of the file format, `ModelProto.ir_version`.
    pub ir_version: i64,
    /// Domain (`""` for the default one) to version.
    pub opset_imports: BTreeMap<String, i64>,
    /// Name of the program that wrote the file, such as `pytorch`; may be empty.
    pub producer_name: String,
    /// Version of that program; may be empty.
    pub producer_version: String,
    /// Namespace of the model in reverse-DNS form; may be empty.
    pub domain: String,
    /// Version that the author gave the model; 0 where the file has none.
    pub model_version: i64,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Key-value pairs of `metadata_props`, in file order.
    pub metadata: Vec<(String, String)>,
    /// Model-local functions, in file order.
    pub functions: Vec<Function>,
    /// The main graph.
    pub graph: Graph,
    /// Fields that this version does not know, written back unchanged.
    pub extra: Opaque,
}

/// A model-local function: an operator given as a body over its own arena.
#[derive(Clone, Debug, Default)]
pub struct Function {
    /// Matches `Node::op_type` of a call.
    pub name: String,
    /// Matches `Node::domain` of a call.
    pub domain: String,
    /// Distinguishes functions of the same domain and name; `""` where there is one only.
    pub overload: String,
    /// Domain to version for the nodes of the body.
    pub opset_imports: BTreeMap<String, i64>,
    /// Attribute names without a default.
    pub attributes: Vec<String>,
    /// Attributes with a default.
    pub attribute_defaults: Vec<(String, Attribute)>,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Key-value pairs of `metadata_props`, in file order.
    pub metadata: Vec<(String, String)>,
    /// The body. A call binds its inputs and outputs by position.
    pub graph: Graph,
    /// Unknown fields of the `FunctionProto`.
    pub extra: Opaque,
}

/// An arena of values and the body that defines them.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// The arena; a `ValueId` is a position in it.
    pub values: Vec<Value>,
    /// The top-level body.
    pub body: Body,
}

/// Inputs, weights, nodes in execution order and outputs of one scope.
#[derive(Clone, Debug, Default)]
pub struct Body {
    /// Name of the graph; exporters often leave a default such as `main_graph`.
    pub name: String,
    /// Values that the caller supplies, in the order of the signature.
    pub inputs: Vec<ValueId>,
    /// Values that the caller receives, in the order of the signature.
    pub outputs: Vec<ValueId>,
    /// Constants of this scope with the values that they define.
    pub initializers: Vec<(ValueId, Tensor)>,
    /// Nodes in topological order: each input is defined earlier or by an outer body.
    pub nodes: Vec<Node>,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Key-value pairs of `metadata_props`, in file order.
    pub metadata: Vec<(String, String)>,
    /// Unknown fields of the `GraphProto`.
    pub extra: Opaque,
}

/// A named edge of the graph.
#[derive(Clone, Debug, Default)]
pub struct Value {
    /// Unique within its body and the bodies around it.
    pub name: String,
    /// From `graph.input`, `graph.output` or `value_info`; `None` when the file does not declare it.
    pub ty: Option<ValueType>,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Key-value pairs of `metadata_props`, in file order.
    pub metadata: Vec<(String, String)>,
    /// The file's second entry about this value, without its name; for example an output that `value_info` lists too.
    pub described_again: Opaque,
    /// The file's `quantization_annotation` of this value, without its name; empty where there is none.
    pub quantization: Opaque,
    /// Denotations and fields that this version does not know, written back unchanged.
    pub extra: Opaque,
}

/// One operator call.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// For messages and profiles only; may be empty or repeated.
    pub name: String,
    /// Name of the operator or of a model-local function, such as `MatMul`.
    pub op_type: String,
    /// `""` for the default domain (`ai.onnx` is read as it).
    pub domain: String,
    /// Selects among functions of the same domain and name; `""` for operators.
    pub overload: String,
    /// `None` is an omitted optional input.
    pub inputs: Vec<Option<ValueId>>,
    /// `None` is an omitted optional output.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes by name, in file order; names are unique.
    pub attributes: Vec<(String, Attribute)>,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Key-value pairs of `metadata_props`, in file order.
    pub metadata: Vec<(String, String)>,
    /// Unknown fields of the `NodeProto`.
    pub extra: Opaque,
}

impl Graph {
    /// The value of an id. Only this graph's arena creates its ids.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// The name of a value in the file.
    pub fn name(&self, id: ValueId) -> &str {
        &self.values[id.index()].name
    }

    /// Adds a value to the arena.
    pub fn add_value(&mut self, value: Value) -> ValueId {
        let id = ValueId::new(self.values.len());
        self.values.push(value);
        id
    }

    /// The id of a top-level input by name.
    pub fn input(&self, name: &str) -> Option<ValueId> {
        self.body.inputs.iter().copied().find(|&id| self.name(id) == name)
    }

    /// The id of a top-level output by name.
    pub fn output(&self, name: &str) -> Option<ValueId> {
        self.body.outputs.iter().copied().find(|&id| self.name(id) == name)
    }

    /// A name based on `stem` that is not yet in the arena.
    pub fn fresh_name(&self, stem: &str) -> String {
        FreshNames::of(self).fresh(stem)
    }
}

impl Body {
    /// The tensor of an initializer of this scope.
    pub fn initializer(&self, id: ValueId) -> Option<&Tensor> {
        self.initializers.iter().find(|(value, _)| *value == id).map(|(_, tensor)| tensor)
    }

    /// Bytes of all initializers of this scope.
    pub fn weight_bytes(&self) -> u64 {
        self.initializers.iter().map(|(_, tensor)| tensor.byte_len()).sum()
    }
}

impl Node {
    /// An attribute by name.
    pub fn attribute(&self, name: &str) -> Option<&Attribute> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Bodies in the attributes of this node (`If`, `Loop`, `Scan`).
    pub fn bodies(&self) -> impl Iterator<Item = &Body> {
        self.attributes.iter().flat_map(|(_, attribute)| attribute.bodies())
    }

    /// Mutable bodies in the attributes of this node.
    pub fn bodies_mut(&mut self) -> impl Iterator<Item = &mut Body> {
        self.attributes.iter_mut().flat_map(|(_, attribute)| attribute.bodies_mut())
    }

    /// True when the outputs depend on the shapes of the inputs alone, not on their content.
    pub fn reads_shape_only(&self) -> bool {
        self.domain.is_empty() && ["Shape", "Size"].contains(&self.op_type.as_str())
    }

    /// Domain and operator, as messages show it: `Softmax`, `com.microsoft.GroupQueryAttention`.
    pub fn op(&self) -> String {
        if self.domain.is_empty() { self.op_type.clone() } else { format!("{}.{}", self.domain, self.op_type) }
    }

    /// Name of this node in messages: ``node `/layers.3/attn/Softmax` (Softmax)``.
    pub fn describe(&self, graph: &Graph) -> String {
        if !self.name.is_empty() {
            return format!("node `{}` ({})", self.name, self.op());
        }
        match self.outputs.iter().flatten().next() {
            Some(&output) => format!("node of `{}` ({})", graph.name(output), self.op()),
            None => format!("a node without a name ({})", self.op()),
        }
    }

    /// Ids of the inputs that are not omitted.
    pub fn present_inputs(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.inputs.iter().flatten().copied()
    }

    /// Ids of the outputs that are not omitted.
    pub fn present_outputs(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.outputs.iter().flatten().copied()
    }
}
