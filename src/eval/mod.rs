//! Benchmarks, perplexity, retention against a baseline, speed, and verification of a model's files.

mod activations;
mod agreement;
mod bench;
mod bodies;
mod chat;
mod checks;
mod device;
mod exact;
mod figures;
mod judge;
mod metrics;
mod mia;
mod perplexity;
mod pixels;
mod probe;
mod prompt;
mod quantised;
mod report;
mod run;
mod stage_times;
mod stats;
mod summary;
mod text;
mod verify;

pub use activations::{activation_checks, is_measured};
pub use bench::{
    BenchOptions, BenchReport, MOST_COUNT, MemoryProbe, ModelBench, Speedup, bench, peak_memory, peak_memory_of_child,
};
pub use chat::{ChatQuestion, JUDGE_KEY, Judge};
pub use checks::{Check, CheckStatus, VerifyReport};
pub use device::DeviceLimits;
pub use judge::{Reference, read_yes_no};
pub use metrics::{Judged, METRICS, Metric, QuestionKind, metric_for, metric_named, metric_of, needs_judge};
pub use perplexity::{SequenceLoss, TextReport, TextScores, kept_perplexity, perplexity};
pub use prompt::{PROMPT_STYLES, PromptStyle, question_text, reference_of, right_answer};
pub use report::{
    Answer, EvalReport, EvalTiming, GroupRetention, GroupScore, Likelihood, ModelScores, QuestionLikelihood, Retention,
};
pub use run::{EvalOptions, LoadedModel, benchmark_name, evaluate, evaluate_with_peers, judge_predictions};
pub use stage_times::{PictureSettings, StageOptions, StageTimes, stage_times};
pub use stats::{Difference, Interval, PairedComparison, RESAMPLES, Spread, kept_likelihood};
pub use summary::{compare, compare_over};
pub use verify::{LOADED_TARGETS, verify, verify_on};
