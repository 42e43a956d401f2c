//! Every kind of user file except graphs, with bytes or values changed at random: each gives a result or an error, in
//! bounded time and memory, and never a panic.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use interlace::base::{Error, Provenance, Result, sha256_file};
use interlace::bundle::{Bundle, BundleWriter, LayerEdit, Record, RecordedStep, Tower};
use interlace::data::{Benchmark, DataOptions, Dataset, ImageBytes, MessagePart, Picture, Processor, Transparency};
use interlace::eval::{PromptStyle, question_text, reference_of};
use interlace::method::{MODALITIES, Plan, SCORES_SCHEMA_VERSION, SampleScores, Scores};
use interlace::pipeline::steps::{self, HowMany, PlanSettings, PlannedModel};
use interlace::pipeline::{Recipe, Sweep};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::cli::fixture;
use super::mutations::{Guard, mutate, number_of};

const MEMORY_LIMIT: u64 = 2 << 30;

/// A kind of file: how to write a valid one in an empty folder, and how a changed one is used.
struct Kind {
    name: &'static str,
    /// Writes a valid file and returns the path to change.
    sound: fn(&Path) -> PathBuf,
    /// Reads and uses the file. The folder is the one that `sound` filled.
    work: fn(&Path, &Path) -> Result<()>,
}

const KINDS: &[Kind] = &[
    Kind { name: "parquet", sound: |folder| copied(folder, "data/finetune-small.parquet"), work: conversations },
    Kind { name: "rows", sound: llava, work: conversations },
    Kind { name: "text", sound: |folder| copied(folder, "zoo/text/text.jsonl"), work: running_text },
    Kind { name: "tsv", sound: |folder| copied(folder, "data/bench-small.tsv"), work: benchmark },
    Kind { name: "config", sound: |folder| model(folder, "config.json"), work: folder_of_a_model },
    Kind {
        name: "generation_config",
        sound: |folder| model(folder, "generation_config.json"),
        work: folder_of_a_model,
    },
    Kind { name: "genai_config", sound: genai, work: folder_of_a_model },
    Kind { name: "export", sound: exported, work: folder_of_a_model },
    Kind { name: "record", sound: record, work: folder_of_a_model },
    Kind { name: "template", sound: |folder| model(folder, "chat_template.jinja"), work: prompt },
    Kind { name: "tokenizer", sound: |folder| model(folder, "tokenizer.json"), work: prompt },
    Kind { name: "tokenizer_config", sound: |folder| model(folder, "tokenizer_config.json"), work: prompt },
    Kind { name: "preprocessor_config", sound: |folder| model(folder, "preprocessor_config.json"), work: prompt },
    Kind { name: "processor_config", sound: |folder| model(folder, "processor_config.json"), work: prompt },
    Kind { name: "plan", sound: plan, work: |_, file| Plan::read(file).map(|plan| drop(plan.strip())) },
    Kind { name: "scores", sound: scores, work: planned },
    Kind { name: "recipe", sound: |folder| copied(folder, "demo.toml"), work: |_, file| Recipe::read(file).map(drop) },
    Kind { name: "sweep", sound: |folder| copied(folder, "sweep.toml"), work: |_, file| Sweep::read(file).map(drop) },
];

fn copied(folder: &Path, file: &str) -> PathBuf {
    let source = PathBuf::from(fixture(file));
    let target = folder.join(source.file_name().unwrap());
    fs::copy(source, &target).unwrap();
    target
}

/// The folder of the shipped model with empty graphs, which none of these kinds reads.
fn model(folder: &Path, changed: &str) -> PathBuf {
    for entry in fs::read_dir(fixture("model")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
    }
    fs::create_dir(folder.join("onnx")).unwrap();
    for graph in ["decoder_model_merged", "embed_tokens", "vision_encoder"] {
        fs::write(folder.join(format!("onnx/{graph}.onnx")), "").unwrap();
    }
    folder.join(changed)
}

fn genai(folder: &Path) -> PathBuf {
    for file in ["tokenizer.json", "tokenizer_config.json", "genai_config.json"] {
        copied(folder, &format!("zoo/genai/llama-fp32-embeds/{file}"));
    }
    fs::write(folder.join("model.onnx"), "").unwrap();
    folder.join("genai_config.json")
}

fn exported(folder: &Path) -> PathBuf {
    copied(folder, "zoo/hfexp/llama-cpu/config.json");
    for graph in ["prefill.onnx", "decode.onnx"] {
        fs::write(folder.join(graph), "").unwrap();
    }
    copied(folder, "zoo/hfexp/llama-cpu/export.json")
}

fn record(folder: &Path) -> PathBuf {
    model(folder, "config.json");
    let step = RecordedStep::Prune {
        tower: Tower::Text,
        layers_before: 18,
        dropped: vec![3, 5],
        dropped_original: vec![3, 5],
        deepstack: None,
        compensated: Vec::new(),
        bridged: Vec::new(),
        mlps: Vec::new(),
        taps: Vec::new(),
    };
    let record = Record {
        provenance: Provenance::new(Record::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap(),
        history: vec![step],
        carried: vec!["extra.txt".into()],
        left_out: vec!["cache".into()],
    };
    written(folder, "interlace.json", &record)
}

fn written(folder: &Path, name: &str, value: &impl serde::Serialize) -> PathBuf {
    let path = folder.join(name);
    interlace::base::write_json(&path, value).unwrap();
    path
}

fn llava(folder: &Path) -> PathBuf {
    let picture = copied(folder, "processor/pictures/square-rgb-64.png");
    let picture = picture.file_name().unwrap().to_str().unwrap();
    let turn = |from: &str, value: &str| serde_json::json!({"from": from, "value": value});
    let rows = serde_json::json!([
        {"id": "a", "image": picture, "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "A dog.")]},
        {"id": "b", "image": [picture], "conversations": [turn("human", "<image> And?"), turn("gpt", "4")]},
        {"id": "c", "conversations": [turn("human", "No picture."), turn("gpt", "Yes.")]},
    ]);
    written(folder, "rows.json", &rows)
}

fn planned_model() -> &'static PlannedModel {
    static MODEL: OnceLock<PlannedModel> = OnceLock::new();
    MODEL.get_or_init(|| PlannedModel::of(&Bundle::open(Path::new(&fixture("model"))).unwrap()).unwrap())
}

fn sound_scores() -> Scores {
    let inputs = BTreeMap::from([("model".to_string(), planned_model().digest.clone())]);
    let provenance = Provenance::new(SCORES_SCHEMA_VERSION, inputs, &()).unwrap();
    let sim = |sample: usize| {
        let pack = |size: usize| (0..16 - size).map(|layer| ((layer * 7 + sample + size) % 11) as f64 / 11.0).collect();
        (1..=4).map(|size| (size, pack(size))).collect()
    };
    let sample = |number: usize| SampleScores {
        id: number.to_string(),
        tokens: 40 + number,
        sim: sim(number),
        modalities: BTreeMap::new(),
    };
    Scores::from_samples(provenance, 16, false, (0..3).map(sample).collect()).unwrap()
}

fn settings(strategy: &str) -> PlanSettings {
    let (how_many, seed) = (HowMany::DropRatio(0.25), 1);
    PlanSettings {
        strategy: strategy.into(),
        how_many,
        seed,
        samples: None,
        fit_tokens: None,
        data: None,
        modality_weights: None,
        as_released: false,
        beyond_structure: false,
    }
}

fn scores(folder: &Path) -> PathBuf {
    written(folder, "scores.json", &sound_scores())
}

fn plan(folder: &Path) -> PathBuf {
    let scores = scores(folder);
    let digest = sha256_file(&scores).unwrap();
    let given = Some((&sound_scores(), digest));
    written(folder, "plan.json", &steps::plan(planned_model(), given, &settings("interlace"), None).unwrap())
}

fn planned(_: &Path, file: &Path) -> Result<()> {
    let scores = Scores::read(file)?;
    let digest = sha256_file(file)?;
    let mut strategies = ["interlace", "consecutive", "shortgpt", "angular"].iter();
    let _ = scores.weighted_similarities(&MODALITIES.iter().map(|&(modality, _)| (modality, 1.0)).collect());
    strategies.try_for_each(|name| {
        steps::plan(planned_model(), Some((&scores, digest.clone())), &settings(name), None).map(drop)
    })
}

fn conversations(_: &Path, file: &Path) -> Result<()> {
    let data = Dataset::open(file, &DataOptions { strict: true, ..DataOptions::default() })?;
    let wanted: Vec<usize> = (0..data.len().min(4)).collect();
    for sample in data.read(&wanted)? {
        sample?.images.iter().try_for_each(|image| Picture::decode(image, Transparency::OnWhite).map(drop))?;
    }
    Ok(())
}

fn running_text(_: &Path, file: &Path) -> Result<()> {
    static MODEL: OnceLock<Bundle> = OnceLock::new();
    let model = MODEL.get_or_init(|| Bundle::open(Path::new(&fixture("zoo/optimum/llama-with-past"))).unwrap());
    let data = Dataset::open_for(file, model, &DataOptions::default())?;
    let wanted: Vec<usize> = (0..data.len().min(4)).collect();
    data.read(&wanted)?.try_for_each(|sample| sample.map(drop))
}

fn benchmark(_: &Path, file: &Path) -> Result<()> {
    let benchmark = Benchmark::open(file)?;
    for row in benchmark.rows().iter().take(4) {
        question_text(&benchmark, "bench", row, PromptStyle::default())?;
        reference_of(&benchmark, row)?;
        benchmark.images(row)?.iter().try_for_each(|image| Picture::decode(image, Transparency::OnWhite).map(drop))?;
    }
    Ok(())
}

/// Opening, counting layers and pruning with these configs.
fn folder_of_a_model(folder: &Path, _: &Path) -> Result<()> {
    let bundle = Bundle::open(folder)?;
    bundle.record()?;
    // The numbers of layers in the graphs of the valid folders.
    let (text, vision) = if folder.join("onnx").exists() { (16, 5) } else { (8, 8) };
    let mut writer = BundleWriter::create(&bundle, &folder.with_extension("out"))?;
    let towers = [(Tower::Text, text), (Tower::Vision, vision)];
    towers
        .iter()
        .try_for_each(|&(tower, total)| writer.drop_layers(&LayerEdit::new(tower, total, &[1])?, None, Vec::new()))
}

/// A question with a picture, through template, tokenizer and picture processor.
fn prompt(folder: &Path, _: &Path) -> Result<()> {
    let processor = Processor::open(&Bundle::open(folder)?)?;
    let bytes = fs::read(fixture("processor/pictures/square-rgb-64.png"))
        .map_err(|e| Error::invalid("picture", e.to_string()))?;
    let image = ImageBytes::held("picture", bytes);
    let question = [MessagePart::Image(0), MessagePart::Text("What is in the picture? 4 \u{e9}\u{1f600}".into())];
    let encoded = processor.encode_question("question", &question, &[image])?;
    processor.decode(&encoded.input_ids).map(drop)
}

/// Changes a JSON value in one to three places: replaces it by another value of the document or by an extreme one, or
/// removes it.
fn mutate_json(value: &mut Value, rng: &mut ChaCha8Rng) {
    fn places(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_string());
        match value {
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, item)| places(item, &format!("{at}/{i}"), found))
            }
            Value::Object(map) => map.iter().for_each(|(key, item)| {
                places(item, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found);
            }),
            _ => {}
        }
    }
    let extremes = [
        "null",
        "true",
        "[]",
        "{}",
        "\"\"",
        "0",
        "-1",
        "1",
        "0.5",
        "1e308",
        "-1e-308",
        "4294967296",
        "9223372036854775807",
        "18446744073709551615",
        "[[]]",
        "[0]",
        "\"\\u0000\"",
        "\"{{ x }}\"",
        "[-1, 3]",
        "{\"\": 0}",
    ];
    for _ in 0..rng.random_range(1..=3) {
        let mut found = Vec::new();
        places(value, "", &mut found);
        let (target, source) = (found.choose(rng).unwrap(), found.choose(rng).unwrap());
        let new = if rng.random_range(0..3) == 0 {
            value.pointer(source).unwrap().clone()
        } else {
            serde_json::from_str(extremes.choose(rng).unwrap()).unwrap()
        };
        // Nested copies of the whole document would double it each time.
        if source.is_empty() && !target.is_empty() {
            continue;
        }
        if rng.random_range(0..4) == 0
            && let Some((parent, key)) = target.rsplit_once('/')
            && let Some(Value::Object(map)) = value.pointer_mut(parent)
        {
            map.remove(&key.replace("~1", "/").replace("~0", "~"));
        } else if let Some(place) = value.pointer_mut(target) {
            *place = new;
        }
    }
}

/// A text with one or two of its words removed, doubled or swapped.
fn mutate_words(text: &str, rng: &mut ChaCha8Rng) -> String {
    let mut words: Vec<&str> = text.split_inclusive(|letter: char| !letter.is_alphanumeric()).collect();
    for _ in 0..rng.random_range(1..=2) {
        let (at, other) = (rng.random_range(0..words.len()), rng.random_range(0..words.len()));
        match rng.random_range(0..3) {
            0 if words.len() > 1 => drop(words.remove(at)),
            1 => words.insert(at, words[other]),
            _ => words[at] = words[other],
        }
    }
    words.concat()
}

fn run(kind: &Kind, count: usize, seed: u64) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("given");
    fs::create_dir(&folder).unwrap();
    let file = (kind.sound)(&folder);
    let sound = fs::read(&file).unwrap();
    (kind.work)(&folder, &file).unwrap_or_else(|error| panic!("{}: {error}", kind.name));
    let parsed: Option<Value> = serde_json::from_slice(&sound).ok();
    let text = std::str::from_utf8(&sound).ok();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut guard = Guard::new(MEMORY_LIMIT);
    let (mut accepted, mut refused) = (0, 0);
    for attempt in 0..count {
        let mut bytes = sound.clone();
        match (&parsed, text) {
            (Some(value), _) if rng.random() => {
                let mut value = value.clone();
                mutate_json(&mut value, &mut rng);
                bytes = serde_json::to_vec(&value).unwrap();
            }
            (None, Some(text)) if rng.random() => bytes = mutate_words(text, &mut rng).into_bytes(),
            _ => mutate(&mut bytes, &mut rng),
        }
        fs::write(&file, &bytes).unwrap();
        let at = format!("{}, seed {seed}, attempt {attempt}", kind.name);
        match guard.watch(&at, &bytes, || (kind.work)(&folder, &file)) {
            Ok(()) => accepted += 1,
            Err(_) => refused += 1,
        }
    }
    println!("{}: {refused} refused, {accepted} accepted, {guard}", kind.name);
    assert!(refused > 0, "{}: no changed file was refused", kind.name);
}

#[test]
fn changed_inputs_never_panic() {
    KINDS.iter().for_each(|kind| run(kind, 60, 1));
}

/// `INTERLACE_MUTATIONS` sets the number of files of each kind (2,000), `INTERLACE_SEED` the seed, `INTERLACE_KINDS`
/// the kinds (all).
#[test]
#[ignore = "takes minutes"]
fn many_changed_inputs_never_panic() {
    let wanted = std::env::var("INTERLACE_KINDS").unwrap_or_default();
    let count = number_of("INTERLACE_MUTATIONS", 2_000) as usize;
    for kind in KINDS.iter().filter(|kind| wanted.is_empty() || wanted.split(',').any(|name| name == kind.name)) {
        run(kind, count, number_of("INTERLACE_SEED", 2));
    }
}
