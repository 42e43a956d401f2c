use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::*;
use crate::ir::{Model, TensorData};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(name)
}

fn weights(model: &Model) -> HashMap<String, (crate::ir::DataType, Vec<u64>, Vec<u8>)> {
    let graph = &model.graph;
    let entry = |(id, tensor): &(crate::ir::ValueId, crate::ir::Tensor)| {
        (graph.name(*id).to_string(), (tensor.dtype, tensor.dims.clone(), tensor.bytes().to_vec()))
    };
    graph.body.initializers.iter().map(entry).collect()
}

const FILES: &[&str] = &["smolvlm/ts17.onnx", "genai/qwen3_vl-int4-embeds/model.onnx", "qwen3_vl/mobius.onnx"];

#[test]
fn what_is_written_reads_back_equal() {
    for name in FILES {
        let model = load(&fixture(name)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let external = Storage::External { file_name: "x.onnx.data".into(), chunk_bytes: Some(200_000) };
        for (file, storage) in [("inline.onnx", Storage::Inline), ("x.onnx", external)] {
            let path = folder.path().join(file);
            save(&model, &path, &storage).unwrap();
            let again = load(&path).unwrap();
            assert_eq!(weights(&model), weights(&again), "{name}");
            assert_eq!(format!("{:?}", model.graph.body.nodes), format!("{:?}", again.graph.body.nodes), "{name}");
            assert_eq!(format!("{:?}", model.functions), format!("{:?}", again.functions), "{name}");
            assert_eq!(model.opset_imports, again.opset_imports);
            assert_eq!(model.metadata, again.metadata);
        }
    }
}

#[test]
fn small_tensors_stay_inside_and_large_ones_leave() {
    let model = load(&fixture(FILES[0])).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.onnx");
    save(&model, &path, &Storage::External { file_name: "x.onnx.data".into(), chunk_bytes: None }).unwrap();
    for (_, tensor) in &load(&path).unwrap().graph.body.initializers {
        assert_eq!(tensor.is_external(), tensor.byte_len() >= INLINE_LIMIT);
        if tensor.byte_len() >= INLINE_LIMIT {
            assert!(matches!(tensor.data, TensorData::Mapped { .. }));
        }
    }
}

fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.onnx");
    std::fs::write(&path, bytes).unwrap();
    load(&path).unwrap_err().to_string()
}

#[test]
fn a_cut_off_file_is_refused_at_any_length() {
    let bytes = std::fs::read(fixture(FILES[1])).unwrap();
    assert!(refusal(&[]).contains("empty"));
    for length in [1, 10, 1000, bytes.len() / 2, bytes.len() - 1] {
        let message = refusal(&bytes[..length]);
        assert!(message.contains("bad.onnx"), "{message}");
    }
}

#[test]
fn a_group_is_refused_before_parsing() {
    assert!(refusal(&[0x0b, 0x0b, 0x0b]).contains("group"));
    // The same inside a graph inside the model.
    assert!(refusal(&[0x3a, 0x02, 0x0b, 0x0b]).contains("group"));
}

#[test]
fn deep_nesting_is_refused_before_parsing() {
    // graph > node > attribute > graph > node ...
    let mut message = Vec::new();
    for depth in 0..402 {
        let field = [6u64, 5, 1][depth % 3];
        let mut outer = Vec::new();
        wire::put_field(&mut outer, field, &message);
        message = outer;
    }
    let mut model = Vec::new();
    wire::put_field(&mut model, 7, &message);
    let text = refusal(&model);
    assert!(text.contains("nested deeper"), "{text}");
}

#[test]
fn external_data_stays_inside_the_folder() {
    let source = fixture(FILES[1]);
    for (location, want) in
        [("../x.data", "without `..`"), ("/etc/passwd", "relative path"), ("link.data", "leads out")]
    {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("m");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(folder.path().join("x.data"), vec![0; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("../x.data", inner.join("link.data")).unwrap();
        let mut bytes = std::fs::read(&source).unwrap();
        let old = b"model.onnx.data";
        let new = format!("{location:/<15}");
        let new = if location == "../x.data" {
            "./../../../x.da".to_string()
        } else if location == "link.data" {
            "./././link.data".to_string()
        } else {
            new
        };
        assert_eq!(new.len(), old.len());
        let mut position = 0;
        while let Some(found) = bytes[position..].windows(old.len()).position(|window| window == old) {
            bytes[position + found..position + found + old.len()].copy_from_slice(new.as_bytes());
            position += found + old.len();
        }
        let path = inner.join("model.onnx");
        std::fs::write(&path, bytes).unwrap();
        let message = load(&path).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
}
