//! Writes settings of the image processor into the configs.

use serde_json::{Map, Value};

use crate::base::Result;

use super::json::{Document, Edit, JsonKind};

/// A config with these keys of the image processor set: those of `preprocessor_config.json`, or of the object
/// `image_processor` in `processor_config.json`. Every other byte stays; a missing key is added in front. `None` for a
/// `processor_config.json` without that object.
///
/// Errors: as `Document::parse`.
pub(super) fn with_keys(
    subject: String,
    text: String,
    nested: bool,
    keys: &Map<String, Value>,
) -> Result<Option<String>> {
    let document = Document::parse(subject, text)?;
    let node = match nested {
        true => document.root().get("image_processor").filter(|node| node.is_object()),
        false => Some(document.root()),
    };
    let Some(node) = node else { return Ok(None) };
    let mut edits = Vec::new();
    let mut added = String::new();
    for (key, value) in keys {
        match node.get(key) {
            Some(old) => edits.push(Edit { span: old.span.clone(), text: value.to_string() }),
            None => added.push_str(&format!("\"{key}\": {value}, ")),
        }
    }
    let is_empty = matches!(&node.kind, JsonKind::Object(members) if members.is_empty());
    let added = if is_empty { added.trim_end_matches(", ") } else { &added };
    if !added.is_empty() {
        let start = node.span.start + 1;
        edits.push(Edit { span: start..start, text: added.to_string() });
    }
    document.apply(edits).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_replaced_or_added_and_the_rest_keeps_its_bytes() {
        let keys = serde_json::json!({"max_pixels": 50, "size": {"longest_edge": 8}});
        let keys = keys.as_object().unwrap();
        let set = |text: &str, nested| with_keys("x".into(), text.into(), nested, keys).unwrap();
        let flat = "{\n  \"a\": 1.50,\n  \"max_pixels\": 9\n}\n";
        let want = "{\"size\": {\"longest_edge\":8}, \n  \"a\": 1.50,\n  \"max_pixels\": 50\n}\n";
        assert_eq!(set(flat, false).as_deref(), Some(want));
        let inner = "{\"image_processor\": {}, \"b\": 1e3}";
        let want = "{\"image_processor\": {\"max_pixels\": 50, \"size\": {\"longest_edge\":8}}, \"b\": 1e3}";
        assert_eq!(set(inner, true).as_deref(), Some(want));
        assert_eq!(set("{\"b\": 1}", true), None);
    }
}
