//! Triton's rules for a model's configuration, checked before writing.
//!
//! Source: `ValidateModelConfig` and `ValidateModelInput` in the server's core (`model_config_utils.cc`).

use std::collections::HashSet;

use crate::base::{Error, Result};

use super::schema::{DataType, ModelConfig, ModelTensorReshape};

const EDIT: &str = "change the graph's inputs and outputs, or export without this component";

/// Rejects a configuration that the server would reject.
///
/// Errors: `Error::Unsupported` naming the model or the tensor and the rule.
pub(super) fn check(config: &ModelConfig) -> Result<()> {
    let model = |problem: &str| {
        Error::unsupported(format!("model `{}` in a Triton repository", config.name), problem).remedy(EDIT)
    };
    if config.max_batch_size < 0 {
        return Err(model("has a batch size below 0").remedy("give `--max-batch-size` of 0 or more"));
    }
    if config.input.is_empty() || config.output.is_empty() {
        return Err(model("has no inputs or no outputs, and the server asks for both"));
    }
    let mut names = HashSet::new();
    let inputs = config.input.iter().map(|port| (&port.name, port.data_type, &port.dims, &port.reshape));
    let outputs = config.output.iter().map(|port| (&port.name, port.data_type, &port.dims, &port.reshape));
    for (name, data_type, dims, reshape) in inputs.chain(outputs) {
        if !names.insert(name) {
            return Err(model(&format!("has `{name}` twice among its inputs and outputs")));
        }
        tensor(data_type, dims, reshape.as_ref(), config.max_batch_size > 0)
            .map_err(|problem| Error::unsupported(format!("`{name}` in a Triton repository"), problem).remedy(EDIT))?;
    }
    Ok(())
}

fn tensor(data_type: i32, dims: &[i64], reshape: Option<&ModelTensorReshape>, batched: bool) -> Result<(), String> {
    if data_type == DataType::TypeInvalid as i32 {
        return Err("has no element type".into());
    }
    if dims.is_empty() {
        return Err("has no dimensions".into());
    }
    if let Some(dim) = dims.iter().find(|dim| **dim != -1 && **dim < 1) {
        return Err(format!("has a dimension of {dim}; the server takes sizes from 1 on, or -1 where a size is free"));
    }
    let Some(reshape) = reshape else { return Ok(()) };
    if reshape.shape.is_empty() && !batched {
        return Err("is a scalar, which the server does not have for models that it does not batch".into());
    }
    let elements = |dims: &[i64]| dims.iter().filter(|dim| **dim > 0).product::<i64>();
    if elements(dims) != elements(&reshape.shape) {
        return Err(format!("would be reshaped from {dims:?} to {:?}, which hold different numbers", reshape.shape));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dims_and_reshapes_that_triton_refuses_are_refused() {
        let scalar = ModelTensorReshape { shape: Vec::new() };
        let two = ModelTensorReshape { shape: vec![2] };
        for (dims, reshape, batched, want) in [
            (&[-1, 64][..], None, false, None),
            (&[1], Some(&scalar), true, None),
            (&[1], Some(&scalar), false, Some("scalar")),
            (&[], None, false, Some("no dimensions")),
            (&[-1, 0], None, false, Some("dimension of 0")),
            (&[-2], None, true, Some("dimension of -2")),
            (&[1], Some(&two), true, Some("different numbers")),
        ] {
            let found = tensor(DataType::TypeFp32 as i32, dims, reshape, batched).err();
            assert_eq!(found.is_some(), want.is_some(), "{dims:?}: {found:?}");
            assert!(found.unwrap_or_default().contains(want.unwrap_or_default()), "{dims:?}");
        }
        let found = tensor(DataType::TypeInvalid as i32, &[1], None, false);
        assert_eq!(found, Err("has no element type".to_string()));
    }
}
