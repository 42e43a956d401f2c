//! The divergence of a changed model's next-token distributions from those of the float model, on calibration data.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::{Error, Result};
use crate::bundle::{Bundle, Role};
use crate::data::{Encoder, Intake};
use crate::ir::Model;
use crate::prompt::Prompt;
use crate::runtime::{Decoder, FeatureCache, Runtime, SessionOptions, Step, VlmSession};

use super::super::components::NOTHING;
use super::RangeCalibration;

/// Bytes of image features that are kept between measurements.
const FEATURE_BYTES: usize = 512 << 20;

/// The components that can be measured.
pub(super) const MEASURED: [Role; 3] = [Role::Decoder, Role::EmbedTokens, Role::VisionEncoder];

/// A sample whose answer is predicted.
struct Question {
    prompt: Prompt,
    /// For each token: whether the next one belongs to an answer.
    predicts: Vec<bool>,
}

/// The float model, its logits on calibration data, and the session in which changed components are measured.
pub(super) struct Divergence<'a> {
    bundle: &'a Bundle,
    calibration: &'a RangeCalibration<'a>,
    runtime: Runtime,
    cache: Arc<FeatureCache>,
    questions: Vec<Question>,
    session: VlmSession,
    /// Components that are not the float ones now.
    changed: BTreeSet<Role>,
    /// File with the float model's logits at the positions that predict answers.
    reference: PathBuf,
    answer_tokens: u64,
    prefills: u64,
}

impl<'a> Divergence<'a> {
    /// Encodes the samples and runs the float model on them. `reference` names a new file for its logits.
    ///
    /// Errors: as `Intake::encoded` and `VlmSession::open`; `Error::Invalid` when no sample has an answer.
    pub fn open(bundle: &'a Bundle, calibration: &'a RangeCalibration<'a>, reference: &Path) -> Result<Self> {
        let dataset = calibration.dataset;
        let indices = dataset.draw(calibration.subset)?;
        let intake = Intake::new(dataset, bundle, calibration.max_tokens);
        let encoder = Encoder::open(bundle, dataset)?;
        let mut questions = Vec::new();
        for encoded in intake.encoded(dataset, &indices, |sample| encoder.conversation(sample))? {
            calibration.cancel.check(NOTHING)?;
            let encoded = encoded?;
            let mut predicts: Vec<bool> = encoded.answer_mask.iter().skip(1).copied().collect();
            predicts.push(false);
            if predicts.contains(&true) {
                questions.push(Question { prompt: encoded.into_prompt(), predicts });
            }
        }
        if questions.is_empty() {
            let left_out = intake.left_out().summary().unwrap_or_default();
            let problem = format!("no sample has an answer to measure on {left_out}");
            return Err(Error::invalid(format!("data `{}`", dataset.path().display()), problem.trim_end())
                .remedy("give conversations with answers, or raise `--max-tokens`"));
        }
        let runtime = Runtime::new(calibration.device)?;
        let cache = FeatureCache::new(FEATURE_BYTES);
        let options = SessionOptions::default();
        let decoder = float_decoder(&runtime, bundle)?;
        let session = VlmSession::with_decoder(&runtime, bundle, decoder, &options, &cache)?;
        let count = |question: &Question| question.predicts.iter().filter(|&&predicts| predicts).count() as u64;
        let answer_tokens = questions.iter().map(count).sum();
        let reference = reference.to_path_buf();
        let changed = BTreeSet::new();
        let mut divergence = Divergence {
            bundle,
            calibration,
            runtime,
            cache,
            questions,
            session,
            changed,
            reference,
            answer_tokens,
            prefills: 0,
        };
        divergence.write_reference()?;
        Ok(divergence)
    }

    /// Calibration samples with an answer.
    pub fn samples(&self) -> usize {
        self.questions.len()
    }

    /// Answer tokens of all samples.
    pub fn answer_tokens(&self) -> u64 {
        self.answer_tokens
    }

    /// Prefills so far.
    pub fn prefills(&self) -> u64 {
        self.prefills
    }

    fn write_reference(&mut self) -> Result<()> {
        let path = self.reference.clone();
        let failed = |e| Error::io("write", &path, e);
        let mut file = BufWriter::new(File::create_new(&path).map_err(failed)?);
        self.each_row(|row| {
            let bytes: Vec<u8> = row.iter().flat_map(|value| value.to_le_bytes()).collect();
            file.write_all(&bytes).map_err(failed)
        })?;
        file.flush().map_err(failed)
    }

    /// Mean divergence in nats over all answer tokens, with these graphs in place of the float ones.
    ///
    /// Errors: `Error::Invalid` for logits that are not numbers; `Error::Engine` when a run fails; `Error::Interrupted` when the
    /// user asked to stop.
    pub fn measure(&mut self, graphs: &BTreeMap<Role, Model>) -> Result<f64> {
        for role in MEASURED {
            match graphs.get(&role) {
                Some(graph) => self.replace(role, Some(graph))?,
                None if self.changed.contains(&role) => self.replace(role, None)?,
                None => {}
            }
        }
        let path = self.reference.clone();
        let failed = |e| Error::io("read", &path, e);
        let mut file = BufReader::new(File::open(&path).map_err(failed)?);
        let mut total = 0.0;
        let mut bytes = Vec::new();
        self.each_row(|row| {
            bytes.resize(4 * row.len(), 0);
            file.read_exact(&mut bytes).map_err(failed)?;
            let float = bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
            total += kl_divergence(&float.collect::<Vec<f32>>(), row)?;
            Ok(())
        })?;
        Ok(total / self.answer_tokens as f64)
    }

    fn replace(&mut self, role: Role, graph: Option<&Model>) -> Result<()> {
        let options = SessionOptions::default();
        match (role, graph) {
            (Role::Decoder, Some(graph)) => {
                let head_dim = self.bundle.config().and_then(|config| config.head_size());
                let session = self.runtime.session_of(graph, &options)?;
                self.session.replace_decoder(Decoder::prefill_only(session, head_dim)?);
            }
            (Role::Decoder, None) => self.session.replace_decoder(float_decoder(&self.runtime, self.bundle)?),
            (Role::EmbedTokens, Some(graph)) => {
                self.session.replace_embedding(self.runtime.session_of(graph, &options)?)?;
            }
            (Role::EmbedTokens, None) => {
                let path = self.bundle.path_of(self.bundle.require(role)?);
                self.session.replace_embedding(self.runtime.session(&path, &options)?)?;
            }
            (_, Some(graph)) => {
                self.session.replace_vision(&self.runtime, self.bundle, graph, &options, FEATURE_BYTES)?;
            }
            (_, None) => self.session.restore_vision(&self.runtime, self.bundle, &options, &self.cache)?,
        }
        match graph {
            Some(_) => self.changed.insert(role),
            None => self.changed.remove(&role),
        };
        Ok(())
    }

    /// Gives the logits at every position that predicts an answer token, in the order of the samples.
    fn each_row(&mut self, mut each: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        for question in &self.questions {
            self.calibration.cancel.check(NOTHING)?;
            let embedded = self.session.embed(&question.prompt)?;
            let decoder = self.session.decoder_mut();
            let name = decoder.logits_name().to_string();
            let step = Step::prefill(&[&embedded], false)?;
            let logits = decoder.prefill_added(&step, &[], Some(&[&name]))?.take(&name)?;
            self.prefills += 1;
            let tokens = question.predicts.len();
            let [1, rows, width] = logits.shape()[..] else {
                return Err(not_every_position(decoder, &logits.shape(), tokens));
            };
            if rows != tokens || width == 0 {
                return Err(not_every_position(decoder, &logits.shape(), tokens));
            }
            let logits = logits.to_f32()?;
            for (row, _) in logits.chunks_exact(width).zip(&question.predicts).filter(|(_, predicts)| **predicts) {
                each(row)?;
            }
        }
        Ok(())
    }
}

fn float_decoder(runtime: &Runtime, bundle: &Bundle) -> Result<Decoder> {
    let head_dim = bundle.config().and_then(|config| config.head_size());
    let path = bundle.path_of(bundle.require(Role::Decoder)?);
    Decoder::prefill_only(runtime.session(&path, &SessionOptions::default())?, head_dim)
}

fn not_every_position(decoder: &Decoder, shape: &[usize], tokens: usize) -> Error {
    let problem = format!("gave logits of shape {shape:?} for {tokens} tokens");
    Error::unsupported(decoder.session().subject(), problem)
        .remedy("the sensitivity needs the logits of every position")
}

/// `sum(p * ln(p / q))` in nats, of the softmax `p` of the first logits and `q` of the second, computed in f64.
///
/// Errors: `Error::Invalid` for logits that are not numbers.
fn kl_divergence(exact: &[f32], found: &[f32]) -> Result<f64> {
    let (exact, found) = (log_softmax(exact)?, log_softmax(found)?);
    let terms = exact.iter().zip(&found).filter(|(p, _)| **p > f64::NEG_INFINITY);
    Ok(terms.map(|(p, q)| p.exp() * (p - q)).sum())
}

fn log_softmax(logits: &[f32]) -> Result<Vec<f64>> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !most.is_finite() || logits.iter().any(|value| value.is_nan()) {
        return Err(Error::invalid("logits", "contain a value that is not a number")
            .remedy("run `eval` on the float model and on the variant: one of them computes it"));
    }
    let shifted = || logits.iter().map(|&value| f64::from(value) - f64::from(most));
    let total = shifted().map(f64::exp).sum::<f64>().ln();
    Ok(shifted().map(|value| value - total).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_equals_values_computed_by_hand() {
        // (1/4, 3/4) from (1/2, 1/2): 1/2 ln 2 + 1/2 ln(2/3).
        let logits = [0.0, 3f32.ln()];
        let want = 0.5 * 2f64.ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((kl_divergence(&[5.0, 5.0], &logits).unwrap() - want).abs() < 1e-7);
        let want = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((kl_divergence(&logits, &[1000.0, 1000.0]).unwrap() - want).abs() < 1e-7);
        assert_eq!(kl_divergence(&logits, &logits).unwrap(), 0.0);
        // A token without any probability adds nothing.
        assert_eq!(kl_divergence(&[1.0, f32::NEG_INFINITY], &[1.0, f32::NEG_INFINITY]).unwrap(), 0.0);
        assert!(kl_divergence(&logits, &[f32::NAN, 0.0]).is_err());
    }
}
