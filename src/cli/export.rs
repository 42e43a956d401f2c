//! `interlace export`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::base::human_bytes;
use crate::bundle::Bundle;
use crate::export::triton::{self, TritonSettings};

use super::output::table;
use super::{Context, Outcome};

/// Write the model in another layout, to serve it from
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace export model/ --to triton -o model_repository/")]
pub struct Args {
    /// Model folder, or one .onnx decoder
    model: PathBuf,
    /// The layout to write
    #[arg(long, value_enum)]
    to: Target,
    /// Largest batch of models whose inputs and outputs share a free first dimension; other models get 0
    #[arg(long, value_name = "N", default_value_t = TritonSettings::default().max_batch_size)]
    max_batch_size: u32,
    /// Precision variant of each component, such as fp16 or q4 [default: the most precise one]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Write newer ONNX files as this IR version, for servers that refuse newer ones
    #[arg(long, value_name = "N")]
    max_ir_version: Option<i64>,
    /// New folder for the repository
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Target {
    /// A model repository of Triton Inference Server, one model per component
    Triton,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let bundle = Bundle::open(&args.model)?;
    let Target::Triton = args.to;
    let settings = TritonSettings {
        max_batch_size: args.max_batch_size,
        variant: args.variant,
        max_ir_version: args.max_ir_version,
    };
    let export = triton::export(&bundle, &settings, &args.output)?;
    let output = &context.output;
    if output.json {
        output.json(&export)?;
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
    Ok(Outcome::Done)
}
