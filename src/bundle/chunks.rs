//! Number of data files of each ONNX file, in `transformers.js_config.use_external_data_format` of `config.json`.

use std::collections::BTreeMap;

use super::json::{Document, Edit, JsonKind};

const SECTION: &str = "transformers.js_config";
const COUNTS: &str = "use_external_data_format";

/// The edit that adds files with their number of data files; `None` where the config is true without it; `others` are the files
/// that were there before. transformers.js takes a
/// file's own entry before that of its stem, and the one number for all files only where there is no object.
pub(super) fn counted(
    document: &Document,
    files: &BTreeMap<String, usize>,
    others: &BTreeMap<String, usize>,
) -> Option<Edit> {
    let entry = |(file, count): (&String, &usize)| format!("{}: {count}", quoted(file));
    let entries = files.iter().map(entry).collect::<Vec<_>>().join(", ");
    let root = document.root();
    let section = root.get(SECTION);
    let inserted = |node: &super::json::JsonNode, text: String| {
        let start = node.span.start + 1;
        let comma =
            matches!(&node.kind, JsonKind::Object(members) if !members.is_empty()).then_some(", ").unwrap_or_default();
        Edit { span: start..start, text: format!("{text}{comma}") }
    };
    match (section, section.and_then(|section| section.get(COUNTS))) {
        (_, Some(counts)) if matches!(counts.kind, JsonKind::Object(_)) => Some(inserted(counts, entries)),
        // One number for all files, which also holds for the new ones.
        (_, Some(counts)) => {
            let text = document.text().get(counts.span.clone()).unwrap_or_default();
            let all = match text {
                "true" => Some(1),
                "false" => Some(0),
                number => number.parse::<usize>().ok(),
            };
            match files.values().all(|&count| Some(count) == all) {
                true => None,
                false => {
                    let all: Vec<String> = others.iter().chain(files).map(entry).collect();
                    Some(Edit { span: counts.span.clone(), text: format!("{{{}}}", all.join(", ")) })
                }
            }
        }
        _ if files.values().all(|&count| count == 0) => None,
        (Some(section), None) => Some(inserted(section, format!("{}: {{{entries}}}", quoted(COUNTS)))),
        (None, None) => Some(inserted(root, format!("{}: {{{}: {{{entries}}}}}", quoted(SECTION), quoted(COUNTS)))),
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_files_get_entries_of_their_own_in_every_form_of_the_config() {
        let others = BTreeMap::from([("a.onnx".to_string(), 1)]);
        let files = |count: usize| BTreeMap::from([("a_q4.onnx".to_string(), count)]);
        let edited = |text: &str, count: usize| {
            let document = Document::parse("x", text.to_string()).unwrap();
            let edit = counted(&document, &files(count), &others);
            edit.map_or(text.to_string(), |edit| document.apply(vec![edit]).unwrap())
        };
        for (text, count, want) in [
            (r#"{"n": 1}"#, 0, r#"{"n": 1}"#),
            (r#"{"n": 1}"#, 2, r#"{"transformers.js_config": {"use_external_data_format": {"a_q4.onnx": 2}}, "n": 1}"#),
            ("{}", 1, r#"{"transformers.js_config": {"use_external_data_format": {"a_q4.onnx": 1}}}"#),
            (
                r#"{"transformers.js_config": {"dtype": "q4"}}"#,
                1,
                r#"{"transformers.js_config": {"use_external_data_format": {"a_q4.onnx": 1}, "dtype": "q4"}}"#,
            ),
            (
                r#"{"transformers.js_config": {"use_external_data_format": {"a": 1}}}"#,
                0,
                r#"{"transformers.js_config": {"use_external_data_format": {"a_q4.onnx": 0, "a": 1}}}"#,
            ),
            (
                r#"{"transformers.js_config": {"use_external_data_format": true}}"#,
                1,
                r#"{"transformers.js_config": {"use_external_data_format": true}}"#,
            ),
            (
                r#"{"transformers.js_config": {"use_external_data_format": true}}"#,
                0,
                r#"{"transformers.js_config": {"use_external_data_format": {"a.onnx": 1, "a_q4.onnx": 0}}}"#,
            ),
        ] {
            assert_eq!(edited(text, count), want, "{text} {count}");
        }
    }
}
