//! Text-only decoders: perplexity compared with PyTorch, and every verb on running text.

use std::fs;
use std::path::Path;

use super::cli::{fixture, interlace, stderr};

const MODEL: &str = "zoo/optimum/llama-with-past";
const TEXT: &str = "zoo/text/text.jsonl";

fn done(folder: &Path, arguments: &[&str]) {
    let output = interlace(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("file")).expect("JSON")
}

#[test]
fn perplexity_equals_transformers() {
    let folder = tempfile::tempdir().expect("folder");
    let reference = json(fixture("zoo/text/perplexity.json").as_ref());
    let length = reference["sequence_length"].to_string();
    let rows = reference["rows"].as_array().expect("rows");
    assert!(!rows.is_empty());
    for (number, row) in rows.iter().enumerate() {
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

/// A folder of an exporter whose graph takes token ids.
fn model_folder(folder: &Path) -> String {
    let model = folder.join("model");
    fs::create_dir_all(model.join("onnx")).expect("folder");
    for (source, name) in [("dyn18-ids.onnx", "model.onnx"), ("weights.data", "weights.data")] {
        fs::copy(fixture(&format!("zoo/llama/{source}")), model.join("onnx").join(name)).expect("graph");
    }
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture(&format!("{MODEL}/{file}")), model.join(file)).expect(file);
    }
    model.display().to_string()
}

#[test]
fn a_text_decoder_is_scored_pruned_healed_and_compared() {
    let folder = tempfile::tempdir().expect("folder");
    every_verb(folder.path(), model_folder(folder.path()));
}

#[test]
fn an_optimum_folder_is_scored_pruned_healed_and_compared() {
    let folder = tempfile::tempdir().expect("folder");
    every_verb(folder.path(), fixture(MODEL));
}

fn every_verb(folder: &Path, model: String) {
    let text = fixture(TEXT);
    let cut = ["--data", text.as_str(), "--sequence-length", "32"];
    let run = |arguments: &[&str]| done(folder, arguments);
    run(&[&["score", &model, "-o", "scores.json", "--fraction", "1"][..], &cut].concat());
    let plan = ["plan", &model, "--scores", "scores.json", "--drop-count", "2", "-o"];
    run(&[&plan[..], &["plan.json"]].concat());
    run(&[&plan[..], &["sleb.json", "--strategy", "sleb", "--samples", "2"], &cut].concat());
    run(&["prune", &model, "--plan", "plan.json", "-o", "pruned"]);
    let heal = |losses: &[&str], out: &str| {
        let weights: Vec<String> = losses.iter().map(|name| format!("{name} = 1.0")).collect();
        let settings = format!(
            "optimizer = {{ learning_rate = 3e-3 }}\nbatch = {{ size = 2, accumulation_steps = 1 }}\nschedule = {{ epochs = 3 }}\n\
             [[stage]]\nlosses = {{ {} }}\n",
            weights.join(", ")
        );
        let file = format!("{out}.toml");
        fs::write(folder.join(&file), settings).expect("settings");
        let finetune = [
            "finetune",
            "pruned",
            "--plan",
            "plan.json",
            "--recipe",
            "paper",
            "--settings",
            &file,
            "--teacher",
            &model,
        ];
        run(&[&finetune[..], &["-o", out], &cut].concat());
        let lines = fs::read_to_string(folder.join(format!("{out}.work/metrics.jsonl"))).expect("metrics");
        let steps: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        // Every token except the first of each sequence of 32 is trained on: 251 of them in an epoch of 5 steps.
        let tokens: u64 = steps.iter().map(|step| step["answer_tokens"].as_u64().expect("count")).sum();
        assert_eq!((steps.len(), tokens), (15, 3 * 251));
        for name in losses {
            let values: Vec<f64> = steps.iter().map(|step| step["losses"][name].as_f64().expect("loss")).collect();
            let (first, last) = (values[..5].iter().sum::<f64>(), values[10..].iter().sum::<f64>());
            assert!(last < first, "{name}: {values:?}");
        }
    };
    heal(&["kd", "anchor"], "taught");
    heal(&["ce"], "healed");
    run(&[&["eval", "healed", "--baseline", &model, "-o", "report.json"][..], &cut].concat());
    let report = json(&folder.join("report.json"));
    let kept = report["retention"]["ratio"].as_f64().expect("ratio");
    let ratio = report["baseline"]["perplexity"].as_f64().expect("number")
        / report["model"]["perplexity"].as_f64().expect("number");
    assert!((kept / ratio - 1.0).abs() < 1e-12, "{kept} against {ratio}");
    // The healed model was trained on this text, so it predicts it better than the dense one.
    let gate = |model: &str, baseline: &str| {
        let eval = ["eval", model, "--baseline", baseline, "-o", "gate.json", "--min-retention", "1"];
        interlace(folder, &[&eval[..], &cut].concat()).status.code()
    };
    assert!(kept > 1.0, "{kept}");
    assert_eq!((gate("healed", &model), gate(&model, "healed")), (Some(0), Some(1)));
}
