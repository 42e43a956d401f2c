//! `interlace export`.

use std::path::{Path, PathBuf};

use crate::base::{Error, ScratchDir, StagedDir, folder_of, human_bytes};
use crate::bundle::{Bundle, ModelSource, Variants};
use crate::checkpoint::checkpoint_on_disk;
use crate::data::Dataset;
use crate::export::triton::{Accelerator, InstanceKind, Serving, Versions};
use crate::export::{self, ExportSettings, ExportTarget, TARGETS, VocabularyReport, target_named};

use super::args::amount;
use super::context::{Context, Outcome};
use super::output::{Output, table};
use super::precision::{PrecisionArgs, print_precision};

/// Write the model in the layout of a server, a library or the hub
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  interlace export model/ --to triton -o model_repository/\n  \
                        interlace export model/ --precision int4,fp16 --to transformers-js -o folder/")]
#[command(group(clap::ArgGroup::new("action").required(true).multiple(true).args(["to", "precision", "vocabulary"])))]
pub struct Args {
    /// Model folder, one .onnx decoder, or hf:OWNER/NAME[@REVISION] on the hub
    model: PathBuf,
    /// Write this layout; see the list below
    #[arg(long, value_name = "TARGET", value_parser = target_named, long_help = targets_help())]
    to: Option<&'static ExportTarget>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Keep only the rows of the head whose tokens are in this corpus, in the forms that `score` reads, and those with which
    /// every text can be written; other tokens get logits of minus infinity [default: all rows]
    #[arg(long, value_name = "DATA")]
    vocabulary: Option<PathBuf>,
    /// Set the largest batch of models whose inputs and outputs share a free first axis; other models get 0 [default: 8]
    #[arg(long, value_name = "N")]
    max_batch_size: Option<u32>,
    /// Export this precision variant of each component, such as fp16 or q4, or one for each that is named, as in
    /// decoder=q4,vision_encoder=fp16; with --precision and --vocabulary that which they change, and of --dense too
    /// [default: the most precise one, of a folder for transformers-js and webgpu all]
    #[arg(long, value_name = "VARIANT")]
    variant: Option<Variants>,
    /// Lower the IR version of newer ONNX files to this, for servers that refuse newer ones [default: unchanged]
    #[arg(long, alias = "max-ir", value_name = "N")]
    max_ir_version: Option<i64>,
    /// Write operators of ONNX Runtime's own domain, such as MatMulNBits and GroupQueryAttention, as standard ones; an
    /// operator that has no such form is an error [default: unchanged]
    #[arg(long)]
    standard_ops: bool,
    /// Raise the default operator set to this version, up to 24; no graph is lowered [default: unchanged]
    #[arg(long, value_name = "N")]
    opset: Option<i64>,
    /// Split tables of embeddings and weights of products above this size, such as 1GB, for devices with a largest buffer;
    /// another initializer above it is an error. What the graphs compute is measured, and the longest prompt that fits is
    /// recorded [default: 1GB for webgpu, else unchanged]
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    max_buffer: Option<u64>,
    /// Name the weights as this Hugging Face checkpoint does, which the graphs were exported from (safetensors only)
    #[arg(long, value_name = "CHECKPOINT")]
    base: Option<PathBuf>,
    /// Model before it was trained, pruned or not; needed with --base for a trained model
    #[arg(long, value_name = "MODEL")]
    dense: Option<PathBuf>,
    /// Set the largest size of a file of weights, such as 100MB (transformers-js, webgpu, genai, openvino, safetensors)
    /// [default: 5GB for safetensors, 2GB for transformers-js and webgpu, else unlimited]
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    shard_size: Option<u64>,
    /// Put the scores of this report of `eval`, and its baseline's, into manifest.json; may be repeated
    #[arg(long, value_name = "FILE")]
    report: Vec<PathBuf>,
    /// Write the layout to this new folder
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    #[command(flatten)]
    triton: TritonArgs,
}

/// How Triton runs the models.
#[derive(clap::Args)]
#[command(next_help_heading = "Options of --to triton")]
struct TritonArgs {
    /// Let the server join requests of batched models, and wait up to this many microseconds for more [default: off]
    #[arg(long, value_name = "MICROSECONDS")]
    dynamic_batching: Option<u64>,
    /// Load this many copies of each model on each device [default: the server's choice]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    instances: Option<u32>,
    /// Run the models on these devices: cpu or gpu [default: the server's choice]
    #[arg(long, value_name = "KIND")]
    instance_kind: Option<InstanceKind>,
    /// Run the graphs with this accelerator of the ONNX Runtime back end: tensorrt or openvino [default: none]
    #[arg(long, value_name = "NAME")]
    accelerator: Option<Accelerator>,
    /// Load these versions of each model: latest:N, all, or a list such as 1,2; the export writes version 1 [default: the
    /// latest]
    #[arg(long, value_name = "VERSIONS")]
    versions: Option<Versions>,
    /// Run the components once on zeros while they are loaded, before they are ready [default: off]
    #[arg(long)]
    warm_up: bool,
}

impl From<TritonArgs> for Serving {
    fn from(args: TritonArgs) -> Self {
        Serving {
            batch_delay_us: args.dynamic_batching,
            instances: args.instances,
            instance_kind: args.instance_kind,
            accelerator: args.accelerator,
            versions: args.versions,
            warm_up: args.warm_up,
        }
    }
}

fn targets_help() -> String {
    let rows = TARGETS.iter().map(|row| format!("  {:<16}{} (tried with {})", row.name, row.summary, row.consumer));
    format!("The layout to write:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

/// Errors: `Error::Invalid` for a setting of targets, of which none is named.
fn refuse_settings(settings: &ExportSettings) -> anyhow::Result<()> {
    match settings.first_set() {
        Some(flag) => Err(Error::invalid(format!("`{flag}`"), "is read by targets, and none is named")
            .remedy("give `--to`, or leave it out")
            .into()),
        None => Ok(()),
    }
}

/// Errors: `Error::Invalid` for a smaller head in a target that writes the weights of a checkpoint.
fn refuse_vocabulary(args: &Args) -> anyhow::Result<()> {
    match args.to.filter(|target| args.vocabulary.is_some() && !target.writes_graphs()) {
        Some(target) => Err(Error::invalid("`--vocabulary`", format!("is not read by the target `{}`", target.name))
            .remedy("leave it out: a checkpoint has the whole head")
            .into()),
        None => Ok(()),
    }
}

fn write_vocabulary(bundle: &Bundle, corpus: &Dataset, folder: &Path, context: &Context) -> anyhow::Result<Outcome> {
    let report = export::write_vocabulary(bundle, corpus, &context.cancel, folder)?;
    match context.output.json {
        true => context.output.json(&report)?,
        false => print_vocabulary(&report, &context.output)?,
    }
    Ok(Outcome::Done)
}

/// The model with the smaller head, in a scratch folder beside the output.
fn scratch_with_vocabulary(
    bundle: &Bundle,
    corpus: &Dataset,
    output: &Path,
    scratch: &mut Option<ScratchDir>,
    context: &Context,
) -> anyhow::Result<Bundle> {
    // The folder is made for nothing but its errors, which would otherwise come late.
    drop(StagedDir::create(output)?);
    let name = bundle.name();
    let folder = scratch.insert(ScratchDir::create_in(folder_of(output))?).path();
    let folder = folder.join(name.rsplit('/').next().unwrap_or(&name));
    let report = export::write_vocabulary(bundle, corpus, &context.cancel, &folder)?;
    if !context.output.json {
        print_vocabulary(&report, &context.output)?;
    }
    Ok(Bundle::open(&folder)?)
}

fn print_vocabulary(report: &VocabularyReport, output: &Output) -> anyhow::Result<()> {
    let VocabularyReport { samples, in_corpus, essential, kept, of, files, .. } = report;
    output.line(format!(
        "head: {kept} of {of} tokens: {in_corpus} of {samples} samples, and {essential} with which every text can be written"
    ))?;
    for file in files {
        let (before, now) = (human_bytes(file.weight_bytes_before), human_bytes(file.weight_bytes));
        output.line(format!("{}: weights of {before} before, {now} now", file.file))?;
    }
    Ok(())
}

pub fn run(args: Args, context: &Context) -> anyhow::Result<Outcome> {
    args.precision.check()?;
    refuse_vocabulary(&args)?;
    let find = |model: &Path| ModelSource::find(model, args.variant.clone(), &context.cancel);
    let source = find(&args.model)?;
    let bundle = source.open()?;
    let output = &context.output;
    let base = args.base.map(|base| checkpoint_on_disk(&base, &context.cancel)).transpose()?;
    let dense = args.dense.as_deref().map(find).transpose()?;
    let settings = ExportSettings {
        max_batch_size: args.max_batch_size,
        // A precision is written of the chosen variant, and a head is cut of it.
        variant: source.chosen().filter(|_| args.precision.is_empty() && args.to.is_some()),
        max_ir_version: args.max_ir_version,
        standard_ops: args.standard_ops,
        opset: args.opset,
        max_buffer_bytes: args.max_buffer,
        serving: args.triton.into(),
        base,
        dense,
        reports: args.report,
        shard_bytes: args.shard_size,
    };
    let mut scratch = None;
    let bundle = match &args.vocabulary {
        None => bundle,
        Some(corpus) => {
            let corpus = Dataset::open_for(corpus, &bundle, &args.precision.reading())?;
            if args.to.is_none() && args.precision.is_empty() {
                refuse_settings(&settings)?;
                return write_vocabulary(&bundle, &corpus, &args.output, context);
            }
            scratch_with_vocabulary(&bundle, &corpus, &args.output, &mut scratch, context)?
        }
    };
    let export = match (args.to, args.precision.is_empty()) {
        (Some(target), true) => export::export(&bundle, target, &settings, &args.output, &context.cancel)?,
        (target, _) => {
            let data = args.precision.dataset(&bundle)?;
            let request = args.precision.request(data.as_ref(), &context.cancel);
            let Some(target) = target else {
                refuse_settings(&settings)?;
                let report = export::write_variants(&bundle, &request, &args.output, &context.cancel)?;
                match output.json {
                    true => output.json(&report)?,
                    false => print_precision(&report.components, report.sensitivity.as_ref(), output)?,
                }
                return Ok(Outcome::Done);
            };
            let export = export::export_variants(&bundle, &request, target, &settings, &args.output, &context.cancel)?;
            if !output.json {
                print_precision(&export.precision, export.sensitivity.as_ref(), output)?;
            }
            export
        }
    };
    if output.json {
        output.json(&export)?;
        return Ok(Outcome::Done);
    }
    if let Some(weights) = &export.weights {
        output.line(format!("{} tensors, {} of them with trained values", weights.tensors, weights.changed))?;
        export.notes.iter().for_each(|note| output.warn(note));
        return Ok(Outcome::Done);
    }
    let mut rows = vec![["model", "inputs", "outputs", "size"].map(String::from).to_vec()];
    for (name, model) in &export.models {
        rows.push(vec![
            name.clone(),
            model.inputs.to_string(),
            model.outputs.to_string(),
            human_bytes(model.size_bytes),
        ]);
    }
    output.line(table(&rows))?;
    export.notes.iter().for_each(|note| output.warn(note));
    Ok(Outcome::Done)
}
