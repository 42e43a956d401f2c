//! ONNX Runtime sessions, generation with a KV cache, and the check that tract loads a graph.
//!
//! ```no_run
//! use interlace::base::Device;
//! use interlace::runtime::{Runtime, SessionOptions, TensorValue};
//!
//! let runtime = Runtime::new(Device::Cpu)?;
//! let mut session = runtime.session("embed_tokens.onnx".as_ref(), &SessionOptions::default())?;
//! let input_ids = TensorValue::new(&[1, 3], vec![5i64, 6, 7])?;
//! let outputs = session.run(&[("input_ids", &input_ids)], None)?;
//! println!("{:?}", outputs.get("inputs_embeds")?.shape());
//! # Ok::<(), interlace::base::Error>(())
//! ```

mod backing;
mod cuda_libraries;
mod decoder;
mod deepstack;
mod embedding;
mod features;
mod generate;
mod given;
mod inputs;
mod library;
mod likelihood;
mod logits;
mod model;
mod open;
mod pictures;
mod port;
mod positions;
mod profile;
mod projector;
mod pruned_prompt;
mod sampling;
mod session;
mod step;
mod tensor;
mod token_pruner;
mod tract;
mod vision;
mod vlm;

pub use decoder::{CacheSlot, Decoder, KvCache};
pub use deepstack::missing_deepstack;
pub use embedding::TokenEmbedding;
pub use features::{FeatureCache, Features};
pub use inputs::{Input, InputKind, Training, output_kind};
pub use library::keep_telemetry_off;
pub use likelihood::cross_entropy;
pub use logits::argmax_last;
pub use open::{content_digest, headed};
pub use port::Port;
pub use positions::multimodal_positions;
pub use profile::{NetworkTimes, Profile};
pub use projector::Unprojected;
pub use sampling::Sampler;
pub use session::{Binding, Optimisation, Outputs, Runtime, Session, SessionOptions};
pub use step::{Embedded, SideValues, Step};
pub use tensor::{TensorElement, TensorValue};
pub use token_pruner::{TokenPruner, check_token_pruning};
pub use tract::{InputFact, TractOutcome, tract_check, tract_run};
pub use vision::VisionEncoder;
pub use vlm::{TokenTypes, Vision, VlmSession, VlmSettings};

/// Name of the engine in error messages.
const ENGINE: &str = "ONNX Runtime";
