//! Faulty inputs of exports, damaged exports, and precisions that a target treats in its own way.

use std::path::Path;

use interlace::export::ExportSettings;
use interlace::onnx;

use super::cli::{interlace, stderr};
use super::exports::to;

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
