//! One model's folder in the hub's cache.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result, ScratchDir, sha256_json};

use super::link::OWN;
use super::name::{HubName, is_commit, is_hex};
use super::tree::{HubFile, Tree, is_safe};

/// A model's folder in the cache.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))
}

impl Cache {
    /// The folder of a model; it may not be there yet.
    pub fn of(cache: &Path, name: &HubName) -> Self {
        Cache { root: cache.join(name.folder()), locks: cache.join(".locks").join(name.folder()) }
    }

    /// Creates the folder.
    ///
    /// Errors: `Error::Io`.
    pub fn create(&self) -> Result<()> {
        ["blobs", "refs", "snapshots", OWN].iter().try_for_each(|folder| create(&self.root.join(folder)))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn blob(&self, file: &HubFile) -> PathBuf {
        self.root.join("blobs").join(&file.id)
    }

    pub fn lock(&self, file: &HubFile) -> PathBuf {
        self.locks.join(format!("{}.lock", file.id))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// True when the content of a file is there.
    pub fn has(&self, file: &HubFile) -> bool {
        fs::metadata(self.blob(file)).is_ok_and(|found| found.is_file() && found.len() == file.size)
    }

    /// The commit of a branch or tag when it was last asked for, or the commit itself.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Writes `text` to a file of the cache in one step.
    fn write(&self, path: &Path, text: &str) -> Result<()> {
        path.parent().map_or(Ok(()), create)?;
        let scratch = ScratchDir::create_in(&self.root.join(OWN))?;
        let part = scratch.path().join("part");
        fs::write(&part, text).map_err(|e| Error::io("write", path, e))?;
        fs::rename(&part, path).map_err(|e| Error::io("rename", path, e))
    }

    /// Remembers the commit of a revision, and the commit's files.
    ///
    /// Errors: `Error::Io`.
    pub fn remember(&self, revision: &str, tree: &Tree) -> Result<()> {
        if !is_commit(revision) {
            self.write(&self.root.join("refs").join(revision), &tree.commit)?;
        }
        let text = serde_json::to_string(tree).map_err(|e| Error::invalid("files of a model", e.to_string()))?;
        self.write(&self.listing(&tree.commit), &text)
    }

    fn listing(&self, commit: &str) -> PathBuf {
        self.root.join(OWN).join(format!("{commit}.json"))
    }

    /// The files of a commit as they were listed when it was first asked for.
    pub fn listed(&self, commit: &str) -> Option<Tree> {
        let tree: Tree = serde_json::from_slice(&fs::read(self.listing(commit)).ok()?).ok()?;
        (tree.commit == commit && tree.check().is_ok()).then_some(tree)
    }

    /// The files of a commit that another program left in the cache; there may be more of them on the hub.
    ///
    /// Errors: `Error::Io`.
    pub fn found(&self, commit: &str) -> Result<Option<Tree>> {
        let snapshot = self.snapshot(commit);
        if !snapshot.is_dir() {
            return Ok(None);
        }
        let mut files = Vec::new();
        let mut folders = vec![(snapshot, String::new())];
        while let Some((folder, prefix)) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|e| Error::io("read", &folder, e))? {
                let path = entry.map_err(|e| Error::io("read", &folder, e))?.path();
                let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
                let name = format!("{prefix}{name}");
                if path.is_dir() {
                    folders.push((path, format!("{name}/")));
                    continue;
                }
                // A link whose content was removed leads nowhere.
                let (Ok(real), Ok(data)) = (fs::canonicalize(&path), fs::metadata(&path)) else { continue };
                let id = real.file_name().and_then(|id| id.to_str()).unwrap_or_default().to_string();
                if is_safe(&name) && (is_hex(&id, 64) || is_hex(&id, 40)) {
                    files.push(HubFile { path: name, size: data.len(), id });
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Some(Tree { commit: commit.to_string(), files }))
    }

    /// Links files whose content is there into the snapshot of their commit, as `huggingface_hub` does. Returns their paths.
    ///
    /// Errors: `Error::Io`.
    pub fn link(&self, commit: &str, files: &[&HubFile]) -> Result<PathBuf> {
        let snapshot = self.snapshot(commit);
        create(&snapshot)?;
        links(&snapshot, "../../", files)?;
        Ok(snapshot)
    }

    /// A folder that holds these files and no others.
    ///
    /// Errors: `Error::Io`.
    pub fn selection(&self, commit: &str, files: &[&HubFile]) -> Result<PathBuf> {
        let names: Vec<(&str, &str)> = files.iter().map(|file| (file.path.as_str(), file.id.as_str())).collect();
        let key = sha256_json(&names)?;
        let own = self.root.join(OWN);
        let folder = own.join(&key[..16]).join(commit);
        // The name is made of the content, so a folder that is there is right, except where somebody changed it.
        if files.iter().all(|file| fs::metadata(folder.join(&file.path)).is_ok_and(|found| found.len() == file.size)) {
            return Ok(folder);
        }
        let scratch = ScratchDir::create_in(&own)?;
        let part = scratch.path().join(commit);
        create(&part)?;
        links(&part, "../../../", files)?;
        let parent = own.join(&key[..16]);
        create(&parent)?;
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|e| Error::io("replace", &folder, e))?;
        }
        match fs::rename(&part, &folder) {
            // Another program was faster.
            Err(_) if folder.is_dir() => Ok(folder),
            renamed => renamed.map(|()| folder.clone()).map_err(|e| Error::io("rename", &folder, e)),
        }
    }
}

/// Links files below `folder`, from which `up` leads to the model's folder in the cache.
fn links(folder: &Path, up: &str, files: &[&HubFile]) -> Result<()> {
    for file in files {
        let link = folder.join(&file.path);
        link.parent().map_or(Ok(()), create)?;
        let target = format!("{}{up}blobs/{}", "../".repeat(file.path.matches('/').count()), file.id);
        match symlink(&target, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // A link without content, or to other content.
                if fs::read_link(&link).is_ok_and(|old| old != Path::new(&target)) {
                    fs::remove_file(&link).map_err(|e| Error::io("replace", &link, e))?;
                    symlink(&target, &link).map_err(|e| Error::io("create", &link, e))?;
                }
            }
            made => made.map_err(|e| Error::io("create", &link, e))?,
        }
    }
    Ok(())
}
