//! ONNX Runtime sessions, generation with a KV cache, and the check that tract loads a graph.
//!
//! ```no_run
//! use interlace::base::Device;
//! use interlace::runtime::{Runtime, SessionOptions, Tensor};
//!
//! let runtime = Runtime::new(Device::Cpu)?;
//! let mut session = runtime.session("embed_tokens.onnx".as_ref(), &SessionOptions::default())?;
//! let input_ids = Tensor::new(&[1, 3], vec![5i64, 6, 7])?;
//! let outputs = session.run(&[("input_ids", &input_ids)], None)?;
//! println!("{:?}", outputs.get("inputs_embeds")?.shape());
//! # Ok::<(), interlace::base::Error>(())
//! ```

mod decoder;
mod library;
mod likelihood;
mod model;
mod open;
mod positions;
mod session;
mod tensor;
mod tract;
mod vision;
mod vlm;

pub use decoder::{CacheSlot, Decoder, KvCache, Step, StepTokens};
pub use library::keep_telemetry_off;
pub use likelihood::cross_entropy;
pub use positions::{multimodal_positions, positions_of_mask};
pub use session::{Optimisation, Outputs, Port, Runtime, Session, SessionOptions};
pub use tensor::{Element, Tensor};
pub use tract::{InputFact, TractOutcome, tract_check};
pub use vision::{FeatureCache, Features, VisionEncoder};
pub use vlm::{Embedded, VlmSession, VlmSettings, argmax_last};

/// How error messages name the engine.
const ENGINE: &str = "ONNX Runtime";
