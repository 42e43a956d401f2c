//! `interlace tune`.

use std::path::PathBuf;

use crate::base::Device;
use crate::data::{DataOptions, ImageSettings, Turns};
use crate::eval::StageOptions;
use crate::finetune::{DEFAULT_RECIPE, RecipeRow};
use crate::method::select::{STRATEGIES, Strategy};
use crate::pipeline::steps::default_work_folder;
use crate::pipeline::{Calibration, Healed, Healer, TARGETS, TUNE_FILE, Tune, TuneReport, TuneTarget, tune};
use crate::report::draw_tuning;

use super::args::{VariantArgs, count, fraction, parts, positive};
use super::context::{Context, Outcome};
use super::output::{Output, table};

/// Make the best model within a target of time or size, from decoder depth, tower depth and picture budget
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  interlace tune model/ --ttft 800ms --data data.parquet -o tuned/\n  \
    interlace tune model/ --size 300MB --data data.parquet --work tuned.work --replan\n\n\
    What each layer and each picture token costs here, and what each choice costs in likelihood of the right answers, is\n\
    measured once and kept in the work folder. Another target needs no measurement then: --replan answers from it alone.\n\
    Where the model meets the target as it is, OUT is the unchanged model.\n\
    Exit code 2, and no model, where the target cannot be met; the message says what can.")]
#[command(group(clap::ArgGroup::new("target").required(true).multiple(true).args(["ttft", "tokens_per_s", "size"])))]
pub struct Args {
    /// Model folder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Reach the first token within this time from an encoded picture and a question, as in 800ms or 1.2s
    #[arg(long, value_name = "TIME", value_parser = value_of("ttft"))]
    ttft: Option<f64>,
    /// Generate at least this number of tokens per second behind the first one, one answer at a time
    #[arg(long, value_name = "N", value_parser = value_of("tokens-per-s"))]
    tokens_per_s: Option<f64>,
    /// Make the components that are run at most this large together, as in 300MB or 1.5GiB
    #[arg(long, value_name = "SIZE", value_parser = value_of("size"))]
    size: Option<f64>,
    /// Measure on these questions about pictures with their answers: a file, a folder or a pattern
    #[arg(long, value_name = "DATA")]
    data: PathBuf,
    /// Make one sample of a conversation with all its answers (conversation), or one sample of each turn without the turns
    /// before it (separate). Times are measured with one sample's question, whose length depends on this
    #[arg(long, value_name = "HOW", default_value = "conversation")]
    turns: Turns,
    /// Ignore these columns or keys, besides ids, sources and others without a part of the conversation
    #[arg(long, value_name = "KEYS", value_delimiter = ',')]
    ignore_keys: Vec<String>,
    /// Measure losses on at most this number of samples, and compare the candidates on as many others
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 64)]
    samples: usize,
    /// Compare the candidates on this fraction of the rows, which nothing else reads
    #[arg(long, value_name = "F", value_parser = fraction, default_value_t = 0.25)]
    held_back: f64,
    /// Seed of the draw of samples
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Choose decoder layers by these strategies; for each number of layers the one with the least loss counts
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "interlace,shortgpt", value_parser = strategy)]
    strategy: Vec<String>,
    /// Make and measure this number of candidates
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 3)]
    candidates: usize,
    /// Heal the candidates on this data: a file, a folder or a pattern [default: no healing]
    #[arg(long, value_name = "DATA")]
    train: Option<PathBuf>,
    /// Heal by this recipe
    #[arg(long, value_name = "NAME", default_value = DEFAULT_RECIPE, requires = "train")]
    recipe: String,
    /// Heal on this number of samples [default: all]
    #[arg(long, value_name = "N", value_parser = positive, requires = "train")]
    train_samples: Option<usize>,
    /// Measure this number of rounds; every model runs once in each
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 20)]
    rounds: usize,
    /// Generate this number of tokens behind the prompt when times are measured
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 16)]
    new_tokens: usize,
    /// Use this number of threads inside one operator when times are measured [default: all cores]
    #[arg(long, value_name = "N", value_parser = parts)]
    threads: Option<usize>,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Keep measurements and candidates in this folder [default: OUT.work]
    #[arg(long, value_name = "FOLDER")]
    work: Option<PathBuf>,
    /// Plan from the measurements in the work folder, and make nothing
    #[arg(long, conflicts_with = "output", requires = "work")]
    replan: bool,
    /// Write the chosen model to this new folder
    #[arg(short, long, value_name = "OUT", required_unless_present = "replan")]
    output: Option<PathBuf>,
}

impl Args {
    /// True when candidates are trained.
    pub fn heals(&self) -> bool {
        self.train.is_some() && !self.replan
    }
}

/// The parser of a target's value.
fn value_of(name: &'static str) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| match TARGETS.iter().find(|row| row.name == name) {
        Some(row) => (row.parse)(text),
        None => Err(format!("target `{name}` does not exist")),
    }
}

fn strategy(name: &str) -> Result<String, String> {
    match Strategy::named(name) {
        Ok(row) if row.name != "explicit" => Ok(name.to_string()),
        _ => {
            let names: Vec<&str> = STRATEGIES.iter().map(|row| row.name).filter(|name| *name != "explicit").collect();
            Err(format!("must be one of {}", names.join(", ")))
        }
    }
}

pub fn run(args: Args, context: &Context, healer: Option<Healer>) -> anyhow::Result<Outcome> {
    let output = &context.output;
    let target = |kind: &str, value: Option<f64>| value.map(|value| TuneTarget { kind: kind.to_string(), value });
    let targets = [target("ttft", args.ttft), target("tokens-per-s", args.tokens_per_s), target("size", args.size)];
    let data_options =
        DataOptions { turns: args.turns, ignore_keys: args.ignore_keys.clone(), ..DataOptions::default() };
    let healed = match &args.train {
        Some(data) => Some(Healed {
            data: data.clone(),
            options: data_options,
            samples: args.train_samples,
            settings: RecipeRow::named(&args.recipe)?.settings(),
        }),
        None => None,
    };
    let work = args.work.or_else(|| args.output.as_deref().map(default_work_folder)).unwrap_or_default();
    let source = args.variant.source(&args.model, context)?;
    let request = Tune {
        model: &source,
        calibration: Calibration {
            data: args.data,
            turns: args.turns,
            min_ratings: Default::default(),
            ignore_keys: args.ignore_keys,
            strict: false,
            images: ImageSettings::default(),
            samples: Some(args.samples),
            fraction: None,
            seed: args.seed,
        },
        samples: args.samples,
        held_back: args.held_back,
        strategies: args.strategy,
        targets: targets.into_iter().flatten().collect(),
        options: StageOptions { rounds: args.rounds, new_tokens: args.new_tokens, threads: args.threads },
        device: args.device,
        candidates: args.candidates,
        healed,
        work: &work,
        output: args.output.as_deref(),
    };
    let report = tune(&request, healer, &context.cancel, &mut |text| output.note(text))?;
    if output.json {
        output.json(&report)?;
    } else {
        print(&report, output)?;
    }
    let chart = draw_tuning(&report, &work)?;
    output.note(format!("report: {}/{TUNE_FILE}.json, front: {}", work.display(), chart.display()));
    Ok(Outcome::Done)
}

fn print(report: &TuneReport, output: &Output) -> anyhow::Result<()> {
    output.line(table(&report.costs.cells()))?;
    if report.costs.is_noisy() {
        output.line(
            "a time below 0 is noise: a layer's time is measured by difference, and all layers together add up to more than the \
             whole",
        )?;
    }
    output.line("")?;
    output.line(table(&report.plan_cells()))?;
    output.line("")?;
    output.line(table(&report.front_cells()))?;
    let candidates = report.candidate_cells();
    if !candidates.is_empty() {
        output.line("")?;
        output.line(table(&candidates))?;
    }
    output.line(
        "loss: nats of an answer token, predicted on calibration samples; kept: likelihood of an answer token over that of \
         the whole model",
    )?;
    if !report.candidates.is_empty() {
        output.line(
            "candidates are chosen by their held-back loss, so measure the chosen one on data that nothing here has read",
        )?;
    }
    if report.best.is_whole() {
        output.line("the model meets the target as it is, so nothing is left out")?;
    }
    for note in &report.notes {
        output.warn(note);
    }
    Ok(())
}
