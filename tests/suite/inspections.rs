//! The text output of `interlace inspect` for graphs of many exporters.

use std::path::Path;

use crate::cli::{interlace, stderr, stdout};

#[test]
fn inspect_prints_graphs_of_every_exporter() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo");
    let table = std::fs::read_to_string(zoo.join("cases.tsv")).unwrap();
    let files = table.lines().filter_map(|line| line.split('\t').next());
    for file in files.chain(["post/llama-ts17__int8.onnx"]) {
        let output = interlace(&zoo, &["inspect", file, "--quiet"]);
        assert_eq!(output.status.code(), Some(0), "{file}: {}", stderr(&output));
        insta::assert_snapshot!(file.trim_end_matches(".onnx").replace(['/', '.'], "__"), stdout(&output));
    }
}
