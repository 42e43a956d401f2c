//! Ready tensors: the same samples as batches of another program and in an ordinary data set.

use std::fs;
use std::path::{Path, PathBuf};

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{Amount, DataOptions, Dataset, Encoded, Processor};
use interlace::method::{ScoreSettings, Scores, score};
use interlace::onnx::{self, Storage};
use interlace::prompt::Array;
use interlace::runtime::{FeatureCache, Runtime, SessionOptions, VlmSession};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::cli::{interlace, stderr};
use super::families::Family;

fn model_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")
}

fn samples_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet")
}

/// Writes arrays as a file of ready tensors.
fn write(path: &Path, arrays: &[(&str, Array)]) {
    let views: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = arrays
        .iter()
        .map(|(name, array)| {
            let (dtype, bytes) = match array {
                Array::Float(array) => (Dtype::F32, array.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Array::Int(array) => (Dtype::I64, array.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Array::Bool(array) => (Dtype::BOOL, array.iter().map(|&x| u8::from(x)).collect()),
            };
            (name.to_string(), dtype, array.shape().to_vec(), bytes)
        })
        .collect();
    let views = views.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    fs::write(path, safetensors::serialize(views, &None).expect("a file")).expect("write");
}

fn ints(shape: &[usize], data: Vec<i64>) -> Array {
    Array::Int(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(shape), data).expect("shape"))
}

fn floats(shape: &[usize], data: Vec<f32>) -> Array {
    Array::Float(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(shape), data).expect("shape"))
}

/// With a leading axis of 1.
fn batched(array: &Array) -> Array {
    let shape: Vec<usize> = [1].into_iter().chain(array.shape().iter().copied()).collect();
    match array {
        Array::Float(array) => floats(&shape, array.iter().copied().collect()),
        Array::Int(array) => ints(&shape, array.iter().copied().collect()),
        Array::Bool(array) => {
            let data = array.iter().copied().collect();
            Array::Bool(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(&shape), data).expect("shape"))
        }
    }
}

/// The first conversations of a data set, encoded by the processor of the model.
fn encoded(model: &Bundle, data: &Path, count: usize) -> Vec<Encoded> {
    let dataset = Dataset::open_for(data, model, &DataOptions::default()).expect("data");
    let processor = Processor::open(model).expect("processor");
    let indices: Vec<usize> = (0..count).collect();
    let samples = dataset.read(&indices).expect("samples");
    samples.map(|sample| processor.encode_conversation(&sample.expect("sample")).expect("encoded")).collect()
}

fn labels(encoded: &Encoded) -> Vec<i64> {
    encoded.input_ids.iter().zip(&encoded.answer_mask).map(|(&id, &answer)| if answer { id } else { -100 }).collect()
}

/// A file for each conversation: ids, labels, and the inputs of the vision encoder.
fn whole_model_files(folder: &Path, all: &[Encoded], axis_in_front: bool) -> PathBuf {
    let path = folder.join("ready");
    fs::create_dir(&path).expect("folder");
    for (number, encoded) in all.iter().enumerate() {
        let shape = [1, encoded.len()];
        let mut arrays =
            vec![("input_ids", ints(&shape, encoded.input_ids.clone())), ("labels", ints(&shape, labels(encoded)))];
        let pictures = encoded.images.iter().flat_map(|images| &images.pictures);
        let pictures: Vec<_> = pictures.collect();
        if let Some(first) = pictures.first() {
            for (name, _) in first.iter() {
                let parts: Vec<&Array> = pictures.iter().map(|picture| picture.get(name).expect("array")).collect();
                let joined = Array::joined(&parts).expect("arrays of one kind");
                arrays.push((name, if axis_in_front { batched(&joined) } else { joined }));
            }
            // Without padding, the processor of the shipped model omits the mask; another program writes it.
            if axis_in_front && first.get("pixel_attention_mask").is_none() {
                let tiles: usize =
                    pictures.iter().map(|picture| picture.pixel_values().expect("pixels").shape()[0]).sum();
                let real = ndarray::ArrayD::from_elem(ndarray::IxDyn(&[1, tiles, 64, 64]), true);
                arrays.push(("pixel_attention_mask", Array::Bool(real)));
            }
        }
        write(&path.join(format!("{number:03}.safetensors")), &arrays);
    }
    path
}

fn scores_of(model: &Bundle, data: &Path, count: usize) -> Scores {
    let dataset = Dataset::open_for(data, model, &DataOptions::default()).expect("data");
    // The ordinary data set has more samples, so only a copy of its first rows is used.
    assert_eq!(dataset.len(), count, "{}", data.display());
    let settings = ScoreSettings { amount: Amount::All, ..ScoreSettings::default() };
    score(model, &dataset, &settings, Device::Cpu, &Cancel::default()).expect("scores")
}

/// The first rows of the fixture as JSON lines, with pictures as files.
fn ordinary(folder: &Path, count: usize) -> PathBuf {
    let model = Bundle::open(&model_folder()).expect("model");
    let dataset = Dataset::open_for(&samples_file(), &model, &DataOptions::default()).expect("data");
    let indices: Vec<usize> = (0..count).collect();
    let mut lines = Vec::new();
    for sample in dataset.read(&indices).expect("samples") {
        let sample = sample.expect("sample");
        let mut images = Vec::new();
        for (place, image) in sample.images.iter().enumerate() {
            let name = format!("{}-{place}.png", sample.index);
            fs::write(folder.join(&name), image.read().expect("bytes")).expect("write");
            images.push(name);
        }
        let mut messages = Vec::new();
        for turn in &sample.turns {
            let text = turn.user.iter().map(|part| match part {
                interlace::data::MessagePart::Image(_) => "<image>".to_string(),
                interlace::data::MessagePart::Text(text) => text.clone(),
            });
            messages.push(serde_json::json!({"from": "human", "value": text.collect::<String>()}));
            messages.push(serde_json::json!({"from": "gpt", "value": turn.assistant}));
        }
        lines.push(serde_json::json!({"image": images, "conversations": messages}).to_string());
    }
    let path = folder.join("ordinary.jsonl");
    fs::write(&path, lines.join("\n")).expect("write");
    path
}

fn same_scores(a: &Scores, b: &Scores, tolerance: f64) {
    assert_eq!(a.num_samples, b.num_samples);
    assert!(!a.samples.is_empty() && a.samples.len() == b.samples.len(), "{} samples", a.samples.len());
    for (a, b) in a.samples.iter().zip(&b.samples) {
        assert_eq!(a.tokens, b.tokens);
        assert_eq!(a.sim.len(), b.sim.len(), "{}", a.id);
        for (pack, values) in &a.sim {
            assert_eq!(values.len(), b.sim[pack].len(), "{}, packs of {pack}", a.id);
            for (x, y) in values.iter().zip(&b.sim[pack]) {
                assert!((x - y).abs() <= tolerance, "{} and {}: {x} and {y}", a.id, b.id);
            }
        }
    }
}

fn report(folder: &Path, model: &Path, data: &Path) -> Value {
    let (model, data) = (model.to_str().expect("path"), data.to_str().expect("path"));
    let output = interlace(folder, &["eval", model, "--data", data, "-o", "report.json", "--quiet"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&fs::read(folder.join("report.json")).expect("report")).expect("JSON")
}

#[test]
fn ready_tensors_of_a_whole_model_give_the_same_scores() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = Bundle::open(&model_folder()).expect("model");
    let data = ordinary(folder.path(), 6);
    let all = encoded(&bundle, &data, 6);
    assert!(all.iter().any(|encoded| encoded.images.is_some()));
    let ready = whole_model_files(folder.path(), &all, true);
    let (a, b) = (scores_of(&bundle, &data, 6), scores_of(&bundle, &ready, 6));
    same_scores(&a, &b, 0.0);
    assert_eq!(a.modalities, b.modalities);
    assert_eq!(b.samples[2].id, "row 0 of `002.safetensors`");

    let (a, b) = (report(folder.path(), &model_folder(), &data), report(folder.path(), &model_folder(), &ready));
    assert_eq!(a["model"]["predicted_tokens"], b["model"]["predicted_tokens"]);
    assert_eq!(a["model"]["mean_loss"], b["model"]["mean_loss"]);
    assert!(a["model"]["mean_loss"].as_f64().expect("a number") > 0.0);
}

/// Embeddings in batches of three, padded on the left or on the right, without ids.
#[test]
fn padded_batches_of_embeddings_give_the_same_losses() {
    let folder = tempfile::tempdir().expect("folder");
    let bundle = Bundle::open(&model_folder()).expect("model");
    let data = ordinary(folder.path(), 6);
    let all = encoded(&bundle, &data, 6);
    let runtime = Runtime::new(Device::Cpu).expect("runtime");
    let cache = FeatureCache::new(1 << 20);
    let mut vlm = VlmSession::open(&runtime, &bundle, &SessionOptions::default(), &cache).expect("model");
    let ready = folder.path().join("ready");
    fs::create_dir(&ready).expect("folder");
    for (number, group) in all.chunks(3).enumerate() {
        let time = group.iter().map(Encoded::len).max().expect("rows");
        let (mut embeds, mut mask, mut places, mut learned) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for encoded in group {
            let embedded = vlm.embed(&encoded.clone().into_prompt()).expect("embedded");
            let (pad, left) = (time - encoded.len(), number == 0);
            let around = |value: i64, own: Vec<i64>| -> Vec<i64> {
                let filling = vec![value; pad];
                if left { [filling, own].concat() } else { [own, filling].concat() }
            };
            let filling = vec![9f32; pad * embedded.hidden_size];
            embeds.extend(if left { [filling, embedded.data].concat() } else { [embedded.data, filling].concat() });
            mask.extend(around(0, vec![1; encoded.len()]));
            places.extend(around(1, embedded.positions[0].clone()));
            learned.extend(around(-100, labels(encoded)));
        }
        let shape = [group.len(), time];
        let arrays = [
            ("inputs_embeds", floats(&[group.len(), time, 160], embeds)),
            ("attention_mask", ints(&shape, mask)),
            ("position_ids", ints(&shape, places)),
            ("labels", ints(&shape, learned)),
        ];
        write(&ready.join(format!("{number}.safetensors")), &arrays);
    }
    let b = scores_of(&bundle, &ready, 6);
    same_scores(&scores_of(&bundle, &data, 6), &b, 0.0);
    // The tensors do not say which embeddings belong to a picture.
    assert!(b.modalities.is_empty());
    let (a, b) = (report(folder.path(), &model_folder(), &data), report(folder.path(), &model_folder(), &ready));
    assert_eq!(a["model"]["mean_loss"], b["model"]["mean_loss"]);
}

/// Three rows of positions, grids, and DeepStack features.
#[test]
fn ready_tensors_may_hold_grids_and_deepstack_features() {
    let family = Family::open("qwen3_vl", "qwen3_vl");
    let bundle = Bundle::open(&family.here().join("qwen3_vl")).expect("model");
    let data = ordinary(family.here(), 3);
    let all = encoded(&bundle, &data, 3);
    let ready = whole_model_files(family.here(), &all, false);
    same_scores(&scores_of(&bundle, &data, 3), &scores_of(&bundle, &ready, 3), 0.0);
    let model = family.here().join("qwen3_vl");
    let (a, b) = (report(family.here(), &model, &data), report(family.here(), &model, &ready));
    assert_eq!(a["model"]["mean_loss"], b["model"]["mean_loss"]);
}

#[test]
fn an_unknown_graph_input_takes_a_ready_tensor() {
    let folder = tempfile::tempdir().expect("folder");
    let model = folder.path().join("model");
    copy_folder(&model_folder(), &model);
    let file = model.join("onnx/decoder_model_merged.onnx");
    let mut decoder = onnx::load(&file).expect("decoder");
    let id = decoder.graph.input("position_ids").expect("an input");
    decoder.graph.values[id.index()].name = "token_places".to_string();
    let storage = Storage::External { file_name: "decoder_model_merged.onnx_data".into(), chunk_bytes: None };
    onnx::save(&decoder, &folder.path().join("renamed.onnx"), &storage).expect("saved");
    fs::copy(folder.path().join("renamed.onnx"), &file).expect("copy");
    fs::copy(folder.path().join("decoder_model_merged.onnx_data"), model.join("onnx/decoder_model_merged.onnx_data"))
        .expect("copy");
    let bundle = Bundle::open(&model).expect("model");
    let data = ordinary(folder.path(), 4);
    let arguments = ["score", "model", "--data", "ordinary.jsonl", "--fraction", "1", "-o", "scores.json"];
    let output = interlace(folder.path(), &arguments);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in ["`token_places`", "int64", "batch_size", "ready tensor", ".safetensors"] {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
    let all = encoded(&Bundle::open(&model_folder()).expect("model"), &data, 4);
    let ready = whole_model_files(folder.path(), &all, true);
    for (number, encoded) in all.iter().enumerate() {
        let path = ready.join(format!("{number:03}.safetensors"));
        let bytes = fs::read(&path).expect("file");
        let old = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
        let places: Vec<u8> = (0..encoded.len() as i64).flat_map(i64::to_le_bytes).collect();
        let view = TensorView::new(Dtype::I64, vec![1, encoded.len()], &places).expect("a tensor");
        let all = old.tensors().into_iter().chain([("token_places".to_string(), view)]);
        let bytes = safetensors::serialize(all, &None).expect("a file");
        fs::write(&path, bytes).expect("write");
    }
    let original = Bundle::open(&model_folder()).expect("model");
    same_scores(&scores_of(&original, &data, 4), &scores_of(&bundle, &ready, 4), 0.0);
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("folder");
    for entry in fs::read_dir(from).expect("folder") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}

#[test]
fn finetuning_on_ready_tensors_gives_the_same_losses() {
    let folder = tempfile::tempdir().expect("folder");
    let data = ordinary(folder.path(), 6);
    let bundle = Bundle::open(&model_folder()).expect("model");
    let ready = whole_model_files(folder.path(), &encoded(&bundle, &data, 6), true);
    let run = |arguments: &[&str]| {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    };
    let model = model_folder();
    let model = model.to_str().expect("path");
    run(&["score", model, "--data", "ordinary.jsonl", "--fraction", "1", "-o", "scores.json", "--quiet"]);
    run(&["plan", model, "--scores", "scores.json", "--drop-count", "2", "-o", "plan.json", "--quiet"]);
    run(&["prune", model, "--plan", "plan.json", "-o", "pruned", "--quiet"]);
    let learned = |data: &Path, output: &str| -> Value {
        let data = data.to_str().expect("path");
        let mut all = vec!["finetune", "pruned", "--plan", "plan.json", "--data", data, "-o", output, "--quiet"];
        all.extend(["--recipe", "paper", "--max-steps", "2", "--batch-size", "3"]);
        run(&all);
        let path = folder.path().join(format!("{output}.work/finetune.json"));
        serde_json::from_slice(&fs::read(path).expect("report")).expect("JSON")
    };
    let (a, b) = (learned(&data, "one"), learned(&ready, "two"));
    for key in ["first_loss", "last_loss"] {
        let (a, b) = (a[key].as_f64().expect("a loss"), b[key].as_f64().expect("a loss"));
        assert!((a - b).abs() <= 1e-6 * a.abs(), "{key}: {a} and {b}");
    }
    assert_eq!(a["samples"], b["samples"]);
}
