//! Closed forms that make up for dropped layers, one row of [`COMPENSATIONS`] each. All act behind the layer before a gap, and
//! bring the stream there closer to the dense model's behind the gap.

use ndarray::{Array2, Axis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::rewrite::MapOf;

use super::ridge::{self, RidgeSums};

/// Default rank of a bridge.
pub const BRIDGE_RANK: usize = 16;

/// Kind of compensation, in the order of [`COMPENSATIONS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CompensationKind {
    /// A linear map of what the layer's last block adds, folded into its weights.
    Linear,
    /// A factor of the stream.
    Scalar,
    /// A linear map of the stream of low rank, added to it.
    Bridge,
}

/// A row of the table of compensations.
pub struct CompensationRow {
    /// Kind of the row.
    pub kind: CompensationKind,
    /// Value of `--compensate`, and of `compensate` in recipes.
    pub name: &'static str,
    /// One line for help texts and documents.
    pub summary: &'static str,
    /// True when it has a rank.
    pub ranked: bool,
    /// What its map multiplies.
    pub(super) of: MapOf,
    /// A fit of `[D, D]` maps of this rank.
    pub(super) fit: fn(width: usize, rank: usize) -> Box<dyn Fit>,
}

/// All compensations.
pub const COMPENSATIONS: &[CompensationRow] = &[
    CompensationRow {
        kind: CompensationKind::Linear,
        name: "linear",
        summary: "a linear map of what the last block of the layer before the gap adds to the stream, by least squares, folded \
                  into the block's weights: no node, no cost (arXiv:2505.02819)",
        ranked: false,
        of: MapOf::Added,
        fit: |width, _| Box::new(Regression::new(width, None)),
    },
    CompensationRow {
        kind: CompensationKind::Scalar,
        name: "scalar",
        summary: "a factor of the stream at the gap, the mean over channels of the dense stream's magnitude behind the gap over \
                  that before it: one Mul (arXiv:2507.18212)",
        ranked: false,
        of: MapOf::Stream,
        fit: |_, _| Box::new(Magnitudes::default()),
    },
    CompensationRow {
        kind: CompensationKind::Bridge,
        name: "bridge",
        summary: "a map of the stream of low rank, added to it at the gap, by reduced-rank regression: two MatMul and an Add",
        ranked: true,
        of: MapOf::Stream,
        fit: |width, rank| Box::new(Regression::new(width, Some(rank))),
    },
];

impl CompensationRow {
    /// The row with this name.
    ///
    /// Errors: `Error::Invalid` listing the known names.
    pub fn named(name: &str) -> Result<&'static CompensationRow> {
        COMPENSATIONS.iter().find(|row| row.name == name).ok_or_else(|| {
            let names: Vec<_> = COMPENSATIONS.iter().map(|row| row.name).collect();
            Error::invalid(format!("compensation `{name}`"), "does not exist")
                .remedy(format!("use one of {}", names.join(", ")))
        })
    }

    /// The row of a kind.
    pub fn of_kind(kind: CompensationKind) -> &'static CompensationRow {
        &COMPENSATIONS[kind as usize]
    }
}

/// What takes the place of dropped layers behind the layer before them.
#[derive(Clone, Debug, PartialEq)]
pub enum GapChange {
    /// `D`, `[D, D]`: what the layer's last block adds to the stream, times `I + D`, takes its place.
    Fold(Array2<f32>),
    /// The stream times this factor takes its place.
    Scale(f64),
    /// `x + (x down) up` takes the place of the stream `x`.
    Bridge {
        /// `[D, R]`.
        down: Array2<f32>,
        /// `[R, D]`.
        up: Array2<f32>,
    },
}

impl GapChange {
    /// `M`, `[D, D]`: what is multiplied, times `M`, is added to the stream.
    pub(super) fn map(&self, width: usize) -> Array2<f32> {
        match self {
            GapChange::Fold(map) => map.clone(),
            GapChange::Scale(factor) => Array2::eye(width) * (*factor - 1.0) as f32,
            GapChange::Bridge { down, up } => down.dot(up),
        }
    }

    /// Numbers that it adds to the graph.
    pub fn parameters(&self) -> u64 {
        match self {
            GapChange::Fold(_) => 0,
            GapChange::Scale(_) => 1,
            GapChange::Bridge { down, up } => (down.len() + up.len()) as u64,
        }
    }
}

/// The rows of one batch behind the layer before a gap, `[M, D]` each; `M` are tokens.
pub(super) struct GapRows {
    /// What a map multiplies.
    pub read: Array2<f32>,
    /// The dense model's stream less the stream: what the map should give.
    pub rest: Array2<f32>,
    /// The dense model's stream.
    pub target: Array2<f32>,
    /// Number of sequences of one length that the rows are of, one after the other.
    pub sequences: usize,
}

/// RidgeSums over rows, and their solution.
pub(super) trait Fit: Send {
    /// Adds rows; `held_out` are for choices, where there are any.
    fn add(&mut self, rows: GapRows, held_out: bool);

    /// `None` where nothing brings the stream closer on what is held out.
    ///
    /// Errors: `Error::NotFinite` when a sum is not finite.
    fn solve(self: Box<Self>) -> Result<Option<GapChange>>;
}

/// Ridge regression over rows weighted by `1 / |t|^2`, of full rank or reduced to a rank.
struct Regression {
    fitted: RidgeSums,
    held_out: RidgeSums,
    rank: Option<usize>,
}

impl Regression {
    fn new(width: usize, rank: Option<usize>) -> Self {
        Regression { fitted: RidgeSums::new(width, width), held_out: RidgeSums::new(width, width), rank }
    }
}

impl Fit for Regression {
    fn add(&mut self, rows: GapRows, held_out: bool) {
        let GapRows { mut read, mut rest, target, .. } = rows;
        let lengths = target.rows().into_iter().map(|row| row.iter().map(|x| x * x).sum::<f32>().sqrt());
        for (place, length) in lengths.enumerate() {
            let scale = 1.0 / length.max(1e-6);
            read.row_mut(place).mapv_inplace(|value| value * scale);
            rest.row_mut(place).mapv_inplace(|value| value * scale);
        }
        let sums = if held_out { &mut self.held_out } else { &mut self.fitted };
        sums.add(&read, &rest);
    }

    fn solve(self: Box<Self>) -> Result<Option<GapChange>> {
        match self.rank {
            None => Ok(ridge::solve(self.fitted, &self.held_out)?.map(GapChange::Fold)),
            Some(rank) => {
                let factors = ridge::solve_reduced(self.fitted, &self.held_out, rank)?;
                Ok(factors.map(|(down, up)| GapChange::Bridge { down, up }))
            }
        }
    }
}

/// `mean over sequences and channels c of  mean_t |target_c| / mean_t |read_c|`. Nothing is chosen, so what is held out counts
/// like the rest. A channel that is 0 throughout a sequence does not count.
#[derive(Default)]
struct Magnitudes {
    sum: f64,
    count: u64,
}

impl Fit for Magnitudes {
    fn add(&mut self, rows: GapRows, _: bool) {
        let time = rows.read.nrows() / rows.sequences.max(1);
        if time == 0 {
            return;
        }
        let absolute = |values: ndarray::ArrayView2<f32>| {
            values.fold_axis(Axis(0), 0.0f64, |sum, value| sum + f64::from(value.abs()))
        };
        for (own, dense) in rows.read.axis_chunks_iter(Axis(0), time).zip(rows.target.axis_chunks_iter(Axis(0), time)) {
            let ratios = absolute(dense) / absolute(own);
            for ratio in ratios.into_iter().filter(|ratio| ratio.is_finite()) {
                self.sum += ratio;
                self.count += 1;
            }
        }
    }

    fn solve(self: Box<Self>) -> Result<Option<GapChange>> {
        let factor = self.sum / self.count as f64;
        Ok((factor.is_finite() && factor > 0.0).then_some(GapChange::Scale(factor)))
    }
}
