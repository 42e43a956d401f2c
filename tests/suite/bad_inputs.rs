//! Broken models and data as they occur in practice: each gives one error with a remedy, and exit status 2.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::cli::{interlace, stderr};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// A copy of the shipped model.
fn model(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    fs::create_dir_all(copy.join("onnx")).expect("folder");
    for place in ["", "onnx"] {
        for entry in fs::read_dir(fixtures().join("model").join(place)).expect("folder") {
            let path = entry.expect("entry").path();
            if path.is_file() {
                fs::copy(&path, copy.join(place).join(path.file_name().expect("name"))).expect("copy");
            }
        }
    }
    copy
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).expect("file")).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("write");
}

/// Runs a verb that must fail and checks that its message contains these parts.
fn refused(folder: &Path, arguments: &[&str], wanted: &[&str]) {
    let output = interlace(folder, arguments);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
    assert_eq!(message.lines().filter(|line| line.starts_with("error:")).count(), 1, "{message}");
    for part in wanted {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
    assert!(!folder.join("out.json").exists(), "{arguments:?} left its output");
}

fn score(folder: &Path, wanted: &[&str]) {
    let data = fixtures().join("data/finetune-small.parquet");
    let data = data.to_str().expect("path");
    let arguments =
        ["score", "model", "--data", data, "--turns", "separate", "--samples", "4", "-o", "out.json", "--quiet"];
    refused(folder, &arguments, wanted);
}

#[test]
fn a_template_that_fails_to_render_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model(folder.path());
    fs::write(model.join("chat_template.jinja"), "{{ raise_exception('roles must alternate') }}").expect("write");
    score(folder.path(), &["chat template in `chat_template.jinja`", "roles must alternate", "repair the template"]);
    fs::write(model.join("chat_template.jinja"), "{% for message in messages %}").expect("write");
    score(folder.path(), &["chat template in `chat_template.jinja`", "line 1"]);
}

/// A cell that is quoted in a message is cut.
#[test]
fn a_long_cell_is_not_printed_whole() {
    let folder = tempfile::tempdir().expect("folder");
    model(folder.path());
    let long = "QUJD".repeat(2000);
    let row = |key: &str, value: &str| {
        format!(
            r#"{{"{key}": "{value}", "conversations": [{{"from": "human", "value": "x"}}, {{"from": "gpt", "value": "y"}}]}}"#
        )
    };
    for (text, wanted) in [
        (row("image", &long), &["image `QUJDQUJD", "QUJD..`", "keep pictures in the folder"][..]),
        (format!(r#"{{"conversations": "{long}"}}"#), &["`conversations`: invalid type: string", "a sequence"]),
        (format!(r#"{{"messages": [{{"role": "{long}", "content": "x"}}]}}"#), &["has a message of `QUJD", "QUJD..`"]),
    ] {
        fs::write(folder.path().join("x.jsonl"), text).expect("data");
        let arguments = ["score", "model", "--data", "x.jsonl", "--samples", "1", "-o", "out.json", "--quiet"];
        refused(folder.path(), &arguments, wanted);
        let message = stderr(&interlace(folder.path(), &arguments));
        assert!(message.len() < 900, "{message}");
    }
}

/// The model's faults are not counted as unreadable rows.
#[test]
fn a_model_without_a_template_or_an_image_processor_is_at_fault_and_not_the_data() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model(folder.path());
    super::readers::without_template(&model);
    score(folder.path(), &["error: `model`: has no chat template", "expected chat_template.jinja"]);
    fs::copy(fixtures().join("model/chat_template.jinja"), model.join("chat_template.jinja")).expect("copy");
    fs::remove_file(model.join("preprocessor_config.json")).expect("remove");
    edit(&model.join("processor_config.json"), |config| {
        drop(config.as_object_mut().expect("keys").shift_remove("image_processor"))
    });
    let wanted = "error: `model`: not supported: data has pictures, but the model has no image processor";
    score(folder.path(), &[wanted, "put `preprocessor_config.json` beside the model"]);
}

#[test]
fn a_model_without_token_embeddings_is_refused_by_file_and_with_the_names_looked_for() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model(folder.path());
    for name in ["embed_tokens.onnx", "embed_tokens.onnx_data"] {
        let path = model.join("onnx").join(name);
        if path.exists() {
            fs::remove_file(path).expect("remove");
        }
    }
    let file = "`model/onnx/decoder_model_merged.onnx`: takes `inputs_embeds`";
    score(folder.path(), &[file, "put `embed_tokens.onnx`, `prepare_inputs_embeds.onnx`", "`embedding/model.onnx`"]);
}

#[test]
fn a_question_without_an_answer_is_refused_with_one_remedy() {
    let folder = tempfile::tempdir().expect("folder");
    model(folder.path());
    fs::write(folder.path().join("x.jsonl"), r#"{"conversations": [{"from": "human", "value": "Hi"}]}"#).expect("data");
    let arguments = ["score", "model", "--data", "x.jsonl", "--samples", "1", "-o", "out.json", "--quiet"];
    let ends = "the conversation ends with the user; an assistant's answer is missing; correct the row, or remove it from \
                the file\n";
    refused(folder.path(), &arguments, &["more than 5% of 1 samples cannot be read, repair the data", ends]);
}

#[test]
fn a_tokenizer_without_the_image_token_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model(folder.path());
    edit(&model.join("tokenizer.json"), |tokenizer| {
        let added = tokenizer["added_tokens"].as_array_mut().expect("tokens");
        added.retain(|token| token["content"] != "<image>");
        tokenizer["model"]["vocab"].as_object_mut().expect("vocabulary").shift_remove("<image>");
    });
    score(folder.path(), &["`image_token_id` is 4", "the tokenizer does not have", "of the same model"]);
    edit(&model.join("config.json"), |config| {
        drop(config.as_object_mut().expect("keys").shift_remove("image_token_id"))
    });
    score(folder.path(), &["has no image token `<image>`", "of the same model"]);
}

#[test]
fn a_wrong_number_of_image_tokens_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model(folder.path());
    edit(&model.join("processor_config.json"), |config| config["image_seq_len"] = 4.into());
    score(folder.path(), &["`image_seq_len` is 4", "make 16"]);
    edit(&model.join("config.json"), |config| config["scale_factor"] = 4.into());
    score(folder.path(), &["has 4 image tokens", "16 rows of features", "belong together"]);
}

#[test]
fn an_unread_processor_setting_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model(folder.path());
    edit(&model.join("preprocessor_config.json"), |config| config["do_sharpen"] = true.into());
    edit(&model.join("processor_config.json"), |config| config["image_processor"]["do_sharpen"] = true.into());
    score(folder.path(), &["do_sharpen", "without pictures"]);
}

#[test]
fn a_truncated_parquet_file_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    model(folder.path());
    let bytes = fs::read(fixtures().join("data/finetune-small.parquet")).expect("file");
    for length in [0, 7, bytes.len() / 2, bytes.len() - 1] {
        fs::write(folder.path().join("cut.parquet"), &bytes[..length]).expect("write");
        let arguments = ["score", "model", "--data", "cut.parquet", "--samples", "4", "-o", "out.json", "--quiet"];
        refused(folder.path(), &arguments, &["cut.parquet", "is not a readable Parquet file", "whole"]);
    }
}

#[test]
fn a_benchmark_without_questions_or_pictures_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    model(folder.path());
    let picture = "A".repeat(80);
    for (text, wanted) in [
        ("index\timage\tquestion\tanswer\n".to_string(), &["is empty", "at least one question"][..]),
        (format!("index\timage\tanswer\n1\t{picture}\tyes\n"), &["has no column `question`", "tab-separated layout"]),
        (format!("index\timage\tquestion\tanswer\n1\t{picture}\t\tyes\n"), &["row `1`", "has no `question`"]),
        ("index\timage\tquestion\tanswer\n1\t\tWhy?\tyes\n".to_string(), &["picture"]),
        (
            format!("index\timage\tquestion\tcategory\n1\t{picture}\tWhy?\tA\n"),
            &["has no column `answer`, only index, image, question, category"],
        ),
        (
            format!("index\timage_path\tquestion\tanswer\n1\t{}\tWhy?\tyes\n", picture.repeat(40)),
            &["`image_path` of row `1` holds base64, expected a file name; call the column `image`"],
        ),
    ] {
        fs::write(folder.path().join("bench.tsv"), &text).expect("write");
        refused(folder.path(), &["eval", "model", "--data", "bench.tsv", "-o", "out.json", "--quiet"], wanted);
    }
}

/// One of 24 rows cannot be read: `generate` skips it, and with `--strict` it is an error.
#[test]
fn generate_skips_unreadable_rows_unless_strict() {
    let folder = tempfile::tempdir().expect("folder");
    model(folder.path());
    let row = |number: usize| {
        match number {
        5 => r#"{"image": "missing.png", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]}"#.to_string(),
        _ => format!(r#"{{"id": {number}, "conversations": [{{"from": "human", "value": "Is it {number}?"}}, {{"from": "gpt", "value": "a"}}]}}"#),
    }
    };
    fs::write(folder.path().join("x.jsonl"), (0..24).map(row).collect::<Vec<_>>().join("\n")).expect("data");
    let arguments = ["generate", "model", "--data", "x.jsonl", "--max-tokens", "1", "-o", "out.json", "--quiet"];
    let output = interlace(folder.path(), &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("1 unreadable") && stderr(&output).contains("missing.png"), "{}", stderr(&output));
    let answers = fs::read_to_string(folder.path().join("out.json")).expect("answers");
    assert_eq!(answers.lines().count(), 23);
    assert!(answers.contains("(id `6`)"), "{answers}");
    fs::remove_file(folder.path().join("out.json")).expect("removed");
    refused(folder.path(), &[&arguments[..], &["--strict"]].concat(), &["missing.png", "row 5 of `x.jsonl`"]);
}
