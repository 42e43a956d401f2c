//! A recipe from beginning to end, and again: what is done is kept.

use std::fs;
use std::path::Path;

use super::cli::{fixture, interlace, stderr, stdout};

fn recipe(learning_rate: &str) -> String {
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    format!(
        r#"
        model = "{model}"
        output = "out"
        calibration = {{ data = "{data}", samples = 3, turns = "separate" }}
        plan = {{ drop_count = 2, strategies = ["interlace", "angular"] }}
        bench = {{ enabled = false }}
        export = {{ targets = ["triton"] }}
        [finetune]
        data = "{data}"
        samples = 8
        turns = "separate"
        settings = {{ optimizer = {{ learning_rate = {learning_rate} }}, batch = {{ size = 4, accumulation_steps = 1 }} }}
        [eval]
        benchmarks = ["{bench}"]
        settings = {{ limit = 6 }}
        "#
    )
}

fn read(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("artifact")).expect("JSON")
}

#[test]
fn a_recipe_runs_once_and_then_only_what_changed() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("recipe.toml"), recipe("1e-3")).expect("recipe");
    let output = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for row in ["dense", "interlace, dropped", "interlace, finetuned", "angular, dropped", "angular, finetuned"] {
        assert!(text.contains(row), "{text}");
    }
    let out = here.join("out");
    assert_eq!(read(&out.join("plan-interlace.json"))["drop"].as_array().map(Vec::len), Some(2));
    let history = read(&out.join("healed-interlace/interlace.json"))["history"].clone();
    assert_eq!(history[0]["step"], "prune");
    assert_eq!(history[1]["step"], "finetune");
    let manifest = read(&out.join("manifest.json"));
    assert!(manifest["files"]["healed-interlace/onnx/decoder_model_merged.onnx_data"].is_string());
    let state = fs::read(out.join("state.json")).expect("state");

    let again = interlace(here, &["run", "recipe.toml"]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert_eq!(stdout(&again), text);
    assert!(
        stderr(&again).lines().filter(|line| line.contains(" s")).all(|line| !line.starts_with("healed")),
        "{}",
        stderr(&again)
    );
    assert_eq!(fs::read(out.join("state.json")).expect("state"), state);

    fs::write(here.join("recipe.toml"), recipe("2e-3")).expect("recipe");
    let third = stderr(&interlace(here, &["run", "recipe.toml"]));
    assert!(third.contains("score: kept from before") && third.contains("pruned-angular: kept from before"), "{third}");
    assert!(!third.contains("healed-interlace: kept from before"), "{third}");
    assert!(third.contains("eval-bench-small-dense: kept from before"), "{third}");
}

fn sweep_file(recipes: &str) -> String {
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    format!(
        r#"
        model = "{model}"
        output = "out"
        drop_ratios = [0.07, 0.13]
        strategies = ["consecutive", "interlace-tn"]
        seeds = [1, 2]
        calibration = {{ data = "{data}", samples = 3, turns = "separate" }}
        [finetune]
        data = "{data}"
        samples = 4
        turns = "separate"
        recipes = [{recipes}]
        settings = {{ optimizer = {{ learning_rate = 1e-3 }}, batch = {{ size = 4, accumulation_steps = 1 }} }}
        [eval]
        benchmarks = ["{bench}"]
        settings = {{ limit = 6 }}
        "#
    )
}

#[test]
fn a_sweep_does_equal_steps_once_and_goes_on_where_it_was() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("sweep.toml"), sweep_file("\"paper\"")).expect("sweep");
    let output = interlace(here, &["sweep", "sweep.toml", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let said = stderr(&output);
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let out = here.join("out");
    assert_eq!(table, read(&out.join("sweep.json")));
    let rows = table["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        let values = row["kept"]["values"].as_array().expect("values");
        assert_eq!(values.len(), 2);
        let mean = values.iter().filter_map(serde_json::Value::as_f64).sum::<f64>() / 2.0;
        assert!((row["kept"]["mean"].as_f64().expect("mean") - mean).abs() < 1e-12);
    }
    assert!(said.contains("cell 8 of 8"), "{said}");
    // One layer of 16 goes: both strategies drop the same and finetune the next, so they share a pruned model and one
    // healed model per seed. Two go: a block or two single ones. Of healed models the answers stay.
    let made = || -> Vec<String> {
        fs::read_dir(&out).expect("out").filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    };
    let count = |start: &str| made().iter().filter(|name| name.starts_with(start)).count();
    assert_eq!(rows[0]["dropped"], rows[1]["dropped"]);
    assert_ne!(rows[2]["dropped"], rows[3]["dropped"]);
    let counts = || (count("pruned-"), count("healed-"), count("eval-bench-small-healed-"));
    assert_eq!(counts(), (3, 0, 6), "{:?}", made());

    let again = interlace(here, &["sweep", "sweep.toml", "--json"]);
    assert_eq!(again.stdout, output.stdout);
    assert!(!stderr(&again).lines().any(|line| line.ends_with(" s")), "{}", stderr(&again));

    // A recipe more: what was done stays done.
    fs::write(here.join("sweep.toml"), sweep_file("\"paper\", \"fast\"")).expect("sweep");
    let more = interlace(here, &["sweep", "sweep.toml"]);
    assert_eq!(more.status.code(), Some(0), "{}", stderr(&more));
    assert!(stderr(&more).contains("cell 16 of 16"), "{}", stderr(&more));
    let done = stderr(&more).lines().filter(|line| line.starts_with("healed-") && line.ends_with(" s")).count();
    assert_eq!((done, counts()), (6, (3, 0, 12)), "{}", stderr(&more));
    assert!(stdout(&more).contains("Pareto"), "{}", stdout(&more));
    assert!(fs::read_to_string(out.join("sweep.md")).expect("table").contains("| fast |"));

    // The models are wanted: they are healed again, to the same.
    let steps = || read(&out.join("state.json"))["steps"].as_object().expect("steps").clone();
    let before = steps();
    fs::write(here.join("sweep.toml"), format!("keep_models = true\n{}", sweep_file("\"paper\""))).expect("sweep");
    let kept = interlace(here, &["sweep", "sweep.toml"]);
    assert_eq!(kept.status.code(), Some(0), "{}", stderr(&kept));
    assert_eq!(counts(), (3, 6, 12), "{:?}", made());
    for (name, step) in steps() {
        assert_eq!(step["digest"], before[&name]["digest"], "{name}");
    }
}
