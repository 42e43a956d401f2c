//! Edits JSON texts and preserves every byte outside the edits, including number formats and the order of keys.

use std::ops::Range;

use serde_json::Value;

use crate::base::{Error, Result};

/// Largest nesting depth of objects and arrays.
const MAX_DEPTH: usize = 128;

/// A JSON text with the position of every value.
#[derive(Debug)]
pub(super) struct Document {
    subject: String,
    text: String,
    root: JsonNode,
}

/// One value of a [`Document`].
#[derive(Debug)]
pub(super) struct JsonNode {
    pub span: Range<usize>,
    pub kind: JsonKind,
}

/// Content of a [`JsonNode`].
#[derive(Debug)]
pub(super) enum JsonKind {
    Object(Vec<(String, JsonNode)>),
    Array(Vec<JsonNode>),
    Scalar(Value),
}

/// New text for a span of a [`Document`].
#[derive(Debug)]
pub(super) struct Edit {
    pub span: Range<usize>,
    pub text: String,
}

impl JsonNode {
    /// A member of an object.
    pub fn get(&self, key: &str) -> Option<&JsonNode> {
        match &self.kind {
            JsonKind::Object(members) => members.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// The elements of an array.
    pub fn elements(&self) -> Option<&[JsonNode]> {
        match &self.kind {
            JsonKind::Array(elements) => Some(elements),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn as_usize(&self) -> Option<usize> {
        self.as_i64().and_then(|number| usize::try_from(number).ok())
    }

    /// An integer.
    pub fn as_i64(&self) -> Option<i64> {
        match &self.kind {
            JsonKind::Scalar(value) => value.as_i64(),
            _ => None,
        }
    }

    pub fn is_object(&self) -> bool {
        matches!(&self.kind, JsonKind::Object(_))
    }

    /// True for `true`.
    pub fn is_true(&self) -> bool {
        matches!(&self.kind, JsonKind::Scalar(Value::Bool(true)))
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match &self.kind {
            JsonKind::Scalar(value) => value.as_str(),
            _ => None,
        }
    }

    /// True for `null`.
    pub fn is_null(&self) -> bool {
        matches!(&self.kind, JsonKind::Scalar(Value::Null))
    }
}

impl Document {
    /// Parses `text`. Errors name it `subject`.
    ///
    /// Errors: `Error::Invalid` when it is not JSON, or an object has a key twice.
    pub fn parse(subject: impl Into<String>, text: String) -> Result<Self> {
        let subject = subject.into();
        // This parser checks the syntax, so the scanner below need not.
        serde_json::from_str::<serde::de::IgnoredAny>(&text).map_err(|e| {
            Error::invalid(&subject, format!("not JSON: {e}")).remedy("correct the file, or download it again")
        })?;
        let mut scanner = Scanner { text: &text, position: 0, depth: 0, subject: &subject };
        let root = scanner.value()?;
        Ok(Document { subject, text, root })
    }

    pub fn root(&self) -> &JsonNode {
        &self.root
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The text after all edits.
    ///
    /// Errors: `Error::Invalid` when edits overlap.
    pub fn apply(&self, mut edits: Vec<Edit>) -> Result<String> {
        edits.sort_by_key(|edit| edit.span.start);
        let mut out = String::with_capacity(self.text.len());
        let mut position = 0;
        for edit in edits {
            let kept = self.text.get(position..edit.span.start);
            let kept = kept.ok_or_else(|| Error::invalid(&self.subject, "two rules rewrite the same value"))?;
            out.push_str(kept);
            out.push_str(&edit.text);
            position = edit.span.end;
        }
        out.push_str(self.text.get(position..).unwrap_or_default());
        Ok(out)
    }

    /// The text of an array that has only the elements `kept`, each unchanged or replaced by `Some(text)`. White space
    /// between elements follows the original.
    pub fn array_with(&self, node: &JsonNode, kept: &[(usize, Option<String>)]) -> String {
        let elements = node.elements().unwrap_or(&[]);
        let slice = |range: Range<usize>| self.text.get(range).unwrap_or_default();
        let (Some(first), Some(last)) = (elements.first(), elements.last()) else {
            return slice(node.span.clone()).to_string();
        };
        if kept.is_empty() {
            return "[]".to_string();
        }
        let separator = match elements.get(1) {
            Some(second) => slice(first.span.end..second.span.start),
            None => ", ",
        };
        let mut out = slice(node.span.start..first.span.start).to_string();
        for (place, (index, text)) in kept.iter().enumerate() {
            if place > 0 {
                out.push_str(separator);
            }
            match (text, elements.get(*index)) {
                (Some(text), _) => out.push_str(text),
                (None, Some(element)) => out.push_str(slice(element.span.clone())),
                (None, None) => {}
            }
        }
        out.push_str(slice(last.span.end..node.span.end));
        out
    }
}

/// Finds the spans of values in a text that is valid JSON.
struct Scanner<'a> {
    text: &'a str,
    position: usize,
    depth: usize,
    subject: &'a str,
}

impl Scanner<'_> {
    fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.position), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.position += 1;
        }
        bytes.get(self.position).copied()
    }

    fn unreadable(&self) -> Error {
        Error::invalid(self.subject, format!("cannot be read at byte {}", self.position))
            .remedy("correct the file, or download it again")
    }

    fn value(&mut self) -> Result<JsonNode> {
        let opening = self.peek();
        let start = self.position;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Error::invalid(self.subject, format!("is nested deeper than {MAX_DEPTH} levels"))
                .remedy("no model's config is: move the file out of the folder"));
        }
        let kind = match opening {
            Some(b'{') => self.object()?,
            Some(b'[') => self.array()?,
            Some(b'"') => {
                self.string()?;
                self.scalar(start)?
            }
            _ => {
                let bytes = self.text.as_bytes();
                while bytes
                    .get(self.position)
                    .is_some_and(|b| !matches!(b, b',' | b']' | b'}' | b' ' | b'\n' | b'\r' | b'\t'))
                {
                    self.position += 1;
                }
                self.scalar(start)?
            }
        };
        self.depth -= 1;
        Ok(JsonNode { span: start..self.position, kind })
    }

    fn scalar(&self, start: usize) -> Result<JsonKind> {
        let text = self.text.get(start..self.position).ok_or_else(|| self.unreadable())?;
        serde_json::from_str(text).map(JsonKind::Scalar).map_err(|_| self.unreadable())
    }

    fn string(&mut self) -> Result<String> {
        let start = self.position;
        self.position += 1;
        let bytes = self.text.as_bytes();
        loop {
            match bytes.get(self.position) {
                Some(b'\\') => self.position += 2,
                Some(b'"') => break,
                Some(_) => self.position += 1,
                None => return Err(self.unreadable()),
            }
        }
        self.position += 1;
        let text = self.text.get(start..self.position).ok_or_else(|| self.unreadable())?;
        serde_json::from_str(text).map_err(|_| self.unreadable())
    }

    fn object(&mut self) -> Result<JsonKind> {
        self.position += 1;
        let mut members: Vec<(String, JsonNode)> = Vec::new();
        loop {
            match self.peek() {
                Some(b'}') => {
                    self.position += 1;
                    return Ok(JsonKind::Object(members));
                }
                Some(b',') => self.position += 1,
                Some(b'"') => {
                    let key = self.string()?;
                    if self.peek() != Some(b':') {
                        return Err(self.unreadable());
                    }
                    self.position += 1;
                    if members.iter().any(|(name, _)| *name == key) {
                        return Err(Error::invalid(
                            self.subject,
                            format!("the key `{key}` occurs twice in one object"),
                        )
                        .remedy("take one of them out"));
                    }
                    members.push((key, self.value()?));
                }
                _ => return Err(self.unreadable()),
            }
        }
    }

    fn array(&mut self) -> Result<JsonKind> {
        self.position += 1;
        let mut elements = Vec::new();
        loop {
            match self.peek() {
                Some(b']') => {
                    self.position += 1;
                    return Ok(JsonKind::Array(elements));
                }
                Some(b',') => self.position += 1,
                Some(_) => elements.push(self.value()?),
                None => return Err(self.unreadable()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_changes_only_its_span() {
        let text = "{\"rms_norm_eps\": 1e-05,\n  \"n\": 8, \"list\": [\n    \"a\",\n    \"b\\\"]\",\n    \"c\"\n  ],\t\"x\": -0.0}\n";
        let document = Document::parse("config.json", text.to_string()).unwrap();
        assert_eq!(document.apply(Vec::new()).unwrap(), text);
        let list = document.root().get("list").unwrap();
        let edits = vec![
            Edit { span: list.span.clone(), text: document.array_with(list, &[(0, None), (2, None)]) },
            Edit { span: document.root().get("n").unwrap().span.clone(), text: "6".into() },
        ];
        let want = "{\"rms_norm_eps\": 1e-05,\n  \"n\": 6, \"list\": [\n    \"a\",\n    \"c\"\n  ],\t\"x\": -0.0}\n";
        assert_eq!(document.apply(edits).unwrap(), want);
    }

    #[test]
    fn a_duplicate_key_is_refused() {
        let error = Document::parse("config.json", "{\"a\": 1, \"a\": 2}".into()).unwrap_err();
        assert!(error.to_string().contains("`a` occurs twice"), "{error}");
    }

    #[test]
    fn deep_nesting_is_refused() {
        let text = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(Document::parse("config.json", text).unwrap_err().to_string().contains("nested deeper"));
    }

    proptest::proptest! {
        #[test]
        fn spans_cover_the_text_of_every_value(value in arbitrary_json()) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            let document = Document::parse("x", text.clone()).unwrap();
            check(&text, document.root(), &value);
        }
    }

    fn check(text: &str, node: &JsonNode, value: &Value) {
        let reread: Value = serde_json::from_str(&text[node.span.clone()]).unwrap();
        assert_eq!(&reread, value);
        match (&node.kind, value) {
            (JsonKind::Array(nodes), Value::Array(values)) => {
                nodes.iter().zip(values).for_each(|(node, value)| check(text, node, value));
            }
            (JsonKind::Object(nodes), Value::Object(values)) => {
                nodes.iter().for_each(|(key, node)| check(text, node, &values[key]));
            }
            (JsonKind::Scalar(found), value) => assert_eq!(found, value),
            _ => panic!("kinds differ"),
        }
    }

    fn arbitrary_json() -> impl proptest::strategy::Strategy<Value = Value> {
        use proptest::prelude::*;
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }
}
