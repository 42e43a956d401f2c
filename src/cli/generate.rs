//! `interlace generate`.

use std::path::PathBuf;

use crate::base::{Device, check_output_file};
use crate::bundle::{ModelSource, Variants};
use crate::pipeline::steps::{self, Decoding, Engine, Generation, Generations, Question};

use super::args::{VariantArgs, count};
use super::context::{Context, Outcome};
use super::data_args::{DataArgs, warn_left_out};

/// Answer a question about pictures, or every question of a data set
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  interlace generate healed/ --image photo.jpg --prompt \"What is this?\" --compare model/\n  \
    interlace generate model/ --data train.parquet -o answers.jsonl"
)]
pub struct Args {
    /// Model folder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Show this picture; may be repeated
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    image: Vec<PathBuf>,
    /// Show this frame of a video at this time in seconds, for models that take videos; repeat in order of time
    #[arg(long, value_name = "SECONDS=FILE", conflicts_with = "data", value_parser = frame)]
    video_frame: Vec<(f64, PathBuf)>,
    /// Ask this question
    #[arg(long, value_name = "TEXT", required_unless_present = "data", conflicts_with = "data")]
    prompt: Option<String>,
    /// Send this system message before the question [default: none]
    #[arg(long, value_name = "TEXT", conflicts_with = "data")]
    system: Option<String>,
    /// Limit the answer to this number of tokens [default: the model's own setting, or 256]
    #[arg(long, value_name = "N", value_parser = count)]
    max_tokens: Option<usize>,
    /// Sample tokens at this temperature, 0 or more; 0 takes the most likely token at each step
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Sample among the most likely tokens whose probabilities add up to this, above 0 and at most 1
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed the sampling
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Answer with this model too, and print both answers
    #[arg(long, value_name = "MODEL", conflicts_with = "data")]
    compare: Option<PathBuf>,
    /// Run this precision variant of the model of --compare, as --variant does of MODEL [default: the most precise ones]
    #[arg(long, value_name = "VARIANT", requires = "compare")]
    compare_variant: Option<Variants>,
    /// Answer the last question of each sample of this data set
    #[arg(long, value_name = "DATA", requires = "output")]
    data: Option<PathBuf>,
    #[command(flatten)]
    reading: DataArgs,
    /// Answer this number of samples in one batch, at temperature 0
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = count)]
    batch_size: usize,
    /// Write the answers to `--data` to this file: JSON lines of `id` and `answer`
    #[arg(short, long, value_name = "FILE", requires = "data")]
    output: Option<PathBuf>,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    if let Some(output) = &args.output {
        check_output_file(output)?;
    }
    let decoding =
        Decoding { max_tokens: args.max_tokens, temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let model = args.variant.source(&args.model, context)?;
    let compared =
        args.compare.map(|path| ModelSource::find(&path, args.compare_variant, &context.cancel)).transpose()?;
    let models: Vec<ModelSource> = [model.clone()].into_iter().chain(compared).collect();
    for model in &models {
        steps::check_answers(model)?;
    }
    let engine = Engine::new(args.device)?;
    if let (Some(data), Some(output)) = (&args.data, &args.output) {
        let how = (&decoding, args.batch_size);
        let options = args.reading.options();
        let (count, left_out) = steps::generate_all(&engine, &model, (data, &options), output, how, &context.cancel)?;
        warn_left_out(&left_out, &context.output);
        context.output.line(format!("{count} answers in {}", output.display()))?;
        return Ok(Outcome::Done);
    }
    let settings = args.reading.options().images;
    let question = Question {
        images: args.image,
        video: args.video_frame,
        settings,
        system: args.system,
        prompt: args.prompt.unwrap_or_default(),
    };
    let mut answers = Vec::new();
    for model in &models {
        let json = context.output.json;
        if models.len() > 1 && !json {
            context.output.line(format!("{model}:"))?;
        }
        let mut show = |text: &str| if json { Ok(()) } else { steps::print_text(text) };
        let answer = steps::generate(&engine, model, &question, &decoding, &context.cancel, &mut show)?;
        if !json {
            context.output.line("")?;
            context.output.note(figures(&answer));
        }
        answers.push(answer);
    }
    if context.output.json {
        context.output.json(&Generations { answers })?;
    }
    Ok(Outcome::Done)
}

fn figures(answer: &Generation) -> String {
    let first = answer.first_token_s.map(|seconds| format!(", first after {seconds:.3} s")).unwrap_or_default();
    let rate = answer.tokens_per_s.map(|rate| format!(", then {rate:.1} tokens/s")).unwrap_or_default();
    format!("{} prompt tokens, {} tokens{first}{rate}", answer.prompt_tokens, answer.tokens)
}

/// `SECONDS=FILE`.
fn frame(text: &str) -> Result<(f64, PathBuf), String> {
    let parts = text.split_once('=').and_then(|(time, file)| Some((time.parse::<f64>().ok()?, file)));
    match parts.filter(|(time, file)| time.is_finite() && *time >= 0.0 && !file.is_empty()) {
        Some((time, file)) => Ok((time, PathBuf::from(file))),
        None => Err(format!("`{text}` is not SECONDS=FILE, as in 0.5=frame.png")),
    }
}
