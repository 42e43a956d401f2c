//! Models whose connector is a graph of its own: `finetune --lora-layers all` trains it, writes it and records it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use interlace::bundle::{Bundle, RecordedStep};
use interlace::ir::{Model, Node, ValueId};
use interlace::{onnx, rewrite};
use serde_json::Value;

use super::cli::{fixture, interlace, stderr, stdout};
use super::ranks::{close, ended, start};

const CONNECTOR: &str = "onnx/multi_modal_projector.onnx";

fn value(model: &Model, name: &str) -> ValueId {
    let mut made = model.graph.body.nodes.iter().flat_map(Node::present_outputs);
    made.find(|id| model.graph.name(*id) == name).expect("a value")
}

/// The shipped model with its connector, a pixel shuffle and a product, in a file of its own.
pub fn split(folder: &Path) -> PathBuf {
    let (source, target) = (PathBuf::from(fixture("model")), folder.join("split"));
    fs::create_dir_all(target.join("onnx")).expect("a folder");
    for part in ["", "onnx"] {
        for entry in fs::read_dir(source.join(part)).expect("files").map(|entry| entry.expect("a file")) {
            if entry.file_type().expect("a type").is_file() {
                fs::copy(entry.path(), target.join(part).join(entry.file_name())).expect("a copy");
            }
        }
    }
    let vision = onnx::load(&source.join("onnx/vision_encoder.onnx")).expect("a graph");
    let before = value(&vision, "layer_norm_10");
    let encoder = rewrite::extract(&vision, &[], &[before]).expect("the encoder");
    let connector = rewrite::extract(&vision, &[before], &vision.graph.body.outputs).expect("the connector");
    for (model, file) in [(&encoder, "onnx/vision_encoder.onnx"), (&connector, CONNECTOR)] {
        onnx::save(model, &target.join(file), &onnx::Storage::Inline).expect("a file");
    }
    target
}

const ADAPTED: [&str; 8] = ["--recipe", "paper", "--learning-rate", "1e-3", "--lora-rank", "4", "--lora-layers", "all"];

fn command(folder: &Path, out: &str, how: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_interlace-torch"));
    command.current_dir(folder).args(["finetune", "split", "--layers", "3,7", "--data"]);
    command.arg(fixture("data/finetune-small.parquet")).args(["-o", out]).args(ADAPTED).args(how);
    command.env("OMP_NUM_THREADS", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_trained_connector_is_written_recorded_and_verified() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    split(here);
    let plan = command(here, "healed", &["--max-steps", "4", "--dry-run"]).output().expect("a process");
    assert!(plan.status.success(), "{}", stderr(&plan));
    let table = stdout(&plan);
    for row in [
        "connector's weights",
        "connector's adapters",
        "connector's activations",
        "features of pictures that the connector reads",
    ] {
        assert!(table.contains(row), "{row}: {table}");
    }
    assert!(table.contains(&format!("the connector `{CONNECTOR}` gets adapters on 1 matrix")), "{table}");
    let run = command(here, "healed", &["--max-steps", "4", "--json"]).output().expect("a process");
    assert!(run.status.success(), "{}", stderr(&run));
    let report: Value = serde_json::from_slice(&run.stdout).expect("JSON");
    assert_eq!(report["connector"], CONNECTOR);
    assert!(stderr(&run).contains("and the connector,"), "{}", stderr(&run));
    let read = |root: &str, file: &str| fs::read(here.join(root).join(file)).expect("a file");
    assert!(read("split", CONNECTOR) != read("healed", CONNECTOR));
    assert!(read("split", "onnx/vision_encoder.onnx") == read("healed", "onnx/vision_encoder.onnx"));
    let history =
        Bundle::open(&here.join("healed")).expect("a model").record().expect("JSON").expect("a record").history;
    match &history[..] {
        [RecordedStep::Finetune { connector: true, layers, .. }] => assert_eq!(layers, &(0..16).collect::<Vec<_>>()),
        other => panic!("{other:?}"),
    }
    let verified = interlace(here, &["verify", "healed", "--json"]);
    let report: Value = serde_json::from_slice(&verified.stdout).expect("JSON");
    assert_eq!(report["passed"], true, "{report}");
    let checks = report["checks"].as_array().expect("checks");
    let compared = |check: &&Value| check["name"] == "interpreter" && check["subject"] == CONNECTOR;
    assert_eq!(checks.iter().find(compared).expect("a comparison")["status"], "passed", "{report}");
}

#[test]
fn two_processes_train_a_connector_as_one_does() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    split(here);
    let how = ["--max-steps", "3", "--quiet"];
    let alone = command(here, "alone", &how).output().expect("a process");
    assert!(alone.status.success(), "{}", stderr(&alone));
    for (rank, output) in ended(start(2, &|| command(here, "both", &how))).iter().enumerate() {
        assert!(output.status.success(), "rank {rank}: {}", stderr(output));
    }
    let losses = |out: &str| -> Vec<f64> {
        let text = fs::read_to_string(here.join(format!("{out}.work/metrics.jsonl"))).expect("metrics");
        let loss = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["loss"].as_f64().expect("a loss");
        text.lines().map(loss).collect()
    };
    close(&losses("both"), &losses("alone"));
    assert!(losses("alone").len() == 3);
}

/// Another variant of the connector would keep its old weights.
#[test]
fn several_variants_of_a_connector_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let target = split(folder.path());
    fs::copy(target.join(CONNECTOR), target.join("onnx/multi_modal_projector_fp16.onnx")).expect("a copy");
    for flag in ["--quiet", "--dry-run"] {
        let output = command(folder.path(), "healed", &[flag]).output().expect("a process");
        assert!(!output.status.success());
        let text = stderr(&output);
        assert!(text.contains("several variants") && text.contains("multi_modal_projector_fp16.onnx"), "{text}");
        assert!(text.contains("`--lora-layers trained`"), "{text}");
    }
}

/// The whole model in 4 bits, connector included, as `export --precision int4` writes it.
#[test]
fn a_connector_in_four_bits_gets_adapters_and_is_written_as_asked() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    split(here);
    let done = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        output
    };
    done(&["export", "split", "--precision", "int4", "--rounding", "nearest", "-q", "-o", "packed"]);
    for file in fs::read_dir(here.join("packed/onnx")).expect("a folder").flatten() {
        if !file.file_name().to_string_lossy().contains("_q4.onnx") {
            fs::remove_file(file.path()).expect("removed");
        }
    }
    let file = CONNECTOR.replace(".onnx", "_q4.onnx");
    let read = |root: &str| onnx::load(&here.join(root).join(&file)).expect("a graph");
    let products = |model: &Model| -> Vec<String> {
        let types = model.graph.body.nodes.iter().map(|node| node.op_type.clone());
        types.filter(|name| name.starts_with("MatMul")).collect()
    };
    let bytes = |model: &Model| -> Vec<Vec<u8>> {
        model.graph.body.initializers.iter().map(|(_, tensor)| tensor.bytes().to_vec()).collect()
    };
    let before = read("packed");
    assert_eq!(products(&before), ["MatMulNBits"]);
    let data = fixture("data/finetune-small.parquet");
    for (how, product) in [("float", "MatMul"), ("quantised", "MatMulNBits")] {
        let mut arguments =
            vec!["finetune", "packed", "--variant", "q4", "--layers", "3,7", "--data", &data, "-o", how];
        arguments.extend(["--recipe", "paper", "--learning-rate", "2e-2", "--lora-rank", "4", "--lora-layers", "all"]);
        arguments.extend(["--max-steps", "4", "--write-trained", how, "--json"]);
        let report: Value = serde_json::from_slice(&done(&arguments).stdout).expect("JSON");
        assert_eq!(report["connector"], file.as_str());
        assert!(report["last_loss"].as_f64() < report["first_loss"].as_f64(), "{report}");
        let after = read(how);
        assert_eq!(products(&after), [product]);
        assert!(bytes(&after) != bytes(&before), "{how}");
        // ONNX Runtime computes the same with the written connector as the interpreter does.
        let verified = interlace(here, &["verify", how, "--variant", "q4", "--json"]);
        let report: Value = serde_json::from_slice(&verified.stdout).expect("JSON");
        let checks = report["checks"].as_array().expect("checks");
        let compared = |check: &&Value| check["name"] == "interpreter" && check["subject"] == file.as_str();
        assert_eq!(checks.iter().find(compared).expect("a comparison")["status"], "passed", "{report}");
    }
}
