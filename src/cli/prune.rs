//! `interlace prune`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::base::{human_bytes, list_preview, sha256_file};
use crate::bundle::{Bundle, Deepstack, TapChange, Tower};
use crate::method::Plan;
use crate::pipeline::steps::{self, Drop, Pruned};

use super::args::LayerList;
use super::context::{Context, Outcome};
use super::output::table;

/// Remove layers from the graph, its cache and its configs
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace prune model/ --plan plan.json -o pruned/\n  \
    interlace prune model/ --drop 2,5 -o pruned/")]
#[command(group(clap::ArgGroup::new("which").required(true).args(["plan", "drop"])))]
pub struct Args {
    /// Model folder, or one .onnx decoder
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
enum DeepstackRule {
    Keep,
    Shift,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let bundle = Bundle::open(&args.model)?;
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
    let pruned = steps::prune(&bundle, &drop, deepstack, &args.output)?;
    let output = &context.output;
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
