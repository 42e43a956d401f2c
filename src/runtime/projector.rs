//! The projector, also called connector: from the vision encoder's features to the decoder's width, where it is a graph of
//! its own.

use std::time::Duration;

use crate::base::{Error, Result};

use super::port::Port;
use super::session::Session;
use super::tensor::TensorValue;

/// A graph that projects features to the decoder's width.
#[derive(Debug)]
pub(super) struct Projector {
    session: Session,
    input: Port,
    output: String,
}

/// Features of one picture before the projector, `[tiles, rows, width]` in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Unprojected {
    /// Number of tiles; 1 where the encoder gives the rows of all tiles in a row.
    pub tiles: usize,
    /// Rows of each tile.
    pub rows: usize,
    /// Width of a row.
    pub width: usize,
    /// The numbers.
    pub data: Vec<f32>,
}

impl Projector {
    /// Errors: `Error::Unsupported` unless the graph has one input and one output.
    pub fn new(session: Session) -> Result<Self> {
        let (input, output) = match (session.inputs(), session.outputs()) {
            ([input], [output]) => (input.clone(), output.name.clone()),
            (inputs, outputs) => {
                let problem = format!("has {} inputs and {} outputs, expected one each", inputs.len(), outputs.len());
                return Err(Error::unsupported(session.subject(), problem).remedy("export the projector alone"));
            }
        };
        Ok(Projector { session, input, output })
    }

    /// Time inside all runs so far.
    pub fn elapsed(&self) -> Duration {
        self.session.elapsed()
    }

    /// Projects features to the decoder's width. If the input has one axis less, all rows are concatenated.
    pub fn run(&mut self, features: &TensorValue) -> Result<TensorValue> {
        let shape = features.shape();
        let (rank, width) = (shape.len(), shape.last().copied().unwrap_or(0));
        let data = features.to_f32()?.into_owned();
        let rows = data.len().checked_div(width).unwrap_or(0);
        let shape = match self.input.rank() {
            wanted if wanted == rank => shape,
            2 => vec![rows, width],
            3 => vec![1, rows, width],
            _ => {
                let problem = format!("input {} got features of shape {shape:?}", self.input.described());
                return Err(Error::invalid(self.session.subject(), problem));
            }
        };
        let tensor = TensorValue::from_f32(self.input.dtype, &shape, data)?;
        self.session.run(&[(self.input.name.as_str(), &tensor)], None)?.take(&self.output)
    }

    /// Features of one picture, which are a part of a run's features of shape `run`. `tiles`: those of the picture, and of the
    /// run.
    pub fn unprojected(&self, run: &[usize], tiles: (usize, usize), data: Vec<f32>) -> Unprojected {
        let width = run.last().copied().unwrap_or(0);
        let by_tile = self.input.rank() == 3 && run.len() == 3 && run[0] == tiles.1;
        let tiles = if by_tile { tiles.0.max(1) } else { 1 };
        Unprojected { tiles, rows: data.len() / (width * tiles).max(1), width, data }
    }
}
