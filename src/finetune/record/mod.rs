//! What a run writes down while it goes.

mod events;
mod metrics;
mod totals;

pub use events::EventWriter;
pub use metrics::{METRICS_FILE, MetricsWriter, StepMetrics, read_metrics};
pub use totals::{LayerFit, RateTrial, Totals, best};
