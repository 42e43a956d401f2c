//! `interlace inspect`.

use std::path::PathBuf;

use owo_colors::OwoColorize;

use crate::base::{human_bytes, human_count};
use crate::bundle::Bundle;
use crate::pipeline::steps::{self, LayerInfo};

use super::output::table;
use super::{Context, Outcome};

/// Show components, layers, cache ports and what layers share
#[derive(clap::Args)]
#[command(after_help = "Example:\n  interlace inspect model/\n  interlace inspect decoder.onnx --json")]
pub struct Args {
    /// Model folder, or one .onnx decoder
    model: PathBuf,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let bundle = Bundle::open(&args.model)?;
    let found = steps::inspect(&bundle)?;
    let output = &context.output;
    if output.json {
        output.json(&found)?;
        return Ok(Outcome::Done);
    }
    output.line(format!(
        "{}: {} layout{}",
        args.model.display(),
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
    output.line("")?;
    output.line(format!("decoder: {} layers", found.num_layers).bold())?;
    output.line(layer_table(&found.layers))?;
    for glue in &found.between_layers {
        let place = glue.after.map_or("before layer 0".to_string(), |layer| format!("after layer {layer}"));
        let inputs = if glue.inputs.is_empty() { String::new() } else { format!(" from {}", glue.inputs.join(", ")) };
        output.line(format!("  {place}: {}{inputs}", glue.operators.join(", ")))?;
    }
    if let Some(vision) = &found.vision {
        output.line("")?;
        match &vision.problem {
            None => {
                output.line(format!("vision encoder: {} layers", vision.num_layers).bold())?;
                output.line(layer_table(&vision.layers))?;
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
