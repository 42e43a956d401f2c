//! The contract of the command line: verbs, exit codes, one clear message per error, no partial output.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the command in a folder.
pub fn interlace(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_interlace"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("NO_COLOR")
        .output()
        .expect("the binary starts")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn help_and_version_go_to_standard_output_with_status_0() {
    let folder = tempfile::tempdir().expect("folder");
    for arguments in [&["--help"][..], &["--version"], &["help"], &["plan", "--help"]] {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(stdout(&output).contains("interlace"), "{arguments:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn help_into_a_closed_pipe_exits_with_status_0() {
    for arguments in [&["--help"][..], &["help"], &["finetune", "--help"], &["--version"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_interlace"))
            .args(arguments)
            .stdout(writer)
            .output()
            .expect("the binary starts");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn only_the_interlace_torch_program_links_libtorch() {
    let links = |program: &str| {
        let bytes = fs::read(program).expect("the program");
        [&b"libtorch_cpu.so\0"[..], b"libc10.so\0"]
            .iter()
            .any(|name| bytes.windows(name.len()).any(|window| window == *name))
    };
    assert!(!links(env!("CARGO_BIN_EXE_interlace")), "`interlace` links LibTorch");
    assert!(links(env!("CARGO_BIN_EXE_interlace-torch")), "`interlace-torch` does not link LibTorch");
}

#[test]
fn a_missing_torch_program_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let alone = folder.path().join("interlace");
    fs::copy(env!("CARGO_BIN_EXE_interlace"), &alone).expect("copy");
    let output = Command::new(&alone).args(["verify", "model"]).output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(2));
    let message = stderr(&output);
    assert!(message.contains("interlace-torch") && message.contains("cargo build"), "{message}");
}

#[test]
fn usage_errors_exit_with_2_and_say_what_is_wrong() {
    let folder = tempfile::tempdir().expect("folder");
    for (arguments, want) in [
        (&[][..], "Usage"),
        (&["polish"], "polish"),
        (&["export", "model", "-o", "out"], "--to <TARGET>|--precision <NAMES>|--vocabulary"),
        (&["plan"], "required"),
        (&["plan", "model", "-o", "p.json", "--drop-ratio", "0.25", "--drop-count", "4"], "cannot be used with"),
        (&["plan", "model", "-o", "p.json", "--drop", "2,x"], "`x` is not a layer index"),
        (&["plan", "model", "-o", "p.json", "--drop-count", "4", "--target-speedup", "1.2"], "cannot be used with"),
        (&["plan", "model", "-o", "p.json", "--target-size", "1.5 pounds"], "with k, M, G"),
        (&["bench", "model", "-o", "b.json", "--prompt-tokens", "9223372036854775807"], "must be at most 16777216"),
        (&["bench", "model", "-o", "b.json", "--rounds", "99999999"], "must be at most 16777216"),
        (&["generate", "model", "--prompt", "p", "--max-tokens", "99999999"], "must be at most 16777216"),
        (&["eval", "model", "--data", "d", "-o", "o", "--max-new-tokens", "99999999"], "must be at most 16777216"),
        (&["score", "model", "--data", "d", "-o", "o", "--image-size", "100000000"], "must be at most 16384"),
        (&["tune", "model", "--data", "d", "-o", "o", "--rounds", "99999999"], "must be at most 16777216"),
        (&["bench", "model", "-o", "b.json", "--rounds", "-1"], "must be a whole number above 0"),
        (
            &["finetune", "model", "--data", "d", "-o", "o", "--layers", "2", "--epochs", "-1"],
            "-1 is not in 0..=4294967295",
        ),
        (&["verify", "model", "--max-buffer", "-1"], "must be a number from 1 to below 1e18 in all"),
        (&["verify", "model", "--max-buffer", "18446744073709551616"], "below 1e18"),
        (&["finetune", "model", "--data", "d", "-o", "o"], "--plan <FILE>|--layers <LAYERS>"),
        (&["finetune", "model", "--data", "d", "-o", "o", "--plan", "p", "--layers", "2"], "cannot be used with"),
        (&["finetune", "model", "--data", "d", "-o", "o", "--layers", "2", "--lr", "fast"], "--learning-rate <LR>"),
    ] {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(want), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn with_json_errors_are_json_with_a_code() {
    let folder = tempfile::tempdir().expect("folder");
    for (arguments, code) in [
        (&["inspect", "nowhere", "--json"][..], "file"),
        (&["prune", &fixture("model"), "--drop", "99", "-o", "out", "--json"], "invalid"),
        (&["--json", "polish"], "usage"),
        (&["plan", "--json"], "usage"),
        (&["prune", "model", "--drop", "two", "-o", "out", "--json"], "usage"),
    ] {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
        assert_eq!(found["error"]["code"], code, "{found}");
        let message = found["error"]["message"].as_str().expect("a message");
        // The requirements of a usage error are lines of their own on standard error.
        let words = |text: &str| text.replace("; ", " ").split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(!message.is_empty() && words(&stderr(&output)).contains(&words(message)), "{found}");
        assert!(!message.contains("Usage:"), "{found}");
    }
}

#[test]
fn completions_and_man_pages_cover_every_verb() {
    let folder = tempfile::tempdir().expect("folder");
    let verbs = interlace::cli::verbs();
    for shell in ["bash", "zsh", "fish"] {
        let text = String::from_utf8(interlace(folder.path(), &["completions", shell]).stdout).expect("text");
        assert!(verbs.iter().all(|(name, _)| text.contains(name.as_str())), "{shell}");
    }
    let output = interlace(folder.path(), &["man", "--output", "nowhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("mkdir"), "{}", stderr(&output));
    let output = interlace(folder.path(), &["man", "--output", "."]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for (name, _) in verbs.iter().filter(|(name, _)| name != "help") {
        let page = fs::read_to_string(folder.path().join(format!("interlace-{name}.1"))).expect("a page");
        assert!(page.contains("Example"), "{name}");
    }
}

/// A file or folder of `fixtures/`.
pub fn fixture(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path);
    assert!(path.exists(), "{}", path.display());
    path.display().to_string()
}

fn json(output: &Output) -> serde_json::Value {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("standard output is JSON alone")
}

/// A copy of the fixture model that a test may change.
pub fn model_copy(folder: &Path) -> PathBuf {
    let (source, target) = (PathBuf::from(fixture("model")), folder.join("model"));
    fs::create_dir_all(target.join("onnx")).expect("folder");
    for part in ["", "onnx"] {
        for entry in fs::read_dir(source.join(part)).expect("model") {
            let path = entry.expect("entry").path();
            if path.is_file() {
                fs::copy(&path, target.join(part).join(path.file_name().expect("name"))).expect("copy");
            }
        }
    }
    target
}

/// Names in a folder, including hidden ones.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn inspect_prints_layers_at_the_top_level() {
    let folder = tempfile::tempdir().expect("folder");
    let found = json(&interlace(folder.path(), &["inspect", &fixture("model"), "--json"]));
    assert_eq!(found["num_layers"], 16);
    assert_eq!(found["layers"].as_array().map(Vec::len), Some(16));
    assert_eq!(found["layers"][3]["kv_ports"][0]["past"], "past_key_values.3.key");
    assert_eq!(found["vision"]["num_layers"], 5);
    let text = interlace(folder.path(), &["inspect", &fixture("model")]);
    assert!(stdout(&text).contains("decoder: 16 layers"), "{}", stdout(&text));
    assert!(stdout(&text).contains("\nscore: yes\nprune: yes\nfinetune: yes\neval: yes\n"), "{}", stdout(&text));
    // A second decoder would keep its old weights, and a head that reads one position has no losses on answers.
    let model = model_copy(folder.path());
    fs::copy(model.join("onnx/decoder_model_merged.onnx"), model.join("onnx/decoder_model_merged_q4.onnx"))
        .expect("copy");
    fs::copy(model.join("onnx/decoder_model_merged.onnx_data"), model.join("onnx/decoder_model_merged_q4.onnx_data"))
        .expect("copy");
    super::readers::without_template(&model);
    let text = stdout(&interlace(folder.path(), &["inspect", "model"]));
    for line in [
        "score: yes: on running text and ready tensors alone: `model`: has no chat template",
        "prune: yes\n",
        "finetune: no: finetuning `onnx/decoder_model_merged.onnx` beside onnx/decoder_model_merged_q4.onnx",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let found = json(&interlace(folder.path(), &["inspect", "model", "--json"]));
    assert_eq!(found["verdicts"][2]["verb"], "finetune");
    assert_eq!(found["verdicts"][2]["works"], false);
    assert_eq!(found["verdicts"][1]["works"], true);
    assert!(!text.contains('\x1b'), "colours without a terminal");
}

#[test]
fn prune_renumbers_layers_and_records_their_original_indices() {
    let folder = tempfile::tempdir().expect("folder");
    let pruned = json(&interlace(folder.path(), &["prune", &fixture("model"), "--drop", "5,2", "-o", "out", "--json"]));
    assert_eq!(pruned["dropped"], serde_json::json!([2, 5]));
    let found = json(&interlace(folder.path(), &["inspect", "out", "--json"]));
    let originals: Vec<u64> = found["layers"]
        .as_array()
        .expect("layers")
        .iter()
        .filter_map(|layer| layer["original_index"].as_u64())
        .collect();
    assert_eq!(originals, [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("out/config.json")).expect("config")).expect("JSON");
    assert_eq!(config["text_config"]["num_hidden_layers"], 14);
    let vision = ["prune", &fixture("model"), "--component", "vision_encoder", "--drop", "3", "-o", "seeing", "--json"];
    let pruned = json(&interlace(folder.path(), &vision));
    assert_eq!(pruned["layers_after"], 4);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("seeing/config.json")).expect("config")).expect("JSON");
    assert_eq!(config["vision_config"]["num_hidden_layers"], 4);
    assert_eq!(config["text_config"]["num_hidden_layers"], 16);
    let found = json(&interlace(folder.path(), &["inspect", "seeing", "--json"]));
    assert_eq!((&found["num_layers"], &found["vision"]["num_layers"]), (&16.into(), &4.into()));
}

#[test]
fn a_single_decoder_file_is_pruned_under_its_own_name() {
    let folder = tempfile::tempdir().expect("folder");
    let decoder = fixture("model/onnx/decoder_model_merged.onnx");
    json(&interlace(folder.path(), &["prune", &decoder, "--drop", "1", "-o", "out", "--json"]));
    let written = names(&folder.path().join("out"));
    assert_eq!(written, ["decoder_model_merged.onnx", "decoder_model_merged.onnx_data", "interlace.json"]);
}

#[test]
fn plans_need_scores_of_the_same_model() {
    let folder = tempfile::tempdir().expect("folder");
    let model = fixture("model");
    let random = ["plan", &model, "--strategy", "random", "--drop-count", "4", "-o", "plan.json", "--json"];
    let plan = json(&interlace(folder.path(), &random));
    assert_eq!(plan["drop"].as_array().map(Vec::len), Some(4));
    let again: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("plan.json")).expect("plan")).expect("JSON");
    assert_eq!(plan, again);
    // The plan was made for the dense model, so it does not fit a pruned one.
    json(&interlace(folder.path(), &["prune", &model, "--plan", "plan.json", "-o", "pruned", "--json"]));
    let output = interlace(folder.path(), &["prune", "pruned", "--plan", "plan.json", "-o", "twice"]);
    assert_eq!(output.status.code(), Some(2));
    let message = stderr(&output);
    let want = "plan `plan.json`: made for another model than `pruned`, which was pruned already; give the dense model";
    assert!(message.contains(want), "{message}");
    // A file of another kind.
    let data = fixture("data/finetune-small.parquet");
    let score = ["score", &model, "--data", &data, "--samples", "1", "-o", "scores.json", "--json"];
    json(&interlace(folder.path(), &score));
    for (arguments, want) in [
        (
            &["prune", &model, "--plan", "scores.json", "-o", "out"][..],
            "`scores.json`: holds scores, expected a plan; name a file that `interlace plan` wrote",
        ),
        (
            &["plan", &model, "--scores", "plan.json", "--drop-count", "1", "-o", "p.json"],
            "`plan.json`: holds a plan, expected scores; name a file that `interlace score` wrote",
        ),
        (
            &["plan", "pruned", "--scores", "scores.json", "--drop-count", "1", "-o", "p.json"],
            "scores `scores.json`: made for another model than `pruned`, which was pruned already",
        ),
        (
            &["prune", &model, "--plan", "pruned/interlace.json", "-o", "out"],
            "holds the record of a model, expected a plan",
        ),
    ] {
        let message = stderr(&interlace(folder.path(), arguments));
        assert!(message.contains(want), "{arguments:?}: {message}");
    }
}

/// Both plans drop the same layers, so only the models' digests differ.
#[test]
fn finetune_refuses_the_plan_of_another_model() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (dense, other) = (fixture("model"), model_copy(here));
    let config = fs::read_to_string(other.join("config.json")).expect("config");
    fs::write(other.join("config.json"), format!("{config}\n")).expect("write");
    json(&interlace(here, &["plan", &dense, "--drop", "2,9", "-o", "plan.json", "--json"]));
    json(&interlace(here, &["plan", "model", "--drop", "2,9", "-o", "other.json", "--json"]));
    json(&interlace(here, &["prune", &dense, "--plan", "plan.json", "-o", "pruned", "--json"]));
    let data = fixture("data/finetune-small.parquet");
    let all = ["finetune", "pruned", "--plan", "other.json", "--data", &data, "--recipe", "paper", "-o", "healed"];
    let output = interlace(here, &all);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in ["`pruned`: was pruned from a model with digest", "give the plan that the model was pruned with"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!here.join("healed").exists() && !here.join("healed.work").exists());
}

#[test]
fn errors_are_one_message_with_status_2_and_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let data = fixture("data/finetune-small.parquet");
    let write = |name: &str, bytes: &[u8]| fs::write(here.join(name), bytes).expect("write");
    let truncated = model_copy(&here.join("truncated"));
    let decoder = truncated.join("onnx/decoder_model_merged.onnx");
    let bytes = fs::read(&decoder).expect("decoder");
    fs::write(&decoder, &bytes[..bytes.len() / 2]).expect("write");
    let short = model_copy(&here.join("short"));
    let weights = short.join("onnx/decoder_model_merged.onnx_data");
    fs::OpenOptions::new().write(true).open(&weights).and_then(|file| file.set_len(1000)).expect("truncate");
    let foreign = model_copy(&here.join("foreign"));
    fs::write(foreign.join("onnx/mystery.onnx"), b"?").expect("write");
    fs::create_dir(here.join("empty")).expect("folder");
    fs::create_dir(here.join("taken")).expect("folder");
    write("taken/file", b"mine");
    write("empty.parquet", b"");
    write("none.tsv", b"index\timage\tquestion\tanswer\tcategory\n");
    write("broken.tsv", b"index\timage\tquestion\tanswer\tcategory\n0\tbm8gcGljdHVyZQ==\tWhat?\tcat\tA\n");
    let talk = r#""conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ho"}]}"#;
    write("video.jsonl", format!("{{{talk}\n{{\"video\": \"a.mp4\", {talk}\n").as_bytes());
    let broken = format!("{{\"image\": \"none.png\", {talk}\n");
    write("half.jsonl", format!("{{{talk}\n{broken}{broken}").as_bytes());
    write("not.json", b"{");
    write("recipe.toml", b"modle = 1\n");
    let all = (0..16).map(|layer| layer.to_string()).collect::<Vec<_>>().join(",");
    let (truncated, short, foreign) =
        (truncated.display().to_string(), short.display().to_string(), foreign.display().to_string());
    let cases: &[(&[&str], &str)] = &[
        (&["inspect", "missing"], "missing"),
        (&["inspect", "empty"], "is not a model folder"),
        (&["inspect", &truncated], "decoder_model_merged.onnx"),
        (&["inspect", &foreign], "mystery.onnx"),
        (&["prune", &short, "--drop", "2", "-o", "out"], "decoder_model_merged"),
        (&["prune", &model, "--drop", "2,16", "-o", "out"], "layer 16"),
        (&["prune", &model, "--drop", "2,2", "-o", "out"], "twice"),
        (&["prune", &model, "--drop", &all, "-o", "out"], "all 16 layers"),
        (&["prune", &model, "--drop", "2", "-o", "taken"], "exists already"),
        (&["prune", &model, "--plan", "not.json", "-o", "out"], "not JSON"),
        (&["score", &model, "--data", "missing.parquet", "-o", "out"], "missing.parquet"),
        (&["score", &model, "--data", "empty.parquet", "-o", "out"], "empty.parquet"),
        (&["score", &model, "--data", &data, "--samples", "99999", "-o", "out"], "99999"),
        (&["score", &model, "--data", &data, "--samples", "2", "--device", "tpu", "-o", "out"], "tpu"),
        (&["score", &model, "--data", "video.jsonl", "-o", "out"], "without a reader: `video`"),
        (&["score", &model, "--data", "half.jsonl", "--fraction", "1", "-o", "out"], "more than 5% of 3 samples"),
        (&["score", &model, "--data", "half.jsonl", "--fraction", "1", "--strict", "-o", "out"], "none.png"),
        (&["score", &model, "--data", "half.jsonl", "--min-rating", "a=1", "-o", "out"], "reaches the ratings"),
        (&["score", &model, "--data", "half.jsonl", "--turns", "some", "-o", "out"], "turns `some`"),
        (&["plan", &model, "--drop-ratio", "0.25", "-o", "out"], "needs scores"),
        (&["plan", &model, "--strategy", "random", "--drop-ratio", "1.5", "-o", "out"], "1.5"),
        (&["plan", &model, "--strategy", "random", "--target-params", "1k", "-o", "out"], "cannot be reached"),
        (&["plan", &model, "--strategy", "random", "--target-size", "9GB", "-o", "out"], "already"),
        (&["plan", &model, "--strategy", "interlace-loss", "--drop-count", "2", "-o", "out"], "--data"),
        (&["sweep", "recipe.toml"], "modle"),
        (&["eval", &model, "--data", "none.tsv", "-o", "out"], "none.tsv"),
        (&["eval", &model, "--data", "broken.tsv", "-o", "out"], "row"),
        (&["export", &model, "--to", "triton", "--variant", "q9", "-o", "out"], "q9"),
        (&["export", &model, "--to", "triton", "-o", "taken"], "exists already"),
        (&["run", "recipe.toml"], "modle"),
        (&["run", "recipe.toml"], "docs/recipes.md and schemas/recipe.schema.json list the keys"),
    ];
    let before = names(here);
    for (arguments, want) in cases {
        let output = interlace(here, arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(want), "{arguments:?}: {message}");
        assert_eq!(message.matches("error:").count(), 1, "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        assert_eq!(names(here), before, "{arguments:?} left files behind");
    }
    assert_eq!(fs::read(here.join("taken/file")).expect("file"), b"mine");
}

#[test]
fn a_missing_folder_of_an_output_file_is_refused_before_any_work() {
    let folder = tempfile::tempdir().expect("folder");
    // The model and the data do not exist either, so a verb that reads them first gives another message.
    let to = ["-o", "nodir/x.json"];
    for verb in [
        &["score", "no-model", "--data", "no-data"][..],
        &["plan", "no-model", "--drop-count", "1"],
        &["eval", "no-model", "--data", "no-data.tsv"],
        &["bench", "no-model"],
        &["generate", "no-model", "--data", "no-data"],
    ] {
        let output = interlace(folder.path(), &[verb, &to].concat());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{verb:?}: {message}");
        assert!(message.contains("folder `nodir`: does not exist; create it first"), "{verb:?}: {message}");
    }
    let predictions = ["eval", "no-model", "--data", "no.tsv", "-o", "x.json", "--predictions", "nodir/p.tsv"];
    let message = stderr(&interlace(folder.path(), &predictions));
    assert!(message.contains("folder `nodir`: does not exist"), "{message}");
}

/// Every verb would refuse the model afterwards.
#[test]
fn an_output_folder_inside_the_model_folder_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = model_copy(here);
    std::os::unix::fs::symlink("model", here.join("link")).expect("link");
    let data = fixture("data/finetune-small.parquet");
    let before = names(&model);
    let outputs = ["model/out", "model/onnx/out", "link/out", "none/../model/out", "model/new/out", "model/../link/x"];
    for out in outputs {
        for verb in [
            &["prune", "model", "--drop", "2"][..],
            &["export", "model", "--to", "triton"],
            &["finetune", "model", "--layers", "2", "--recipe", "paper", "--data", &data, "--samples", "2"],
        ] {
            let output = interlace(here, &[verb, &["-o", out]].concat());
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{verb:?} {out}: {message}");
            let want = format!("output `{out}`: lies inside the model folder `model`; name a folder outside of it");
            assert!(message.contains(&want), "{verb:?}: {message}");
            assert_eq!(names(&model), before, "{verb:?} {out}");
        }
    }
    // The teacher's folder counts too, and so does the folder of checkpoints.
    let dense = fixture("model");
    let finetune = ["finetune", &dense, "--layers", "2", "--recipe", "paper", "--data", &data, "--samples", "2"];
    for rest in
        [&["--teacher", "model", "-o", "model/out"][..], &["--teacher", "model", "--work", "model/w", "-o", "x"]]
    {
        let message = stderr(&interlace(here, &[&finetune[..], rest].concat()));
        assert!(message.contains("lies inside the model folder `model`"), "{rest:?}: {message}");
        assert_eq!(names(&model), before, "{rest:?}");
    }
    // Other files beside a single graph do not matter.
    let single = ["prune", "model/onnx/decoder_model_merged.onnx", "--drop", "1", "-o", "model/onnx/out", "--json"];
    json(&interlace(here, &single));
}

#[test]
fn a_run_writes_nothing_outside_its_output() {
    let folder = tempfile::tempdir().expect("folder");
    let (home, temporary) = (folder.path().join("home"), folder.path().join("temporary"));
    fs::create_dir(&home).expect("folder");
    fs::create_dir(&temporary).expect("folder");
    let data = fixture("data/finetune-small.parquet");
    let output = Command::new(env!("CARGO_BIN_EXE_interlace"))
        .args(["score", &fixture("model"), "--data", &data, "--samples", "2", "-o", "scores.json"])
        .current_dir(folder.path())
        .env("HOME", &home)
        .env("XDG_CACHE_HOME", home.join("cache"))
        .env("TMPDIR", &temporary)
        .env_remove("ORT_DISABLE_TELEMETRY")
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(names(folder.path()), ["home", "scores.json", "temporary"]);
    assert!(names(&home).is_empty() && names(&temporary).is_empty(), "{:?} {:?}", names(&home), names(&temporary));
}

#[test]
fn missing_cuda_is_an_error_without_fallback_to_the_cpu() {
    let data = fixture("data/finetune-small.parquet");
    let model = fixture("model");
    // No machine has a device of the last index. The first one exists on machines with a GPU.
    for (device, name) in [("cuda:4294967295", "cuda:4294967295"), ("cuda", "cuda:0")] {
        let folder = tempfile::tempdir().expect("folder");
        let arguments = ["score", &model, "--data", &data, "--samples", "2", "--device", device, "-o", "scores.json"];
        let output = interlace(folder.path(), &arguments);
        let message = stderr(&output);
        if output.status.success() {
            assert!(
                device == "cuda" && Path::new("/dev/nvidiactl").exists(),
                "{device} fell back to the CPU: {message}"
            );
            assert_eq!(names(folder.path()), ["scores.json"], "{device}");
            continue;
        }
        assert_eq!(output.status.code(), Some(2), "{device}: {message}");
        assert!(message.contains(&format!("device `{name}`")), "{device}: {message}");
        assert!(names(folder.path()).is_empty(), "{device} left files behind");
    }
}

/// Makes the decoder's head read only the last position, as some exporters do for generation.
fn with_last_token_head(model: &Path) {
    use interlace::analysis::{analyse, head_input};
    use interlace::ir::{AttributeKind, Node, Tensor, Value};
    let path = model.join("onnx/decoder_model_merged.onnx");
    let mut decoder = interlace::onnx::load(&path).expect("decoder");
    let result = analyse(&decoder).expect("layers").map.result;
    let graph = &mut decoder.graph;
    let all = head_input(graph, result);
    let [place, axes, one, last] = ["place", "axes", "one", "last"]
        .map(|name| graph.add_value(Value { name: format!("test.{name}"), ..Value::default() }));
    for node in &mut graph.body.nodes {
        node.inputs.iter_mut().filter(|id| **id == Some(all)).for_each(|id| *id = Some(last));
    }
    graph.body.initializers.push((place, Tensor::from_i64(&[], &[-1])));
    graph.body.initializers.push((axes, Tensor::from_i64(&[1], &[1])));
    let node = |op: &str, inputs: [_; 2], output| Node {
        op_type: op.into(),
        name: op.into(),
        inputs: inputs.map(Some).to_vec(),
        outputs: vec![Some(output)],
        ..Node::default()
    };
    let mut gather = node("Gather", [all, place], one);
    gather.attributes.push(("axis".into(), AttributeKind::Int(1).into()));
    let at = graph.body.nodes.iter().position(|node| node.inputs.contains(&Some(last))).expect("head");
    graph.body.nodes.splice(at..at, [gather, node("Unsqueeze", [one, axes], last)]);
    let target = model.join("new.onnx");
    interlace::onnx::save(&decoder, &target, &interlace::onnx::Storage::Inline).expect("save");
    fs::remove_file(model.join("onnx/decoder_model_merged.onnx_data")).expect("remove");
    fs::rename(target, path).expect("rename");
}

#[test]
fn the_requirements_of_a_verb_are_checked_before_it_starts() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model_copy(folder.path());
    with_last_token_head(&model);
    let text = "One two three four five six seven eight nine ten. ".repeat(40);
    fs::write(folder.path().join("text.jsonl"), format!("{}\n", serde_json::json!({ "text": text }))).expect("text");
    let model = model.display().to_string();
    let data = fixture("data/finetune-small.parquet");
    let sleb = ["plan", &model, "--strategy", "sleb", "--drop-count", "1", "--data", &data, "-o", "plan.json"];
    let own = ["plan", &model, "--strategy", "interlace-loss", "--drop-count", "1", "--data", &data, "-o", "plan.json"];
    let text = ["eval", &model, "--data", "text.jsonl", "--sequence-length", "16", "-o", "report.json"];
    for arguments in [&sleb[..], &own, &text] {
        let output = interlace(folder.path(), arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        for part in
            ["decoder_model_merged.onnx", "`Gather` (Gather) picks positions out", "the logits of every position"]
        {
            assert!(message.contains(part), "{arguments:?}: {message}");
        }
        assert!(!message.contains("ONNX Runtime failed"), "{arguments:?}: {message}");
    }
    // `score` reads only the residual stream.
    json(&interlace(folder.path(), &["score", &model, "--data", &data, "--samples", "2", "-o", "s.json", "--json"]));
}

/// A killed run leaves its staging folder. The next run in that folder removes it and nothing else.
#[test]
fn leftovers_of_a_killed_run_are_removed_by_the_next_run() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let arguments = ["prune", &model, "--drop", "2", "-o", "out"];
    let hidden = || names(here).into_iter().filter(|name| name.starts_with(".interlace-")).collect::<Vec<_>>();
    let mut left = Vec::new();
    for _ in 0..20 {
        let mut run = Command::new(env!("CARGO_BIN_EXE_interlace"))
            .args(arguments)
            .current_dir(here)
            .spawn()
            .expect("the binary starts");
        while hidden().is_empty() && run.try_wait().expect("wait").is_none() {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        // SIGKILL
        run.kill().expect("kill");
        run.wait().expect("wait");
        left = hidden();
        if !left.is_empty() {
            break;
        }
        let _ = fs::remove_dir_all(here.join("out"));
    }
    assert_eq!(left.len(), 1, "no run was killed before it ended");
    fs::create_dir(here.join(".interlace-mine")).expect("folder");
    let output = interlace(here, &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(names(here), [".interlace-mine", "out"]);
    let message = stderr(&output);
    assert!(message.contains("runs that were killed left") && message.contains(&left[0]), "{message}");
}
