//! Whether a device with a largest buffer, such as WebGPU's, can run a graph.

use std::path::Path;

use crate::base::{Cancel, Result, human_bytes, list_preview};
use crate::bundle::{Bundle, Component, ExportManifest};
use crate::ir::{DataType, Model, WEBGPU_BUFFER_BYTES, large_constants, of_type};
use crate::onnx;
use crate::rewrite::casts_wide_positions;
use crate::runtime::Runtime;

use super::activations::{ACTIVATIONS, activations};
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
/// Errors: as `onnx::load`; `Error::Interrupted`.
pub(super) fn device(
    bundle: &Bundle,
    part: &Component,
    limits: DeviceLimits,
    runtime: &Runtime,
    cancel: &Cancel,
    checks: &mut Checks,
) -> Result<()> {
    let model = onnx::load(&bundle.path_of(part))?;
    buffers(&part.file, &model, limits, checks);
    activations(bundle, part, limits.max_buffer, runtime, cancel, checks)?;
    if limits.webgpu {
        types(&part.file, &model, checks);
    }
    if limits.webgpu && part.role.is_decoder() {
        positions(part, &model, checks);
    }
    Ok(())
}

/// Checks the graphs of an export that is no model folder: their constants, and for WebGPU their types. What they compute is not
/// measured, which a check says.
///
/// Errors: `Error::Interrupted`. A graph that cannot be read fails.
pub(super) fn device_of_export(
    folder: &Path,
    manifest: &ExportManifest,
    limits: DeviceLimits,
    cancel: &Cancel,
    checks: &mut Checks,
) -> Result<()> {
    for file in manifest.files.keys().filter(|file| file.ends_with(".onnx")) {
        cancel.check("no report is written")?;
        match onnx::load(&folder.join(file)) {
            Ok(model) => {
                buffers(file, &model, limits, checks);
                if limits.webgpu {
                    types(file, &model, checks);
                }
            }
            Err(error) => checks.error("buffers", file, &error),
        }
    }
    let detail = "graphs of this target are not run here: verify the folder that it was made from with the same flags";
    checks.add(ACTIVATIONS, &manifest.target, CheckStatus::Unavailable, detail);
    Ok(())
}

/// No constant has more bytes than a buffer.
fn buffers(file: &str, model: &Model, limits: DeviceLimits, checks: &mut Checks) {
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
    checks.add("buffers", file, status, detail);
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

/// Nothing is in bfloat16, which WebGPU's shaders lack.
fn types(file: &str, model: &Model, checks: &mut Checks) {
    let half = of_type(model, DataType::Bfloat16);
    let (status, detail) = match half.is_empty() {
        true => (CheckStatus::Passed, "nothing is in bfloat16".to_string()),
        false => {
            let detail = format!(
                "WebGPU has no bfloat16: {}; `export --precision` writes other variants of the float model",
                list_preview(&half, 6)
            );
            (CheckStatus::Failed, detail)
        }
    };
    checks.add("webgpu types", file, status, detail);
}
