//! Inputs with one error: the message says where it is, what was found and what was expected, and no output is left
//! behind.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::cli::{fixture, interlace, stderr};

/// The shipped model as `m`, and a picture.
fn model(root: &Path) {
    let source = fixture("model");
    let source = Path::new(&source);
    let target = root.join("m");
    let _ = fs::remove_dir_all(&target);
    for folder in ["", "onnx"] {
        fs::create_dir_all(target.join(folder)).unwrap();
        for entry in fs::read_dir(source.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, target.join(folder).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    fs::copy(fixture("processor/pictures/square-rgb-64.png"), root.join("p.png")).unwrap();
}

/// The error message of a command that fails.
fn refusal(root: &Path, arguments: &[&str]) -> String {
    let output = interlace(root, arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

fn check_message(message: &str, words: &[&str]) {
    assert!(words.iter().all(|word| message.contains(word)), "{message}: expected {words:?}");
    for raw in ["untagged", "did not match any variant", "onnxruntime_src", "panicked"] {
        assert!(!message.contains(raw), "{message}");
    }
}

const ASK: &[&str] = &["generate", "m", "--image", "p.png", "--prompt", "What?", "--max-tokens", "2"];

#[test]
fn a_truncated_component_is_named() {
    let work = tempfile::tempdir().unwrap();
    for cut in [0, 400] {
        model(work.path());
        let path = work.path().join("m/onnx/vision_encoder.onnx");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..cut]).unwrap();
        for arguments in [ASK, &["prune", "m", "--drop", "1", "-o", "out"], &["inspect", "m"]] {
            check_message(&refusal(work.path(), arguments), &["vision_encoder.onnx"]);
            assert!(!work.path().join("out").exists());
        }
    }
}

#[test]
fn rows_of_wrong_types_are_refused_with_the_key_and_expected_type() {
    let work = tempfile::tempdir().unwrap();
    model(work.path());
    let talk = json!([{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]);
    let part = |content: Value| json!([{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]);
    for (row, words) in [
        (json!({"image": 5, "conversations": talk}), ["`image`", "`5`", "the name of a picture or a list of names"]),
        (json!({"images": {"a": 1}, "conversations": talk}), ["`images`", "map", "the name of a picture or a list"]),
        (json!({"images": ["p.png", 3], "conversations": talk}), ["`images`", "`3`", "string"]),
        (json!({"messages": part(json!(7))}), ["`messages`", "`7`", "a text or a list of parts"]),
        (json!({"messages": part(json!(null))}), ["`messages`", "null", "a text or a list of parts"]),
        (json!({"messages": part(json!([{"text": "x"}]))}), ["`messages`", "missing field", "`type`"]),
        (json!({"conversations": "x"}), ["`conversations`", "\"x\"", "a sequence"]),
        (
            json!({"image": "../p.png", "conversations": talk}),
            ["../p.png", "without `..`", "keep pictures in the folder of the JSON file"],
        ),
    ] {
        fs::write(work.path().join("rows.json"), json!([row]).to_string()).unwrap();
        let score = ["score", "m", "--data", "rows.json", "--samples", "1", "-o", "scores.json"];
        check_message(&refusal(work.path(), &score), &words);
        assert!(!work.path().join("scores.json").exists());
    }
}

#[test]
fn configs_of_wrong_types_are_refused_with_the_key_and_expected_type() {
    let work = tempfile::tempdir().unwrap();
    for (file, key, value, words) in [
        ("config.json", "image_token_id", json!(-5), ["config.json", "`image_token_id` is -5", "id of a token"]),
        ("config.json", "image_token_id", json!("x"), ["config.json", "`image_token_id` is \"x\"", "id of a token"]),
        ("config.json", "model_type", json!(5), ["config.json", "`model_type` is 5", "a text"]),
        ("config.json", "pad_token_id", json!("x"), ["config.json", "`pad_token_id` is \"x\"", "id of a token"]),
        ("config.json", "scale_factor", json!("x"), ["config.json", "`scale_factor` is \"x\"", "a whole number"]),
        ("config.json", "max_position_embeddings", json!(-1), ["config.json", "`max_position_embeddings` is -1", "a"]),
        (
            "generation_config.json",
            "max_new_tokens",
            json!(-5),
            ["`generation_config.json`", "is -5", "a whole number"],
        ),
        ("generation_config.json", "eos_token_id", json!("a"), ["`generation_config.json`", "is \"a\"", "list of ids"]),
        ("generation_config.json", "eos_token_id", json!([2, "x"]), ["`generation_config.json`", "[2,\"x\"]", "ids"]),
        ("generation_config.json", "pad_token_id", json!([[]]), ["`generation_config.json`", "`pad_token_id`", "ids"]),
    ] {
        model(work.path());
        let path = work.path().join("m").join(file);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let inner = config.get("text_config").is_some_and(|text| text.get(key).is_some());
        let section = if inner { &mut config["text_config"] } else { &mut config };
        section[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        check_message(&refusal(work.path(), ASK), &words);
    }
    for (key, value, words) in [
        ("layer_types", json!("full"), ["layer_types", "is \"full\"", "a list with one entry per layer"]),
        ("layer_types", json!(["full_attention"]), ["layer_types", "has 1 entries", "16 layers"]),
    ] {
        model(work.path());
        let path = work.path().join("m/config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["text_config"][key] = value;
        fs::write(&path, config.to_string()).unwrap();
        check_message(&refusal(work.path(), &["prune", "m", "--drop", "1", "-o", "out"]), &words);
    }
}

/// Trains one step of layer 9 of the shipped model; `more` are further arguments.
fn train(root: &Path, more: &[&str]) -> std::process::Output {
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let all = ["finetune", &model, "--layers", "9", "--data", &data, "--turns", "separate", "--recipe", "paper"];
    let few = ["--samples", "4", "--batch-size", "4", "--max-steps", "1", "--learning-rate", "1e-3"];
    interlace(root, &[&all[..], &few, more].concat())
}

#[test]
fn a_new_run_does_not_remove_the_checkpoint_of_an_interrupted_one() {
    let work = tempfile::tempdir().unwrap();
    let checkpoint = work.path().join("healed.work/checkpoints/step-00000011");
    fs::create_dir_all(&checkpoint).unwrap();
    let output = train(work.path(), &["-o", "healed"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    check_message(
        &stderr(&output),
        &["`healed.work`: holds step 11 of an interrupted run; add `--resume` to continue, or remove the folder"],
    );
    assert!(checkpoint.exists() && !work.path().join("healed").exists());
}

#[test]
fn a_teacher_of_another_family_is_refused_before_any_work() {
    let work = tempfile::tempdir().unwrap();
    model(work.path());
    let path = work.path().join("m/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let own = config["model_type"].as_str().unwrap().to_string();
    config["model_type"] = "qwen3_vl".into();
    fs::write(&path, config.to_string()).unwrap();
    for more in [&["-o", "healed"][..], &["-o", "healed", "--dry-run"]] {
        let output = train(work.path(), &[&["--teacher", "m"][..], more].concat());
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        check_message(&stderr(&output), &["teacher `m`: is qwen3_vl, the model to train is ", &own, "dense model"]);
        assert!(!work.path().join("healed").exists());
    }
}

#[test]
fn resuming_without_a_checkpoint_says_that_the_run_starts_at_step_1() {
    let work = tempfile::tempdir().unwrap();
    for (out, more, noted) in [("first", "--json", true), ("second", "--quiet", false)] {
        let output = train(work.path(), &["--resume", "-o", out, more]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let note = format!("no checkpoint in `{out}.work`; starting at step 1");
        assert_eq!(stderr(&output).contains(&note), noted, "{}", stderr(&output));
    }
}

/// `rows.json` with this many conversations without pictures.
fn rows(root: &Path, count: usize) {
    let row = |number: usize| {
        let question = format!("What is {number} and {number}?");
        json!({"id": number, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "a sum"}]})
    };
    fs::write(root.join("rows.json"), Value::from((0..count).map(row).collect::<Vec<_>>()).to_string()).unwrap();
}

#[test]
fn a_plan_draws_all_samples_where_there_are_fewer_than_its_default() {
    let work = tempfile::tempdir().unwrap();
    rows(work.path(), 3);
    let model = fixture("model");
    let plan = ["plan", &model, "--strategy", "sleb", "--drop-count", "1", "--data", "rows.json", "-o", "plan.json"];
    let output = interlace(work.path(), &[&plan[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["samples"].as_array().map(Vec::len), Some(3));
    assert_eq!(found["settings"]["samples"], 3);
    let message = refusal(work.path(), &[&plan[..], &["--samples", "4"]].concat());
    check_message(&message, &["has 3 samples, but 4 are asked for; give `--samples 3` or fewer"]);
}

#[test]
fn score_says_how_many_samples_it_draws_by_default() {
    let work = tempfile::tempdir().unwrap();
    rows(work.path(), 20);
    let model = fixture("model");
    let score = ["score", &model, "--data", "rows.json", "-o", "scores.json"];
    for (more, noted) in [(&[][..], true), (&["--samples", "1"], false), (&["--quiet"], false)] {
        let output = interlace(work.path(), &[&score[..], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(stderr(&output).contains("scoring on 2 of 20 samples"), noted, "{}", stderr(&output));
    }
}

#[test]
fn an_answer_longer_than_the_context_is_refused_in_advance() {
    let work = tempfile::tempdir().unwrap();
    model(work.path());
    let ask = ["generate", "m", "--prompt", "What?", "--max-tokens", "999999"];
    check_message(&refusal(work.path(), &ask), &["999999", "positions", "allow at most", "`--max-tokens`"]);
    fs::write(
        work.path().join("rows.json"),
        json!([{"id": "one", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}])
            .to_string(),
    )
    .unwrap();
    let all = ["generate", "m", "--data", "rows.json", "--max-tokens", "999999", "-o", "answers.jsonl"];
    check_message(&refusal(work.path(), &all), &["one", "999999", "positions"]);
    assert!(!work.path().join("answers.jsonl").exists());
}

#[test]
fn a_missing_file_is_named_with_the_argument_and_what_to_do() {
    let work = tempfile::tempdir().unwrap();
    model(work.path());
    for (arguments, path, place) in [
        (&["inspect", "none"][..], "none", "on the command line"),
        (&["score", "m", "--data", "none.json", "-o", "s.json"], "none.json", "after `--data`"),
        (&["prune", "m", "--plan=none.json", "-o", "out"], "none.json", "after `--plan`"),
        (&["prune", "none", "--drop", "1", "-o", "out"], "none", "on the command line"),
        (&["run", "none.toml"], "none.toml", "on the command line"),
        (&["eval", "m", "--data", "none.tsv", "-o", "out"], "none.tsv", "after `--data`"),
        (&["generate", "m", "--image", "none.png", "--prompt", "x"], "none.png", "after `--image`"),
        (&["export", "m", "--to", "safetensors", "--base", "none", "-o", "out"], "none", "after `--base`"),
    ] {
        let message = refusal(work.path(), arguments);
        check_message(&message, &[&format!("`{path}`"), "No such file", &format!("check the path {place}")]);
        assert!(!message.contains("caused by"), "{message}");
    }
    let json = interlace(work.path(), &["inspect", "none", "--json"]);
    let answer: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(answer["error"]["message"].as_str().unwrap().contains("check the path on the command line"), "{answer}");
}

#[test]
fn an_unknown_opset_and_a_folder_without_a_model_say_what_to_give() {
    let work = tempfile::tempdir().unwrap();
    model(work.path());
    let late = refusal(work.path(), &["export", "m", "--to", "openvino", "--opset", "25", "-o", "out"]);
    check_message(&late, &["opset 25", "give `--opset` 18 to 24"]);
    let early = refusal(work.path(), &["export", "m", "--to", "openvino", "--opset", "13", "-o", "out"]);
    check_message(&early, &["opset 13", "leave `--opset` out"]);
    fs::create_dir(work.path().join("empty")).unwrap();
    check_message(&refusal(work.path(), &["verify", "empty"]), &["is not a model folder", "manifest.json"]);
}

/// Rendering takes few instructions that each take long, and never ends by itself.
#[test]
fn ctrl_c_ends_the_rendering_of_a_template() {
    let work = tempfile::tempdir().unwrap();
    model(work.path());
    let template = "{% for i in range(100000) %}{{ range(100000) | sort | length }}{% endfor %}";
    fs::write(work.path().join("m/chat_template.jinja"), template).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_interlace"));
    let child = command.args(ASK).current_dir(work.path()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    // SAFETY: the child runs until `wait_with_output`.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    check_message(&stderr(&output), &["error: interrupted"]);
}
