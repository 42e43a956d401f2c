//! Fits linear maps that make up for dropped layers.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Device, Error, Result, Sha256Digest};
use crate::bundle::{Bundle, Tower};
use crate::data::{DataOptions, Dataset, LeftOut, Subset};
use crate::method::{Compensation, HealMeter, layers_before_gaps};
use crate::rewrite::check_fold;

use super::inspect::decoder_analysis;
use super::needs::{Work, check as check_needs};
use super::refusal::drop_refusal;

/// What maps were fitted, and what they change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CompensationReport {
    /// Layers before a gap whose weights changed, by their index before; a gap for which no map brings the stream closer to
    /// the dense model's on samples that are held out has none.
    pub layers: Vec<usize>,
    /// Tokens that the fits looked at.
    pub fit_tokens: usize,
    /// Other samples, on which both losses are measured.
    pub samples: usize,
    /// Mean loss per answer token, in nats, of the pruned model.
    pub loss_before: f64,
    /// The same with the maps.
    pub loss_after: f64,
}

/// Fitted maps with the digest of their data.
pub struct Compensated {
    /// The maps.
    pub compensation: Compensation,
    /// What they change.
    pub report: CompensationReport,
    /// Digest of the calibration data.
    pub data: Sha256Digest,
    /// Samples that were drawn but could not be used.
    pub left_out: LeftOut,
}

/// Fits a linear map before each gap of `layers` on samples with at most `fit_tokens` tokens; `subset` of the data are others,
/// on which the loss is measured.
///
/// Errors: as `prune` for layers that cannot be dropped; `Error::Unsupported` when there is no layer before a gap, or none
/// that a map can be folded into; as `HealMeter::new`.
pub fn compensate(
    bundle: &Bundle,
    layers: &[usize],
    (data, options): (&Path, &DataOptions),
    (subset, fit_tokens): (Subset, usize),
    device: Device,
    cancel: &Cancel,
) -> Result<Compensated> {
    let analysis = decoder_analysis(bundle)?;
    if let Some(error) = drop_refusal(bundle, &analysis, Tower::Text, layers) {
        return Err(error);
    }
    for layer in layers_before_gaps(layers) {
        let layer = layer.ok_or_else(|| {
            Error::unsupported("layer 0", "is dropped, and no layer before it can take a map")
                .remedy("leave the compensation out, or keep layer 0")
        })?;
        check_fold(&analysis, layer)?;
    }
    check_needs(bundle, Work::MeasureLosses)?;
    let dataset = Dataset::open_for(data, bundle, options)?;
    let mut meter = HealMeter::new(bundle, &dataset, subset, fit_tokens, device, cancel)?;
    let loss_before = meter.loss_without_fit(layers)?;
    let (loss_after, compensation) = meter.loss(layers)?;
    let report = CompensationReport {
        layers: compensation.changes.keys().copied().collect(),
        fit_tokens: meter.fit_tokens(),
        samples: meter.samples().len(),
        loss_before,
        loss_after,
    };
    Ok(Compensated { compensation, report, data: dataset.digest()?, left_out: meter.left_out().clone() })
}
