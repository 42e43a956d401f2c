//! `interlace bench`, and the hidden verb that measures memory in a separate process.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use crate::base::{Device, check_output_file, human_bytes, write_json};
use crate::bundle::{ModelSource, Variants};
use crate::eval::{self, BenchOptions, BenchReport, ModelBench, Spread};
use crate::pipeline::steps::{Work, check_needs};
use crate::runtime::Runtime;

use super::args::{VariantArgs, count, parts};
use super::context::{Context, Outcome};
use super::output::table;

/// Measure time to first token, decoding rate, memory and size, and compare with a baseline
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace bench healed/ --baseline model/ -o bench.json")]
pub struct Args {
    /// Model folder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Compare with this model, measured in alternation with the first
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,
    /// Run this precision variant of the baseline, as --variant does of MODEL [default: the most precise ones]
    #[arg(long, value_name = "VARIANT", requires = "baseline")]
    baseline_variant: Option<Variants>,
    /// End with status 1 when the baseline's time to the decoder's first token over the model's is less than this
    #[arg(long, value_name = "X", requires = "baseline")]
    min_speedup: Option<f64>,
    #[command(flatten)]
    load: Load,
    /// Write the report to this JSON file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// The workload.
#[derive(clap::Args)]
pub struct Load {
    /// Prefill the decoder with this number of tokens
    #[arg(long, value_name = "N", value_parser = count, default_value_t = BenchOptions::default().prompt_tokens)]
    prompt_tokens: usize,
    /// Decode this number of tokens after the prompt
    #[arg(long, value_name = "N", value_parser = count, default_value_t = BenchOptions::default().new_tokens)]
    new_tokens: usize,
    /// Measure this number of rounds; every model runs once in each
    #[arg(long, value_name = "N", value_parser = count, default_value_t = BenchOptions::default().rounds)]
    rounds: usize,
    /// Use this number of threads inside one operator [default: all cores]
    #[arg(long, value_name = "N", value_parser = parts)]
    threads: Option<usize>,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
}

impl Load {
    fn options(&self) -> BenchOptions {
        BenchOptions {
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            rounds: self.rounds,
            threads: self.threads,
            ..BenchOptions::default()
        }
    }
}

/// Prints the peak memory of one model in bytes.
#[derive(clap::Args)]
pub struct MemoryArgs {
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    #[command(flatten)]
    load: Load,
}

pub fn run_memory(args: MemoryArgs, context: &Context) -> anyhow::Result<Outcome> {
    let bytes = eval::peak_memory(
        &args.variant.source(&args.model, context)?,
        &Runtime::new(args.load.device)?,
        &args.load.options(),
        &context.cancel,
    )?;
    context.output.line(bytes)?;
    Ok(Outcome::Done)
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    check_output_file(&args.output)?;
    let runtime = Runtime::new(args.load.device)?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let load = &args.load;
    let memory = |model: &ModelSource| {
        let mut command = Command::new(&program);
        command.arg("peak-memory").arg(model.path()).args(["--prompt-tokens", &load.prompt_tokens.to_string()]);
        command.args(["--new-tokens", &load.new_tokens.to_string(), "--device", &load.device.to_string()]);
        if let Some(variants) = model.chosen() {
            command.args(["--variant", &variants]);
        }
        if let Some(threads) = load.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        eval::peak_memory_of_child(&mut command, &context.cancel)
    };
    let model = args.variant.source(&args.model, context)?;
    let baseline = args.baseline.map(|path| ModelSource::find(&path, args.baseline_variant, &context.cancel));
    let baseline = baseline.transpose()?;
    let baseline = baseline.as_ref();
    for model in [Some(&model), baseline].into_iter().flatten() {
        if load.new_tokens > 1 {
            check_needs(&model.open()?, Work::Bench)?;
        }
    }
    let report = eval::bench(&model, baseline, &runtime, &load.options(), Some(&memory), &context.cancel)?;
    write_json(&args.output, &report)?;
    if context.output.json {
        context.output.json(&report)?;
    } else {
        context.output.line(report_table(&report))?;
        context.output.line("median [least, most] of the rounds")?;
    }
    match (args.min_speedup, &report.speedup) {
        (Some(wanted), Some(found)) if found.decoder_ttft.median < wanted => {
            context
                .output
                .warn(format!("the decoder is {:.2} times as fast, {wanted} wanted", found.decoder_ttft.median));
            Ok(Outcome::GateFailed)
        }
        _ => Ok(Outcome::Done),
    }
}

fn report_table(report: &BenchReport) -> String {
    let mut head = vec![String::new(), "model".to_string()];
    if report.baseline.is_some() {
        head.extend(["baseline".to_string(), "speed-up".to_string()]);
    }
    let mut rows = vec![head];
    let mut row = |name: &str, figure: &dyn Fn(&ModelBench) -> String, speedup: Option<&Spread>| {
        let mut cells = vec![name.to_string(), figure(&report.model)];
        if let Some(baseline) = &report.baseline {
            cells.extend([figure(baseline), speedup.map_or(String::new(), spread)]);
        }
        rows.push(cells);
    };
    let speedup = report.speedup.as_ref();
    row("decoder layers", &|model| model.layers.map_or("?".to_string(), |layers| layers.to_string()), None);
    row("decoder TTFT ms", &|model| spread(&model.decoder_ttft_ms), speedup.map(|speedup| &speedup.decoder_ttft));
    row(
        "whole TTFT ms",
        &|model| model.pipeline_ttft_ms.as_ref().map_or("-".to_string(), spread),
        speedup.and_then(|speedup| speedup.pipeline_ttft.as_ref()),
    );
    row("decode tokens/s", &|model| spread(&model.decode_tokens_per_second), speedup.map(|speedup| &speedup.decode));
    row("peak memory", &|model| model.peak_memory_bytes.map_or("-".to_string(), human_bytes), None);
    row("size", &|model| human_bytes(model.size_bytes), None);
    let mut text = table(&rows);
    if let Some((ideal, part)) = speedup.and_then(|speedup| speedup.ideal.zip(speedup.decoder_ttft_of_ideal)) {
        text.push_str(&format!("\nideal speed-up of the decoder {ideal:.3}, reached {:.1}%", 100.0 * part));
    } else if report
        .baseline
        .as_ref()
        .is_some_and(|baseline| baseline.layers.is_some() && report.model.layers.is_some())
    {
        text.push_str(
            "\nno ideal speed-up: the decoders are in different precisions, not in different numbers of layers alone",
        );
    }
    text
}

fn spread(spread: &Spread) -> String {
    format!("{:.2} [{:.2}, {:.2}]", spread.median, spread.min, spread.max)
}
