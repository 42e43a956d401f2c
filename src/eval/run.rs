//! Runs benchmarks: other threads prepare pictures and prompts while one runs the model.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::base::{
    Cancel, Error, Peers, Progress, Result, Stopwatch, gathered, is_first, is_own, prepared_ahead, thread_count,
};
use crate::bundle::ModelSource;
use crate::data::{BenchRow, Benchmark, ImageSettings, MessagePart, Processor};
use crate::prompt::Prompt;
use crate::runtime::{FeatureCache, Profile, Runtime, SessionOptions, VlmSession};

use super::chat::{ChatQuestion, Judge};
use super::judge::{Reference, read_yes_no};
use super::metrics::{CIRCULAR, Metric, metric_for, needs_judge, rotation_of};
use super::mia::{grading_question, read_grades};
use super::prompt::{PromptStyle, question_text, reference_of};
use super::report::{Answer, EvalTiming, ModelScores};
use super::summary::{NO_GROUP, grades_by_type, groups_by, summarise};

/// Longest answer in tokens by default: benchmarks expect a letter, a word or a short phrase.
const DEFAULT_MAX_NEW_TOKENS: usize = 128;
/// Number of batches whose prompts are sorted by length together, to reduce padding.
const BATCHES_PER_WINDOW: usize = 8;

/// A loaded model that can answer questions.
#[derive(Debug)]
pub struct LoadedModel {
    /// Name in reports.
    pub name: String,
    /// Sessions of the vision encoder, the embedding and the decoder.
    pub vlm: VlmSession,
    /// Tokenizer, chat template and image processor.
    pub processor: Processor,
}

impl LoadedModel {
    /// Loads a model folder with its own processor, template and tokenizer. `images` overrides
    /// the processor's settings.
    ///
    /// Errors: as `ModelSource::open`, `VlmSession::open` and `Processor::open_with`.
    pub fn open(
        source: &ModelSource,
        runtime: &Runtime,
        options: &SessionOptions,
        cache: &Arc<FeatureCache>,
        images: &ImageSettings,
    ) -> Result<Self> {
        let bundle = source.open()?;
        Ok(LoadedModel {
            name: source.to_string(),
            vlm: VlmSession::open(runtime, &bundle, options, cache)?,
            processor: Processor::open_with(&bundle, images)?,
        })
    }
}

/// Settings of a benchmark run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalOptions {
    /// Number of questions per batch.
    pub batch_size: usize,
    /// Longest answer in tokens; `None` uses the model's own setting.
    pub max_new_tokens: Option<usize>,
    /// Number of questions, from the first on; `None` means all.
    pub limit: Option<usize>,
    /// Wording of the questions.
    pub prompt_style: PromptStyle,
    /// The language model that judges answers, for benchmarks that need one.
    pub judge: Option<Judge>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        EvalOptions {
            batch_size: 16,
            max_new_tokens: None,
            limit: None,
            prompt_style: PromptStyle::default(),
            judge: None,
        }
    }
}

/// A question prepared for the runtime.
struct Prepared {
    number: usize,
    prompt: Prompt,
}

/// The name of a benchmark: the file name without extension.
pub fn benchmark_name(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Answers every question with greedy decoding and judges the answers. `name` is the benchmark's, see
/// [`benchmark_name`].
///
/// Errors: `Error::Invalid` naming the row when a picture cannot be decoded or there is no reference answer;
/// `Error::Engine` when the runtime fails; `Error::Interrupted` when the user asked to stop.
pub fn evaluate(
    model: &mut LoadedModel,
    benchmark: &Benchmark,
    name: &str,
    options: &EvalOptions,
    cancel: &Cancel,
) -> Result<ModelScores> {
    evaluate_with_peers(None, model, benchmark, name, options, cancel)
}

/// [`evaluate`] by several processes, each on its part of the questions. Which questions are answered in one batch does not
/// depend on how many there are, and all have the same scores then; only the first one asks a judge.
///
/// Errors: as `evaluate` and `Peers::of_all`.
pub fn evaluate_with_peers(
    peers: Option<&dyn Peers>,
    model: &mut LoadedModel,
    benchmark: &Benchmark,
    name: &str,
    options: &EvalOptions,
    cancel: &Cancel,
) -> Result<ModelScores> {
    if options.batch_size == 0 {
        return Err(
            Error::invalid("batch size", "is 0, expected at least 1").remedy("give `--batch-size` a larger number")
        );
    }
    let rows = benchmark.rows();
    let rows: Vec<&BenchRow> = rows.iter().take(options.limit.unwrap_or(rows.len())).collect();
    let judge = judge_for(options, name)?;
    // Everything that can be wrong with a row is looked at before the first answer is computed.
    let judged = references(benchmark, name, &rows)?;
    let (rows, judged) = scored(rows, judged);
    if rows.is_empty() {
        return Err(Error::invalid(
            format!("benchmark `{name}`"),
            "holds rotations of questions, but none of the questions",
        )
        .remedy("a question's own row has its `g_index`, or an index below 1,000,000, as its index"));
    }
    let max_new_tokens =
        options.max_new_tokens.or(model.vlm.settings().max_new_tokens).unwrap_or(DEFAULT_MAX_NEW_TOKENS);
    let (pictures, waited) = (Stopwatch::default(), Stopwatch::default());
    let progress = Progress::new("eval", "questions", rows.len() as u64);
    let LoadedModel { vlm, processor, name: model_name } = model;
    let (began, before) = (Instant::now(), vlm.times());
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
    let own = || Ok(rows.iter().enumerate().filter(|(number, _)| is_own(peers, number / window)));
    let prepared = |row| pictures.time(|| prepare(processor, benchmark, name, options.prompt_style, row));
    // The first window is one batch, so that the model begins at once; each is twice as long as the one before it.
    let mut size = options.batch_size;
    prepared_ahead((thread_count(), window), own, prepared, |all| {
        waited.over(all).try_for_each(|item| {
            waiting.push(item?);
            if waiting.len() < size {
                return Ok(());
            }
            size = size.saturating_mul(2).min(window);
            answer(std::mem::take(&mut waiting))
        })
    })?;
    answer(waiting)?;
    answers_of_all(peers, window, &mut predictions, &mut timing)?;
    timing.seconds = began.elapsed().as_secs_f64();
    timing.profile = Some(Profile::new(began.elapsed(), &pictures, &waited, before, vlm.times()));
    timing.questions_per_second = rows.len() as f64 / timing.seconds.max(f64::MIN_POSITIVE);
    let replies = judge
        .filter(|_| is_first(peers))
        .map(|judge| replies_of(judge, benchmark, &rows, &predictions, cancel))
        .transpose()?;
    let answered = Answered { predictions, replies };
    Ok(score_answers(model_name.clone(), benchmark, name, &rows, &judged, answered, timing))
}

/// The language model that judges a benchmark, where it needs one.
///
/// Errors: `Error::Unsupported` when it needs one and none is named.
fn judge_for<'a>(options: &'a EvalOptions, name: &str) -> Result<Option<&'a Judge>> {
    match (&options.judge, needs_judge(name)) {
        (Some(judge), true) => Ok(Some(judge)),
        (None, true) => {
            Err(Error::unsupported(format!("benchmark `{name}`"), "is left out: a language model judges its answers")
                .remedy("name one with --judge URL and --judge-model NAME"))
        }
        (_, false) => Ok(None),
    }
}

/// Brings together what every process has answered of its windows of questions.
fn answers_of_all(
    peers: Option<&dyn Peers>,
    window: usize,
    predictions: &mut [String],
    timing: &mut EvalTiming,
) -> Result<()> {
    if peers.is_none() {
        return Ok(());
    }
    let own = (0..predictions.len()).filter(|number| is_own(peers, number / window));
    let own: Vec<(usize, String)> = own.map(|number| (number, std::mem::take(&mut predictions[number]))).collect();
    let tokens = (timing.prompt_tokens, timing.generated_tokens);
    (timing.prompt_tokens, timing.generated_tokens) = (0, 0);
    for (answers, (prompts, generated)) in gathered(peers, (own, tokens))? {
        for (number, prediction) in answers {
            if let Some(slot) = predictions.get_mut(number) {
                *slot = prediction;
            }
        }
        timing.prompt_tokens += prompts;
        timing.generated_tokens += generated;
    }
    Ok(())
}

/// What a judge says of each answer.
fn replies_of(
    judge: &Judge,
    benchmark: &Benchmark,
    rows: &[&BenchRow],
    predictions: &[String],
    cancel: &Cancel,
) -> Result<Vec<String>> {
    let question = |number: usize| {
        let (row, prediction) = (rows[number], &predictions[number]);
        let picture = benchmark.images(row)?.into_iter().next().map(|image| image.read()).transpose()?;
        let picture = picture.map(|bytes| bytes.to_vec()).unwrap_or_default();
        Ok(ChatQuestion { text: grading_question(benchmark, row, prediction)?, picture })
    };
    // All rows are checked before the first question is sent.
    (0..rows.len()).try_for_each(|number| grading_question(benchmark, rows[number], "").map(drop))?;
    judge.ask_all(rows.len(), question, cancel)
}

/// Answers, with a judge's replies.
struct Answered {
    predictions: Vec<String>,
    replies: Option<Vec<String>>,
}

/// Judges answers from elsewhere: one prediction for each row of the benchmark, in order.
///
/// Errors: `Error::Invalid` when the numbers of predictions and rows differ, or a row has no answer.
pub fn judge_predictions(benchmark: &Benchmark, name: &str, predictions: &[String]) -> Result<ModelScores> {
    let rows: Vec<&BenchRow> = benchmark.rows().iter().collect();
    if rows.len() != predictions.len() {
        return Err(Error::invalid(
            "predictions",
            format!("are {}, the benchmark has {} rows", predictions.len(), rows.len()),
        )
        .remedy("give one prediction for each row"));
    }
    let of: HashMap<&str, &String> = rows.iter().map(|row| row.index.as_str()).zip(predictions).collect();
    let judged = references(benchmark, name, &rows)?;
    let (rows, judged) = scored(rows, judged);
    let predictions = rows.iter().map(|row| of[row.index.as_str()].clone()).collect();
    let answered = Answered { predictions, replies: None };
    Ok(score_answers(String::new(), benchmark, name, &rows, &judged, answered, EvalTiming::default()))
}

/// Reference and metric of each row.
fn references(benchmark: &Benchmark, name: &str, rows: &[&BenchRow]) -> Result<Vec<(Reference, &'static Metric)>> {
    let with_metric = |reference: Reference| {
        let metric = metric_for(name, &reference);
        (reference, metric)
    };
    let reference = |row: &&BenchRow| match needs_judge(name) {
        // A judge compares with the picture, not with a reference answer.
        true => Ok(Reference { index: row.index.clone(), ..Reference::default() }),
        false => reference_of(benchmark, row),
    };
    rows.iter().map(|row| reference(row).map(with_metric)).collect()
}

/// Scores of the predictions of rows.
fn score_answers(
    model: String,
    benchmark: &Benchmark,
    name: &str,
    rows: &[&BenchRow],
    judged: &[(Reference, &'static Metric)],
    answered: Answered,
    timing: EvalTiming,
) -> ModelScores {
    let Answered { predictions, replies } = answered;
    let types: Vec<&str> = rows.iter().map(|row| benchmark.cell(row, "component_type").unwrap_or_default()).collect();
    let rated = rows.iter().zip(judged).zip(predictions).enumerate();
    let answers = rated.map(|(number, ((row, (reference, metric)), prediction))| {
        let reply = replies.as_ref().map(|replies| replies[number].clone());
        let total = reply.as_ref().map(|reply| read_grades(types[number], reply).map(|grades| grades.total));
        Answer {
            index: row.index.clone(),
            group: benchmark.cell(row, "category").unwrap_or(NO_GROUP).to_string(),
            metric: metric.name.to_string(),
            score: match total {
                Some(total) => total.unwrap_or(0.0),
                None => (metric.judge)(reference, &prediction),
            },
            unjudged: total == Some(None),
            reply,
            truth: read_yes_no(&reference.answer),
            unit: (metric.unit)(reference),
            stratum: (metric.stratum)(reference),
            prediction,
        }
    });
    let mut scores = summarise(model, name.to_string(), answers.collect(), timing);
    for column in ["l2-category", "split"] {
        let groups: Vec<Option<&str>> = rows.iter().map(|row| benchmark.cell(row, column)).collect();
        if groups.iter().any(Option::is_some) {
            scores.by_column.insert(column.to_string(), groups_by(&scores.answers, &groups));
        }
    }
    if replies.is_some() {
        scores.by_column.insert("component_type".to_string(), grades_by_type(&scores.answers, &types));
    }
    scores
}

/// The rows that count. In circular benchmarks a rotation counts only when its original question is
/// present, as in VLMEvalKit.
fn scored<'a>(
    rows: Vec<&'a BenchRow>,
    judged: Vec<(Reference, &'static Metric)>,
) -> (Vec<&'a BenchRow>, Vec<(Reference, &'static Metric)>) {
    let there: HashSet<&str> = rows.iter().map(|row| row.index.as_str()).collect();
    let counts = |reference: &Reference, metric: &Metric| {
        metric.name != CIRCULAR || there.contains(rotation_of(reference).as_str())
    };
    let kept: Vec<bool> = judged.iter().map(|(reference, metric)| counts(reference, metric)).collect();
    let rows = rows.into_iter().zip(&kept).filter(|(_, kept)| **kept).map(|(row, _)| row).collect();
    (rows, judged.into_iter().zip(&kept).filter(|(_, kept)| **kept).map(|(item, _)| item).collect())
}

fn prepare(
    processor: &Processor,
    benchmark: &Benchmark,
    name: &str,
    style: PromptStyle,
    (number, row): (usize, &&BenchRow),
) -> Result<Prepared> {
    let images = benchmark.images(row)?;
    let mut parts: Vec<MessagePart> = (0..images.len()).map(MessagePart::Image).collect();
    parts.push(MessagePart::Text(question_text(benchmark, name, row, style)?));
    let encoded = processor.encode_question(&format!("row `{}` of benchmark `{name}`", row.index), &parts, &images)?;
    Ok(Prepared { number, prompt: encoded.into_prompt() })
}
