//! Opens what a strategy measures losses with.

use std::path::Path;

use crate::base::{Cancel, Device, Result, Sha256Digest};
use crate::bundle::Bundle;
use crate::data::{Amount, DataOptions, Dataset, LeftOut, Subset};
use crate::method::select::{MeasureLosses, Measures, Strategy};
use crate::method::{BRIDGE_RANK, CompensationKind, HealMeter, LossMeter, MlpMeter, Part};

use super::needs::{Work, check as check_needs};

/// Calibration samples where the user names no number.
pub const CALIBRATION_SAMPLES: usize = 32;

/// What strategies that fit make up for dropped layers with; it has no rank.
const LINEAR: (CompensationKind, usize) = (CompensationKind::Linear, BRIDGE_RANK);

/// Losses for a strategy that uses them, with their samples and the digest of their data.
pub struct Meter {
    /// Digest of the calibration data.
    pub data: Sha256Digest,
    /// Number of samples that were drawn for the losses.
    pub asked: usize,
    /// Ids of the samples on which losses are measured.
    pub samples: Vec<String>,
    /// Samples that were drawn but could not be used, by reason.
    pub left_out: LeftOut,
    answer_tokens: usize,
    kind: Kind,
}

enum Kind {
    Loss(LossMeter),
    Mlps(MlpMeter),
    Healed(HealMeter),
}

impl Meter {
    /// Loads the model and embeds the calibration samples: `samples` of the data for the losses (32 or all, where none is
    /// given), drawn by `seed`, and, where the strategy fits, further samples with at most `fit_tokens` tokens for that.
    ///
    /// Errors: as `LossMeter::new` and `HealMeter::new`; `Error::Unsupported` for a decoder without the logits of all
    /// positions.
    pub fn open(
        bundle: &Bundle,
        strategy: &Strategy,
        (data, options): (&Path, &DataOptions),
        (samples, seed, fit_tokens): (Option<usize>, u64, usize),
        device: Device,
        cancel: &Cancel,
    ) -> Result<Self> {
        check_needs(bundle, Work::MeasureLosses)?;
        let dataset = Dataset::open_for(data, bundle, options)?;
        let data = dataset.digest()?;
        let asked = samples.unwrap_or(CALIBRATION_SAMPLES.min(dataset.len()));
        let subset = Subset { amount: Amount::Samples(asked), seed };
        Ok(match strategy.measures {
            Measures::HealedLoss => {
                let meter = HealMeter::new(bundle, &dataset, LINEAR, (subset, fit_tokens), device, cancel)?;
                let (samples, left_out) = (meter.samples().to_vec(), meter.left_out().clone());
                Meter {
                    data,
                    asked,
                    samples,
                    left_out,
                    answer_tokens: meter.answer_tokens(),
                    kind: Kind::Healed(meter),
                }
            }
            Measures::Loss if strategy.drops == Part::Mlp => {
                let meter = MlpMeter::new(bundle, &dataset, subset, device, cancel)?;
                let own = meter.meter();
                let (samples, left_out) = (own.samples().to_vec(), own.left_out().clone());
                Meter { data, asked, samples, left_out, answer_tokens: own.answer_tokens(), kind: Kind::Mlps(meter) }
            }
            Measures::Loss | Measures::Nothing => {
                let meter = LossMeter::new(bundle, &dataset, subset, device, cancel)?;
                let (samples, left_out) = (meter.samples().to_vec(), meter.left_out().clone());
                Meter { data, asked, samples, left_out, answer_tokens: meter.answer_tokens(), kind: Kind::Loss(meter) }
            }
        })
    }

    /// What the choice of `count` of `layers` layers costs, in words.
    pub fn cost(&self, count: usize, layers: usize) -> String {
        let removals = (0..count.min(layers)).map(|round| layers - round).sum::<usize>();
        let measured = format!(
            "at most {removals} removals, each measured on {} samples with {} answer tokens",
            self.samples.len(),
            self.answer_tokens
        );
        match &self.kind {
            Kind::Loss(_) | Kind::Mlps(_) => measured,
            Kind::Healed(meter) => format!(
                "{measured} after a fit on {} other tokens, at most {} forward passes in all",
                meter.fit_tokens(),
                meter.most_passes(count)
            ),
        }
    }

    /// Measures losses.
    pub fn measure(&mut self) -> &mut dyn MeasureLosses {
        match &mut self.kind {
            Kind::Loss(meter) => meter,
            Kind::Mlps(meter) => meter,
            Kind::Healed(meter) => meter,
        }
    }
}
