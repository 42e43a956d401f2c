//! Faulty inputs of exports, damaged exports, and precisions that a target treats in its own way.

use std::path::Path;

use interlace::export::ExportSettings;
use interlace::onnx;

use super::cli::{interlace, stderr};
use super::exports::to;

/// An export of the shipped model for transformers.js in `out`.
fn shipped(here: &Path) -> std::path::PathBuf {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    to("transformers-js", &model, &ExportSettings::default(), &here.join("out")).expect("export");
    here.join("out")
}

#[test]
fn verify_fails_an_export_whose_manifest_is_missing_or_damaged() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let manifest = shipped(here).join("manifest.json");
    let whole = std::fs::read(&manifest).expect("manifest");
    let failed = |text: &str| {
        let output = interlace(here, &["verify", "out", "-q"]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let found = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = found.lines().find(|line| line.contains("FAILED")).expect("a failed check").to_string();
        assert!(line.contains("files of manifest.json") && line.contains(text), "{found}");
        assert!(line.contains("export the model again"), "{found}");
        assert!(found.contains("loads in ONNX Runtime"), "the other checks are made: {found}");
    };
    for content in [&whole[..whole.len() / 2], b"", b"null"] {
        std::fs::write(&manifest, content).expect("written");
        failed("was cut or changed");
    }
    std::fs::remove_file(&manifest).expect("removed");
    failed("is missing beside `interlace-export.json`");
    // The target that is no model folder.
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    to("triton", &model, &ExportSettings::default(), &here.join("triton")).expect("export");
    std::fs::remove_file(here.join("triton/manifest.json")).expect("removed");
    let output = interlace(here, &["verify", "triton", "-q"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("is missing beside"));
}

#[test]
fn verify_passes_what_git_and_the_hub_add_and_fails_other_files() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let out = shipped(here);
    for file in [
        ".gitattributes",
        ".cache/huggingface/download/config.json.metadata",
        ".git/objects/ab/cd",
        ".DS_Store",
        "onnx/.DS_Store",
        "Thumbs.db",
        "__pycache__/code.pyc",
    ] {
        std::fs::create_dir_all(out.join(file).parent().expect("parent")).expect("folder");
        std::fs::write(out.join(file), "x").expect("file");
    }
    let verify = || {
        let output = interlace(here, &["verify", "out", "-q"]);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, text) = verify();
    assert_eq!(code, Some(0), "{text}");
    std::fs::write(out.join("onnx/extra.bin"), [0u8; 8]).expect("file");
    let (code, text) = verify();
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("`onnx/extra.bin` is not listed"), "{text}");
    assert!(text.contains("opens of") && text.contains("nothing is known about it"), "{text}");
}

#[test]
fn a_broken_tokenizer_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let source = shipped(here);
    let whole = std::fs::read(source.join("tokenizer.json")).expect("tokenizer");
    for (content, problem) in [(&whole[..whole.len() / 2], "is not JSON"), (b"null", "holds null, expected an object")]
    {
        std::fs::write(source.join("tokenizer.json"), content).expect("written");
        for target in ["transformers-js", "genai", "triton", "generate", "openvino"] {
            let out = here.join(target);
            let error = to(target, &source, &ExportSettings::default(), &out).unwrap_err().to_string();
            assert!(error.contains("`tokenizer.json`") && error.contains(problem), "{target}: {error}");
            assert!(error.contains("download it again"), "{target}: {error}");
            assert!(!out.exists(), "{target}");
        }
    }
}

#[test]
fn four_bits_are_refused_for_tract_and_half_precision_is_compared_by_its_bound() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let model = model.to_str().expect("a path");
    for precision in ["int4", "q4f16"] {
        let arguments =
            ["export", model, "--precision", precision, "--rounding", "nearest", "--to", "tract", "-o", "out"];
        let output = interlace(here, &arguments);
        assert_eq!(output.status.code(), Some(2), "{precision}: {}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains(".onnx`") && text.contains("which tract does not load"), "{precision}: {text}");
        assert!(text.contains("`--precision fp16`"), "{precision}: {text}");
        assert!(!here.join("out").exists());
    }
    let output = interlace(here, &["export", model, "--precision", "fp16", "--to", "tract", "-o", "half", "-q"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = interlace(here, &["--json", "verify", "half", "-q"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    let checks = report["checks"].as_array().expect("checks");
    let of = |check: &&serde_json::Value| {
        check["name"] == "agrees in tract" && check["subject"].as_str().is_some_and(|file| file.contains("decoder"))
    };
    let check = checks.iter().find(of).expect("a check");
    assert_eq!(check["status"], "passed");
    assert!(check["detail"].as_str().expect("text").contains("both round to 16 bits"), "{check}");
}

#[test]
fn caches_behind_casts_are_keys_and_values() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let model = model.to_str().expect("a path");
    for precision in ["fp16", "q4f16"] {
        let arguments = ["export", model, "--precision", precision, "--to", "genai", "-o", precision, "-q"];
        let more: &[&str] = if precision == "q4f16" { &["--rounding", "nearest"] } else { &[] };
        let output = interlace(here, &[&arguments[..], more].concat());
        assert_eq!(output.status.code(), Some(0), "{precision}: {}", stderr(&output));
        let analysis =
            interlace::analysis::analyse(&onnx::load(&here.join(precision).join("model.onnx")).expect("model"));
        let analysis = analysis.expect("layers");
        assert_eq!(analysis.map.layers.len(), 16);
        for layer in &analysis.map.layers {
            let name = |port: &interlace::analysis::KvPort| {
                let past = port.past.expect("a cache input");
                (port.role.label(), analysis.model.graph.name(past).to_string())
            };
            let expected =
                ["key", "value"].map(|role| (role.to_string(), format!("past_key_values.{}.{role}", layer.index)));
            assert_eq!(layer.ports.iter().map(name).collect::<Vec<_>>(), expected, "{precision}");
        }
    }
}
