//! Prune, heal and ship vision-language models as ONNX graphs.

#![warn(missing_docs)]
#![warn(clippy::too_many_lines)]

pub mod analysis;
pub mod base;
pub mod bundle;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod eval;
pub mod export;
#[allow(clippy::too_many_lines)]
pub mod finetune;
pub mod graft;
pub mod hub;
pub mod ir;
pub mod method;
pub mod onnx;
pub mod pipeline;
pub mod prompt;
pub mod quantised;
pub mod report;
pub mod rewrite;
pub mod runtime;
pub mod torch;
