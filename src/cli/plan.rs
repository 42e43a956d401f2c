//! `interlace plan`.

use std::path::PathBuf;

use crate::base::{Device, sha256_file, write_json};
use crate::bundle::Bundle;
use crate::data::{Amount, Dataset, SEQUENCE_LENGTH, Subset};
use crate::method::select::STRATEGIES;
use crate::method::{LossMeter, Scores};
use crate::pipeline::steps::{self, HowMany, PlanSettings, PlannedModel};

use super::args::{LayerList, positive};
use super::{Context, Outcome, strip};

/// Choose which layers to drop and which to finetune
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace plan model/ --scores scores.json --drop-ratio 0.25 -o plan.json")]
#[command(group(clap::ArgGroup::new("how_many").required(true).args(["drop_ratio", "drop_count", "drop"])))]
pub struct Args {
    /// Model folder, or one .onnx decoder
    model: PathBuf,
    /// What `interlace score` wrote for this model
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// How to choose; see the list below [default: interlace, or explicit with --drop]
    #[arg(long, value_name = "NAME", long_help = strategies_help())]
    strategy: Option<String>,
    /// Part of the layers to drop, rounded down to whole layers
    #[arg(long, value_name = "RATIO")]
    drop_ratio: Option<f64>,
    /// Number of layers to drop
    #[arg(long, value_name = "K", value_parser = positive)]
    drop_count: Option<usize>,
    /// Drop these layers, as in 2,5
    #[arg(long, value_name = "LAYERS")]
    drop: Option<LayerList>,
    /// Calibration data for strategies that measure losses
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// Number of samples to draw from it
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive, requires = "data")]
    samples: usize,
    /// Tokens in each sequence of running text
    #[arg(long, value_name = "N", default_value_t = SEQUENCE_LENGTH, value_parser = positive)]
    sequence_length: usize,
    /// Where to measure losses: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Seed of the random strategy and of the draw
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// The plan to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

fn strategies_help() -> String {
    let rows = STRATEGIES.iter().map(|strategy| format!("  {:<14}{}", strategy.name, strategy.summary));
    format!("How to choose:\n{}\n[default: interlace, or explicit with --drop]", rows.collect::<Vec<_>>().join("\n"))
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let strategy =
        args.strategy.unwrap_or_else(|| if args.drop.is_some() { "explicit" } else { "interlace" }.to_string());
    let how_many = match (args.drop, args.drop_count, args.drop_ratio) {
        (Some(layers), _, _) => HowMany::Drop(layers.0),
        (_, Some(count), _) => HowMany::DropCount(count),
        (_, _, ratio) => HowMany::DropRatio(ratio.unwrap_or_default()),
    };
    if matches!(how_many, HowMany::Drop(_)) != (strategy == "explicit") {
        anyhow::bail!("--drop goes with the strategy `explicit`, found `{strategy}`; leave one of them out");
    }
    let bundle = Bundle::open(&args.model)?;
    let scores = args.scores.as_deref().map(Scores::read).transpose()?;
    let digest = args.scores.as_deref().map(sha256_file).transpose()?;
    let model = PlannedModel { digest: bundle.digest()?, num_layers: steps::decoder_layers(&bundle)? };
    let samples = args.data.is_some().then_some(args.samples);
    let settings = PlanSettings { strategy, how_many, seed: args.seed, samples };
    let subset = Subset { amount: Amount::Samples(args.samples), seed: args.seed };
    let mut meter = match &args.data {
        Some(data) => {
            let dataset = Dataset::open_for(data, &bundle, args.sequence_length)?;
            Some((LossMeter::new(&bundle, &dataset, subset, args.device, &context.cancel)?, dataset.digest()?))
        }
        None => None,
    };
    let losses = meter.as_mut().map(|(measure, data)| steps::Losses { data: data.clone(), measure });
    let plan = steps::plan(&model, scores.as_ref().zip(digest), &settings, losses)?;
    write_json(&args.output, &plan)?;
    let output = &context.output;
    if output.json {
        output.json(&plan)?;
        return Ok(Outcome::Done);
    }
    output.line(strip::strip(&plan))?;
    output.line(strip::legend())?;
    let list = |layers: &[usize]| layers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    output.line(format!("drop      {}", list(&plan.drop)))?;
    output.line(format!("finetune  {}", list(&plan.finetune)))?;
    output.line(format!("kept      {} of {} layers", plan.num_layers - plan.drop.len(), plan.num_layers))?;
    Ok(Outcome::Done)
}
