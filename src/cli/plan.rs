//! `interlace plan`.

use std::path::PathBuf;

use crate::base::{Device, check_output_file, human_bytes, human_count, sha256_file, write_json};
use crate::method::select::{DEFAULT_STRATEGY, Measures, STRATEGIES, Strategy};
use crate::method::{FIT_TOKENS, Plan, Scores};
use crate::pipeline::steps::{self, HowMany, Meter, PlanSettings, PlannedModel};

use super::args::{LayerList, ModalityWeightsArg, VariantArgs, amount, positive};
use super::context::{Context, Outcome};
use super::data_args::{DataArgs, warn_left_out};
use super::output::Output;
use super::strip;

/// The flags that set the number of layers to drop; exactly one is required.
const HOW_MANY: [&str; 6] = ["drop_ratio", "drop_count", "drop", "target_params", "target_size", "target_speedup"];

/// Choose which layers to drop and which to finetune
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  interlace plan model/ --scores scores.json --drop-ratio 0.25 -o plan.json\n  \
    interlace plan model/ --scores scores.json --target-size 1.5GB --modality-weights image=0.7,text=0.3 -o plan.json\n  \
    interlace plan model/ --strategy interlace-loss --data train.parquet --target-speedup 1.3 -o plan.json")]
#[command(group(clap::ArgGroup::new("how_many").required(true).args(HOW_MANY)))]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Read the scores that `interlace score` wrote for this model
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// Choose layers by this strategy; see the list below [default: shortgpt, or explicit with --drop]
    #[arg(long, value_name = "NAME", long_help = strategies_help())]
    strategy: Option<String>,
    /// Drop this fraction of the decoder's layers, between 0 and 1, rounded down to whole layers
    #[arg(long, value_name = "RATIO")]
    drop_ratio: Option<f64>,
    /// Drop this number of decoder layers; with finercut, of their MLPs
    #[arg(long, value_name = "K", value_parser = positive)]
    drop_count: Option<usize>,
    /// Drop the fewest layers that leave at most this number of parameters in the model, as in 1.5G or 800M
    #[arg(long, value_name = "N", value_parser = amount)]
    target_params: Option<u64>,
    /// Drop the fewest layers that leave at most this many bytes of ONNX files, as in 1.5GB or 800MiB
    #[arg(long, value_name = "BYTES", value_parser = amount)]
    target_size: Option<u64>,
    /// Drop the fewest layers that reach this ideal speed-up of the decoder: layers before over layers after
    #[arg(long, value_name = "X")]
    target_speedup: Option<f64>,
    /// Drop the decoder layers with these indices from 0, as in 2,5
    #[arg(long, value_name = "LAYERS")]
    drop: Option<LayerList>,
    /// Weigh the similarities over image, text and all tokens, each weight 0 or more, as in image=0.7,text=0.3
    /// [default: all=1]
    #[arg(long, value_name = "WEIGHTS", requires = "scores")]
    modality_weights: Option<ModalityWeightsArg>,
    /// Go on where the packs of interlace, interlace-oa and interlace-tn run out: with pairs for interlace-oa, then with single
    /// frozen layers, the most similar first
    #[arg(long)]
    beyond_structure: bool,
    /// Let interlace-tn, random and consecutive choose the last layer too, as the authors' released code does
    #[arg(long)]
    as_released: bool,
    /// Read calibration data, for strategies that measure losses
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// Draw this number of calibration samples [default: 32, or all where there are fewer]
    #[arg(long, value_name = "N", value_parser = positive, requires = "data")]
    samples: Option<usize>,
    /// Fit on at most this number of tokens of other samples, for strategies that measure losses after a fit
    #[arg(long, value_name = "N", default_value_t = FIT_TOKENS, value_parser = positive, requires = "data")]
    fit_tokens: usize,
    #[command(flatten)]
    reading: DataArgs,
    /// Measure losses on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Seed the random strategy and the draw of samples
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Write the plan to this JSON file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

fn strategies_help() -> String {
    let rows = STRATEGIES.iter().map(|strategy| format!("  {:<16}{}", strategy.name, strategy.summary));
    format!(
        "How to choose:\n{}\n[default: {DEFAULT_STRATEGY}, or explicit with --drop]",
        rows.collect::<Vec<_>>().join("\n")
    )
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    check_output_file(&args.output)?;
    let strategy =
        args.strategy.unwrap_or_else(|| if args.drop.is_some() { "explicit" } else { DEFAULT_STRATEGY }.to_string());
    let how_many = [
        args.drop.map(|layers| HowMany::Drop(layers.0)),
        args.drop_count.map(HowMany::DropCount),
        args.drop_ratio.map(HowMany::DropRatio),
        args.target_params.map(HowMany::TargetParams),
        args.target_size.map(HowMany::TargetSize),
        args.target_speedup.map(HowMany::TargetSpeedup),
    ];
    // clap requires one flag of the group.
    let how_many = how_many.into_iter().flatten().next().unwrap_or(HowMany::DropCount(0));
    if matches!(how_many, HowMany::Drop(_)) != (strategy == "explicit") {
        anyhow::bail!("--drop requires the strategy `explicit`, found `{strategy}`; leave one of the two flags out");
    }
    let bundle = args.variant.source(&args.model, context)?.open()?;
    let scores = args.scores.as_deref().map(Scores::read).transpose()?;
    let digest = args.scores.as_deref().map(sha256_file).transpose()?;
    let model = PlannedModel::of(&bundle)?;
    if let (Some(scores), Some(file)) = (&scores, &args.scores) {
        model.check_scores(scores, format!("scores `{}`", file.display()))?;
    }
    let row = Strategy::named(&strategy)?;
    let measures = row.measures;
    let fits = args.data.is_some() && measures == Measures::HealedLoss;
    let mut settings = PlanSettings {
        strategy,
        how_many,
        seed: args.seed,
        samples: None,
        fit_tokens: fits.then_some(args.fit_tokens),
        data: args.data.is_some().then(|| args.reading.options()),
        modality_weights: args.modality_weights.map(|weights| weights.0),
        as_released: args.as_released,
        beyond_structure: args.beyond_structure,
    };
    let read = args.data.as_deref().map(|data| {
        let data = (data, &args.reading.options());
        let drawn = (args.samples, args.seed, args.fit_tokens);
        Meter::open(&bundle, row, data, drawn, args.device, &context.cancel)
    });
    let mut meter = read.transpose()?;
    settings.samples = meter.as_ref().map(|meter| meter.asked);
    let measured = measures != Measures::Nothing;
    if let Some(meter) = meter.as_ref().filter(|_| measured) {
        let cost = meter.cost(settings.how_many.count(&model)?, model.num_layers);
        context.output.note(format!("{}: {cost}", settings.strategy));
    }
    let plan = steps::plan(&model, scores.as_ref().zip(digest), &settings, meter.as_mut())?;
    write_json(&args.output, &plan)?;
    let output = &context.output;
    warn_left_out(&plan.left_out, output);
    model.plan_warnings(&plan).iter().for_each(|warning| output.warn(warning));
    steps::variants_warning(&bundle, &[]).iter().for_each(|warning| output.warn(warning));
    match output.json {
        true => output.json(&plan)?,
        false => print(&plan, &model, measured, output)?,
    }
    Ok(Outcome::Done)
}

/// Prints the strip, the selected layers, and the cost of the model before and after.
fn print(plan: &Plan, model: &PlannedModel, measured: bool, output: &Output) -> anyhow::Result<()> {
    output.line(strip::strip(plan))?;
    output.line(strip::legend())?;
    let list = |layers: &[usize]| layers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    let what = if plan.part.is_layer() { "drop     " } else { "drop MLPs" };
    output.line(format!("{what} {}", list(&plan.drop)))?;
    output.line(format!("finetune  {}", list(&plan.finetune)))?;
    if measured {
        let steps =
            plan.groups.iter().map(|group| format!("{} ({:.4})", list(&group.drop), group.score.unwrap_or_default()));
        output.line(format!("loss      {} after each removal", steps.collect::<Vec<_>>().join(", ")))?;
    }
    let kept = plan.num_layers - plan.drop.len();
    let what = if plan.part.is_layer() { "layers" } else { "MLPs, the attention of all layers" };
    output.line(format!("kept      {kept} of {} {what}", plan.num_layers))?;
    let (before, after) = (model.costs.without(&[]), model.costs.without_part(plan.part, &plan.drop));
    output.line(format!(
        "model     {} of {} parameters, {} of {}",
        human_count(after.parameters),
        human_count(before.parameters),
        human_bytes(after.size_bytes),
        human_bytes(before.size_bytes)
    ))?;
    let by = if plan.part.is_layer() { "all layers being alike" } else { "by the parameters of its layers" };
    output.line(format!("decoder   {:.2} times as fast at best, {by}", after.speedup))?;
    Ok(())
}
