//! Likelihood of a benchmark's right answers under a model.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Provenance, Result, gathered, is_own};
use crate::bundle::ModelSource;
use crate::data::{BenchRow, Benchmark, MessagePart, Processor, Sample, Turn};
use crate::eval::{
    Interval, Likelihood, PromptStyle, QuestionLikelihood, benchmark_name, kept_likelihood, needs_judge, question_text,
    reference_of, right_answer,
};
use crate::method::{AnswerLikelihood, LIKELIHOOD_BLOCK, answer_likelihoods};

use super::engine::{BOOTSTRAP_SEED, Engine, EvalSettings, digests, head};

/// Output of `eval --likelihood-only`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LikelihoodReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Of the model.
    pub model: Likelihood,
    /// Of the model that it is compared with, on the same questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Likelihood>,
    /// `exp` of the difference of the mean log-likelihoods, with its 95% paired bootstrap interval over questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Interval>,
}

impl LikelihoodReport {
    /// Version of the schema.
    pub const SCHEMA_VERSION: u32 = 1;
}

impl Engine {
    /// Log-likelihood of every question's right answer, given the prompt of `eval`.
    ///
    /// Errors: those of `Processor::encode_conversation` and `answer_likelihoods`; `Error::Unsupported` for a benchmark
    /// without right answers; `Error::Invalid` naming a row without a question or answer.
    pub fn likelihood(
        &self,
        model: &ModelSource,
        benchmark: &Benchmark,
        data: &Path,
        settings: &EvalSettings,
        cancel: &Cancel,
    ) -> Result<Likelihood> {
        let name = benchmark_name(data);
        if needs_judge(&name) {
            let problem = "has no right answers: a language model judges its answers";
            return Err(Error::unsupported(format!("benchmark `{name}`"), problem)
                .remedy("look at its scores, or take a benchmark with answers"));
        }
        let bundle = model.open()?;
        let processor = Processor::open_with(&bundle, &settings.images)?;
        let rows = benchmark.rows();
        let rows = &rows[..settings.limit.unwrap_or(rows.len()).min(rows.len())];
        let peers = self.peers();
        let blocks = rows.chunks(LIKELIHOOD_BLOCK).enumerate().filter(|(number, _)| is_own(peers, *number));
        let own: Vec<&BenchRow> = blocks.flat_map(|(_, block)| block).collect();
        let conversations = own
            .iter()
            .map(|row| processor.encode_conversation(&answered(benchmark, &name, row, settings.prompt_style)?));
        let (runtime, features) = (&self.runtime, &self.cache);
        let found = answer_likelihoods(&bundle, runtime, features, conversations, own.len(), cancel)?;
        let found = in_order(gathered(peers, found)?, rows.len());
        let answers: Vec<QuestionLikelihood> = rows
            .iter()
            .zip(&found)
            .map(|(row, answer)| QuestionLikelihood {
                index: row.index.clone(),
                log_likelihood: answer.log_likelihood,
                tokens: answer.tokens,
            })
            .collect();
        let answer_tokens = found.iter().map(|answer| answer.tokens).sum();
        let total: f64 = found.iter().map(|answer| answer.log_likelihood).sum();
        Ok(Likelihood { mean_log_likelihood: total / (answer_tokens as f64).max(1.0), answer_tokens, answers })
    }
}

/// The likelihoods of all rows in order. Of n processes, number p has those of the blocks p, p + n, p + 2n and so on.
fn in_order(by_process: Vec<Vec<AnswerLikelihood>>, rows: usize) -> Vec<AnswerLikelihood> {
    let mut blocks: Vec<_> = by_process.iter().map(|own| own.chunks(LIKELIHOOD_BLOCK)).collect();
    let count = blocks.len().max(1);
    let taken = (0..rows.div_ceil(LIKELIHOOD_BLOCK)).filter_map(|number| blocks[number % count].next());
    taken.flatten().copied().collect()
}

/// A question with its right answer.
fn answered(benchmark: &Benchmark, name: &str, row: &BenchRow, style: PromptStyle) -> Result<Sample> {
    let images = benchmark.images(row)?;
    let mut user: Vec<MessagePart> = (0..images.len()).map(MessagePart::Image).collect();
    user.push(MessagePart::Text(question_text(benchmark, name, row, style)?));
    let turn = Turn { user, assistant: right_answer(&reference_of(benchmark, row)?) };
    let id = format!("row `{}` of benchmark `{name}`", row.index);
    Ok(Sample { index: 0, id, images, system: None, turns: vec![turn], text: None, tensors: None })
}

/// Retention of a baseline's likelihood per answer token.
///
/// Errors: `Error::Invalid` when the two have different answers.
pub fn compare_likelihoods(model: &Likelihood, baseline: &Likelihood) -> Result<Interval> {
    let key = |likelihood: &Likelihood| -> Vec<(String, u64)> {
        likelihood.answers.iter().map(|answer| (answer.index.clone(), answer.tokens)).collect()
    };
    if key(model) != key(baseline) {
        return Err(Error::invalid("likelihood", "model and baseline did not read the same answers")
            .remedy("compare models with one tokenizer on the same questions"));
    }
    let pairs = model.answers.iter().zip(&baseline.answers);
    let rows: Vec<(f64, f64)> = pairs.map(|(a, b)| (a.log_likelihood - b.log_likelihood, a.tokens as f64)).collect();
    Ok(kept_likelihood(&rows, BOOTSTRAP_SEED))
}

/// Likelihoods of a model and of a baseline, without generating answers.
///
/// Errors: as [`Engine::likelihood`] and [`compare_likelihoods`].
pub fn eval_likelihood(
    engine: &Engine,
    model: &ModelSource,
    baseline: Option<&ModelSource>,
    data: &Path,
    settings: &EvalSettings,
    cancel: &Cancel,
) -> Result<LikelihoodReport> {
    let benchmark = Benchmark::open(data)?;
    let inputs = digests(model, baseline, &benchmark)?;
    let likelihood = |path: &ModelSource| engine.likelihood(path, &benchmark, data, settings, cancel);
    let base = baseline.map(likelihood).transpose()?;
    let found = likelihood(model)?;
    let retention = base.as_ref().map(|base| compare_likelihoods(&found, base)).transpose()?;
    let provenance = head(LikelihoodReport::SCHEMA_VERSION, inputs, settings, model, baseline)?;
    Ok(LikelihoodReport { provenance, model: found, baseline: base, retention })
}
