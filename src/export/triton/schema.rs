//! Messages of `model_config.proto`.

#![allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated from model_config.proto")]

include!(concat!(env!("OUT_DIR"), "/inference.rs"));
