//! What a run is made of, decided before it begins.

mod activations;
mod limits;
pub mod order;
mod part;
mod planned;
mod points;
mod run_plan;
mod sizes;

pub use limits::Limits;
pub use order::Step;
pub use part::{Part, TrialPlan};
pub use planned::{PlannedBytes, PlannedData};
pub use points::{Point, anchor_points, points};
pub use run_plan::{Facts, RunPlan};
pub use sizes::Sizes;

/// Bytes of rows that are computed together where they are not kept.
pub const WINDOW_BYTES: u64 = 64 << 20;
/// Most tokens that a fit looks at.
pub const FIT_TOKENS: u64 = 1 << 17;

/// Normal matrices with more numbers than this are kept in f32.
const MOST_DOUBLE: u64 = 1 << 24;

/// Bytes of each number of the normal matrices of a product that reads `k` numbers and gives `d`: 8, with which the sums do not
/// depend on how passes are dealt out to processes, unless that takes much memory.
pub fn sum_bytes(k: u64, d: u64) -> u64 {
    if k * (k + d) <= MOST_DOUBLE { 8 } else { 4 }
}
