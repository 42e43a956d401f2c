//! Evaluation of the shipped model on its benchmark, from pictures to scores.

use std::path::{Path, PathBuf};

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{Benchmark, MessagePart, Sample, Turn};
use interlace::eval::{
    BenchOptions, EvalOptions, LoadedModel, ModelScores, PromptStyle, bench, benchmark_name, compare, evaluate,
    question_text,
};
use interlace::pipeline::steps::{Engine, EvalSettings};
use interlace::runtime::{Decoder, Embedded, FeatureCache, Runtime, SessionOptions, Step, cross_entropy};

use super::cli::{interlace, stderr};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

fn scores(model: &mut LoadedModel, options: &EvalOptions) -> ModelScores {
    let path = fixture("data/bench-small.tsv");
    let benchmark = Benchmark::open(&path).expect("a benchmark");
    evaluate(model, &benchmark, &benchmark_name(&path), options, &Cancel::default()).expect("scores")
}

#[test]
fn the_dense_model_answers_well_and_batching_changes_no_answer() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let cache = FeatureCache::new(64 << 20);
    let mut model = LoadedModel::open(
        &fixture("model").as_path().into(),
        &runtime,
        &SessionOptions::default(),
        &cache,
        &Default::default(),
    )
    .expect("a model");
    let batched = scores(&mut model, &EvalOptions { batch_size: 8, ..EvalOptions::default() });
    assert!(batched.mean_of_questions >= 0.75, "{}: {:#?}", batched.mean_of_questions, batched.groups);
    let metrics: Vec<&str> = batched.answers.iter().map(|answer| answer.metric.as_str()).collect();
    for metric in ["multiple_choice", "yes_no", "exact_match"] {
        assert!(metrics.contains(&metric), "no answer was scored by {metric}");
    }
    let alone = scores(&mut model, &EvalOptions { batch_size: 1, ..EvalOptions::default() });
    assert_eq!(alone.answers, batched.answers);
    let kept = compare(&alone, &batched, 1).expect("retention");
    assert_eq!(
        kept.mean_of_groups.map(|interval| (interval.ratio, interval.low, interval.high)),
        Some((1.0, 1.0, 1.0))
    );
}

/// Log-likelihood of the answer tokens of a conversation, from the logits of every position.
fn by_logits(model: &mut LoadedModel, sample: &Sample) -> (f64, u64) {
    let encoded = model.processor.encode_conversation(sample).expect("a conversation");
    let (ids, mask) = (encoded.input_ids.clone(), encoded.answer_mask.clone());
    let embedded = model.vlm.embed(&encoded.into_prompt()).expect("embeddings");
    let step = Step::prefill(&[&embedded], false).expect("a step");
    let (logits, _) = model.vlm.decoder_mut().step(&step, None).expect("logits");
    let width = *logits.shape().last().expect("a vocabulary");
    let logits = logits.to_f32().expect("floats");
    assert_eq!((mask.len(), logits.len()), (ids.len(), ids.len() * width));
    let next = ids.iter().zip(&mask).skip(1).zip(logits.chunks_exact(width));
    let learned: Vec<f64> = next
        .filter(|((_, answer), _)| **answer)
        .map(|((&id, _), row)| -cross_entropy(row, id).expect("a loss"))
        .collect();
    (learned.iter().sum(), learned.len() as u64)
}

#[test]
fn answer_likelihoods_equal_those_computed_from_logits() {
    let (model, data) = (fixture("model"), fixture("data/bench-small.tsv"));
    let benchmark = Benchmark::open(&data).expect("a benchmark");
    let engine = Engine::new(Device::Cpu).expect("ONNX Runtime");
    let settings = EvalSettings { limit: Some(12), ..EvalSettings::default() };
    let found = engine
        .likelihood(&model.as_path().into(), &benchmark, &data, &settings, &Cancel::default())
        .expect("likelihoods");
    let mut loaded = engine.load(&model.as_path().into(), &Default::default()).expect("a model");
    let (mut total, mut tokens) = (0.0, 0);
    for (row, own) in benchmark.rows().iter().zip(&found.answers) {
        let images = benchmark.images(row).expect("pictures");
        let text = question_text(&benchmark, "bench-small", row, PromptStyle::default()).expect("a question");
        let user = (0..images.len()).map(MessagePart::Image).chain([MessagePart::Text(text)]).collect();
        let assistant = benchmark.cell(row, "answer").expect("an answer").to_string();
        let turns = vec![Turn { user, assistant }];
        let sample = Sample { index: 0, id: row.index.clone(), images, system: None, turns, text: None, tensors: None };
        let (likelihood, count) = by_logits(&mut loaded, &sample);
        assert!((own.log_likelihood - likelihood).abs() < 1e-4, "{}: {} {likelihood}", row.index, own.log_likelihood);
        assert_eq!((own.index.as_str(), own.tokens), (row.index.as_str(), count));
        total += likelihood;
        tokens += count;
    }
    assert_eq!((found.answers.len(), found.answer_tokens), (12, tokens));
    assert!((found.mean_log_likelihood - total / tokens as f64).abs() < 1e-5);
}

#[test]
fn the_shipped_decoder_equals_pytorch() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let bundle = Bundle::open(&fixture("model")).expect("a model");
    let mut decoder = Decoder::open(&runtime, &bundle, &SessionOptions::default()).expect("a decoder");
    let hidden_size = decoder.hidden_size().expect("a fixed width");
    let arrays = tch::Tensor::read_npz(fixture("expected/nodrop.npz")).expect("npz");
    let array = |name: String| &arrays.iter().find(|(key, _)| *key == name).expect("array").1;
    let floats = |tensor: &tch::Tensor| Vec::<f32>::try_from(tensor.contiguous().view([-1])).expect("floats");
    let mut cache = None;
    let mut length = 0;
    for (given, wanted) in [("in", "exp"), ("in2", "exp2")] {
        let embeds = floats(array(format!("{given}.inputs_embeds")));
        let time = embeds.len() / hidden_size;
        let row = Embedded::text(&vec![0; time], hidden_size, embeds, length as i64, 1);
        let past = vec![1; length];
        let step = if cache.is_some() { Step::decode(&[&row], &[past], false) } else { Step::prefill(&[&row], false) };
        let step = step.expect("a step");
        length += time;
        let (logits, longer) = decoder.step(&step, cache).expect("a step");
        let (found, want) = (logits.to_f32().expect("logits"), floats(array(format!("{wanted}.logits"))));
        assert_eq!(found.len(), want.len());
        let difference = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference <= 1e-4, "{given}: {difference}");
        cache = Some(longer);
    }
}

#[test]
fn a_model_benchmarked_against_itself_has_an_ideal_speedup_of_1() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let options = BenchOptions { prompt_tokens: 32, new_tokens: 4, rounds: 5, warm_up: 1, threads: Some(1) };
    let model = fixture("model");
    let report =
        bench(&model.as_path().into(), Some(&model.as_path().into()), &runtime, &options, None, &Cancel::default())
            .expect("a report");
    let speedup = report.speedup.expect("a baseline");
    assert_eq!(speedup.ideal, Some(1.0));
    assert_eq!(report.model.layers, report.baseline.expect("a baseline").layers);
    assert!(report.model.size_bytes > report.model.decoder_size_bytes && report.model.decoder_size_bytes > 1_000_000);
    assert!(report.model.pipeline_ttft_ms.expect("it has a vision encoder").median > 0.0);
    // The median is between the extremes. No test depends on the speed of the machine.
    let ttft = &speedup.decoder_ttft;
    assert!(0.0 < ttft.min && ttft.min <= ttft.median && ttft.median <= ttft.max, "{speedup:?}");
}

#[test]
fn a_single_decoder_is_benchmarked_without_a_picture() {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let options = BenchOptions { prompt_tokens: 8, new_tokens: 2, rounds: 2, warm_up: 0, threads: Some(1) };
    // One graph takes embeddings and three rows of positions, the other takes token ids.
    for file in ["qwen3_vl/ts17.onnx", "llama/dyn18-ids.onnx"] {
        let report =
            bench(&fixture("zoo").join(file).as_path().into(), None, &runtime, &options, None, &Cancel::default());
        let report = report.expect("a report");
        assert_eq!(report.model.layers, Some(8), "{file}");
        assert!(report.model.pipeline_ttft_ms.is_none() && report.speedup.is_none(), "{file}");
        assert!(report.model.decode_tokens_per_second.median > 0.0, "{file}");
    }
}

/// Language models have such benchmarks; a model with a vision encoder answers them as well.
#[test]
fn a_table_without_a_column_for_pictures_is_asked_as_text() {
    let folder = tempfile::tempdir().expect("folder");
    let table = folder.path().join("words.tsv");
    let rows =
        "index\tquestion\tA\tB\tanswer\n1\tWhich is a colour?\tblue\ttwo\tA\n2\tWhich is a number?\tblue\ttwo\tB\n";
    std::fs::write(&table, rows).expect("write");
    let report = folder.path().join("report.json");
    let arguments = ["eval", &fixture("model").display().to_string(), "--data", &table.display().to_string()];
    let output = interlace(folder.path(), &[&arguments[..], &["-o", "report.json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).expect("report")).expect("JSON");
    assert_eq!(report["model"]["questions"], 2);
    assert_eq!(report["model"]["groups"][0]["metrics"]["multiple_choice"], 2);
    assert!(report["model"]["likelihood"].is_object(), "{report}");
}

#[test]
fn predictions_are_saved_in_the_format_of_vlmevalkit() {
    let folder = tempfile::tempdir().expect("folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (model, data) = (root.join("fixtures/model"), root.join("fixtures/data/bench-small.tsv"));
    let (model, data) = (model.to_str().expect("path"), data.to_str().expect("path"));
    std::fs::create_dir(folder.path().join("kept")).expect("folder");
    let run = |predictions: &str| {
        let arguments = ["eval", model, "--data", data, "-o", "report.json", "--quiet", "--limit", "3"];
        let more = ["--max-new-tokens", "3", "--predictions", predictions];
        let output = super::cli::interlace(folder.path(), &[&arguments[..], &more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", super::cli::stderr(&output));
    };
    run("kept");
    // `{model_name}_{dataset_name}.tsv` in a folder of results of its own.
    let text = std::fs::read_to_string(folder.path().join("kept/model_bench-small.tsv")).expect("predictions");
    assert!(text.starts_with("\"index\"\t\""), "{text}");
    let read = |text: &str| -> Vec<Vec<String>> {
        let mut reader = csv::ReaderBuilder::new().delimiter(b'\t').has_headers(false).from_reader(text.as_bytes());
        reader.records().map(|row| row.expect("row").iter().map(str::to_string).collect()).collect()
    };
    let (rows, asked) = (read(&text), read(&std::fs::read_to_string(data).expect("benchmark")));
    assert_eq!(rows.len(), 4);
    let mut columns: Vec<&str> = asked[0].iter().map(String::as_str).filter(|name| *name != "image").collect();
    columns.push("prediction");
    assert_eq!(rows[0], columns);
    let place = |name: &str| asked[0].iter().position(|column| column == name).expect("a column");
    assert!(asked.len() >= rows.len(), "{} questions", asked.len());
    for (row, asked) in rows[1..].iter().zip(&asked[1..]) {
        assert_eq!(
            row[columns.iter().position(|name| *name == "question").expect("a column")],
            asked[place("question")]
        );
    }
    run("kept.jsonl");
    let lines = std::fs::read_to_string(folder.path().join("kept.jsonl")).expect("predictions");
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    assert_eq!(
        (lines.lines().count(), first["prediction"].as_str()),
        (3, Some(rows[1].last().expect("a cell").as_str()))
    );
}
