//! `interlace eval`.

use std::path::PathBuf;

use crate::base::{Device, Peers, check_output_file, is_first, write_json};
use crate::bundle::{ModelSource, Variants};
use crate::data::{Benchmark, DataPart, SEQUENCE_LENGTH, Turns};
use crate::eval::{Difference, EvalReport, Interval, Judge, Likelihood, PromptStyle, TextReport};
use crate::pipeline::steps::{self, Engine, EvalSettings, TextSettings};
use crate::runtime::Profile;

use super::args::{VariantArgs, count, fraction, positive};
use super::context::{Context, Outcome};
use super::data_args::{ImageArgs, warn_left_out};
use super::output::{profile_table, table};

/// Answer a benchmark, and compare the scores with a baseline's
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace eval pruned/ --data benchmark.tsv --baseline model/ -o report.json")]
pub struct Args {
    /// Model folder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Read the benchmark: a TSV file of VLMEvalKit; or, for perplexity, running text (.jsonl with a `text` in each line),
    /// conversations in Parquet or JSON, or ready tensors (.safetensors, .npz)
    #[arg(long, value_name = "DATA")]
    data: PathBuf,
    /// Compare with this model, on the same questions
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,
    /// Run this precision variant of the baseline, as --variant does of MODEL [default: the most precise ones]
    #[arg(long, value_name = "VARIANT", requires = "baseline")]
    baseline_variant: Option<Variants>,
    /// End with status 1 when the model keeps a smaller fraction than this of the baseline's average score (of its perplexity,
    /// for running text)
    #[arg(long, value_name = "R", value_parser = fraction, requires = "baseline")]
    min_retention: Option<f64>,
    /// Take only this number of questions or sequences, from the first on [default: all]
    #[arg(long, value_name = "N", value_parser = positive)]
    limit: Option<usize>,
    /// Answer this number of questions in one batch
    #[arg(long, value_name = "N", value_parser = count, default_value_t = EvalSettings::default().batch_size)]
    batch_size: usize,
    /// Limit each answer to this number of tokens [default: the model's own setting]
    #[arg(long, value_name = "N", value_parser = count)]
    max_new_tokens: Option<usize>,
    /// Make one sample of a conversation with all its answers (conversation), or one sample of each turn without the turns
    /// before it (separate), as `finetune` does [default: conversation]
    #[arg(long, value_name = "HOW")]
    turns: Option<Turns>,
    /// Fail at the first row of conversations that cannot be read, instead of leaving it out
    #[arg(long)]
    strict: bool,
    /// Split running text into sequences of this number of tokens
    #[arg(long, value_name = "N", default_value_t = SEQUENCE_LENGTH, value_parser = count)]
    sequence_length: usize,
    /// Read the fraction of the rows that `finetune`, `score` and `plan` leave out with --held-back [default: all rows]
    #[arg(long, value_name = "F", value_parser = fraction)]
    held_back: Option<f64>,
    /// Ignore these keys of running text or conversations, besides ids, sources and other keys without text
    #[arg(long, value_name = "KEYS", value_delimiter = ',')]
    ignore_keys: Vec<String>,
    /// Word the questions as VLMEvalKit does for these models: vlmevalkit (its default), qwen3-vl, smolvlm or internvl
    #[arg(long, value_name = "STYLE", default_value = "vlmevalkit")]
    prompt_style: PromptStyle,
    /// Address of a language model that judges answers, for MIA-Bench: one that speaks OpenAI's chat API, such as
    /// https://api.openai.com/v1; the key is taken from the environment variable OPENAI_API_KEY
    #[arg(long, value_name = "URL", requires = "judge_model")]
    judge: Option<String>,
    /// The model to ask there
    #[arg(long, value_name = "NAME", requires = "judge")]
    judge_model: Option<String>,
    /// Also say where the time was spent: pictures, vision encoder, embedding, decoder, waiting
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    images: ImageArgs,
    /// Also write each question with its answer to this file: JSON lines, or VLMEvalKit's layout if the name ends in .tsv;
    /// in a folder the file gets VLMEvalKit's layout and name
    #[arg(long, value_name = "PATH")]
    predictions: Option<PathBuf>,
    /// Measure only the likelihood of the right answers, without generating answers [default: both]
    #[arg(long, conflicts_with_all = ["predictions", "max_new_tokens"])]
    likelihood_only: bool,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(super) device: Device,
    /// Write the report to this JSON file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

impl Args {
    /// The model and the baseline.
    ///
    /// Errors: as `ModelSource::find`.
    fn models(&self, context: &Context) -> anyhow::Result<(ModelSource, Option<ModelSource>)> {
        let find = |path| ModelSource::find(path, self.baseline_variant.clone(), &context.cancel);
        Ok((self.variant.source(&self.model, context)?, self.baseline.as_deref().map(find).transpose()?))
    }
}

/// Evaluates; with `peers` as one of several processes, of which the first prints and writes.
pub fn run(args: Args, context: &Context, peers: Option<Box<dyn Peers + Send>>) -> anyhow::Result<Outcome> {
    if is_first(peers.as_deref().map(|peers| peers as &dyn Peers)) {
        check_output_file(&args.output)?;
        // In a folder the file gets a name.
        if let Some(path) = args.predictions.as_deref().filter(|path| !path.is_dir()) {
            check_output_file(path)?;
        }
    }
    if !Benchmark::is_one(&args.data) {
        return predict(&args, context, peers);
    }
    if args.held_back.is_some() {
        anyhow::bail!("--held-back takes a part of training data, and `{}` is a benchmark", args.data.display());
    }
    if args.turns.is_some() {
        anyhow::bail!("--turns is for conversations, and `{}` is a benchmark; leave it out", args.data.display());
    }
    let judge = match (&args.judge, &args.judge_model) {
        (Some(url), Some(model)) => Some(Judge::new(url, model)?),
        _ => None,
    };
    let settings = EvalSettings {
        judge,
        batch_size: args.batch_size,
        max_new_tokens: args.max_new_tokens,
        limit: args.limit,
        prompt_style: args.prompt_style,
        images: args.images.settings(),
    };
    let engine = Engine::with_peers(peers, args.device)?;
    if args.likelihood_only {
        return likelihood(&args, &engine, &settings, context);
    }
    let (model, baseline) = args.models(context)?;
    let report = steps::eval(&engine, &model, baseline.as_ref(), &args.data, &settings, &context.cancel)?;
    if !is_first(engine.peers()) {
        return Ok(Outcome::Done);
    }
    write_json(&args.output, &report)?;
    if let Some(path) = &args.predictions {
        steps::write_predictions(path, &args.data, &report.model)?;
    }
    if let Some(reason) = &report.likelihood_not_measured {
        context.output.warn(format!("how likely the right answers are was not measured: {reason}"));
    }
    if report.rows_without_picture > 0 {
        context.output.warn(format!("{} rows have no picture and were left out", report.rows_without_picture));
    }
    if context.output.json {
        context.output.json(&report)?;
    } else {
        context.output.line(report_table(&report))?;
        if let Some(own) = &report.model.likelihood {
            let base = report.baseline.as_ref().and_then(|baseline| baseline.likelihood.as_ref());
            let kept = report.retention.as_ref().and_then(|retention| retention.likelihood);
            context.output.line(likelihood_line(own, base, kept))?;
        }
        if report.baseline.is_some() {
            context.output.line(
                "kept: score over the baseline's; difference: score less the baseline's, in percentage points; both with \
                 95% paired bootstrap intervals",
            )?;
        }
    }
    profiled(&args, report.model.timing.profile.as_ref(), context)?;
    let kept = report.retention.as_ref().and_then(|retention| retention.score);
    gate(args.min_retention, kept, "score", context)
}

fn likelihood(args: &Args, engine: &Engine, settings: &EvalSettings, context: &Context) -> anyhow::Result<Outcome> {
    let (model, baseline) = args.models(context)?;
    let report = steps::eval_likelihood(engine, &model, baseline.as_ref(), &args.data, settings, &context.cancel)?;
    if !is_first(engine.peers()) {
        return Ok(Outcome::Done);
    }
    write_json(&args.output, &report)?;
    if context.output.json {
        context.output.json(&report)?;
    } else {
        context.output.line(likelihood_line(&report.model, report.baseline.as_ref(), report.retention))?;
    }
    gate(args.min_retention, report.retention, "likelihood per answer token", context)
}

/// The likelihood of the right answers as a line of text, with the baseline's.
fn likelihood_line(model: &Likelihood, baseline: Option<&Likelihood>, kept: Option<Interval>) -> String {
    let mut text = format!(
        "right answers: log-likelihood {:.4} nats per token over {} tokens",
        model.mean_log_likelihood, model.answer_tokens
    );
    if let Some(baseline) = baseline {
        text.push_str(&format!(", baseline {:.4}; likelihood kept {} %", baseline.mean_log_likelihood, interval(kept)));
    }
    text
}

fn predict(args: &Args, context: &Context, peers: Option<Box<dyn Peers + Send>>) -> anyhow::Result<Outcome> {
    let settings = TextSettings {
        sequence_length: args.sequence_length,
        ignore_keys: args.ignore_keys.clone(),
        limit: args.limit,
        strict: args.strict,
        images: args.images.settings(),
        part: args.held_back.map_or(DataPart::All, DataPart::HeldBack),
        turns: args.turns.unwrap_or_default(),
        ..TextSettings::default()
    };
    let engine = Engine::with_peers(peers, args.device)?;
    let first = is_first(engine.peers());
    let (model, baseline) = args.models(context)?;
    let warnings = steps::warnings(&model.open()?, &args.data);
    warnings.iter().filter(|_| first).for_each(|warning| context.output.warn(warning));
    let report = steps::eval_text(&engine, &model, baseline.as_ref(), &args.data, &settings, &context.cancel)?;
    if !first {
        return Ok(Outcome::Done);
    }
    write_json(&args.output, &report)?;
    warn_left_out(&report.model.left_out, &context.output);
    if context.output.json {
        context.output.json(&report)?;
    } else {
        context.output.line(text_table(&report))?;
        if report.baseline.is_some() {
            context.output.line("kept: the baseline's perplexity over the model's, with its 95% bootstrap interval")?;
        }
    }
    profiled(args, report.model.profile.as_ref(), context)?;
    gate(args.min_retention, report.retention, "perplexity", context)
}

fn profiled(args: &Args, profile: Option<&Profile>, context: &Context) -> anyhow::Result<()> {
    match profile.filter(|_| args.profile && !context.output.json) {
        Some(profile) => Ok(context.output.line(profile_table(profile))?),
        None => Ok(()),
    }
}

/// Checks the retained fraction of the baseline's score against the user's gate.
fn gate(wanted: Option<f64>, kept: Option<Interval>, what: &str, context: &Context) -> anyhow::Result<Outcome> {
    match (wanted, kept) {
        (Some(wanted), Some(kept)) if kept.ratio < wanted => {
            context.output.warn(format!(
                "{:.1}% of the baseline's {what} is kept, {:.1}% wanted",
                100.0 * kept.ratio,
                100.0 * wanted
            ));
            Ok(Outcome::GateFailed)
        }
        (Some(_), None) => anyhow::bail!(
            "the baseline scores 0, so the fraction that the model keeps is undefined; leave `--min-retention` out"
        ),
        _ => Ok(Outcome::Done),
    }
}

fn interval(kept: Option<Interval>) -> String {
    match kept {
        Some(kept) => format!("{:.1} [{:.1}, {:.1}]", 100.0 * kept.ratio, 100.0 * kept.low, 100.0 * kept.high),
        None => "-".to_string(),
    }
}

/// A difference in percentage points.
fn points(difference: Option<Difference>) -> String {
    match difference {
        Some(Difference { difference, low, high }) => {
            format!("{:+.1} [{:+.1}, {:+.1}]", 100.0 * difference, 100.0 * low, 100.0 * high)
        }
        None => "-".to_string(),
    }
}

fn text_table(report: &TextReport) -> String {
    let mut rows = vec![["model", "tokens", "loss", "perplexity", "kept %"].map(String::from).to_vec()];
    let kept = report.baseline.is_some().then_some(report.retention);
    for (scores, kept) in report.baseline.iter().map(|scores| (scores, None)).chain([(&report.model, kept)]) {
        rows.push(vec![
            scores.model.clone(),
            scores.predicted_tokens.to_string(),
            format!("{:.4}", scores.mean_loss),
            format!("{:.2}", scores.perplexity),
            kept.map_or(String::new(), interval),
        ]);
    }
    table(&rows)
}

fn report_table(report: &EvalReport) -> String {
    let percent = |value: f64| format!("{:.1}", 100.0 * value);
    let mut head = vec!["group".to_string(), "questions".to_string(), "score %".to_string()];
    if report.baseline.is_some() {
        head.extend(["baseline %", "kept %", "difference"].map(String::from));
    }
    let mut rows = vec![head];
    for (place, group) in report.model.groups.iter().enumerate() {
        let mut row = vec![group.group.clone(), group.questions.to_string(), percent(group.score)];
        if let (Some(baseline), Some(retention)) = (&report.baseline, &report.retention) {
            row.push(baseline.groups.get(place).map_or(String::new(), |group| percent(group.score)));
            let group = retention.groups.get(place);
            row.push(interval(group.and_then(|group| group.retention)));
            row.push(points(group.and_then(|group| group.difference)));
        }
        rows.push(row);
    }
    let name = report.model.metric.clone().unwrap_or_else(|| "average".to_string());
    let mut last = vec![name, report.model.questions.to_string(), percent(report.model.score)];
    if let (Some(baseline), Some(retention)) = (&report.baseline, &report.retention) {
        last.extend([percent(baseline.score), interval(retention.score), points(retention.difference)]);
    }
    rows.push(last);
    table(&rows)
}
