//! Fits closed forms that make up for dropped layers.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::Layer;
use crate::base::{Cancel, Device, Error, Result, Sha256Digest};
use crate::bundle::{Bundle, Tower};
use crate::data::{DataOptions, Dataset, LeftOut, Subset};
use crate::method::{
    BRIDGE_RANK, COMPENSATIONS, Compensation, CompensationKind, CompensationRow, FIT_TOKENS, GapChange, HealMeter,
    layers_before_gaps,
};
use crate::rewrite::{check_behind, check_fold};

use super::inspect::decoder_analysis;
use super::needs::{Work, check as check_needs};
use super::refusal::drop_refusal;

/// What is fitted, and on how much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompensationSettings {
    /// Kind of closed form.
    pub kind: CompensationKind,
    /// Rank, for kinds that have one.
    pub rank: usize,
    /// Samples of the draw on which losses are measured.
    pub subset: Subset,
    /// Tokens of other samples that fits look at, at most.
    pub fit_tokens: usize,
}

impl CompensationSettings {
    /// The settings of this kind; the default rank and number of tokens where none is given.
    ///
    /// Errors: `Error::Invalid` for a rank of 0, or of a kind that has none.
    pub fn new(kind: CompensationKind, rank: Option<usize>, subset: Subset, fit_tokens: Option<usize>) -> Result<Self> {
        let row = CompensationRow::of_kind(kind);
        if rank.is_some() && !row.ranked {
            let ranked: Vec<&str> = COMPENSATIONS.iter().filter(|row| row.ranked).map(|row| row.name).collect();
            return Err(Error::invalid(format!("compensation `{}`", row.name), "has no rank")
                .remedy(format!("leave the rank out, or use {}", ranked.join(", "))));
        }
        if rank == Some(0) {
            return Err(Error::invalid("rank of the compensation", "is 0").remedy("give a rank of 1 or more"));
        }
        let (rank, fit_tokens) = (rank.unwrap_or(BRIDGE_RANK), fit_tokens.unwrap_or(FIT_TOKENS));
        Ok(CompensationSettings { kind, rank, subset, fit_tokens })
    }
}

/// What was fitted, and what it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CompensationReport {
    /// Kind of closed form.
    #[serde(default = "linear")]
    pub kind: CompensationKind,
    /// Rank of the maps, for kinds that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Layers before a gap behind which something changed, by their index before; a gap has none where nothing brings the stream
    /// closer to the dense model's on samples that are held out, or where it does not lower the loss.
    pub layers: Vec<usize>,
    /// Numbers added to the graph.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub added_parameters: u64,
    /// Ideal decoder speed-up, what was added counted by its parameters: those of all layers over those of the layers that stay
    /// and of what was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ideal_speedup: Option<f64>,
    /// Tokens that the fits looked at.
    pub fit_tokens: usize,
    /// Other samples, on which both losses are measured.
    pub samples: usize,
    /// Mean loss per answer token, in nats, of the pruned model.
    pub loss_before: f64,
    /// The same with the maps.
    pub loss_after: f64,
}

fn linear() -> CompensationKind {
    CompensationKind::Linear
}

fn is_zero(count: &u64) -> bool {
    *count == 0
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

/// Fits a closed form before each gap of `layers`; the loss is measured on other samples than the fit's.
///
/// Errors: as `prune` for layers that cannot be dropped; `Error::Unsupported` when there is no layer before a gap, or none
/// that can take the change; as `HealMeter::new`.
pub fn compensate(
    bundle: &Bundle,
    layers: &[usize],
    (data, options): (&Path, &DataOptions),
    settings: &CompensationSettings,
    device: Device,
    cancel: &Cancel,
) -> Result<Compensated> {
    let CompensationSettings { kind, rank, subset, fit_tokens } = *settings;
    let row = CompensationRow::of_kind(kind);
    let analysis = decoder_analysis(bundle)?;
    if let Some(error) = drop_refusal(bundle, &analysis, Tower::Text, layers) {
        return Err(error);
    }
    let mut before = Vec::new();
    for layer in layers_before_gaps(layers) {
        before.push(layer.ok_or_else(|| {
            Error::unsupported("layer 0", "is dropped, and no layer before it can make up for it")
                .remedy("leave the compensation out, or keep layer 0")
        })?);
    }
    match kind {
        CompensationKind::Linear => before.iter().try_for_each(|&layer| check_fold(&analysis, layer))?,
        CompensationKind::Scalar | CompensationKind::Bridge => check_behind(&analysis, &before)?,
    }
    check_needs(bundle, Work::MeasureLosses)?;
    let dataset = Dataset::open_for(data, bundle, options)?;
    let mut meter = HealMeter::new(bundle, &dataset, (kind, rank), (subset, fit_tokens), device, cancel)?;
    let loss_before = meter.loss_without_fit(layers)?;
    let (loss_after, compensation) = meter.loss(layers)?;
    let added_parameters: u64 = compensation.changes.values().map(GapChange::parameters).sum();
    let body = &analysis.model.graph.body;
    let of = |layers: &mut dyn Iterator<Item = &Layer>| layers.map(|layer| layer.parameters(body)).sum::<u64>() as f64;
    let all = of(&mut analysis.map.layers.iter());
    let kept = of(&mut analysis.map.layers.iter().filter(|layer| !layers.contains(&layer.index)));
    let report = CompensationReport {
        kind,
        rank: row.ranked.then_some(rank),
        layers: compensation.changes.keys().copied().collect(),
        added_parameters,
        ideal_speedup: (added_parameters > 0 && kept > 0.0).then(|| all / (kept + added_parameters as f64)),
        fit_tokens: meter.fit_tokens(),
        samples: meter.samples().len(),
        loss_before,
        loss_after,
    };
    Ok(Compensated { compensation, report, data: dataset.digest()?, left_out: meter.left_out().clone() })
}
