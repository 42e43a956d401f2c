//! Moves configs to the files where transformers.js looks for them; transformers 5 saves some elsewhere.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

/// The tokenizer class that only transformers 5 knows, and the class that reads the same file elsewhere.
const TOKENIZER_CLASSES: (&str, &str) = ("TokenizersBackend", "PreTrainedTokenizerFast");

type Object = Map<String, Value>;

/// The configs in the form that transformers.js requires, by file name. `chunks` is the number of
/// data files of each ONNX file.
///
/// Errors: `Error::Invalid` naming the missing entry and the files searched.
pub(super) fn rewritten(
    bundle: &Bundle,
    has_vision: bool,
    chunks: &BTreeMap<String, usize>,
) -> Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    let mut add = |name: &str, object: Object| -> Result<()> {
        let text =
            serde_json::to_string_pretty(&object).map_err(|e| Error::invalid(format!("`{name}`"), e.to_string()))?;
        texts.insert(name.to_string(), text + "\n");
        Ok(())
    };
    let read = |name: &str| -> Result<Option<Object>> {
        match bundle.read_json(name)? {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(_) => Err(Error::invalid(format!("`{name}`"), "is not a JSON object")),
        }
    };
    if let Some(mut config) = read("config.json")? {
        let js = config.entry("transformers.js_config").or_insert_with(|| Value::Object(Object::new()));
        if let Value::Object(js) = js {
            match chunks.is_empty() {
                true => js.remove("use_external_data_format"),
                false => js.insert("use_external_data_format".to_string(), serde_json::json!(chunks)),
            };
            if js.is_empty() {
                config.remove("transformers.js_config");
            }
        }
        add("config.json", config)?;
    }
    let tokenizer = read("tokenizer_config.json")?;
    let processor = read("processor_config.json")?;
    if bundle.asset_path("tokenizer.json").is_none() {
        return Err(Error::invalid(
            "`tokenizer.json`",
            "is not in the folder, and transformers.js reads no other tokenizer",
        )
        .remedy("save the tokenizer with `PreTrainedTokenizerFast.save_pretrained` into the folder"));
    }
    if has_vision {
        let preprocessor = preprocessor(read("preprocessor_config.json")?, processor.as_ref(), tokenizer.as_ref())?;
        add("preprocessor_config.json", preprocessor)?;
    }
    let mut tokenizer = tokenizer.ok_or_else(|| {
        Error::invalid("`tokenizer_config.json`", "is not in the folder, and transformers.js needs it")
            .remedy("save the tokenizer with `save_pretrained` into the folder")
    })?;
    if !tokenizer.contains_key("chat_template")
        && let Some(template) = template(bundle, processor.as_ref())?
    {
        tokenizer.insert("chat_template".to_string(), template);
    }
    if let Some(class) = tokenizer.get_mut("tokenizer_class")
        && class.as_str() == Some(TOKENIZER_CLASSES.0)
    {
        *class = TOKENIZER_CLASSES.1.into();
    }
    add("tokenizer_config.json", tokenizer)?;
    Ok(texts)
}

/// The image processor's settings as one flat object, with the class of the combined processor.
fn preprocessor(flat: Option<Object>, processor: Option<&Object>, tokenizer: Option<&Object>) -> Result<Object> {
    let nested = || processor?.get("image_processor")?.as_object().cloned();
    let mut object = flat.or_else(nested).ok_or_else(|| {
        Error::invalid(
            "`preprocessor_config.json`",
            "is not in the folder, nor an `image_processor` in `processor_config.json`",
        )
        .remedy("save the processor with `AutoProcessor.save_pretrained` into the folder")
    })?;
    if !object.contains_key("processor_class") {
        let class = [processor, tokenizer].into_iter().flatten().find_map(|config| config.get("processor_class"));
        let class = class.ok_or_else(|| {
            Error::invalid(
                "`processor_class`",
                "is in none of the configs, and transformers.js finds the processor by it",
            )
            .remedy("add it to `preprocessor_config.json`, for instance \"Idefics3Processor\"")
        })?;
        object.insert("processor_class".to_string(), class.clone());
    }
    Ok(object)
}

/// The chat template, from the files next to `tokenizer_config.json` in which transformers may store it.
fn template(bundle: &Bundle, processor: Option<&Object>) -> Result<Option<Value>> {
    if let Some(text) = bundle.read_text("chat_template.jinja")? {
        return Ok(Some(text.into()));
    }
    let own = |config: &Value| config.get("chat_template").cloned();
    if let Some(found) = bundle.read_json("chat_template.json")?.as_ref().and_then(own) {
        return Ok(Some(found));
    }
    Ok(processor.and_then(|config| config.get("chat_template")).cloned())
}
