//! What decides a run besides the network and the samples.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Device;

use crate::base::{Cancel, Sha256Digest};
use crate::finetune::settings::Settings;

use super::dense::DenseStream;

/// What decides a run besides the network and the samples.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub settings: &'a Settings,
    pub device: Device,
    /// Most tokens of one forward pass, padding included, longer samples aside.
    pub batch_tokens: usize,
    /// Threads of each network's own.
    pub threads: usize,
    /// The dense model, for fits.
    pub dense: Option<&'a dyn DenseStream>,
    /// The first trained layer, as the pruned model counts.
    pub first: usize,
    /// SHA-256 of what decides the result, by what it is; a checkpoint of other inputs is refused.
    pub inputs: &'a BTreeMap<String, Sha256Digest>,
    /// Folder for checkpoints and metrics.
    pub work: &'a Path,
    /// Goes on from the newest checkpoint in `work`, if there is one.
    pub resume: bool,
    pub cancel: &'a Cancel,
}
