//! `interlace score`.

use std::path::PathBuf;

use crate::base::{Device, Peers, check_output_file, is_first, write_json};
use crate::data::{Amount, Dataset, Subset};
use crate::method::{ScoreSettings, Scores, score_with_peers};
use crate::pipeline::steps::{Work, check_needs};

use super::args::{VariantArgs, count, fraction, positive};
use super::context::{Context, Outcome};
use super::data_args::{DataArgs, warn_left_out};
use super::output::{profile_table, table};

/// Measure how little each pack of layers changes the residual stream
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace score model/ --data train.parquet --samples 500 -o scores.json")]
pub struct Args {
    /// Model folder to score, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Read calibration data: conversations in Parquet or JSON (a file, a folder or a glob pattern), running text in .jsonl
    /// with a `text` in each line, or ready tensors (.safetensors, .npz)
    #[arg(long, value_name = "DATA")]
    data: PathBuf,
    /// Draw this fraction of the samples, above 0 and at most 1 [default: 0.1]
    #[arg(long, value_name = "F", value_parser = fraction, conflicts_with = "samples")]
    fraction: Option<f64>,
    /// Draw this number of samples
    #[arg(long, value_name = "N", value_parser = positive)]
    samples: Option<usize>,
    /// Seed the draw of samples
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Score packs of these sizes, in layers, besides 1,2,3, for strategies that drop longer blocks [default: none]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = count)]
    packs: Vec<usize>,
    /// Score packs that contain the last layer too, so that it may be dropped [default: off]
    #[arg(long)]
    include_last: bool,
    /// Leave out samples whose prompt is longer than this number of tokens
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = count)]
    max_tokens: usize,
    /// Also say where the time was spent: pictures, vision encoder, embedding, decoder, waiting
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    reading: DataArgs,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(super) device: Device,
    /// Write the scores to this JSON file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Scores; with `peers` as one of several processes, of which the first prints and writes.
pub fn run(args: Args, context: &Context, peers: Option<&dyn Peers>) -> anyhow::Result<Outcome> {
    if is_first(peers) {
        check_output_file(&args.output)?;
    }
    let amount = match (args.samples, args.fraction) {
        (Some(count), _) => Amount::Samples(count),
        (None, part) => Amount::Fraction(part.unwrap_or(0.1)),
    };
    let settings = ScoreSettings {
        amount,
        seed: args.seed,
        longer_packs: args.packs.into_iter().filter(|&size| size > 3).collect(),
        include_last: args.include_last,
        max_tokens: args.max_tokens,
        profile: args.profile,
    };
    let bundle = args.variant.source(&args.model, context)?.open()?;
    check_needs(&bundle, Work::Score)?;
    let dataset = Dataset::open_for(&args.data, &bundle, &args.reading.options())?;
    if args.samples.is_none() && args.fraction.is_none() && is_first(peers) {
        let drawn = dataset.draw(Subset { amount, seed: args.seed })?.len();
        let all = dataset.len();
        context.output.note(format!("scoring on {drawn} of {all} samples; `--samples` or `--fraction` sets how many"));
    }
    let scores = score_with_peers(peers, &bundle, &dataset, &settings, args.device, &context.cancel)?;
    if !is_first(peers) {
        return Ok(Outcome::Done);
    }
    write_json(&args.output, &scores)?;
    scores.warnings.iter().for_each(|warning| context.output.warn(warning));
    warn_left_out(&scores.left_out, &context.output);
    if context.output.json {
        context.output.json(&scores)?;
    } else {
        context.output.line(score_table(&scores))?;
        context.output.line(format!("{} samples, mean ± standard error", scores.num_samples))?;
        if scores.additions.is_some() {
            context
                .output
                .line("compared before features are added between layers, as Hugging Face records hidden states")?;
        }
        if let Some(profile) = &scores.profile {
            context.output.line(profile_table(profile))?;
        }
    }
    Ok(Outcome::Done)
}

fn score_table(scores: &Scores) -> String {
    let mut rows = vec![["first layer", "sim_1", "sim_2", "sim_3"].map(String::from).to_vec()];
    rows[0].extend(scores.modalities.keys().map(|modality| format!("sim_1 {}", modality.name())));
    for layer in 0..scores.sim_1.mean.len() {
        let mut row = vec![layer.to_string()];
        for pack in [&scores.sim_1, &scores.sim_2, &scores.sim_3] {
            row.push(match (pack.mean.get(layer), pack.standard_error.get(layer)) {
                (Some(mean), Some(error)) => format!("{mean:.4} ± {error:.4}"),
                _ => String::new(),
            });
        }
        for modality in scores.modalities.values() {
            let mean = modality.packs.get(&1).and_then(|pack| pack.mean.get(layer));
            row.push(mean.map(|mean| format!("{mean:.4}")).unwrap_or_default());
        }
        rows.push(row);
    }
    table(&rows)
}
