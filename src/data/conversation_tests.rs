//! Compares the shipped model's processor with transformers on the same conversations
//! (`fixtures/processor/conversations.json`), and checks which tokens are marked as answers.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::row::{RawMessage, SourceRow, Speaker};
use super::template::{ChatMessage, Content, ContentPart};
use super::tests::png;
use super::*;
use crate::bundle::Bundle;

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// A copy of the model's text files with an empty decoder, and with changed settings of the image processor.
fn processor(settings: &Value) -> (tempfile::TempDir, Processor) {
    processor_with(settings, None)
}

/// As `processor`, with another chat template.
fn processor_with(settings: &Value, template: Option<&str>) -> (tempfile::TempDir, Processor) {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixtures("model")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json" || extension == "jinja") {
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let patch = |config: &mut Value| {
        for (key, value) in settings.as_object().unwrap() {
            config[key] = value.clone();
        }
    };
    for (file, pointer) in [("preprocessor_config.json", ""), ("processor_config.json", "/image_processor")] {
        let path = folder.path().join(file);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.pointer_mut(pointer).into_iter().for_each(patch);
        fs::write(path, config.to_string()).unwrap();
    }
    if let Some(template) = template {
        fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    }
    fs::create_dir(folder.path().join("onnx")).unwrap();
    fs::write(folder.path().join("onnx/decoder_model_merged.onnx"), "").unwrap();
    let processor = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap();
    (folder, processor)
}

fn pictures(case: &Value) -> Vec<ImageBytes> {
    let name = |name: &Value| format!("{}.png", name.as_str().unwrap());
    let image = |value| ImageBytes::file(name(value), fixtures("processor/pictures").join(name(value)));
    case["pictures"].as_array().unwrap().iter().map(image).collect()
}

fn messages(case: &Value) -> Vec<ChatMessage> {
    let part = |part: &Value| match part["type"].as_str().unwrap() {
        "image" => ContentPart::Image,
        _ => ContentPart::Text { text: part["text"].as_str().unwrap().to_string() },
    };
    let message = |message: &Value| ChatMessage {
        role: if message["role"] == "user" { "user" } else { "assistant" },
        content: Content::Parts(message["content"].as_array().unwrap().iter().map(part).collect()),
    };
    case["messages"].as_array().unwrap().iter().map(message).collect()
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

#[test]
fn texts_and_token_ids_equal_hugging_face() {
    let reference: Value =
        serde_json::from_slice(&fs::read(fixtures("processor/conversations.json")).unwrap()).unwrap();
    assert!(!reference["cases"].as_array().unwrap().is_empty());
    for case in reference["cases"].as_array().unwrap() {
        let split = case["do_image_splitting"].as_bool().unwrap();
        let (_folder, processor) = processor(&reference["settings"][if split { "split" } else { "whole" }]);
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let encoded = processor.encode_messages("case", &messages(case), &pictures(case), prompt).unwrap();
        assert_eq!(encoded.input_ids, ids(&case["input_ids"]), "{}", case["name"]);
        let frames = encoded.images.as_ref().map_or(0, |images| images.joined("pixel_values").unwrap().shape()[0]);
        assert_eq!(encoded.image_positions.len(), frames * 16);
    }
}

/// A conversation of alternating user and assistant texts.
fn sample(images: Vec<ImageBytes>, texts: &[&str]) -> Sample {
    let speakers = [Speaker::User, Speaker::Assistant].into_iter().cycle();
    let messages = texts.iter().zip(speakers).map(|(text, speaker)| RawMessage::text(speaker, text.to_string()));
    SourceRow::of_messages("sample 0".into(), images, messages.collect()).unwrap().sample(0)
}

#[test]
fn the_answer_mask_covers_answers_and_their_end_tokens() {
    let (_folder, processor) = processor(&serde_json::json!({}));
    let picture = ImageBytes::held("picture", png(3));
    let sample = sample(vec![picture], &["What is it?", "cat", "Sure?", "yes"]);
    let encoded = processor.encode_conversation(&sample).unwrap();
    let marked: Vec<i64> =
        encoded.input_ids.iter().zip(&encoded.answer_mask).filter(|(_, mask)| **mask).map(|(id, _)| *id).collect();
    let end = processor.eos_ids()[0];
    assert_eq!(marked.iter().filter(|id| **id == end).count(), 2);
    assert_eq!(processor.decode(&marked).unwrap(), " cat yes");
    let prompt = processor.encode_prompt(&sample).unwrap();
    assert!(encoded.input_ids.starts_with(&prompt.input_ids));
    let answer = &encoded.answer_mask[prompt.len()..];
    assert!(answer[0] && !encoded.answer_mask[prompt.len() - 1], "the prompt ends where the last answer begins");
    assert_eq!(prompt.images, encoded.images);
}

#[test]
fn the_shipped_data_sets_are_encoded() {
    let (_folder, processor) = processor(&serde_json::json!({}));
    let data = Dataset::open(
        &fixtures("data/finetune-small.parquet"),
        &DataOptions { turns: Turns::Separate, ..DataOptions::default() },
    )
    .unwrap();
    let all: Vec<usize> = (0..data.len()).collect();
    for sample in data.read(&all).unwrap() {
        let sample = sample.unwrap();
        let encoded = processor.encode_conversation(&sample).unwrap();
        let marked = encoded.input_ids.iter().zip(&encoded.answer_mask).filter(|(_, mask)| **mask).map(|(id, _)| *id);
        let answer = processor.decode(&marked.collect::<Vec<_>>()).unwrap();
        assert_eq!(answer.trim_start(), sample.turns[0].assistant, "{}", sample.id);
        assert_eq!(encoded.image_positions.len(), 16);
    }
    let benchmark = Benchmark::open(&fixtures("data/bench-small.tsv")).unwrap();
    for row in benchmark.rows() {
        let images = benchmark.images(row).unwrap();
        let question = [MessagePart::Image(0), MessagePart::Text(benchmark.cell(row, "question").unwrap().into())];
        let encoded = processor.encode_question(&row.index, &question, &images).unwrap();
        assert_eq!(encoded.images.unwrap().joined("pixel_values").unwrap().shape(), [1, 3, 64, 64]);
    }
}

#[test]
fn image_tokens_in_the_question_are_refused() {
    let (_folder, processor) = processor(&serde_json::json!({}));
    let question = [MessagePart::Image(0), MessagePart::Text("is <image> a token?".into())];
    let picture = ImageBytes::held("picture", png(3));
    let error = processor.encode_question("row 7", &question, &[picture]).unwrap_err().to_string();
    assert!(error.contains("row 7: its text holds `<image>` 2 times, but it has 1 pictures"), "{error}");
}

/// The text of each run of marked tokens, special tokens included.
fn marked(processor: &Processor, encoded: &Encoded) -> Vec<String> {
    let mut runs: Vec<String> = Vec::new();
    let mut inside = false;
    assert_eq!(encoded.input_ids.len(), encoded.answer_mask.len());
    for (&id, &answer) in encoded.input_ids.iter().zip(&encoded.answer_mask) {
        if answer {
            if !inside {
                runs.push(String::new());
            }
            let token = processor.tokenizer.token(u32::try_from(id).unwrap()).unwrap();
            runs.last_mut().unwrap().push_str(&token.replace('\u{120}', " ").replace('\u{10a}', "\n"));
        }
        inside = answer;
    }
    runs
}

#[test]
fn special_tokens_in_an_answer_do_not_end_it() {
    let (_folder, processor) = processor(&serde_json::json!({}));
    let sample = sample(vec![], &["Where?", "at <row_1_col_1> there<row_1_col_2>", "Sure?", "yes"]);
    let encoded = processor.encode_conversation(&sample).unwrap();
    let want = [" at<row_1_col_1>there<row_1_col_2><end_of_utterance>", " yes<end_of_utterance>"];
    let spaceless = |texts: &[String]| texts.iter().map(|text| text.replace(' ', "")).collect::<Vec<_>>();
    assert_eq!(spaceless(&marked(&processor, &encoded)), spaceless(&want.map(String::from)));
}

#[test]
fn answers_are_found_if_template_and_generation_prompt_differ() {
    // As in LLaVA-OneVision's template: `assistant`, a space and a newline are before a finished answer, but a prompt
    // ends in `assistant` and a newline.
    let template = "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}\
        <image>{% endif %}{% endfor %}{% for c in m.content %}{% if c.type == 'text' %}{{ '\n' + c.text }}{% endif %}\
        {% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let (_folder, processor) = processor_with(&serde_json::json!({}), Some(template));
    let picture = ImageBytes::held("picture", png(3));
    let sample = sample(vec![picture], &["What is it?", "cat", "Sure?", "yes"]);
    let encoded = processor.encode_conversation(&sample).unwrap();
    assert_eq!(marked(&processor, &encoded), ["cat<|im_end|>", "yes<|im_end|>"]);
}

#[test]
fn without_an_end_token_the_next_question_is_not_marked_as_answer() {
    let template = "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'text' %}\
        {{ c.text }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}";
    let (_folder, processor) = processor_with(&serde_json::json!({}), Some(template));
    let encoded = processor.encode_conversation(&sample(vec![], &["What is it?", "cat", "Sure?", "yes"])).unwrap();
    assert_eq!(marked(&processor, &encoded), [" cat", " yes"]);
}

#[test]
fn an_answer_that_also_occurs_in_its_question_is_marked_once() {
    let (_folder, processor) = processor(&serde_json::json!({}));
    let sample = sample(vec![], &["yes or yes?", "yes", "yes", ""]);
    let encoded = processor.encode_conversation(&sample).unwrap();
    assert_eq!(marked(&processor, &encoded).concat().replace(' ', ""), "yes<end_of_utterance><end_of_utterance>");
}

#[test]
fn templates_that_change_or_drop_text_are_refused() {
    let cut = "{% for m in messages %}<|im_start|>{{ m.role }}:{% for c in m.content %}{% if c.type == 'text' %}\
        {{ c.text.split('</think>')[-1] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant:{% endif %}";
    let (_folder, processor) = processor_with(&serde_json::json!({}), Some(cut));
    let error = processor.encode_conversation(&sample(vec![], &["q", "<think>a</think>b"])).unwrap_err().to_string();
    assert!(error.contains("does not write answer 0 as the data has it"), "{error}");
    assert!(processor.encode_conversation(&sample(vec![], &["q", "b"])).is_ok());

    // A template that expects strings gets strings.
    let strings = "{% for m in messages %}{{ m.role | upper }}: {% if m.content is string %}{{ m.content }}{% endif %}\
        {% endfor %}";
    let (_folder, processor) = processor_with(&serde_json::json!({}), Some(strings));
    assert!(processor.encode_prompt(&sample(vec![], &["What is it?", "a"])).is_ok());

    let drops = "{% for m in messages %}{{ m.role | upper }}: {% endfor %}";
    let (_folder, processor) = processor_with(&serde_json::json!({}), Some(drops));
    for encoded in [
        processor.encode_prompt(&sample(vec![], &["What is it?", "a"])),
        processor.encode_conversation(&sample(vec![], &["What is it?", "a"])),
    ] {
        let error = encoded.unwrap_err().to_string();
        assert!(error.contains("drops the text `What is it?`"), "{error}");
    }
}

#[test]
fn a_system_message_comes_first() {
    let (_folder, processor) = processor(&serde_json::json!({}));
    let mut sample = sample(vec![], &["What is it?", "cat"]);
    sample.system = Some("Be short.".into());
    let encoded = processor.encode_conversation(&sample).unwrap();
    assert_eq!(marked(&processor, &encoded), [" cat<end_of_utterance>"]);
    assert!(processor.decode(&encoded.input_ids).unwrap().starts_with("System: Be short."));
}
