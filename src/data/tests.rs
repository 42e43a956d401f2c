//! Compares with results of Pillow and Hugging Face transformers on the same input
//! (`fixtures/processor/operations.json`, written by `scripts/fixture/operations.py`).

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use serde_json::Value;

use super::template::{ChatMessage, ChatTemplate, Content, ContentPart};
use super::*;
use crate::base::{Result, sha256_bytes};
use crate::bundle::Bundle;

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/processor/operations.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The cases of a list, which is not empty.
fn listed(value: &Value) -> &[Value] {
    let cases = value.as_array().unwrap();
    assert!(!cases.is_empty());
    cases
}

fn sizes(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect()
}

/// A gradient with noise. The script generates the same bytes.
fn picture(width: usize, height: usize) -> Picture {
    let byte = |index: usize| {
        let noise = ((index as u64 * 2_654_435_761) % (1 << 32)) >> 24;
        ((noise / 4 + (index / (width * 3)) as u64 * 3 + (index % 3) as u64 * 40) % 256) as u8
    };
    Picture::new(width, height, (0..width * height * 3).map(byte).collect()).unwrap()
}

fn sha_of_floats<'a>(values: impl Iterator<Item = &'a f32>) -> String {
    sha256_bytes(&values.flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
}

#[test]
fn resizing_equals_pillow_bit_for_bit() {
    for case in listed(&reference()["resizes"]) {
        let (from, to) = (sizes(&case["from"]), sizes(&case["to"]));
        let filter = Filter::from_number(case["resample"].as_i64().unwrap()).unwrap();
        let scaler = Scaler::new(filter, BackEnd::Pil).unwrap();
        let out = scaler.resize(&picture(from[0], from[1]), to[0], to[1]).unwrap();
        assert_eq!(sha256_bytes(out.rgb()), case["sha256"].as_str().unwrap(), "{case}");
    }
}

fn pil() -> ImageSettings {
    ImageSettings { back_end: Some(BackEnd::Pil), ..ImageSettings::default() }
}

fn image_processor(config: &Value) -> Result<images::ImageProcessor> {
    images::ImageProcessor::new(config, "preprocessor_config.json", serde_json::Map::new(), &pil())
}

#[test]
fn pixel_values_equal_hugging_face_bit_for_bit() {
    for case in listed(&reference()["processors"]) {
        let size = sizes(&case["size"]);
        let processor = image_processor(&case["config"]).unwrap();
        let inputs = processor.process(&picture(size[0], size[1])).unwrap();
        let pixels = inputs.joined("pixel_values").unwrap();
        assert_eq!(pixels.shape(), sizes(&case["shape"]), "{case}");
        assert_eq!(sha_of_floats(pixels.floats().unwrap().iter()), case["sha256"].as_str().unwrap(), "{case}");
        let images::Shown::Picture(layout) = &inputs.shown[0] else { panic!("{case}") };
        if case["grid"].is_null() {
            let tiles = layout.tiles.map(|edge| Some(edge as u64));
            assert_eq!(tiles, [case["rows"].as_u64(), case["columns"].as_u64()]);
        } else {
            let grid = sizes(&case["grid"]);
            assert_eq!(layout.features, [grid[1] / 2, grid[2] / 2]);
            let found = inputs.pictures[0].grid_thw().unwrap();
            assert_eq!(found.map(|n| n as usize), grid[..]);
        }
    }
}

/// References: the files of `operations.json`, and `fixtures/processor/files.json`, written by
/// `scripts/processors/files.py`.
#[test]
fn picture_files_decode_or_fail_as_in_pillow() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/processor/files.json");
    let more: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let plain = reference();
    let (plain, more) = (plain["files"].as_array().unwrap(), more.as_array().unwrap());
    assert!(plain.len() > 10 && more.len() > 30, "{} and {} files", plain.len(), more.len());
    for case in plain.iter().chain(more) {
        let bytes = base64::engine::general_purpose::STANDARD.decode(case["base64"].as_str().unwrap()).unwrap();
        let name = case["name"].as_str().unwrap();
        let mut compared = 0;
        for (way, transparency) in
            [("sha256", Transparency::OnWhite), ("on_white", Transparency::OnWhite), ("dropped", Transparency::Dropped)]
        {
            let out = Picture::decode(&ImageBytes::held(name, bytes.clone()), transparency);
            if let Some(refusal) = case["refusal"].as_str() {
                let error = out.unwrap_err().to_string();
                assert!(error.starts_with(&format!("{name}: {refusal}")), "{error}");
                compared += 1;
            } else if let Some(want) = case[way].as_str() {
                let out = out.unwrap();
                assert_eq!(vec![out.width(), out.height()], sizes(&case["size"]), "{name}");
                assert_eq!(sha256_bytes(out.rgb()), want, "{name} {way}");
                compared += 1;
            }
        }
        assert!(compared > 0, "{name} has no expected value");
    }
}

#[test]
fn templates_render_as_in_jinja() {
    for case in listed(&reference()["templates"]) {
        let part = |part: &Value| match part["type"].as_str().unwrap() {
            "image" => ContentPart::Image,
            _ => ContentPart::Text { text: part["text"].as_str().unwrap().to_string() },
        };
        let messages: Vec<ChatMessage> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| ChatMessage {
                role: if message["role"] == "user" { "user" } else { "assistant" },
                content: Content::Parts(message["content"].as_array().unwrap().iter().map(part).collect()),
            })
            .collect();
        let tokens = case["tokens"].as_object().unwrap().clone();
        let template = ChatTemplate::new("chat_template.jinja", case["template"].as_str().unwrap(), tokens).unwrap();
        let rendered = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(rendered, case["rendered"].as_str().unwrap(), "{} {}", case["name"], case["messages"]);
    }
}

#[test]
fn unread_or_invalid_processor_settings_are_refused_by_name() {
    let cases = [
        (
            r#"{"image_processor_type": "Idefics3ImageProcessor", "do_magic": true, "x": null}"#,
            "unknown settings: `do_magic`",
        ),
        (r#"{"image_processor_type": "MagicProcessor"}"#, "`MagicProcessor`; known are Idefics3ImageProcessor"),
        (r#"{"image_processor_type": "Idefics3ImageProcessor", "do_center_crop": true}"#, "`do_center_crop`"),
        (r#"{"image_processor_type": "Idefics3ImageProcessor", "size": {"shortest_edge": 3}}"#, "`size`"),
        (r#"{"image_processor_type": "Idefics3ImageProcessor", "image_mean": [0.5]}"#, "expected three numbers"),
        (r#"{"image_processor_type": "Idefics3ImageProcessor", "image_std": [0.5, 0, 1]}"#, "holds 0"),
        (r#"{"image_processor_type": "Idefics3ImageProcessor", "resample": 0}"#, "`resample` 0"),
        (r#"{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 0}"#, "a size of 1 to 65536"),
        (r#"{}"#, "names no `image_processor_type`"),
        ("[]", "is not a JSON object"),
    ];
    for (config, want) in cases {
        let error = image_processor(&serde_json::from_str(config).unwrap()).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[test]
fn pictures_that_do_not_decode_are_named() {
    let mut huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xff\xff\0\xff\xff\xff\0\x08\x02\0\0\0".to_vec();
    huge.extend([0; 40]);
    for bytes in [b"".to_vec(), b"no picture".to_vec(), b"\x89PNG\r\n\x1a\n".to_vec(), huge] {
        let error = Picture::decode(&ImageBytes::held("image 0 of row 3", bytes), Transparency::OnWhite)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("image 0 of row 3: "), "{error}");
    }
}

#[test]
fn a_qwen_processor_equals_hugging_face() {
    let case = &reference()["qwen"];
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    save("tokenizer.json", case["tokenizer"].to_string());
    save("tokenizer_config.json", r#"{"eos_token": "<|im_end|>"}"#.into());
    save("chat_template.json", serde_json::json!({"chat_template": case["template"]}).to_string());
    save("preprocessor_config.json", case["image_processor"].to_string());
    save("config.json", r#"{"num_hidden_layers": 1, "image_token_id": 260}"#.into());
    save("model.onnx", String::new());
    let processor = Processor::open_with(&Bundle::open(folder.path()).unwrap(), &pil()).unwrap();
    let images: Vec<ImageBytes> = case["sizes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|size| {
            let picture = picture(sizes(size)[0], sizes(size)[1]);
            let (width, height) = (picture.width() as u32, picture.height() as u32);
            let mut bytes = std::io::Cursor::new(Vec::new());
            let buffer = image::RgbImage::from_raw(width, height, picture.rgb().to_vec()).unwrap();
            buffer.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
            ImageBytes::held("picture", bytes.into_inner())
        })
        .collect();
    let question =
        [MessagePart::Image(0), MessagePart::Image(1), MessagePart::Text(case["question"].as_str().unwrap().into())];
    let encoded = processor.encode_question("case", &question, &images).unwrap();
    let want: Vec<i64> = case["input_ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
    assert_eq!(encoded.input_ids, want);
    let inputs = encoded.images.unwrap();
    let pixels = inputs.joined("pixel_values").unwrap();
    assert_eq!(sha_of_floats(pixels.floats().unwrap().iter()), case["sha256"].as_str().unwrap());
    let grids = inputs.pictures.iter().map(|picture| picture.grid_thw().unwrap());
    let features = grids.map(|grid| grid.iter().product::<i64>() / 4).sum::<i64>();
    assert_eq!(encoded.image_positions.len() as i64, features);

    save("config.json", r#"{"num_hidden_layers": 1, "image_token_id": 9999}"#.into());
    let error = Processor::open(&Bundle::open(folder.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("`image_token_id` is 9999, which the tokenizer does not have"), "{error}");
}

pub(super) fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

/// A PNG of 9 x 7 pixels in one colour.
pub(super) fn png(shade: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(9, 7, image::Rgb([shade, 1, 2])).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn base64_png(shade: u8) -> String {
    base64::engine::general_purpose::STANDARD.encode(png(shade))
}

#[test]
fn benchmark_files_are_read_as_in_vlmevalkit() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (base64_png(1), base64_png(2));
    let text = format!(
        "index\timage\tquestion\tA\tB\tanswer\tcategory\n\
         7\t{first}\t\"What \"\"is\"\" it?\n(one word)\"\tcat\tNone\tA\tname\n\
         8\t7\tAgain?\t\t\tyes\tname\n\
         9\t\"['{first}', '{second}']\"\tSame?\t\t\tno\ttwo\n"
    );
    let benchmark = Benchmark::open(&write(folder.path(), "bench.tsv", &text)).unwrap();
    let rows = benchmark.rows();
    assert_eq!(benchmark.cell(&rows[0], "question"), Some("What \"is\" it?\n(one word)"));
    assert_eq!(benchmark.options(&rows[0]), [('A', "cat")]);
    assert_eq!(benchmark.cell(&rows[1], "A"), None);
    assert!(benchmark.same_images(&rows[0], &rows[1]) && !benchmark.same_images(&rows[0], &rows[2]));
    let shades = |row: usize| -> Vec<u8> {
        benchmark
            .images(&rows[row])
            .unwrap()
            .iter()
            .map(|image| Picture::decode(image, Transparency::OnWhite).unwrap().rgb()[0])
            .collect()
    };
    assert_eq!((shades(0), shades(1), shades(2)), (vec![1], vec![1], vec![1, 2]));
}

#[test]
fn benchmarks_keep_every_column_and_skip_rows_without_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    for (name, shade) in [("a, b.png", 4), ("it's.png", 5)] {
        fs::write(folder.path().join(name), png(shade)).unwrap();
    }
    let text = "index\timage_path\tquestion\tA\thint\tanswer\tl2-category\tsplit\tg_index\tcycle_category\n\
         0\t\"[\"\"a, b.png\"\", \"\"it's.png\"\"]\"\tq\tnull\tnan\t\"['4', 'four']\"\tx\tdev\t0\tc1\n\
         1000000\tnan\tq\tx\t\tB\tx\tdev\t0\tc2\n\
         2\ta, b.png\tq\tx\t\tB\tx\ttest\t2\tc2\n";
    let benchmark = Benchmark::open(&write(folder.path(), "bench.tsv", text)).unwrap();
    let rows = benchmark.rows();
    assert_eq!((rows.len(), benchmark.rows_without_picture()), (2, 1));
    let shades: Vec<u8> = benchmark
        .images(&rows[0])
        .unwrap()
        .iter()
        .map(|i| Picture::decode(i, Transparency::OnWhite).unwrap().rgb()[0])
        .collect();
    assert_eq!(shades, [4, 5]);
    for (column, want) in [("l2-category", "x"), ("split", "dev"), ("g_index", "0"), ("cycle_category", "c1")] {
        assert_eq!(benchmark.value(&rows[0], column), Some(want));
    }
    assert_eq!((benchmark.cell(&rows[0], "hint"), benchmark.value(&rows[0], "hint")), (Some("nan"), None));
    assert!(benchmark.options(&rows[0]).is_empty());
    let answers = string_list(benchmark.cell(&rows[0], "answer").unwrap()).unwrap();
    assert_eq!(answers, ["4", "four"]);
}

#[test]
fn malformed_benchmarks_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("index\timage\tquestion\n", "is empty"),
        ("index\tImages\tquestion\n1\tx\tq\n", "no column `image`"),
        ("image\tquestion\nx\tq\n", "no column `index`"),
        ("index\timage\tquestion\n1\t2\tq\n", "takes its picture from row `2`"),
        ("index\timage\tquestion\n1\t\tq\n1\t\tq\n", "occurs twice"),
        ("index\timage\tquestion\n1\t\tq\n2\tnan\tq\n", "has no question with a picture"),
        ("index\timage\tquestion\n1\t\n", "does not decode"),
    ];
    for (text, want) in cases {
        let error = Benchmark::open(&write(folder.path(), "bench.tsv", text)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    // Without a column for pictures all questions are of text.
    let benchmark = Benchmark::open(&write(folder.path(), "text.tsv", "index\tquestion\n1\tq\n2\tr\n")).unwrap();
    assert_eq!((benchmark.rows().len(), benchmark.rows_without_picture()), (2, 0));
    assert!(benchmark.images(&benchmark.rows()[1]).unwrap().is_empty());
    let text = format!("index\timage\timage_path\tquestion\n1\t{}\t\tq\n2\t\t../x.png\tq\n", "!".repeat(80));
    let benchmark = Benchmark::open(&write(folder.path(), "bench.tsv", &text)).unwrap();
    for (row, want) in [(0, "is not base64"), (1, "without `..`")] {
        let error = benchmark.images(&benchmark.rows()[row]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

/// Files with randomly changed bytes, each with its own seed.
#[test]
fn changed_bytes_never_panic() {
    use rand::{Rng, SeedableRng};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    layout_tests::shard(&path, 7, true);
    let parquet = fs::read(&path).unwrap();
    let picture = png(9);
    for seed in 0..200 {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut change = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for _ in 0..random.random_range(1..6) {
                let place = random.random_range(0..bytes.len());
                bytes[place] = random.random();
            }
            bytes
        };
        fs::write(&path, change(&parquet)).unwrap();
        if let Ok(data) = Dataset::open(&path, &DataOptions { turns: Turns::Separate, ..DataOptions::default() }) {
            let all: Vec<usize> = (0..data.len().min(100)).collect();
            for sample in data.read(&all).unwrap().flatten() {
                let _ = sample
                    .images
                    .iter()
                    .try_for_each(|image| Picture::decode(image, Transparency::OnWhite).map(|_| ()));
            }
        }
        let _ = Picture::decode(&ImageBytes::held("picture", change(&picture)), Transparency::OnWhite);
    }
}
