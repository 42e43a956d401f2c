//! `export --sensitivity`, `--target-size` and `--max-kl`: what parts cost in fewer bits, and forms within a limit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use interlace::ir::{Attribute, Model};
use interlace::onnx;
use serde_json::Value as Json;

use super::cli::{fixture, interlace, stderr, stdout};

const FILES: [&str; 3] = ["decoder_model_merged", "vision_encoder", "embed_tokens"];

fn export(folder: &Path, arguments: &[&str]) -> Json {
    let (model, data) = (fixture("model"), fixture("data/ready.npz"));
    let all = ["--json", "export", &model, "--precision", "int4", "--rounding", "nearest", "--data", &data];
    let output = interlace(folder, &[&all[..], arguments].concat());
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn load(folder: &Path, file: &str) -> Model {
    onnx::load(&folder.join(format!("onnx/{file}_q4.onnx"))).expect("graph")
}

/// Number of products with weights of so many bits.
fn products(model: &Model, bits: i64) -> usize {
    let of = |node: &&interlace::ir::Node| {
        node.op_type == "MatMulNBits" && node.attribute("bits").and_then(Attribute::as_int) == Some(bits)
    };
    model.graph.body.nodes.iter().filter(of).count()
}

fn number(value: &Json) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn written_bytes(folder: &Path) -> u64 {
    let files = fs::read_dir(folder.join("onnx")).expect("folder").flatten();
    let own = files.filter(|file| file.file_name().to_string_lossy().contains("_q4.onnx"));
    own.map(|file| file.metadata().expect("size").len()).sum()
}

#[test]
fn a_budget_gives_bits_to_the_parts_that_need_them_and_meets_its_limit() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let plain = export(here, &["--sensitivity", "--samples", "2", "-o", "plain", "-q"]);
    assert!(plain["sensitivity"]["budget"].is_null());
    let alone = plain["sensitivity"]["parts"].as_array().expect("parts").clone();
    assert!(alone.iter().all(|part| part["form"] == "int4"), "{alone:?}");
    let most_kl = alone.iter().map(|part| number(&part["int4_kl"])).sum::<f64>() / 4.0;
    let found = export(here, &["--max-kl", &most_kl.to_string(), "--samples", "2", "-o", "kl", "-q"]);
    let parts = found["sensitivity"]["parts"].as_array().expect("parts").clone();
    let names = |role: &str| -> Vec<&str> {
        parts.iter().filter(|part| part["role"] == role).filter_map(|part| part["part"].as_str()).collect()
    };
    let mut layers: Vec<String> = (0..16).map(|layer| format!("layer {layer}")).collect();
    layers.push("rest".to_string());
    assert_eq!(names("decoder"), layers);
    assert_eq!(names("embed_tokens"), ["all"]);
    assert!(names("vision_encoder").len() > 2, "{parts:?}");
    for part in &parts {
        let bytes = ["float_bytes", "int8_bytes", "int4_bytes"].map(|name| number(&part[name]));
        assert!(bytes[0] > bytes[1] && bytes[1] > bytes[2], "{part}");
        assert!(number(&part["int4_kl"]) > 0.0 && number(&part["int8_kl"]) > -1e-12, "{part}");
    }
    let total = |name: &str| parts.iter().map(|part| number(&part[name])).sum::<f64>();
    assert!(total("int8_kl") < total("int4_kl") / 4.0, "{parts:?}");
    let budget = &found["sensitivity"]["budget"];
    let (kl, int4_kl) = (number(&budget["kl"]), number(&budget["int4_kl"]));
    assert!(kl <= most_kl && int4_kl > most_kl, "{budget}");
    assert_eq!(budget["size_bytes"].as_u64(), Some(written_bytes(&here.join("kl"))));

    // The graphs have the forms that the report names.
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    parts.iter().for_each(|part| *counts.entry(part["form"].as_str().expect("a form")).or_default() += 1);
    assert!(counts.len() > 1, "all parts got one form: {counts:?}");
    let of = |form: &str| -> Vec<&Json> {
        parts.iter().filter(|part| part["form"] == form && part["role"] == "decoder").collect()
    };
    let decoder = load(&here.join("kl"), FILES[0]);
    // Seven products in each layer, and the head.
    let expected = |form: &str| of(form).iter().map(|part| if part["part"] == "rest" { 1 } else { 7 }).sum::<usize>();
    assert_eq!((products(&decoder, 4), products(&decoder, 8)), (expected("int4"), expected("int8")));

    // The same data give the same figures, and the files stay within a size.
    for (one, other) in parts.iter().zip(&alone) {
        assert_eq!((&one["int4_kl"], &one["int8_kl"]), (&other["int4_kl"], &other["int8_kl"]), "{one}");
    }
    let most = written_bytes(&here.join("plain")) + 200_000;
    let sized = export(here, &["--target-size", &most.to_string(), "--samples", "2", "-o", "size", "-q"]);
    let budget = &sized["sensitivity"]["budget"];
    assert_eq!(number(&budget["int4_kl"]), int4_kl);
    let bytes = written_bytes(&here.join("size"));
    assert!(bytes <= most, "{budget}");
    assert!(number(&budget["kl"]) <= int4_kl, "{budget}");

    // Other verbs read the mixed files.
    let bench = fixture("data/bench-small.tsv");
    let output = interlace(
        here,
        &["--json", "eval", "kl", "--variant", "q4", "--data", &bench, "--limit", "16", "-q", "-o", "report.json"],
    );
    let report: Json = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(report["model"]["score"], 1.0);
    let output = interlace(here, &["prune", "kl", "--drop", "3,6", "-o", "pruned", "-q"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let pruned = load(&here.join("pruned"), FILES[0]);
    let both = products(&decoder, 4) + products(&decoder, 8);
    assert!(products(&pruned, 4) + products(&pruned, 8) <= both);
}

#[test]
fn limits_that_cannot_be_met_or_measured_are_refused_with_the_best_that_can() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/ready.npz"));
    for (arguments, want) in [
        (&["--precision", "int4", "--max-kl", "0.1"][..], "--data"),
        (&["--precision", "int8", "--data", &data, "--max-kl", "0.1"], "has no `int4`"),
        (&["--precision", "int4", "--data", &data, "--max-kl", "0"], "expected nats above 0"),
        (&["--precision", "int4", "--data", &data, "--max-kl", "nan"], "expected nats above 0"),
        (
            &[
                "--precision",
                "int4",
                "--data",
                &data,
                "--samples",
                "1",
                "--rounding",
                "nearest",
                "--target-size",
                "1MB",
            ],
            "and int4 in all parts takes 3.",
        ),
    ] {
        let output = interlace(here, &[&["export", &model, "-o", "out", "-q"][..], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(want), "{arguments:?}: {}", stderr(&output));
        assert_eq!(fs::read_dir(here).expect("folder").count(), 0, "{arguments:?}");
    }
}

#[test]
fn a_size_that_no_form_reaches_is_refused_before_parts_are_measured() {
    let folder = tempfile::tempdir().expect("folder");
    let (here, model, data) = (folder.path(), fixture("model"), fixture("data/ready.npz"));
    let arguments =
        ["export", &model, "--precision", "int4", "--data", &data, "--rounding", "nearest", "--target-size", "1MB"];
    let output = interlace(here, &[&arguments[..], &["--samples", "1", "-o", "out"]].concat());
    assert_eq!(output.status.code(), Some(2));
    let message = stderr(&output);
    assert!(message.contains("and int4 in all parts takes 3."), "{message}");
    assert!(!message.contains(" parts: up to "), "{message}");
}
