//! Time profile of a run.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::Stopwatch;

/// Seconds of each part of a run. Other threads prepare pictures while the networks run, so that the parts may add up to
/// more than the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Profile {
    /// Reading rows, decoding and scaling pictures, tokenising: ahead, summed over threads.
    pub pictures_s: f64,
    /// Inside the vision encoder.
    pub vision_encoder_s: f64,
    /// Inside the token embedding.
    pub embedding_s: f64,
    /// Inside the decoder.
    pub decoder_s: f64,
    /// The networks had nothing to do because no sample was ready.
    pub waiting_s: f64,
    /// From the first sample to the last.
    pub total_s: f64,
}

/// Accumulated time in each of a model's networks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NetworkTimes {
    /// Inside the vision encoder and its projector.
    pub vision_encoder: Duration,
    /// Inside the token embedding.
    pub embedding: Duration,
    /// Inside the decoder.
    pub decoder: Duration,
}

impl Profile {
    /// The profile of a run that took `total`, from its networks' times before and after it.
    pub fn new(
        total: Duration,
        pictures: &Stopwatch,
        waiting: &Stopwatch,
        before: NetworkTimes,
        after: NetworkTimes,
    ) -> Self {
        let took = |part: fn(NetworkTimes) -> Duration| part(after).saturating_sub(part(before)).as_secs_f64();
        Profile {
            pictures_s: pictures.seconds(),
            vision_encoder_s: took(|times| times.vision_encoder),
            embedding_s: took(|times| times.embedding),
            decoder_s: took(|times| times.decoder),
            waiting_s: waiting.seconds(),
            total_s: total.as_secs_f64(),
        }
    }

    /// Names and seconds of the parts, for tables.
    pub fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("pictures and text, ahead on other threads", self.pictures_s),
            ("vision encoder", self.vision_encoder_s),
            ("embedding", self.embedding_s),
            ("decoder", self.decoder_s),
            ("waiting for data", self.waiting_s),
            ("in all", self.total_s),
        ]
    }
}
