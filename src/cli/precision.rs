//! `export --precision`.

use std::path::PathBuf;

use serde::Serialize;

use crate::base::{Cancel, Device, Result, human_bytes};
use crate::bundle::Bundle;
use crate::data::{Amount, Dataset, Subset};
use crate::export::{
    PRECISIONS, PrecisionRequest, PrecisionRow, PrecisionSettings, QuantisedComponent, RangeCalibration,
    precision_named,
};

use super::args::positive;
use super::context::{Context, Outcome};
use super::data_args::DataArgs;
use super::output::{Output, table};

/// Flags of quantising a model.
#[derive(clap::Args)]
pub struct PrecisionArgs {
    /// Write the model in these precisions beside its floats, or for the target; see the list below
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = precision_named, long_help = precisions_help())]
    precision: Vec<&'static PrecisionRow>,
    /// Give this number of 4-bit weights one scale: a power of two from 16 to 256
    #[arg(long, value_name = "N", default_value_t = 32, requires = "precision")]
    block_size: usize,
    /// Give every block of 4-bit weights a zero point of its own [default: symmetric blocks]
    #[arg(long, requires = "precision")]
    zero_points: bool,
    /// Take the scale of 4-bit weights from the block's range (nearest), or search the one with the least squared error (search)
    #[arg(long, value_name = "HOW", default_value = "search", value_parser = ["nearest", "search"], requires = "precision")]
    rounding: String,
    /// Measure the ranges of activations for int8-qdq on this data, in the forms that `score` reads
    #[arg(long, value_name = "DATA", requires = "precision")]
    data: Option<PathBuf>,
    /// Draw this number of samples from the data
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive, requires = "data")]
    samples: usize,
    /// Seed the draw of samples
    #[arg(long, default_value_t = 42, requires = "data")]
    seed: u64,
    /// Leave out samples that are longer than this number of tokens
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = positive, requires = "data")]
    max_tokens: usize,
    #[command(flatten)]
    reading: DataArgs,
    /// Measure on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: Device,
}

fn precisions_help() -> String {
    let rows = PRECISIONS.iter().map(|row| format!("  {:<10}{} (suffix _{})", row.name, row.summary, row.suffix));
    format!("The precisions to write, separated by commas:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

impl PrecisionArgs {
    /// True when no precision is named.
    pub fn is_empty(&self) -> bool {
        self.precision.is_empty()
    }

    /// The calibration data, if there are any.
    ///
    /// Errors: as `Dataset::open_for`.
    pub fn dataset(&self, bundle: &Bundle) -> Result<Option<Dataset>> {
        self.data.as_ref().map(|path| Dataset::open_for(path, bundle, &self.reading.options())).transpose()
    }

    /// What the flags ask for.
    pub fn request<'a>(&'a self, data: Option<&'a Dataset>, cancel: &'a Cancel) -> PrecisionRequest<'a> {
        let calibration = data.map(|dataset| RangeCalibration {
            dataset,
            subset: Subset { amount: Amount::Samples(self.samples.min(dataset.len())), seed: self.seed },
            max_tokens: self.max_tokens,
            device: self.device,
            cancel,
        });
        let settings = PrecisionSettings {
            block_size: self.block_size,
            zero_points: self.zero_points,
            least_error: self.rounding == "search",
        };
        PrecisionRequest { precisions: &self.precision, settings, calibration }
    }
}

/// Prints a report, as JSON where that is asked for.
pub fn report_precision(
    components: &[QuantisedComponent],
    report: &impl Serialize,
    context: &Context,
) -> anyhow::Result<Outcome> {
    match context.output.json {
        true => context.output.json(report)?,
        false => print_components(components, &context.output)?,
    }
    Ok(Outcome::Done)
}

/// Prints the size and the error of each file, and what stayed in floats.
pub fn print_components(components: &[QuantisedComponent], output: &Output) -> anyhow::Result<()> {
    let heads = ["precision", "file", "size before", "size after", "tensors", "mean error", "largest error"];
    let mut rows = vec![heads.map(String::from).to_vec()];
    for part in components {
        let errors: Vec<f64> = part.quantised.iter().map(|tensor| tensor.relative_error).collect();
        let percent = |error: f64| format!("{:.2} %", 100.0 * error);
        rows.push(vec![
            part.precision.clone(),
            part.file.clone(),
            human_bytes(part.bytes_before),
            human_bytes(part.bytes_after),
            errors.len().to_string(),
            percent(errors.iter().sum::<f64>() / errors.len().max(1) as f64),
            percent(errors.iter().copied().fold(0.0, f64::max)),
        ]);
    }
    output.line(table(&rows))?;
    for part in components {
        for tensor in &part.kept {
            output
                .line(format!("{}: `{}` {:?} stays float32: {}", part.file, tensor.name, tensor.dims, tensor.reason))?;
        }
        for row in &part.kept_operators {
            output.line(format!("{}: {} {} stay float32: {}", part.file, row.nodes, row.operator, row.reason))?;
        }
        if part.clamped_numbers > 0 {
            let clamped = part.clamped_numbers;
            output.line(format!(
                "{}: {clamped} numbers beyond the range of float16 became its largest ones",
                part.file
            ))?;
        }
    }
    Ok(())
}
