//! Benchmarks through a model: pictures and prompts are prepared in one thread while the runtime answers in another.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::base::{Cancel, Error, Progress, Result, ahead};
use crate::bundle::Bundle;
use crate::data::{BenchRow, Benchmark, Part, Processor};
use crate::prompt::Prompt;
use crate::runtime::{FeatureCache, Runtime, SessionOptions, VlmSession};

use super::metrics::{Metric, Reference, metric_for, says_yes};
use super::prompt::{question_text, reference_of};
use super::report::{Answer, EvalTiming, GroupRetention, GroupScore, ModelScores, Retention, YesNoScores};
use super::stats::{Pair, RESAMPLES, retention};

/// Longest answer where neither the user nor the model's config says anything.
const DEFAULT_MAX_NEW_TOKENS: usize = 128;
/// Batches that are sorted by length together, so that little padding is needed.
const BATCHES_PER_WINDOW: usize = 8;
/// The group of questions without a category.
const NO_GROUP: &str = "all";

/// A model that answers questions.
#[derive(Debug)]
pub struct LoadedModel {
    /// As reports show it.
    pub name: String,
    pub vlm: VlmSession,
    pub processor: Processor,
}

impl LoadedModel {
    /// Loads a model folder with its own processor, template and tokenizer.
    ///
    /// Errors: as `Bundle::open`, `VlmSession::open` and `Processor::open`.
    pub fn open(path: &Path, runtime: &Runtime, options: &SessionOptions, cache: &Arc<FeatureCache>) -> Result<Self> {
        let bundle = Bundle::open(path)?;
        Ok(LoadedModel {
            name: path.display().to_string(),
            vlm: VlmSession::open(runtime, &bundle, options, cache)?,
            processor: Processor::open(&bundle)?,
        })
    }
}

/// How a benchmark is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalOptions {
    /// Questions that are answered together.
    pub batch_size: usize,
    /// Longest answer in tokens; `None` takes the model's own setting.
    pub max_new_tokens: Option<usize>,
    /// Asks only the first questions.
    pub limit: Option<usize>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        EvalOptions { batch_size: 16, max_new_tokens: None, limit: None }
    }
}

/// A question ready for the runtime.
struct Prepared {
    number: usize,
    prompt: Prompt,
}

/// The name under which a benchmark is known: its file's, without extension.
pub fn benchmark_name(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Answers every question greedily and judges the answers. `name` is the benchmark's, see [`benchmark_name`].
///
/// Errors: `Error::Invalid` naming the row when a picture does not decode or there is no answer to compare with;
/// `Error::Engine` when the runtime fails; `Error::Interrupted` when the user asked to stop.
pub fn evaluate(
    model: &mut LoadedModel,
    benchmark: &Benchmark,
    name: &str,
    options: &EvalOptions,
    cancel: &Cancel,
) -> Result<ModelScores> {
    if options.batch_size == 0 {
        return Err(Error::invalid("batch size", "is 0, expected at least 1"));
    }
    let rows = benchmark.rows();
    let rows = &rows[..options.limit.unwrap_or(rows.len()).min(rows.len())];
    if rows.is_empty() {
        return Err(Error::invalid("benchmark", "has no questions"));
    }
    // Everything that can be wrong with a row is looked at before the first answer is computed.
    let judged: Vec<(Reference, &'static Metric)> = rows
        .iter()
        .map(|row| reference_of(benchmark, row).map(|reference| (metric_for(name, &reference), reference)))
        .map(|result| result.map(|(metric, reference)| (reference, metric)))
        .collect::<Result<_>>()?;
    let max_new_tokens =
        options.max_new_tokens.or(model.vlm.settings().max_new_tokens).unwrap_or(DEFAULT_MAX_NEW_TOKENS);
    let began = Instant::now();
    let progress = Progress::new("eval", "questions", rows.len() as u64);
    let LoadedModel { vlm, processor, name: model_name } = model;
    let processor = &*processor;
    let mut predictions: Vec<String> = vec![String::new(); rows.len()];
    let mut timing = EvalTiming::default();
    let window = options.batch_size.saturating_mul(BATCHES_PER_WINDOW);
    let mut answer = |mut prepared: Vec<Prepared>| -> Result<()> {
        prepared.sort_by_key(|item| item.prompt.input_ids.len());
        for batch in prepared.chunks_mut(options.batch_size) {
            cancel.check("no report is written")?;
            let prompts: Vec<Prompt> = batch.iter_mut().map(|item| std::mem::take(&mut item.prompt)).collect();
            let answers = vlm.generate(&prompts, max_new_tokens, cancel)?;
            for ((item, prompt), answer) in batch.iter().zip(&prompts).zip(&answers) {
                predictions[item.number] = processor.decode(answer)?.trim().to_string();
                timing.prompt_tokens += prompt.input_ids.len() as u64;
                timing.generated_tokens += answer.len() as u64;
            }
            progress.advance(batch.len() as u64);
        }
        Ok(())
    };
    let mut waiting = Vec::new();
    let prepared = || Ok(rows.iter().enumerate().map(|(number, row)| prepare(processor, benchmark, name, number, row)));
    ahead(window, prepared, |mut all| {
        all.try_for_each(|item| {
            waiting.push(item?);
            if waiting.len() < window { Ok(()) } else { answer(std::mem::take(&mut waiting)) }
        })
    })?;
    answer(waiting)?;
    timing.seconds = began.elapsed().as_secs_f64();
    timing.questions_per_second = rows.len() as f64 / timing.seconds.max(f64::MIN_POSITIVE);
    let answers = rows.iter().zip(&judged).zip(predictions).map(|((row, (reference, metric)), prediction)| Answer {
        index: row.index.clone(),
        group: benchmark.cell(row, "category").unwrap_or(NO_GROUP).to_string(),
        metric: metric.name.to_string(),
        score: (metric.score)(reference, &prediction),
        prediction,
    });
    let references: Vec<&Reference> = judged.iter().map(|(reference, _)| reference).collect();
    Ok(summarise(model_name.clone(), name.to_string(), answers.collect(), &references, timing))
}

fn prepare(
    processor: &Processor,
    benchmark: &Benchmark,
    name: &str,
    number: usize,
    row: &BenchRow,
) -> Result<Prepared> {
    let images = benchmark.images(row)?;
    let mut parts: Vec<Part> = (0..images.len()).map(Part::Image).collect();
    parts.push(Part::Text(question_text(benchmark, name, row)?));
    let encoded = processor.encode_question(&format!("row `{}` of benchmark `{name}`", row.index), &parts, &images)?;
    Ok(Prepared { number, prompt: encoded.into_prompt() })
}

/// Groups in the order of their first question.
fn summarise(
    model: String,
    benchmark: String,
    answers: Vec<Answer>,
    references: &[&Reference],
    timing: EvalTiming,
) -> ModelScores {
    let groups: Vec<GroupScore> = group_names(&answers)
        .into_iter()
        .map(|group| {
            let own: Vec<(&Answer, &Reference)> = answers
                .iter()
                .zip(references)
                .filter(|(answer, _)| answer.group == group)
                .map(|(a, r)| (a, *r))
                .collect();
            let mut metrics = BTreeMap::new();
            for (answer, _) in &own {
                *metrics.entry(answer.metric.clone()).or_insert(0) += 1;
            }
            GroupScore {
                group,
                questions: own.len(),
                score: mean(own.iter().map(|(answer, _)| answer.score)),
                metrics,
                yes_no: yes_no_scores(own.iter().filter(|(answer, _)| answer.metric == "yes_no").copied()),
            }
        })
        .collect();
    ModelScores {
        model,
        benchmark,
        questions: answers.len(),
        mean_of_groups: mean(groups.iter().map(|group| group.score)),
        mean_of_questions: mean(answers.iter().map(|answer| answer.score)),
        groups,
        timing,
        answers,
    }
}

fn group_names(answers: &[Answer]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for answer in answers {
        if !names.contains(&answer.group) {
            names.push(answer.group.clone());
        }
    }
    names
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

fn yes_no_scores<'a>(rows: impl Iterator<Item = (&'a Answer, &'a Reference)>) -> Option<YesNoScores> {
    let (mut questions, mut right, mut said_yes) = (0usize, 0.0, 0usize);
    let (mut true_positives, mut positives) = (0usize, 0usize);
    for (answer, reference) in rows {
        let truth = says_yes(&reference.answer) == Some(true);
        let said = says_yes(&answer.prediction) == Some(true);
        questions += 1;
        right += answer.score;
        said_yes += usize::from(said);
        positives += usize::from(truth);
        true_positives += usize::from(truth && said);
    }
    if questions == 0 {
        return None;
    }
    let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let (precision, recall) = (share(true_positives, said_yes), share(true_positives, positives));
    let f1 = if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
    Some(YesNoScores {
        questions,
        accuracy: right / questions as f64,
        precision,
        recall,
        f1,
        yes_ratio: share(said_yes, questions),
    })
}

/// What a model keeps of a baseline's scores on the same questions.
///
/// Errors: `Error::Invalid` when the two did not answer the same questions.
pub fn compare(model: &ModelScores, baseline: &ModelScores, seed: u64) -> Result<Retention> {
    let same = model.answers.len() == baseline.answers.len()
        && model.answers.iter().zip(&baseline.answers).all(|(a, b)| a.index == b.index && a.group == b.group);
    if !same {
        return Err(Error::invalid("retention", "model and baseline did not answer the same questions"));
    }
    let pairs = |group: Option<&str>| -> Vec<Pair> {
        let rows = model.answers.iter().zip(&baseline.answers);
        rows.filter(|(answer, _)| group.is_none_or(|group| answer.group == group))
            .map(|(a, b)| (a.score, b.score))
            .collect()
    };
    let names = group_names(&model.answers);
    let strata: Vec<Vec<Pair>> = names.iter().map(|name| pairs(Some(name))).collect();
    let groups = names.iter().zip(&strata).map(|(name, stratum)| GroupRetention {
        group: name.clone(),
        retention: retention(std::slice::from_ref(stratum), seed),
    });
    Ok(Retention {
        groups: groups.collect(),
        mean_of_groups: retention(&strata, seed),
        mean_of_questions: retention(&[pairs(None)], seed),
        resamples: RESAMPLES,
        seed,
    })
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
