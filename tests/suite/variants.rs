//! `--variant`: verbs run the precision variants that the user names, and reports say which.

use std::fs;
use std::path::Path;

use interlace::ir::Tensor;
use interlace::onnx;
use serde_json::Value;

use super::cli::{interlace, stderr};

/// The shipped model in a folder, with a decoder `q4` whose logits are those of the other one with the sign changed.
fn model(folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    for entry in fs::read_dir(&source).expect("folder").chain(fs::read_dir(source.join("onnx")).expect("folder")) {
        let path = entry.expect("entry").path();
        let target = folder.join("model").join(path.strip_prefix(&source).expect("inside"));
        fs::create_dir_all(target.parent().expect("folder")).expect("folder");
        if path.is_file() {
            fs::copy(&path, target).expect("copied");
        }
    }
    let onnx = folder.join("model/onnx");
    let mut model = onnx::load(&onnx.join("decoder_model_merged.onnx")).expect("graph");
    let head = model.graph.body.initializers.iter_mut().find(|(_, tensor)| tensor.dims == [160, 839]).expect("a head");
    let numbers: Vec<f32> = head.1.to_f64s().expect("floats").into_iter().map(|number| -number as f32).collect();
    head.1 = Tensor::from_f32(&[160, 839], &numbers);
    onnx::save(&model, &onnx.join("decoder_model_merged_q4.onnx"), &onnx::Storage::Inline).expect("saved");
}

fn run(folder: &Path, arguments: &[&str]) -> Value {
    let output = interlace(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn each_verb_runs_the_variants_that_are_named_and_says_so() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data");
    let bench = data.join("bench-small.tsv");
    let (bench, train) = (bench.to_str().expect("path"), data.join("finetune-small.parquet"));
    let train = train.to_str().expect("path");

    let arguments = ["--json", "eval", "model", "--data", bench, "--limit", "8", "--variant", "decoder=q4", "-q"];
    let report = run(here, &[&arguments[..], &["--baseline", "model", "-o", "eval.json"]].concat());
    assert_eq!(report["model"]["model"], "model (decoder=q4)");
    assert_eq!(report["variants"], serde_json::json!({ "model": "decoder=q4" }));
    assert!(report["baseline"]["score"].as_f64() > report["model"]["score"].as_f64(), "{report}");
    let swapped = ["--json", "eval", "model", "--data", bench, "--limit", "8", "--baseline", "model", "-q"];
    let report = run(here, &[&swapped[..], &["--baseline-variant", "decoder=q4", "-o", "eval.json"]].concat());
    assert_eq!(report["variants"], serde_json::json!({ "baseline": "decoder=q4" }));
    assert!(report["baseline"]["score"].as_f64() < report["model"]["score"].as_f64(), "{report}");

    let ask = ["--json", "generate", "model", "--prompt", "what is it", "--max-tokens", "3", "-q"];
    let (full, q4) = (run(here, &ask), run(here, &[&ask[..], &["--variant", "decoder=q4"]].concat()));
    assert_eq!(q4["answers"][0]["model"], "model (decoder=q4)");
    assert_ne!(full["answers"][0]["answer"], q4["answers"][0]["answer"]);
    let named = run(here, &[&ask[..], &["--variant", "fp32"]].concat());
    assert_eq!(full["answers"][0]["answer"], named["answers"][0]["answer"]);

    let times = ["--json", "bench", "model", "--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2", "-q"];
    let report = run(here, &[&times[..], &["--variant", "decoder=q4", "-o", "bench.json"]].concat());
    assert_eq!(
        (&report["model"]["model"], &report["variants"]["model"]),
        (&"model (decoder=q4)".into(), &"decoder=q4".into())
    );
    let score = ["--json", "score", "model", "--data", train, "--samples", "2", "-o", "scores.json", "-q"];
    let report = run(here, &[&score[..], &["--variant", "decoder=q4"]].concat());
    assert_eq!(report["variants"]["model"], "decoder=q4");
    let report = run(here, &["--json", "verify", "model", "--variant", "decoder=q4", "-q"]);
    assert_eq!(report["variants"]["model"], "decoder=q4");
    assert_eq!(report["model"], "model (decoder=q4)");

    let export = ["--json", "export", "model", "--to", "transformers-js", "-o", "out", "-q"];
    let report = run(here, &[&export[..], &["--variant", "decoder=q4"]].concat());
    assert_eq!(report["models"]["decoder_model_merged.onnx"]["source"], "onnx/decoder_model_merged_q4.onnx");
    assert_eq!(report["models"]["embed_tokens.onnx"]["source"], "onnx/embed_tokens.onnx");
}

#[test]
fn variants_that_are_not_there_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    model(here);
    for (variant, wanted) in [
        ("q4", &["variant `q4` of `onnx/vision_encoder`", "vision_encoder=q4"][..]),
        ("decoder=int8", &["variant `int8`", "decoder_model_merged_q4.onnx"]),
        ("projector=q4", &["has no projector component"]),
        ("decoder=q5", &["`q5` is none of fp32"]),
        ("head=q4", &["`head` is none of vision_encoder"]),
    ] {
        let output = interlace(here, &["verify", "model", "--variant", variant]);
        assert_eq!(output.status.code(), Some(2), "{variant}");
        for part in wanted {
            assert!(stderr(&output).contains(part), "{variant}: {}", stderr(&output));
        }
    }
    // Training one variant would leave the other as it was.
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet");
    let arguments = ["finetune", "model", "--layers", "3", "--data", data.to_str().expect("path"), "-o", "out"];
    let output = interlace(here, &[&arguments[..], &["--recipe", "paper", "--variant", "decoder=q4"]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("variant"), "{}", stderr(&output));
}
