//! Pictures of several sizes and modes through the processor of the shipped model, compared bit for bit with
//! transformers (`fixtures/processor/pixels.npz`).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use interlace::bundle::Bundle;
use interlace::data::{ImageBytes, MessagePart, Processor};
use serde_json::{Value, json};

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The processor of the shipped model with changed settings of its image processor.
fn processor(settings: &Value) -> Processor {
    let folder = tempfile::tempdir().unwrap();
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];
    for file in files.into_iter().chain(["chat_template.jinja", "processor_config.json", "onnx/embed_tokens.onnx"]) {
        fs::create_dir_all(folder.path().join("onnx")).unwrap();
        fs::copy(fixtures("model").join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("processor_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in settings.as_object().unwrap() {
        config["image_processor"][key] = value.clone();
    }
    fs::write(&path, config.to_string()).unwrap();
    Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap()
}

#[test]
fn pixel_values_equal_transformers_bit_for_bit() {
    let arrays: HashMap<String, tch::Tensor> =
        tch::Tensor::read_npz(fixtures("processor/pixels.npz")).unwrap().into_iter().collect();
    let split = json!({"do_image_splitting": true, "size": {"longest_edge": 128}});
    let mut compared = 0;
    for (way, processor) in [("whole", processor(&json!({}))), ("split", processor(&split))] {
        for (name, want) in &arrays {
            let Some(picture) = name.strip_suffix(&format!(".{way}.pixel_values")) else { continue };
            let image = ImageBytes::file(picture, fixtures("processor/pictures").join(format!("{picture}.png")));
            let encoded = processor.encode_question(picture, &[MessagePart::Image(0)], &[image]).unwrap();
            let found = encoded.images.unwrap().joined("pixel_values").unwrap();
            let found = found.floats().unwrap();
            let shape: Vec<usize> = want.size().iter().skip(1).map(|dim| *dim as usize).collect();
            assert_eq!(found.shape(), shape, "{name}");
            let want = Vec::<f32>::try_from(want.view([-1])).unwrap();
            assert_eq!(found.len(), want.len(), "{name}");
            let differing = found.iter().zip(&want).filter(|(found, want)| found != want).count();
            assert_eq!(differing, 0, "{name}");
            compared += 1;
        }
    }
    assert_eq!(compared, arrays.len() / 2);
}
