//! Cached steps: the SHA-256 over a step's inputs and settings identifies its output.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{
    Error, FolderLock, LOCK_FILE, Result, Sha256Digest, read_json, resolved_path, sha256_file, sha256_json, write_json,
};
use crate::bundle::{ModelSource, Variants};

/// Name of the file with the record of finished steps.
pub const STATE_FILE: &str = "state.json";
const STATE_SCHEMA_VERSION: u32 = 1;

/// `state.json`: the finished steps of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Version of the schema of `state.json`.
    pub schema_version: u32,
    /// Finished steps by name.
    pub steps: BTreeMap<String, StepState>,
    /// The file or folder of the step that is running. One that a killed run left is removed by the next run of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begun: Option<String>,
}

/// Record of a finished step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepState {
    /// SHA-256 over tool version, step, inputs and settings.
    pub key: Sha256Digest,
    /// The file or folder that it made, in the run's folder.
    pub output: String,
    /// SHA-256 of the file, or over the files of the folder.
    pub digest: Sha256Digest,
    /// Wall-clock time of the step when it ran.
    pub seconds: f64,
    /// True when the output was removed after later steps had read it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
}

/// A run's folder and its finished steps. No other process can open the folder meanwhile.
pub struct RunStore {
    folder: PathBuf,
    state: RunState,
    /// The variants of the run's model, which its digest does not tell apart; a part of every key.
    variants: Option<String>,
    _lock: FolderLock,
}

/// A step's output, new or from an earlier run.
#[derive(Clone, Debug)]
pub struct Finished {
    /// File or folder that the step made.
    pub path: PathBuf,
    /// SHA-256 of the file, or over the files of the folder.
    pub digest: Sha256Digest,
    /// True when it is from an earlier run.
    pub reused: bool,
    /// Variants to run of a model that no step made.
    pub variants: Option<Variants>,
}

impl Finished {
    /// The model that the step made.
    pub fn model(&self) -> ModelSource {
        ModelSource::new(&self.path, self.variants.clone())
    }
}

#[derive(Serialize)]
struct Key<'a, S> {
    tool: &'static str,
    step: &'a str,
    inputs: &'a [(&'a str, &'a str)],
    settings: &'a S,
    #[serde(skip_serializing_if = "Option::is_none")]
    variants: Option<&'a str>,
}

impl RunStore {
    /// Opens the folder of a run; it may be new or hold an earlier run.
    ///
    /// Errors: `Error::Io` when it cannot be created; `Error::Invalid` when it holds anything else than a run, another
    /// process works in it, or its record is malformed or names an output outside of it.
    pub fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let path = folder.join(STATE_FILE);
        if !path.exists() {
            for entry in fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))? {
                if entry.map_err(|e| Error::io("read", folder, e))?.file_name() != LOCK_FILE {
                    return Err(Error::invalid(
                        format!("output `{}`", folder.display()),
                        "holds files that no run of interlace made",
                    )
                    .remedy("name a new folder"));
                }
            }
        }
        let lock = FolderLock::take(folder)?;
        let state = if path.exists() {
            let state: RunState = read_json(&path, STATE_SCHEMA_VERSION).map_err(|error| {
                error.without_remedy().remedy(format!("remove the folder `{}`, or name a new one", folder.display()))
            })?;
            let outputs = state.steps.values().map(|done| &done.output).chain(&state.begun);
            if let Some(output) = outputs.into_iter().find(|output| !is_inside(folder, output)) {
                let problem = format!("names the output `{}`, which is not in its folder", output.escape_debug());
                return Err(Error::invalid(format!("`{}`", path.display()), problem).remedy("name a new folder"));
            }
            state
        } else {
            let state = RunState { schema_version: STATE_SCHEMA_VERSION, steps: BTreeMap::new(), begun: None };
            write_json(&path, &state)?;
            state
        };
        Ok(RunStore { folder: folder.to_path_buf(), state, variants: None, _lock: lock })
    }

    /// The same for a model in these variants: steps that were done with others are done again.
    pub fn of_variants(mut self, variants: Option<String>) -> Self {
        self.variants = variants;
        self
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The finished steps.
    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// Runs a step unless its output exists unchanged, from the same inputs and settings, or was removed by
    /// [`RunStore::remove`].
    ///
    /// `output` is the name of the file or folder that `work` must create; `inputs` are the digests of the files that
    /// it reads. An output of an earlier run from other inputs is replaced, and one of a run that was killed before it was
    /// recorded.
    ///
    /// Errors: those of `work`; `Error::Invalid` when `work` creates no output; as [`RunStore::check_output`].
    pub fn step<S: Serialize>(
        &mut self,
        name: &str,
        output: &str,
        inputs: &[(&str, &str)],
        settings: &S,
        work: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Finished> {
        let key = self.key_of(name, inputs, settings)?;
        let path = self.folder.join(output);
        if let Some(done) = self.state.steps.get(name)
            && done.is(&key, &path)?
        {
            return Ok(Finished { path, digest: done.digest.clone(), reused: true, variants: None });
        }
        self.check_output(name, output)?;
        self.remove_step(name)?;
        remove(&path)?;
        self.state.begun = Some(output.to_string());
        self.save()?;
        let start = Instant::now();
        let made = work(&path).and_then(|()| match path.exists() {
            true => digest_of(&path),
            false => Err(Error::invalid(format!("step `{name}`"), format!("made no `{output}`"))),
        });
        if !path.exists() || made.is_ok() {
            self.state.begun = None;
        }
        let digest = match made {
            Ok(digest) => digest,
            Err(error) => {
                self.save()?;
                return Err(error);
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        let done = StepState { key, output: output.to_string(), digest: digest.clone(), seconds, removed: false };
        self.state.steps.insert(name.to_string(), done);
        self.save()?;
        Ok(Finished { path, digest, reused: false, variants: None })
    }

    /// Checks that a step can write its output: nothing is there, or what a run made.
    ///
    /// Errors: `Error::Invalid` for anything else.
    pub fn check_output(&self, name: &str, output: &str) -> Result<()> {
        let path = self.folder.join(output);
        let own = self.state.steps.get(name).is_some_and(|done| done.output == output && !done.removed);
        if path.exists() && !own && self.state.begun.as_deref() != Some(output) {
            return Err(Error::invalid(format!("output `{}`", path.display()), "exists, and no finished step made it")
                .remedy("remove it, or name another output folder"));
        }
        Ok(())
    }

    /// True when [`RunStore::step`] would not run the step again.
    ///
    /// Errors: `Error::Io` when the output cannot be read.
    pub fn is_done<S: Serialize>(&self, name: &str, inputs: &[(&str, &str)], settings: &S) -> Result<bool> {
        let Some(done) = self.state.steps.get(name) else { return Ok(false) };
        done.is(&self.key_of(name, inputs, settings)?, &self.folder.join(&done.output))
    }

    /// Removes a finished step's output and records the removal; later steps that used the output remain valid.
    ///
    /// Errors: `Error::Io`.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let Some(done) = self.state.steps.get_mut(name).filter(|done| !done.removed) else { return Ok(()) };
        done.removed = true;
        let path = self.folder.join(&done.output);
        self.save()?;
        remove(&path)
    }

    /// Removes a finished step and its output.
    ///
    /// Errors: `Error::Io`.
    pub fn remove_step(&mut self, name: &str) -> Result<()> {
        let Some(done) = self.state.steps.get(name) else { return Ok(()) };
        if !done.removed {
            remove(&self.folder.join(&done.output))?;
        }
        self.state.steps.remove(name);
        self.save()
    }

    fn save(&self) -> Result<()> {
        write_json(&self.folder.join(STATE_FILE), &self.state)
    }

    fn key_of<S: Serialize>(&self, step: &str, inputs: &[(&str, &str)], settings: &S) -> Result<Sha256Digest> {
        let variants = self.variants.as_deref();
        sha256_json(&Key { tool: env!("CARGO_PKG_VERSION"), step, inputs, settings, variants })
    }
}

impl StepState {
    /// True when this record matches the key, and the output at `path` is unchanged or was removed on purpose.
    fn is(&self, key: &str, path: &Path) -> Result<bool> {
        if self.key != *key {
            return Ok(false);
        }
        Ok(if self.removed { !path.exists() } else { path.exists() && digest_of(path)? == self.digest })
    }
}

/// True for a relative path without `..` whose folder, with links followed, is `folder` or below it.
fn is_inside(folder: &Path, output: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    let parent = folder.join(Path::new(output).parent().unwrap_or(Path::new("")));
    !output.is_empty()
        && Path::new(output).components().all(plain)
        && matches!((resolved_path(&parent), resolved_path(folder)), (Ok(found), Ok(own)) if found.starts_with(&own))
}

fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, error)),
        _ => Ok(()),
    }
}

/// SHA-256 of every file below a folder by its relative path, or of a single file by its name.
///
/// Errors: `Error::Io` when a file cannot be read.
pub fn file_digests(path: &Path) -> Result<BTreeMap<String, Sha256Digest>> {
    let mut digests = BTreeMap::new();
    let mut pending = vec![path.to_path_buf()];
    while let Some(next) = pending.pop() {
        if next.is_dir() {
            for entry in fs::read_dir(&next).map_err(|e| Error::io("read", &next, e))? {
                pending.push(entry.map_err(|e| Error::io("read", &next, e))?.path());
            }
        } else {
            let below = next.strip_prefix(path).ok().filter(|below| !below.as_os_str().is_empty());
            let name = below.or(next.file_name().map(Path::new)).unwrap_or(&next);
            digests.insert(name.to_string_lossy().into_owned(), sha256_file(&next)?);
        }
    }
    Ok(digests)
}

/// One digest of a file, or over all files of a folder.
///
/// Errors: `Error::Io` when a file cannot be read.
pub fn digest_of(path: &Path) -> Result<Sha256Digest> {
    if path.is_dir() { sha256_json(&file_digests(path)?) } else { sha256_file(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |path| fs::write(path, text).map_err(|e| Error::io("write", path, e))
    }

    fn never(_: &Path) -> Result<()> {
        Err(Error::invalid("step", "was done again"))
    }

    #[test]
    fn a_finished_step_is_reused_by_a_later_run() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let first = RunStore::open(&run).unwrap().step("score", "s.json", &[("model", "a")], &1, write("x")).unwrap();
        assert!(!first.reused);
        let again = RunStore::open(&run).unwrap().step("score", "s.json", &[("model", "a")], &1, never).unwrap();
        assert!(again.reused && again.digest == first.digest);
    }

    #[test]
    fn one_process_at_a_time_works_in_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let store = RunStore::open(folder.path()).unwrap();
        let error = RunStore::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("works in it; wait until it ends"), "{error}");
        drop(store);
        assert!(RunStore::open(folder.path()).is_ok());
        // A process that was killed before it wrote its record leaves the lock's file alone.
        fs::remove_file(folder.path().join(STATE_FILE)).unwrap();
        assert!(RunStore::open(folder.path()).is_ok());
    }

    #[test]
    fn an_output_that_a_killed_run_did_not_record_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        // The run is killed after the output is complete and before its record is.
        let killed = std::panic::catch_unwind(|| {
            let mut store = RunStore::open(folder.path()).unwrap();
            store.step("s", "o", &[], &1, |path| {
                fs::write(path, "1").unwrap();
                panic!("killed")
            })
        });
        assert!(killed.is_err() && folder.path().join("o").exists());
        let mut store = RunStore::open(folder.path()).unwrap();
        assert!(!store.step("s", "o", &[], &1, write("2")).unwrap().reused);
        assert_eq!(fs::read_to_string(folder.path().join("o")).unwrap(), "2");
        assert_eq!(store.state().begun, None);
        // A step that fails leaves the place to others.
        assert!(store.step("t", "p", &[], &1, never).is_err());
        fs::write(folder.path().join("p"), "mine").unwrap();
        assert!(store.step("t", "p", &[], &1, write("1")).is_err());
        assert_eq!(fs::read_to_string(folder.path().join("p")).unwrap(), "mine");
    }

    #[test]
    fn a_malformed_record_is_an_error_that_says_what_to_remove() {
        let folder = tempfile::tempdir().unwrap();
        drop(RunStore::open(folder.path()).unwrap());
        fs::write(folder.path().join(STATE_FILE), "{").unwrap();
        let error = RunStore::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("state.json`: not JSON") && error.contains("; remove the folder `"), "{error}");
    }

    #[test]
    fn a_step_of_other_variants_runs_again() {
        let folder = tempfile::tempdir().unwrap();
        let open =
            |variants: Option<&str>| RunStore::open(folder.path()).unwrap().of_variants(variants.map(str::to_string));
        for (variants, reused) in [(None, false), (Some("q4"), false), (Some("q4"), true), (Some("fp16"), false)] {
            let done = open(variants).step("s", "o", &[("model", "a")], &1, write("1")).unwrap();
            assert_eq!(done.reused, reused, "{variants:?}");
            assert!(open(variants).is_done("s", &[("model", "a")], &1).unwrap());
        }
        assert!(!open(None).is_done("s", &[("model", "a")], &1).unwrap());
    }

    #[test]
    fn a_step_runs_again_if_inputs_settings_or_output_change() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = RunStore::open(folder.path()).unwrap();
        store.step("s", "o", &[("model", "a")], &1, write("1")).unwrap();
        assert!(!store.step("s", "o", &[("model", "b")], &1, write("2")).unwrap().reused);
        assert!(!store.step("s", "o", &[("model", "b")], &2, write("3")).unwrap().reused);
        fs::write(folder.path().join("o"), "tampered").unwrap();
        assert!(!store.step("s", "o", &[("model", "b")], &2, write("4")).unwrap().reused);
        assert_eq!(fs::read_to_string(folder.path().join("o")).unwrap(), "4");
    }

    #[test]
    fn a_step_with_a_removed_output_counts_as_done_until_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = RunStore::open(folder.path()).unwrap();
        let first = store.step("s", "o", &[("model", "a")], &1, write("1")).unwrap();
        store.remove("s").unwrap();
        assert!(!first.path.exists());
        drop(store);
        let mut store = RunStore::open(folder.path()).unwrap();
        assert!(store.is_done("s", &[("model", "a")], &1).unwrap());
        assert!(!store.is_done("s", &[("model", "b")], &1).unwrap() && !store.is_done("t", &[], &1).unwrap());
        let again = store.step("s", "o", &[("model", "a")], &1, never).unwrap();
        assert!(again.reused && again.digest == first.digest && !again.path.exists());
        store.remove_step("s").unwrap();
        assert!(!store.step("s", "o", &[("model", "a")], &1, write("1")).unwrap().reused);
        assert!(first.path.exists());
        // A foreign file at the path of a removed output is neither used nor changed.
        store.remove("s").unwrap();
        fs::write(&first.path, "mine").unwrap();
        let error = store.step("s", "o", &[("model", "a")], &1, never).unwrap_err().to_string();
        assert!(error.contains("exists, and no finished step made it"), "{error}");
        assert_eq!(fs::read_to_string(&first.path).unwrap(), "mine");
    }

    #[test]
    fn a_failed_step_is_not_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = RunStore::open(folder.path()).unwrap();
        let error = store.step("s", "o", &[], &1, never).unwrap_err().to_string();
        assert_eq!(error, "step: was done again");
        let error = store.step("s", "o", &[], &1, |_| Ok(())).unwrap_err().to_string();
        assert_eq!(error, "step `s`: made no `o`");
        assert!(!store.step("s", "o", &[], &1, write("1")).unwrap().reused);
    }

    #[test]
    fn files_that_no_run_created_are_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.txt"), "dear").unwrap();
        assert!(RunStore::open(folder.path()).err().unwrap().to_string().contains("no run of interlace"));
        let run = tempfile::tempdir().unwrap();
        let mut store = RunStore::open(run.path()).unwrap();
        fs::write(run.path().join("o"), "mine").unwrap();
        let error = store.step("s", "o", &[], &1, write("1")).unwrap_err().to_string();
        assert!(error.contains("exists, and no finished step made it"), "{error}");
        assert_eq!(fs::read_to_string(run.path().join("o")).unwrap(), "mine");
    }

    #[test]
    fn a_record_that_names_a_place_outside_of_the_folder_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let victim = root.path().join("victim");
        fs::create_dir(&victim).unwrap();
        let run = root.path().join("run");
        RunStore::open(&run).unwrap().step("s", "o", &[], &1, write("1")).unwrap();
        std::os::unix::fs::symlink(root.path(), run.join("link")).unwrap();
        let state = fs::read_to_string(run.join(STATE_FILE)).unwrap();
        let absolute = victim.to_str().unwrap();
        for output in ["../victim", "a/../../victim", absolute, "link/victim", ".", ""] {
            let crafted = state.replace("\"o\"", &format!("\"{output}\""));
            assert_ne!(crafted, state);
            fs::write(run.join(STATE_FILE), crafted).unwrap();
            let error = RunStore::open(&run).err().unwrap().to_string();
            assert!(error.contains("not in its folder"), "{output}: {error}");
        }
        let mut crafted: RunState = serde_json::from_str(&state).unwrap();
        crafted.begun = Some("../victim".into());
        fs::write(run.join(STATE_FILE), serde_json::to_string(&crafted).unwrap()).unwrap();
        assert!(RunStore::open(&run).err().unwrap().to_string().contains("not in its folder"));
        fs::write(run.join(STATE_FILE), state).unwrap();
        assert!(RunStore::open(&run).is_ok() && victim.is_dir());
    }

    #[test]
    fn the_digest_of_a_folder_covers_names_and_contents() {
        let a = tempfile::tempdir().unwrap();
        let b = tempfile::tempdir().unwrap();
        for folder in [&a, &b] {
            fs::create_dir(folder.path().join("onnx")).unwrap();
            fs::write(folder.path().join("onnx/m.onnx"), "m").unwrap();
        }
        assert_eq!(digest_of(a.path()).unwrap(), digest_of(b.path()).unwrap());
        fs::rename(b.path().join("onnx/m.onnx"), b.path().join("onnx/n.onnx")).unwrap();
        assert_ne!(digest_of(a.path()).unwrap(), digest_of(b.path()).unwrap());
        assert_eq!(file_digests(a.path()).unwrap().keys().collect::<Vec<_>>(), ["onnx/m.onnx"]);
    }
}
