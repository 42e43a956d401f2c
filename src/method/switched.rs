//! A decoder whose layers can be switched off, with the losses of selected tokens as its output.

use std::collections::BTreeMap;

use crate::analysis::Analysis;
use crate::base::{Cancel, Result};
use crate::ir::DataType;
use crate::rewrite::{
    BEHIND_OUTPUT_PREFIX, KEEP_INPUT, MAP_INPUT_PREFIX, MAPPED_INPUT, MapOf, RESTART_INPUT, ROWS_INPUT, STREAM_INPUT,
    TARGETS_INPUT, bypass_layers, bypass_layers_mapped,
};
use crate::runtime::{Binding, Decoder, Outputs, Port, Runtime, SessionOptions, TensorValue};

use super::batch::Batch;

/// By layer: a map, f32 `[D, D]`; see `rewrite::MAP_INPUT_PREFIX`.
pub type Maps = BTreeMap<usize, TensorValue>;

/// What a pass leaves out and adds.
pub struct Pass<'a> {
    pub removed: &'a [usize],
    pub maps: &'a Maps,
    /// One layer's map in place of that in `maps`.
    pub map: Option<(usize, &'a TensorValue)>,
    /// The layer from which the pass runs, and the stream before that layer.
    pub restart: Option<(usize, &'a TensorValue)>,
}

/// What the inputs of a decoder switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switches {
    /// Layers.
    Layers,
    /// Layers, with inputs of maps behind them.
    Mapped(MapOf),
    /// The residual blocks of layers.
    Sublayers,
}

/// The session of a graph made by `rewrite::bypass_layers`.
pub struct Switched {
    decoder: Decoder,
    num_layers: usize,
    /// Path of the decoder in its folder.
    file: String,
    /// See `rewrite::Bypass::restarts`.
    restarts: bool,
    /// Names of the inputs with maps; empty for a graph without them.
    maps: Vec<String>,
    cancel: Cancel,
}

/// Loads the graph with inputs that switch the analysed layers off, `mapped` also with inputs of maps. The flag is
/// `rewrite::Bypass::restarts`.
///
/// Errors: as `rewrite::bypass_layers` and `Runtime::session_of`.
pub fn open(
    runtime: &Runtime,
    analysis: &Analysis,
    head_dim: Option<usize>,
    mapped: Option<MapOf>,
) -> Result<(Decoder, bool)> {
    let bypass = match mapped {
        Some(of) => bypass_layers_mapped(analysis, of)?,
        None => bypass_layers(analysis)?,
    };
    let session = runtime.session_of(&bypass.model, &SessionOptions::default())?;
    Ok((Decoder::prefill_only(session, head_dim)?, bypass.restarts))
}

impl Switched {
    pub fn new(decoder: Decoder, num_layers: usize, file: String, restarts: bool, cancel: Cancel) -> Self {
        let maps = match decoder.session().input(MAPPED_INPUT) {
            Some(_) => (0..num_layers).map(|layer| format!("{MAP_INPUT_PREFIX}{layer}")).collect(),
            None => Vec::new(),
        };
        Switched { decoder, num_layers, file, restarts, maps, cancel }
    }

    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// True when a pass can begin at a later layer.
    pub fn restarts(&self) -> bool {
        self.restarts
    }

    /// Width of the residual stream, where the graph fixes it.
    pub fn stream_width(&self) -> Option<usize> {
        self.decoder.session().output(&format!("{BEHIND_OUTPUT_PREFIX}0")).and_then(Port::width)
    }

    /// The batch size, if the graph supports only one.
    pub fn fixed_batch(&self) -> Option<usize> {
        self.decoder.fixed_batch()
    }

    /// A batch on the decoder's device, for all passes over it.
    ///
    /// Errors: as `Decoder::place`.
    pub fn place(&self, batch: &Batch) -> Result<Binding> {
        self.decoder.place(&batch.step, &[(ROWS_INPUT, &batch.rows), (TARGETS_INPUT, &batch.targets)])
    }

    /// One forward pass over a batch of [`Switched::place`], of which the `wanted` outputs are read.
    ///
    /// Errors: `Error::Engine` when the run fails; `Error::Interrupted` on Ctrl-C.
    pub fn run(&mut self, batch: &mut Binding, pass: &Pass, wanted: &[&str]) -> Result<Outputs> {
        self.run_keeping(batch, pass, wanted, false)
    }

    /// [`Switched::run`] whose outputs are only given to later passes, as the stream from which they run: they remain on
    /// the decoder's device.
    ///
    /// Errors: as `run`.
    pub fn streams(&mut self, batch: &mut Binding, pass: &Pass, wanted: &[&str]) -> Result<Outputs> {
        self.run_keeping(batch, pass, wanted, true)
    }

    fn run_keeping(&mut self, batch: &mut Binding, pass: &Pass, wanted: &[&str], stay: bool) -> Result<Outputs> {
        self.cancel.check("nothing is written")?;
        let begin = pass.restart.map_or(0, |(layer, _)| layer);
        let layers = 0..self.num_layers;
        let keep = layers.clone().map(|layer| layer >= begin && !pass.removed.contains(&layer)).collect();
        let keep = TensorValue::new(&[self.num_layers], keep)?;
        let mut added = vec![(KEEP_INPUT, &keep)];
        let flag = TensorValue::new(&[1], vec![pass.restart.is_some()])?;
        let nothing = match self.decoder.session().input(STREAM_INPUT) {
            Some(port) => Some(TensorValue::empty(port.dtype, &[0, 0, port.fixed_size(2).unwrap_or(0)])?),
            None => None,
        };
        if let Some(nothing) = &nothing {
            added.push((RESTART_INPUT, &flag));
            added.push((STREAM_INPUT, pass.restart.map_or(nothing, |(_, stream)| stream)));
        }
        let map_of = |layer: usize| match pass.map {
            Some((own, map)) if own == layer => Some(map),
            _ => pass.maps.get(&layer),
        };
        let mapped = TensorValue::new(&[self.num_layers], layers.map(|layer| map_of(layer).is_some()).collect())?;
        let no_map = TensorValue::empty(DataType::Float, &[0, 0])?;
        if !self.maps.is_empty() {
            added.push((MAPPED_INPUT, &mapped));
            let maps = self.maps.iter().enumerate();
            added.extend(maps.map(|(layer, name)| (name.as_str(), map_of(layer).unwrap_or(&no_map))));
        }
        let outputs = self.decoder.prefill_placed(batch, &added, Some(wanted), |_| stay);
        outputs.map_err(|error| {
            error.during(format!("measuring the loss of `{}` without layers {:?}", self.file, pass.removed))
        })
    }
}
