//! Reads attributes and records the reads: an attribute that the operator's row does not know is an error.

use std::cell::Cell;

use crate::ir::{self, Attribute, AttributeKind};

use super::op_error::{OpError, OpResult};

/// The attributes of one node, and which of them have been read.
pub struct Attributes<'a> {
    items: Vec<(&'a str, &'a Attribute, Cell<bool>)>,
}

impl<'a> Attributes<'a> {
    pub(super) fn new(attributes: &'a [(String, Attribute)]) -> Self {
        Attributes {
            items: attributes.iter().map(|(name, attribute)| (name.as_str(), attribute, Cell::new(false))).collect(),
        }
    }

    /// The attribute, marked as read.
    pub fn get(&self, name: &str) -> Option<&'a Attribute> {
        let (_, attribute, read) = self.items.iter().find(|item| item.0 == name)?;
        read.set(true);
        Some(attribute)
    }

    /// The attribute, without marking it as read.
    pub fn peek(&self, name: &str) -> Option<&'a Attribute> {
        self.items.iter().find(|item| item.0 == name).map(|item| item.1)
    }

    /// Marks an attribute as known although it does not affect the computation here.
    pub fn ignore(&self, name: &str) {
        self.get(name);
    }

    /// Names of attributes that have not been read.
    pub(super) fn unread(&self) -> Vec<&'a str> {
        self.items.iter().filter(|item| !item.2.get()).map(|item| item.0).collect()
    }

    /// An integer, if present.
    pub fn int_opt(&self, name: &str) -> OpResult<Option<i64>> {
        self.typed(name, "an integer", Attribute::as_int)
    }

    /// An integer with a default.
    pub fn int(&self, name: &str, default: i64) -> OpResult<i64> {
        Ok(self.int_opt(name)?.unwrap_or(default))
    }

    /// A required integer.
    pub fn int_required(&self, name: &str) -> OpResult<i64> {
        self.int_opt(name)?.ok_or_else(|| OpError::new(format!("attribute `{name}` is missing")))
    }

    /// A 0/1 integer with a default.
    pub fn flag(&self, name: &str, default: bool) -> OpResult<bool> {
        Ok(self.int(name, i64::from(default))? != 0)
    }

    /// A float, if present.
    pub fn float_opt(&self, name: &str) -> OpResult<Option<f64>> {
        self.typed(name, "a float", |attribute| attribute.as_float().map(f64::from))
    }

    /// A float with a default, which is rounded to f32 like a stored value.
    pub fn float(&self, name: &str, default: f32) -> OpResult<f64> {
        Ok(self.float_opt(name)?.unwrap_or(f64::from(default)))
    }

    /// A list of integers, if present.
    pub fn ints(&self, name: &str) -> OpResult<Option<Vec<i64>>> {
        // An empty list may have lost its element type in the file.
        self.typed(name, "a list of integers", |attribute| match &attribute.kind {
            AttributeKind::Floats(list) if list.is_empty() => Some(Vec::new()),
            _ => attribute.as_ints().map(<[i64]>::to_vec),
        })
    }

    /// A list of floats, if present.
    pub fn floats(&self, name: &str) -> OpResult<Option<Vec<f32>>> {
        self.typed(name, "a list of floats", |attribute| attribute.as_floats().map(<[f32]>::to_vec))
    }

    /// A string, if present.
    pub fn text(&self, name: &str) -> OpResult<Option<&'a str>> {
        self.typed(name, "a string", Attribute::as_str)
    }

    /// A string with a default.
    pub fn text_or(&self, name: &str, default: &'a str) -> OpResult<&'a str> {
        Ok(self.text(name)?.unwrap_or(default))
    }

    /// A tensor, if present.
    pub fn tensor(&self, name: &str) -> OpResult<Option<&'a ir::Tensor>> {
        self.typed(name, "a tensor", Attribute::as_tensor)
    }

    /// A required sub-graph.
    pub fn body(&self, name: &str) -> OpResult<&'a ir::Body> {
        let read = |attribute: &'a Attribute| match &attribute.kind {
            AttributeKind::Graph(body) => Some(body),
            _ => None,
        };
        self.typed(name, "a graph", read)?.ok_or_else(|| OpError::new(format!("attribute `{name}` is missing")))
    }

    /// The content that `read` finds in the attribute, if the attribute is present.
    fn typed<T>(&self, name: &str, what: &str, read: impl Fn(&'a Attribute) -> Option<T>) -> OpResult<Option<T>> {
        let Some(attribute) = self.get(name) else { return Ok(None) };
        match read(attribute) {
            Some(value) => Ok(Some(value)),
            None => Err(OpError::new(format!("attribute `{name}` is not {what}"))),
        }
    }
}
