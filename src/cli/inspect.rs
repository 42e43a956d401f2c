//! `interlace inspect`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use owo_colors::OwoColorize;

use crate::base::{human_bytes, human_count};
use crate::bundle::SINGLE_FILE;
use crate::pipeline::steps::{self, LayerInfo, TapInfo};

use super::args::VariantArgs;
use super::context::{Context, Outcome};
use super::output::table;

/// Show components, layers, cache ports and shared weights
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace inspect model/\n  interlace inspect decoder.onnx --json")]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let model = args.variant.source(&args.model, context)?;
    let bundle = model.open()?;
    let found = steps::inspect(&bundle)?;
    let output = &context.output;
    found.warnings.iter().for_each(|warning| output.warn(warning));
    for variant in &found.set_aside {
        output.warn(format!("`{}` is set aside: {}", variant.file, variant.problem));
    }
    if output.json {
        output.json(&found)?;
        return Ok(Outcome::Done);
    }
    output.line(format!(
        "{}: {} layout{}",
        model,
        found.layout,
        found.model_type.as_deref().map(|name| format!(", {name}")).unwrap_or_default()
    ))?;
    let head = ["component", "variant", "parameters", "size", "nodes", "opset", "file"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for part in &found.components {
        rows.push(vec![
            part.role.name().to_string(),
            if part.variant.is_empty() { "-".to_string() } else { part.variant.clone() },
            human_count(part.parameters),
            human_bytes(part.size_bytes),
            part.nodes.to_string(),
            part.opsets.get("ai.onnx").map(ToString::to_string).unwrap_or_default(),
            part.file.clone(),
        ]);
    }
    output.line(table(&rows))?;
    // A single graph is not what these verbs are for.
    for verdict in found.verdicts.iter().filter(|_| found.layout != SINGLE_FILE.name) {
        let reason = verdict.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        output.line(format!("{}: {}{reason}", verdict.verb, if verdict.works { "yes" } else { "no" }))?;
    }
    output.line("")?;
    output.line(format!("decoder: {} layers", found.num_layers).bold())?;
    output.line(layer_table(&found.layers))?;
    for line in details(&found.layers) {
        output.line(line)?;
    }
    for glue in &found.between_layers {
        let place = glue.after.map_or("before layer 0".to_string(), |layer| format!("after layer {layer}"));
        let inputs = if glue.inputs.is_empty() { String::new() } else { format!(" from {}", glue.inputs.join(", ")) };
        output.line(format!("  {place}: {}{inputs}", glue.operators.join(", ")))?;
    }
    for line in tap_lines(&found.taps, found.num_layers) {
        output.line(line)?;
    }
    if let (false, Some(result)) = (found.taps.is_empty(), &found.result) {
        output.line(format!("  output {result} is what the layers lead to"))?;
    }
    if let Some(vision) = &found.vision {
        output.line("")?;
        match &vision.problem {
            None => {
                output.line(format!("vision encoder: {} layers", vision.num_layers).bold())?;
                output.line(layer_table(&vision.layers))?;
                for line in details(&vision.layers).into_iter().chain(tap_lines(&vision.taps, vision.num_layers)) {
                    output.line(line)?;
                }
            }
            Some(problem) => output.line(format!("vision encoder: no layers found: {problem}"))?,
        }
    }
    Ok(Outcome::Done)
}

fn layer_table(layers: &[LayerInfo]) -> String {
    let head = ["layer", "was", "kind", "class", "parameters", "ports", "shared", "input", "output"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for layer in layers {
        rows.push(vec![
            layer.index.to_string(),
            layer.original_index.to_string(),
            layer.kind.clone(),
            layer.class.to_string(),
            human_count(layer.parameters),
            layer.kv_ports.len().to_string(),
            (layer.shared_values.len() + layer.shared_weights.len()).to_string(),
            layer.input.clone(),
            layer.output.clone(),
        ]);
    }
    table(&rows)
}

/// Cache ports by role, shared weights and values, and layers that cannot be dropped, one line each.
fn details(layers: &[LayerInfo]) -> Vec<String> {
    let mut ports: Vec<(String, Vec<usize>)> = Vec::new();
    let mut shared: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for layer in layers {
        for port in &layer.kv_ports {
            let side =
                |name: &Option<String>| name.as_deref().map_or("none".into(), |name| numbered(name, layer.index));
            let text = format!("{}: {} -> {}", port.role, side(&port.past), side(&port.present));
            match ports.iter_mut().find(|(known, _)| *known == text) {
                Some((_, indices)) => indices.push(layer.index),
                None => ports.push((text, vec![layer.index])),
            }
        }
        for name in layer.shared_values.iter().chain(&layer.shared_weights) {
            shared.entry(name).or_default().push(layer.index);
        }
    }
    let mut groups: BTreeMap<Vec<usize>, Vec<&str>> = BTreeMap::new();
    for (name, readers) in shared {
        groups.entry(readers).or_default().push(name);
    }
    const SHOWN: usize = 4;
    let refusals = layers.iter().filter_map(|layer| {
        let reason = layer.refusal.as_ref()?;
        Some(format!("  layer {} cannot be dropped by itself: {reason}", layer.index))
    });
    let ports = ports.into_iter().map(|(text, indices)| format!("  {}: {text}", ranges(&indices)));
    let shared = groups.into_iter().map(|(indices, names)| {
        let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
        let names: Vec<&str> = names.into_iter().take(SHOWN).collect();
        let verb = if indices.len() == 1 { "reads" } else { "read" };
        format!("  {} {verb} from outside: {}{more}", ranges(&indices), names.join(", "))
    });
    ports.chain(shared).chain(refusals).collect()
}

/// Places at which each tap reads the stream.
fn tap_lines(taps: &[TapInfo], layers: usize) -> Vec<String> {
    let line = |tap: &TapInfo| {
        let mut places: Vec<String> = Vec::new();
        let before: Vec<usize> = tap.before.iter().copied().filter(|&layer| layer < layers).collect();
        if !before.is_empty() {
            places.push(format!("the stream before {}", ranges(&before)));
        }
        if tap.before.contains(&layers) {
            places.push("the stream behind the last layer".into());
        }
        if !tap.inside.is_empty() {
            places.push(format!("the inside of {}", ranges(&tap.inside)));
        }
        format!("  output {} taps {}", tap.output, places.join(" and "))
    };
    taps.iter().map(line).collect()
}

/// A port's name with the layer's number replaced by `N`, if exactly one part of the name is that number.
fn numbered(name: &str, layer: usize) -> String {
    let digits = layer.to_string();
    let parts: Vec<&str> = name.split('.').collect();
    if parts.iter().filter(|part| **part == digits).count() != 1 {
        return name.to_string();
    }
    parts.into_iter().map(|part| if part == digits { "N" } else { part }).collect::<Vec<_>>().join(".")
}

/// `layers 0-2, 5` for 0, 1, 2, 5.
fn ranges(indices: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &index in indices {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == index => *end = index,
            _ => runs.push((index, index)),
        }
    }
    let text = |(start, end): (usize, usize)| if start == end { start.to_string() } else { format!("{start}-{end}") };
    let word = if indices.len() == 1 { "layer" } else { "layers" };
    format!("{word} {}", runs.into_iter().map(text).collect::<Vec<_>>().join(", "))
}
