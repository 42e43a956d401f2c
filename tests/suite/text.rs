//! Text-only decoders: perplexity against PyTorch, and every verb on running text.

use std::fs;

use super::cli::{fixture, interlace, stderr};

const MODEL: &str = "zoo/optimum/llama-with-past";
const TEXT: &str = "zoo/text/text.jsonl";

fn done(folder: &std::path::Path, arguments: &[&str]) {
    let output = interlace(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
}

fn json(path: &std::path::Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("file")).expect("JSON")
}

#[test]
fn perplexity_is_that_of_transformers() {
    let folder = tempfile::tempdir().expect("folder");
    let reference = json(fixture("zoo/text/perplexity.json").as_ref());
    let length = reference["sequence_length"].to_string();
    for (number, row) in reference["rows"].as_array().expect("rows").iter().enumerate() {
        let drop: Vec<String> = row["drop"].as_array().expect("layers").iter().map(ToString::to_string).collect();
        let pruned = format!("pruned-{number}");
        let model = if drop.is_empty() {
            fixture(MODEL)
        } else {
            done(folder.path(), &["prune", &fixture(MODEL), "--drop", &drop.join(","), "-o", &pruned]);
            pruned
        };
        let report = format!("report-{number}.json");
        done(folder.path(), &["eval", &model, "--data", &fixture(TEXT), "--sequence-length", &length, "-o", &report]);
        let found = json(&folder.path().join(report));
        let (found, want) = (&found["model"], row);
        assert_eq!(found["predicted_tokens"], want["predicted_tokens"]);
        let (found, want) =
            (found["perplexity"].as_f64().expect("number"), want["perplexity"].as_f64().expect("number"));
        assert!((found / want - 1.0).abs() < 1e-4, "{drop:?}: {found} against {want}");
    }
}

#[test]
fn a_text_decoder_is_scored_pruned_healed_and_compared() {
    let folder = tempfile::tempdir().expect("folder");
    let (model, text) = (fixture(MODEL), fixture(TEXT));
    let cut = ["--data", text.as_str(), "--sequence-length", "32"];
    let run = |arguments: &[&str]| done(folder.path(), arguments);
    run(&[&["score", &model, "-o", "scores.json", "--fraction", "1"][..], &cut].concat());
    let plan = ["plan", &model, "--scores", "scores.json", "--drop-count", "2", "-o"];
    run(&[&plan[..], &["plan.json"]].concat());
    run(&[&plan[..], &["sleb.json", "--strategy", "sleb", "--samples", "2"], &cut].concat());
    run(&["prune", &model, "--plan", "plan.json", "-o", "pruned"]);
    fs::write(
        folder.path().join("settings.toml"),
        "learning_rate = 3e-3\nbatch_size = 2\naccumulation_steps = 1\nepochs = 3\n\
         losses = { ce = 1.0, kd = 1.0, anchor = 1.0 }\n",
    )
    .expect("settings");
    let finetune = ["finetune", "pruned", "--plan", "plan.json", "--settings", "settings.toml", "--teacher", &model];
    run(&[&finetune[..], &["-o", "healed"], &cut].concat());
    run(&[&["eval", "healed", "--baseline", &model, "-o", "report.json"][..], &cut].concat());
    let lines = fs::read_to_string(folder.path().join("healed.work/metrics.jsonl")).expect("metrics");
    let losses: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let loss =
        |name: &str| -> Vec<f64> { losses.iter().map(|line| line["losses"][name].as_f64().expect("loss")).collect() };
    for name in ["ce", "kd", "anchor"] {
        let values = loss(name);
        assert!(values.last() < values.first(), "{name}: {values:?}");
    }
    // Every token but the first of each sequence of 32 is trained on.
    assert!(losses.iter().all(|line| line["answer_tokens"].as_u64().is_some_and(|count| count <= 62)));
    let report = json(&folder.path().join("report.json"));
    let kept = report["retention"]["ratio"].as_f64().expect("ratio");
    let ratio = report["baseline"]["perplexity"].as_f64().expect("number")
        / report["model"]["perplexity"].as_f64().expect("number");
    assert!((kept / ratio - 1.0).abs() < 1e-12, "{kept} against {ratio}");
    // Trained on this very text, the healed model predicts it better than the dense one.
    let gate = |model: &str, baseline: &str| {
        let eval = ["eval", model, "--baseline", baseline, "-o", "gate.json", "--min-retention", "1"];
        interlace(folder.path(), &[&eval[..], &cut].concat()).status.code()
    };
    assert!(kept > 1.0, "{kept}");
    assert_eq!((gate("healed", &model), gate(&model, "healed")), (Some(0), Some(1)));
}
