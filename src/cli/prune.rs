//! `interlace prune`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::base::{Device, human_bytes, list_preview, sha256_file};
use crate::bundle::{Deepstack, TapChange, Tower};
use crate::data::{Amount, Subset};
use crate::method::{FIT_TOKENS, Plan};
use crate::pipeline::steps::{self, Drop, Pruned};

use super::args::{LayerList, model, positive};
use super::context::{Context, Outcome};
use super::data_args::{DataArgs, warn_left_out};
use super::output::table;

/// Remove layers from the graph, its cache and its configs
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace prune model/ --plan plan.json -o pruned/\n  \
    interlace prune model/ --drop 2,5 -o pruned/\n  \
    interlace prune model/ --plan plan.json --compensate linear --data train.parquet -o pruned/")]
#[command(group(clap::ArgGroup::new("which").required(true).args(["plan", "drop"])))]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    /// Drop the layers of this plan, which `interlace plan` wrote for the model
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Drop the layers with these indices from 0, as in 2,5
    #[arg(long, value_name = "LAYERS")]
    drop: Option<LayerList>,
    /// Drop layers of this component
    #[arg(long, value_enum, default_value_t = Component::Decoder, conflicts_with = "plan")]
    component: Component,
    /// Choose what becomes of features that are added after the first layers (DeepStack): keep leaves them at their
    /// original layers, shift moves them to the first layers that remain, as Hugging Face's class does
    #[arg(long, value_enum, default_value_t = DeepstackRule::Keep)]
    deepstack: DeepstackRule,
    /// Make up for the dropped layers: linear fits a map of what the layer before each gap adds to the stream, by least squares
    /// towards the dense model's stream, and folds it into that layer's weights [default: nothing]
    #[arg(long, value_name = "HOW", value_enum, requires = "data", conflicts_with = "component")]
    compensate: Option<Compensate>,
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

#[derive(Clone, Copy, ValueEnum)]
enum Compensate {
    Linear,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeepstackRule {
    Keep,
    Shift,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let bundle = model(&args.model, context)?.open()?;
    let plan = args.plan.as_deref().map(Plan::read).transpose()?;
    let layers = args.drop.unwrap_or(LayerList(Vec::new())).0;
    let drop = match (&plan, &args.plan) {
        (Some(plan), Some(path)) => Drop::Plan { plan, digest: sha256_file(path)?, file: path },
        _ => {
            let tower = match args.component {
                Component::Decoder => Tower::Text,
                Component::VisionEncoder => Tower::Vision,
            };
            Drop::Layers { tower, layers: &layers }
        }
    };
    let deepstack = match args.deepstack {
        DeepstackRule::Keep => Deepstack::Keep,
        DeepstackRule::Shift => Deepstack::Shift,
    };
    let output = &context.output;
    let compensated = match (args.compensate, &args.data) {
        (Some(Compensate::Linear), Some(data)) => {
            let dropped = plan.as_ref().map_or(layers.as_slice(), |plan| plan.drop.as_slice());
            let subset = Subset { amount: Amount::Samples(args.samples), seed: args.seed };
            let read = (data.as_path(), &args.reading.options());
            let amounts = (subset, args.fit_tokens);
            Some(steps::compensate(&bundle, dropped, read, amounts, args.device, &context.cancel)?)
        }
        _ => None,
    };
    let pruned = steps::prune(&bundle, &drop, deepstack, compensated.as_ref(), &args.output)?;
    if let Some(compensated) = &compensated {
        warn_left_out(&compensated.left_out, output);
    }
    for variant in &pruned.set_aside {
        output.warn(format!("`{}` is set aside: {}", variant.file, variant.problem));
    }
    steps::variants_warning(&bundle, &pruned.set_aside).iter().for_each(|warning| output.warn(warning));
    if output.json {
        output.json(&pruned)?;
        return Ok(Outcome::Done);
    }
    let list = pruned.dropped.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    output.line(format!("dropped {list}: {} of {} layers stay", pruned.layers_after, pruned.layers_before))?;
    match pruned.deepstack {
        Some(Deepstack::Keep) => output.line("features between layers keep their place")?,
        Some(Deepstack::Shift) => output.line("features between layers move to the first layers that stay")?,
        None => {}
    }
    if let Some(own) = &pruned.compensation {
        output.line(format!(
            "made up for by {}: loss {:.4} on {} samples, {:.4} without",
            layers_in_words(&own.layers),
            own.loss_after,
            own.samples,
            own.loss_before
        ))?;
    }
    for tap in &pruned.taps {
        output.line(tap_line(tap, &pruned))?;
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
    Ok(Outcome::Done)
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
