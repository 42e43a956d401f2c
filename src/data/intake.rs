//! Filters samples for a step: leaves out and counts unreadable rows and samples that are too long.

use std::sync::Mutex;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Peers, Result, Stopwatch, gathered, prepared_ahead, thread_count};
use crate::bundle::Bundle;

use super::dataset::Dataset;
use super::processor::Encoded;
use super::sample::Sample;

/// Largest fraction of the requested samples that may be unreadable.
const MOST_UNREADABLE: f64 = 0.05;
/// Maximum number of reasons in a [`LeftOut`].
const REASONS: usize = 5;

/// Samples that a step asked for and did not use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LeftOut {
    /// Rows that cannot be read, or pictures that do not decode.
    pub unreadable: u64,
    /// Longer than the most tokens that are allowed.
    pub too_long: u64,
    /// Without an answer token.
    pub without_answer: u64,
    /// The first of the unreadable ones, each with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

impl LeftOut {
    /// True when every sample was used.
    pub fn is_empty(&self) -> bool {
        *self == LeftOut::default()
    }

    /// The counts above 0 and the reasons, as text; `None` when every sample was used.
    pub fn summary(&self) -> Option<String> {
        let counts =
            [(self.unreadable, "unreadable"), (self.too_long, "too long"), (self.without_answer, "without an answer")];
        let parts: Vec<String> =
            counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        let mut text = parts.join(", ");
        for reason in &self.reasons {
            text.push_str(&format!("\n  {reason}"));
        }
        (!parts.is_empty()).then_some(text)
    }
}

/// Reads and encodes samples, and counts those that are left out.
#[derive(Debug)]
pub struct Intake {
    /// Name of the data in errors.
    subject: String,
    strict: bool,
    /// Maximum number of tokens in a sample.
    max_tokens: usize,
    left_out: Mutex<LeftOut>,
    /// Time of reading and encoding, summed over threads.
    preparing: Stopwatch,
}

impl Intake {
    /// An intake for samples of up to `max_tokens` tokens, or up to the model's context length if that is shorter. With
    /// `DataOptions::strict`, the first unreadable row is an error.
    pub fn new(dataset: &Dataset, bundle: &Bundle, max_tokens: usize) -> Self {
        let max_tokens = bundle
            .config()
            .and_then(|config| config.context_tokens)
            .map_or(max_tokens, |context| context.min(max_tokens));
        Intake {
            subject: format!("data `{}`", dataset.path().display()),
            strict: dataset.options().strict,
            max_tokens,
            left_out: Mutex::default(),
            preparing: Stopwatch::default(),
        }
    }

    /// Reads and encodes the samples with these indices, and leaves out those that cannot be used. Resets the counts.
    ///
    /// Errors: as `Dataset::read`. Each item: `Error::Invalid` when more than 5% of the samples, and more than one, are unreadable; the
    /// error of the first unreadable row with `DataOptions::strict`; errors other than `Error::Invalid` and
    /// `Error::Io`, unchanged.
    pub fn encoded<'a>(
        &'a self,
        dataset: &'a Dataset,
        indices: &[usize],
        encode: impl Fn(&Sample) -> Result<Encoded> + 'a,
    ) -> Result<impl Iterator<Item = Result<Encoded>> + 'a> {
        *self.lock() = LeftOut::default();
        let (samples, asked) = (dataset.read(indices)?, indices.len());
        Ok(samples.filter_map(move |sample| self.keep(sample.and_then(|sample| encode(&sample)), asked, Encoded::len)))
    }

    /// Passes [`Intake::encoded`] to `take`, with the samples' indices. One thread reads the samples, and others encode
    /// them, at most `window` ahead of `take`. The indices are one process's part of `asked` samples; the limit of 5%
    /// refers to `asked`.
    ///
    /// Errors: as `encoded`; those of `take`.
    pub fn ahead<R>(
        &self,
        (dataset, indices, asked): (&Dataset, &[usize], usize),
        window: usize,
        encode: impl Fn(&Sample) -> Result<Encoded> + Sync,
        take: impl FnOnce(&mut dyn Iterator<Item = Result<(usize, Encoded)>>) -> Result<R>,
    ) -> Result<R> {
        *self.lock() = LeftOut::default();
        // Whole prompts keep the network's threads busy, so one core is left to it.
        let threads = thread_count().saturating_sub(1);
        let read = || Ok(self.preparing.over(dataset.read(indices)?));
        let prepare = |sample: Result<Sample>| {
            self.preparing.time(|| {
                let sample = sample?;
                Ok((sample.index, encode(&sample)?))
            })
        };
        prepared_ahead((threads, window), read, prepare, |all| {
            take(&mut all.filter_map(|item| self.keep(item, asked, |(_, encoded)| encoded.len())))
        })
    }

    /// Time that [`Intake::ahead`] has spent with reading and encoding, summed over its threads.
    pub fn preparing(&self) -> &Stopwatch {
        &self.preparing
    }

    /// The sample, unless it is left out, which is counted. `length` is its number of tokens.
    fn keep<T>(&self, encoded: Result<T>, asked: usize, length: impl Fn(&T) -> usize) -> Option<Result<T>> {
        match encoded {
            Ok(encoded) if length(&encoded) > self.max_tokens => {
                self.lock().too_long += 1;
                None
            }
            Ok(encoded) => Some(Ok(encoded)),
            Err(error) => self.refuse(error, asked).err().map(Err),
        }
    }

    /// The counts so far.
    pub fn left_out(&self) -> LeftOut {
        self.lock().clone()
    }

    /// The sums of the counts of all processes that share `asked` samples.
    ///
    /// Errors: `Error::Invalid` when more than 5% of `asked` samples, and more than one, are unreadable; as `Peers::of_all`.
    pub fn left_out_by_all(&self, peers: Option<&dyn Peers>, asked: usize) -> Result<LeftOut> {
        let mut all = LeftOut::default();
        for own in gathered(peers, self.left_out())? {
            all.unreadable += own.unreadable;
            all.too_long += own.too_long;
            all.without_answer += own.without_answer;
            all.reasons.extend(own.reasons);
        }
        all.reasons.truncate(REASONS);
        self.check(&all, asked)?;
        Ok(all)
    }

    /// Errors: `Error::Invalid` when more than 5% of `asked` samples, and more than one, are unreadable.
    fn check(&self, left_out: &LeftOut, asked: usize) -> Result<()> {
        let one = if asked > 1 { 1.0 } else { 0.0 };
        if left_out.unreadable as f64 <= (MOST_UNREADABLE * asked as f64).max(one) {
            return Ok(());
        }
        // The reasons end with remedies of their own.
        let problem = format!(
            "more than 5% of {asked} samples cannot be read, repair the data or leave these rows out; the first: {}",
            left_out.reasons.join("; ")
        );
        Err(Error::invalid(&self.subject, problem))
    }

    /// Counts an unreadable row.
    ///
    /// Errors: `error` itself in strict mode, or if it is neither `Error::Invalid` nor `Error::Io`; as `check`.
    fn refuse(&self, error: Error, asked: usize) -> Result<()> {
        let of_a_row = matches!(error, Error::Invalid { .. } | Error::Io { .. });
        if self.strict || !of_a_row {
            return Err(error);
        }
        let mut left_out = self.lock();
        left_out.unreadable += 1;
        if left_out.reasons.len() < REASONS {
            left_out.reasons.push(error.to_string());
        }
        self.check(&left_out, asked)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LeftOut> {
        self.left_out.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
