//! Scores equal those of VLMEvalKit's own code on predictions at the edges of its rules
//! (`scripts/vlmevalkit/golden.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use interlace::data::Benchmark;
use interlace::eval::{METRICS, PromptStyle, judge_predictions, metric_of, needs_judge, question_text};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Golden {
    headline: f64,
    /// The score of each row; absent if rows are not scored one by one.
    rows: Vec<f64>,
    figures: BTreeMap<String, f64>,
    data: Vec<Map<String, Value>>,
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// The rows as a benchmark file, each with a picture that is never decoded.
fn benchmark(folder: &Path, name: &str, rows: &[Map<String, Value>]) -> Benchmark {
    let mut columns: Vec<&str> = Vec::new();
    for key in rows.iter().flat_map(Map::keys) {
        if key != "prediction" && !columns.contains(&key.as_str()) {
            columns.push(key);
        }
    }
    let path = folder.join(format!("{name}.tsv"));
    let mut writer = csv::WriterBuilder::new().delimiter(b'\t').from_path(&path).expect("file");
    writer.write_record(columns.iter().copied().chain(["image"])).expect("head");
    for row in rows {
        let cells = columns.iter().map(|column| cell(row.get(*column)));
        writer.write_record(cells.chain(["A".repeat(80)])).expect("row");
    }
    writer.flush().expect("file");
    drop(writer);
    Benchmark::open(&path).expect("benchmark")
}

#[test]
fn scores_equal_vlmevalkit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/vlmevalkit/scores.json.zst");
    let text = zstd::decode_all(std::fs::File::open(path).expect("golden")).expect("zstd");
    let golden: BTreeMap<String, Golden> = serde_json::from_slice(&text).expect("JSON");
    assert!(golden.len() >= 15 && golden.values().all(|benchmark| benchmark.data.len() >= 300));
    let compared: BTreeSet<&str> = golden.keys().filter_map(|name| Some(metric_of(name)?.name)).collect();
    for metric in METRICS.iter().filter(|metric| metric.benchmarks.first().is_some_and(|name| !needs_judge(name))) {
        assert!(
            compared.contains(metric.name),
            "no benchmark of `{}` in fixtures/vlmevalkit/scores.json.zst",
            metric.name
        );
    }
    let folder = tempfile::tempdir().expect("folder");
    for (name, want) in &golden {
        let benchmark = benchmark(folder.path(), name, &want.data);
        let predictions: Vec<String> = want.data.iter().map(|row| cell(row.get("prediction"))).collect();
        let scores = judge_predictions(&benchmark, name, &predictions).expect("scores");
        if !want.rows.is_empty() {
            assert_eq!([scores.answers.len(), want.rows.len()], [want.data.len(); 2], "{name}");
        }
        for ((answer, row), score) in scores.answers.iter().zip(&want.data).zip(&want.rows) {
            assert!(
                (answer.score - score).abs() < 1e-9,
                "{name}: found {}, expected {score} for {row:?}",
                answer.score
            );
        }
        assert!(
            (scores.score - want.headline).abs() < 1e-9,
            "{name}: found {}, expected {}",
            scores.score,
            want.headline
        );
        for (figure, value) in &want.figures {
            let found = match figure.strip_prefix("category ") {
                Some(category) => scores.groups.iter().find(|group| group.group == category).map(|group| group.score),
                None => scores.figures.get(figure).copied(),
            };
            let found = found.unwrap_or_else(|| panic!("{name} has no {figure}"));
            assert!((found - value).abs() < 1e-9, "{name}, {figure}: found {found}, expected {value}");
        }
    }
}

/// `scripts/vlmevalkit/prompts.py` writes the expected texts.
#[test]
fn questions_are_worded_as_in_vlmevalkit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/vlmevalkit/prompts.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).expect("golden")).expect("JSON");
    let prompts = golden["prompts"].as_array().expect("prompts");
    assert!(prompts.len() > 250);
    let folder = tempfile::tempdir().expect("folder");
    let mut wrong = Vec::new();
    for prompt in prompts {
        let name = prompt["benchmark"].as_str().expect("a name");
        let mut row = prompt["row"].as_object().expect("a row").clone();
        row.insert("index".into(), 1.into());
        let benchmark = benchmark(folder.path(), name, &[row]);
        let style: PromptStyle = prompt["style"].as_str().expect("a style").parse().expect("a style");
        let found = question_text(&benchmark, name, &benchmark.rows()[0], style).expect("text");
        if found != prompt["text"] {
            wrong.push(format!("{name} {style:?}: {found:?} is not {}", prompt["text"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), prompts.len(), wrong[..wrong.len().min(6)].join("\n"));
}
