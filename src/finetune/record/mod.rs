//! Records of a run: metrics of each step, and totals.

mod events;
mod metrics;
mod totals;

pub use events::EventWriter;
pub use metrics::{METRICS_FILE, MetricsWriter, StepMetrics, read_metrics};
pub use totals::{LayerFit, RateTrial, Totals, best};
