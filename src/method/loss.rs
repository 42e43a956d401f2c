//! Measures the loss of a decoder without some of its layers, for strategies that select by loss.

use crate::analysis::{self, Analysis};
use crate::base::{Cancel, Device, Error, Progress, Result};
use crate::bundle::{Bundle, Role};
use crate::data::{Dataset, Encoder, Intake, LeftOut, Subset};
use crate::onnx;
use crate::rewrite::{
    KEEP_INPUT, LOSS_OUTPUT, RESTART_INPUT, ROWS_INPUT, STREAM_INPUT, STREAM_OUTPUT_PREFIX, TARGETS_INPUT,
    bypass_layers,
};
use crate::runtime::{
    Decoder, Embedded, FeatureCache, Outputs, Runtime, SessionOptions, Step, Tensor, VlmSession, headed,
};

use super::select::MeasureLosses;

/// Samples with more tokens are left out; also the default of `score --max-tokens`.
const MAX_TOKENS: usize = 8192;

/// Limit on the tokens of one decoder pass; a longer conversation runs alone. Bounds memory and
/// does not affect the result.
const TOKENS_PER_PASS: usize = 2048;

/// An embedded conversation.
pub(super) struct Conversation {
    /// Its index among all conversations.
    pub number: usize,
    pub answer_mask: Vec<bool>,
    pub embedded: Embedded,
}

/// Conversations of one length, which run together without padding.
pub(super) struct Batch {
    pub step: Step,
    /// `[1, N, 2]`, the graph's input of row positions; `targets` is `[1, N, 1]`.
    pub rows: Tensor,
    pub targets: Tensor,
    /// `[N]`: index of the conversation of each row.
    pub owners: Vec<usize>,
}

/// Calibration conversations, embedded once, and one decoder session with an input that switches layers off.
pub struct LossMeter {
    decoder: Decoder,
    num_layers: usize,
    /// Path of the decoder in its folder.
    file: String,
    /// See `rewrite::Bypass::restarts`.
    restarts: bool,
    batches: Vec<Batch>,
    /// Ids of the samples used.
    samples: Vec<String>,
    left_out: LeftOut,
    answer_tokens: usize,
    cancel: Cancel,
}

impl LossMeter {
    /// Embeds the drawn conversations with their pictures, and loads the decoder.
    ///
    /// Errors: as `Intake::encoded`, `VlmSession::open` and `rewrite::bypass_layers`; `Error::Invalid` when there is no
    /// answer token.
    pub fn new(bundle: &Bundle, dataset: &Dataset, subset: Subset, device: Device, cancel: &Cancel) -> Result<Self> {
        let encoder = Encoder::open(bundle, dataset)?;
        let runtime = Runtime::new(device)?;
        let indices = dataset.draw(subset)?;
        let component = bundle.require(Role::Decoder)?;
        let analysis = analysis::analyse(&headed(bundle, onnx::load(&bundle.path_of(component))?)?)?;
        let head_dim = bundle.config().and_then(|config| config.head_size());
        let decoder = open(&runtime, &analysis, head_dim)?;
        let options = SessionOptions::default();
        let features = FeatureCache::new(64 << 20);
        let mut model = VlmSession::with_decoder(&runtime, bundle, decoder, &options, &features)?;
        let mut conversations = Vec::with_capacity(indices.len());
        let progress = Progress::new("embed", "samples", indices.len() as u64);
        let mut samples = Vec::with_capacity(indices.len());
        let intake = Intake::new(dataset, bundle, MAX_TOKENS);
        for encoded in intake.encoded(dataset, &indices, |sample| encoder.conversation(sample))? {
            cancel.check("no plan is written")?;
            let encoded = encoded?;
            samples.push(encoded.id.clone());
            let answer_mask = encoded.answer_mask.clone();
            let embedded = model.embed(&encoded.into_prompt())?;
            conversations.push(Conversation { number: conversations.len(), answer_mask, embedded });
            progress.advance(1);
        }
        drop(progress);
        let file = component.file.clone();
        let meter = Self::over(model.into_decoder(), analysis.map.layers.len(), conversations, cancel)?;
        Ok(LossMeter { file, samples, left_out: intake.left_out(), ..meter })
    }

    fn over(decoder: Decoder, num_layers: usize, conversations: Vec<Conversation>, cancel: &Cancel) -> Result<Self> {
        let restarts = decoder.session().input(RESTART_INPUT).is_some();
        let batches = batches(conversations, decoder.fixed_batch())?;
        let answer_tokens = batches.iter().map(|batch| batch.targets.shape()[1]).sum();
        if answer_tokens == 0 {
            return Err(Error::invalid("calibration data", "has no answer to measure a loss on")
                .remedy("give conversations with answers, or running text"));
        }
        let cancel = cancel.clone();
        Ok(LossMeter {
            decoder,
            num_layers,
            file: String::new(),
            restarts,
            batches,
            samples: Vec::new(),
            left_out: LeftOut::default(),
            answer_tokens,
            cancel,
        })
    }

    /// Ids of the samples on which losses are measured.
    pub fn samples(&self) -> &[String] {
        &self.samples
    }

    /// Samples that were drawn but not used.
    pub fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    /// Number of answer tokens over which a loss is averaged.
    pub fn answer_tokens(&self) -> usize {
        self.answer_tokens
    }

    /// Mean cross-entropy over all answer tokens, in nats, of the decoder without these layers.
    ///
    /// Errors: `Error::Engine` when a run fails; `Error::Interrupted` on Ctrl-C.
    pub fn loss(&mut self, removed: &[usize]) -> Result<f64> {
        let mut sum = 0.0;
        for number in 0..self.batches.len() {
            sum += sum_of(&self.pass(number, removed, None, &[LOSS_OUTPUT])?)?;
        }
        Ok(sum / self.answer_tokens as f64)
    }

    /// One forward pass. `restart` is the layer from which it runs and the stream before that layer.
    fn pass(
        &mut self,
        number: usize,
        removed: &[usize],
        restart: Option<(usize, &Tensor)>,
        wanted: &[&str],
    ) -> Result<Outputs> {
        self.cancel.check("no plan is written")?;
        let batch = &self.batches[number];
        let begin = restart.map_or(0, |(layer, _)| layer);
        let keep = (0..self.num_layers).map(|layer| layer >= begin && !removed.contains(&layer)).collect();
        let keep = Tensor::new(&[self.num_layers], keep)?;
        let mut added = vec![(KEEP_INPUT, &keep), (ROWS_INPUT, &batch.rows), (TARGETS_INPUT, &batch.targets)];
        let flag = Tensor::new(&[1], vec![restart.is_some()])?;
        let nothing = match self.decoder.session().input(STREAM_INPUT) {
            Some(port) => Some(Tensor::empty(port.dtype, &[0, 0, port.fixed_size(2).unwrap_or(0)])?),
            None => None,
        };
        if let Some(nothing) = &nothing {
            added.push((RESTART_INPUT, &flag));
            added.push((STREAM_INPUT, restart.map_or(nothing, |(_, stream)| stream)));
        }
        let outputs = self.decoder.prefill_added(&batch.step, &added, Some(wanted));
        outputs
            .map_err(|error| error.during(format!("measuring the loss of `{}` without layers {removed:?}", self.file)))
    }
}

impl MeasureLosses for LossMeter {
    fn passes(&self) -> u64 {
        self.batches.len() as u64
    }

    /// Each batch runs once to record the stream before every candidate, and then from each candidate on.
    fn losses(&mut self, removed: &[usize], candidates: &[usize], progress: &Progress) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; candidates.len()];
        let names: Vec<String> = candidates
            .iter()
            .filter(|&&layer| layer > 0)
            .map(|layer| format!("{STREAM_OUTPUT_PREFIX}{layer}"))
            .collect();
        for number in 0..self.batches.len() {
            let streams = match self.restarts && !names.is_empty() {
                true => {
                    let wanted: Vec<&str> = names.iter().map(String::as_str).collect();
                    Some(self.pass(number, removed, None, &wanted)?)
                }
                false => None,
            };
            for (sum, &layer) in sums.iter_mut().zip(candidates) {
                let restart = match &streams {
                    Some(streams) if layer > 0 => {
                        Some((layer, streams.get(&format!("{STREAM_OUTPUT_PREFIX}{layer}"))?))
                    }
                    _ => None,
                };
                let trial: Vec<usize> = removed.iter().copied().chain([layer]).collect();
                *sum += sum_of(&self.pass(number, &trial, restart, &[LOSS_OUTPUT])?)?;
                progress.advance(1);
            }
        }
        Ok(sums.into_iter().map(|sum| sum / self.answer_tokens as f64).collect())
    }
}

pub(super) fn open(runtime: &Runtime, analysis: &Analysis, head_dim: Option<usize>) -> Result<Decoder> {
    let bypass = bypass_layers(analysis)?;
    Decoder::prefill_only(runtime.session_of(&bypass.model, &SessionOptions::default())?, head_dim)
}

fn sum_of(outputs: &Outputs) -> Result<f64> {
    Ok(outputs.get(LOSS_OUTPUT)?.data::<f32>()?.iter().map(|&loss| f64::from(loss)).sum())
}

/// Groups conversations with answers into batches of one length.
pub(super) fn batches(mut conversations: Vec<Conversation>, fixed_batch: Option<usize>) -> Result<Vec<Batch>> {
    conversations.retain(|conversation| conversation.answer_mask.iter().skip(1).any(|&answer| answer));
    conversations.sort_by_key(|conversation| conversation.embedded.len());
    let mut batches = Vec::new();
    for group in conversations.chunk_by(|a, b| a.embedded.len() == b.embedded.len()) {
        let time = group[0].embedded.len();
        let size = fixed_batch.unwrap_or(TOKENS_PER_PASS / time.max(1)).max(1);
        for group in group.chunks(size) {
            batches.push(batch(group)?);
        }
    }
    Ok(batches)
}

fn batch(group: &[Conversation]) -> Result<Batch> {
    let (mut rows, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for (number, conversation) in group.iter().enumerate() {
        let next = conversation.embedded.input_ids.iter().zip(&conversation.answer_mask).skip(1);
        for (position, (&target, _)) in next.enumerate().filter(|(_, (_, answer))| **answer) {
            rows.extend([number as i64, position as i64]);
            targets.push(target);
            owners.push(conversation.number);
        }
    }
    let embedded: Vec<&Embedded> = group.iter().map(|conversation| &conversation.embedded).collect();
    Ok(Batch {
        step: Step::prefill(&embedded, false)?,
        rows: Tensor::new(&[1, targets.len(), 2], rows)?,
        targets: Tensor::new(&[1, targets.len(), 1], targets)?,
        owners,
    })
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::rewrite::drop_layers;
    use crate::runtime::cross_entropy;

    /// Head width of the zoo's networks; some of its graphs do not fix it.
    const HEAD_DIM: Option<usize> = Some(16);

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
    }

    /// Deterministic pseudo-random numbers, equal on every machine.
    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// Three conversations, two of one length, without pictures.
    fn conversations(decoder: &Decoder) -> Vec<Conversation> {
        let hidden_size = decoder.hidden_size().unwrap_or(0);
        let rows = decoder.position_rows();
        [7usize, 5, 7]
            .iter()
            .enumerate()
            .map(|(number, &time)| {
                let ids: Vec<i64> = (0..time).map(|at| ((at * 5 + number * 3) % 23) as i64).collect();
                let data = noise(time * hidden_size, number as u64);
                Conversation {
                    number,
                    answer_mask: (0..time).map(|at| at > 2 + number).collect(),
                    embedded: Embedded::text(&ids, hidden_size, data, 0, rows),
                }
            })
            .collect()
    }

    /// The mean loss of the graph without the removed layers, one conversation at a time.
    fn pruned_loss(runtime: &Runtime, analysis: &Analysis, removed: &[usize], conversations: &[Conversation]) -> f64 {
        let model = drop_layers(analysis, removed).unwrap();
        let mut decoder =
            Decoder::new(runtime.session_of(&model, &SessionOptions::default()).unwrap(), HEAD_DIM).unwrap();
        let (mut sum, mut count) = (0.0, 0);
        for conversation in conversations {
            let step = Step::prefill(&[&conversation.embedded], false).unwrap();
            let (logits, _) = decoder.step(&step, None).unwrap();
            let width = *logits.shape().last().unwrap();
            let logits = logits.to_f32().unwrap();
            let next = conversation.embedded.input_ids.iter().zip(&conversation.answer_mask).skip(1);
            for (row, (&target, _)) in logits.chunks_exact(width).zip(next).filter(|(_, (_, answer))| **answer) {
                sum += cross_entropy(row, target).unwrap();
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
            let decoder = open(&runtime, &analysis, HEAD_DIM).unwrap();
            let said = conversations(&decoder);
            let mut meter =
                LossMeter::over(decoder, analysis.map.layers.len(), conversations_again(&said), &Cancel::default())
                    .unwrap();
            measured += 1;
            restarting += usize::from(meter.restarts);
            let tolerance = if coarse { 5e-3 } else { 1e-5 };
            for removed in [&[][..], &[3], &[0, 7], &[2, 4, 5]] {
                let want = pruned_loss(&runtime, &analysis, removed, &said);
                let found = meter.loss(removed).unwrap();
                assert!((found - want).abs() < tolerance, "{file} without {removed:?}: {found}, expected {want}");
            }
            let progress = Progress::new("test", "passes", 0);
            let found = meter.losses(&[1, 5], &[0, 2, 6, 7], &progress).unwrap();
            assert_eq!(found.len(), 4, "{file}");
            for (layer, found) in [0, 2, 6, 7].into_iter().zip(found) {
                let want = pruned_loss(&runtime, &analysis, &[1, 5, layer], &said);
                assert!((found - want).abs() < tolerance, "{file} without 1, 5, {layer}: {found}, expected {want}");
            }
        }
        assert!(measured >= 10 && restarting >= 5, "{measured} graphs measured, {restarting} of them restarted");
    }

    fn conversations_again(said: &[Conversation]) -> Vec<Conversation> {
        let again = said.iter().map(|conversation| Conversation {
            number: conversation.number,
            answer_mask: conversation.answer_mask.clone(),
            embedded: conversation.embedded.clone(),
        });
        again.collect()
    }
}
