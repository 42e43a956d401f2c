//! The time of a verb compared with the work that it cannot avoid. Run by `scripts/overhead` with an optimised build.

use std::path::PathBuf;
use std::time::Instant;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{Amount, DataOptions, Dataset, Processor, Subset};
use interlace::method::{ScoreSettings, score};
use interlace::prompt::Prompt;
use interlace::runtime::{FeatureCache, Runtime, SessionOptions, VlmSession};

use super::cli::{interlace, stderr, stdout};

/// Scoring alternates with bare prefills of the same prompts. `OVERHEAD_MODEL`, `OVERHEAD_DATA` and `OVERHEAD_SAMPLES`
/// replace the shipped model and its data.
#[test]
#[ignore = "measures time; run by scripts/overhead"]
fn scoring_costs_little_more_than_the_bare_prefill() {
    let fixture = |path: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path);
    let model = std::env::var("OVERHEAD_MODEL").map_or_else(|_| fixture("model"), PathBuf::from);
    let data = std::env::var("OVERHEAD_DATA").map_or_else(|_| fixture("data/finetune.parquet"), PathBuf::from);
    let count = std::env::var("OVERHEAD_SAMPLES").map_or(200, |text| text.parse().expect("a number"));
    let bundle = Bundle::open(&model).expect("model");
    let dataset = Dataset::open_for(&data, &bundle, &DataOptions::default()).expect("data");
    let amount = Amount::Samples(count.min(dataset.len()));
    let subset = Subset { amount, seed: 42 };
    let processor = Processor::open(&bundle).expect("processor");
    let samples = dataset.read(&dataset.draw(subset).expect("samples")).expect("samples");
    let prompts: Vec<Prompt> = samples
        .map(|sample| processor.encode_prompt(&sample.expect("a sample")).expect("encoded").into_prompt())
        .collect();
    let runtime = Runtime::new(Device::Cpu).expect("runtime");
    let bare = || {
        let cache = FeatureCache::new(64 << 20);
        let mut vlm = VlmSession::open(&runtime, &bundle, &SessionOptions::default(), &cache).expect("model");
        let began = Instant::now();
        for prompt in &prompts {
            vlm.prefill(prompt, true).expect("prefill");
        }
        began.elapsed().as_secs_f64()
    };
    let settings = ScoreSettings { amount, profile: true, ..ScoreSettings::default() };
    let scored = || {
        let scores = score(&bundle, &dataset, &settings, Device::Cpu, &Cancel::default()).expect("scores");
        scores.profile.expect("a profile")
    };
    let (mut ratios, mut waits) = (Vec::new(), Vec::new());
    for round in 0..8 {
        // Each side starts half of the rounds, so that a machine that slows down affects both.
        let (bare, profile) = if round % 2 == 0 {
            let bare = bare();
            (bare, scored())
        } else {
            let profile = scored();
            (bare(), profile)
        };
        let (ratio, waiting) = (profile.total_s / bare, profile.waiting_s / profile.total_s);
        println!("round {round}: bare prefill {bare:.3} s, scoring {:.3} s, {ratio:.3} times", profile.total_s);
        println!("waiting for data: {:.1}%; {profile:?}", 100.0 * waiting);
        ratios.push(ratio);
        waits.push(waiting);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2 - 1] + values[values.len() / 2]) / 2.0
    };
    let (ratio, waiting) = (median(&mut ratios), median(&mut waits));
    println!("median of 8 rounds: {ratio:.3} times the bare prefill, {:.1}% waiting for data", 100.0 * waiting);
    assert!(ratio <= 1.05, "scoring takes {ratio:.3} times the bare prefill, expected at most 1.05");
    assert!(waiting <= 0.1, "{:.1}% of the run waits for data, expected at most 10%", 100.0 * waiting);
}

#[test]
fn score_and_eval_report_where_the_time_was_spent() {
    let folder = tempfile::tempdir().expect("folder");
    let fixture = |path: &str| format!("{}/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    let (model, data, bench) =
        (fixture("model"), fixture("data/finetune-small.parquet"), fixture("data/bench-small.tsv"));
    let run = |arguments: &[&str]| {
        let output = interlace(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    let score = ["score", &model, "--data", &data, "--samples", "3", "-o", "scores.json", "--quiet", "--profile"];
    let text = run(&score);
    for part in ["pictures", "vision encoder", "embedding", "decoder", "waiting for data", "in all"] {
        assert!(text.contains(part), "expected `{part}` in: {text}");
    }
    let report: serde_json::Value = serde_json::from_str(&run(&[&score[..], &["--json"]].concat())).expect("JSON");
    let part = |name: &str| report["profile"][name].as_f64().expect("seconds");
    for name in ["pictures_s", "vision_encoder_s", "embedding_s", "decoder_s"] {
        assert!(part(name) > 0.0, "{name}: {report}");
    }
    let inside = part("vision_encoder_s") + part("embedding_s") + part("decoder_s") + part("waiting_s");
    assert!(inside <= part("total_s") * 1.001, "{}", report["profile"]);
    // Without the flag the scores contain no times, so all runs give the same file.
    run(&score[..score.len() - 1]);
    assert!(!std::fs::read_to_string(folder.path().join("scores.json")).expect("scores").contains("profile"));
    let eval =
        ["eval", &model, "--data", &bench, "-o", "report.json", "--quiet", "--limit", "2", "--max-new-tokens", "2"];
    assert!(run(&[&eval[..], &["--profile"]].concat()).contains("waiting for data"));
    let report: serde_json::Value = serde_json::from_str(&run(&[&eval[..], &["--json"]].concat())).expect("JSON");
    assert!(report["model"]["timing"]["profile"]["decoder_s"].as_f64().expect("seconds") > 0.0);
}

/// Copies the shipped model, with an end token that it never gives.
fn without_end(folder: &std::path::Path) {
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    std::fs::create_dir_all(folder.join("onnx")).expect("folder");
    for part in [".", "onnx"] {
        for entry in std::fs::read_dir(model.join(part)).expect("files") {
            let path = entry.expect("entry").path();
            if path.is_file() {
                std::fs::copy(&path, folder.join(part).join(path.file_name().expect("name"))).expect("copy");
            }
        }
    }
    for file in ["config.json", "generation_config.json"] {
        let text = std::fs::read_to_string(folder.join(file)).expect("config");
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let never = serde_json::json!(0);
        config["eos_token_id"] = never.clone();
        if let Some(text) = config.get_mut("text_config") {
            text["eos_token_id"] = never;
        }
        std::fs::write(folder.join(file), config.to_string()).expect("config");
    }
}

/// One question and 64 tokens in the graph of `export --to generate`, alternating with the loop around the components.
#[test]
#[ignore = "measures time; run by scripts/overhead"]
fn the_loop_in_the_graph_decodes_beside_the_loop_outside() {
    const TOKENS: usize = 64;
    let folder = tempfile::tempdir().expect("folder");
    without_end(folder.path());
    let target = tempfile::tempdir().expect("folder");
    let out = target.path().join("out");
    let output =
        interlace(folder.path(), &["export", ".", "--to", "generate", "-o", out.to_str().expect("path"), "-q"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let bundle = Bundle::open(folder.path()).expect("model");
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet");
    let dataset = Dataset::open_for(&data, &bundle, &DataOptions::default()).expect("data");
    let processor = Processor::open(&bundle).expect("processor");
    let sample = dataset.read(&[0]).expect("samples").next().expect("a sample").expect("a sample");
    let encoded = processor.encode_prompt(&sample).expect("encoded");
    let runtime = Runtime::new(Device::Cpu).expect("runtime");
    let options = SessionOptions::default();
    let mut graph = runtime.session(&out.join("onnx/generate.onnx"), &options).expect("a graph");
    let prompt = encoded.clone().into_prompt();
    let mut ratios = Vec::new();
    for round in 0..9 {
        let mut vlm = VlmSession::open(&runtime, &bundle, &options, &FeatureCache::new(1 << 20)).expect("model");
        let began = Instant::now();
        let outside = vlm.generate(std::slice::from_ref(&prompt), TOKENS, &Cancel::default()).expect("an answer");
        let first = began.elapsed().as_secs_f64();
        let began = Instant::now();
        let inside = super::answer_graph::answer(&mut graph, &encoded, TOKENS as i64).expect("an answer");
        let second = began.elapsed().as_secs_f64();
        assert_eq!((inside.len(), &inside), (TOKENS, &outside[0]));
        println!(
            "round {round}: loop outside {first:.3} s, loop in the graph {second:.3} s, {:.3} times",
            second / first
        );
        ratios.push(second / first);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median: the graph takes {:.3} times as long", ratios[ratios.len() / 2]);
}
