//! `interlace verify`.

use std::path::PathBuf;

use owo_colors::OwoColorize;

use crate::base::Device;
use crate::eval::{self, CheckStatus, DeviceLimits};
use crate::runtime::Runtime;

use super::args::{VariantArgs, amount};
use super::context::{Context, Outcome};

/// Check that the files load, agree with each other and give equal results in ONNX Runtime and LibTorch
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace verify healed/\n\nEnds with status 1 when a check fails.")]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Compare the engines on the inputs in this .npz file, arrays named after the inputs of MODEL, which is then one .onnx
    /// file of any kind [default: made-up inputs]
    #[arg(long, value_name = "FILE")]
    inputs: Option<PathBuf>,
    /// Fail for an initializer above this size, such as 1GB, the largest buffer of the device to run on, and for what a graph
    /// computes at any length of the prompt; prints the longest prompt that fits
    /// [default: unlimited]
    #[arg(long, value_name = "SIZE", value_parser = amount, conflicts_with = "inputs")]
    max_buffer: Option<u64>,
    /// Check that WebGPU can run the graphs: nothing above --max-buffer [default with --webgpu: 1GB], no bfloat16, and
    /// positions that ONNX Runtime Web does not read too early
    #[arg(long, conflicts_with = "inputs")]
    webgpu: bool,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let source = args.variant.source(&args.model, context)?;
    let runtime = Runtime::new(args.device)?;
    let limits = DeviceLimits::new(args.max_buffer, args.webgpu);
    let report = match &args.inputs {
        Some(inputs) => eval::verify_on(&source, inputs, &runtime)?,
        None => eval::verify(&source, limits, &runtime, &context.cancel)?,
    };
    let output = &context.output;
    if output.json {
        output.json(&report)?;
    } else {
        for check in &report.checks {
            let status = match check.status {
                CheckStatus::Passed => "passed     ".green().to_string(),
                CheckStatus::Failed => "FAILED     ".red().bold().to_string(),
                CheckStatus::Unavailable => "unavailable".yellow().to_string(),
                CheckStatus::Warning => "warning    ".yellow().bold().to_string(),
            };
            let difference = match (check.difference, check.tolerance) {
                (Some(difference), Some(tolerance)) => {
                    format!(" (difference {difference:.1e}, allowed {tolerance:.0e})")
                }
                _ => String::new(),
            };
            output.line(format!("{status}  {} of {}: {}{difference}", check.name, check.subject, check.detail))?;
        }
    }
    Ok(if report.passed { Outcome::Done } else { Outcome::GateFailed })
}
