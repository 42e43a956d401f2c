//! Published model folders, from inspection to an answer on the command line: additional files, processor layouts,
//! components that no verb runs, and families without a known processor.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::cli::{interlace, stderr, stdout};
use super::families::{Family, fixtures};

/// The folder of a family, changed to match a published one.
struct Published {
    family: Family,
    name: &'static str,
}

impl Published {
    fn new(archive: &str, name: &'static str) -> Self {
        let family = Family::open(archive, name);
        for picture in ["photo.jpeg", "grey.png"] {
            fs::copy(fixtures().join("pictures").join(picture), family.here().join(picture)).expect("a picture");
        }
        Published { family, name }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.family.here().join(self.name).join(file)
    }

    fn write(&self, file: &str, content: impl AsRef<[u8]>) -> &Self {
        fs::create_dir_all(self.path(file).parent().expect("a folder")).expect("folders");
        fs::write(self.path(file), content).expect("write");
        self
    }

    fn copy(&self, from: &str, to: &str) -> &Self {
        self.write(to, fs::read(self.path(from)).expect("a file"))
    }

    fn remove(&self, file: &str) -> &Self {
        fs::remove_file(self.path(file)).expect("remove");
        self
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(file)).expect("a file")).expect("JSON")
    }

    /// Edits a JSON file, or creates it from an empty object.
    fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) -> &Self {
        let mut value = if self.path(file).exists() { self.json(file) } else { json!({}) };
        change(&mut value);
        self.write(file, value.to_string())
    }

    /// Runs a verb; returns standard output and standard error.
    fn run(&self, arguments: &[&str]) -> String {
        let output = interlace(self.family.here(), arguments);
        let printed = stdout(&output) + &stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{} {arguments:?}: {printed}", self.name);
        printed
    }

    /// Runs every verb: with `pictures` on pictures, else on running text with a warning that contains `why`.
    fn check(&self, pictures: bool, why: &str) {
        let here = self.family.here();
        let printed = self.run(&["inspect", self.name]);
        assert!(printed.contains(why), "{}: {printed}", self.name);
        let data = if pictures { "data.json" } else { "text.jsonl" };
        let question = json!({"from": "human", "value": "<image>What is in this picture?"});
        let talk = json!([{"image": "photo.jpeg", "conversations": [question, {"from": "gpt", "value": "A house."}]}]);
        let text = "A red square, a blue circle and a green line. ".repeat(4);
        let text = json!({ "text": text }).to_string();
        fs::write(here.join(data), if pictures { talk.to_string() } else { text.clone() + "\n" }).expect("data");
        let cut = if pictures { &[][..] } else { &["--sequence-length", "16"] };
        let printed =
            self.run(&[&["score", self.name, "--data", data, "--samples", "1", "-o", "s.json"], cut].concat());
        assert!(printed.contains(why), "{}: {printed}", self.name);
        self.run(&["plan", self.name, "--scores", "s.json", "--drop-count", "1", "-o", "plan.json"]);
        self.run(&["prune", self.name, "--plan", "plan.json", "-o", "pruned"]);
        let finetune =
            ["finetune", "pruned", "--plan", "plan.json", "--data", data, "--recipe", "paper", "-o", "healed"];
        self.run(&[&finetune[..], &["--batch-size", "1", "--accumulation-steps", "1"], cut].concat());
        let bench = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/data/bench-small.tsv");
        let eval =
            ["eval", "healed", "-o", "report.json", "--limit", "1", "--data", if pictures { bench } else { data }];
        let more = if pictures { &["--max-new-tokens", "2"][..] } else { cut };
        self.run(&[&eval[..], more].concat());
        let shown = if pictures { &["--image", "photo.jpeg"][..] } else { &[] };
        self.run(&[&["generate", "healed", "--prompt", "What is it?", "--max-tokens", "2"][..], shown].concat());
    }

    fn carried(&self) -> Vec<String> {
        let record = fs::read(self.family.here().join("pruned/interlace.json")).expect("a record");
        let record: Value = serde_json::from_slice(&record).expect("JSON");
        record["carried"]
            .as_array()
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .map(|file| file.as_str().expect("a name").into())
            .collect()
    }
}

/// Files that repositories contain beside a model.
#[test]
fn qwen2_vl_with_unrelated_files_passes_every_verb() {
    let folder = Published::new("qwen2_vl", "qwen2_vl");
    let beside = ["configuration.json", "model.safetensors.index.json", "params.json", "modeling_qwen2_vl.py"];
    for file in beside {
        folder.write(file, "{}");
    }
    folder.write("demo.html", "<p>").write(".gitattributes", "*.onnx filter=lfs").write("README.md", "# Model\n");
    folder.write("assets/example.png", fs::read(fixtures().join("pictures/grey.png")).expect("a picture"));
    folder.check(true, "");
    let carried = folder.carried();
    assert!(beside.iter().all(|file| carried.iter().any(|found| found == file)), "{carried:?}");
    assert!(folder.family.here().join("pruned/demo.html").exists());
}

/// Files of 2023: only the model config says how pictures are processed.
#[test]
fn llava_without_a_processor_config_passes_every_verb() {
    let folder = Published::new("llava", "llava");
    let template = fs::read_to_string(folder.path("chat_template.jinja")).expect("a template");
    folder.remove("processor_config.json").remove("chat_template.jinja");
    folder.edit("chat_template.json", |json| json["chat_template"] = template.into());
    folder.edit("preprocessor_config.json", |json| {
        json["feature_extractor_type"] = json["image_processor_type"].take();
        json.as_object_mut().expect("an object").remove("image_processor_type");
        json.as_object_mut().expect("an object").remove("processor_class");
    });
    folder.check(true, "");
}

/// Processor files as transformers 5 saves them: all in one file, with the template in the tokenizer config.
#[test]
fn gemma3_with_nested_processor_files_passes_every_verb() {
    let folder = Published::new("gemma3", "gemma3");
    let template = fs::read_to_string(folder.path("chat_template.jinja")).expect("a template");
    let images = folder.json("preprocessor_config.json");
    folder.remove("preprocessor_config.json").remove("chat_template.jinja");
    folder.edit("processor_config.json", |json| json["image_processor"] = images);
    folder.edit("tokenizer_config.json", |json| json["chat_template"] = template.into());
    folder.check(true, "");
}

/// Flat and nested files that agree, with the template in the processor config.
#[test]
fn smolvlm_with_flat_and_nested_processor_files_passes_every_verb() {
    let folder = Published::new("smolvlm", "smolvlm");
    let template = fs::read_to_string(folder.path("chat_template.jinja")).expect("a template");
    let images = folder.json("preprocessor_config.json");
    folder.remove("chat_template.jinja");
    folder.edit("processor_config.json", |json| {
        json["image_processor"] = images;
        json["chat_template"] = template.into();
    });
    folder.check(true, "");
}

/// Precision variants of each graph, and an audio encoder.
#[test]
fn gemma4_with_an_audio_encoder_and_variants_is_pruned_and_answers() {
    let folder = Published::new("gemma4", "gemma4");
    for part in ["vision_encoder", "embed_tokens", "decoder_model_merged"] {
        folder.copy(&format!("onnx/{part}.onnx"), &format!("onnx/{part}_q4.onnx"));
    }
    folder.copy("onnx/vision_encoder.onnx", "onnx/audio_encoder.onnx");
    folder.check_steps_of_gemma4();
    assert!(folder.family.here().join("pruned/onnx/decoder_model_merged_q4.onnx").exists());
}

impl Published {
    /// Layers whose keys other layers read cannot be healed, so the plan names a layer after them.
    fn check_steps_of_gemma4(&self) {
        self.run(&["inspect", self.name]);
        self.run(&["plan", self.name, "--drop", "6", "-o", "plan.json"]);
        self.run(&["prune", self.name, "--plan", "plan.json", "-o", "pruned"]);
        assert!(self.carried().contains(&"onnx/audio_encoder.onnx".to_string()), "{:?}", self.carried());
        let ask = ["generate", "pruned", "--image", "photo.jpeg", "--prompt", "What is it?", "--max-tokens", "2"];
        self.run(&ask);
    }
}

/// All graphs exist in one precision only.
#[test]
fn internvl_with_a_single_variant_passes_every_verb() {
    let folder = Published::new("internvl", "internvl");
    for part in ["vision_encoder", "embed_tokens", "decoder_model_merged"] {
        let file = format!("onnx/{part}.onnx");
        folder.copy(&file, &format!("onnx/{part}_fp16.onnx")).remove(&file);
    }
    folder.check(true, "");
}

/// A folder of GenAI's builder with no other config.
#[test]
fn qwen2_5_vl_with_only_a_genai_config_passes_every_verb() {
    let folder = Published::new("qwen2_5_vl", "qwen2_5_vl_genai");
    folder.remove("config.json");
    folder.check(true, "");
}

#[test]
fn qwen2_5_vl_in_mobius_layout_passes_every_verb() {
    let folder = Published::new("qwen2_5_vl", "qwen2_5_vl_mobius");
    let beside = [("audio_encoder/config.json", "{}"), ("inference.py", "import onnxruntime\n")];
    for (file, content) in beside {
        folder.write(file, content);
    }
    folder.check(true, "");
    assert_eq!(folder.carried(), beside.map(|(file, _)| file));
    for (file, content) in beside {
        for made in ["pruned", "healed"] {
            let copy = fs::read_to_string(folder.family.here().join(made).join(file));
            assert_eq!(copy.expect("a copy"), content, "{made}/{file}");
        }
    }
}

/// The embeddings graph merges image features, with the file names and processor of Phi models.
#[test]
fn families_without_a_processor_run_on_text_with_a_warning() {
    let folder = Published::new("qwen2_5_vl", "qwen2_5_vl_mobius");
    for (from, to) in [
        ("embedding/model.onnx", "onnx/prepare_inputs_embeds.onnx"),
        ("decoder/model.onnx", "onnx/model.onnx"),
        ("vision_encoder/model.onnx", "onnx/vision_encoder.onnx"),
    ] {
        folder.copy(from, to).remove(from);
        fs::remove_dir(folder.path(from).parent().expect("a folder")).expect("remove");
    }
    for (model_type, class) in
        [("phi3_v", Some("Phi3VImageProcessor")), ("kimi_vl", None), ("internvl_chat", Some("CLIPFeatureExtractor"))]
    {
        folder.edit("config.json", |json| json["model_type"] = model_type.into());
        folder.edit("preprocessor_config.json", |json| {
            *json = json!({"auto_map": {"AutoProcessor": "processing.Processor"}, "num_crops": 4});
            if let Some(class) = class {
                json["image_processor_type"] = class.into();
            }
        });
        folder.write("processing.py", "class Processor: ...\n");
        for made in ["pruned", "healed"] {
            let _ = fs::remove_dir_all(folder.family.here().join(made));
        }
        folder.check(false, "its processor is code of its own repository");
    }
}

/// Neither the processor nor the model type is known.
#[test]
fn a_model_of_an_unknown_family_runs_on_text_with_a_warning() {
    let folder = Published::new("internvl", "internvl");
    folder.edit("config.json", |json| json["model_type"] = "novel_vl".into());
    folder.edit("preprocessor_config.json", |json| json["image_processor_type"] = "NovelImageProcessor".into());
    folder.check(false, "image processor `NovelImageProcessor`");
}

/// A separate projector graph under the file name that exporters use.
#[test]
fn llava_with_a_separate_projector_passes_every_verb() {
    let folder = Published::new("llava", "llava_projector");
    for (from, to) in [
        ("image_encoder.onnx", "onnx/vision_encoder.onnx"),
        ("multi_modal_projector.onnx", "onnx/multi_modal_projector.onnx"),
        ("embed_tokens.onnx", "onnx/embed_tokens.onnx"),
        ("decoder.onnx", "onnx/decoder_model_merged.onnx"),
    ] {
        folder.copy(from, to).remove(from);
    }
    folder.remove("export.json");
    folder.check(true, "");
}

/// Tiles need a graph that packs their features; the published graphs do not.
#[test]
fn llava_onevision_encodes_one_view_with_a_warning() {
    let folder = Published::new("llava_onevision", "llava_onevision");
    let printed = folder.run(&["inspect", "llava_onevision"]);
    for part in ["warning: a picture is one view", "onnx/vision_encoder.onnx` has no input `image_sizes`"] {
        assert!(printed.contains(part), "expected `{part}` in: {printed}");
    }
    let ask = ["generate", "llava_onevision", "--image", "photo.jpeg", "--prompt", "What?", "--max-tokens", "2"];
    folder.run(&ask);
    let output = interlace(folder.family.here(), &[&ask[..], &["--image-tiles", "true"]].concat());
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in ["image tiles", "has no input `image_sizes`", "leave `--image-tiles` out"] {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
}

/// A graph that packs the features of tiles gets tiles without a flag.
#[test]
fn llava_onevision_encodes_tiles_for_a_graph_that_packs_them() {
    let folder = Published::new("llava_onevision_tiles", "llava_onevision_tiles");
    let printed = folder.run(&["inspect", "llava_onevision_tiles"]);
    assert!(!printed.contains("a picture is one view"), "{printed}");
    folder.check(true, "");
    let ask = ["generate", "llava_onevision_tiles", "--image", "photo.jpeg", "--prompt", "What?", "--max-tokens", "2"];
    for more in [&[][..], &["--image-tiles", "true"]] {
        let printed = folder.run(&[&ask[..], more].concat());
        assert!(printed.contains("99 prompt tokens"), "{more:?}: {printed}");
    }
    let output = interlace(folder.family.here(), &[&ask[..], &["--image-tiles", "false"]].concat());
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in ["no image tiles", "has an input `image_sizes`", "leave `--image-tiles` out"] {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
    let export = ["export", "llava_onevision_tiles", "--to", "transformers-js", "-o", "exported"];
    let output = interlace(folder.family.here(), &export);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("reads `image_sizes`, which transformers.js never feeds"), "{message}");
}

/// The likelihood of answers is computed from the logits of the head, not from hidden states.
#[test]
fn janus_with_a_separate_head_is_evaluated() {
    let folder = Published::new("janus", "janus");
    let bench = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/data/bench-small.tsv");
    folder.run(&["eval", "janus", "--data", bench, "--limit", "2", "--max-new-tokens", "2", "-o", "report.json"]);
    let report: Value =
        serde_json::from_slice(&fs::read(folder.family.here().join("report.json")).expect("a report")).expect("JSON");
    let found = report["model"]["likelihood"]["mean_log_likelihood"].as_f64();
    assert!(found.is_some_and(|found| (-20.0..0.0).contains(&found)), "{report}");
}

/// An image size that the graph does not accept is refused before the graph runs.
#[test]
fn an_image_size_that_the_graph_does_not_accept_is_refused() {
    let folder = Published::new("internvl", "internvl");
    let ask = ["generate", "internvl", "--image", "photo.jpeg", "--prompt", "What?", "--image-size", "57"];
    let output = interlace(folder.family.here(), &ask);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("57, 57]") && message.contains("leave `--image-size`"), "{message}");
}
