//! Exports whose graphs are changed for one consumer compute what the model computes.

use std::path::Path;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::eval::{Check, CheckStatus, verify};
use interlace::export::{Export, ExportSettings, export, target_named};
use interlace::onnx;
use interlace::runtime::{Port, Runtime, SessionOptions};

use super::families::{Family, check_prompts};

fn model() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")
}

fn to(target: &str, model: &Path, out: &Path) -> interlace::base::Result<Export> {
    let bundle = Bundle::open(model).expect("bundle");
    export(&bundle, target_named(target).expect("a target"), &ExportSettings::default(), out)
}

fn checks(folder: &Path) -> Vec<Check> {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let report = verify(&folder.into(), None, &runtime, &Cancel::default()).expect("a report");
    assert!(report.passed, "{:#?}", report.checks);
    report.checks
}

#[test]
fn a_single_file_holds_all_weights_of_its_component() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("out");
    let written = to("single-file", &model(), &out).expect("export");
    let source = Bundle::open(&model()).expect("bundle");
    assert_eq!(written.models.len(), source.components().len());
    assert!(source.components().iter().any(|component| !component.external.is_empty()));
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    for component in source.components() {
        // Nothing lies beside the copy.
        let alone = tempfile::tempdir().expect("folder");
        let copy = alone.path().join("model.onnx");
        std::fs::copy(out.join(&component.file), &copy).expect("copy");
        runtime.session(&copy, &SessionOptions::default()).expect("session");
        let bytes = |path: &Path| onnx::load(path).expect("model").graph.body.weight_bytes();
        assert_eq!(bytes(&copy), bytes(&source.path_of(component)), "{}", component.file);
    }
    checks(&out);
}

#[test]
fn tract_computes_what_onnx_runtime_computes() {
    let folder = tempfile::tempdir().expect("folder");
    let pruned = folder.path().join("pruned");
    let run = super::cli::interlace(
        folder.path(),
        &["prune", &model().to_string_lossy(), "--drop", "3,6,8,13", "-o", &pruned.to_string_lossy(), "-q"],
    );
    assert!(run.status.success(), "{}", super::cli::stderr(&run));
    for (number, source) in [model(), pruned].iter().enumerate() {
        let out = folder.path().join(number.to_string());
        to("tract", source, &out).expect("export");
        let checks = checks(&out);
        let of = |file: &str| {
            let found = checks.iter().find(|check| check.name == "agrees in tract" && check.subject.contains(file));
            found.unwrap_or_else(|| panic!("no run of {file} in {checks:#?}"))
        };
        for file in ["decoder_model_merged", "embed_tokens"] {
            let check = of(file);
            assert_eq!(check.status, CheckStatus::Passed, "{check:?}");
            assert!(check.difference.is_some_and(|apart| apart <= 1e-3), "{check:?}");
        }
        // tract compares no Bools.
        assert_eq!(of("vision_encoder").status, CheckStatus::Unavailable);
    }
}

/// transformers.js feeds the decoder `inputs_embeds`, mask, positions and caches, and takes one output of the vision encoder.
#[test]
fn deepstack_features_reach_a_decoder_that_is_fed_embeddings_alone() {
    let family = Family::open("qwen3_vl", "qwen3_vl");
    let here = family.here();
    family.run(&["prune", "qwen3_vl", "--drop", "1,4", "--deepstack", "shift", "-o", "pruned", "-q"]);
    for (source, out, key) in
        [("qwen3_vl", "js", "dense"), ("qwen3_vl_packed", "js-packed", "dense"), ("pruned", "js-pruned", "pruned")]
    {
        let out = here.join(out);
        let written = to("transformers-js", &here.join(source), &out).expect("export");
        assert!(written.notes.iter().any(|note| note.contains("packed")), "{:?}", written.notes);
        let graph = |file: &str| onnx::load(&out.join(file)).expect("model").graph;
        let width = |file: &str, name: &str| {
            let graph = graph(file);
            let id = graph.output(name).or_else(|| graph.input(name)).expect("a value");
            Port::of_value(&graph, id).and_then(|port| port.width())
        };
        let vision = graph("onnx/vision_encoder.onnx");
        assert_eq!(vision.body.outputs.len(), 1);
        let embeds = width("onnx/embed_tokens.onnx", "inputs_embeds");
        assert_eq!(embeds, width("onnx/decoder_model_merged.onnx", "inputs_embeds"), "{source}");
        assert_eq!(embeds, width("onnx/vision_encoder.onnx", "image_features"), "{source}");
        check_prompts(&family, &out, key);
    }
    // A mask of places is not among what it feeds.
    let error = to("transformers-js", &here.join("qwen3_vl_masked"), &here.join("masked")).unwrap_err().to_string();
    assert!(error.contains("deepstack_features_0") && error.contains("inputs_embeds"), "{error}");
}
