//! `export.json` of transformers' own exporter: it describes the flattened cache as a tree with
//! an entry for every layer.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::base::{Error, Result};

use super::json::{Document, Edit, JsonKind, JsonNode};
use super::layers::LayerEdit;
use super::tower::Tower;

/// The new text of `export.json` for a model that loses decoder layers; `None` when it does not change.
///
/// Errors: `Error::Invalid` when a cache has another number of layers or an unknown form.
pub(super) fn rewrite(document: &Document, edit: &LayerEdit) -> Result<Option<String>> {
    let mut edits = Vec::new();
    let components = document.root().get("components").map(|node| &node.kind);
    if let (Some(JsonKind::Object(components)), Tower::Text) = (components, edit.tower) {
        for (name, component) in components {
            for key in ["in_spec", "out_spec"] {
                let Some(node) = component.get("metadata").and_then(|metadata| metadata.get(key)) else { continue };
                let JsonNode { span, kind: JsonKind::Scalar(Value::String(text)) } = node else { continue };
                let problem = |what: String| {
                    Error::invalid(format!("`components.{name}.metadata.{key}` in {}", document.subject()), what)
                        .remedy("export the model again: the file and the graphs do not belong together")
                };
                let mut tree: Value = serde_json::from_str(text).map_err(|e| problem(format!("is not JSON: {e}")))?;
                if caches(&mut tree, edit).map_err(problem)? {
                    edits.push(Edit { span: span.clone(), text: Value::from(tree.to_string()).to_string() });
                }
            }
        }
    }
    if edits.is_empty() { Ok(None) } else { document.apply(edits).map(Some) }
}

/// Removes the dropped layers from every cache in a tree. Returns true if there was a cache.
fn caches(tree: &mut Value, edit: &LayerEdit) -> Result<bool, String> {
    match tree {
        Value::Array(items) => items.iter_mut().try_fold(false, |found, item| Ok(caches(item, edit)? | found)),
        Value::Object(map) => {
            let is_cache = map.get("type").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("Cache"));
            if !is_cache {
                return map.values_mut().try_fold(false, |found, item| Ok(caches(item, edit)? | found));
            }
            let context = map.get("context").and_then(Value::as_str).ok_or("a cache has no context")?;
            let mut context: Value =
                serde_json::from_str(context).map_err(|e| format!("a cache's context is not JSON: {e}"))?;
            let layers =
                context.pointer_mut("/s/layers").and_then(Value::as_array_mut).ok_or("a cache lists no layers")?;
            if layers.is_empty() {
                return Ok(false);
            }
            if layers.len() != edit.total {
                return Err(format!("a cache lists {} layers, but the decoder has {}", layers.len(), edit.total));
            }
            let mut index = 0;
            layers.retain(|_| {
                index += 1;
                !edit.drops(index - 1)
            });
            let mut kept = BTreeMap::new();
            tensors(&mut context, &mut |number| {
                let next = kept.len() as u64;
                *kept.entry(*number).or_insert(next)
            });
            let children =
                map.get_mut("children_spec").and_then(Value::as_array_mut).ok_or("a cache has no children_spec")?;
            let mut index = 0;
            children.retain(|_| {
                index += 1;
                kept.contains_key(&(index - 1))
            });
            if children.len() != kept.len() {
                return Err(format!("a cache names {} tensors, but has {} children", kept.len(), children.len()));
            }
            map.insert("context".into(), context.to_string().into());
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Renumbers `{"_t": "tensor", "i": n}` in order of appearance.
fn tensors(value: &mut Value, number: &mut impl FnMut(&u64) -> u64) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| tensors(item, number)),
        Value::Object(map) => {
            let is_tensor = map.get("_t").and_then(Value::as_str) == Some("tensor");
            if let Some(old) = map.get("i").and_then(Value::as_u64).filter(|_| is_tensor) {
                map.insert("i".into(), number(&old).into());
            } else {
                map.values_mut().for_each(|item| tensors(item, number));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(layers: usize) -> String {
        let cached: Vec<Value> = (0..layers)
            .map(|layer| serde_json::json!({"s": {"keys": {"_t": "tensor", "i": 2 * layer}, "values": {"_t": "tensor", "i": 2 * layer + 1}, "name": layer}}))
            .collect();
        let context = serde_json::json!({"_t": "obj", "s": {"layers": cached}}).to_string();
        let children: Vec<Value> =
            (0..2 * layers).map(|place| serde_json::json!({"type": null, "place": place})).collect();
        serde_json::json!([1, {"type": "builtins.dict", "children_spec": [
            {"type": null}, {"type": "transformers.cache_utils.DynamicCache", "context": context, "children_spec": children}]}])
        .to_string()
    }

    #[test]
    fn dropped_layers_are_removed_from_the_cache_specs() {
        let text =
            serde_json::json!({"components": {"decode": {"file": "decode.onnx", "metadata": {"in_spec": spec(3)}}}});
        let document = Document::parse("export.json", text.to_string()).unwrap();
        let edit = LayerEdit::new(Tower::Text, 3, &[1]).unwrap();
        let out: Value = serde_json::from_str(&rewrite(&document, &edit).unwrap().unwrap()).unwrap();
        let tree: Value =
            serde_json::from_str(out["components"]["decode"]["metadata"]["in_spec"].as_str().unwrap()).unwrap();
        let cache = &tree[1]["children_spec"][1];
        let places: Vec<u64> =
            cache["children_spec"].as_array().unwrap().iter().map(|child| child["place"].as_u64().unwrap()).collect();
        assert_eq!(places, [0, 1, 4, 5]);
        let context: Value = serde_json::from_str(cache["context"].as_str().unwrap()).unwrap();
        assert_eq!(context["s"]["layers"][1]["s"]["values"]["i"], 3);
        assert_eq!(context["s"]["layers"][1]["s"]["name"], 2);

        let wrong = LayerEdit::new(Tower::Text, 4, &[1]).unwrap();
        let error = rewrite(&document, &wrong).unwrap_err().to_string();
        assert!(error.contains("lists 3 layers, but the decoder has 4"), "{error}");
    }
}
