//! Benchmarks, perplexity, what is left of a baseline, speed, and whether a model's files are what they claim.

mod agreement;
mod bench;
mod checks;
mod exact;
mod figures;
mod metrics;
mod perplexity;
mod probe;
mod prompt;
mod quantised;
mod report;
mod run;
mod stats;
mod text;
mod verify;

pub use bench::{
    BenchOptions, BenchReport, MemoryProbe, ModelBench, Speedup, bench, peak_memory, peak_memory_of_child,
};
pub use checks::{Check, CheckStatus, VerifyReport};
pub use metrics::{METRICS, Metric, Reference, metric_for, metric_of, says_yes};
pub use perplexity::{SequenceLoss, TextReport, TextScores, kept_perplexity, perplexity};
pub use prompt::{question_text, reference_of};
pub use report::{Answer, EvalReport, EvalTiming, GroupRetention, GroupScore, ModelScores, Retention, YesNoScores};
pub use run::{EvalOptions, LoadedModel, benchmark_name, compare, evaluate};
pub use stats::{Interval, Pair, RESAMPLES, Spread, retention};
pub use verify::{verify, verify_on};
