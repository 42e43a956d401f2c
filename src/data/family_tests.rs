//! Compares every processor with its class in Hugging Face transformers on pictures of difficult sizes
//! (`fixtures/processor/families.json`, written by `scripts/processors/families.py`).

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use super::template::{ChatMessage, ContentPart};
use super::*;
use crate::base::sha256_bytes;
use crate::bundle::Bundle;
use crate::prompt::Array;

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/processor").join(path)
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixtures(path)).unwrap()).unwrap()
}

/// A model folder of a family: the files of its processor, and the tokenizer that all families share.
fn folder(family: &Value, shared: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    let mut tokenizer = shared["tokenizer"].clone();
    let bytes = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let added = |(place, token): (usize, &Value)| {
        serde_json::json!({"id": bytes + place, "content": token, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let special = shared["special"].as_array().unwrap().iter().enumerate();
    tokenizer["added_tokens"] = special.map(added).collect();
    save("tokenizer.json", tokenizer.to_string());
    save("model.onnx", String::new());
    for (name, content) in family["files"].as_object().unwrap() {
        save(name, content.as_str().map_or(content.to_string(), str::to_string));
    }
    folder
}

fn settings(family: &Value, back_end: &str) -> ImageSettings {
    ImageSettings {
        back_end: Some(back_end.parse().unwrap()),
        tiles: family["tiles"].as_bool(),
        ..ImageSettings::default()
    }
}

fn messages(messages: &Value) -> Vec<(&'static str, Vec<ContentPart>)> {
    let part = |part: &Value| match part["type"].as_str().unwrap() {
        "image" => ContentPart::Image,
        _ => ContentPart::Text { text: part["text"].as_str().unwrap().to_string() },
    };
    let message = |message: &Value| {
        let role = if message["role"] == "user" { "user" } else { "assistant" };
        (role, message["content"].as_array().unwrap().iter().map(part).collect())
    };
    messages.as_array().unwrap().iter().map(message).collect()
}

/// Run-length encoding: `[[number, times], ..]`.
fn runs(ids: &[i64]) -> Vec<(i64, usize)> {
    ids.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

fn bytes(array: &Array) -> Vec<u8> {
    match array {
        Array::Float(array) => array.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Array::Int(array) => array.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Array::Bool(array) => array.iter().map(|x| u8::from(*x)).collect(),
    }
}

/// The differences in one case; empty when there are none.
fn differences(processor: &Processor, case: &Value, talk: &Value, back_end: &str) -> Vec<String> {
    let name = |name: &Value| name.as_str().unwrap().to_string();
    let pictures: Vec<String> = case["pictures"].as_array().unwrap().iter().map(name).collect();
    let images: Vec<ImageBytes> =
        pictures.iter().map(|name| ImageBytes::file(name, fixtures("awkward").join(name))).collect();
    let prompt = case["add_generation_prompt"].as_bool().unwrap();
    let messages: Vec<ChatMessage> =
        messages(talk).into_iter().map(|(role, parts)| processor.parts(role, parts)).collect();
    let result = processor.encode_messages("case", &messages, &images, prompt);
    let encoded = match (result, case["refusal"].as_str()) {
        (Ok(encoded), None) => encoded,
        (Err(error), Some(refusal)) if error.to_string().contains(refusal) => return Vec::new(),
        (Ok(_), Some(refusal)) => return vec![format!("no error `{refusal}`")],
        (Err(error), _) => return vec![error.to_string()],
    };
    let mut found = Vec::new();
    let want: Vec<(i64, usize)> = serde_json::from_value(case["input_ids"].clone()).unwrap();
    if runs(&encoded.input_ids) != want {
        found.push(format!("ids {:?}, expected {want:?}", runs(&encoded.input_ids)));
    }
    // Prompts without pictures, and some with pictures of different sizes, have no arrays.
    for (key, want) in case["arrays"][back_end].as_object().into_iter().flatten() {
        let array = encoded.images.as_ref().unwrap().joined(key).unwrap();
        let same = array.len() as u64 == want["len"]
            && sha256_bytes(&bytes(&array)).starts_with(want["sha256"].as_str().unwrap());
        if !same {
            found.push(format!("`{key}` of {:?}, expected {} numbers", array.shape(), want["len"]));
        }
    }
    found
}

/// The differences in one family; empty when there are none.
fn family_differences(family: &Value, shared: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let folder = folder(family, shared);
    let bundle = Bundle::open(folder.path()).unwrap();
    assert!(!family["back_ends"].as_array().unwrap().is_empty(), "{}", family["name"]);
    for back_end in family["back_ends"].as_array().unwrap() {
        let back_end = back_end.as_str().unwrap();
        let what = format!("{} {back_end}", family["name"]);
        let has_arrays = |case: &Value| case["arrays"][back_end].as_object().is_some_and(|arrays| !arrays.is_empty());
        assert!(family["cases"].as_array().unwrap().iter().any(has_arrays), "{what} has no expected arrays");
        match Processor::open_with(&bundle, &settings(family, back_end)) {
            Ok(processor) => {
                for case in family["cases"].as_array().unwrap() {
                    let talk = &shared["conversations"][case["messages"].as_u64().unwrap() as usize];
                    let differ = differences(&processor, case, talk, back_end);
                    found.extend(differ.iter().map(|differ| format!("{what} {}: {differ}", case["pictures"])));
                }
            }
            Err(error) => found.push(format!("{what}: {error}")),
        }
    }
    found
}

#[test]
fn processors_of_all_families_equal_hugging_face() {
    let shared = json("families.json");
    let families = shared["families"].as_array().unwrap();
    let found: Vec<String> = families.par_iter().flat_map(|family| family_differences(family, &shared)).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Checks that the tables of image processors, placeholders and families refer to each other, and that every row of the
/// first two is compared.
#[test]
fn every_processor_is_compared_and_belongs_to_a_family() {
    let shared = json("families.json");
    let saved = |key: &str| -> HashSet<String> {
        let files = shared["families"].as_array().unwrap().iter().map(|family| &family["files"]);
        let configs = files.flat_map(|files| files.as_object().unwrap().values());
        let parts = configs.flat_map(|config| [config, &config["image_processor"]]);
        parts.filter_map(|config| Some(config.get(key)?.as_str()?.to_string())).collect()
    };
    let (images, processors) = (saved("image_processor_type"), saved("processor_class"));
    let placeholder = |class: &str| placeholders::ROWS.iter().any(|row| row.classes.contains(&class));
    for row in images::ROWS {
        assert!(row.types.iter().any(|class| images.contains(*class)), "{:?}: no golden values", row.types);
        assert!(row.processor.is_none_or(placeholder), "{:?}: no placeholder row of its processor", row.types);
    }
    for row in placeholders::ROWS {
        assert!(row.classes.iter().any(|class| processors.contains(*class)), "{:?}: no golden values", row.classes);
        let known = FAMILIES.iter().filter_map(|family| family.class).any(|class| row.classes.contains(&class));
        assert!(known, "{:?}: no family has it", row.classes);
    }
    for class in FAMILIES.iter().filter_map(|family| family.class) {
        assert!(placeholder(class), "{class}: no placeholder row");
    }
}

#[test]
fn a_template_that_drops_the_content_is_refused() {
    let shared = json("families.json");
    let family = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == "llava").unwrap();
    let folder = folder(family, &shared);
    let template = "{% for m in messages %}{{ m.role }}:{% for c in m.content if c.type == 'image' %}<image>{% endfor %}{% endfor %}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let open = || Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
    let question = [MessagePart::Text("What is it?".into())];
    let error = open().encode_question("row 3", &question, &[]).unwrap_err().to_string();
    assert!(error.contains("row 3") && error.contains("drops the text `What is it?`"), "{error}");

    // Without the processor's files the default form of the content is a string. This template renders nothing of a
    // string, so it gets parts.
    for file in ["preprocessor_config.json", "processor_config.json"] {
        let _ = fs::remove_file(folder.path().join(file));
    }
    let template = "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content if c.type == 'text' %}{{ c.text }} {% endfor %}{% endfor %}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let encoded = open().encode_question("row 3", &question, &[]).unwrap();
    assert!(open().decode(&encoded.input_ids).unwrap().contains("What is it?"));
}

#[test]
fn user_settings_override_the_image_processor_config() {
    let shared = json("families.json");
    let open = |name: &str, settings: ImageSettings| {
        let family = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == name).unwrap();
        let folder = folder(family, &shared);
        Processor::open_with(&Bundle::open(folder.path()).unwrap(), &settings)
    };
    let features = |name: &str, settings: ImageSettings| {
        let picture = ImageBytes::file("photo.jpeg", fixtures("awkward/photo.jpeg"));
        let question = [MessagePart::Image(0), MessagePart::Text("What?".into())];
        open(name, settings).unwrap().encode_question("row 1", &question, &[picture]).unwrap().image_positions.len()
    };
    let none = ImageSettings::default();
    // The photo has 320 x 240 pixels.
    assert_eq!(features("qwen2_vl", none), 11 * 9);
    assert_eq!(features("qwen2_vl", ImageSettings { max_pixels: Some(28 * 28 * 12), ..none }), 4 * 3);
    assert_eq!(features("qwen2_vl", ImageSettings { min_pixels: Some(28 * 28 * 200), ..none }), 17 * 13);
    assert_eq!(features("llava", ImageSettings { image_size: Some(56), ..none }), 4 * 4);
    assert_eq!(features("pixtral", ImageSettings { image_size: Some(64), ..none }), 4 * 3);
    assert_eq!(features("internvl", none), (12 + 1) * 16);
    assert_eq!(features("internvl", ImageSettings { tiles: Some(false), ..none }), 16);

    let refusals = [
        ("qwen2_vl", ImageSettings { image_size: Some(56), ..none }, "has no size of its own to set"),
        ("qwen2_vl", ImageSettings { tiles: Some(true), ..none }, "cuts no picture into tiles"),
        ("llava", ImageSettings { min_pixels: Some(56), ..none }, "--min-pixels 56"),
        ("idefics3", ImageSettings { back_end: Some(BackEnd::Torchvision), ..none }, "has no Lanczos filter"),
    ];
    for (name, settings, want) in refusals {
        let error = open(name, settings).unwrap_err().to_string();
        assert!(error.contains(want), "{name}: {error}");
    }
}

/// Reference: `fixtures/processor/video.json`, written by `scripts/processors/video.py`.
#[test]
fn a_video_is_encoded_as_frames_with_timestamps() {
    use base64::Engine;
    let (shared, video) = (json("families.json"), json("video.json"));
    let family = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == "qwen3_vl").unwrap();
    let frame = |place: &Value| {
        let text = video["frames"][place.as_u64().unwrap() as usize].as_str().unwrap();
        ImageBytes::held("frame", base64::engine::general_purpose::STANDARD.decode(text).unwrap())
    };
    assert!(!video["cases"].as_array().unwrap().is_empty());
    for case in video["cases"].as_array().unwrap() {
        let folder = folder(family, &shared);
        fs::write(folder.path().join("chat_template.jinja"), video["template"].as_str().unwrap()).unwrap();
        if !case["size"].is_null() {
            let config = serde_json::json!({"video_processor_type": "Qwen3VLVideoProcessor", "size": case["size"]});
            fs::write(folder.path().join("video_preprocessor_config.json"), config.to_string()).unwrap();
        }
        let processor = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
        let frames = case["frames"].as_array().unwrap();
        let time = |place: &Value| place.as_f64().unwrap() / case["fps"].as_f64().unwrap();
        let clip = frames.iter().map(|place| (time(place), frame(place))).collect();
        let clip = ImageBytes::frames("video", clip).unwrap();
        let question = [MessagePart::Image(0), MessagePart::Text("What happens?".into())];
        let encoded = processor.encode_question("case", &question, &[clip]).unwrap();
        let special = shared["special"].as_array().unwrap();
        let id = |token: &str| 256 + special.iter().position(|special| special == token).unwrap() as i64;
        let want: Vec<(i64, usize)> = serde_json::from_value(case["input_ids"].clone()).unwrap();
        let as_image = |(token, times)| (if token == id("<|video_pad|>") { id("<|image_pad|>") } else { token }, times);
        assert_eq!(runs(&encoded.input_ids), want.into_iter().map(as_image).collect::<Vec<_>>(), "{}", case["frames"]);
        let inputs = encoded.images.unwrap();
        let grid: Vec<i64> = serde_json::from_value(case["grid"].clone()).unwrap();
        assert_eq!(inputs.pictures.len() as i64, grid[0]);
        assert!(inputs.pictures.iter().all(|moment| moment.grid_thw() == Some([1, grid[1], grid[2]])));
        let pixels = inputs.joined("pixel_values").unwrap();
        assert!(sha256_bytes(&bytes(&pixels)).starts_with(case["pixels"]["sha256"].as_str().unwrap()), "{case}");
    }
    let llava = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == "llava").unwrap();
    let folder = folder(llava, &shared);
    let processor = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
    let clip = ImageBytes::frames("video 0", vec![(0.0, frame(&0.into())), (0.5, frame(&1.into()))]).unwrap();
    let error = processor.encode_question("case", &[MessagePart::Image(0)], &[clip]).unwrap_err().to_string();
    assert!(error.contains("is a video, which this model's processor does not take"), "{error}");
    let back = ImageBytes::frames("video 0", vec![(1.0, frame(&0.into())), (0.5, frame(&1.into()))]);
    assert!(back.unwrap_err().to_string().contains("do not go back"));
}

#[test]
fn the_token_of_videos_is_read_from_the_processor_s_config() {
    let (shared, video) = (json("families.json"), json("video.json"));
    let family = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == "qwen3_vl").unwrap();
    let folder = folder(family, &shared);
    fs::write(folder.path().join("chat_template.jinja"), video["template"].as_str().unwrap()).unwrap();
    // The name in the tokenizer's config comes first.
    let named = folder.path().join("tokenizer_config.json");
    fs::write(&named, fs::read_to_string(&named).unwrap().replace("\"video_token\"", "\"other_token\"")).unwrap();
    let encode = |token: &str| {
        let path = folder.path().join("processor_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["video_token"] = token.into();
        fs::write(&path, config.to_string()).unwrap();
        let processor = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
        let frame = || ImageBytes::file("photo.jpeg", fixtures("awkward/photo.jpeg"));
        let clip = ImageBytes::frames("video 0", vec![(0.0, frame()), (0.5, frame())]).unwrap();
        processor.encode_question("case", &[MessagePart::Image(0), MessagePart::Text("What?".into())], &[clip])
    };
    encode("<|video_pad|>").unwrap();
    let error = encode("<|a token that is not in the tokenizer|>").unwrap_err().to_string();
    assert!(error.contains("is a video, which this model's processor does not take"), "{error}");
}

#[test]
fn a_family_without_a_template_uses_its_training_prompt() {
    let shared = json("families.json");
    let llava = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == "llava").unwrap();
    let folder = folder(llava, &shared);
    fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    fs::write(folder.path().join("config.json"), r#"{"num_hidden_layers": 1, "model_type": "moondream1"}"#).unwrap();
    let processor = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
    let picture = ImageBytes::file("photo.jpeg", fixtures("awkward/photo.jpeg"));
    let pairs = vec![("What?".to_string(), "a cat".to_string())];
    let sample = Sample {
        index: 0,
        id: "sample 0".into(),
        images: vec![picture],
        system: None,
        turns: pairs
            .into_iter()
            .map(|(text, assistant)| Turn { user: vec![MessagePart::Image(0), MessagePart::Text(text)], assistant })
            .collect(),
        text: None,
        tensors: None,
    };
    let encoded = processor.encode_conversation(&sample).unwrap();
    assert_eq!(processor.decode(&encoded.input_ids).unwrap(), "\n\nQuestion: What?\n\nAnswer: a cat");
    let answer = encoded.input_ids.iter().zip(&encoded.answer_mask).filter(|(_, marked)| **marked).map(|(id, _)| *id);
    assert_eq!(processor.decode(&answer.collect::<Vec<_>>()).unwrap(), " a cat");
}

/// A class name with the suffix `Pil` selects Pillow.
#[test]
fn a_processor_class_with_a_named_back_end_uses_that_back_end() {
    let shared = json("families.json");
    let family = shared["families"].as_array().unwrap().iter().find(|family| family["name"] == "qwen2_vl").unwrap();
    let case = family["cases"].as_array().unwrap().iter().find(|case| case["pictures"][0] == "photo.jpeg").unwrap();
    let folder = folder(family, &shared);
    let talk = &shared["conversations"][case["messages"].as_u64().unwrap() as usize];
    let path = folder.path().join("preprocessor_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (class, back_end, other) in [
        ("Qwen2VLImageProcessorPil", "pil", "torchvision"),
        ("Qwen2VLImageProcessor", "torchvision", "pil"),
        ("Qwen2VLImageProcessorFast", "torchvision", "pil"),
    ] {
        config["image_processor_type"] = class.into();
        fs::write(&path, config.to_string()).unwrap();
        let processor = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
        assert_eq!(differences(&processor, case, talk, back_end), Vec::<String>::new(), "{class}");
        assert_eq!(differences(&processor, case, talk, other).len(), 1, "{class}");
    }
}

/// A model's config that holds a picture budget gives the inputs of the flags.
#[test]
fn stored_picture_budgets_have_the_effect_of_their_flags() {
    use crate::base::Provenance;
    use crate::bundle::BundleWriter;

    let all = json("families.json");
    let mut png = std::io::Cursor::new(Vec::new());
    let pixel = |x: u32, y: u32| image::Rgb([x as u8, y as u8, (x * y) as u8]);
    image::RgbImage::from_fn(450, 300, pixel).write_to(&mut png, image::ImageFormat::Png).unwrap();
    let picture = ImageBytes::held("a picture", png.into_inner());
    let counts = all["families"].as_array().unwrap().par_iter().map(|family| {
        let name = family["name"].as_str().unwrap().to_string();
        let folder = folder(family, &all);
        let bundle = Bundle::open(folder.path()).unwrap();
        let pictures = std::slice::from_ref(&picture);
        let budgets = picture_budgets(&bundle, &picture).unwrap();
        let target = tempfile::tempdir().unwrap();
        for (number, budget) in budgets.iter().enumerate().filter(|(number, _)| [0, budgets.len() - 1].contains(number))
        {
            let want = Processor::open_with(&bundle, &budget.settings).unwrap().images("x", pictures).unwrap();
            let path = target.path().join(number.to_string());
            let mut writer = BundleWriter::create(&bundle, &path).unwrap();
            writer.set_pictures(&budget.keys).unwrap();
            writer.commit(Provenance::new(1, Default::default(), &()).unwrap()).unwrap();
            let written = Processor::open(&Bundle::open(&path).unwrap()).unwrap();
            assert!(written.images("x", pictures).unwrap() == want, "{name}: {:?}", budget.settings);
        }
        (name, budgets.len())
    });
    let counts: std::collections::BTreeMap<String, usize> = counts.collect();
    for (name, least) in [("idefics3", 2), ("qwen2_vl", 3), ("pixtral", 3), ("internvl", 1)] {
        assert!(counts.get(name).is_some_and(|&count| count >= least), "{name}: {counts:?}");
    }
    assert_eq!((counts["llava"], counts["paligemma"]), (0, 0), "{counts:?}");
}
