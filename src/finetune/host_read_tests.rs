//! Values that passes copy from the GPU to the host: none, for every decoder among the fixtures.

use std::path::{Path, PathBuf};

use super::cut::Cut;
use super::settings::{Lora, Precision};
use super::student::Student;
use crate::base::Result;
use crate::ir::Model;
use crate::torch::Hold;

/// All graphs below `fixtures/`, sorted.
fn graphs() -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "onnx") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The network that trains a layer and runs all layers from it on.
fn student(model: &Model, layer: usize) -> Result<Student> {
    let mut cut = Cut::new(model, &[layer])?;
    if cut.expand_trained().is_err() {
        cut = Cut::new(model, &[layer])?;
        cut.adapt(Lora { rank: 2, alpha: 2.0, seed: 1 }, &[])?;
    }
    let suffix = cut.suffix()?;
    Student::compile(&cut, suffix, Precision::F32, Hold::Stored, tch::Device::Cpu)
}

/// Lengths of the samples, which ONNX Runtime's grouped-query attention reads on the host, are computed from the mask on the
/// CPU. All else that operators read there are shapes and constants.
#[test]
fn no_pass_copies_a_value_from_the_gpu_to_the_host() {
    const LENGTHS: &str = "/model/attn_mask_reformat/attn_mask_subgraph/Sub/Cast/output_0";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let (mut checked, mut others) = (0, Vec::new());
    for path in graphs() {
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        let model = crate::onnx::load(&path).unwrap();
        // Some graphs share weights between their first layers.
        let Some(student) = (0..4).find_map(|layer| student(&model, layer).ok()) else {
            others.push(name);
            continue;
        };
        assert_eq!(student.copied_from_device(), Vec::<&str>::new(), "{name}");
        let lengths: &[&str] = if name.starts_with("zoo/genai") { &[LENGTHS] } else { &[] };
        assert_eq!(student.computed_ahead(), lengths, "{name}");
        checked += 1;
    }
    // Two of the others are no decoders, and no layer of three can be trained, because they share weights.
    let refused =
        ["model/onnx/embed_tokens.onnx", "onnx/every-field.onnx", "streams/gemma3n.onnx", "streams/gemma4.onnx"];
    assert_eq!(others, [&refused[..], &["streams/mllama.onnx"]].concat());
    assert_eq!(checked, 27);
}
