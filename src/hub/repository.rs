//! One revision of a model on the hub.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::base::{Cancel, Error, Progress, Result, free_disk_bytes, human_bytes, list_preview, notice};

use super::cache::Cache;
use super::client::{ATTEMPTS, Client, Failure};
use super::download::{Download, KEPT, part_of};
use super::environment::Environment;
use super::name::{HubName, is_commit};
use super::tree::{HubFile, Tree};

/// One revision of a model, whose files come into the cache when they are asked for.
pub struct Repository {
    name: HubName,
    environment: Environment,
    cache: Cache,
    client: Client,
    tree: Tree,
    /// False when only the files in the cache are known.
    whole: bool,
}

impl Repository {
    /// Finds the commit of the revision and its files: in the cache when it is a commit that was asked for before, or
    /// with `HF_HUB_OFFLINE`; on the hub otherwise, and in the cache when the hub is out of reach.
    ///
    /// Errors: as `Environment::read`; `Error::Invalid` when the hub does not give the model, gives a list that is none,
    /// or is out of reach or forbidden and the cache does not have it; `Error::Io`; `Error::Interrupted`.
    pub fn open(name: &HubName, cancel: &Cancel) -> Result<Self> {
        let environment = Environment::read()?;
        let cache = Cache::of(&environment.cache, name);
        let client = Client::new(&environment)?;
        let known = cache.commit_of(name.revision());
        let listed = known.as_deref().and_then(|commit| cache.listed(commit));
        let make = |client, tree, whole| {
            let (name, environment, cache) = (name.clone(), environment.clone(), cache.clone());
            Ok(Repository { name, environment, cache, client, tree, whole })
        };
        if let Some(tree) = listed.clone().filter(|_| environment.offline || is_commit(name.revision())) {
            return make(client, tree, true);
        }
        let problem = match environment.offline {
            true => "HF_HUB_OFFLINE is set".to_string(),
            false => match ask(&client, name, cancel)? {
                Ok(tree) => {
                    cache.create()?;
                    cache.remember(name.revision(), &tree)?;
                    return make(client, tree, true);
                }
                Err(problem) => {
                    notice(format!(
                        "`{}` is out of reach ({problem}): taking what is in the cache",
                        environment.endpoint
                    ));
                    problem
                }
            },
        };
        if let Some(tree) = listed {
            return make(client, tree, true);
        }
        if let Some(tree) = known.map(|commit| cache.found(&commit)).transpose()?.flatten() {
            cache.create()?;
            notice(format!("`{name}`: the files of the cache are known, and no others that the hub may have"));
            return make(client, tree, false);
        }
        let problem =
            format!("is not in the cache `{}`, and the hub cannot be asked: {problem}", cache.root().display());
        let first = match environment.offline {
            true => "unset HF_HUB_OFFLINE",
            false => "check the network and HF_ENDPOINT",
        };
        Err(Error::invalid(format!("`{name}`"), problem)
            .remedy(format!("{first}, or set HF_HOME to the folder whose cache has it")))
    }

    /// `hf:OWNER/NAME@COMMIT`.
    pub fn at_commit(&self) -> String {
        format!("hf:{}@{}", self.name.repository(), self.tree.commit)
    }

    /// Paths of the files, sorted; those in the cache when the hub cannot be asked and never was.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.tree.files.iter().map(|file| file.path.as_str())
    }

    fn named(&self, paths: &[String]) -> Result<Vec<&HubFile>> {
        let found = |path: &String| {
            self.tree.file(path).ok_or_else(|| {
                let files: Vec<&str> = self.files().collect();
                let whole = if self.whole { "" } else { ", as far as the cache has it" };
                let problem = format!("has no file `{path}`{whole}; it has {}", list_preview(&files, 6));
                Error::invalid(format!("`{}`", self.name), problem).remedy("name another revision, or another model")
            })
        };
        paths.iter().map(found).collect()
    }

    /// Brings files into the cache. Returns the folder of the snapshot, which may hold others too.
    ///
    /// Errors: `Error::Invalid` when there is no such file, when the disk is too small, when a file is not in the cache and
    /// `HF_HUB_OFFLINE` is set, when the hub refuses or stays out of reach, and when size or digest are not as listed;
    /// `Error::Io`; `Error::Interrupted`.
    pub fn fetch(&self, paths: &[String], cancel: &Cancel) -> Result<PathBuf> {
        let files = self.named(paths)?;
        let missing: Vec<&HubFile> = files.iter().copied().filter(|file| !self.cache.has(file)).collect();
        if !missing.is_empty() {
            self.download(&missing, cancel)?;
        }
        self.cache.link(&self.tree.commit, &files)
    }

    /// A folder that holds these files, which are in the cache, and no others.
    ///
    /// Errors: `Error::Invalid` when there is no such file; `Error::Io`.
    pub fn selection(&self, paths: &[String]) -> Result<PathBuf> {
        self.cache.selection(&self.tree.commit, &self.named(paths)?)
    }

    fn download(&self, missing: &[&HubFile], cancel: &Cancel) -> Result<()> {
        let subject = || format!("`{}`", self.name);
        if self.environment.offline {
            let names: Vec<&str> = missing.iter().map(|file| file.path.as_str()).collect();
            let problem = format!("{} not in the cache, and HF_HUB_OFFLINE is set", list_preview(&names, 6));
            return Err(Error::invalid(subject(), problem).remedy("unset HF_HUB_OFFLINE, and run the command again"));
        }
        self.cache.create()?;
        let bytes: u64 = missing.iter().map(|file| file.size).sum();
        let there = |file: &&HubFile| fs::metadata(part_of(&self.cache.blob(file))).map_or(0, |part| part.len());
        let needed = bytes.saturating_sub(missing.iter().map(there).sum());
        let free = free_disk_bytes(self.cache.root())?;
        if needed > free {
            let problem = format!(
                "{} are to be downloaded, and the disk of `{}` has {} free",
                human_bytes(needed),
                self.cache.root().display(),
                human_bytes(free)
            );
            return Err(Error::invalid(subject(), problem).remedy("free disk space, or set HF_HOME to a larger disk"));
        }
        let noun = if missing.len() == 1 { "file" } else { "files" };
        notice(format!("downloading {} {noun} of {} ({})", missing.len(), self.at_commit(), human_bytes(bytes)));
        let progress = Progress::of_bytes("download", bytes);
        for file in missing {
            cancel.check(KEPT)?;
            progress.note(file.path.clone());
            let (blob, lock) = (self.cache.blob(file), self.cache.lock(file));
            let (client, name, commit) = (&self.client, &self.name, self.tree.commit.as_str());
            Download { client, name, commit, file, blob, lock, progress: &progress, cancel }.run()?;
        }
        Ok(())
    }
}

/// Asks the hub for the files. `Ok(Err(problem))` when it is out of reach.
fn ask(client: &Client, name: &HubName, cancel: &Cancel) -> Result<Result<Tree, String>> {
    let (mut problem, mut pause) = (String::new(), Duration::ZERO);
    // A name that cannot be resolved or a port that is closed fails at once, so few attempts are enough.
    for attempt in 0..ATTEMPTS.min(3) {
        if attempt > 0 {
            client.wait(attempt, pause, cancel)?;
        }
        match client.tree(name, cancel) {
            Ok(tree) => return Ok(Ok(tree)),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(what)) => (problem, pause) = (what, Duration::ZERO),
            Err(Failure::Busy(what, asked)) => (problem, pause) = (what, asked),
        }
    }
    Ok(Err(problem))
}
