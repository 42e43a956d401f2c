//! Configs in the form that readers other than transformers 5 need.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

/// A config file of the bundle; `None` without such a file.
///
/// Errors: `Error::Invalid` when it is no JSON object.
pub(super) fn object(bundle: &Bundle, name: &str) -> Result<Option<Map<String, Value>>> {
    match bundle.read_json(name)? {
        None => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(Error::invalid(format!("`{name}`"), "is not a JSON object, as in {\"key\": value}")
            .remedy("take the file from the model that the graphs were exported from")),
    }
}

/// A config with what readers other than transformers 5 look for in it; `None` without such a file and such settings.
///
/// Errors: as [`object`].
pub(super) fn completed(bundle: &Bundle, name: &str) -> Result<Option<Map<String, Value>>> {
    let new = bundle.completed_configs().into_iter().find(|(file, _)| *file == name);
    match new.and_then(|(_, text)| serde_json::from_str(&text).ok()) {
        Some(completed) => Ok(Some(completed)),
        None => object(bundle, name),
    }
}

/// Sets the number of data files of each ONNX file, which transformers.js reads from `config.json`.
pub(super) fn with_chunks(config: &mut Map<String, Value>, chunks: &BTreeMap<String, usize>) {
    let js = config.entry("transformers.js_config").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(js) = js {
        match chunks.is_empty() {
            true => js.remove("use_external_data_format"),
            false => js.insert("use_external_data_format".to_string(), serde_json::json!(chunks)),
        };
        if js.is_empty() {
            config.remove("transformers.js_config");
        }
    }
}

/// Sets the device on which transformers.js runs the graphs where the program names none.
pub(super) fn with_device(config: &mut Map<String, Value>, device: &str) {
    let js = config.entry("transformers.js_config").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(js) = js {
        js.insert("device".to_string(), device.into());
    }
}

/// The text of a config.
pub(super) fn pretty(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|e| Error::invalid("a config", e.to_string()))
}
