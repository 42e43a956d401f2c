//! `interlace finetune`.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::ValueEnum;

use crate::base::{Device, human_bytes, human_count, sha256_file};
use crate::bundle::{ModelSource, Variants};
use crate::data::{Amount, Subset};
use crate::finetune::{
    DEFAULT_RECIPE, LearningRate, Limits, LoraLayers, MOST_BATCH_TOKENS, PlannedBytes, Precision, RECIPES, RecipeRow,
    Report, RunPlan, Settings, WriteTrained, interrupted_at, refuse_moved,
};
use crate::method::Plan;
use crate::pipeline::steps::{self, Finetune, Trained, default_work_folder};
use crate::runtime::FeatureCache;
use crate::torch::cpu_lacks_bf16;

use super::args::{TrainedLayers, VariantArgs, amount, amount_or_none, fraction, positive};
use super::context::{Context, Outcome};
use super::data_args::{DataArgs, warn_left_out};
use super::output;
use super::ranks::connect_peers;

/// Finetune the layers next to the dropped ones, or layers of a whole model
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  interlace finetune pruned/ --plan plan.json --data train.parquet \
    --teacher model/ -o healed/\n  interlace finetune pruned/ --plan plan.json --data train.parquet --recipe paper \
    --learning-rate 1e-3 -o healed/\n  interlace finetune model/ --layers all --data train.parquet --recipe paper \
    -o finetuned/\n\nCtrl-C leaves a checkpoint; the same command with --resume continues from it.")]
#[command(group(clap::ArgGroup::new("which").required(true).args(["plan", "layers"])))]
pub struct Args {
    /// Model folder, or hf:OWNER/NAME[@REVISION] on the hub: with --plan the one that `interlace prune --plan` wrote
    model: PathBuf,
    #[command(flatten)]
    variant: VariantArgs,
    /// Train the finetune layers of the plan by which the model was pruned
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Train these layers of the model as it is, which need not be pruned: `all`, or indices from 0 with commas, as in 2,5
    #[arg(long, value_name = "LAYERS")]
    layers: Option<TrainedLayers>,
    /// Read training data: conversations in Parquet or JSON (a file, a folder or a glob pattern), running text in .jsonl with
    /// a `text` in each line, or ready tensors (.safetensors, .npz)
    #[arg(long, value_name = "DATA")]
    data: PathBuf,
    #[command(flatten)]
    reading: DataArgs,
    /// Draw this fraction of the samples, above 0 and at most 1 [default: all samples]
    #[arg(long, value_name = "F", value_parser = fraction, conflicts_with = "samples")]
    fraction: Option<f64>,
    /// Draw this number of samples [default: all samples]
    #[arg(long, value_name = "N", value_parser = positive)]
    samples: Option<usize>,
    /// Seed the draw and the order of samples [default: the recipe's]
    #[arg(long)]
    seed: Option<u64>,
    /// Finetune by this recipe; see the list below
    #[arg(long, value_name = "NAME", default_value = DEFAULT_RECIPE, long_help = recipes_help())]
    recipe: String,
    /// Read settings from this TOML file; they override the recipe's, and the flags below override them
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Set the peak learning rate, in the optimiser's units; of several, separated by commas, take the one that reaches
    /// the lowest loss in a trial pass; `auto` tries the optimiser's usual rates in trials of at most 32 steps each and
    /// takes the one with the lowest loss on samples that were held back [default: the recipe's]
    #[arg(long, visible_alias = "lr", value_name = "LR")]
    learning_rate: Option<LearningRate>,
    /// Put this number of samples into one forward pass [default: the recipe's]
    #[arg(long, value_name = "N")]
    batch_size: Option<u32>,
    /// Run this number of forward passes per optimiser step [default: the recipe's]
    #[arg(long, value_name = "N")]
    accumulation_steps: Option<u32>,
    /// Pass this number of times over the samples [default: the recipe's]
    #[arg(long, value_name = "N")]
    epochs: Option<u32>,
    /// Stop after this number of optimiser steps [default: the end of the last epoch]
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Compute matrix products and activations in this number format; bf16 halves the activations' memory and is faster on GPUs
    /// of compute capability 8.0 and newer (others have no bf16 units: take f32 there) and on processors with bf16 instructions
    /// [default: bf16 on a GPU, f32 on a CPU]
    #[arg(long, value_enum)]
    precision: Option<PrecisionArg>,
    /// Train low-rank adapters of this rank in place of the layers' weights, and write the merged weights
    /// [default: train the weights]
    #[arg(long, value_name = "R")]
    lora_rank: Option<u32>,
    /// Put adapters beside the weights of these layers: those that the plan names, or all that are left, with the connector
    /// between vision encoder and decoder where it is a graph of its own [default: trained]
    #[arg(long, value_enum)]
    lora_layers: Option<LoraLayersArg>,
    /// Train the weight of the head too, as the authors' released code does where it is not tied to the embeddings
    #[arg(long)]
    train_head: bool,
    /// Write the trained weights of a quantised model as float products, or quantised again by the model's own bits,
    /// blocks and zero points, where changes below half a step are lost [default: float]
    #[arg(long, value_enum)]
    write_trained: Option<WriteTrainedArg>,
    /// Compute every layer again in the backward pass: less memory, more time [default: where the plan needs it]
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Use at most this many bytes of the training device's memory, as in 22GB: passes are made smaller until they fit
    /// [default: no limit on a CPU, the free memory of a GPU]
    #[arg(long, value_name = "BYTES", value_parser = amount)]
    memory: Option<u64>,
    /// Run at most this many tokens in one forward pass, padding included, longer samples aside; it changes results by
    /// rounding only [default: 640 on a CPU, a batch of the longest samples on a GPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_BATCH_TOKENS))]
    batch_tokens: Option<u64>,
    /// Keep at most this many bytes of the frozen layers' output and the dense model's targets on disk, as in 8GB; where
    /// they have no room, or are read only once, they are computed each time that they are needed [default: a fifth of
    /// the free disk, at most 32 GB; 0 keeps none]
    #[arg(long, value_name = "BYTES", value_parser = amount_or_none)]
    cache_bytes: Option<u64>,
    /// Print what the run trains, in which order, and the memory and disk that it takes; then stop
    #[arg(long)]
    dry_run: bool,
    #[arg(long, value_name = "MODEL", help = TEACHER_HELP)]
    teacher: Option<PathBuf>,
    /// Run this precision variant of the teacher, as --variant does of MODEL [default: the most precise ones]
    #[arg(long, value_name = "VARIANT", requires = "teacher")]
    teacher_variant: Option<Variants>,
    /// Compute on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Continue from the newest checkpoint in the work folder
    #[arg(long)]
    resume: bool,
    /// Keep checkpoints, metrics and the report in this folder [default: OUT.work]
    #[arg(long, value_name = "FOLDER")]
    work: Option<PathBuf>,
    /// Write the finetuned model to this new folder
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
}

fn recipes_help() -> String {
    let rows = RECIPES.iter().map(|row| format!("  {:<8}{}", row.name, row.summary));
    format!("How to heal:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

/// Help of `--teacher`. A test compares it with the tables of losses and recipes. It is not made from them, because the
/// functions in the table of losses would link LibTorch to the program that only prints help.
const TEACHER_HELP: &str =
    "Read the model before pruning, for the losses `kd`, `anchor` and `hidden` (the recipes fast and best)";

#[derive(Clone, Copy, ValueEnum)]
enum LoraLayersArg {
    Trained,
    All,
}

#[derive(Clone, Copy, ValueEnum)]
enum WriteTrainedArg {
    Float,
    Quantised,
}

#[derive(Clone, Copy, ValueEnum)]
enum PrecisionArg {
    F32,
    Bf16,
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    let settings = settings(&args)?;
    settings.check()?;
    let amount = match (args.samples, args.fraction) {
        (Some(count), _) => Amount::Samples(count),
        (_, Some(part)) => Amount::Fraction(part),
        _ => Amount::All,
    };
    if settings.precision == Some(Precision::Bf16) && args.device == Device::Cpu && cpu_lacks_bf16() {
        context
            .output
            .warn("this processor has no instructions for bf16: f32 is several times as fast and takes no more memory");
    }
    let mut device = args.device;
    let mut ranks = connect_peers(&mut device, context)?;
    if !args.dry_run {
        ranks = ranks.map(|ranks| ranks.for_device(device)).transpose()?;
    }
    let plan = args.plan.as_ref().map(|path| anyhow::Ok((Plan::read(path)?, sha256_file(path)?))).transpose()?;
    let trained = match (&plan, &args.layers) {
        (Some((plan, digest)), _) => Trained::Plan { plan, digest },
        (None, Some(TrainedLayers::These(layers))) => Trained::Layers(Some(&layers.0)),
        (None, _) => Trained::Layers(None),
    };
    let model = args.variant.source(&args.model, context)?;
    let teacher =
        args.teacher.map(|path| ModelSource::find(&path, args.teacher_variant, &context.cancel)).transpose()?;
    let request = Finetune {
        model: &model,
        trained,
        data: &args.data,
        options: &args.reading.options(),
        subset: Subset { amount, seed: settings.seed },
        settings: &settings,
        device,
        work: &args.work.unwrap_or_else(|| default_work_folder(&args.output)),
        resume: args.resume,
        limits: Limits {
            memory: args.memory,
            batch_tokens: args.batch_tokens,
            cache: args.cache_bytes,
            ..Limits::default()
        }
        .with_environment()?,
        ranks: ranks.as_ref(),
        features: &FeatureCache::new(256 << 20),
        teacher: teacher.as_ref(),
    };
    let bundle = model.open()?;
    steps::warnings(&bundle, &args.data).iter().for_each(|warning| context.output.warn(warning));
    if args.dry_run {
        let plan = steps::plan_finetune(&request, &context.cancel)?;
        return dry_run(&plan, context);
    }
    if request.resume && ranks.as_ref().is_none_or(|ranks| ranks.rank() == 0) && interrupted_at(request.work)?.is_none()
    {
        context.output.note(format!("no checkpoint in `{}`; starting at step 1", request.work.display()));
    }
    let report = steps::finetune(&request, &args.output, &context.cancel, &mut |_| ())?;
    if ranks.as_ref().is_some_and(|ranks| ranks.rank() > 0) {
        return Ok(Outcome::Done);
    }
    let output = &context.output;
    warn_left_out(&report.left_out, output);
    if output.json {
        output.json(&report)?;
        return Ok(Outcome::Done);
    }
    let metrics = fs::read_to_string(request.work.join(&report.metrics_file)).unwrap_or_default();
    // A run that ends with the fit takes no step.
    let losses = loss_line(&losses(&metrics)).filter(|_| report.first_loss.is_some());
    print_report(&report, losses, settings.precision_on(device), output)
}

/// The loss of each step, from the lines of the metrics.
fn losses(metrics: &str) -> Vec<f64> {
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?.get("loss")?.as_f64();
    metrics.lines().filter_map(loss).collect()
}

/// Describes the losses of a run by means over many steps: those of single steps vary too much to be compared.
fn loss_line(losses: &[f64]) -> Option<String> {
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let quarter = losses.len().div_ceil(4);
    match losses {
        [] => None,
        [loss] => Some(format!("1 step, loss {loss:.4}")),
        _ => Some(format!(
            "mean loss of the first quarter of the steps {:.4}, of the last quarter {:.4}",
            mean(&losses[..quarter]),
            mean(&losses[losses.len() - quarter..])
        )),
    }
}

/// Prints the report of a run.
fn print_report(
    report: &Report,
    losses: Option<String>,
    precision: Precision,
    output: &output::Output,
) -> anyhow::Result<Outcome> {
    output.line(format!(
        "{} steps on {} samples, {} trained parameters in layers {:?}{}",
        report.steps,
        report.samples,
        human_count(report.trained_parameters),
        report.layers,
        report.connector.as_ref().map_or(String::new(), |file| format!(" and the connector `{file}`"))
    ))?;
    for trial in &report.trials {
        let taken = if trial.learning_rate == report.learning_rate { ", taken" } else { "" };
        let found = match (&trial.loss, &trial.diverged) {
            (Some(loss), _) => format!("loss {loss:.4}{taken}"),
            (None, problem) => format!("diverged: {}", problem.as_deref().unwrap_or_default()),
        };
        output.line(format!("learning rate {:e}: {found}", trial.learning_rate))?;
    }
    for fit in &report.fitted {
        let text = match (&fit.problem, fit.distance_before, fit.distance_after) {
            (None, Some(before), Some(after)) => {
                format!("fitted, distance to the dense stream {before:.4} -> {after:.4}")
            }
            (problem, ..) => format!("not fitted, {}", problem.as_deref().unwrap_or_default()),
        };
        output.line(format!("layer {}: {text}", fit.layer))?;
    }
    if let Some(losses) = losses {
        output.line(losses)?;
    }
    output.line(format!(
        "{:.1} s, {:.0} tokens/s in {}, peak memory {}",
        report.train_s,
        report.tokens_per_s,
        precision.name(),
        human_bytes(report.peak_memory_bytes)
    ))?;
    Ok(Outcome::Done)
}

/// Prints a plan. Exit code 1 if the run exceeds its memory limit.
fn dry_run(plan: &RunPlan, context: &Context) -> anyhow::Result<Outcome> {
    let output = &context.output;
    let done = if plan.fits == Some(false) { Outcome::GateFailed } else { Outcome::Done };
    if output.json {
        output.json(plan)?;
        return Ok(done);
    }
    output.line(plan.line())?;
    if let Some(connector) = &plan.connector {
        output.line(connector.line())?;
    }
    let head = ["what", "when", "where", "bytes", "from"].map(str::to_string);
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
    let row = |item: &PlannedBytes| -> anyhow::Result<Vec<String>> {
        let (phase, place) = (serde_json::to_value(item.phase)?, serde_json::to_value(item.place)?);
        Ok(vec![item.what.clone(), word(&phase), word(&place), human_bytes(item.bytes), item.formula.clone()])
    };
    let mut rows = vec![head.to_vec()];
    for item in &plan.bytes {
        rows.push(row(item)?);
    }
    output.line(output::table(&rows))?;
    let data = &plan.data;
    output.line(format!(
        "{} samples of {} tokens{}, longest {}",
        data.samples,
        data.tokens.checked_div(data.samples).unwrap_or(0),
        if data.estimated { " (estimated)" } else { "" },
        data.longest_tokens
    ))?;
    for target in &plan.targets {
        let kept = if target.written { "written" } else { "made when it is read" };
        output.line(format!("{}: {} tokens for {}, {kept}", target.what, target.tokens, target.read_by.join(", ")))?;
    }
    Ok(done)
}

/// The settings: those of the recipe, overridden by the file of settings, overridden by the flags.
fn settings(args: &Args) -> anyhow::Result<Settings> {
    let table = match &args.settings {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
            let wrong = || format!("`{}` is not a file of finetune settings", path.display());
            let table: toml::Table = toml::from_str(&text).with_context(wrong)?;
            refuse_moved(&table).with_context(wrong)?;
            // Read as settings too, for a message that shows the line.
            let _: Settings = toml::from_str(&text).with_context(wrong)?;
            Some(table)
        }
        None => None,
    };
    let mut settings = RecipeRow::named(&args.recipe)?.settings_with(table)?;
    let set = |slot: &mut u32, value: Option<u32>| *slot = value.unwrap_or(*slot);
    set(&mut settings.batch.size, args.batch_size);
    set(&mut settings.batch.accumulation_steps, args.accumulation_steps);
    set(&mut settings.schedule.epochs, args.epochs);
    set(&mut settings.lora.rank, args.lora_rank);
    if let Some(rate) = &args.learning_rate {
        settings.optimizer.learning_rate = rate.clone();
    }
    settings.lora.layers = match args.lora_layers {
        Some(LoraLayersArg::Trained) => LoraLayers::Trained,
        Some(LoraLayersArg::All) => LoraLayers::All,
        None => settings.lora.layers,
    };
    settings.train_head |= args.train_head;
    settings.write_trained = match args.write_trained {
        Some(WriteTrainedArg::Float) => WriteTrained::Float,
        Some(WriteTrainedArg::Quantised) => WriteTrained::Quantised,
        None => settings.write_trained,
    };
    if args.gradient_checkpointing {
        settings.batch.gradient_checkpointing = Some(true);
    }
    settings.seed = args.seed.unwrap_or(settings.seed);
    settings.schedule.max_steps = args.max_steps.or(settings.schedule.max_steps);
    settings.precision = match args.precision {
        Some(PrecisionArg::F32) => Some(Precision::F32),
        Some(PrecisionArg::Bf16) => Some(Precision::Bf16),
        None => settings.precision,
    };
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::LOSSES;

    fn teacher_help() -> String {
        let list = |names: &[String]| match names.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, others)) => format!("{} and {last}", others.join(", ")),
            None => String::new(),
        };
        let losses = LOSSES.iter().filter(|row| row.kind.needs_teacher()).map(|row| format!("`{}`", row.name));
        let recipes = RECIPES.iter().filter(|row| row.needs_teacher()).map(|row| row.name.to_string());
        let (losses, recipes) = (losses.collect::<Vec<_>>(), recipes.collect::<Vec<_>>());
        format!("Read the model before pruning, for the losses {} (the recipes {})", list(&losses), list(&recipes))
    }

    #[test]
    fn losses_are_compared_by_means_over_a_quarter_of_the_steps() {
        assert_eq!(loss_line(&[]), None);
        assert_eq!(loss_line(&[2.0]).unwrap(), "1 step, loss 2.0000");
        let two = "mean loss of the first quarter of the steps 2.0000, of the last quarter 1.0000";
        assert_eq!(loss_line(&[2.0, 1.0]).unwrap(), two);
        let eight = "mean loss of the first quarter of the steps 5.0000, of the last quarter 2.0000";
        assert_eq!(loss_line(&[6.0, 4.0, 9.0, 0.0, 9.0, 0.0, 1.0, 3.0]).unwrap(), eight);
        assert_eq!(losses("{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":1.5}\n"), [2.5, 1.5]);
    }

    #[test]
    fn the_teacher_help_lists_the_losses_that_need_the_dense_model() {
        assert_eq!(TEACHER_HELP, teacher_help());
    }
}
