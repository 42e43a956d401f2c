//! Planning of a run: order of steps, memory, disk and targets, computed before the run begins.

mod activations;
mod items;
mod limits;
pub mod order;
mod planned;
mod points;
mod run_plan;
mod sessions;
mod sizes;
mod step_range;

pub use limits::{Limits, MOST_BATCH_TOKENS};
pub use order::StepSamples;
pub use planned::{KeptRows, PlannedBytes, PlannedConnector, PlannedData};
pub use points::{Point, anchor_points, points};
pub use run_plan::{PlanInputs, RunPlan};
pub use sessions::{Sessions, session_bytes};
pub use sizes::Sizes;
pub use step_range::{StepRange, TrialPlan};

/// Bytes of rows that a streamed run computes and holds at once.
pub const WINDOW_BYTES: u64 = 64 << 20;
/// Bytes of a process with nothing loaded: code, graph, file buffers.
pub const PROCESS_BYTES: u64 = 250 << 20;
/// Bytes of a GPU that a process takes before it has a weight there: the CUDA context with the libraries' kernels, and the
/// workspaces of cuBLAS for LibTorch and ONNX Runtime. Estimated from their documentation; no GPU has measured it.
pub const CUDA_BYTES: u64 = 640 << 20;
/// Maximum number of tokens of a forward pass of a fit, padding included; a longer sample forms a pass of its own. It is
/// independent of `batch_tokens`, so the fit does not depend on how steps are cut into passes.
pub const FIT_PASS_TOKENS: usize = 512;
/// Limit on the logits of one run of the dense model, in bytes.
pub const LOGIT_BYTES: u64 = 256 << 20;
/// Maximum number of tokens that a fit uses.
pub const FIT_TOKENS: u64 = 1 << 17;

/// Largest number of elements of a fit's normal matrices, and of all gradients, that are summed in f64; more are summed in
/// f32.
const MOST_DOUBLE: u64 = 1 << 24;

/// Bytes per element of the sum of several passes' gradients of `elements` trained numbers: 8 (f64) makes the sum
/// independent of how passes are distributed over processes; 4 (f32) limits memory.
pub fn gradient_sum_bytes(elements: u64) -> u64 {
    if elements <= MOST_DOUBLE { 8 } else { 4 }
}

/// Bytes per element of the normal matrices of a product with a `[k, d]` weight. 8 (f64) makes the sums independent of
/// how passes are distributed over processes; 4 (f32) limits memory when the matrices have more than `MOST_DOUBLE`
/// elements.
pub fn sum_bytes(k: u64, d: u64) -> u64 {
    if k * (k + d) <= MOST_DOUBLE { 8 } else { 4 }
}
