//! `interlace prune`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::base::{Device, human_bytes, human_count, list_preview, sha256_file};
use crate::bundle::{Bundle, Deepstack, TapChange, Tower};
use crate::data::{Amount, Subset};
use crate::method::{BRIDGE_RANK, COMPENSATIONS, CompensationKind, CompensationRow, FIT_TOKENS, Part, Plan};
use crate::pipeline::steps::{self, Compensated, CompensationSettings, Drop, Pruned};

use super::args::{LayerList, VariantArgs, count, part, positive};
use super::context::{Context, Outcome};
use super::data_args::{DataArgs, warn_left_out};
use super::output::{Output, table};

/// Remove layers from the graph, its cache and its configs
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace prune model/ --plan plan.json -o pruned/\n  \
    interlace prune model/ --drop 2,5 -o pruned/\n  \
    interlace prune model/ --plan plan.json --compensate linear --data train.parquet -o pruned/")]
#[command(group(clap::ArgGroup::new("which").required(true).args(["plan", "drop", "drop_mlps", "keep_image_tokens"])))]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Drop the layers of this plan, which `interlace plan` wrote for the model
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Drop the layers with these indices from 0, as in 2,5
    #[arg(long, value_name = "LAYERS")]
    drop: Option<LayerList>,
    /// Drop the MLPs of the decoder layers with these indices from 0, as in 2,5: attention, caches and configs stay
    #[arg(long, value_name = "LAYERS")]
    drop_mlps: Option<LayerList>,
    /// Read only this part of each picture's tokens, those least like each other (DART): adds a graph between embedding and
    /// decoder, token_pruner.onnx, and drops no layer; 1 takes it out
    #[arg(long, value_name = "PART", value_parser = part, conflicts_with_all = ["component", "deepstack", "compensate"])]
    keep_image_tokens: Option<f64>,
    /// Drop layers of this component
    #[arg(long, value_enum, default_value_t = Component::Decoder, conflicts_with_all = ["plan", "drop_mlps"])]
    component: Component,
    /// Choose what becomes of features that are added after the first layers (DeepStack): keep leaves them at their
    /// original layers, shift moves them to the first layers that remain, as Hugging Face's class does
    #[arg(long, value_enum, default_value_t = DeepstackRule::Keep)]
    deepstack: DeepstackRule,
    /// Make up for the dropped layers by a closed form before each gap, towards the dense model's stream; see the list below
    /// [default: nothing]
    #[arg(long, value_name = "HOW", requires = "data", conflicts_with = "component", long_help = compensations_help())]
    compensate: Option<String>,
    /// Give the maps of --compensate bridge this rank: 2 R weights for each channel of the stream and gap
    #[arg(long, value_name = "R", value_parser = count, requires = "compensate")]
    rank: Option<usize>,
    /// Fit on this calibration data, and measure the loss on other samples of it
    #[arg(long, value_name = "DATA", requires = "compensate")]
    data: Option<PathBuf>,
    /// Measure the loss on this number of calibration samples
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive, requires = "data")]
    samples: usize,
    /// Fit on at most this number of tokens of other samples
    #[arg(long, value_name = "N", default_value_t = FIT_TOKENS, value_parser = positive, requires = "data")]
    fit_tokens: usize,
    #[command(flatten)]
    reading: DataArgs,
    /// Run the model for the fit on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", requires = "data")]
    device: Device,
    /// Seed the draw of samples
    #[arg(long, default_value_t = 42, requires = "data")]
    seed: u64,
    /// Write the pruned model to this new folder
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Component {
    Decoder,
    #[value(name = "vision_encoder")]
    VisionEncoder,
}

fn compensations_help() -> String {
    let rows = COMPENSATIONS.iter().map(|row| format!("  {:<9}{}", row.name, row.summary));
    format!(
        "Make up for the dropped layers by a closed form before each gap, towards the dense model's stream:\n{}\n\
         [default: nothing; rank of a bridge: {BRIDGE_RANK}]",
        rows.collect::<Vec<_>>().join("\n")
    )
}

#[derive(Clone, Copy, ValueEnum)]
enum DeepstackRule {
    Keep,
    Shift,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let bundle = args.variant.source(&args.model, context)?.open()?;
    if let Some(keep) = args.keep_image_tokens {
        let kept = steps::keep_image_tokens(&bundle, keep, &args.output)?;
        match (context.output.json, kept.pruner) {
            (true, _) => context.output.json(&kept)?,
            (_, true) => context
                .output
                .line(format!("{}% of each picture's tokens are read, chosen by token_pruner.onnx", 100.0 * keep))?,
            _ => context.output.line("all of each picture's tokens are read")?,
        }
        return Ok(Outcome::Done);
    }
    let plan = args.plan.as_deref().map(Plan::read).transpose()?;
    let layers = args.drop.as_ref().map_or(&[][..], |list| list.0.as_slice());
    let mlps = args.drop_mlps.as_ref().map(|list| list.0.as_slice());
    let drop = match (&plan, &args.plan, mlps) {
        (Some(plan), Some(path), _) => Drop::Plan { plan, digest: sha256_file(path)?, file: path },
        (_, _, Some(mlps)) => Drop::Mlps(mlps),
        _ => {
            let tower = match args.component {
                Component::Decoder => Tower::Text,
                Component::VisionEncoder => Tower::Vision,
            };
            Drop::Layers { tower, layers }
        }
    };
    let deepstack = match args.deepstack {
        DeepstackRule::Keep => Deepstack::Keep,
        DeepstackRule::Shift => Deepstack::Shift,
    };
    let output = &context.output;
    let compensated = fitted(&args, &bundle, &drop, context)?;
    let pruned = steps::prune(&bundle, &drop, deepstack, compensated.as_ref(), &args.output)?;
    if let Some(compensated) = &compensated {
        warn_left_out(&compensated.left_out, output);
    }
    for variant in &pruned.set_aside {
        output.warn(format!("`{}` is set aside: {}", variant.file, variant.problem));
    }
    steps::variants_warning(&bundle, &pruned.set_aside).iter().for_each(|warning| output.warn(warning));
    match output.json {
        true => output.json(&pruned)?,
        false => print(&pruned, output)?,
    }
    Ok(Outcome::Done)
}

/// What makes up for the dropped layers, where the flags ask for it.
fn fitted(args: &Args, bundle: &Bundle, drop: &Drop, context: &Context) -> anyhow::Result<Option<Compensated>> {
    let (Some(how), Some(data)) = (&args.compensate, &args.data) else { return Ok(None) };
    if drop.part() == Part::Mlp {
        anyhow::bail!("--compensate closes gaps between layers, and dropping MLPs alone leaves none; leave it out");
    }
    let subset = Subset { amount: Amount::Samples(args.samples), seed: args.seed };
    let kind = CompensationRow::named(how)?.kind;
    let settings = CompensationSettings::new(kind, args.rank, subset, Some(args.fit_tokens))?;
    let read = (data.as_path(), &args.reading.options());
    Ok(Some(steps::compensate(bundle, drop.layers().1, read, &settings, args.device, &context.cancel)?))
}

/// Prints what went, what makes up for it, and the size of every component.
fn print(pruned: &Pruned, output: &Output) -> anyhow::Result<()> {
    let list = |layers: &[usize]| layers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    match pruned.mlps.as_slice() {
        [] => output.line(format!(
            "dropped {}: {} of {} layers stay",
            list(&pruned.dropped),
            pruned.layers_after,
            pruned.layers_before
        ))?,
        mlps => output.line(format!(
            "dropped the MLPs of layers {}: {} of {} stay, the attention of all layers",
            list(mlps),
            pruned.layers_before - mlps.len(),
            pruned.layers_before
        ))?,
    }
    match pruned.deepstack {
        Some(Deepstack::Keep) => output.line("features between layers keep their place")?,
        Some(Deepstack::Shift) => output.line("features between layers move to the first layers that stay")?,
        None => {}
    }
    if let Some(own) = &pruned.compensation {
        output.line(format!(
            "made up for {} {}: loss {:.4} on {} samples, {:.4} without",
            if own.kind == CompensationKind::Linear { "by" } else { "behind" },
            layers_in_words(&own.layers),
            own.loss_after,
            own.samples,
            own.loss_before
        ))?;
        if let Some(speedup) = own.ideal_speedup.filter(|_| own.rank.is_some()) {
            let ideal = pruned.layers_before as f64 / pruned.layers_after as f64;
            output.line(format!(
                "adds {} parameters: the decoder is {speedup:.3} times as fast at best, {ideal:.3} without them",
                human_count(own.added_parameters)
            ))?;
        }
    }
    for tap in &pruned.taps {
        output.line(tap_line(tap, pruned))?;
    }
    let mut rows = vec![["component", "nodes", "now", "weights", "now"].map(String::from).to_vec()];
    for part in &pruned.components {
        rows.push(vec![
            part.file.clone(),
            part.nodes_before.to_string(),
            part.nodes_after.to_string(),
            human_bytes(part.weight_bytes_before),
            human_bytes(part.weight_bytes_after),
        ]);
    }
    output.line(table(&rows))?;
    for (what, files) in [("carried along as it is", &pruned.carried), ("left out", &pruned.left_out)] {
        if !files.is_empty() {
            output.line(format!("{what}: {}", list_preview(files, 8)))?;
        }
    }
    Ok(())
}

fn layers_in_words(layers: &[usize]) -> String {
    let list = layers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    match layers.len() {
        0 => "no layer".to_string(),
        1 => format!("layer {list}"),
        _ => format!("layers {list}"),
    }
}

/// Describes the change of an output that shows the residual stream.
fn tap_line(tap: &TapChange, pruned: &Pruned) -> String {
    let Some(now) = &tap.output_now else {
        return format!("output {} went with its layer", tap.output);
    };
    let places = |places: &[usize], layers: usize| {
        let place = |&place: &usize| match place == layers {
            true => "behind the last layer".to_string(),
            false => format!("before layer {place}"),
        };
        places.iter().map(place).collect::<Vec<_>>().join(" and ")
    };
    let (before, after) = (places(&tap.before, pruned.layers_before), places(&tap.before_now, pruned.layers_after));
    let name = if *now == tap.output { "keeps its name".to_string() } else { format!("is now {now}") };
    let moved =
        if before == after { String::new() } else { format!(": the stream {before}, which it shows, is now {after}") };
    format!("output {} {name}{moved}", tap.output)
}
