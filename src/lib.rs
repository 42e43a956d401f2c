//! Prune, heal and ship vision-language models as ONNX graphs.

pub mod base;
pub mod ir;
