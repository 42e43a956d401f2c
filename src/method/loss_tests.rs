//! Losses without layers against graphs whose layers were removed.

use std::path::{Path, PathBuf};

use super::batch::Conversation;
use super::select::MeasureLosses;
use super::switched::{Switched, open};
use super::*;
use crate::analysis::{self, Analysis};
use crate::base::{Cancel, Device, Progress};
use crate::ir::Model;
use crate::onnx;
use crate::rewrite::drop_layers;
use crate::runtime::{Decoder, Embedded, Runtime, SessionOptions, Step};

/// Head width of the zoo's networks; some of its graphs do not fix it.
pub const HEAD_DIM: Option<usize> = Some(16);

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// `-log softmax(logits)[target]`, computed in f64.
fn cross_entropy(logits: &[f32], target: i64) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&value| f64::from(value - most).exp()).sum();
    total.ln() - f64::from(logits[usize::try_from(target).unwrap()] - most)
}

#[test]
fn cross_entropy_equals_values_computed_by_hand() {
    // softmax of (0, ln 3) is (1/4, 3/4).
    assert!((cross_entropy(&[0.0, 3f32.ln()], 1) - (4.0f64 / 3.0).ln()).abs() < 1e-6);
    assert!((cross_entropy(&[0.0, 3f32.ln()], 0) - 4f64.ln()).abs() < 1e-6);
}

/// Deterministic pseudo-random numbers, equal on every machine.
pub fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// Three conversations, two of one length, without pictures.
fn conversations(decoder: &Decoder) -> Vec<Conversation> {
    conversations_of(decoder, &[7, 5, 7])
}

/// Conversations of these lengths, without pictures.
pub fn conversations_of(decoder: &Decoder, lengths: &[usize]) -> Vec<Conversation> {
    let hidden_size = decoder.hidden_size().unwrap_or(0);
    let rows = decoder.position_rows();
    let conversation = |(number, &time): (usize, &usize)| {
        let ids: Vec<i64> = (0..time).map(|at| ((at * 5 + number * 3) % 23) as i64).collect();
        let data = noise(time * hidden_size, number as u64);
        Conversation {
            number,
            answer_mask: (0..time).map(|at| at > 2 + number % 3).collect(),
            embedded: Embedded::text(&ids, hidden_size, data, 0, rows),
        }
    };
    lengths.iter().enumerate().map(conversation).collect()
}

/// The mean loss of the graph whose layers were removed.
fn pruned_loss(runtime: &Runtime, analysis: &Analysis, removed: &[usize], conversations: &[Conversation]) -> f64 {
    loss_of(runtime, &drop_layers(analysis, removed).unwrap(), conversations)
}

/// The mean loss of a graph, one conversation at a time.
pub fn loss_of(runtime: &Runtime, model: &Model, conversations: &[Conversation]) -> f64 {
    let session = runtime.session_of(model, &SessionOptions::default()).unwrap();
    let mut decoder = Decoder::new(session, HEAD_DIM).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for conversation in conversations {
        let step = Step::prefill(&[&conversation.embedded], false).unwrap();
        let (logits, _) = decoder.step(&step, None).unwrap();
        let width = *logits.shape().last().unwrap();
        let logits = logits.to_f32().unwrap();
        let next = conversation.embedded.input_ids.iter().zip(&conversation.answer_mask).skip(1);
        for (row, (&target, _)) in logits.chunks_exact(width).zip(next).filter(|(_, (_, answer))| **answer) {
            sum += cross_entropy(row, target);
            count += 1;
        }
    }
    sum / f64::from(count)
}

#[test]
fn losses_equal_those_of_the_graph_without_the_layers() {
    let table = std::fs::read_to_string(fixtures().join("zoo/cases.tsv")).unwrap();
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let (mut measured, mut restarting) = (0, 0);
    for line in table.lines() {
        let mut fields = line.split('\t');
        let file = fields.next().unwrap();
        // Half precision, and activations rounded to int8, change noticeably with the order of summation.
        let coarse = fields.nth(1).is_some_and(|tolerance| tolerance != "1e-4");
        let analysis = analysis::analyse(&onnx::load(&fixtures().join("zoo").join(file)).unwrap()).unwrap();
        // `Decoder::new` rejects the zoo's graphs that have inputs without a known meaning.
        let whole = drop_layers(&analysis, &[]).unwrap();
        let session = runtime.session_of(&whole, &SessionOptions::default()).unwrap();
        if Decoder::new(session, HEAD_DIM).is_err() {
            continue;
        }
        let (decoder, restarts) = open(&runtime, &analysis, HEAD_DIM, None).unwrap();
        let all = conversations(&decoder);
        let layers = analysis.map.layers.len();
        let switched = Switched::new(decoder, layers, file.to_string(), restarts, Cancel::default());
        let mut meter = LossMeter::over(switched, conversations_again(&all)).unwrap();
        measured += 1;
        restarting += usize::from(restarts);
        let tolerance = if coarse { 5e-3 } else { 1e-5 };
        for removed in [&[][..], &[3], &[0, 7], &[2, 4, 5]] {
            let want = pruned_loss(&runtime, &analysis, removed, &all);
            let found = meter.loss(removed).unwrap();
            assert!((found - want).abs() < tolerance, "{file} without {removed:?}: {found}, expected {want}");
        }
        let progress = Progress::new("test", "passes", 0);
        let found = meter.losses(&[1, 5], &[0, 2, 6, 7], &progress).unwrap();
        for (layer, found) in [0, 2, 6, 7].into_iter().zip(found) {
            let want = pruned_loss(&runtime, &analysis, &[1, 5, layer], &all);
            assert!((found - want).abs() < tolerance, "{file} without 1, 5, {layer}: {found}, expected {want}");
        }
    }
    assert!(measured >= 10 && restarting >= 5, "{measured} graphs measured, {restarting} of them restarted");
}

pub fn conversations_again(known: &[Conversation]) -> Vec<Conversation> {
    let again = known.iter().map(|conversation| Conversation {
        number: conversation.number,
        answer_mask: conversation.answer_mask.clone(),
        embedded: conversation.embedded.clone(),
    });
    again.collect()
}
