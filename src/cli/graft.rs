//! `interlace graft`.

use std::path::PathBuf;

use crate::base::list_preview;
use crate::checkpoint::{Checkpoint, Tuned, checkpoint_on_disk};
use crate::graft::GraftTable;
use crate::pipeline::steps::{Graft, graft, plan_graft};

use super::args::VariantArgs;
use super::context::{Context, Outcome};
use super::output::{Output, table};

/// Write finetuned weights of a Hugging Face checkpoint into the graphs
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace graft model/ --base original/ --tuned finetuned/ -o grafted/\n\n\
    Each weight of the graphs is matched by its numbers to tensors of the base, and gets their finetuned values.")]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Checkpoint that the graphs were exported from: a folder with safetensors, one .safetensors file, or
    /// hf:OWNER/NAME[@REVISION]
    #[arg(long, value_name = "CHECKPOINT")]
    base: PathBuf,
    /// Finetuned checkpoint with the same tensors, or a folder with a LoRA adapter of `peft`, or either as hf:OWNER/NAME[@REVISION]
    #[arg(long, value_name = "CHECKPOINT")]
    tuned: PathBuf,
    /// Leave out finetuned tensors whose names begin so, because these graphs do not have them; may be repeated
    #[arg(long, value_name = "NAME")]
    leave_out: Vec<String>,
    /// Print what would be written and stop; exit code 1 when a finetuned tensor has no place
    #[arg(long)]
    dry_run: bool,
    /// Write the model with the finetuned weights to this new folder
    #[arg(short, long, value_name = "FOLDER", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let bundle = args.variant.source(&args.model, context)?.open()?;
    let base = Checkpoint::open(&checkpoint_on_disk(&args.base, &context.cancel)?)?;
    let tuned = Tuned::open(&checkpoint_on_disk(&args.tuned, &context.cancel)?, &base)?;
    let request = Graft { bundle: &bundle, base: &base, tuned: &tuned, leave_out: &args.leave_out };
    let found = match &args.output {
        Some(target) if !args.dry_run => graft(&request, target, &context.cancel)?,
        _ => plan_graft(&request, &context.cancel)?,
    };
    if context.output.json {
        context.output.json(&found)?;
    } else {
        print(&found, args.dry_run, &context.output)?;
    }
    Ok(if found.homeless.is_empty() { Outcome::Done } else { Outcome::GateFailed })
}

fn print(found: &GraftTable, all: bool, output: &Output) -> anyhow::Result<()> {
    if all {
        let mut rows = vec![["weight", "shape", "how"].map(String::from).to_vec()];
        for weight in &found.weights {
            let shape = weight.shape.iter().map(u64::to_string).collect::<Vec<_>>().join("x");
            rows.push(vec![weight.initializer.clone(), shape, weight.how.clone()]);
        }
        let printed = table(&rows);
        let mut lines = printed.lines();
        for head in lines.by_ref().take(2) {
            output.line(head)?;
        }
        for (line, weight) in lines.zip(&found.weights) {
            let mark = if weight.changed { "" } else { " (unchanged)" };
            output.line(format!("{line}  {}{mark}", weight.tensors.join(", ")))?;
        }
        for weight in &found.kept {
            let reason = weight.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
            output.line(format!("kept      {}{reason}", weight.described()))?;
        }
    }
    for tensor in &found.homeless {
        output.line(format!("no place  {}", tensor.described()))?;
    }
    for (what, names) in [("tensors of pruned layers left out", &found.pruned), ("left out", &found.left_out)] {
        if !names.is_empty() {
            output.line(format!("{what}: {}", list_preview(names, 4)))?;
        }
    }
    let changed = found.weights.iter().filter(|weight| weight.changed).count();
    output.line(format!("{changed} of {} weights get finetuned values", found.weights.len() + found.kept.len()))?;
    Ok(())
}
