//! A model is tuned to a target, and planned again for another one from what was measured.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use super::cli::{fixture, interlace, stderr, stdout};

fn read(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("artifact")).expect("JSON")
}

/// Runs `tune` on the shipped model with a few samples. `more` are the other arguments.
fn tune(folder: &Path, model: &str, more: &[&str]) -> Output {
    interlace(folder, &arguments(model, more))
}

fn arguments<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    const SHORT: [&str; 10] =
        ["--turns", "separate", "--samples", "6", "--rounds", "2", "--new-tokens", "2", "--candidates", "1"];
    ["tune", model].iter().chain(&SHORT).chain(more).copied().collect()
}

/// Plans again in a process that cannot load ONNX Runtime.
fn replan(folder: &Path, model: &str, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_interlace"))
        .args(arguments(model, more))
        .current_dir(folder)
        .env("ORT_DYLIB_PATH", "/no/such/library.so")
        .output()
        .expect("the binary starts")
}

/// Choices of image tokens in a report, and the page about its folder.
fn image_tokens_and_page(here: &Path, report: &serde_json::Value) {
    // Parts of the 16 image tokens are choices beside picture budgets.
    let kept: Vec<(Option<f64>, Option<u64>)> = report["costs"]["budgets"]
        .as_array()
        .expect("budgets")
        .iter()
        .map(|own| (own["keep_image_tokens"].as_f64(), own["image_tokens"].as_u64()))
        .collect();
    assert_eq!(kept, [(None, Some(16)), (Some(0.75), Some(12)), (Some(0.5), Some(8)), (Some(0.25), Some(4))]);
    let quarters = report["quarters"].as_array().expect("quarters");
    assert!(quarters.iter().any(|named| named["name"] == "25% of the image tokens"), "{quarters:?}");
    // The page about the work folder is that about the model which it belongs to.
    for named in ["out.work", "out"] {
        let output = interlace(here, &["report", named, "-o", "page.html"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let page = fs::read_to_string(here.join("page.html")).expect("the page");
        for part in
            ["Kept likelihood and time to the first token", "measured, on held-back samples", "25% of the decoder"]
        {
            assert!(page.contains(part), "{part}");
        }
        assert!(page.matches("<polyline").count() >= 2 && page.contains("class=\"ring\""));
    }
}

/// A target that the model meets as it is, and files of a work folder that are damaged or in use.
fn unchanged_and_damaged(here: &Path, model: &str, data: [&str; 2]) {
    let with = |more: &[&'static str]| data.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();
    let met = replan(here, model, &with(&["--size", "1GB", "--work", "out.work", "-o", "same"]));
    assert_eq!(met.status.code(), Some(0), "{}", stderr(&met));
    assert!(stdout(&met).contains("the model meets the target as it is"), "{}", stdout(&met));
    let weights = "onnx/decoder_model_merged.onnx_data";
    assert_eq!(
        fs::read(here.join("same").join(weights)).expect("weights"),
        fs::read(Path::new(model).join(weights)).expect("weights")
    );

    let small = with(&["--size", "12MB", "--work", "out.work", "--replan"]);
    // Another process works in the folder.
    let lock = fs::File::options().write(true).open(here.join("out.work/run.lock")).expect("the lock's file");
    lock.lock().expect("a lock");
    let busy = replan(here, model, &small);
    assert_eq!(busy.status.code(), Some(2));
    let message = stderr(&busy);
    assert!(message.contains("process ") && message.contains("works in it; wait until it ends"), "{message}");
    drop(lock);
    assert_eq!(replan(here, model, &small).status.code(), Some(0));

    // Measurements that are cut off are not there.
    let path = here.join("out.work/quality.json");
    let whole = fs::read(&path).expect("measurements");
    fs::write(&path, &whole[..whole.len() / 2]).expect("writes");
    let cut = replan(here, model, &small);
    assert_eq!(cut.status.code(), Some(2));
    assert!(stderr(&cut).contains("holds no measurements") && !here.join("no").exists(), "{}", stderr(&cut));
    // Measurements that no run recorded are in the way, which is found before anything is measured.
    let state = here.join("out.work/state.json");
    let mut record = read(&state);
    record["steps"].as_object_mut().expect("steps").remove("quality");
    fs::write(&state, record.to_string()).expect("writes");
    let orphan = replan(here, model, &with(&["--size", "12MB", "--work", "out.work", "-o", "no"]));
    assert_eq!(orphan.status.code(), Some(2));
    let message = stderr(&orphan);
    assert!(message.contains("quality.json`: exists, and no finished step made it; remove it"), "{message}");
    // A device is refused, not read.
    fs::remove_file(here.join("out.work/tune.json")).expect("removes");
    std::os::unix::fs::symlink("/dev/zero", here.join("out.work/tune.json")).expect("a link");
    let endless = interlace(here, &["report", "out.work", "-o", "page.html"]);
    assert_eq!(endless.status.code(), Some(2));
    assert!(stderr(&endless).contains("tune.json`: is not a plain file"), "{}", stderr(&endless));
}

#[test]
fn a_model_is_tuned_to_a_size_and_planned_again_without_a_session() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let data = ["--data", &data];
    let with = |more: &[&'static str]| data.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();

    let output = tune(here, &model, &with(&["--size", "14MB", "-o", "out"]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for part in ["one decoder layer", "one tower layer", "best: without decoder layer", "25% of the decoder", "chosen"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(stderr(&output).contains("picture budgets are not searched"), "{}", stderr(&output));
    let report = read(&here.join("out.work/tune.json"));
    let chosen = &report["candidates"][report["chosen"].as_u64().expect("a chosen one") as usize];
    let (measured, predicted) = (
        chosen["measured"]["size_bytes"].as_f64().unwrap(),
        chosen["plan"]["predicted"]["size_bytes"].as_f64().unwrap(),
    );
    assert!(measured <= 14e6 && (measured / predicted - 1.0).abs() < 0.02, "{measured} {predicted}");
    // The folder is the measured candidate: its history holds the plan.
    let history = read(&here.join("out/interlace.json"))["history"].clone();
    assert_eq!(history[0]["dropped"], chosen["plan"]["decoder"]);
    assert_eq!(
        read(&here.join("out/config.json"))["text_config"]["num_hidden_layers"],
        16 - chosen["plan"]["decoder"].as_array().expect("a list").len()
    );
    // The loss of the written model is the one that the graph with switches gave for the same combination.
    let (written, switched) = (chosen["held_back_loss"].as_f64().unwrap(), report["best"]["held_back_loss"].as_f64());
    if chosen["plan"]["decoder"] == report["best"]["decoder"] && chosen["plan"]["tower"] == report["best"]["tower"] {
        assert!((written - switched.expect("a loss")).abs() < 1e-3, "{written} {switched:?}");
    }
    let svg = fs::read_to_string(here.join("out.work/tune.svg")).expect("the front");
    assert!(svg.starts_with("<svg") && svg.contains("<polyline") && svg.contains("<circle"), "{svg}");

    image_tokens_and_page(here, &report);

    let output = replan(here, &model, &with(&["--size", "12MB", "--work", "out.work", "--replan", "--json"]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(again["best"]["predicted"]["size_bytes"].as_f64().expect("bytes") <= 12e6);
    assert_eq!(
        (again["costs"].clone(), again["candidates"].as_array().map(Vec::len)),
        (report["costs"].clone(), Some(0))
    );

    let refused = |more: &[&'static str], want: &[&str]| {
        let output = replan(here, &model, &with(more));
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", stdout(&output));
        let message = stderr(&output);
        assert!(want.iter().all(|part| message.contains(part)), "{more:?}: {message}");
        assert!(!here.join("no").exists());
    };
    let work = ["--work", "out.work"];
    let kept = |more: [&'static str; 3]| work.iter().copied().chain(more).collect::<Vec<_>>();
    refused(
        &kept(["--size", "1MB", "--replan"]),
        &[
            "one decoder layer",
            "target of a size of 1",
            "cannot be reached: the smallest plan reaches",
            "decoder layers",
        ],
    );
    refused(
        &kept(["--ttft", "0.001ms", "--replan"]),
        &["cannot be reached: the fastest plan reaches", "ms to the first token (without", "if the machine was busy"],
    );
    refused(&["--work", "out.work", "--size", "1MB", "-o", "no"], &["cannot be reached"]);
    refused(
        &["--work", "elsewhere", "--size", "12MB", "--replan"],
        &["holds no measurements", "leave `--replan` out once"],
    );
    refused(&["--work", "out.work", "--size", "12MB", "--replan", "--seed", "7"], &["holds no measurements"]);
    refused(&["--size", "14MB", "-o", "out"], &["output `out`", "exists"]);
    unchanged_and_damaged(here, &model, data);

    // Measurements of another model are refused: this one lacks layers.
    let other = replan(here, "out", &with(&["--size", "1MB", "--work", "out.work", "--replan"]));
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("holds measurements of another model"), "{}", stderr(&other));
}

#[test]
fn targets_without_a_known_unit_are_usage_errors() {
    let folder = tempfile::tempdir().expect("folder");
    for (more, want) in [
        (&["--ttft", "800"][..], "ms or s behind it, as in 800ms or 1.2s"),
        (&["--ttft", "1e308s"], "must be a number above 0"),
        (&["--size", "300"], "as in 300MB or 1.5GiB"),
        (&["--tokens-per-s", "25/s"], "as in 25"),
        (&["--strategy", "explicit", "--ttft", "1s"], "must be one of interlace"),
        (&[], "--ttft <TIME>"),
        (&["--ttft", "1s", "--recipe", "best"], "--train"),
    ] {
        let all: Vec<&str> = ["tune", "model", "--data", "d", "-o", "out"].iter().chain(more).copied().collect();
        let output = interlace(folder.path(), &all);
        assert_eq!(output.status.code(), Some(2), "{more:?}");
        assert!(stderr(&output).contains(want), "{more:?}: {}", stderr(&output));
    }
    let output = interlace(folder.path(), &["tune", "model", "--data", "d", "--ttft", "1s"]);
    let message = stderr(&output);
    assert!(message.contains("--output <OUT>") && !message.contains("--work <FOLDER>\n"), "{message}");
}
