//! Layers chosen after a fit, and linear maps that make up for dropped layers.

use std::fs;
use std::path::Path;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{Amount, DataOptions, Dataset, Subset, Turns};
use interlace::method::LossMeter;

use super::cli::{fixture, interlace, stderr};

const DATA: [&str; 4] = ["--turns", "separate", "--samples", "4"];

fn read(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("artifact")).expect("JSON")
}

/// The loss on the first samples of the draw, of a model as it is.
fn loss(model: &Path, data: &str) -> f64 {
    let bundle = Bundle::open(model).expect("a model");
    let options = DataOptions { turns: Turns::Separate, ..DataOptions::default() };
    let dataset = Dataset::open_for(Path::new(data), &bundle, &options).expect("data");
    let subset = Subset { amount: Amount::Samples(4), seed: 42 };
    let mut meter = LossMeter::new(&bundle, &dataset, subset, Device::Cpu, &Cancel::default()).expect("a meter");
    meter.loss(&[]).expect("a loss")
}

/// The plan's last loss and the report's loss are those of the written model, measured without maps.
#[test]
fn a_compensated_model_has_the_loss_that_was_measured() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let run = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        output
    };
    // Prunes, compensates, and returns the report after comparing it with the written model.
    let prune = |how: &[&str], pruned: &str| {
        let prune = ["prune", &model, "--compensate", "linear", "--data", &data, "-o", pruned, "--json"];
        let output = run(&[&prune[..], &DATA, how].concat());
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let own = report["compensation"].clone();
        let (before, after) =
            (own["loss_before"].as_f64().expect("a loss"), own["loss_after"].as_f64().expect("a loss"));
        let found = loss(&here.join(pruned), &data);
        assert!((found - after).abs() < 1e-4 * after.max(1.0), "{found}, reported {after}");
        // A map is kept only where it lowers the loss.
        let kept = own["layers"].as_array().expect("layers").len();
        assert!(if kept > 0 { after < before } else { after == before }, "{own}");
        let record = read(&here.join(pruned).join("interlace.json"));
        let step = &record["history"][0];
        assert_eq!(
            (step["compensated"].as_array().map_or(0, Vec::len), step["compensated"].is_array()),
            (kept, kept > 0)
        );
        assert_eq!(record["settings"]["compensation"], own);
        assert!(record["inputs"]["data"].is_string(), "{record}");
        (kept, after)
    };
    for (strategy, count) in [("interlace-heal", "1"), ("sleb-heal", "3")] {
        let file = format!("{strategy}.json");
        let plan = ["plan", &model, "--strategy", strategy, "--drop-count", count, "--data", &data, "-o", &file];
        let said = stderr(&run(&[&plan[..], &DATA].concat()));
        assert!(said.contains("forward passes in all") && said.contains("after a fit on"), "{said}");
        let plan = read(&here.join(&file));
        let groups = plan["groups"].as_array().expect("groups");
        let measured: Vec<f64> = groups.iter().map(|group| group["score"].as_f64().expect("a loss")).collect();
        let (_, after) = prune(&["--plan", &file], &format!("pruned-{strategy}"));
        // With one layer gone the plan's map is the only one, so the plan names the same loss.
        if count == "1" {
            assert!((measured[0] - after).abs() < 1e-4 * after.max(1.0), "{measured:?}, {after}");
        }
    }
    let (kept, _) = prune(&["--drop", "1,5,9,13"], "pruned");
    assert!(kept > 0, "no map lowers the loss");
}

#[test]
fn compensation_is_refused_where_nothing_can_take_it() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let prune = ["prune", &model, "-o", "out", "--compensate", "linear"];
    for (more, want) in [
        (&["--drop", "0,5", "--data", &data][..], "layer 0"),
        (&["--drop", "99", "--data", &data], "99"),
        (&["--drop", "5"], "--data"),
        (&["--drop", "5", "--data", "missing.parquet"], "missing.parquet"),
    ] {
        let output = interlace(here, &[&prune[..], more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(want), "{more:?}: {}", stderr(&output));
        assert!(!here.join("out").exists());
    }
}

/// Rows of one kind are often neighbours in a file: a fit on fewer tokens than there are reads a draw of them, and not the
/// first rows.
#[test]
fn a_fit_on_some_tokens_does_not_depend_on_the_order_of_the_rows() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    let mut rows: Vec<String> = (0..60)
        .map(|number| {
            let (question, answer) = if number < 30 { ("How many circles", "one") } else { ("Which colour", "red") };
            serde_json::json!({
                "id": format!("row-{number}"),
                "messages": [
                    {"role": "user", "content": format!("{question} are in picture {number}?")},
                    {"role": "assistant", "content": answer},
                ],
            })
            .to_string()
        })
        .collect();
    let fit = |name: &str, rows: &[String]| {
        fs::write(here.join(name), rows.join("\n")).expect("rows");
        let prune = ["prune", &model, "--drop", "1,5,9,13", "--compensate", "linear", "--samples", "8"];
        let how = ["--fit-tokens", "300", "--data", name, "-o", &format!("{name}.pruned"), "--json"];
        let output = interlace(here, &[&prune[..], &how].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        report["compensation"].clone()
    };
    let forward = fit("forward.jsonl", &rows);
    rows.reverse();
    let backward = fit("backward.jsonl", &rows);
    assert!(!forward["layers"].as_array().expect("layers").is_empty(), "no map lowers the loss: {forward}");
    assert_eq!((&forward["layers"], &forward["fit_tokens"]), (&backward["layers"], &backward["fit_tokens"]));
    let losses =
        |report: &serde_json::Value| ["loss_before", "loss_after"].map(|name| report[name].as_f64().expect("a loss"));
    let (forward, backward) = (losses(&forward), losses(&backward));
    for (a, b) in forward.iter().zip(&backward) {
        assert!((a - b).abs() <= 1e-4 * a.abs(), "{forward:?}, {backward:?}");
    }
}
