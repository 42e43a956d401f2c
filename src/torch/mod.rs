//! The ONNX interpreter on LibTorch: compiles a graph to a program of differentiable tensor operations.
//!
//! ```no_run
//! use interlace::{ir, torch};
//! # fn main() -> interlace::base::Result<()> {
//! # let model = ir::Model::default();
//! let weight = model.graph.body.initializers[0].0;
//! let options = torch::Options { trainable: vec![weight], ..Default::default() };
//! let program = torch::Program::compile(&model, &options)?;
//! let input = program.value("inputs_embeds")?;
//! let logits = program.value("logits")?;
//! let x = tch::Tensor::zeros([1, 4, 64], tch::kind::FLOAT_CPU);
//! let out = program.run(&[(input, x)], &[logits])?;
//! out[0].sum(tch::Kind::Float).backward();
//! let gradient = program.parameters()[0].tensor.grad();
//! # Ok(())
//! # }
//! ```
//!
//! A run can start and end at any value: [`Program::run`] takes tensors for any set of values and computes any other
//! set from them. Gradient checkpointing and the removal of a frozen prefix use this. Values that depend on shapes only
//! (masks, reshape targets) are computed once per set of input shapes and cached within a memory limit.

mod attributes;
mod bodies;
mod compile;
mod convert;
mod device;
mod host_reads;
mod kernel;
mod library;
mod memory;
mod op_error;
mod operator;
mod ops;
mod options;
mod precision;
mod products;
mod program;
mod ranks;
mod schedule;
mod step;
mod sub_graph;
mod table;
mod weights;
mod wiring;

pub use convert::{data_type_of, kind_of, read_npz, tensor_from_ir, tensor_to_ir};
pub use device::{cpu_lacks_bf16, cuda_device, cuda_device_count};
pub use memory::{free_gpu_memory, peak_gpu_memory, pinned, release_cached};
pub use operator::Operator;
pub use options::Options;
pub use precision::MixedPrecision;
pub use program::{Parameter, Program};
pub use ranks::Ranks;
pub use table::{find_operator, operators, support_table};
pub use weights::Hold;

#[cfg(test)]
mod gradient_tests;
#[cfg(test)]
mod tests;
