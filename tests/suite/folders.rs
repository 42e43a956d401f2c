//! Model folders of every layout are opened, and written with the configs of a pruned model.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use interlace::base::Provenance;
use interlace::bundle::{Bundle, BundleWriter, LayerEdit, Record, Role, Tower};
use serde_json::Value;

use super::cli::{interlace, model_copy, stderr, stdout};

fn zoo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(path)
}

/// Writes the folder with configs without layers 2 and 5. The graphs stay unchanged.
fn without_two_layers(folder: &Path, out: &Path) {
    let bundle = Bundle::open(folder).unwrap();
    let mut writer = BundleWriter::create(&bundle, out).unwrap();
    for component in bundle.components().iter().filter(|component| component.role.is_decoder()) {
        writer.save(component, &interlace::onnx::load(&bundle.path_of(component)).unwrap()).unwrap();
    }
    writer.drop_layers(&LayerEdit::new(Tower::Text, 8, &[2, 5]).unwrap(), None, Vec::new()).unwrap();
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap()).unwrap();
}

/// The model folder `FOLDER` or `FOLDER/COMPONENT` below `root`, with one graph and the weights that it shares with
/// other graphs of the zoo. Returns its path.
fn with_shared_weights(root: &Path, graph: &str, target: &str) -> PathBuf {
    let target = root.join(target);
    std::fs::create_dir_all(&target).unwrap();
    std::fs::copy(zoo(graph), target.join("model.onnx")).unwrap();
    std::fs::copy(zoo(graph).with_file_name("weights.data"), target.join("weights.data")).unwrap();
    if target.parent() == Some(root) {
        for file in ["config.json", "ort_config.json"] {
            std::fs::copy(zoo("optimum/llama-with-past").join(file), target.join(file)).unwrap();
        }
        return target;
    }
    target.parent().unwrap().to_path_buf()
}

#[test]
fn every_folder_layout_is_opened_and_written() {
    let cases = [
        ("genai/llama-fp32-embeds", "genai", Role::Decoder),
        ("genai/qwen3_vl-fp32-embeds", "genai", Role::Decoder),
        ("hfexp/llama-cpu", "transformers-exporter", Role::DecoderWithPast),
        ("optimum/llama-with-past", "optimum", Role::Decoder),
    ]
    .map(|(path, layout, role)| (zoo(path), layout, role));
    let shared = tempfile::tempdir().unwrap();
    let cases = cases.into_iter().chain([
        (with_shared_weights(shared.path(), "qwen3_vl/mobius.onnx", "mobius/decoder"), "mobius", Role::Decoder),
        (with_shared_weights(shared.path(), "llama/optimum-O2.onnx", "optimum"), "optimum", Role::Decoder),
    ]);
    let folder = tempfile::tempdir().unwrap();
    for (number, (source, layout, role)) in cases.enumerate() {
        let path = source.display();
        let before = Bundle::open(&source).unwrap();
        assert_eq!(before.layout().name, layout, "{path}");
        let out = folder.path().join(number.to_string());
        without_two_layers(&source, &out);
        let after = Bundle::open(&out).unwrap();
        assert_eq!(after.layout().name, layout, "{path}");
        let component = after.require(role).unwrap();
        assert_eq!(component, before.require(role).unwrap(), "{path}");
        if before.config().is_some() {
            assert_eq!(before.require_config().unwrap().num_hidden_layers, Some(8), "{path}");
            assert_eq!(after.require_config().unwrap().num_hidden_layers, Some(6), "{path}");
        }
        let history = after.record().unwrap().unwrap().history;
        assert_eq!(Record::original_layers(&history, Tower::Text, 6).unwrap(), [0, 1, 3, 4, 6, 7], "{path}");
    }
}

#[test]
fn the_cache_trees_in_export_json_lose_the_dropped_layers() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    without_two_layers(&zoo("hfexp/llama-cpu"), &out);
    let export: Value = serde_json::from_slice(&std::fs::read(out.join("export.json")).unwrap()).unwrap();
    for (component, key, tensors) in
        [("prefill", "in_spec", 0), ("prefill", "out_spec", 12), ("decode", "in_spec", 12), ("decode", "out_spec", 12)]
    {
        let text = export["components"][component]["metadata"][key].as_str().unwrap();
        let mut stack = vec![serde_json::from_str::<Value>(text).unwrap()];
        let mut caches = 0;
        while let Some(value) = stack.pop() {
            if value["type"].as_str().is_some_and(|kind| kind.ends_with("DynamicCache")) {
                let context: Value = serde_json::from_str(value["context"].as_str().unwrap()).unwrap();
                assert_eq!(context["s"]["layers"].as_array().unwrap().len(), 6);
                assert_eq!(value["children_spec"].as_array().unwrap().len(), tensors);
                caches += 1;
            }
            match value {
                Value::Array(items) => stack.extend(items),
                Value::Object(map) => stack.extend(map.into_iter().map(|(_, value)| value)),
                _ => {}
            }
        }
        assert_eq!(caches, 1, "{component} {key}");
    }
}

#[test]
fn an_unreadable_variant_is_skipped_with_a_warning() {
    let root = tempfile::tempdir().unwrap();
    let folder = with_shared_weights(root.path(), "llama/optimum-O2.onnx", "optimum");
    let sound = std::fs::read(folder.join("model.onnx")).unwrap();
    for variant in ["q2f16", "q1", "q1f16"] {
        std::fs::write(folder.join(format!("model_{variant}.onnx")), &sound).unwrap();
    }
    std::fs::write(folder.join("model_q2.onnx"), &sound[..sound.len() / 2]).unwrap();
    let inspected = interlace(root.path(), &["inspect", "optimum"]);
    let pruned = interlace(root.path(), &["prune", "optimum", "--drop", "2,5", "-o", "out"]);
    for output in [inspected, pruned] {
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{message}");
        assert!(
            message.contains("warning") && message.contains("`model_q2.onnx`") && message.contains("cut off"),
            "{message}"
        );
    }
    let plan = ["plan", "optimum", "--drop", "2,5", "-o", "plan.json"];
    let message = stderr(&interlace(root.path(), &plan));
    assert!(message.contains("`finetune` takes the float decoder `model.onnx` alone"), "{message}");
    let again = interlace(root.path(), &["prune", "optimum", "--drop", "2", "-o", "again"]);
    let want = "leave out the other variants (model_q2f16.onnx, model_q1.onnx, model_q1f16.onnx) with its `--variant`";
    assert!(stderr(&again).contains(want), "{}", stderr(&again));
    let out = root.path().join("out");
    assert!(!out.join("model_q2.onnx").exists());
    let written = Bundle::open(&out).unwrap();
    let variants: Vec<&str> = written.variants(Role::Decoder).map(|component| component.variant.as_str()).collect();
    assert_eq!(variants, ["", "q2f16", "q1", "q1f16"]);

    // A variant named by `--variant` has to be readable, and so has the default one.
    for (variant, status) in [("q1", 0), ("q2", 2)] {
        let arguments = ["export", "optimum", "--to", "triton", "--variant", variant, "-o", variant];
        let output = interlace(root.path(), &arguments);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert!(status == 0 || stderr(&output).contains("model_q2.onnx"), "{}", stderr(&output));
    }
    std::fs::rename(folder.join("model_q2.onnx"), folder.join("model.onnx")).unwrap();
    for arguments in [&["inspect", "optimum"][..], &["prune", "optimum", "--drop", "2,5", "-o", "other"]] {
        let output = interlace(root.path(), arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("model.onnx"), "{}", stderr(&output));
    }
    assert!(!root.path().join("other").exists());
}

#[test]
fn files_beside_the_model_are_copied_and_listed() {
    let folder = tempfile::tempdir().expect("folder");
    let model = model_copy(folder.path());
    for (file, text) in [("modeling_x.py", "import torch"), (".msc", "\u{1}"), ("README.md", "# Dense model\n")] {
        fs::write(model.join(file), text).expect("write");
    }
    let model = model.display().to_string();
    let output = interlace(folder.path(), &["prune", &model, "--drop", "2", "-o", "out"]);
    assert!(stdout(&output).contains("carried along as it is: `.msc`, `modeling_x.py`"), "{}", stdout(&output));
    let out = folder.path().join("out");
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("interlace.json")).expect("record")).expect("JSON");
    assert_eq!(record["carried"], serde_json::json!([".msc", "modeling_x.py"]));
    let card = fs::read_to_string(out.join("README.md")).expect("card");
    assert!(card.contains("1 of 16 layers of the language model removed: layer 2"), "{card}");
    assert!(card.contains("made from `model`") && card.ends_with("# Dense model\n"), "{card}");
}
