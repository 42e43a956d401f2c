//! Rows that are computed on demand and not kept, for runs that read every sample once and for data whose rows do not
//! fit on disk.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::base::{Cancel, Error, Result, sha256_json};
use crate::finetune::cut::SideInputs;
use crate::finetune::plan::WINDOW_BYTES;

use super::batch::TrainingSet;
use super::frozen_part::{LazySession, RowStore};
use super::rows::RowDtype;
use super::source::Source;
use super::teacher::{Chosen, Frozen, Running, TeacherTargets};

/// Folder of the loaded rows, inside the work folder.
pub const WINDOW_FOLDER: &str = "window";

/// Computes rows of samples on demand.
pub trait Loads: Sync {
    /// Replaces the loaded rows of `dataset` by those of `samples`.
    ///
    /// Errors: those of the samples and runs; `Error::Interrupted`.
    fn load(&self, dataset: &mut TrainingSet, samples: &[usize]) -> Result<()>;

    /// Limit on the tokens that are computed together. A step with more tokens is computed whole.
    fn tokens(&self) -> usize;

    /// Frees the models until rows are computed again.
    fn release(&self);
}

/// Computes the frozen layers' output and the dense model's targets for some samples at a time.
pub struct Streamed<'a> {
    source: &'a dyn Source,
    side: SideInputs,
    stream: RowDtype,
    /// The dense model, and the frozen layers' output when the dense model computes it too.
    targets: Option<(&'a TeacherTargets<'a>, Option<Frozen>)>,
    embeds_only: bool,
    max_tokens: usize,
    folder: PathBuf,
    cancel: &'a Cancel,
    models: Mutex<Models<'a>>,
    tokens: usize,
}

/// Models, loaded on first use.
struct Models<'a> {
    prefix: LazySession<'a>,
    dense: Option<Running<'a>>,
}

/// Arguments of [`Streamed::new`].
pub struct StreamedParts<'a> {
    pub source: &'a dyn Source,
    /// Side inputs of the suffix.
    pub side: SideInputs,
    /// Type of the rows of the residual stream before the first trained layer.
    pub stream: RowDtype,
    /// The frozen layers.
    pub prefix: LazySession<'a>,
    /// True when the embeddings are the residual stream before the first trained layer.
    pub embeds_only: bool,
    /// The dense model, when a loss term reads outputs of it that are not on disk.
    pub targets: Option<&'a TeacherTargets<'a>>,
    /// The stream before the first trained layer as a value of the dense model, when the dense model computes it.
    pub frozen: Option<Frozen>,
    pub max_tokens: usize,
    /// The run's work folder.
    pub work: PathBuf,
    pub cancel: &'a Cancel,
    /// Bytes of all rows of one token.
    pub bytes_per_token: u64,
}

impl<'a> Streamed<'a> {
    /// Loads no model yet.
    pub fn new(parts: StreamedParts<'a>) -> Self {
        let StreamedParts { source, side, stream, prefix, embeds_only, targets, frozen, .. } = parts;
        let targets = targets.filter(|targets| !targets.files().is_empty()).map(|targets| (targets, frozen));
        let dense = targets.map(|(targets, frozen)| targets.running(frozen));
        let tokens = (WINDOW_BYTES / parts.bytes_per_token.max(1)).max(1) as usize;
        let models = Mutex::new(Models { prefix, dense });
        let folder = parts.work.join(WINDOW_FOLDER);
        let (max_tokens, cancel) = (parts.max_tokens, parts.cancel);
        Streamed { source, side, stream, targets, embeds_only, max_tokens, folder, cancel, models, tokens }
    }
}

impl Loads for Streamed<'_> {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn release(&self) {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.prefix.release();
        models.dense.iter_mut().for_each(Running::release);
    }

    fn load(&self, dataset: &mut TrainingSet, samples: &[usize]) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::io("create", &self.folder, e))?;
        let mut numbers: Vec<u64> = samples.iter().map(|&sample| dataset.examples[sample].number).collect();
        numbers.sort_unstable();
        let source = Chosen { source: self.source, numbers };
        let key = sha256_json(&"rows at hand")?;
        let store = RowStore::new(&self.folder, &key, self.side.clone(), self.stream);
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let Models { prefix, dense } = &mut *models;
        let files = self.targets.map(|(targets, _)| targets.files().in_folder(&self.folder));
        let mut found = None;
        if let (Some((targets, frozen)), Some(files), Some(dense)) = (self.targets, &files, dense) {
            let frozen = frozen.map(|frozen| (frozen, &store));
            found = targets.fill(&source, files, frozen, dense, "", self.cancel)?;
        }
        let (mut set, _) = match found {
            Some(found) => found,
            None => store.fill(&source, "", prefix, self.embeds_only, self.max_tokens, self.cancel)?,
        };
        if let (Some((targets, _)), Some(files)) = (self.targets, &files) {
            set.set_targets(targets.open(files, &set.examples, set.hidden_size())?);
        }
        dataset.put(samples, set)
    }
}
