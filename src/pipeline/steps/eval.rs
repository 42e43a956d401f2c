//! Evaluates a model on a benchmark or its perplexity on running text, and compares it with a baseline.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{AtomicFile, Cancel, Error, Result};
use crate::bundle::ModelSource;
use crate::data::{BenchRow, Benchmark, DataOptions, DataPart, Dataset, ImageSettings, Turns};
use crate::eval::{
    EvalOptions, EvalReport, ModelScores, PairedComparison, Retention, TextReport, TextScores, benchmark_name, compare,
    compare_over, evaluate_with_peers, kept_perplexity, perplexity,
};

use super::engine::{BOOTSTRAP_SEED, Engine, EvalSettings, digests, head};
use super::likelihood::compare_likelihoods;
use super::needs::{Work, check as check_needs};

impl Engine {
    /// Answers a benchmark with one model.
    ///
    /// Errors: as `LoadedModel::open` and `evaluate`.
    pub fn answer(
        &self,
        model: &ModelSource,
        benchmark: &Benchmark,
        data: &Path,
        settings: &EvalSettings,
        cancel: &Cancel,
    ) -> Result<ModelScores> {
        if settings.max_new_tokens != Some(1) {
            check_needs(&model.open()?, Work::Answer)?;
        }
        let mut loaded = self.load(model, &settings.images)?;
        let EvalSettings { batch_size, max_new_tokens, limit, prompt_style, judge, images: _ } = settings.clone();
        let options = EvalOptions { batch_size, max_new_tokens, limit, prompt_style, judge };
        evaluate_with_peers(self.peers(), &mut loaded, benchmark, &benchmark_name(data), &options, cancel)
    }
}

/// Answers a benchmark with a model and, optionally, with a baseline for the retention.
///
/// Errors: as `Engine::answer`.
pub fn eval(
    engine: &Engine,
    model: &ModelSource,
    baseline: Option<&ModelSource>,
    data: &Path,
    settings: &EvalSettings,
    cancel: &Cancel,
) -> Result<EvalReport> {
    let benchmark = Benchmark::open(data)?;
    let inputs = digests(model, baseline, &benchmark)?;
    let mut likelihood_not_measured = None;
    let mut answer = |path: &ModelSource| -> Result<ModelScores> {
        let mut scores = engine.answer(path, &benchmark, data, settings, cancel)?;
        match engine.likelihood(path, &benchmark, data, settings, cancel) {
            Ok(likelihood) => scores.likelihood = Some(likelihood),
            Err(error @ Error::Unsupported { .. }) => likelihood_not_measured = Some(error.to_string()),
            Err(error) => return Err(error),
        }
        Ok(scores)
    };
    let base = baseline.map(&mut answer).transpose()?;
    let scores = answer(model)?;
    let mut retention = base.as_ref().map(|base| compare(&scores, base, BOOTSTRAP_SEED)).transpose()?;
    if let (Some(retention), Some(base)) = (&mut retention, &base) {
        let likelihoods = scores.likelihood.as_ref().zip(base.likelihood.as_ref());
        retention.likelihood = likelihoods.map(|(own, base)| compare_likelihoods(own, base)).transpose()?;
    }
    let provenance = head(EvalReport::SCHEMA_VERSION, inputs, settings, model, baseline)?;
    let rows_without_picture = benchmark.rows_without_picture();
    Ok(EvalReport {
        provenance,
        rows_without_picture,
        model: scores,
        baseline: base,
        likelihood_not_measured,
        retention,
    })
}

/// Settings of a perplexity measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextSettings {
    /// Tokens in each sequence.
    pub sequence_length: usize,
    /// Make one sample of a conversation, or one of each turn.
    #[serde(default, skip_serializing_if = "is_default")]
    pub turns: Turns,
    /// The least values of columns of ratings; other rows are not used.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub min_ratings: BTreeMap<String, f64>,
    /// The part of the rows that is read.
    #[serde(default, skip_serializing_if = "DataPart::is_all")]
    pub part: DataPart,
    /// Keys of lines to ignore.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore_keys: Vec<String>,
    /// Reads only the first sequences.
    pub limit: Option<usize>,
    /// The first row that cannot be read is an error.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
    /// How pictures are scaled and cut up, in place of what the model's files say.
    #[serde(default, skip_serializing_if = "ImageSettings::is_default")]
    pub images: ImageSettings,
}

fn is_default(turns: &Turns) -> bool {
    *turns == Turns::default()
}

impl Default for TextSettings {
    fn default() -> Self {
        TextSettings::of(&DataOptions::default(), None)
    }
}

impl TextSettings {
    /// Settings that read data as the options say; with `limit` the first sequences only.
    pub fn of(options: &DataOptions, limit: Option<usize>) -> Self {
        let DataOptions { turns, min_ratings, ignore_keys, strict, part, sequence_length, images } = options.clone();
        TextSettings { sequence_length, turns, min_ratings, part, ignore_keys, limit, strict, images }
    }

    /// Options for reading the data.
    pub fn data_options(&self) -> DataOptions {
        let TextSettings { sequence_length, turns, min_ratings, part, ignore_keys, strict, images, .. } = self.clone();
        DataOptions { turns, min_ratings, ignore_keys, strict, part, sequence_length, images }
    }
}

/// Perplexity of a model on running text, answers or ready tensors, and of a baseline to say what the model keeps of it.
/// Each model reads the data with its own tokenizer and processor.
///
/// Errors: as `LoadedModel::open`, `Dataset::open_for` and `perplexity`; `Error::Invalid` when the two models'
/// tokenizers split the text differently.
pub fn eval_text(
    engine: &Engine,
    model: &ModelSource,
    baseline: Option<&ModelSource>,
    data: &Path,
    settings: &TextSettings,
    cancel: &Cancel,
) -> Result<TextReport> {
    let options = settings.data_options();
    let mut inputs = BTreeMap::new();
    let mut measure = |role: &str, path: &ModelSource| -> Result<TextScores> {
        let bundle = path.open()?;
        check_needs(&bundle, Work::Perplexity)?;
        let text = Dataset::open_for(data, &bundle, &options)?;
        inputs.insert(role.to_string(), bundle.digest()?);
        inputs.insert("data".to_string(), text.digest()?);
        let mut vlm = engine.load_to_predict(&bundle)?;
        perplexity(&path.to_string(), &mut vlm, (&bundle, &text), settings.limit, engine.peers(), cancel)
    };
    let base = baseline.map(|path| measure("baseline", path)).transpose()?;
    let scores = measure("model", model)?;
    let retention = base.as_ref().map(|base| kept_perplexity(&scores, base, BOOTSTRAP_SEED)).transpose()?;
    let provenance = head(TextReport::SCHEMA_VERSION, inputs, settings, model, baseline)?;
    Ok(TextReport { provenance, model: scores, baseline: base, retention })
}

/// Writes the answers of a report with their questions. The format is JSON lines or, for a file name with `.tsv`, that
/// of VLMEvalKit's predictions: the benchmark's columns without the picture, then `prediction`, with every cell quoted.
/// In a folder the file is `MODEL_BENCHMARK.tsv`, where VLMEvalKit looks for a model's predictions.
///
/// Errors: those of reading the benchmark and of writing the file.
pub fn write_predictions(path: &Path, data: &Path, scores: &ModelScores) -> Result<()> {
    if path.is_dir() {
        let model = Path::new(&scores.model);
        let model = model.canonicalize().unwrap_or_else(|_| model.to_path_buf());
        let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return write_predictions(&path.join(format!("{name}_{}.tsv", scores.benchmark)), data, scores);
    }
    let benchmark = Benchmark::open(data)?;
    let rows: BTreeMap<&str, &BenchRow> = benchmark.rows().iter().map(|row| (row.index.as_str(), row)).collect();
    let answered = scores.answers.iter().filter_map(|answer| Some((answer, *rows.get(answer.index.as_str())?)));
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|extension| extension == "tsv") {
        let columns: Vec<&str> =
            benchmark.columns().iter().map(String::as_str).filter(|name| *name != "image").collect();
        let mut writer =
            csv::WriterBuilder::new().delimiter(b'\t').quote_style(csv::QuoteStyle::Always).from_writer(&mut bytes);
        let wrong = |e: csv::Error| Error::invalid(format!("`{}`", path.display()), e.to_string());
        writer.write_record(columns.iter().copied().chain(["prediction"])).map_err(wrong)?;
        for (answer, row) in answered {
            let cells = columns.iter().map(|column| benchmark.cell(row, column).unwrap_or_default());
            writer.write_record(cells.chain([answer.prediction.as_str()])).map_err(wrong)?;
        }
        writer.flush().map_err(|e| Error::io("write", path, e))?;
        drop(writer);
    } else {
        for (answer, row) in answered {
            let question = benchmark.cell(row, "question").unwrap_or_default();
            let truth = benchmark.cell(row, "answer").unwrap_or_default();
            let line = serde_json::json!({
                "index": answer.index, "question": question, "answer": truth,
                "prediction": answer.prediction, "score": answer.score,
            });
            bytes.extend_from_slice(line.to_string().as_bytes());
            bytes.push(b'\n');
        }
    }
    let mut file = AtomicFile::create(path)?;
    file.write_all(&bytes)?;
    file.commit()
}

/// What a model keeps of a baseline, by group, with the bootstrap seed of all verbs.
///
/// Errors: as `eval::compare`.
pub fn retention(model: &ModelScores, baseline: &ModelScores) -> Result<Retention> {
    compare(model, baseline, BOOTSTRAP_SEED)
}

/// Ratio and difference of headline scores to their baselines' over several runs, with the bootstrap seed of all
/// verbs.
///
/// Errors: as `eval::compare_over`.
pub fn compared(runs: &[(&ModelScores, &ModelScores)]) -> Result<Option<PairedComparison>> {
    compare_over(runs, BOOTSTRAP_SEED)
}
