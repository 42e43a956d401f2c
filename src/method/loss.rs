//! Measures the loss of a decoder without some of its layers, for strategies that select by loss.

use crate::base::{Cancel, Device, Error, Progress, Result};
use crate::bundle::Bundle;
use crate::data::{Dataset, LeftOut, Subset};
use crate::rewrite::{LOSS_OUTPUT, STREAM_OUTPUT_PREFIX};
use crate::runtime::{Outputs, TensorValue};

use super::batch::{Batch, Conversation, batches};
use super::embedder::Embedder;
use super::select::MeasureLosses;
use super::switched::{Maps, Pass, Switched, Switches};

/// Calibration conversations, embedded once, and one decoder session with an input that switches layers off.
pub struct LossMeter {
    switched: Switched,
    batches: Vec<Batch>,
    /// Ids of the samples used.
    samples: Vec<String>,
    left_out: LeftOut,
    answer_tokens: usize,
}

/// A candidate for removal.
pub(super) struct Trial {
    pub layer: usize,
    /// The first layer that runs otherwise without it.
    pub from: usize,
    /// A layer's map in place of the one it has.
    pub map: Option<(usize, TensorValue)>,
}

impl LossMeter {
    /// Embeds the drawn conversations with their pictures, and loads the decoder.
    ///
    /// Errors: as `Intake::encoded`, `VlmSession::open` and `rewrite::bypass_layers`; `Error::Invalid` when there is no
    /// answer token.
    pub fn new(bundle: &Bundle, dataset: &Dataset, subset: Subset, device: Device, cancel: &Cancel) -> Result<Self> {
        Self::with(Switches::Layers, bundle, dataset, subset, device, cancel).map(|(meter, _)| meter)
    }

    /// The same with other switches, and `Embedder::mlps`.
    fn with(
        switches: Switches,
        bundle: &Bundle,
        dataset: &Dataset,
        subset: Subset,
        device: Device,
        cancel: &Cancel,
    ) -> Result<(Self, Vec<Option<usize>>)> {
        let indices = dataset.draw(subset)?;
        let mut embedder = Embedder::new(bundle, dataset, switches, device, cancel)?;
        let conversations = embedder.embedded(&indices)?;
        let (samples, left_out) = (std::mem::take(&mut embedder.samples), embedder.left_out.clone());
        let mlps = std::mem::take(&mut embedder.mlps);
        let meter = Self::over(embedder.into_switched(), conversations)?;
        Ok((LossMeter { samples, left_out, ..meter }, mlps))
    }

    pub(super) fn over(switched: Switched, conversations: Vec<Conversation>) -> Result<Self> {
        let batches = batches(conversations, switched.fixed_batch())?;
        let answer_tokens = batches.iter().map(|batch| batch.targets.shape()[1]).sum();
        if answer_tokens == 0 {
            return Err(Error::invalid("calibration data", "has no answer to measure a loss on")
                .remedy("give conversations with answers, or running text"));
        }
        Ok(LossMeter { switched, batches, samples: Vec::new(), left_out: LeftOut::default(), answer_tokens })
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
        self.answer_tokens
    }

    /// Mean cross-entropy over all answer tokens, in nats, of the decoder without these layers.
    ///
    /// Errors: `Error::Engine` when a run fails; `Error::Interrupted` on Ctrl-C.
    pub fn loss(&mut self, removed: &[usize]) -> Result<f64> {
        self.loss_with(removed, &Maps::new())
    }

    /// [`LossMeter::loss`] with maps.
    ///
    /// Errors: as `loss`.
    pub(super) fn loss_with(&mut self, removed: &[usize], maps: &Maps) -> Result<f64> {
        let mut sum = 0.0;
        for batch in &self.batches {
            let pass = Pass { removed, maps, map: None, restart: None };
            let mut placed = self.switched.place(batch)?;
            sum += sum_of(&self.switched.run(&mut placed, &pass, &[LOSS_OUTPUT])?)?;
        }
        Ok(sum / self.answer_tokens as f64)
    }

    pub(super) fn switched(&mut self) -> &mut Switched {
        &mut self.switched
    }

    pub(super) fn layer_count(&self) -> usize {
        self.switched.num_layers()
    }

    /// Width of the residual stream, where the graph fixes it.
    pub(super) fn stream_width(&self) -> Option<usize> {
        self.switched.stream_width()
    }

    pub(super) fn batch_count(&self) -> u64 {
        self.batches.len() as u64
    }

    /// The losses without `removed` and the layer of each trial in turn. Each batch runs once to record the stream before
    /// every layer from which a trial goes on, and then from there for each trial.
    pub(super) fn losses_of(
        &mut self,
        removed: &[usize],
        maps: &Maps,
        trials: &[Trial],
        progress: &Progress,
    ) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; trials.len()];
        let name = |layer: usize| format!("{STREAM_OUTPUT_PREFIX}{layer}");
        let mut places: Vec<usize> = trials.iter().map(|trial| trial.from).filter(|&from| from > 0).collect();
        places.sort_unstable();
        places.dedup();
        let names: Vec<String> = places.into_iter().map(name).collect();
        let wanted: Vec<&str> = names.iter().map(String::as_str).collect();
        for batch in &self.batches {
            let mut placed = self.switched.place(batch)?;
            let streams = match self.switched.restarts() && !wanted.is_empty() {
                true => {
                    let pass = Pass { removed, maps, map: None, restart: None };
                    Some(self.switched.streams(&mut placed, &pass, &wanted)?)
                }
                false => None,
            };
            for (sum, trial) in sums.iter_mut().zip(trials) {
                let restart = match &streams {
                    Some(streams) if trial.from > 0 => Some((trial.from, streams.get(&name(trial.from))?)),
                    _ => None,
                };
                let without: Vec<usize> = removed.iter().copied().chain([trial.layer]).collect();
                let map = trial.map.as_ref().map(|(layer, map)| (*layer, map));
                let pass = Pass { removed: &without, maps, map, restart };
                *sum += sum_of(&self.switched.run(&mut placed, &pass, &[LOSS_OUTPUT])?)?;
                progress.advance(1);
            }
        }
        Ok(sums.into_iter().map(|sum| sum / self.answer_tokens as f64).collect())
    }
}

impl MeasureLosses for LossMeter {
    fn passes(&self) -> u64 {
        self.batch_count()
    }

    fn losses(&mut self, removed: &[usize], candidates: &[usize], progress: &Progress) -> Result<Vec<f64>> {
        let trials: Vec<Trial> = candidates.iter().map(|&layer| Trial { layer, from: layer, map: None }).collect();
        self.losses_of(removed, &Maps::new(), &trials, progress)
    }
}

/// A [`LossMeter`] whose candidates are the MLPs of layers, named by their layers.
pub struct MlpMeter {
    meter: LossMeter,
    places: Vec<Option<usize>>,
}

impl MlpMeter {
    /// Errors: as [`LossMeter::new`] and `analysis::sublayers`.
    pub fn new(bundle: &Bundle, dataset: &Dataset, subset: Subset, device: Device, cancel: &Cancel) -> Result<Self> {
        let (meter, places) = LossMeter::with(Switches::Sublayers, bundle, dataset, subset, device, cancel)?;
        Ok(MlpMeter { meter, places })
    }

    /// The meter of all residual blocks.
    pub fn meter(&self) -> &LossMeter {
        &self.meter
    }

    /// Mean cross-entropy over all answer tokens, in nats, of the decoder without the MLPs of these layers.
    ///
    /// Errors: as [`LossMeter::loss`]; `Error::Unsupported` for a layer without an MLP of its own.
    pub fn loss(&mut self, removed: &[usize]) -> Result<f64> {
        let removed = self.places_of(removed)?;
        self.meter.loss(&removed)
    }

    fn places_of(&self, layers: &[usize]) -> Result<Vec<usize>> {
        let place = |&layer: &usize| {
            self.places.get(layer).copied().flatten().ok_or_else(|| {
                Error::unsupported(format!("layer {layer}"), "has no MLP that can be dropped alone")
                    .remedy("drop whole layers")
            })
        };
        layers.iter().map(place).collect()
    }
}

impl MeasureLosses for MlpMeter {
    fn passes(&self) -> u64 {
        self.meter.passes()
    }

    fn losses(&mut self, removed: &[usize], candidates: &[usize], progress: &Progress) -> Result<Vec<f64>> {
        let (removed, candidates) = (self.places_of(removed)?, self.places_of(candidates)?);
        self.meter.losses(&removed, &candidates, progress)
    }
}

fn sum_of(outputs: &Outputs) -> Result<f64> {
    Ok(outputs.get(LOSS_OUTPUT)?.data::<f32>()?.iter().map(|&loss| f64::from(loss)).sum())
}
