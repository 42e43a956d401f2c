//! Configs in the form that readers other than transformers 5 need.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

/// The tokenizer class that only transformers 5 knows, and the class that reads the same file elsewhere.
const TOKENIZER_CLASSES: (&str, &str) = ("TokenizersBackend", "PreTrainedTokenizerFast");

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

/// `tokenizer_config.json` with the chat template and a class that all readers know; `None` without such a file.
///
/// Errors: `Error::Invalid` when a config is no JSON object.
pub(super) fn tokenizer_config(bundle: &Bundle) -> Result<Option<Map<String, Value>>> {
    let Some(mut config) = object(bundle, "tokenizer_config.json")? else { return Ok(None) };
    if !config.contains_key("chat_template")
        && let Some(template) = template(bundle)?
    {
        config.insert("chat_template".to_string(), template);
    }
    if let Some(class) = config.get_mut("tokenizer_class")
        && class.as_str() == Some(TOKENIZER_CLASSES.0)
    {
        *class = TOKENIZER_CLASSES.1.into();
    }
    Ok(Some(config))
}

/// The chat template, from the files next to `tokenizer_config.json` in which transformers may store it.
fn template(bundle: &Bundle) -> Result<Option<Value>> {
    if let Some(text) = bundle.read_text("chat_template.jinja")? {
        return Ok(Some(text.into()));
    }
    let own = |config: &Map<String, Value>| config.get("chat_template").cloned();
    for name in ["chat_template.json", "processor_config.json"] {
        if let Some(found) = object(bundle, name)?.as_ref().and_then(own) {
            return Ok(Some(found));
        }
    }
    Ok(None)
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
