//! `export --vocabulary`: a head for the tokens of one domain.

use std::fs;
use std::path::Path;

use interlace::base::Device;
use interlace::ir::{AttributeKind, DataType, Model, Tensor};
use interlace::onnx;
use interlace::rewrite::cut_vocabulary;
use interlace::runtime::{Runtime, SessionOptions, TensorValue};
use serde_json::Value as Json;

use super::cli::{fixture, interlace, stderr, stdout};
use super::precision::{Net, largest, numbers, run};

/// Questions and answers of the domain: single words.
const CORPUS: &str = concat!(
    "{\"text\": \"the picture shows a red circle and a green square\"}\n",
    "{\"text\": \"yes no left right above below\"}\n"
);

fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = interlace(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// Logits of the decoder for five rows of embeddings.
fn logits(model: &Model) -> (Vec<usize>, Vec<f32>) {
    let mut session = Runtime::new(Device::Cpu)
        .and_then(|runtime| runtime.session_of(model, &SessionOptions::default()))
        .expect("session");
    let rows: Vec<f32> = (0..5 * 160).map(|at| (at as f32 * 12.9898).sin()).collect();
    let ports: Vec<(String, DataType)> = session.inputs().iter().map(|port| (port.name.clone(), port.dtype)).collect();
    let feeds: Vec<(String, TensorValue)> = ports
        .into_iter()
        .map(|(name, dtype)| {
            let value = match name.as_str() {
                "inputs_embeds" => TensorValue::from_f32(dtype, &[1, 5, 160], rows.clone()),
                "attention_mask" => TensorValue::new(&[1, 5], vec![1i64; 5]),
                "position_ids" => TensorValue::new(&[1, 5], (0..5i64).collect::<Vec<_>>()),
                _ => TensorValue::empty(dtype, &[1, 2, 0, 40]),
            };
            (name, value.expect("a tensor"))
        })
        .collect();
    let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let outputs = session.run(&feeds, Some(&["logits"])).expect("run");
    let logits = outputs.get("logits").expect("logits");
    (logits.shape(), logits.to_f32().expect("floats").into_owned())
}

#[test]
fn kept_tokens_have_the_logits_of_the_whole_head_and_others_minus_infinity() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    fs::write(here.join("corpus.jsonl"), CORPUS).expect("corpus");
    let model = fixture("model");
    let report: Json =
        serde_json::from_str(&done(here, &["--json", "export", &model, "--vocabulary", "corpus.jsonl", "-o", "cut"]))
            .expect("JSON");
    let load = |root: &Path| onnx::load(&root.join("onnx/decoder_model_merged.onnx")).expect("graph");
    let (dense, cut) = (load(Path::new(&model)), load(&here.join("cut")));
    let ((shape, dense), (cut_shape, found)) = (logits(&dense), logits(&cut));
    assert_eq!(shape, cut_shape);
    let width = shape[2];
    let mut kept = Vec::new();
    for token in 0..width {
        let own = |values: &[f32]| -> Vec<u32> { (0..5).map(|row| values[row * width + token].to_bits()).collect() };
        if own(&found) == own(&dense) {
            kept.push(token);
        } else {
            assert_eq!(own(&found), [f32::NEG_INFINITY.to_bits(); 5], "token {token}");
        }
    }
    assert_eq!((report["kept"].as_u64(), report["of"].as_u64()), (Some(kept.len() as u64), Some(839)));
    assert!(kept.len() < 700, "{} tokens", kept.len());

    // By the tokenizer's own file: added tokens, and tokens of one character, can always be written.
    let tokenizer: Json =
        serde_json::from_slice(&fs::read(Path::new(&model).join("tokenizer.json")).expect("file")).expect("JSON");
    let added = tokenizer["added_tokens"].as_array().expect("tokens").iter();
    let mut wanted: Vec<u64> = added.map(|token| token["id"].as_u64().expect("an id")).collect();
    let vocabulary = tokenizer["model"]["vocab"].as_object().expect("tokens");
    let single = vocabulary.iter().filter(|(token, _)| token.chars().count() == 1);
    wanted.extend(single.map(|(_, id)| id.as_u64().expect("an id")));
    assert!(wanted.len() > 50 && wanted.iter().all(|id| kept.contains(&(*id as usize))), "{wanted:?}");
    let id = |word: &str| vocabulary.get(word).and_then(Json::as_u64).map(|id| id as usize);
    assert!(id("\u{120}red").is_some_and(|word| kept.contains(&word)));

    // The tokenizer and the embeddings are the model's own.
    for file in ["tokenizer.json", "onnx/embed_tokens.onnx", "config.json"] {
        assert_eq!(
            fs::read(here.join("cut").join(file)).expect("file"),
            fs::read(Path::new(&model).join(file)).expect("file")
        );
    }
    let record: Json =
        serde_json::from_slice(&fs::read(here.join("cut/interlace.json")).expect("record")).expect("JSON");
    assert_eq!(record["history"][0]["step"], "vocabulary");
}

#[test]
fn answers_within_the_corpus_stay_and_every_consumer_reads_the_smaller_head() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data, bench) = (fixture("model"), fixture("data/finetune.parquet"), fixture("data/bench-small.tsv"));
    let mut arguments = vec!["export", &model, "--vocabulary", &data, "--precision", "int4", "--rounding", "nearest"];
    arguments.extend(["-o", "both", "-q"]);
    let text = done(here, &arguments);
    assert!(text.contains("head: "), "{text}");
    for (variant, baseline) in [("fp32", "fp32"), ("q4", "fp32")] {
        let arguments =
            ["--json", "eval", "both", "--variant", variant, "--baseline", &model, "--baseline-variant", baseline];
        let more = ["--data", bench.as_str(), "--limit", "24", "-q", "-o", "report.json"];
        let report: Json = serde_json::from_str(&done(here, &[&arguments[..], &more].concat())).expect("JSON");
        assert_eq!(report["model"]["score"], report["baseline"]["score"], "{variant}");
        if variant == "fp32" {
            let answers = |side: &str| -> Vec<Json> {
                let all = report[side]["answers"].as_array().expect("answers").iter();
                all.map(|answer| answer["prediction"].clone()).collect()
            };
            assert!(answers("model").len() == 24 && answers("model") == answers("baseline"));
        }
    }
    done(here, &["export", "both", "--to", "generate", "-o", "one", "-q"]);
    done(here, &["verify", "both", "-q"]);
}

#[test]
fn heads_and_corpora_that_cannot_be_cut_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let model = fixture("model");
    fs::write(here.join("corpus.jsonl"), CORPUS).expect("corpus");
    fs::write(here.join("empty.jsonl"), "").expect("corpus");
    done(here, &["export", &model, "--precision", "int4", "--rounding", "nearest", "-o", "four", "-q"]);
    for (arguments, want) in [
        (&["export", "four", "--vocabulary", "corpus.jsonl"][..], "second precision"),
        (&["export", &model, "--vocabulary", "empty.jsonl"], "empty.jsonl"),
        (&["export", &model, "--vocabulary", "missing.jsonl"], "missing.jsonl"),
        (&["export", &model, "--vocabulary", "corpus.jsonl", "--opset", "21"], "is read by targets"),
        (&["export", &model, "--vocabulary", "corpus.jsonl", "--to", "safetensors"], "`--vocabulary`: is not read by"),
    ] {
        let output = interlace(here, &[arguments, &["-o", "out", "-q"]].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(want), "{arguments:?}: {}", stderr(&output));
        assert!(!here.join("out").exists());
    }
    // A folder with the 4-bit graphs alone.
    for file in fs::read_dir(here.join("four/onnx")).expect("folder").flatten() {
        if !file.file_name().to_string_lossy().contains("_q4") {
            fs::remove_file(file.path()).expect("removed");
        }
    }
    let output = interlace(here, &["export", "four", "--vocabulary", "corpus.jsonl", "-o", "out", "-q"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("MatMulNBits"), "{}", stderr(&output));
}

/// A decoder whose embeddings are its head: the table stays whole for prompts, and the head alone gets smaller.
#[test]
fn a_head_tied_to_the_embeddings_is_cut_alone_and_greedy_tokens_stay() {
    let mut net = Net::new();
    let ids = net.input("input_ids", DataType::Int64, &[-1]);
    let table = net.weight("table", Tensor::from_f32(&[50, 32], &numbers(50 * 32, 0.1)));
    let hidden = net.weight("hidden", Tensor::from_f32(&[32, 32], &numbers(32 * 32, 0.2)));
    let rows = net.node("Gather", &[table, ids], &[]);
    let product = net.node("MatMul", &[rows, hidden], &[]);
    let turned = net.node("Transpose", &[table], &[("perm", AttributeKind::Ints(vec![1, 0]))]);
    let logits = net.node("MatMul", &[product, turned], &[]);
    net.output(logits, "logits", &[-1, 50]);
    let kept: Vec<usize> = (0..50).filter(|token| token % 3 != 1).collect();
    let cut = cut_vocabulary(&net.0, net.0.graph.output("logits").expect("logits"), &kept).expect("a smaller head");
    let prompt: Vec<i64> = (0..50).collect();
    let (dense, found) = (run(&net.0, &prompt), run(&cut, &prompt));
    let greedy = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    let mut same = 0;
    for (dense, found) in dense.chunks(50).zip(found.chunks(50)) {
        let of = |row: &[f32]| -> Vec<f32> { kept.iter().map(|token| row[*token]).collect() };
        assert!(largest(&of(dense), &of(found)) < 1e-6);
        assert!((0..50).all(|token| kept.contains(&token) || found[token] == f32::NEG_INFINITY));
        let best = greedy(dense).filter(|token| kept.contains(token));
        same += usize::from(best.is_some());
        assert!(best.is_none_or(|best| greedy(found) == Some(best)));
    }
    assert!((20..50).contains(&same), "{same} of 50 greedy tokens are kept");
    let sizes: Vec<u64> = cut.graph.body.initializers.iter().map(|(_, tensor)| tensor.element_count()).collect();
    // The table, the inner product, and the head of 33 tokens.
    assert!(sizes.contains(&1600) && sizes.contains(&1024) && sizes.contains(&(33 * 32)), "{sizes:?}");
}
