//! Measures the loss of a decoder without some of its layers after a closed-form fit has made up for them, for strategies
//! that select by what is left after healing.
//!
//! Before a gap of dropped layers `s..e`, layer `s - 1` gives `y = r + a`, where `a` is what its last block adds to the
//! stream. A linear map `T = I + D` of `a` brings `r + a T` closest to the dense model's stream before layer `e`, over
//! tokens `t` weighted by `1 / |t|^2`: a ridge regression for `D`. Source: ReplaceMe, arXiv:2505.02819, with a ridge
//! towards the identity.

use std::collections::BTreeMap;

use ndarray::Array2;
use rayon::prelude::*;

use crate::base::{Cancel, Device, Error, Progress, Result};
use crate::bundle::Bundle;
use crate::data::{Amount, Dataset, LeftOut, Subset};
use crate::rewrite::{ADDED_OUTPUT_PREFIX, BEHIND_OUTPUT_PREFIX, STREAM_OUTPUT_PREFIX};
use crate::runtime::{Embedded, Outputs, Step, TensorValue};

use super::batch::{Batch, Conversation, grouped};
use super::compensation::{CompensationKind, CompensationRow, Fit, GapChange, GapRows};
use super::embedder::Embedder;
use super::loss::{LossMeter, Trial};
use super::select::MeasureLosses;
use super::switched::{Maps, Pass, Switches};

/// Default number of tokens that a fit looks at.
pub const FIT_TOKENS: usize = 4096;

/// Of the fit's conversations every fourth is held out, to choose the ridge.
const HELD_OUT: usize = 4;

/// Bytes of the sums of fits that are made at one time.
const SUM_BYTES: usize = 1 << 30;

/// What makes up for dropped layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compensation {
    /// By layer of the dense model: what changes behind it.
    pub changes: BTreeMap<usize, GapChange>,
}

/// Dropped layers `start..end`, all neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    start: usize,
    end: usize,
}

impl Gap {
    /// The gap that contains `layer`, when `dropped` are gone with it.
    fn around(layer: usize, dropped: &[usize]) -> Gap {
        let (mut start, mut end) = (layer, layer + 1);
        while start > 0 && dropped.contains(&(start - 1)) {
            start -= 1;
        }
        while dropped.contains(&end) {
            end += 1;
        }
        Gap { start, end }
    }

    /// All gaps, ascending.
    fn all(dropped: &[usize]) -> Vec<Gap> {
        let mut ascending = dropped.to_vec();
        ascending.sort_unstable();
        let mut gaps: Vec<Gap> = ascending.iter().map(|&layer| Gap::around(layer, dropped)).collect();
        gaps.dedup();
        gaps
    }
}

/// For each gap of dropped layers, ascending, the layer before it; `None` at the start of the network.
pub fn layers_before_gaps(dropped: &[usize]) -> Vec<Option<usize>> {
    Gap::all(dropped).into_iter().map(|gap| gap.start.checked_sub(1)).collect()
}

/// Calibration conversations, a part for the fits and a part for the losses, and one decoder session with inputs that switch
/// layers off and inputs of maps.
pub struct HealMeter {
    meter: LossMeter,
    fitted: Vec<Batch>,
    held_out: Vec<Batch>,
    samples: Vec<String>,
    left_out: LeftOut,
    fit_tokens: usize,
    how: &'static CompensationRow,
    rank: usize,
    kept: Option<Kept>,
}

/// A closed form behind the layer before a gap, and its map.
struct Found {
    layer: usize,
    change: GapChange,
    map: TensorValue,
}

/// Maps that make up for layers.
struct Kept {
    /// Ascending.
    removed: Vec<usize>,
    maps: Maps,
}

impl HealMeter {
    /// Embeds the drawn conversations, on which losses are measured, and those drawn after them, with at most `fit_tokens`
    /// tokens, for fits. Where the data has too few for both, half of them are measured.
    ///
    /// Fits are of this kind, and of this rank where the kind has one.
    ///
    /// Errors: as `LossMeter::new`; `Error::Invalid` with fewer than three conversations.
    pub fn new(
        bundle: &Bundle,
        dataset: &Dataset,
        (kind, rank): (CompensationKind, usize),
        (subset, fit_tokens): (Subset, usize),
        device: Device,
        cancel: &Cancel,
    ) -> Result<Self> {
        let how = CompensationRow::of_kind(kind);
        let all = dataset.draw(Subset { amount: Amount::All, ..subset })?;
        let asked = dataset.draw(subset)?.len();
        let (measured, rest) = all.split_at(asked.min(all.len() / 2).max(1).min(all.len()));
        let mut embedder = Embedder::new(bundle, dataset, Switches::Mapped(how.of), device, cancel)?;
        let conversations = embedder.embedded(measured)?;
        let samples = std::mem::take(&mut embedder.samples);
        let for_fits = embedder.embedded(&embedder.within_tokens(rest, fit_tokens)?)?;
        let left_out = embedder.left_out.clone();
        let meter = Self::over(LossMeter::over(embedder.into_switched(), conversations)?, for_fits, (kind, rank))?;
        Ok(HealMeter { samples, left_out, ..meter })
    }

    pub(super) fn over(
        mut meter: LossMeter,
        for_fits: Vec<Conversation>,
        (kind, rank): (CompensationKind, usize),
    ) -> Result<Self> {
        let how = CompensationRow::of_kind(kind);
        let fixed = meter.switched().fixed_batch();
        let fit_tokens = for_fits.iter().map(|conversation| conversation.embedded.len()).sum();
        let count = for_fits.len();
        let (mut fitted, mut held_out) = (Vec::new(), Vec::new());
        for (place, conversation) in for_fits.into_iter().enumerate() {
            let apart = place % HELD_OUT == HELD_OUT - 1 || (place + 1 == count && count < HELD_OUT);
            if apart { held_out.push(conversation) } else { fitted.push(conversation) }
        }
        if fitted.is_empty() || held_out.is_empty() {
            return Err(Error::invalid(
                "calibration data",
                format!("leaves {count} conversations for fits, beside those that losses are measured on"),
            )
            .remedy("give at least three conversations or sequences of text, or raise `--fit-tokens`"));
        }
        let (fitted, held_out) = (grouped(fitted, fixed, stream_batch)?, grouped(held_out, fixed, stream_batch)?);
        let (samples, left_out) = (Vec::new(), LeftOut::default());
        Ok(HealMeter { meter, fitted, held_out, samples, left_out, fit_tokens, how, rank, kept: None })
    }

    /// Ids of the samples on which losses are measured.
    pub fn samples(&self) -> &[String] {
        &self.samples
    }

    /// Samples that were drawn but not used.
    pub fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    /// Number of answer tokens over which a loss is averaged.
    pub fn answer_tokens(&self) -> usize {
        self.meter.answer_tokens()
    }

    /// Number of tokens that the fits look at.
    pub fn fit_tokens(&self) -> usize {
        self.fit_tokens
    }

    /// The most forward passes that a choice of `count` layers makes.
    pub fn most_passes(&self, count: usize) -> u64 {
        let layers = self.meter.layer_count();
        let fit = 2 * (self.fitted.len() + self.held_out.len()) as u64;
        let round = |gone: usize| {
            let candidates = (layers - gone) as u64;
            (2 * candidates + 1) * self.meter.batch_count() + fit * candidates.div_ceil(self.room() as u64)
        };
        (0..count.min(layers)).map(round).sum()
    }

    /// Mean cross-entropy over all answer tokens, in nats, of the decoder without these layers, after the fit; and the fit.
    ///
    /// Errors: as `losses`.
    pub fn loss(&mut self, removed: &[usize]) -> Result<(f64, Compensation)> {
        let (maps, changes) = self.compensated(removed)?;
        let loss = self.meter.loss_with(removed, &maps)?;
        Ok((loss, Compensation { changes }))
    }

    /// The loss without these layers and without a fit.
    ///
    /// Errors: as `losses`.
    pub fn loss_without_fit(&mut self, removed: &[usize]) -> Result<f64> {
        self.meter.loss(removed)
    }

    /// Maps for all gaps, from the first to the last, each fitted on the stream behind those before it. A map that does not
    /// lower the loss is left out.
    fn compensated(&mut self, removed: &[usize]) -> Result<(Maps, BTreeMap<usize, GapChange>)> {
        let (mut maps, mut changes) = (Maps::new(), BTreeMap::new());
        let mut least = None;
        for gap in Gap::all(removed) {
            let Some(Found { layer, change, map }) = self.fit(removed, &maps, &[gap])?.pop().flatten() else {
                continue;
            };
            let before = match least {
                Some(loss) => loss,
                None => self.meter.loss_with(removed, &maps)?,
            };
            maps.insert(layer, map);
            let after = self.meter.loss_with(removed, &maps)?;
            if after < before {
                least = Some(after);
                changes.insert(layer, change);
            } else {
                maps.remove(&layer);
                least = Some(before);
            }
        }
        Ok((maps, changes))
    }

    /// For each gap the layer before it and its map in place of that in `maps`. A gap before which there is no layer, or
    /// which no map makes smaller on what is held out, has none.
    fn fit(&mut self, removed: &[usize], maps: &Maps, gaps: &[Gap]) -> Result<Vec<Option<Found>>> {
        let (new_fit, rank) = (self.how.fit, self.rank);
        let mut found = Vec::with_capacity(gaps.len());
        for gaps in gaps.chunks(self.room()) {
            let mut fits: Vec<Option<(usize, Box<dyn Fit>)>> = gaps.iter().map(|_| None).collect();
            for (apart, count) in [(false, self.fitted.len()), (true, self.held_out.len())] {
                for number in 0..count {
                    let rows = self.rows(removed, maps, gaps, (apart, number))?;
                    fits.par_iter_mut().zip(rows).for_each(|(fit, rows)| {
                        let Some(rows) = rows else { return };
                        let width = rows.read.ncols();
                        fit.get_or_insert_with(|| (width, new_fit(width, rank))).1.add(rows, apart);
                    });
                }
            }
            let solved: Result<Vec<Option<(usize, GapChange)>>> = fits
                .into_par_iter()
                .map(|fit| match fit {
                    Some((width, fit)) => Ok(fit.solve()?.map(|change| (width, change))),
                    None => Ok(None),
                })
                .collect();
            for (gap, solution) in gaps.iter().zip(solved?) {
                let (Some(layer), Some((width, change))) = (gap.start.checked_sub(1), solution) else {
                    found.push(None);
                    continue;
                };
                // The rest that was fitted is what the map before leaves.
                let change = match (change, maps.get(&layer)) {
                    (GapChange::Fold(map), Some(before)) => GapChange::Fold(map + &matrix(before)?),
                    (change, _) => change,
                };
                let map = tensor(change.map(width))?;
                found.push(Some(Found { layer, change, map }));
            }
        }
        Ok(found)
    }

    /// How many fits are made at one time.
    fn room(&self) -> usize {
        // Two sums of two matrices each, in f64. A graph that does not fix its width is taken for a large model.
        let each = 32 * self.meter.stream_width().unwrap_or(4096).pow(2);
        (SUM_BYTES / each).max(1)
    }

    /// The rows of one batch for each gap.
    fn rows(
        &mut self,
        removed: &[usize],
        maps: &Maps,
        gaps: &[Gap],
        (apart, number): (bool, usize),
    ) -> Result<Vec<Option<GapRows>>> {
        let batch = if apart { &self.held_out[number] } else { &self.fitted[number] };
        let switched = self.meter.switched();
        let (mut of_dense, mut of_pruned) = (Vec::new(), Vec::new());
        for gap in gaps.iter().filter(|gap| gap.start > 0) {
            of_dense.extend(target_names(*gap));
            of_pruned.extend([behind(gap.start - 1), added(gap.start - 1)]);
        }
        for names in [&mut of_dense, &mut of_pruned] {
            names.sort_unstable();
            names.dedup();
        }
        if of_pruned.is_empty() {
            return Ok(gaps.iter().map(|_| None).collect());
        }
        let wanted: Vec<&str> = of_dense.iter().map(String::as_str).collect();
        let nothing = Maps::new();
        let mut placed = switched.place(batch)?;
        let whole = Pass { removed: &[], maps: &nothing, map: None, restart: None };
        let dense = switched.run(&mut placed, &whole, &wanted)?;
        let wanted: Vec<&str> = of_pruned.iter().map(String::as_str).collect();
        let pruned = switched.run(&mut placed, &Pass { removed, maps, map: None, restart: None }, &wanted)?;
        gaps.iter()
            .map(|gap| match gap.start {
                0 => Ok(None),
                start => {
                    let target = target(&dense, *gap)?;
                    let stream = pruned.get(&behind(start - 1))?;
                    let sequences = stream.shape().first().copied().unwrap_or(1);
                    let rest = target.clone() - &matrix(stream)?;
                    let read = matrix(pruned.get(&added(start - 1))?)?;
                    if read.dim() != rest.dim() {
                        let problem = format!("the stream is {:?}, and a block adds {:?}", rest.dim(), read.dim());
                        return Err(Error::invalid("the fit", problem));
                    }
                    Ok(Some(GapRows { read, rest, target, sequences }))
                }
            })
            .collect()
    }
}

impl MeasureLosses for HealMeter {
    fn passes(&self) -> u64 {
        2 * self.meter.batch_count()
    }

    /// Each candidate's own gap is fitted on top of the maps of the layers that are gone, and measured with its map and without;
    /// the lower loss counts. The best candidate's map is kept for a call in which it is gone too; for other layers all gaps
    /// are fitted anew.
    fn losses(&mut self, removed: &[usize], candidates: &[usize], progress: &Progress) -> Result<Vec<f64>> {
        let kept = self.kept.take().filter(|kept| kept.removed == removed);
        let mut maps = match kept {
            Some(kept) => kept.maps,
            None => self.compensated(removed)?.0,
        };
        let plain: Vec<Trial> = candidates.iter().map(|&layer| Trial { layer, from: layer, map: None }).collect();
        let mut losses = self.meter.losses_of(removed, &maps, &plain, progress)?;
        let gaps: Vec<Gap> = candidates.iter().map(|&layer| Gap::around(layer, removed)).collect();
        let found = self.fit(removed, &maps, &gaps)?.into_iter();
        let mapped = candidates.iter().zip(found).filter_map(|(&layer, map)| {
            map.map(|Found { layer: before, map, .. }| Trial { layer, from: before, map: Some((before, map)) })
        });
        let mapped: Vec<Trial> = mapped.collect();
        progress.advance((candidates.len() - mapped.len()) as u64 * self.meter.batch_count());
        let mut best_maps = BTreeMap::new();
        for (loss, trial) in self.meter.losses_of(removed, &maps, &mapped, progress)?.into_iter().zip(mapped) {
            let place = candidates.iter().position(|&layer| layer == trial.layer);
            if let Some(least) = place.and_then(|place| losses.get_mut(place)).filter(|least| loss < **least) {
                *least = loss;
                best_maps.insert(trial.layer, trial.map);
            }
        }
        // `min_by` returns the first of equal values, as the choice among candidates does.
        let best = candidates.iter().zip(&losses).min_by(|a, b| a.1.total_cmp(b.1));
        if let Some((&layer, _)) = best {
            maps.remove(&layer);
            maps.extend(best_maps.remove(&layer).flatten());
            let mut removed: Vec<usize> = removed.iter().copied().chain([layer]).collect();
            removed.sort_unstable();
            self.kept = Some(Kept { removed, maps });
        }
        Ok(losses)
    }
}

fn behind(layer: usize) -> String {
    format!("{BEHIND_OUTPUT_PREFIX}{layer}")
}

fn added(layer: usize) -> String {
    format!("{ADDED_OUTPUT_PREFIX}{layer}")
}

fn before(layer: usize) -> String {
    format!("{STREAM_OUTPUT_PREFIX}{layer}")
}

/// Outputs of the dense model from which the target of a gap is made.
fn target_names(gap: Gap) -> Vec<String> {
    let inside = (gap.start - 1..gap.end - 1).flat_map(|layer| [behind(layer), before(layer + 1)]);
    inside.chain([behind(gap.end - 1)]).collect()
}

/// The stream that the layer before a gap must give: the dense model's behind the gap's last layer, less what the graph adds
/// between the layers from that one on (DeepStack), since it still adds that when they are gone.
fn target(dense: &Outputs, gap: Gap) -> Result<Array2<f32>> {
    let mut target = matrix(dense.get(&behind(gap.end - 1))?)?;
    for layer in gap.start - 1..gap.end - 1 {
        target -= &(matrix(dense.get(&before(layer + 1))?)? - &matrix(dense.get(&behind(layer))?)?);
    }
    Ok(target)
}

/// `[B, T, D]` as `[B * T, D]`.
fn matrix(tensor: &TensorValue) -> Result<Array2<f32>> {
    let shape = tensor.shape();
    let width = shape.last().copied().unwrap_or(0);
    let rows = shape.iter().rev().skip(1).product();
    Array2::from_shape_vec((rows, width), tensor.to_f32()?.into_owned())
        .map_err(|e| Error::invalid("the stream", e.to_string()))
}

fn tensor(map: Array2<f32>) -> Result<TensorValue> {
    let shape = [map.nrows(), map.ncols()];
    TensorValue::new(&shape, map.iter().copied().collect::<Vec<f32>>())
}

/// Conversations of which the stream is read and no loss: the graph's rows are one that nobody reads.
fn stream_batch(group: &[Conversation]) -> Result<Batch> {
    let embedded: Vec<&Embedded> = group.iter().map(|conversation| &conversation.embedded).collect();
    Ok(Batch {
        step: Step::prefill(&embedded, false)?,
        rows: TensorValue::new(&[1, 1, 2], vec![0i64, 0])?,
        targets: TensorValue::new(&[1, 1, 1], vec![0i64])?,
        owners: Vec::new(),
    })
}
