//! `prune --keep-image-tokens`: a graph between embedding and decoder leaves image tokens out by the rule of DART.

use std::fs;
use std::path::Path;

use interlace::base::{Cancel, Device};
use interlace::bundle::Bundle;
use interlace::data::{Encoded, Processor, Sample};
use interlace::ir::DataType;
use interlace::runtime::{Embedded, FeatureCache, Runtime, SessionOptions, TensorValue, TokenPruner, VlmSession};

use super::answer_graph::answer_with;
use super::cli::{fixture, interlace, stderr, stdout};
use super::families::{Family, sample};

/// Tokens of an answer: the positions behind the first one count too.
const TOKENS: i64 = 4;
/// Prompts with one picture, with two, with none, and with an answered turn before the last.
const ASKED: [&str; 5] = ["photo", "palette", "two", "none", "turns"];

/// Positions of a prompt's tokens that stay, in double precision: of each picture the four tokens with the largest L1 norm, and
/// for each of them and of four text tokens in turn an equal share of what is left, those least similar to it.
fn rule(embedded: &Embedded, question: usize, pictures: &[usize], keep: f64) -> Vec<usize> {
    let row = |at: usize| &embedded.data[at * embedded.hidden_size..(at + 1) * embedded.hidden_size];
    let norm = |at: usize| row(at).iter().map(|x| f64::from(x.abs())).sum::<f64>();
    let length = |at: usize| row(at).iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let dot = |a: usize, b: usize| row(a).iter().zip(row(b)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let by_norm = |list: Vec<usize>, most: usize| -> Vec<usize> {
        let mut list: Vec<(f64, usize)> = list.into_iter().map(|at| (norm(at), at)).collect();
        list.sort_by(|a, b| b.0.total_cmp(&a.0));
        list.into_iter().take(most).map(|(_, at)| at).collect()
    };
    let image = &embedded.side.image;
    let text = by_norm((0..question.min(image.len())).filter(|&at| !image[at]).collect(), 4);
    let mut places = (0..image.len()).filter(|&at| image[at]);
    let mut kept: Vec<usize> = (0..image.len()).filter(|&at| !image[at]).collect();
    for &count in pictures {
        let own: Vec<usize> = places.by_ref().take(count).collect();
        let quota = (keep * count as f64 - 1e-9).ceil() as usize;
        let mut stay = by_norm(own.clone(), quota.min(4));
        let pivots: Vec<usize> = stay.iter().chain(&text).copied().collect();
        let turns = pivots.len().min(quota - stay.len());
        for (number, &pivot) in pivots.iter().take(turns).enumerate() {
            let share = (quota - stay.len()).div_ceil(turns - number);
            let cosine = |at: usize| dot(at, pivot) / (length(at) * length(pivot)).max(1e-8);
            let rest = own.iter().filter(|at| !stay.contains(at));
            let mut rest: Vec<(f64, usize)> = rest.map(|&at| (cosine(at), at)).collect();
            rest.sort_by(|a, b| a.0.total_cmp(&b.0));
            stay.extend(rest.into_iter().take(share).map(|(_, at)| at));
        }
        assert_eq!(stay.len(), quota);
        kept.extend(stay);
    }
    kept.sort_unstable();
    kept
}

/// True for equal positions. Areas of one colour have tokens that are equal but for rounding, which decides between them: such a
/// token may stand for another one.
fn same_tokens(embedded: &Embedded, found: &[usize], want: &[usize]) -> bool {
    let row = |at: usize| &embedded.data[at * embedded.hidden_size..(at + 1) * embedded.hidden_size];
    let near = |a: usize, b: usize| row(a).iter().zip(row(b)).all(|(a, b)| (a - b).abs() <= 1e-4 * a.abs().max(1.0));
    let mut missing: Vec<usize> = want.iter().copied().filter(|at| !found.contains(at)).collect();
    let others = found.iter().filter(|at| !want.contains(at));
    found.len() == want.len()
        && others.copied().all(|at| match missing.iter().position(|&other| near(at, other)) {
            Some(place) => missing.remove(place) < usize::MAX,
            None => false,
        })
}

/// Image tokens of each picture of a sample, from prompts with one picture each.
fn counts(processor: &Processor, whole: &Sample) -> Vec<usize> {
    let user = whole.turns.iter().flat_map(|turn| &turn.user);
    let pictures = user.filter_map(|part| match part {
        interlace::data::MessagePart::Image(at) => Some(*at),
        interlace::data::MessagePart::Text(_) => None,
    });
    let alone = |at: usize| {
        let turn = interlace::data::Turn {
            user: vec![interlace::data::MessagePart::Image(0), interlace::data::MessagePart::Text("x".into())],
            assistant: String::new(),
        };
        let one = Sample { images: vec![whole.images[at].clone()], turns: vec![turn], ..whole.clone() };
        processor.encode_prompt(&one).expect("one picture").image_positions.len()
    };
    pictures.map(alone).collect()
}

struct Opened {
    model: VlmSession,
    processor: Processor,
}

fn opened(folder: &Path) -> Opened {
    let bundle = Bundle::open(folder).expect("a model folder");
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let model = VlmSession::open(&runtime, &bundle, &SessionOptions::default(), &FeatureCache::new(1 << 20));
    Opened { model: model.expect("a model"), processor: Processor::open(&bundle).expect("a processor") }
}

/// Values of the tokens at these positions.
fn at<T: Copy>(values: &[T], width: usize, kept: &[usize]) -> Vec<T> {
    kept.iter().flat_map(|&at| values[at * width..(at + 1) * width].iter().copied()).collect()
}

fn check_rule(archive: &str, name: &str, keep: f64) {
    let family = Family::open(archive, name);
    family.run(&["prune", name, "--keep-image-tokens", &keep.to_string(), "-o", "less", "-q"]);
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let mut dense = opened(&family.here().join(name));
    let mut less = opened(&family.here().join("less"));
    let (mut pictured, mut left_out) = (0, 0);
    for (case, want) in family.cases().filter(|(case, _)| ASKED.contains(case)) {
        let mut sample = sample(&want["turns"]);
        if let Some(last) = sample.turns.last_mut() {
            last.assistant = "A green line.".into();
        }
        let encoded = dense.processor.encode_conversation(&sample).expect("a conversation");
        let answers = encoded.answer_mask.clone();
        let prompt = encoded.into_prompt();
        let whole = dense.model.embed(&prompt).expect("embeddings");
        let part = less.model.embed(&prompt).expect("embeddings");
        if prompt.pictures.is_empty() {
            assert_eq!(whole, part, "{name} {case}");
            continue;
        }
        let counts = counts(&dense.processor, &sample);
        let by_rule = rule(&whole, prompt.question.unwrap_or(whole.len()), &counts, keep);
        let kept = part.kept.clone().expect("fewer tokens");
        assert!(same_tokens(&whole, &kept, &by_rule), "{name} {case}: {kept:?}, by the rule {by_rule:?}");
        // Everything about a token goes with it, its position too.
        assert_eq!(part.data, at(&whole.data, whole.hidden_size, &kept), "{name} {case}");
        assert_eq!(part.input_ids, at(&whole.input_ids, 1, &kept));
        for (part, whole) in part.positions.iter().zip(&whole.positions) {
            assert_eq!(*part, at(whole, 1, &kept));
        }
        assert_eq!((part.positions.len(), part.next_position), (whole.positions.len(), whole.next_position));
        assert_eq!(part.side.image, at(&whole.side.image, 1, &kept));
        if !whole.side.types.is_empty() {
            assert_eq!(part.side.types, at(&whole.side.types, 1, &kept));
        }
        let place = |at: usize| whole.side.image[..at].iter().filter(|&&image| image).count();
        let places: Vec<usize> = kept.iter().filter(|&&at| whole.side.image[at]).map(|&at| place(at)).collect();
        for (part, level) in part.side.deepstack.iter().zip(&whole.side.deepstack) {
            assert_eq!(*part, at(level, whole.hidden_size, &places), "{name} {case}");
        }
        // The tokens of the answers are the same.
        let ids = |ids: &[i64], mask: &[bool]| -> Vec<i64> {
            ids.iter().zip(mask).filter(|(_, answer)| **answer).map(|(&id, _)| id).collect()
        };
        assert_eq!(ids(&part.input_ids, &part.of_kept(&answers)), ids(&whole.input_ids, &answers));
        if pictured == 0 {
            // A pruner that keeps all tokens changes nothing.
            let pruner = TokenPruner::build(&runtime, dense.model.decoder(), 1.0, &SessionOptions::default());
            dense.model.set_token_pruner(Some(pruner.expect("a pruner"))).expect("image tokens that can be left out");
            let all = dense.model.embed(&prompt).expect("embeddings");
            dense.model.set_token_pruner(None).expect("no pruner");
            assert_eq!(all.kept, Some((0..whole.len()).collect()), "{name} {case}");
            assert_eq!(Embedded { kept: None, ..all }, whole, "{name} {case}");
        }
        left_out += whole.len() - part.len();
        pictured += 1;
    }
    assert!(pictured >= 3 && left_out > 0, "{name}: {pictured} prompts with pictures, {left_out} tokens left out");
}

#[test]
fn the_tokens_that_stay_are_those_of_the_rule() {
    for (archive, name) in
        [("smolvlm", "smolvlm"), ("internvl", "internvl"), ("gemma3", "gemma3"), ("mistral3", "mistral3")]
    {
        check_rule(archive, name, 0.5);
    }
    check_rule("smolvlm", "smolvlm", 0.15);
}

#[test]
fn tokens_that_stay_keep_three_rows_of_positions_and_features_of_inner_layers() {
    for (archive, name) in [
        ("lfm2_vl", "lfm2_vl"),
        // A second embedding of each token.
        ("gemma3n", "gemma3n"),
        // Three rows of positions.
        ("qwen2_vl", "qwen2_vl"),
        ("glm4v", "glm4v"),
        // Features of inner layers.
        ("qwen3_vl", "qwen3_vl"),
    ] {
        check_rule(archive, name, 0.5);
    }
    check_rule("qwen3_vl", "qwen3_vl", 0.9);
}

/// Compares the answers of one graph with those of the components, both without the same image tokens.
fn check_graph(archive: &str, name: &str) {
    let family = Family::open(archive, name);
    family.run(&["prune", name, "--keep-image-tokens", "0.4", "-o", "less", "-q"]);
    family.run(&["export", "less", "--to", "generate", "-o", "out", "-q"]);
    let Opened { mut model, processor } = opened(&family.here().join("less"));
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let graph = family.here().join("out/onnx/generate.onnx");
    let mut graph = runtime.session(&graph, &SessionOptions::default()).expect("a graph");
    let (mut checked, mut pictured) = (0, 0);
    for (case, want) in family.cases().filter(|(case, _)| ASKED.contains(case)) {
        let sample = sample(&want["turns"]);
        let encoded: Encoded = processor.encode_prompt(&sample).expect("a prompt");
        let counts = counts(&processor, &sample).into_iter().map(|count| count as i64).collect::<Vec<i64>>();
        let counts = TensorValue::from_i64(DataType::Int64, &[counts.len()], counts).expect("a tensor");
        let more = vec![("picture_tokens".to_string(), counts)];
        let Some(found) = answer_with(&mut graph, &encoded, TOKENS, more) else { continue };
        pictured += usize::from(!encoded.image_positions.is_empty());
        let prompt = encoded.into_prompt();
        let answers = model.generate(&[prompt], TOKENS as usize, &Cancel::default()).expect("an answer");
        assert_eq!(found, answers[0], "{name} {case}");
        checked += 1;
    }
    assert!(checked >= 3 && pictured >= 2, "{name}: {checked} prompts, {pictured} with pictures");
}

#[test]
fn one_graph_answers_as_the_components_do_with_fewer_image_tokens() {
    for (archive, name) in [("smolvlm", "smolvlm"), ("llava", "llava"), ("internvl", "internvl"), ("gemma3", "gemma3")]
    {
        check_graph(archive, name);
    }
}

#[test]
fn one_graph_with_three_rows_of_positions_answers_as_the_components_do_with_fewer_image_tokens() {
    for (archive, name) in
        [("qwen2_vl", "qwen2_vl"), ("glm4v", "glm4v"), ("mistral3", "mistral3"), ("lfm2_vl", "lfm2_vl")]
    {
        check_graph(archive, name);
    }
}

#[test]
fn every_verb_runs_a_model_that_leaves_image_tokens_out() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    let run = |arguments: &[&str]| {
        let output = interlace(here, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        stdout(&output)
    };
    let text = run(&["prune", &model, "--keep-image-tokens", "0.5", "-o", "less"]);
    assert!(text.contains("50% of each picture's tokens are read"), "{text}");
    assert!(here.join("less/onnx/token_pruner.onnx").exists());
    let verified = run(&["verify", "less"]);
    assert!(verified.contains("token_pruner.onnx") && verified.contains("24 of 32 tokens"), "{verified}");
    run(&["inspect", "less"]);
    let data = ["--data", data.as_str(), "--turns", "separate"];
    let with = |first: &[&'static str], more: &[&'static str]| {
        let all = first.iter().copied().chain(data).chain(more.iter().copied());
        run(&all.map(str::to_string).collect::<Vec<_>>().iter().map(String::as_str).collect::<Vec<_>>())
    };
    with(&["score", "less"], &["--samples", "3", "-o", "scores.json"]);
    run(&["plan", "less", "--scores", "scores.json", "--drop-count", "2", "-o", "plan.json"]);
    run(&["prune", "less", "--plan", "plan.json", "-o", "both"]);
    assert!(here.join("both/onnx/token_pruner.onnx").exists());
    run(&["bench", "both", "--rounds", "1", "--new-tokens", "2", "--baseline", "less", "-o", "bench.json"]);
    let bench = fixture("data/bench-small.tsv");
    run(&["eval", "less", "--data", &bench, "--limit", "4", "--baseline", &model, "-o", "report.json"]);

    // Finetuning reads all tokens, so it refuses.
    let train = ["finetune", "both", "--plan", "plan.json", "--recipe", "paper", "-o", "out"];
    let output = interlace(here, &train.iter().copied().chain(data).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("leaves image tokens out"), "{}", stderr(&output));
    for (target, why) in [
        ("transformers-js", "counts image tokens itself"),
        ("genai", "counts image tokens itself"),
        ("triton", "one token for each row of features"),
        ("openvino", "no program is known"),
        ("single-file", "no program is known"),
    ] {
        let output = interlace(here, &["export", "less", "--to", target, "-o", "out"]);
        assert_eq!(output.status.code(), Some(2), "{target}: {}", stderr(&output));
        assert!(stderr(&output).contains(why), "{target}: {}", stderr(&output));
        assert!(!here.join("out").exists());
    }

    // Taken out again, the model is the one before to the last bit.
    run(&["prune", "less", "--keep-image-tokens", "1", "-o", "again"]);
    let onnx = |folder: &Path| -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(folder.join("onnx"))
            .expect("files")
            .map(|entry| entry.expect("entry").path())
            .map(|path| (path.file_name().expect("name").to_string_lossy().into(), fs::read(path).expect("bytes")))
            .collect();
        files.sort();
        files
    };
    assert!(onnx(&here.join("again")) == onnx(Path::new(&model)));
    for keep in ["0", "1.5", "-1", "nan", "half"] {
        let output = interlace(here, &["prune", &model, &format!("--keep-image-tokens={keep}"), "-o", "bad"]);
        assert_eq!(output.status.code(), Some(2), "{keep}");
    }
    assert!(!here.join("bad").exists());
}

#[test]
fn models_whose_image_tokens_cannot_be_left_out_are_refused_with_the_reason() {
    for (archive, name, why) in [
        ("janus", "janus", "vision_encoder"),
        ("llava", "llava_single", "vision_encoder"),
        ("qwen2_5_vl", "qwen2_5_vl_genai", "ONNX Runtime GenAI"),
    ] {
        let family = Family::open(archive, name);
        let output = interlace(family.here(), &["prune", name, "--keep-image-tokens", "0.5", "-o", "out"]);
        assert_eq!(output.status.code(), Some(2), "{name}: {}", stderr(&output));
        assert!(stderr(&output).contains(why), "{name}: {}", stderr(&output));
        assert!(!family.here().join("out").exists());
    }
}
