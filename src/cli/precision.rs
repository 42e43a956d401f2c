//! `export --precision`.

use std::path::PathBuf;

use crate::base::{Cancel, Device, Error, Result, human_bytes};
use crate::bundle::Bundle;
use crate::data::{Amount, DataOptions, Dataset, Subset};
use crate::export::{
    BudgetRequest, PRECISIONS, PrecisionRequest, PrecisionRow, PrecisionSettings, QuantisedComponent, RangeCalibration,
    Sensitivity, precision_named,
};

use super::args::{amount, count, positive};
use super::data_args::DataArgs;
use super::output::{Output, table};

/// Flags of quantising a model.
#[derive(clap::Args)]
pub struct PrecisionArgs {
    /// Write the model in these precisions beside its floats, or for the target; see the list below
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = precision_named, long_help = precisions_help())]
    precision: Vec<&'static PrecisionRow>,
    /// Give this number of weights of int4 and q4f16 one scale: a power of two from 16 to 256 [default: 32]
    #[arg(long, value_name = "N", requires = "precision")]
    block_size: Option<usize>,
    /// Give every block of int4 and q4f16 a zero point of its own [default: symmetric blocks]
    #[arg(long, requires = "precision")]
    zero_points: bool,
    /// Take the scale of a block of int4 and q4f16 from its range (nearest), or search the one with the least squared error
    /// (search) [default: search]
    #[arg(long, value_name = "HOW", value_parser = ["nearest", "search"], requires = "precision")]
    rounding: Option<String>,
    /// Measure what int4 and 8-bit weights cost in each layer and component, on the answers of --data [default: off]
    #[arg(long, requires = "data")]
    sensitivity: bool,
    /// Give parts of int4 8 bits or floats, where they lower the divergence most for each byte, while its files stay within this
    /// size, such as 500MB [default: 4 bits everywhere]
    #[arg(long, value_name = "SIZE", value_parser = amount, requires = "data")]
    target_size: Option<u64>,
    /// The same until the KL divergence from the float model, in nats and as the mean over answer tokens, is at most this
    #[arg(long, value_name = "NATS", requires = "data")]
    max_kl: Option<f64>,
    /// Calibrate on this data, in the forms that `score` reads: the ranges of activations for int8-qdq, and the sensitivity
    #[arg(long, value_name = "DATA", requires = "precision")]
    data: Option<PathBuf>,
    /// Draw this number of samples from the data
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive, requires = "data")]
    samples: usize,
    /// Seed the draw of samples
    #[arg(long, default_value_t = 42, requires = "data")]
    seed: u64,
    /// Leave out samples that are longer than this number of tokens
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = count, requires = "data")]
    max_tokens: usize,
    #[command(flatten)]
    reading: DataArgs,
    /// Measure on this device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", requires = "data")]
    device: Device,
}

fn precisions_help() -> String {
    let rows = PRECISIONS.iter().map(|row| format!("  {:<10}{} (`--variant {}`)", row.name, row.summary, row.suffix));
    format!("The precisions to write, separated by commas:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

impl PrecisionArgs {
    /// True when no precision is named.
    pub fn is_empty(&self) -> bool {
        self.precision.is_empty()
    }

    /// How data are read.
    pub fn reading(&self) -> DataOptions {
        self.reading.options()
    }

    /// The calibration data, if there are any.
    ///
    /// Errors: as `Dataset::open_for`.
    pub fn dataset(&self, bundle: &Bundle) -> Result<Option<Dataset>> {
        self.data.as_ref().map(|path| Dataset::open_for(path, bundle, &self.reading.options())).transpose()
    }

    fn is_measured(&self) -> bool {
        self.sensitivity || self.target_size.is_some() || self.max_kl.is_some()
    }

    /// Errors: `Error::Invalid` for a flag that none of the precisions reads.
    pub fn check(&self) -> Result<()> {
        let in_blocks = [
            ("--block-size", self.block_size.is_some()),
            ("--zero-points", self.zero_points),
            ("--rounding", self.rounding.is_some()),
        ];
        let names = |wanted: fn(&PrecisionRow) -> bool| {
            let rows = PRECISIONS.iter().filter(|row| wanted(row));
            rows.map(|row| row.name).collect::<Vec<_>>().join(", ")
        };
        let unread = |flag: &str, readers: String, remedy: &str| {
            let own: Vec<&str> = self.precision.iter().map(|row| row.name).collect();
            let problem = format!("is read by {readers} alone, and `--precision` is {}", own.join(","));
            Err(Error::invalid(format!("`{flag}`"), problem).remedy(remedy))
        };
        if let Some((flag, _)) = in_blocks.iter().find(|(_, is_set)| *is_set)
            && !self.precision.iter().any(|row| row.in_blocks)
        {
            return unread(flag, names(|row| row.in_blocks), "leave it out, or name int4");
        }
        if self.data.is_some() && !self.is_measured() && !self.precision.iter().any(|row| row.calibrated) {
            let readers = format!("{}, `--sensitivity`, `--target-size` and `--max-kl`", names(|row| row.calibrated));
            return unread("--data", readers, "leave it out, or give one of these");
        }
        Ok(())
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
            block_size: self.block_size.unwrap_or(PrecisionSettings::default().block_size),
            zero_points: self.zero_points,
            least_error: self.rounding.as_deref() != Some("nearest"),
        };
        let (target_bytes, max_kl) = (self.target_size, self.max_kl);
        let budget = self.is_measured().then_some(BudgetRequest { target_bytes, max_kl });
        PrecisionRequest { precisions: &self.precision, settings, calibration, budget }
    }
}

/// Prints the size and the error of each file, and what its parts cost where that was measured.
pub fn print_precision(
    components: &[QuantisedComponent],
    sensitivity: Option<&Sensitivity>,
    output: &Output,
) -> anyhow::Result<()> {
    print_components(components, output)?;
    sensitivity.map_or(Ok(()), |sensitivity| print_sensitivity(sensitivity, output))
}

fn print_sensitivity(found: &Sensitivity, output: &Output) -> anyhow::Result<()> {
    let heads = ["component", "part", "float32", "int8", "KL of int8", "int4", "KL of int4", "written as"];
    let mut rows = vec![heads.map(String::from).to_vec()];
    for part in &found.parts {
        rows.push(vec![
            part.role.name().to_string(),
            part.part.clone(),
            human_bytes(part.float_bytes),
            human_bytes(part.int8_bytes),
            format!("{:.1e}", part.int8_kl),
            human_bytes(part.int4_bytes),
            format!("{:.1e}", part.int4_kl),
            part.form.name().to_string(),
        ]);
    }
    output.line(table(&rows))?;
    output.line(format!(
        "KL: nats from the float model, mean over {} answer tokens of {} samples; {} prefills",
        found.answer_tokens, found.samples, found.prefills
    ))?;
    if let Some(budget) = &found.budget {
        let limits = [
            budget.target_bytes.map(|most| format!("size at most {}", human_bytes(most))),
            budget.max_kl.map(|most| format!("KL at most {most}")),
        ];
        output.line(format!(
            "{}: met with {} and KL {:.2e} (int4 everywhere: KL {:.2e}; sum of the parts: {:.2e})",
            limits.into_iter().flatten().collect::<Vec<_>>().join(", "),
            human_bytes(budget.size_bytes),
            budget.kl,
            budget.int4_kl,
            budget.sum_of_parts
        ))?;
    }
    Ok(())
}

/// Prints the size and the error of each file, and what stayed in floats.
fn print_components(components: &[QuantisedComponent], output: &Output) -> anyhow::Result<()> {
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
