//! Sizes of outputs as ONNX Runtime finds them.
//!
//! Triton's back end compares them with the configuration, and a size that ONNX Runtime infers must not be -1 there
//! (`ModelInstanceState::ValidateOutputs` of triton-inference-server/onnxruntime_backend).

use crate::base::{Device, Result};
use crate::ir::{Dim, Model, ValueType};
use crate::runtime::{Runtime, SessionOptions};

/// Notes in the graph the sizes that ONNX Runtime infers for its outputs, where the graph leaves them free. A runtime that infers
/// fewer sizes takes the noted ones.
///
/// Errors: as `Runtime::session_of`.
pub(super) fn note_inferred(model: &mut Model) -> Result<()> {
    let session = Runtime::new(Device::Cpu)?.session_of(model, &SessionOptions::default())?;
    let graph = &mut model.graph;
    for &id in &graph.body.outputs {
        let value = &mut graph.values[id.index()];
        let Some(found) = session.output(&value.name) else { continue };
        let Some(ValueType::Tensor { shape: Some(shape), .. }) = &mut value.ty else { continue };
        for (own, found) in shape.iter_mut().zip(&found.shape) {
            if matches!(found, Dim::Known(_)) && own != found {
                *own = found.clone();
            }
        }
    }
    Ok(())
}
