//! `interlace sweep`.

use std::path::PathBuf;

use crate::bundle::Variants;
use crate::pipeline::{self, SWEEP_FILE, Sweep};
use crate::report::draw_front;

use super::context::{Context, Outcome};
use super::output::table;

/// Compare drop ratios, strategies and healing recipes over several seeds
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  interlace sweep sweep.toml\n\nSteps that an earlier sweep finished are kept, and equal \
    steps are done once. The same command\ncontinues a sweep that was stopped; its table has the finished rows."
)]
pub struct Args {
    /// TOML file; schemas/sweep-recipe.schema.json describes its keys
    sweep: PathBuf,
    /// Write everything to this folder [default: the file's `output`]
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Take this precision variant of every component of the model, such as fp16 or q4, or one for each that is named, as in
    /// decoder=q4,vision_encoder=fp16 [default: the file's `variant`, else the most precise ones]
    #[arg(long, value_name = "VARIANT")]
    variant: Option<Variants>,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let mut sweep = Sweep::read(&args.sweep)?;
    sweep.variant = args.variant.or(sweep.variant);
    let output = &context.output;
    let result = pipeline::sweep(&sweep, args.output.as_deref(), &context.cancel, &mut |text| output.note(text))?;
    if output.json {
        output.json(&result.table)?;
    } else {
        output.line(table(&result.table.cells()))?;
        output.line(
            "kept: average over the dense model's, finetuned on the same samples or as it came; ± one standard deviation \
             over seeds; difference in percentage points with its 95% paired bootstrap interval",
        )?;
        output.line("Pareto: no other row keeps as much of the dense model and is as fast, and one of them more")?;
    }
    output.note(format!("table: {0}/{SWEEP_FILE}.json and {SWEEP_FILE}.md", result.folder.display()));
    if let Some(chart) = draw_front(&result.folder)? {
        output.note(format!("chart: {}", chart.display()));
    }
    Ok(Outcome::Done)
}
