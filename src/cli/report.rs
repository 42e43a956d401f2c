//! `interlace report`.

use std::path::PathBuf;

use crate::base::human_bytes;
use crate::report;

use super::context::{Context, Outcome};

/// Write one HTML page about a run: curves, layers, losses, retention, speed, size, examples
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  interlace report demo-output/ -o report.html\n\nThe page needs no network and no other file. \
    Pictures of the examples are read from the recipe's benchmark: run it in the\nfolder where `interlace run` ran."
)]
pub struct Args {
    /// Folder that `interlace run` or `interlace sweep` wrote
    run: PathBuf,
    /// Write the page to this file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let written = report::report(&args.run, &args.output)?;
    let output = &context.output;
    if output.json {
        output.json(&written)?;
        return Ok(Outcome::Done);
    }
    for section in &written.sections {
        match &section.left_out {
            None => output.line(&section.name)?,
            Some(reason) => output.line(format!("{}: left out: {reason}", section.name))?,
        }
    }
    output.line(format!("{} in {}", human_bytes(written.size_bytes), written.output.display()))?;
    Ok(Outcome::Done)
}
