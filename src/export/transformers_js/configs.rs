//! Moves configs to the files where transformers.js looks for them; transformers 5 saves some elsewhere.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::Bundle;

use super::super::configs::{completed, object, with_chunks, with_device};

type Object = Map<String, Value>;

/// The configs in the form that transformers.js requires, by file name. `chunks` is the number of
/// data files of each ONNX file, `device` the one to run on where the program names none.
///
/// Errors: `Error::Invalid` naming the missing entry and the files searched.
pub(super) fn rewritten(
    bundle: &Bundle,
    has_vision: bool,
    chunks: &BTreeMap<String, usize>,
    device: Option<&str>,
) -> Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    let mut add = |name: &str, object: Object| -> Result<()> {
        let text =
            serde_json::to_string_pretty(&object).map_err(|e| Error::invalid(format!("`{name}`"), e.to_string()))?;
        texts.insert(name.to_string(), text + "\n");
        Ok(())
    };
    if let Some(mut config) = object(bundle, "config.json")? {
        with_chunks(&mut config, chunks);
        if let Some(device) = device {
            with_device(&mut config, device);
        }
        add("config.json", config)?;
    }
    let tokenizer = completed(bundle, "tokenizer_config.json")?;
    if bundle.asset_path("tokenizer.json").is_none() {
        return Err(Error::invalid(
            "`tokenizer.json`",
            "is not in the folder, and transformers.js reads no other tokenizer",
        )
        .remedy("save the tokenizer with `PreTrainedTokenizerFast.save_pretrained` into the folder"));
    }
    if has_vision {
        add("preprocessor_config.json", preprocessor(bundle)?)?;
    }
    let tokenizer = tokenizer.ok_or_else(|| {
        Error::invalid("`tokenizer_config.json`", "is not in the folder, and transformers.js needs it")
            .remedy("save the tokenizer with `save_pretrained` into the folder")
    })?;
    add("tokenizer_config.json", tokenizer)?;
    Ok(texts)
}

/// The image processor's settings as one flat object, with the class of the combined processor.
fn preprocessor(bundle: &Bundle) -> Result<Object> {
    let object = completed(bundle, "preprocessor_config.json")?.ok_or_else(|| {
        Error::invalid(
            "`preprocessor_config.json`",
            "is not in the folder, nor an `image_processor` with a `processor_class` in `processor_config.json`",
        )
        .remedy("save the processor with `AutoProcessor.save_pretrained` into the folder")
    })?;
    match object.contains_key("processor_class") {
        true => Ok(object),
        false => {
            let problem = "is in none of the configs, and transformers.js finds the processor by it";
            Err(Error::invalid("`processor_class`", problem)
                .remedy("add it to `preprocessor_config.json`, for instance \"Idefics3Processor\""))
        }
    }
}
