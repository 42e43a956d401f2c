//! Benchmarks, what is left of a baseline, speed, and whether a model's files are what they claim.

mod metrics;
mod stats;
mod text;

pub use metrics::{METRICS, Metric, Reference, metric_for, says_yes};
pub use stats::{Interval, Pair, RESAMPLES, Spread, retention};
