//! Decoders of many exporters in ONNX Runtime: prefill, cached steps, and batches compared with single prompts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use interlace::base::{Cancel, Device};
use interlace::onnx;
use interlace::prompt::Prompt;
use interlace::runtime::{Decoder, Embedded, Runtime, SessionOptions, Step, VlmSession, VlmSettings};

/// The heads of the zoo's networks are 16 wide. Some graphs do not declare it.
const HEAD_DIM: usize = 16;

fn zoo(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(file)
}

fn runtime() -> Runtime {
    Runtime::new(Device::Cpu).expect("ONNX Runtime")
}

fn decoder(file: &str) -> Decoder {
    let session = runtime().session(&zoo(file), &SessionOptions::default()).expect("a session");
    Decoder::new(session, Some(HEAD_DIM)).expect("a decoder")
}

fn floats(tensor: &tch::Tensor) -> Vec<f32> {
    Vec::try_from(tensor.contiguous().view([-1])).expect("floats")
}

fn integers(tensor: &tch::Tensor) -> Vec<i64> {
    Vec::try_from(tensor.contiguous().view([-1])).expect("integers")
}

fn largest_difference(found: &[f32], want: &[f32]) -> f32 {
    assert_eq!(found.len(), want.len());
    found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn prefill_and_a_cached_step_equal_pytorch() {
    let cases = [
        ("smolvlm/ts17.onnx", "smolvlm", 1),
        ("qwen3_vl/ts17.onnx", "qwen3_vl", 3),
        ("qwen3_vl/dyn23.onnx", "qwen3_vl", 3),
        ("genai/qwen3_vl-fp32-embeds/model.onnx", "qwen3_vl", 3),
        ("qwen3_vl/mobius.onnx", "qwen3_vl", 3),
        ("llama/optimum-O2.onnx", "llama", 1),
        ("hfexp/llama-cpu/decode.onnx", "llama", 1),
    ];
    for (file, network, rows) in cases {
        let path = zoo(&format!("expected/{network}.nodrop.npz"));
        let arrays: HashMap<String, tch::Tensor> = tch::Tensor::read_npz(path).expect("npz").into_iter().collect();
        let mut decoder = decoder(file);
        assert_eq!(decoder.position_rows(), rows, "{file}");
        assert_eq!(decoder.slots().len(), 16, "{file}");
        let mut cache = None;
        let mut length = 0;
        for (given, wanted) in [("in", "exp"), ("in2", "exp2")] {
            let ids = integers(&arrays[&format!("{given}.input_ids")]);
            let embeds = floats(&arrays[&format!("{given}.inputs_embeds")]);
            let past = vec![1; length];
            length += ids.len();
            let positions = integers(&arrays[&format!("{given}.position_ids")]);
            let (data, hidden_size) = if decoder.takes_embeds() { (embeds, 64) } else { (Vec::new(), 0) };
            let mut row = Embedded::text(&ids, hidden_size, data, 0, rows);
            row.positions = positions.chunks(ids.len()).take(rows).map(<[i64]>::to_vec).collect();
            let step = match cache {
                Some(_) => Step::decode(&[&row], &[past], false),
                None => Step::prefill(&[&row], false),
            };
            let step = step.expect("a step");
            let (logits, longer) = decoder.step(&step, cache).expect("a step");
            let difference =
                largest_difference(&logits.to_f32().expect("logits"), &floats(&arrays[&format!("{wanted}.logits")]));
            assert!(difference <= 1e-4, "{file} {given}: {difference}");
            assert_eq!(longer.length(), length);
            cache = Some(longer);
        }
    }
}

#[test]
fn a_graph_in_memory_gives_the_same_results_as_its_file() {
    // One model with external data in one file, and one with all data inline.
    for file in ["qwen3_vl/mobius.onnx", "smolvlm/ts17.onnx"] {
        let model = onnx::load(&zoo(file)).expect("a model");
        let session = runtime().session_of(&model, &SessionOptions::default()).expect("a session");
        drop(model);
        let mut in_memory = Decoder::new(session, Some(HEAD_DIM)).expect("a decoder");
        let mut from_file = decoder(file);
        let embeds: Vec<f32> = (0..5 * 64).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) * 0.5).collect();
        let rows = from_file.position_rows();
        let row = Embedded::text(&[0; 5], 64, embeds, 0, rows);
        let step = Step::prefill(&[&row], false).expect("a step");
        let run =
            |decoder: &mut Decoder| decoder.step(&step, None).expect("a step").0.to_f32().expect("logits").into_owned();
        assert_eq!(run(&mut in_memory), run(&mut from_file), "{file}");
    }
}

fn text_model(file: &str) -> VlmSession {
    let settings = VlmSettings { eos_token_ids: vec![2], ..VlmSettings::default() };
    VlmSession::new(None, None, decoder(file), settings).expect("a model")
}

#[test]
fn a_batch_gives_the_same_answers_as_single_prompts() {
    // With a mask and positions, with `Attention` fused by Optimum, and with a fixed batch of one.
    for file in ["optimum/llama-with-past/model.onnx", "llama/optimum-O2.onnx", "hfexp/llama-cpu/decode.onnx"] {
        let mut model = text_model(file);
        let prompts: Vec<Prompt> = (0..5)
            .map(|row| Prompt {
                input_ids: (0..3 + 2 * row).map(|at| 5 + (at * 31 + row * 17) % 600).collect(),
                ..Prompt::default()
            })
            .collect();
        let cancel = Cancel::default();
        let alone: Vec<Vec<i64>> = prompts
            .iter()
            .map(|prompt| model.generate(std::slice::from_ref(prompt), 9, &cancel).expect("an answer").remove(0))
            .collect();
        assert!(alone.iter().all(|answer| answer.len() <= 9), "{alone:?}");
        assert!(
            alone.iter().any(|answer| answer != &alone[0]),
            "{file}: all answers are equal, so the comparison is void"
        );
        let together = model.generate(&prompts, 9, &cancel).expect("answers");
        assert_eq!(together, alone, "{file}");
    }
}

#[test]
fn an_answer_ends_before_its_end_token() {
    let prompt = [Prompt { input_ids: vec![5, 17, 99], ..Prompt::default() }];
    let cancel = Cancel::default();
    let free = text_model("llama/optimum-O2.onnx").generate(&prompt, 6, &cancel).expect("an answer").remove(0);
    let end = free[2];
    let first = free.iter().position(|&token| token == end).expect("it is there");
    let settings = VlmSettings { eos_token_ids: vec![end], ..VlmSettings::default() };
    let mut model = VlmSession::new(None, None, decoder("llama/optimum-O2.onnx"), settings).expect("a model");
    assert_eq!(model.generate(&prompt, 6, &cancel).expect("an answer").remove(0), free[..first]);
}

#[test]
fn a_cancel_request_ends_generation() {
    let cancel = Cancel::default();
    cancel.request();
    let prompt = [Prompt { input_ids: vec![5, 17, 99], ..Prompt::default() }];
    let error = text_model("llama/optimum-O2.onnx").generate(&prompt, 6, &cancel).expect_err("stopped");
    assert!(matches!(error, interlace::base::Error::Interrupted { .. }), "{error}");
}

#[test]
fn prompts_that_do_not_fit_the_graph_are_refused() {
    let mut ids = decoder("llama/optimum-O2.onnx");
    let embeddings = Embedded { input_ids: Vec::new(), ..Embedded::text(&[1], 64, vec![0.0; 64], 0, 1) };
    let error = ids.step(&Step::prefill(&[&embeddings], true).expect("a step"), None).expect_err("ids").to_string();
    assert!(error.contains("the graph takes token ids"), "{error}");
    let three = Embedded::text(&[1, 2], 0, Vec::new(), 0, 3);
    let error = ids.step(&Step::prefill(&[&three], true).expect("a step"), None).expect_err("rows").to_string();
    assert!(error.contains("3 rows of positions, the graph takes one"), "{error}");
    let text = Embedded::text(&[1, 2], 0, Vec::new(), 0, 1);
    let decode = Step::decode(&[&text], &[vec![1]], true).expect("a step");
    let error = ids.step(&decode, None).expect_err("no cache").to_string();
    assert!(error.contains("continues 1 positions, the cache holds 0"), "{error}");
    let mut embeds = decoder("smolvlm/ts17.onnx");
    let error = embeds.step(&Step::prefill(&[&text], true).expect("a step"), None).expect_err("ids").to_string();
    assert!(error.contains("holds token ids, the graph takes `inputs_embeds`"), "{error}");
}
