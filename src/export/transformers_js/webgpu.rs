//! What WebGPU demands of a graph besides transformers.js.

use crate::base::{Error, Result};
use crate::bundle::Component;
use crate::ir::{Body, DataType, Model};
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
    if has_bfloat16(&model.graph.body) {
        let problem = "has weights in bfloat16, which WebGPU's shaders lack";
        return Err(refused(problem).remedy("choose another variant with `--variant`, or write one with `--precision`"));
    }
    Ok(())
}

fn has_bfloat16(body: &Body) -> bool {
    let half = |(_, tensor): &(_, crate::ir::Tensor)| tensor.dtype == DataType::Bfloat16;
    body.initializers.iter().any(half) || body.nodes.iter().flat_map(|node| node.bodies()).any(has_bfloat16)
}
