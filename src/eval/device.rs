//! Whether a device with a largest buffer, such as WebGPU's, can run a graph.

use crate::base::{Result, human_bytes};
use crate::bundle::{Bundle, Component};
use crate::ir::{Model, WEBGPU_BUFFER_BYTES, large_constants};
use crate::onnx;
use crate::rewrite::casts_wide_positions;
use crate::runtime::Port;

use super::checks::{CheckStatus, Checks};

/// What every WebGPU device binds to a shader: `maxStorageBufferBindingSize` of the specification.
const EVERY_WEBGPU_BYTES: u64 = 128 << 20;

/// What the device has on which a model is to run.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLimits {
    /// Bytes of the largest buffer.
    pub max_buffer: u64,
    /// True for WebGPU.
    pub webgpu: bool,
}

impl DeviceLimits {
    /// The limits that a user asks for; `None` without a request.
    pub fn new(max_buffer: Option<u64>, webgpu: bool) -> Option<Self> {
        let max_buffer = max_buffer.or(webgpu.then_some(WEBGPU_BUFFER_BYTES))?;
        Some(DeviceLimits { max_buffer, webgpu })
    }
}

/// Checks a graph against a device.
///
/// Errors: as `onnx::load`.
pub(super) fn device(bundle: &Bundle, part: &Component, limits: DeviceLimits, checks: &mut Checks) -> Result<()> {
    let model = onnx::load(&bundle.path_of(part))?;
    buffers(part, &model, limits, checks);
    if limits.webgpu && part.role.is_decoder() {
        positions(part, &model, checks);
        logits(part, &model, limits.max_buffer, checks);
    }
    Ok(())
}

/// No constant has more bytes than a buffer.
fn buffers(part: &Component, model: &Model, limits: DeviceLimits, checks: &mut Checks) {
    let large = large_constants(model, limits.max_buffer);
    let limit = human_bytes(limits.max_buffer);
    let (status, detail) = match large.is_empty() {
        true => {
            let beyond = large_constants(model, EVERY_WEBGPU_BYTES).into_iter().map(|(_, size)| size).max();
            let devices = match (limits.webgpu, beyond) {
                (false, _) => String::new(),
                (true, None) => "; every WebGPU device binds them".to_string(),
                (true, Some(size)) => format!("; it needs a device with maxStorageBufferBindingSize of {size} or more"),
            };
            (CheckStatus::Passed, format!("no initializer is larger than {limit}{devices}"))
        }
        false => {
            let large: Vec<String> =
                large.iter().map(|(name, size)| format!("{name} {}", human_bytes(*size))).collect();
            let detail = format!("larger than {limit}: {}; `export --max-buffer` splits them", large.join(", "));
            (CheckStatus::Failed, detail)
        }
    };
    checks.add("buffers", &part.file, status, detail);
}

/// Positions do not become floats on the processor.
fn positions(part: &Component, model: &Model, checks: &mut Checks) {
    let (status, detail) = match casts_wide_positions(model) {
        false => (CheckStatus::Passed, "no positions in int64 become floats on the processor"),
        true => (
            CheckStatus::Failed,
            "`position_ids` become floats on the processor and may be read too early: logits may be wrong; `export --to webgpu` \
             casts them to int32 first",
        ),
    };
    checks.add("webgpu positions", &part.file, status, detail.to_string());
}

/// The largest prompt whose logits fit into a buffer.
fn logits(part: &Component, model: &Model, limit: u64, checks: &mut Checks) {
    let graph = &model.graph;
    let Some(port) = graph.output("logits").and_then(|id| Port::of_value(graph, id)) else { return };
    let Some(width) = port.width() else { return };
    let row = port.dtype.byte_len(width as u64).unwrap_or(4 * width as u64);
    let detail = format!("logits of a prompt of {} tokens fill {}", limit / row.max(1), human_bytes(limit));
    checks.add("webgpu logits", &part.file, CheckStatus::Passed, detail);
}
