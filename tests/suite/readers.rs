//! Settings where readers other than transformers 5 look for them: every folder that is written has them, and `verify` says what a
//! folder lacks.

use std::fs;
use std::path::Path;

use interlace::ir::{AttributeKind, DataType, Node, Value as GraphValue, ValueType};
use interlace::onnx;
use serde_json::{Value, json};

use super::cli::{fixture, interlace, stderr};

/// Takes the chat template out of a folder.
pub fn without_template(model: &Path) {
    fs::remove_file(model.join("chat_template.jinja")).expect("removed");
    let path = model.join("tokenizer_config.json");
    let mut config = read(&path);
    config.as_object_mut().expect("an object").remove("chat_template");
    fs::write(path, config.to_string()).expect("written");
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a config")).expect("JSON")
}

/// The shipped model with its configs as transformers 5 saves them.
fn model(here: &Path) {
    super::tensors::copy_folder(Path::new(&fixture("model")), &here.join("model"));
    for (file, gone, class) in [
        ("tokenizer_config.json", "chat_template", Some("TokenizersBackend")),
        ("preprocessor_config.json", "processor_class", None),
    ] {
        let path = here.join("model").join(file);
        let mut config = read(&path);
        let config = config.as_object_mut().expect("an object");
        assert!(config.remove(gone).is_some(), "the shipped model has `{gone}` in {file}");
        config.extend(class.map(|class| ("tokenizer_class".to_string(), json!(class))));
        if let Some(tokens) = config.remove("additional_special_tokens") {
            config.insert("extra_special_tokens".to_string(), tokens);
        }
        fs::write(path, serde_json::to_string_pretty(&config).expect("text")).expect("written");
    }
}

/// The findings of `verify` of this name: status, subject and detail.
fn found(here: &Path, folder: &str, name: &str) -> Vec<(String, String, String)> {
    let output = interlace(here, &["--json", "verify", folder, "-q"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    let checks = report["checks"].as_array().expect("checks").iter().filter(|check| check["name"] == name);
    let text = |check: &Value, key: &str| check[key].as_str().expect("text").to_string();
    checks.map(|check| (text(check, "status"), text(check, "subject"), text(check, "detail"))).collect()
}

const SETTINGS: &str = "settings for other readers";

#[test]
fn folders_that_are_written_have_the_settings_where_other_readers_look() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    let missed = found(here, "model", SETTINGS);
    let parts = [
        "the chat template, which is in `chat_template.jinja`",
        "`TokenizersBackend`",
        "no list in `extra_special_tokens`",
        "`processor_class`",
    ];
    assert_eq!(missed.len(), parts.len(), "{missed:?}");
    for (part, (status, _, detail)) in parts.into_iter().zip(&missed) {
        assert!(status == "warning" && detail.contains(part) && detail.contains("--to transformers-js"), "{detail}");
    }
    for arguments in [
        &["prune", "model", "--drop", "2,5", "-o", "out"][..],
        &["export", "model", "--to", "openvino", "-o", "out"],
        &["export", "model", "--precision", "fp16", "-o", "out"],
    ] {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        let tokenizer = read(&here.join("out/tokenizer_config.json"));
        let template = fs::read_to_string(here.join("model/chat_template.jinja")).expect("a template");
        assert_eq!(
            (&tokenizer["chat_template"], &tokenizer["tokenizer_class"]),
            (&json!(template), &json!("PreTrainedTokenizerFast"))
        );
        // Nothing else changes.
        let mut before = read(&here.join("model/tokenizer_config.json"));
        before["chat_template"] = json!(template);
        before["tokenizer_class"] = json!("PreTrainedTokenizerFast");
        before["additional_special_tokens"] = before["extra_special_tokens"].clone();
        before["extra_special_tokens"] = json!({});
        assert_eq!(tokenizer, before);
        assert_eq!(read(&here.join("out/preprocessor_config.json"))["processor_class"], "Idefics3Processor");
        fs::remove_dir_all(here.join("out")).expect("removed");
    }
    // The whole file, from where transformers 5 has it alone.
    fs::remove_file(here.join("model/preprocessor_config.json")).expect("removed");
    let missed = found(here, "model", SETTINGS);
    assert!(missed.iter().any(|(_, file, _)| file == "preprocessor_config.json"), "{missed:?}");
    let output = interlace(here, &["prune", "model", "--drop", "2,5", "-o", "out"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let nested = read(&here.join("model/processor_config.json"))["image_processor"].clone();
    let mut flat = read(&here.join("out/preprocessor_config.json"));
    assert_eq!(flat.as_object_mut().expect("an object").remove("processor_class"), Some(json!("Idefics3Processor")));
    assert_eq!(flat, nested);
    assert_eq!(found(here, "out", SETTINGS)[0].0, "passed");
    // A file that no one can read is carried as it is.
    fs::write(here.join("model/tokenizer_config.json"), "{").expect("written");
    let output = interlace(here, &["prune", "model", "--drop", "2,5", "-o", "broken"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read(here.join("broken/tokenizer_config.json")).expect("a file"), b"{");
}

/// The shipped model, and what a quantiser makes of its ports where it does not keep them.
#[test]
fn ports_in_half_precision_are_a_problem_where_programs_feed_floats() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    super::tensors::copy_folder(Path::new(&fixture("model")), &here.join("model"));
    assert_eq!(found(here, "model", SETTINGS)[0].0, "passed");
    assert!(found(here, "model", "inputs and outputs").is_empty());
    let path = here.join("model/onnx/embed_tokens.onnx");
    let mut embedding = onnx::load(&path).expect("a graph");
    let graph = &mut embedding.graph;
    let wide = graph.body.outputs[0];
    let Some(ValueType::Tensor { shape, .. }) = graph.value(wide).ty.clone() else { panic!("a tensor") };
    let name = std::mem::replace(&mut graph.values[wide.index()].name, "wide".into());
    let ty = Some(ValueType::Tensor { dtype: DataType::Float16, shape });
    let narrow = graph.add_value(GraphValue { name, ty, ..GraphValue::default() });
    graph.body.nodes.push(Node {
        op_type: "Cast".into(),
        inputs: vec![Some(wide)],
        outputs: vec![Some(narrow)],
        attributes: vec![("to".to_string(), AttributeKind::Int(DataType::Float16 as i64).into())],
        ..Node::default()
    });
    graph.body.outputs = vec![narrow];
    onnx::save(&embedding, &path, &onnx::Storage::Inline).expect("saved");
    let problems = found(here, "model", "inputs and outputs");
    assert_eq!(problems.len(), 1, "{problems:?}");
    let (status, file, detail) = &problems[0];
    assert_eq!((status.as_str(), file.as_str()), ("failed", "onnx/embed_tokens.onnx"));
    assert!(detail.contains("`inputs_embeds` in half precision") && detail.contains("--precision fp16"), "{detail}");
}
