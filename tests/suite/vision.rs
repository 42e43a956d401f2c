//! `prune --component vision_encoder` on a model folder, compared with the same tower in PyTorch with those layers
//! deleted.

use std::collections::HashMap;
use std::path::Path;

use interlace::base::Device;
use interlace::ir::DataType;
use interlace::runtime::{Runtime, SessionOptions, TensorValue};
use interlace::{onnx, torch};

use super::cli::{interlace, stderr};

/// Largest difference of the image features from PyTorch's, computed by ONNX Runtime and by the interpreter.
fn distances(graph: &Path, expected: &str) -> (f64, f64) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/expected").join(expected);
    let data: HashMap<String, tch::Tensor> = tch::Tensor::read_npz(path).unwrap().into_iter().collect();
    let (pixels, mask) = (&data["in.pixel_values"], &data["in.pixel_attention_mask"]);
    let want = &data["exp.image_features"];
    let shape = |tensor: &tch::Tensor| -> Vec<usize> { tensor.size().iter().map(|&dim| dim as usize).collect() };
    let fed = [
        TensorValue::new(&shape(pixels), Vec::<f32>::try_from(pixels.reshape([-1])).unwrap()).unwrap(),
        TensorValue::from_i64(
            DataType::Bool,
            &shape(mask),
            Vec::try_from(mask.to_kind(tch::Kind::Int64).reshape([-1])).unwrap(),
        )
        .unwrap(),
    ];
    let mut session = Runtime::new(Device::Cpu).unwrap().session(graph, &SessionOptions::default()).unwrap();
    let feeds = [("pixel_values", &fed[0]), ("pixel_attention_mask", &fed[1])];
    let outputs = session.run(&feeds, None).unwrap();
    let (_, found) = outputs.iter().find(|(name, _)| *name == "image_features").unwrap();
    let found = tch::Tensor::from_slice(&found.to_f32().unwrap()).reshape(want.size());
    let program = torch::Program::compile(&onnx::load(graph).unwrap(), &torch::Options::default()).unwrap();
    let inputs = [
        (program.value("pixel_values").unwrap(), pixels.shallow_clone()),
        (program.value("pixel_attention_mask").unwrap(), mask.shallow_clone()),
    ];
    let interpreted =
        tch::no_grad(|| program.run(&inputs, &[program.value("image_features").unwrap()])).unwrap().remove(0);
    let far = |found: &tch::Tensor| (found - want).abs().max().double_value(&[]);
    (far(&found), far(&interpreted))
}

#[test]
fn a_pruned_vision_tower_equals_pytorch() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let folder = tempfile::tempdir().unwrap();
    for (drop, expected, layers) in
        [("", "vision_nodrop.npz", 5), ("3", "vision_drop_3.npz", 4), ("0,4", "vision_drop_0_4.npz", 3)]
    {
        let mut graph = model.clone();
        if !drop.is_empty() {
            graph = folder.path().join(expected);
            let out = graph.to_str().unwrap();
            let prune =
                ["prune", model.to_str().unwrap(), "--component", "vision_encoder", "--drop", drop, "-o", out, "-q"];
            let output = interlace(folder.path(), &prune);
            assert!(output.status.success(), "{}", stderr(&output));
            // The language model is unchanged.
            for file in ["onnx/decoder_model_merged.onnx_data", "onnx/embed_tokens.onnx"] {
                assert_eq!(
                    std::fs::read(graph.join(file)).unwrap(),
                    std::fs::read(model.join(file)).unwrap(),
                    "{file}"
                );
            }
        }
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(graph.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["vision_config"]["num_hidden_layers"], layers, "{drop}");
        let (runtime, interpreter) = distances(&graph.join("onnx/vision_encoder.onnx"), expected);
        assert!(runtime <= 1e-4 && interpreter <= 1e-4, "without {drop}: {runtime:e}, interpreted {interpreter:e}");
    }
    // The expected values of the towers differ, so a wrong tower would be noticed.
    let (runtime, interpreter) = distances(&model.join("onnx/vision_encoder.onnx"), "vision_drop_3.npz");
    assert!(runtime > 0.1 && interpreter > 0.1, "{runtime:e}, {interpreter:e}");
}
