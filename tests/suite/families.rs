//! Whole pipelines of model families compared with Hugging Face: prompts, pixels, positions, logits, answers, losses
//! and layer similarities, for the whole network and for one with dropped layers.
//!
//! `fixtures/families/NAME.tar.zst` holds tiny networks as real exporters write them, with the results of Hugging
//! Face's processor and model (`scripts/families` creates both).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{
    Amount, BackEnd, DataOptions, Dataset, Encoded, ImageBytes, ImageInputs, ImageSettings, MessagePart, Processor,
    Sample, Subset, Turn,
};
use interlace::method::LossMeter;
use interlace::prompt::Array;
use interlace::runtime::{FeatureCache, Runtime, SessionOptions, Step, VlmSession};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::cli::{interlace, stderr};

const LOGITS: f64 = 1e-4;
const LOSS: f64 = 1e-5;
const SIMILARITY: f64 = 1e-5;
/// Names of the prompts for pruned networks; logits are compared on all of them.
const ANSWERED: [&str; 4] = ["photo", "two", "none", "turns"];

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families")
}

/// The model folder of one family and the results of Hugging Face, in a temporary folder.
pub struct Family {
    folder: tempfile::TempDir,
    name: String,
    pub expected: Value,
    /// The vision encoder is the same in the dense and in the pruned network.
    features: Arc<FeatureCache>,
}

impl Family {
    /// Unpacks one family of an archive.
    pub fn open(archive: &str, name: &str) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let file = File::open(fixtures().join(format!("{archive}.tar.zst"))).expect("archive");
        tar::Archive::new(zstd::Decoder::new(file).expect("zstd")).unpack(folder.path()).expect("unpacks");
        let expected = fs::read(folder.path().join(format!("{name}.json"))).expect("expected values");
        let expected = serde_json::from_slice(&expected).expect("JSON");
        Family { folder, name: name.to_string(), expected, features: FeatureCache::new(64 << 20) }
    }

    pub fn here(&self) -> &Path {
        self.folder.path()
    }

    /// Layers to drop: `drop`, or `heal_drop` if healing drops others.
    pub fn drop_list(&self, key: &str) -> String {
        let drop = self.expected.get(key).unwrap_or(&self.expected["drop"]).as_array().expect("layers");
        drop.iter().map(Value::to_string).collect::<Vec<_>>().join(",")
    }

    /// Losses and similarities with the image back end that transformers uses by default.
    fn by_default(&self, key: &str) -> &Value {
        match (self.expected.get("torchvision"), key) {
            (Some(other), _) => &other[key],
            (None, "loss") => &self.expected["learned"]["loss"],
            (None, _) => &self.expected[key],
        }
    }

    /// The processor with the image back end of the expected values.
    pub fn processor(&self, bundle: &Bundle) -> Processor {
        let back_end = text(&self.expected["backend"]).parse::<BackEnd>().expect("a back end");
        let settings = ImageSettings { back_end: Some(back_end), ..ImageSettings::default() };
        Processor::open_with(bundle, &settings).expect("a processor")
    }

    /// Prompts that Hugging Face's classes accept.
    pub fn cases(&self) -> impl Iterator<Item = (&str, &Value)> {
        let cases = self.expected["cases"].as_object().expect("cases").iter();
        cases.map(|(name, case)| (name.as_str(), case)).filter(|(_, case)| case.get("refused").is_none())
    }

    /// Runs a verb in the folder of the family.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = interlace(self.here(), arguments);
        assert_eq!(output.status.code(), Some(0), "{} {arguments:?}: {}", self.name, stderr(&output));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Writes conversations in LLaVA's layout, and their pictures.
    pub fn dataset(&self, file: &str, conversations: &[&Value]) -> PathBuf {
        for entry in fs::read_dir(fixtures().join("pictures")).expect("pictures") {
            let path = entry.expect("entry").path();
            fs::copy(&path, self.here().join(path.file_name().expect("name"))).expect("copy");
        }
        let entries: Vec<Value> = conversations.iter().map(|turns| entry_of(turns)).collect();
        let path = self.here().join(file);
        fs::write(&path, Value::Array(entries).to_string()).expect("data");
        path
    }
}

/// Turns `[pictures, question, answer]` as an entry of LLaVA's layout.
fn entry_of(turns: &Value) -> Value {
    let (mut images, mut messages) = (Vec::new(), Vec::new());
    for turn in turns.as_array().expect("turns") {
        let pictures = turn[0].as_array().expect("pictures");
        images.extend(pictures.iter().cloned());
        let question = format!("{}{}", "<image>".repeat(pictures.len()), text(&turn[1]));
        messages.push(json!({"from": "human", "value": question}));
        messages.push(json!({"from": "gpt", "value": turn[2].as_str().unwrap_or("x")}));
    }
    match images.is_empty() {
        true => json!({"conversations": messages}),
        false => json!({"image": images, "conversations": messages}),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

fn integers(value: &Value) -> Vec<i64> {
    value.as_array().expect("integers").iter().map(|x| x.as_i64().expect("an integer")).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// Turns `[pictures, question, answer]` as the library's type.
pub fn sample(turns: &Value) -> Sample {
    let mut images = Vec::new();
    let turn = |turn: &Value| {
        let mut user = Vec::new();
        for picture in turn[0].as_array().expect("pictures") {
            user.push(MessagePart::Image(images.len()));
            images.push(ImageBytes::file(text(picture), fixtures().join("pictures").join(text(picture))));
        }
        user.push(MessagePart::Text(text(&turn[1]).to_string()));
        Turn { user, assistant: turn[2].as_str().unwrap_or_default().to_string() }
    };
    let turns = turns.as_array().expect("turns").iter().map(turn).collect();
    Sample { index: 0, id: "sample".into(), images, system: None, turns, text: None, tensors: None }
}

/// A loaded processor and model.
struct Pipeline {
    processor: Processor,
    model: VlmSession,
}

impl Pipeline {
    fn open(folder: &Path, back_end: &str, features: &Arc<FeatureCache>) -> Self {
        let bundle = Bundle::open(folder).expect("a model folder");
        let back_end = back_end.parse::<BackEnd>().expect("a back end");
        let settings = ImageSettings { back_end: Some(back_end), ..ImageSettings::default() };
        let processor = Processor::open_with(&bundle, &settings).expect("a processor");
        let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
        let model = VlmSession::open(&runtime, &bundle, &SessionOptions::default(), features).expect("a model");
        Pipeline { processor, model }
    }

    /// Positions `[rows][T]` and logits `[T, V]` of a prompt.
    fn logits(&mut self, encoded: Encoded) -> (Vec<Vec<i64>>, Vec<f32>) {
        let prompt = encoded.into_prompt();
        let embedded = self.model.embed(&prompt).expect("embeddings");
        let step = Step::prefill(&[&embedded], false).expect("a step");
        let (logits, _) = self.model.decoder_mut().step(&step, None).expect("logits");
        (embedded.positions.clone(), logits.to_f32().expect("floats").into_owned())
    }

    fn answer(&mut self, encoded: Encoded, tokens: usize) -> Vec<i64> {
        let prompt = encoded.into_prompt();
        self.model.generate(&[prompt], tokens, &Cancel::default()).expect("an answer").remove(0)
    }
}

/// The arrays of all pictures, joined. Pictures of different sizes are padded on the right and at the bottom.
fn whole(images: &ImageInputs, key: &str, shape: &[i64]) -> interlace::base::Result<Array> {
    // Graph inputs that Hugging Face's processor names differently.
    let key = if key == "image_position_ids" { "pixel_position_ids" } else { key };
    let pictures: Option<Vec<_>> = images.pictures.iter().map(|picture| picture.get(key)?.floats()).collect();
    let Some(pictures) = pictures.filter(|all| key == "pixel_values" && all.iter().all(|one| one.ndim() == 4)) else {
        return images.joined(key);
    };
    // The patches of all pictures, concatenated in one row.
    let widths: usize = pictures.iter().map(|one| one.shape()[3]).sum();
    if shape[0] == 1 && shape[3] == widths as i64 {
        let views: Vec<_> = pictures.iter().map(|one| one.view()).collect();
        return Ok(Array::Float(ndarray::concatenate(ndarray::Axis(3), &views).expect("one row")));
    }
    let largest = |axis: usize| pictures.iter().map(|one| one.shape()[axis]).max().unwrap_or(0);
    let padded = pictures.iter().map(|one| {
        let mut all = ndarray::Array4::<f32>::zeros((one.shape()[0], one.shape()[1], largest(2), largest(3)));
        all.slice_mut(ndarray::s![.., .., ..one.shape()[2], ..one.shape()[3]]).assign(one);
        Array::Float(all.into_dyn())
    });
    let padded: Vec<Array> = padded.collect();
    Array::joined(&padded.iter().collect::<Vec<_>>())
}

/// Pixels and related arrays equal those of Hugging Face's processor for a whole prompt.
///
/// Bit for bit if its class computes with Pillow. If it computes with torchvision, which rounds differently, the
/// tolerance is 2/255 of the range of normalised values.
fn check_inputs(name: &str, expected: &Value, backend: &str, encoded: &Encoded) {
    let Some(images) = &encoded.images else {
        assert!(expected.get("pixel_values").is_none(), "{name}: has no pictures");
        return;
    };
    for (key, want) in expected.as_object().expect("inputs") {
        let others = ["token_type_ids", "mm_token_type_ids", "labels", "num_soft_tokens_per_image", "batch_num_images"];
        if others.contains(&key.as_str()) {
            continue;
        }
        let found = whole(images, key, &integers(&want["shape"])).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size: i64 = integers(&want["shape"]).iter().product();
        assert_eq!(found.len() as i64, size, "{name}: {key} has shape {:?}, not {}", found.shape(), want["shape"]);
        match found {
            Array::Float(array) => {
                let values: Vec<f32> = array.iter().copied().collect();
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                if format!("{:x}", Sha256::digest(&bytes)) == text(&want["sha256"]) {
                    continue;
                }
                let (places, wanted) = (integers(&want["places"]), floats(&want["values"]));
                assert!(!places.is_empty() && places.len() == wanted.len(), "{name}: {key}: {} places", places.len());
                let pairs = places.iter().zip(wanted).map(|(&p, want)| (f64::from(values[p as usize]), want));
                let far = pairs.clone().filter(|(found, want)| (found - want).abs() > 2.0 / 255.0 / 0.2).count();
                assert!(backend == "torchvision" && far == 0, "{name}: {key}: {:?}", pairs.collect::<Vec<_>>());
            }
            Array::Int(array) => check_integers(name, key, &array.iter().copied().collect::<Vec<_>>(), want),
            Array::Bool(array) => {
                check_integers(name, key, &array.iter().map(|&x| i64::from(x)).collect::<Vec<_>>(), want)
            }
        }
    }
}

fn check_integers(name: &str, key: &str, found: &[i64], want: &Value) {
    match want.get("values") {
        Some(values) => assert_eq!(found, integers(values), "{name}: {key}"),
        None => assert_eq!(found.iter().sum::<i64>(), want["sum"].as_i64().expect("a sum"), "{name}: {key}"),
    }
}

/// The largest difference between the sampled logits.
fn distance(found: &[f32], tokens: usize, vocabulary: &[i64], want: &Value) -> f64 {
    let width = found.len() / tokens;
    let mut worst: f64 = 0.0;
    let (places, rows) = (integers(&want["places"]), want["values"].as_array().expect("rows"));
    assert!(!places.is_empty() && places.len() == rows.len(), "{} places, {} rows", places.len(), rows.len());
    for (place, row) in places.into_iter().zip(rows) {
        let row = floats(row);
        assert_eq!(row.len(), vocabulary.len());
        for (&word, want) in vocabulary.iter().zip(row) {
            worst = worst.max((f64::from(found[place as usize * width + word as usize]) - want).abs());
        }
    }
    worst
}

/// Compares all results of one network on every prompt. `key` names the network in the expected values.
pub fn check_prompts(family: &Family, folder: &Path, key: &str) {
    let back_end = text(&family.expected["backend"]);
    let mut pipeline = Pipeline::open(folder, back_end, &family.features);
    let by_default = Processor::open(&Bundle::open(folder).expect("a model folder")).expect("a processor");
    let vocabulary = integers(&family.expected["vocabulary"]);
    let mut checked = 0;
    for (case, want) in family.cases() {
        let name = format!("{} {key} {case}", family.name);
        let sample = sample(&want["turns"]);
        let encoded = pipeline.processor.encode_prompt(&sample).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(encoded.input_ids, integers(&want["input_ids"]), "{name}");
        if key == "dense" {
            check_inputs(&name, &want["inputs"], back_end, &encoded);
        }
        if key == "dense"
            && let Some(pixels) = family.expected.get("torchvision").and_then(|other| other["cases"].get(case))
        {
            let encoded = by_default.encode_prompt(&sample).expect("the same prompt");
            check_inputs(&name, &json!({"pixel_values": pixels}), "torchvision", &encoded);
        }
        let tokens = encoded.input_ids.len();
        let (positions, logits) = pipeline.logits(encoded.clone());
        if let Some(rows) = want["position_ids"].as_array() {
            assert_eq!(positions, rows.iter().map(integers).collect::<Vec<_>>(), "{name}");
        }
        let far = distance(&logits, tokens, &vocabulary, &want["logits"][key]);
        assert!(far <= LOGITS, "{name}: logits differ by {far:e}");
        if key == "dense" || ANSWERED.contains(&case) {
            assert_eq!(pipeline.answer(encoded, 8), integers(&want["greedy"][key]), "{name}");
        }
        checked += 1;
    }
    assert!(checked >= 12, "{}: {checked} prompts", family.name);
}

/// The trained tokens of each conversation, and the loss of all conversations as one batch.
fn check_losses(family: &Family, folder: &Path, key: &str) {
    let processor = Processor::open(&Bundle::open(folder).expect("a model folder")).expect("a processor");
    let learned = &family.expected["learned"];
    let turns = learned["turns"].as_array().expect("conversations");
    let conversations = learned["conversations"].as_array().expect("conversations");
    assert!(!turns.is_empty() && turns.len() == conversations.len(), "{}: {} turns", family.name, turns.len());
    for (turns, want) in turns.iter().zip(conversations) {
        let encoded = processor.encode_conversation(&sample(turns)).expect("a conversation");
        assert_eq!(encoded.input_ids, integers(&want["input_ids"]), "{}", family.name);
        let answers: Vec<i64> =
            (0..).zip(&encoded.answer_mask).filter(|(_, learned)| **learned).map(|(at, _)| at).collect();
        assert_eq!(answers, integers(&want["answers"]), "{} {turns}", family.name);
    }
    let data = family.dataset("learned.json", &turns.iter().collect::<Vec<_>>());
    let dataset = Dataset::open(&data, &DataOptions::default()).expect("data");
    let bundle = Bundle::open(folder).expect("a model folder");
    let subset = Subset { amount: Amount::All, seed: 0 };
    let mut meter = LossMeter::new(&bundle, &dataset, subset, Device::Cpu, &Cancel::default()).expect("a meter");
    let found = meter.loss(&[]).expect("a loss");
    let losses = family.by_default("loss")[key].as_array().expect("losses");
    let sum = |field: &str| losses.iter().map(|loss| loss[field].as_f64().expect("a number")).sum::<f64>();
    let want = sum("sum") / sum("tokens");
    assert!((found - want).abs() <= LOSS * want, "{} {key}: loss {found}, Hugging Face {want}", family.name);
}

/// Compares `score` with the reference on the same prompt: the stream as each layer's module returns it.
fn check_scores(family: &Family) {
    let turns = &family.expected["cases"]["photo"]["turns"];
    family.dataset("photo.json", &[turns]);
    family.run(&["score", &family.name, "--data", "photo.json", "--samples", "1", "-o", "scores.json", "-q"]);
    let scores: Value =
        serde_json::from_slice(&fs::read(family.here().join("scores.json")).expect("scores")).expect("JSON");
    for pack in ["1", "2", "3"] {
        let found = floats(&scores["samples"][0]["sim"][pack]);
        let want = floats(&family.by_default("similarities")["recorded"][pack]);
        assert_eq!(found.len(), want.len(), "{} pack {pack}", family.name);
        let far = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far <= SIMILARITY, "{} pack {pack}: {found:?}, Hugging Face {want:?}", family.name);
    }
}

/// Compares the loss of the first healing step with Hugging Face's network without the same layers. The expected values
/// are under `key`.
fn check_healing(family: &Family, deepstack: &[&str], key: &str) {
    let learned = &family.expected["learned"];
    let data = family.dataset("heal.json", &[&learned["turns"][0]]);
    let drop = family.drop_list("heal_drop");
    let (planned, healed) = (format!("planned-{key}"), format!("healed-{key}"));
    let key = if family.expected.get("heal_drop").is_some() { "healing" } else { key };
    family.run(&["plan", &family.name, "--drop", &drop, "-o", "plan.json", "-q"]);
    family.run(&[&["prune", &family.name, "--plan", "plan.json", "-o", &planned, "-q"], deepstack].concat());
    let settings = ["--recipe", "paper", "--learning-rate", "1e-3", "--batch-size", "1", "--accumulation-steps", "1"];
    let mut arguments = vec!["finetune", &planned, "--plan", "plan.json", "--data", data.to_str().expect("path")];
    arguments.extend(settings);
    arguments.extend(["--epochs", "3", "-o", &healed, "--json", "-q"]);
    let report: Value = serde_json::from_str(&family.run(&arguments)).expect("JSON");
    let loss = |field: &str| family.by_default("loss")[key][0][field].as_f64().expect("a number");
    let (found, want) = (report["first_loss"].as_f64().expect("a loss"), loss("sum") / loss("tokens"));
    assert!((found - want).abs() <= LOSS * want, "{}: first loss {found}, Hugging Face {want}", family.name);
    assert!(report["last_loss"].as_f64().expect("a loss") < found, "{}: {report}", family.name);
    let verified: Value = serde_json::from_str(&family.run(&["--json", "verify", &healed, "-q"])).expect("JSON");
    let checks = verified["checks"].as_array().expect("checks");
    let status = |name: &str| checks.iter().find(|check| check["name"] == name).map(|check| check["status"].clone());
    let sees = family.here().join(&family.name).join("onnx/vision_encoder.onnx").exists();
    assert!(!sees || status("picture and prompt") == Some("passed".into()), "{}: {verified}", family.name);
}

/// Compares the prompts and losses of one network.
fn check_network(family: &Family, folder: &str, key: &str) {
    let folder = family.here().join(folder);
    check_prompts(family, &folder, key);
    check_losses(family, &folder, key);
}

/// The whole pipeline of a family whose layers can be dropped without further changes.
fn check(archive: &str, name: &str) {
    let family = Family::open(archive, name);
    family.run(&["inspect", name]);
    check_network(&family, name, "dense");
    family.run(&["prune", name, "--drop", &family.drop_list("drop"), "-o", "pruned", "-q"]);
    check_network(&family, "pruned", "pruned");
    check_scores(&family);
    check_healing(&family, &[], "pruned");
    if ["qwen2_vl", "qwen2_5_vl", "glm4v", "paddleocr_vl", "internvl", "gemma3_two_way", "paligemma_two_way"]
        .contains(&name)
    {
        check_adapters(&family, "pruned");
    }
}

/// The whole pipeline of a family with features added after its first layers. They keep their place, or move to the
/// first kept layers.
fn check_deepstack(archive: &str, name: &str) {
    let family = Family::open(archive, name);
    family.run(&["inspect", name]);
    check_network(&family, name, "dense");
    check_scores(&family);
    for (rule, key) in [("keep", "pruned_keep"), ("shift", "pruned")] {
        family.run(&["prune", name, "--drop", &family.drop_list("drop"), "--deepstack", rule, "-o", rule, "-q"]);
        check_network(&family, rule, key);
        check_healing(&family, &["--deepstack", rule], key);
        check_adapters(&family, key);
    }
}

/// Adapters on all layers, the first one too, before which nothing adds features: they begin at zero, so the loss of the
/// first step is that of Hugging Face's network.
fn check_adapters(family: &Family, key: &str) {
    let planned = format!("planned-{key}");
    let arguments = ["finetune", &planned, "--plan", "plan.json", "--data", "heal.json", "--recipe", "paper"];
    let how = ["--learning-rate", "1e-2", "--batch-size", "1", "--accumulation-steps", "1", "--epochs", "8"];
    let out = format!("adapted-{key}");
    let adapters = ["--lora-rank", "4", "--lora-layers", "all", "-o", &out, "--json", "-q"];
    let report: Value = serde_json::from_str(&family.run(&[&arguments[..], &how, &adapters].concat())).expect("JSON");
    let expected =
        &family.by_default("loss")[if family.expected.get("heal_drop").is_some() { "healing" } else { key }][0];
    let want = expected["sum"].as_f64().expect("a number") / expected["tokens"].as_f64().expect("a number");
    let loss = |field: &str| report[field].as_f64().expect("a loss");
    assert!((loss("first_loss") - want).abs() <= LOSS * want, "{}: {report}, Hugging Face {want}", family.name);
    assert!(loss("last_loss") < loss("first_loss"), "{}: {report}", family.name);
}

/// Compares the output of `generate` for a prompt whose answer ids are known.
fn check_generate(family: &Family, answer: &Value, arguments: &[&str]) {
    let folder = family.here().join(&family.name);
    let processor = Processor::open(&Bundle::open(&folder).expect("a model folder")).expect("a processor");
    let common = ["--json", "generate", &family.name, "--max-tokens", "8", "--image-back-end", "pil"];
    let found: Value = serde_json::from_str(&family.run(&[&common, arguments].concat())).expect("JSON");
    let want = processor.decode(&integers(answer)).expect("text");
    let found = found["answers"][0]["answer"].as_str().expect("an answer");
    assert_eq!(found.trim(), want.trim(), "{} {arguments:?}", family.name);
}

#[test]
fn qwen3_vl_answers_about_two_pictures() {
    let family = Family::open("qwen3_vl", "qwen3_vl");
    family.dataset("pictures.json", &[]);
    let case = &family.expected["cases"]["two"];
    let [first, second] = [0, 1].map(|place| text(&case["turns"][0][0][place]));
    let question = text(&case["turns"][0][1]);
    check_generate(&family, &case["greedy"]["dense"], &["--image", first, "--image", second, "--prompt", question]);
}

#[test]
fn qwen3_vl_reads_a_video() {
    let family = Family::open("qwen3_vl", "qwen3_vl");
    family.dataset("pictures.json", &[]);
    let want = &family.expected["video"];
    let frames = want["frames"].as_array().expect("frames");
    let path = |frame: &Value| family.here().join(text(&frame[1]));
    let frame = |frame: &Value| (frame[0].as_f64().expect("a time"), ImageBytes::file("frame", path(frame)));
    let clip = ImageBytes::frames("video", frames.iter().map(frame).collect()).expect("a video");
    let question = text(&want["question"]);
    let mut pipeline = Pipeline::open(&family.here().join("qwen3_vl"), "pil", &family.features);
    let parts = [MessagePart::Image(0), MessagePart::Text(question.into())];
    let encoded = pipeline.processor.encode_question("video", &parts, &[clip]).expect("a prompt");
    // The encoded ids have the image token at the features of a video.
    let special = fs::read(family.here().join("qwen3_vl/config.json")).expect("a config");
    let config: Value = serde_json::from_slice(&special).expect("JSON");
    let (image, video) = (config["image_token_id"].as_i64(), config["video_token_id"].as_i64());
    let as_image = |id: i64| if Some(id) == video { image.expect("an id") } else { id };
    let ids: Vec<i64> = integers(&want["input_ids"]).into_iter().map(as_image).collect();
    assert_eq!(encoded.input_ids, ids);
    let pixels = encoded.images.as_ref().expect("moments").joined("pixel_values").expect("pixels");
    let bytes: Vec<u8> = pixels.floats().expect("floats").iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(format!("{:x}", Sha256::digest(&bytes)), text(&want["pixels"]));
    let (positions, logits) = pipeline.logits(encoded.clone());
    let rows = want["position_ids"].as_array().expect("positions");
    assert_eq!(positions, rows.iter().map(integers).collect::<Vec<_>>());
    let vocabulary = integers(&family.expected["vocabulary"]);
    let far = distance(&logits, ids.len(), &vocabulary, &want["logits"]);
    assert!(far <= LOGITS, "logits differ by {far:e}");
    assert_eq!(pipeline.answer(encoded, 8), integers(&want["greedy"]));
    let frames: Vec<String> = frames.iter().map(|frame| format!("{}={}", frame[0], text(&frame[1]))).collect();
    let flags = frames.iter().flat_map(|frame| ["--video-frame", frame]).collect::<Vec<_>>();
    check_generate(&family, &want["greedy"], &[&flags[..], &["--prompt", question]].concat());
}

/// The graph lacks DeepStack inputs that the config declares.
#[test]
fn a_graph_without_deepstack_is_warned_about() {
    let family = Family::open("qwen3_vl", "qwen3_vl_plain");
    family.dataset("photo.json", &[&family.expected["cases"]["photo"]["turns"]]);
    for (arguments, warned) in [
        (&["inspect", "qwen3_vl_plain"][..], true),
        (&["score", "qwen3_vl_plain", "--data", "photo.json", "-o", "plain.json"], true),
        (&["verify", "qwen3_vl_plain"], true),
        (&["inspect", "qwen3_vl"], false),
        (&["score", "qwen3_vl", "--data", "photo.json", "-o", "whole.json"], false),
        (&["inspect", "qwen3_vl_packed"], false),
        (&["inspect", "qwen3_vl_masked"], false),
    ] {
        let output = interlace(family.here(), arguments);
        let printed = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {printed}");
        assert_eq!(printed.contains("layers whose features go into the decoder"), warned, "{arguments:?}: {printed}");
    }
}

/// Gemma 3n has four parallel residual streams: everything works except scoring and healing.
#[test]
fn gemma3n() {
    let family = Family::open("gemma3n", "gemma3n");
    family.run(&["inspect", "gemma3n"]);
    check_network(&family, "gemma3n", "dense");
    family.run(&["prune", "gemma3n", "--drop", &family.drop_list("drop"), "-o", "pruned", "-q"]);
    check_network(&family, "pruned", "pruned");
    family.dataset("photo.json", &[&family.expected["cases"]["photo"]["turns"]]);
    family.run(&["plan", "gemma3n", "--drop", &family.drop_list("heal_drop"), "-o", "plan.json", "-q"]);
    family.run(&["prune", "gemma3n", "--plan", "plan.json", "-o", "planned", "-q"]);
    family.run(&["verify", "planned", "-q"]);
    for (arguments, why) in [
        (&["score", "gemma3n", "--data", "photo.json", "-o", "scores.json"][..], "prune --drop"),
        (
            &[
                "finetune",
                "planned",
                "--plan",
                "plan.json",
                "--data",
                "photo.json",
                "--recipe",
                "paper",
                "-o",
                "healed",
            ],
            "streams side by side",
        ),
    ] {
        let output = interlace(family.here(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
    }
}

macro_rules! families {
    ($check:ident: $($test:ident = $archive:literal $name:literal),* $(,)?) => {
        $(#[test] fn $test() { $check($archive, $name); })*
    };
}

families! { check:
    qwen2_vl = "qwen2_vl" "qwen2_vl",
    qwen2_5_vl = "qwen2_5_vl" "qwen2_5_vl",
    qwen2_5_vl_in_mobius_layout = "qwen2_5_vl" "qwen2_5_vl_mobius",
    qwen2_5_vl_in_genai_layout = "qwen2_5_vl" "qwen2_5_vl_genai",
    qwen3_vl_without_deepstack = "qwen3_vl" "qwen3_vl_plain",
    smolvlm = "smolvlm" "smolvlm",
    idefics3 = "idefics3" "idefics3",
    llava = "llava" "llava",
    llava_with_a_projector_of_its_own = "llava" "llava_projector",
    llava_in_one_graph = "llava" "llava_single",
    llava_onevision = "llava_onevision" "llava_onevision",
    llava_onevision_with_tiles = "llava_onevision_tiles" "llava_onevision_tiles",
    fast_vlm = "fast_vlm" "fast_vlm",
    moondream = "moondream" "moondream",
    internvl = "internvl" "internvl",
    gemma3 = "gemma3" "gemma3",
    gemma3_two_way = "gemma3" "gemma3_two_way",
    gemma4 = "gemma4" "gemma4",
    minicpm_v = "minicpm_v" "minicpm_v",
    janus = "janus" "janus",
    paligemma = "paligemma" "paligemma",
    paligemma_two_way = "paligemma" "paligemma_two_way",
    mistral3 = "mistral3" "mistral3",
    mistral3_one_picture_at_a_time = "mistral3" "mistral3_plain",
    lfm2_vl = "lfm2_vl" "lfm2_vl",
    glm4v = "glm4v" "glm4v",
    glm_ocr = "glm_ocr" "glm_ocr",
    paddleocr_vl = "paddleocr_vl" "paddleocr_vl",
    aya_vision = "aya_vision" "aya_vision",
    ovis2 = "ovis2" "ovis2",
}

families! { check_deepstack:
    qwen3_vl = "qwen3_vl" "qwen3_vl",
    qwen3_vl_with_a_mask = "qwen3_vl" "qwen3_vl_masked",
    qwen3_vl_packed = "qwen3_vl" "qwen3_vl_packed",
    qwen3_vl_moe = "qwen3_vl_moe" "qwen3_vl_moe",
    granite_docling = "granite_docling" "granite_docling",
}
