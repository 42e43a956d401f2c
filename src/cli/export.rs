//! `interlace export`.

use std::path::PathBuf;

use crate::base::{Error, human_bytes};
use crate::bundle::{Bundle, ModelSource};
use crate::checkpoint::checkpoint_on_disk;
use crate::export::{self, ExportSettings, ExportTarget, TARGETS, target_named};

use super::args::{amount, model};
use super::context::{Context, Outcome};
use super::output::table;

/// Write the model in the layout of a server, a library or the hub
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace export model/ --to triton -o model_repository/")]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    /// Write this layout; see the list below
    #[arg(long, value_name = "TARGET", value_parser = target_named, long_help = targets_help())]
    to: &'static ExportTarget,
    /// Set the largest batch of models whose inputs and outputs share a free first axis; other models get 0 [default: 8]
    #[arg(long, value_name = "N")]
    max_batch_size: Option<u32>,
    /// Export this precision variant of each component, such as fp16 or q4, or one for each that is named, as in
    /// decoder=q4,vision_encoder=fp16 [default: the most precise one]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Lower the IR version of newer ONNX files to this, for servers that refuse newer ones [default: unchanged]
    #[arg(long, value_name = "N")]
    max_ir_version: Option<i64>,
    /// Name the weights as this Hugging Face checkpoint does, which the graphs were exported from (safetensors only)
    #[arg(long, value_name = "CHECKPOINT")]
    base: Option<PathBuf>,
    /// Model before it was trained, pruned or not; needed with --base for a trained model
    #[arg(long, value_name = "MODEL")]
    dense: Option<PathBuf>,
    /// Set the largest size of a weight file, such as 5GB (safetensors only) [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    shard_size: Option<u64>,
    /// Put the scores of this report of `eval`, and its baseline's, into manifest.json; may be repeated
    #[arg(long, value_name = "FILE")]
    report: Vec<PathBuf>,
    /// Write the layout to this new folder
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

fn targets_help() -> String {
    let rows = TARGETS.iter().map(|row| format!("  {:<16}{} (tried with {})", row.name, row.summary, row.consumer));
    format!("The layout to write:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let variants = args.variant.as_deref().map(str::parse).transpose();
    let variants = variants.map_err(|problem: String| Error::invalid("`--variant`", problem))?;
    let bundle = Bundle::open(ModelSource::find(&args.model, variants, &context.cancel)?.path())?;
    let base = args.base.map(|base| checkpoint_on_disk(&base, &context.cancel)).transpose()?;
    let dense = args.dense.map(|dense| model(&dense, context)).transpose()?;
    let settings = ExportSettings {
        max_batch_size: args.max_batch_size,
        variant: args.variant,
        max_ir_version: args.max_ir_version,
        base,
        dense: dense.map(|dense| dense.path().to_path_buf()),
        reports: args.report,
        shard_bytes: args.shard_size,
    };
    let export = export::export(&bundle, args.to, &settings, &args.output)?;
    let output = &context.output;
    if output.json {
        output.json(&export)?;
        return Ok(Outcome::Done);
    }
    if let Some(weights) = &export.weights {
        output.line(format!("{} tensors, {} of them with trained values", weights.tensors, weights.changed))?;
        export.notes.iter().for_each(|note| output.warn(note));
        return Ok(Outcome::Done);
    }
    let mut rows = vec![["model", "inputs", "outputs", "size"].map(String::from).to_vec()];
    for (name, model) in &export.models {
        rows.push(vec![
            name.clone(),
            model.inputs.to_string(),
            model.outputs.to_string(),
            human_bytes(model.size_bytes),
        ]);
    }
    output.line(table(&rows))?;
    export.notes.iter().for_each(|note| output.warn(note));
    Ok(Outcome::Done)
}
