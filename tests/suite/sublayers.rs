//! Models that lost MLPs alone, or got nodes behind their layers: planned, pruned, trained and exported.

use std::fs;
use std::path::Path;

use super::cli::{fixture, interlace, stderr};
use super::families::Family;

fn read(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("artifact")).expect("JSON")
}

fn ran(here: &Path, arguments: &[&str]) -> String {
    let output = interlace(here, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("text")
}

fn refused(here: &Path, arguments: &[&str], want: &str) {
    let output = interlace(here, arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert!(stderr(&output).contains(want), "{arguments:?}: {}", stderr(&output));
}

/// Trains a pruned model for two steps and returns its loss on the data before and after, in nats.
fn heals(here: &Path, pruned: &str, which: &[&str], data: &str) -> (f64, f64) {
    let model = fixture("model");
    let loss = |model: &str| {
        let report = format!("{model}-loss.json");
        ran(here, &["eval", model, "--data", data, "--limit", "8", "-o", &report]);
        read(&here.join(report))["model"]["mean_loss"].as_f64().expect("a loss")
    };
    let healed = format!("healed-{pruned}");
    let how = ["--recipe", "best", "--teacher", &model, "--data", data, "--turns", "separate", "--samples", "16"];
    let steps = ["--batch-size", "8", "--accumulation-steps", "1", "--learning-rate", "1e-3", "-o", &healed];
    ran(here, &[&["finetune", pruned][..], which, &how, &steps].concat());
    (loss(pruned), loss(&healed))
}

#[test]
fn mlps_alone_are_chosen_dropped_and_healed() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let plan = ["plan", &model, "--strategy", "finercut", "--data", &data, "--turns", "separate", "--samples", "4"];
    let said = ran(here, &[&plan[..], &["--drop-count", "3", "-o", "plan.json"]].concat());
    assert!(said.contains("drop MLPs") && said.contains("13 of 16 MLPs"), "{said}");
    let planned = read(&here.join("plan.json"));
    assert_eq!(planned["part"], "mlp");
    assert_eq!(planned["layers"][15]["pruned_index"], 15);
    refused(here, &[&plan[..], &["--target-speedup", "1.1", "-o", "other.json"]].concat(), "takes no limit");

    let said = ran(here, &["prune", &model, "--plan", "plan.json", "-o", "pruned"]);
    assert!(said.contains("the attention of all layers"), "{said}");
    let record = read(&here.join("pruned/interlace.json"));
    assert_eq!(record["history"][0]["mlps"], planned["drop"]);
    // Nothing in the configs changes.
    let config = |folder: &Path| fs::read(folder.join("config.json")).expect("a config");
    assert_eq!(config(&here.join("pruned")), config(Path::new(&model)));
    let layers: serde_json::Value = serde_json::from_str(&ran(here, &["inspect", "pruned", "--json"])).expect("JSON");
    let dropped = planned["drop"][0].as_u64().expect("a layer") as usize;
    assert_eq!(layers["layers"].as_array().expect("layers").len(), 16);
    assert_eq!(layers["layers"][dropped]["kind"], "attention");

    let (before, after) = heals(here, "pruned", &["--plan", "plan.json"], &data);
    assert!(after.is_finite() && (after - before).abs() > 1e-6, "{before} {after}");
    let plan_of_layers = ["plan", &model, "--drop", "3", "-o", "layers.json"];
    ran(here, &plan_of_layers);
    let finetune = ["finetune", "pruned", "--plan", "layers.json", "--recipe", "paper", "--data", &data, "-o", "x"];
    refused(here, &finetune, "lost the MLPs of layers");
    for (more, want) in [
        (&["--drop-mlps", "99"][..], "99"),
        (&["--drop-mlps", "3", "--compensate", "linear", "--data", &data], "leaves none"),
        (&["--drop-mlps", "3", "--drop", "4"], "cannot be used with"),
    ] {
        refused(here, &[&["prune", &model, "-o", "out"][..], more].concat(), want);
        assert!(!here.join("out").exists());
    }
}

#[test]
fn added_nodes_are_counted_trained_and_kept() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let fit = ["--data", &data, "--turns", "separate", "--samples", "4"];
    refused(
        here,
        &[&["prune", &model, "--drop", "3", "--compensate", "cubic", "-o", "x"][..], &fit].concat(),
        "linear, scalar",
    );
    let ranked = ["prune", &model, "--drop", "3", "--compensate", "scalar", "--rank", "4", "-o", "x"];
    refused(here, &[&ranked[..], &fit].concat(), "has no rank");
    ran(here, &["plan", &model, "--drop", "1,5,9,13", "-o", "plan.json"]);
    for (how, more) in [("scalar", &[][..]), ("bridge", &["--rank", "4"])] {
        let prune = ["prune", &model, "--plan", "plan.json", "--compensate", how, "-o", how, "--json"];
        let said = ran(here, &[&prune[..], &fit, more].concat());
        let report: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        let own = &report["compensation"];
        let kept = own["layers"].as_array().expect("layers").len();
        assert!(kept > 0, "no {how} lowers the loss: {own}");
        let record = read(&here.join(how).join("interlace.json"));
        assert_eq!(record["history"][0]["bridged"], own["layers"]);
        assert_eq!(own["kind"], how);
        if how == "bridge" {
            let width = read(&Path::new(&model).join("config.json"))["text_config"]["hidden_size"].as_u64();
            let added = 2 * 4 * width.expect("a width") * kept as u64;
            assert_eq!(own["added_parameters"].as_u64(), Some(added));
            assert!(own["ideal_speedup"].as_f64().expect("a speed-up") < 16.0 / 12.0, "{own}");
        }
        let (before, after) = heals(here, how, &["--plan", "plan.json"], &data);
        assert!(after.is_finite() && (after - before).abs() > 1e-6, "{before} {after}");
        let (nodes, healed) = (nodes(&here.join(how)), nodes(&here.join(format!("healed-{how}"))));
        assert_eq!(nodes, healed, "healing keeps the graph");
        let export = ["export", how, "--to", "safetensors", "--base", &model, "-o", "hf"];
        let output = interlace(here, &export);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    }
}

fn nodes(model: &Path) -> usize {
    let bundle = interlace::bundle::Bundle::open(model).expect("a model");
    let component = bundle.require(interlace::bundle::Role::Decoder).expect("a decoder");
    interlace::onnx::load(&bundle.path_of(component)).expect("a graph").graph.body.nodes.len()
}

/// transformers' network with `layers[1].mlp` and `layers[4].mlp` replaced by modules that give zeros: PyTorch 2.11, float32,
/// mean cross-entropy of all tokens but the first, 6.234980844529 before and 6.354428566756 after.
#[test]
fn a_model_without_mlps_is_pytorchs_network_without_them() {
    let family = Family::open("idefics3", "idefics3");
    let here = family.here();
    let text = "a photo of a red square next to two small circles, and a word below it";
    fs::write(here.join("text.jsonl"), serde_json::json!({ "text": text }).to_string() + "\n").expect("a file");
    ran(here, &["prune", "idefics3", "--drop-mlps", "4,1", "-o", "pruned"]);
    for (model, want) in [("idefics3", 6.234_980_844_529), ("pruned", 6.354_428_566_756)] {
        ran(here, &["eval", model, "--data", "text.jsonl", "-o", "report.json"]);
        let report = read(&here.join("report.json"));
        let found = report["model"]["mean_loss"].as_f64().expect("a loss");
        assert_eq!(report["model"]["predicted_tokens"], 49);
        assert!((found - want).abs() < 1e-5, "{model}: {found}, expected {want}");
        fs::remove_file(here.join("report.json")).expect("removed");
    }
}
