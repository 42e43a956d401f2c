//! Other precisions and layouts of a run's models.

use crate::base::{Error, Result};
use crate::bundle::{Bundle, ModelSource};
use crate::checkpoint::{Checkpoint, checkpoint_on_disk};
use crate::data::{Amount, Dataset, Subset};
use crate::export::{PrecisionRequest, PrecisionRow, RangeCalibration, export, write_variants};

use super::export_section::ExportSection;
use super::recipe::Calibration;
use super::stages::Stages;
use super::store::Finished;

/// Samples on which ranges of activations are measured, and their longest length in tokens: the defaults of `export`.
const RANGE_SAMPLES: usize = 32;
const RANGE_TOKENS: usize = 8192;

/// A model with its precisions.
pub struct Quantised {
    /// The folder with all of them.
    pub made: Finished,
    /// Each precision, and the model in it.
    pub models: Vec<(&'static PrecisionRow, ModelSource)>,
}

impl Quantised {
    /// Suffix of the files of the only precision, where there is one.
    fn only_suffix(&self) -> Option<String> {
        match self.models.as_slice() {
            [(_, source)] => source.chosen(),
            _ => None,
        }
    }
}

impl Stages<'_> {
    /// A model in the precisions of the section, as step `precision-LABEL`; `None` where there are none.
    ///
    /// Errors: as `write_variants`.
    pub fn quantise(
        &mut self,
        label: &str,
        (model, digest): (&ModelSource, &str),
        (section, calibration): (&ExportSection, &Calibration),
    ) -> Result<Option<Quantised>> {
        let precisions = section.precisions()?;
        if precisions.is_empty() {
            return Ok(None);
        }
        let options = calibration.data_options(self.part);
        let budget = section.budget();
        let calibrated = budget.is_some() || precisions.iter().any(|row| row.calibrated);
        let dataset = calibrated.then(|| Dataset::open_for(&calibration.data, &self.bundle, &options)).transpose()?;
        let data_digest = dataset.as_ref().map(Dataset::digest).transpose()?;
        let mut inputs = vec![("model", digest)];
        inputs.extend(data_digest.iter().map(|digest| ("data", digest.as_str())));
        let (device, cancel) = (self.device, self.cancel);
        let ranges = dataset.as_ref().map(|dataset| RangeCalibration {
            dataset,
            subset: Subset { amount: Amount::Samples(RANGE_SAMPLES.min(dataset.len())), seed: calibration.seed },
            max_tokens: RANGE_TOKENS,
            device,
            cancel,
        });
        let request =
            PrecisionRequest { precisions: &precisions, settings: section.blocks, calibration: ranges, budget };
        let step = format!("precision-{label}");
        let key = (&section.precision, section.blocks, section.max_kl, calibrated.then_some(calibration.seed));
        let made = self.store.step(&step, &step, &inputs, &key, |path| {
            write_variants(&model.open()?, &request, path, cancel).map(|_| ())
        })?;
        self.report_step(&step, &made);
        let has_suffix = Bundle::open(&made.path)?.layout().names_variants();
        let source = |row: &'static PrecisionRow| {
            let suffix = has_suffix.then(|| row.suffix.parse()).transpose();
            let suffix = suffix.map_err(|problem: String| Error::invalid("export.precision", problem))?;
            Ok((row, ModelSource::new(&made.path, suffix)))
        };
        let models = precisions.into_iter().map(source).collect::<Result<Vec<_>>>()?;
        Ok(Some(Quantised { made, models }))
    }

    /// A model for every target of the section, in its precisions where the target takes them. The folders have the targets' names,
    /// with this label behind them.
    ///
    /// Errors: as `export`.
    pub fn export(
        &mut self,
        label: &str,
        (model, digest): (&ModelSource, &str),
        quantised: Option<&Quantised>,
        section: &ExportSection,
    ) -> Result<()> {
        for target in section.targets()? {
            let mut settings = section.settings(target);
            let quantised = quantised.filter(|_| target.writes_graphs());
            let source = quantised.map_or_else(|| model.clone(), |own| own.made.model());
            let mut inputs = vec![("model", quantised.map_or(digest, |own| &own.made.digest).to_string())];
            settings.variant = quantised.filter(|_| !target.writes_variants).and_then(Quantised::only_suffix);
            if let Some(base) = section.base.as_ref().filter(|_| target.reads("--base")) {
                let base = checkpoint_on_disk(base, self.cancel)?;
                inputs.push(("base", Checkpoint::open(&base)?.digest()?.to_string()));
                settings.base = Some(base);
                settings.dense = Some(self.model.clone());
            }
            let inputs: Vec<(&str, &str)> = inputs.iter().map(|(name, digest)| (*name, digest.as_str())).collect();
            let name = format!("{}{label}", target.name);
            let (cancel, mut notes) = (self.cancel, Vec::new());
            let done = self.store.step(&name, &name, &inputs, &settings, |path| {
                notes = export(&source.open()?, target, &settings, path, cancel)?.notes;
                Ok(())
            })?;
            self.report_step(&name, &done);
            notes.iter().for_each(|note| self.note(&format!("warning: {name}: {note}")));
        }
        Ok(())
    }
}
