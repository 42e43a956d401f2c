//! Checkpoints of a run, to resume it after a stop. Each checkpoint is a folder that is complete or absent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::base::{Error, Result, Sha256Digest, StagedDir, list_preview, read_json, write_json};

use crate::finetune::error::torch_error;
use crate::finetune::record::Totals;

const SCHEMA_VERSION: u32 = 1;
const STATE: &str = "state.json";
const TENSORS: &str = "tensors.safetensors";
const CHECKPOINT_FOLDER: &str = "checkpoints";
/// Name prefixes of cached outputs in a work folder.
const CACHES: &[&str] = &["hidden-", "stream-", "streams-", "answers-", "window"];

/// Start of the name of the folder, in a work folder, of a process other than the first.
const RANK: &str = "rank-";

/// State of a run at a checkpoint. The order of samples and the learning rate follow from the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    pub schema_version: u32,
    /// Optimiser steps done.
    pub step: u64,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// SHA-256 of each input that affects the result, by name (`model`, `data`, `settings`, ...).
    pub inputs: BTreeMap<String, Sha256Digest>,
    /// Fits, trials and sums over the steps done, for the final report.
    pub totals: Totals,
}

impl CheckpointState {
    /// The state at `step`, with the current schema version.
    pub fn new(step: u64, total_steps: u64, inputs: BTreeMap<String, Sha256Digest>, totals: Totals) -> Self {
        CheckpointState { schema_version: SCHEMA_VERSION, step, total_steps, inputs, totals }
    }
}

/// The checkpoints of one run: folders `step-00000042` inside one folder.
pub struct Checkpoints {
    folder: PathBuf,
    writes: bool,
}

impl Checkpoints {
    /// Opens `folder` and creates it when it is missing. When several processes share a folder, `writes` is true in one
    /// of them; in the others `save` and `clear` do nothing.
    ///
    /// Errors: `Error::Io` when the folder cannot be created.
    pub fn open(folder: &Path, writes: bool) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        Ok(Checkpoints { folder: folder.to_path_buf(), writes })
    }

    /// Writes a checkpoint, then removes the earlier ones. Returns the checkpoint's folder.
    ///
    /// Errors: `Error::Io`, `Error::Engine`. Earlier checkpoints remain when the write fails.
    pub fn save(&self, state: &CheckpointState, tensors: Vec<(String, Tensor)>) -> Result<PathBuf> {
        let target = self.folder.join(format!("step-{:08}", state.step));
        if !self.writes {
            return Ok(target);
        }
        // A run is in one state at each step, so a complete checkpoint of this step is this one.
        if target.join(STATE).exists() {
            return Ok(target);
        }
        let staged = StagedDir::create(&target)?;
        let path = staged.path().join(TENSORS);
        let host = |tensor: &Tensor| tensor.detach().f_to_device(Device::Cpu)?.f_contiguous();
        let tensors =
            tensors.into_iter().map(|(name, tensor)| Ok((name, host(&tensor)?))).collect::<Result<Vec<_>, _>>();
        let tensors = tensors.map_err(torch_error("a checkpoint"))?;
        Tensor::write_safetensors(&tensors, &path).map_err(torch_error("a checkpoint"))?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(|e| Error::io("write", &path, e))?;
        write_json(&staged.path().join(STATE), state)?;
        staged.commit()?;
        for (step, folder) in self.list()? {
            if step < state.step {
                fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
            }
        }
        Ok(target)
    }

    /// State and folder of the newest checkpoint; None without one.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when its state file is malformed.
    pub fn latest(&self) -> Result<Option<(CheckpointState, PathBuf)>> {
        match self.list()?.pop() {
            Some((_, folder)) => Ok(Some((read_json(&folder.join(STATE), SCHEMA_VERSION)?, folder))),
            None => Ok(None),
        }
    }

    /// Removes every checkpoint of the run. Call it after the result is written.
    ///
    /// Errors: `Error::Io`.
    pub fn clear(&self) -> Result<()> {
        if !self.writes {
            return Ok(());
        }
        for (_, folder) in self.list()? {
            fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
        }
        Ok(())
    }

    /// Step and folder of each checkpoint, in the order of steps.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = fs::read_dir(&self.folder).map_err(|e| Error::io("read", &self.folder, e))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read", &self.folder, e))?;
            let name = entry.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix("step-"));
            if let Some(step) = step.and_then(|step| step.parse().ok()) {
                found.push((step, entry.path()));
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The checkpoints in the work folder `work`; `writes` as in [`Checkpoints::open`].
///
/// Errors: `Error::Io`.
pub fn checkpoints(work: &Path, writes: bool) -> Result<Checkpoints> {
    Checkpoints::open(&work.join(CHECKPOINT_FOLDER), writes)
}

/// Totals of the newest checkpoint in a work folder; None without one.
///
/// Errors: as `Checkpoints::latest`.
pub fn newest_totals(work: &Path) -> Result<Option<Totals>> {
    let newest = checkpoints(work, false)?.latest()?;
    Ok(newest.map(|(state, _)| state.totals))
}

/// Step of the newest checkpoint in a work folder; None without one. Creates nothing.
///
/// Errors: `Error::Io`.
pub fn interrupted_at(work: &Path) -> Result<Option<u64>> {
    let folder = work.join(CHECKPOINT_FOLDER);
    if !folder.is_dir() {
        return Ok(None);
    }
    let found = Checkpoints { folder, writes: false }.list()?;
    Ok(found.last().map(|(step, _)| *step))
}

/// The folder in the work folder `work` for files that only the process `rank` reads: `work` itself for the first one.
pub fn folder_of_rank(work: &Path, rank: usize) -> PathBuf {
    match rank {
        0 => work.to_path_buf(),
        _ => work.join(format!("{RANK}{rank}")),
    }
}

/// Bytes of disk that the cached outputs of all processes take in a work folder; 0 where there is no such folder.
///
/// Errors: `Error::Io`.
pub fn cached_bytes(work: &Path) -> Result<u64> {
    let gone = |error: &std::io::Error| error.kind() == ErrorKind::NotFound;
    let entries = match fs::read_dir(work) {
        Err(error) if gone(&error) => return Ok(0),
        entries => entries.map_err(|e| Error::io("read", work, e))?,
    };
    let mut bytes = 0;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read", work, e))?;
        let (path, name) = (entry.path(), entry.file_name());
        let starts = |start: &str| name.to_string_lossy().starts_with(start);
        bytes += match fs::symlink_metadata(&path) {
            // Other processes rename files when these are complete.
            Err(error) if gone(&error) => 0,
            Err(error) => return Err(Error::io("read", &path, error)),
            Ok(found) if found.is_dir() && starts(RANK) => cached_bytes(&path)?,
            Ok(found) if found.is_file() && CACHES.iter().any(|start| starts(start)) => 512 * found.blocks(),
            Ok(_) => 0,
        };
    }
    Ok(bytes)
}

/// Removes checkpoints and caches (outputs of the frozen part, targets of the dense model) from a work folder and keeps
/// the metrics. Call it after the result is written.
///
/// Errors: `Error::Io`.
pub fn clear_work(work: &Path) -> Result<()> {
    checkpoints(work, true)?.clear()?;
    for entry in fs::read_dir(work).map_err(|e| Error::io("read", work, e))? {
        let path = entry.map_err(|e| Error::io("read", work, e))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if CACHES.iter().any(|start| name.starts_with(start)) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// Removes a work folder that holds only caches, as before the first step. Any other folder is left unchanged.
///
/// Errors: `Error::Io`.
pub fn remove_cache_only_folder(work: &Path) -> Result<()> {
    for entry in fs::read_dir(work).map_err(|e| Error::io("read", work, e))? {
        let name = entry.map_err(|e| Error::io("read", work, e))?.file_name();
        if !CACHES.iter().any(|start| name.to_string_lossy().starts_with(start)) {
            return Ok(());
        }
    }
    fs::remove_dir_all(work).map_err(|e| Error::io("remove", work, e))
}

/// Checks that a checkpoint belongs to a run with these inputs.
///
/// Errors: `Error::Invalid` with the names of the inputs that differ.
pub fn check_same_run(state: &CheckpointState, folder: &Path, inputs: &BTreeMap<String, Sha256Digest>) -> Result<()> {
    let names: BTreeSet<&String> = state.inputs.keys().chain(inputs.keys()).collect();
    let differing: Vec<&String> =
        names.into_iter().filter(|name| state.inputs.get(*name) != inputs.get(*name)).collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(unfit(folder, format!("was made by another run: {} differ", list_preview(&differing, 8))))
}

/// Copies a checkpoint's tensors into the tensors of the same names.
///
/// Errors: `Error::Invalid` when a tensor is missing, has another shape or type, or is not in `into`.
pub fn restore(folder: &Path, into: Vec<(String, Tensor)>) -> Result<()> {
    match restore_some(folder, into)?.into_iter().next() {
        Some(name) => Err(unfit(&folder.join(TENSORS), format!("holds `{name}`, which this run does not train"))),
        None => Ok(()),
    }
}

/// Copies a checkpoint's tensors into the tensors of `into` with the same names. Returns the names of the checkpoint's
/// other tensors.
///
/// Errors: `Error::Invalid` when a tensor of `into` is missing, or has another shape or type.
pub fn restore_some(folder: &Path, into: Vec<(String, Tensor)>) -> Result<Vec<String>> {
    let path = folder.join(TENSORS);
    let saved = Tensor::read_safetensors(&path).map_err(|e| unfit(&path, e.to_string()))?;
    let mut saved: HashMap<String, Tensor> = saved.into_iter().collect();
    for (name, into) in into {
        let saved = saved.remove(&name).ok_or_else(|| unfit(&path, format!("holds no `{name}`")))?;
        if saved.size() != into.size() || saved.kind() != into.kind() {
            let (found, want) = ((saved.size(), saved.kind()), (into.size(), into.kind()));
            return Err(unfit(&path, format!("`{name}` is {found:?}, expected {want:?}")));
        }
        let subject = format!("checkpoint `{}`", path.display());
        tch::no_grad(|| into.detach().f_copy_(&saved)).map_err(torch_error(subject))?;
    }
    Ok(saved.into_keys().collect())
}

/// An error about a checkpoint that this run cannot continue from.
fn unfit(path: &Path, problem: String) -> Error {
    Error::invalid(format!("checkpoint `{}`", path.display()), problem)
        .remedy("resume with the same model, data and settings, or remove the work folder to begin anew")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::optim::{OptimizedParameter, OptimizerKind};

    fn parameters() -> Vec<OptimizedParameter> {
        let parameter = OptimizedParameter::new(
            "/layers.3/w:0",
            Tensor::from_slice(&[0.1f32, -7.25, 3e-30]).view([3, 1]),
            OptimizerKind::AdamW,
        )
        .unwrap();
        for (name, mut tensor) in parameter.tensors() {
            match name.split('/').next() {
                Some("exp_avg") => drop(tensor.fill_(0.3)),
                Some("exp_avg_sq") => drop(tensor.fill_(1e-20)),
                _ => {}
            }
        }
        vec![parameter]
    }

    fn tensors(parameters: &[OptimizedParameter]) -> Vec<(String, Tensor)> {
        parameters.iter().flat_map(OptimizedParameter::tensors).collect()
    }

    fn state(step: u64) -> CheckpointState {
        CheckpointState::new(step, 10, BTreeMap::from([("data".to_string(), "ab".to_string())]), Totals::default())
    }

    fn bits(tensor: &Tensor) -> Vec<u32> {
        Vec::<f32>::try_from(tensor.detach().flatten(0, -1)).unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// The rows of all processes count, and nothing else; a file of another process may vanish while they are counted.
    #[test]
    fn the_cached_rows_of_all_processes_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("work");
        assert_eq!(cached_bytes(&work).unwrap(), 0);
        for (rank, name) in [(0, "hidden-a.f32"), (0, "metrics.jsonl"), (1, "answers-a.f32"), (12, "streams-a.bf16")] {
            let own = folder_of_rank(&work, rank);
            fs::create_dir_all(&own).unwrap();
            fs::write(own.join(name), vec![1; 100_000]).unwrap();
            File::open(own.join(name)).unwrap().sync_all().unwrap();
        }
        let found = cached_bytes(&work).unwrap();
        assert!((300_000..340_000).contains(&found), "{found}");
    }

    #[test]
    fn tensors_are_restored_bit_for_bit_and_old_checkpoints_removed() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path(), true).unwrap();
        assert!(checkpoints.latest().unwrap().is_none());
        let saved = parameters();
        checkpoints.save(&state(3), tensors(&saved)).unwrap();
        let path = checkpoints.save(&state(12), tensors(&saved)).unwrap();
        let linked = tempfile::tempdir().unwrap();
        assert_eq!(interrupted_at(linked.path()).unwrap(), None);
        std::os::unix::fs::symlink(folder.path(), linked.path().join(CHECKPOINT_FOLDER)).unwrap();
        assert_eq!(interrupted_at(linked.path()).unwrap(), Some(12));
        let written = || std::fs::metadata(path.join(TENSORS)).unwrap().modified().unwrap();
        let before = written();
        checkpoints.save(&state(12), tensors(&saved)).unwrap();
        assert_eq!(written(), before, "a crash between removal and writing would lose the checkpoint");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let (found, path) = checkpoints.latest().unwrap().unwrap();
        assert_eq!(found, state(12));

        let fresh = vec![
            OptimizedParameter::new(
                "/layers.3/w:0",
                Tensor::from_slice(&[0.0f32; 3]).view([3, 1]),
                OptimizerKind::AdamW,
            )
            .unwrap(),
        ];
        restore(&path, tensors(&fresh)).unwrap();
        let (saved, restored) = (tensors(&saved), tensors(&fresh));
        assert_eq!(saved.len(), restored.len());
        for ((name, a), (same, b)) in saved.iter().zip(&restored) {
            assert_eq!((name, bits(a)), (same, bits(b)));
        }
        assert!(fresh[0].value.requires_grad());
    }

    #[test]
    fn a_checkpoint_of_another_run_is_refused_with_the_differing_input() {
        let other = BTreeMap::from([("data".to_string(), "cd".to_string())]);
        let message = check_same_run(&state(1), Path::new("x"), &other).unwrap_err().to_string();
        assert!(message.contains("`data` differ"), "{message}");
        check_same_run(&state(1), Path::new("x"), &state(1).inputs).unwrap();
    }

    #[test]
    fn a_checkpoint_of_other_tensors_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path(), true).unwrap();
        let path = checkpoints.save(&state(1), tensors(&parameters())).unwrap();
        let with = |name: &str, count: i64| {
            vec![
                OptimizedParameter::new(
                    name,
                    Tensor::zeros([count, 1], (tch::Kind::Float, Device::Cpu)),
                    OptimizerKind::AdamW,
                )
                .unwrap(),
            ]
        };
        assert!(restore(&path, tensors(&with("other", 3))).unwrap_err().to_string().contains("holds no `value/other`"));
        assert!(restore(&path, tensors(&with("/layers.3/w:0", 4))).unwrap_err().to_string().contains("expected"));
        assert!(restore(&path, Vec::new()).unwrap_err().to_string().contains("does not train"));
        fs::write(path.join(TENSORS), b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").unwrap();
        let error = restore(&path, tensors(&parameters())).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().starts_with(&format!("checkpoint `{}`: ", path.join(TENSORS).display())), "{error}");
    }
}
