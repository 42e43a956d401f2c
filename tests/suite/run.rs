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
        calibration = {{ data = "{data}", samples = 3 }}
        plan = {{ drop_count = 2, strategies = ["interlace", "angular"] }}
        bench = {{ enabled = false }}
        export = {{ triton = true }}
        [finetune]
        data = "{data}"
        samples = 8
        settings = {{ learning_rate = {learning_rate}, batch_size = 4, accumulation_steps = 1 }}
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
