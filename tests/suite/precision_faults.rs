//! `export --precision` of graphs with weights that are not finite, without names, with sequences, and with names of its own.

use std::fs;
use std::path::Path;

use interlace::base::Result;
use interlace::export::{PrecisionReport, PrecisionSettings};
use interlace::ir::{AttributeKind, DataType, Tensor as Weight, ValueId};
use interlace::onnx;
use serde_json::Value as Json;

use super::cli::{interlace, stderr};
use super::precision::{Net, expanded, largest, numbers, relative, run, small, transposed, write};

/// Precisions that need no data.
const ALL: [&str; 4] = ["int4", "q4f16", "int8", "fp16"];

/// The small network with one weight changed.
fn changed(folder: &Path, name: &str, change: impl Fn(&mut Vec<f32>)) {
    let mut model = small(folder);
    for (id, tensor) in &mut model.graph.body.initializers {
        if model.graph.values[id.index()].name == name {
            let mut values: Vec<f32> = tensor.to_f64s().expect("floats").iter().map(|&value| value as f32).collect();
            change(&mut values);
            *tensor = Weight::from_f32(&tensor.dims.clone(), &values);
        }
    }
    Net(model).save(folder);
}

fn written(model: &Path, precision: &str, out: &Path) -> Result<PrecisionReport> {
    write(model, &[precision], PrecisionSettings::default(), out)
}

#[test]
fn weights_and_scales_that_are_not_finite_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("folder");
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    let refused = |precision: &str, want: &str| {
        let error = written(&model, precision, &out).expect_err(precision).to_string();
        assert!(error.contains(want), "{precision}: {error}");
        assert!(!out.exists(), "{precision}");
    };
    for (value, found) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        changed(&model, "first", |values| values[70] = value);
        let want = format!("weight `first`: has 1 numbers of 1776 that are not finite, the first is {found}");
        ALL.iter().for_each(|precision| refused(precision, &want));
        changed(&model, "second", |values| values[0] = value);
        ALL.iter().for_each(|precision| refused(precision, "weight `second`"));
    }
    changed(&model, "table", |values| values[17] = f32::NAN);
    ALL.iter().for_each(|precision| refused(precision, "weight `table`"));
    changed(&model, "bias", |values| values[3] = f32::NAN);
    refused("fp16", "weight `bias`");

    // Scales of f16 end at 65,504, so a weight of two millions has none there; in f32 it has one.
    changed(&model, "first", |values| values[70] = -2e6);
    refused("q4f16", "weight `first`: has numbers up to 2e6, whose scale is beyond the range of float16");
    refused("fp16", "weight `first`: has -2e6, and float16 ends at 65504");
    for precision in ["int4", "int8"] {
        let report = written(&model, precision, &folder.path().join(precision)).expect("written");
        assert!(report.components[0].quantised.iter().all(|tensor| tensor.relative_error.is_finite()));
    }
    // The range of a row is larger than the largest f32.
    changed(&model, "second", |values| (values[0], values[1]) = (3e38, -3e38));
    refused("int8", "weight `second`: has numbers up to 3e38, whose scale is beyond the range of float32");
}

#[test]
fn an_infinite_mask_stays_in_half_precision_and_has_an_error() {
    let folder = tempfile::tempdir().expect("folder");
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    let mut net = Net::new();
    let ids = net.input("input_ids", DataType::Int64, &[-1]);
    let table = net.weight("table", Weight::from_f32(&[11, 32], &numbers(11 * 32, 0.1)));
    let half: Vec<f32> = (0..64).map(|at| if at % 32 < 16 { f32::NEG_INFINITY } else { 0.25 }).collect();
    let mask = net.weight("mask", Weight::from_f32(&[2, 32], &half));
    let rows = net.node("Gather", &[table, ids], &[]);
    let masked = net.node("Add", &[rows, mask], &[]);
    let shares = net.node("Softmax", &[masked], &[]);
    net.output(shares, "logits", &[-1, 32]);
    net.save(&model);
    let report = written(&model, "fp16", &out).expect("written");
    let mask = report.components[0].quantised.iter().find(|tensor| tensor.name == "mask").expect("listed");
    assert_eq!(mask.relative_error, 0.0);
    let found = run(&onnx::load(&out.join("model_fp16.onnx")).expect("graph"), &[3, 7]);
    assert!(largest(&run(&net.0, &[3, 7]), &found) < 1e-4);
}

/// A graph of nodes without names gives what the graph with names gives, in every precision.
#[test]
fn graphs_of_nameless_nodes_run_in_onnx_runtime_in_every_precision() {
    let folder = tempfile::tempdir().expect("folder");
    let (named, nameless) = (folder.path().join("named"), folder.path().join("nameless"));
    let mut model = small(&named);
    model.graph.body.nodes.iter_mut().for_each(|node| node.name.clear());
    Net(model).save(&nameless);
    for (precision, suffix) in [("fp16", "fp16"), ("int8", "quantized"), ("int4", "q4"), ("q4f16", "q4f16")] {
        let [with, without] = [&named, &nameless].map(|source| {
            let out = source.with_file_name(format!("{precision}-{}", source.ends_with("named")));
            written(source, precision, &out).expect("written");
            run(&onnx::load(&out.join(format!("model_{suffix}.onnx"))).expect("graph"), &[3, 10, 0, 7])
        });
        assert_eq!(with, without, "{precision}");
    }
}

#[test]
fn nodes_named_like_the_casts_of_half_precision_are_converted_like_others() {
    let folder = tempfile::tempdir().expect("folder");
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    let mut net = Net(small(&model));
    for (number, node) in net.0.graph.body.nodes.iter_mut().enumerate() {
        node.name = format!("interlace.half.{}", if number == 2 { "logits".to_string() } else { number.to_string() });
    }
    net.save(&model);
    written(&model, "fp16", &out).expect("written");
    let (want, found) =
        (run(&net.0, &[3, 10, 0, 7]), run(&onnx::load(&out.join("model_fp16.onnx")).expect("graph"), &[3, 10, 0, 7]));
    // Rounding to 11 bits at a few places.
    assert!(relative(&want, &found) < 2e-3, "{want:?} {found:?}");
    assert!(largest(&want, &found) > 0.0);
}

#[test]
fn sequences_of_floats_become_sequences_of_half_precision() {
    let folder = tempfile::tempdir().expect("folder");
    for (number, dtype) in [None, Some(AttributeKind::Int(1))].into_iter().enumerate() {
        let (model, out) = (folder.path().join(format!("model{number}")), folder.path().join(format!("out{number}")));
        let mut net = Net::new();
        let ids = net.input("input_ids", DataType::Int64, &[-1]);
        let table = net.weight("table", Weight::from_f32(&[11, 32], &numbers(11 * 32, 0.1)));
        let first = net.weight("first", Weight::from_f32(&[32, 32], &numbers(32 * 32, 0.2)));
        let place = net.weight("place", Weight::from_i64(&[], &[1]));
        let attributes: Vec<(&str, AttributeKind)> = dtype.into_iter().map(|dtype| ("dtype", dtype)).collect();
        let rows = net.node("Gather", &[table, ids], &[]);
        let product = net.node("MatMul", &[rows, first], &[]);
        let sequence = net.node("SequenceEmpty", &[], &attributes);
        let sequence = net.node("SequenceInsert", &[sequence, rows], &[]);
        let sequence = net.node("SequenceInsert", &[sequence, product], &[]);
        let second: ValueId = net.node("SequenceAt", &[sequence, place], &[]);
        let both = net.node("ConcatFromSequence", &[sequence], &[("axis", AttributeKind::Int(0))]);
        let sum = net.node("ReduceMax", &[both], &[("keepdims", AttributeKind::Int(1))]);
        let last = net.node("Add", &[second, sum], &[]);
        net.output(last, "logits", &[-1, 32]);
        net.save(&model);
        for (precision, suffix) in [("fp16", "fp16"), ("q4f16", "q4f16")] {
            let out = out.with_extension(precision);
            written(&model, precision, &out).expect("written");
            let found = run(&onnx::load(&out.join(format!("model_{suffix}.onnx"))).expect("graph"), &[3, 10, 0]);
            let error = relative(&run(&net.0, &[3, 10, 0]), &found);
            assert!(error < if precision == "fp16" { 2e-3 } else { 0.2 }, "{precision}: {error}");
        }
    }
}

#[test]
fn weights_that_stay_in_floats_are_listed_with_the_true_reason() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let mut net = Net::new();
    let ids = net.input("input_ids", DataType::Int64, &[-1]);
    // Rows of 20 numbers are no whole number of blocks; rows of 4 in a block of 32 would take more than their floats.
    let table = net.weight("table", Weight::from_f32(&[20, 20], &numbers(400, 0.1)));
    let narrow = net.weight("narrow", Weight::from_f32(&[20, 4], &numbers(80, 0.2)));
    let short = net.weight("short", Weight::from_f32(&[4, 64], &numbers(256, 0.3)));
    let stack = net.weight("stack", Weight::from_f32(&[1, 64, 32], &numbers(2048, 0.4)));
    let rows = net.node("Gather", &[table, ids], &[]);
    let thin = net.node("MatMul", &[rows, narrow], &[]);
    let wide = net.node("MatMul", &[thin, short], &[]);
    let stacked = net.node("MatMul", &[wide, stack], &[]);
    net.output(stacked, "logits", &[1, -1, 32]);
    net.save(&here.join("model"));
    let report = written(&here.join("model"), "int4", &here.join("four")).expect("written");
    let reasons: Vec<(&str, &str)> =
        report.components[0].kept.iter().map(|tensor| (tensor.name.as_str(), tensor.reason.as_str())).collect();
    assert_eq!(
        reasons,
        [
            ("table", "its rows of 20 are no whole number of blocks of 16"),
            ("short", "rows of 4 in blocks of 32 take as many bytes as its floats"),
            ("stack", "read by MatMul, not as the plain matrix of a product or a table"),
        ]
    );
    // The float graph with the weight that has 4 bits gives what the other one gives.
    let four = onnx::load(&here.join("four/model_q4.onnx")).expect("graph");
    let values = transposed(&expanded(&four, "narrow", 20, 32), 20);
    for (id, tensor) in &mut net.0.graph.body.initializers {
        if *id == narrow {
            *tensor = Weight::from_f32(&[20, 4], &values);
        }
    }
    assert!(largest(&run(&net.0, &[3, 10, 0]), &run(&four, &[3, 10, 0])) < 1e-5);

    // OpenVINO may lack operators of ONNX Runtime's own domain; integers need none.
    for (precision, warns) in [("int4", true), ("int8", false)] {
        let arguments =
            ["--json", "export", "model", "--precision", precision, "--to", "openvino", "-q", "-o", precision];
        let output = interlace(here, &arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let export: Json = serde_json::from_slice(&output.stdout).expect("JSON");
        let notes = export["notes"].to_string();
        assert_eq!(notes.contains("com.microsoft (MatMulNBits)"), warns, "{notes}");
    }
    assert!(fs::read_dir(here).expect("folder").flatten().count() == 4);
}
