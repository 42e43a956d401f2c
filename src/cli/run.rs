//! `interlace run`.

use std::path::PathBuf;
use std::time::Instant;

use crate::base::{human_bytes, peak_memory_bytes};
use crate::bundle::Variants;
use crate::pipeline::{self, MANIFEST_FILE, Recipe, TABLE_FILE};
use crate::report::draw_front;

use super::context::{Context, Outcome};
use super::output::table;

/// Run all steps from one recipe: score, plan, prune, finetune, measure
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  interlace run recipe.toml\n\nSteps that an earlier run finished are kept; the same \
    command continues a run that was stopped."
)]
pub struct Args {
    /// TOML file; schemas/recipe.schema.json describes its keys
    recipe: PathBuf,
    /// Write everything to this folder [default: the recipe's `output`]
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Take this precision variant of every component of the model, such as fp16 or q4, or one for each that is named, as in
    /// decoder=q4,vision_encoder=fp16 [default: the file's `variant`, else the most precise ones]
    #[arg(long, value_name = "VARIANT")]
    variant: Option<Variants>,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let mut recipe = Recipe::read(&args.recipe)?;
    recipe.variant = args.variant.or(recipe.variant);
    let output = &context.output;
    let result = pipeline::run(&recipe, args.output.as_deref(), &context.cancel, &mut |text| output.note(text))?;
    if output.json {
        output.json(&result.table)?;
    } else {
        output.line(table(&result.table.cells()))?;
        output.line(
            "kept: average over the dense model's, finetuned on the same samples or as it came; difference in percentage \
             points; both with 95% paired bootstrap intervals",
        )?;
    }
    output.note(format!(
        "table: {0}/{TABLE_FILE}.json and {TABLE_FILE}.md; digests: {0}/{MANIFEST_FILE}",
        result.folder.display()
    ));
    if let Some(chart) = draw_front(&result.folder)? {
        output.note(format!("chart: {}", chart.display()));
    }
    output.note(format!(
        "total time {:.0} s, peak memory {}",
        start.elapsed().as_secs_f64(),
        human_bytes(peak_memory_bytes())
    ));
    if result.gate_held {
        return Ok(Outcome::Done);
    }
    output.warn("less of the dense model's average is kept than the recipe's `min_retention`");
    Ok(Outcome::GateFailed)
}
