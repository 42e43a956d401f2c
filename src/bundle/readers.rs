//! Settings that transformers 5 writes where other readers do not look: transformers.js wants the chat template in
//! `tokenizer_config.json` and the processor's class in a flat `preprocessor_config.json`, and transformers 4 knows neither the new
//! class of tokenizers nor a list of further special tokens under the new name.
//!
//! Source: transformers 4.57 and 5.23, `tokenization_utils_base.py`; transformers.js 4.3, `AutoProcessor` and `AutoTokenizer`.

use serde_json::{Map, Value};

use super::pictures::with_keys;
use super::{Bundle, Role};

/// The tokenizer class that only transformers 5 knows, and the class that reads the same file elsewhere.
const TOKENIZER_CLASSES: (&str, &str) = ("TokenizersBackend", "PreTrainedTokenizerFast");
const TOKENIZER: &str = "tokenizer_config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
const PROCESSOR: &str = "processor_config.json";

/// What a reader misses in a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct MissedSetting {
    /// The file in which it looks.
    pub file: &'static str,
    /// What it misses there, as messages show it.
    pub problem: String,
    /// The keys that it wants, with their values; `None` where the whole file is missing, which `keys` then are.
    keys: Map<String, Value>,
    is_whole_file: bool,
}

impl Bundle {
    /// What readers other than transformers 5 miss in the folder's configs, though other files of the folder have it.
    pub fn missed_settings(&self) -> Vec<MissedSetting> {
        missed(self, &|file| self.read_text(file).ok().flatten())
    }

    /// The configs that lack something for these readers, by file, with new texts that have it.
    pub fn completed_configs(&self) -> Vec<(&'static str, String)> {
        completed(self, &|file| self.read_text(file).ok().flatten())
    }
}

/// The same with texts that a change gives some of the files. A file that is no JSON object has nothing and misses nothing.
fn missed(bundle: &Bundle, read: &dyn Fn(&str) -> Option<String>) -> Vec<MissedSetting> {
    let object = |file: &str| serde_json::from_str::<Map<String, Value>>(&read(file)?).ok();
    let (tokenizer, processor) = (object(TOKENIZER), object(PROCESSOR));
    let mut found = Vec::new();
    let mut miss = |file, keys: &[(&str, Value)], problem: String| {
        let keys = keys.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        found.push(MissedSetting { file, problem, keys, is_whole_file: false });
    };
    if let Some(own) = &tokenizer {
        if let Some((place, template)) =
            template(read, processor.as_ref()).filter(|_| own.get("chat_template").is_none_or(Value::is_null))
        {
            let problem = format!("transformers.js misses the chat template, which is in `{place}`");
            miss(TOKENIZER, &[("chat_template", template)], problem);
        }
        let (new, known) = TOKENIZER_CLASSES;
        if own.get("tokenizer_class").and_then(Value::as_str) == Some(new) {
            let problem = format!("transformers 4 does not know the class `{new}`, which `{known}` is elsewhere");
            miss(TOKENIZER, &[("tokenizer_class", known.into())], problem);
        }
        if let Some(tokens @ Value::Array(_)) = own.get("extra_special_tokens") {
            let problem =
                "transformers 4 takes no list in `extra_special_tokens`, which is `additional_special_tokens` there";
            let keys = [("extra_special_tokens", Map::new().into()), ("additional_special_tokens", tokens.clone())];
            miss(TOKENIZER, &keys, problem.to_string());
        }
    }
    if bundle.component(Role::VisionEncoder).is_none() {
        return found;
    }
    let class = [processor.as_ref(), tokenizer.as_ref()].into_iter().flatten();
    let class = class.filter_map(|config| config.get("processor_class")).find(|class| class.is_string()).cloned();
    match (object(PREPROCESSOR), class) {
        (Some(own), Some(class)) if !own.contains_key("processor_class") => {
            let problem = "transformers.js misses `processor_class`, by which it finds the processor".to_string();
            miss(PREPROCESSOR, &[("processor_class", class)], problem);
        }
        (None, Some(class)) if read(PREPROCESSOR).is_none() => {
            let nested = processor.and_then(|config| config.get("image_processor")?.as_object().cloned());
            found.extend(nested.map(|mut keys| {
                keys.insert("processor_class".to_string(), class);
                let problem = format!("transformers.js misses the file, whose settings are in `{PROCESSOR}`");
                MissedSetting { file: PREPROCESSOR, problem, keys, is_whole_file: true }
            }));
        }
        _ => {}
    }
    found
}

/// The chat template, from the files beside `tokenizer_config.json` in which transformers may store it, with the file's name.
fn template(
    read: &dyn Fn(&str) -> Option<String>,
    processor: Option<&Map<String, Value>>,
) -> Option<(&'static str, Value)> {
    if let Some(text) = read("chat_template.jinja") {
        return Some(("chat_template.jinja", text.into()));
    }
    let own = |config: &Map<String, Value>| config.get("chat_template").cloned();
    let legacy = read("chat_template.json").and_then(|text| serde_json::from_str::<Map<String, Value>>(&text).ok());
    let legacy = legacy.as_ref().and_then(own).map(|found| ("chat_template.json", found));
    legacy.or_else(|| Some((PROCESSOR, processor.and_then(own)?)))
}

/// New texts of the configs that lack something, by file: every other byte of a file stays. `read` gives a file's text.
pub(super) fn completed(bundle: &Bundle, read: &dyn Fn(&str) -> Option<String>) -> Vec<(&'static str, String)> {
    let mut texts: Vec<(&'static str, String)> = Vec::new();
    for MissedSetting { file, keys, is_whole_file, .. } in missed(bundle, read) {
        let before = texts.iter().position(|(own, _)| *own == file);
        let old = before.map(|at| texts.remove(at).1).or_else(|| read(file));
        let new = match (is_whole_file, old) {
            (true, _) => serde_json::to_string_pretty(&keys).ok().map(|text| text + "\n"),
            (false, Some(old)) => with_keys(format!("`{file}`"), old, false, &keys).ok().flatten(),
            (false, None) => None,
        };
        texts.extend(new.map(|text| (file, text)));
    }
    texts
}
