//! What WebGPU demands of a graph besides transformers.js.

use crate::base::{Error, Result, list_preview};
use crate::bundle::Component;
use crate::ir::{DataType, Model, of_type};
use crate::rewrite::casts_wide_positions;

/// transformers.js' name of the device.
pub(super) const DEVICE: &str = "webgpu";

/// Errors: `Error::Unsupported` for positions that are read too early, and for bfloat16.
pub(super) fn check(component: &Component, model: &Model) -> Result<()> {
    let refused = |problem: &str| Error::unsupported(format!("`{}` on WebGPU", component.file), problem);
    if casts_wide_positions(model) {
        let problem = "computes with `position_ids` in int64 before it casts them to floats, which ONNX Runtime Web's back end \
                       does on the processor and may read too early";
        return Err(
            refused(problem).remedy("cast them in the exporter before anything else, or use `--to transformers-js`")
        );
    }
    let half = of_type(model, DataType::Bfloat16);
    if !half.is_empty() {
        let problem = format!("has bfloat16, which WebGPU's shaders lack: {}", list_preview(&half, 4));
        return Err(
            refused(&problem).remedy("choose another variant with `--variant`, or write one with `--precision`")
        );
    }
    Ok(())
}
