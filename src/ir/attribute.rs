//! Node attributes.

use super::Body;
use super::tensor::Tensor;
use super::types::Opaque;

/// The content of an attribute.
#[derive(Clone, Debug)]
pub enum AttributeKind {
    /// An integer; booleans are 0 or 1.
    Int(i64),
    /// A single-precision number.
    Float(f32),
    /// Bytes, UTF-8 for every operator of the standard domains.
    String(Vec<u8>),
    /// A constant.
    Tensor(Tensor),
    /// A body over the same arena as the body of the node: a branch of `If`, the body of `Loop` or `Scan`.
    Graph(Body),
    /// Integers such as axes, pads or strides; may be empty.
    Ints(Vec<i64>),
    /// Single-precision numbers; may be empty.
    Floats(Vec<f32>),
    /// Byte strings; may be empty.
    Strings(Vec<Vec<u8>>),
    /// Constants; may be empty.
    Tensors(Vec<Tensor>),
    /// Bodies over the same arena; no standard operator has this kind.
    Graphs(Vec<Body>),
    /// Inside a function: a reference to the caller's attribute of this name and type.
    Reference {
        /// Name of the attribute at the call.
        name: String,
        /// Type of the attribute, the number of an `AttributeProto.AttributeType`.
        type_number: i32,
    },
    /// Sparse tensors and type messages: the attribute message, unchanged.
    Other(Opaque),
}

/// An attribute with its documentation.
#[derive(Clone, Debug)]
pub struct Attribute {
    /// Type and content.
    pub kind: AttributeKind,
    /// Free text of the author; may be empty.
    pub doc_string: String,
    /// Further fields of the file's message, carried over unchanged.
    pub extra: Opaque,
}

impl From<AttributeKind> for Attribute {
    fn from(kind: AttributeKind) -> Self {
        Attribute { kind, doc_string: String::new(), extra: Opaque::new() }
    }
}

impl Attribute {
    /// The integer, if the attribute is one.
    pub fn as_int(&self) -> Option<i64> {
        if let AttributeKind::Int(value) = self.kind { Some(value) } else { None }
    }

    /// The float, if the attribute is one.
    pub fn as_float(&self) -> Option<f32> {
        if let AttributeKind::Float(value) = self.kind { Some(value) } else { None }
    }

    /// The integers, if the attribute is a list of integers.
    pub fn as_ints(&self) -> Option<&[i64]> {
        if let AttributeKind::Ints(values) = &self.kind { Some(values) } else { None }
    }

    /// The floats, if the attribute is a list of floats.
    pub fn as_floats(&self) -> Option<&[f32]> {
        if let AttributeKind::Floats(values) = &self.kind { Some(values) } else { None }
    }

    /// The text, if the attribute is a string in UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        if let AttributeKind::String(bytes) = &self.kind { std::str::from_utf8(bytes).ok() } else { None }
    }

    /// The tensor, if the attribute is one.
    pub fn as_tensor(&self) -> Option<&Tensor> {
        if let AttributeKind::Tensor(tensor) = &self.kind { Some(tensor) } else { None }
    }

    /// Bodies inside the attribute.
    pub fn bodies(&self) -> impl Iterator<Item = &Body> {
        let slice = match &self.kind {
            AttributeKind::Graph(body) => std::slice::from_ref(body),
            AttributeKind::Graphs(bodies) => bodies.as_slice(),
            _ => &[],
        };
        slice.iter()
    }

    /// Mutable bodies inside the attribute.
    pub fn bodies_mut(&mut self) -> impl Iterator<Item = &mut Body> {
        let slice = match &mut self.kind {
            AttributeKind::Graph(body) => std::slice::from_mut(body),
            AttributeKind::Graphs(bodies) => bodies.as_mut_slice(),
            _ => &mut [],
        };
        slice.iter_mut()
    }
}
