//! Outputs under a temporary name that contains the id of their process, so that a later run can remove the leftovers
//! of a killed one.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use super::error::{Error, Result};
use super::paths::refuse_hub_cache;
use super::progress::notice;
use super::text::{human_bytes, list_preview};

/// Prefix of the names of staged folders; a staged file is called `.NAME.OWNER.part`.
const FOLDER_PREFIX: &str = ".interlace-";
const FILE_SUFFIX: &str = ".part";

/// A process, written `PID-START-PLACE`: its id, its start time, and the machine boot and PID namespace of the id.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Owner {
    process: u32,
    /// Start time in clock ticks since boot.
    start: u64,
    /// Hash of the boot id and the PID namespace (one namespace per container).
    place: u32,
}

impl Owner {
    /// This process.
    fn current() -> &'static Owner {
        static CURRENT: LazyLock<Owner> = LazyLock::new(|| {
            let process = std::process::id();
            Owner { process, start: start_of(process).unwrap_or(0), place: place() }
        });
        &CURRENT
    }

    fn tag(&self) -> String {
        format!("{}-{}-{:08x}", self.process, self.start, self.place)
    }

    fn parse(tag: &str) -> Option<Owner> {
        let mut parts = tag.split('-');
        let process = parts.next()?.parse().ok()?;
        let start = parts.next()?.parse().ok()?;
        let place = u32::from_str_radix(parts.next()?, 16).ok()?;
        parts.next().is_none().then_some(Owner { process, start, place })
    }

    /// True when this process has ended. A process in another PID namespace is not visible; it counts as ended when its
    /// lock on `path` is free.
    fn is_gone(&self, path: &Path) -> bool {
        if self.place == Self::current().place {
            return start_of(self.process) != Some(self.start);
        }
        File::open(path).is_ok_and(|file| lock(&file))
    }
}

/// Start time of a process in clock ticks since boot; `None` when there is no such process.
fn start_of(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is the program's name in brackets and may contain spaces; field 22 is the start time.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

fn place() -> u32 {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let text = format!("{boot} {}", namespace.display());
    // FNV-1a
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Locks a file or folder while it is open. False when another process has locked it or the file system has no locks.
fn lock(file: &File) -> bool {
    // SAFETY: the descriptor is open.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Locks a file during its creation, so that processes in other PID namespaces do not remove it.
pub(super) fn hold(file: &File) {
    // On a file system without locks only the owner in the file's name protects it.
    lock(file);
}

/// Path of a file before it is renamed to `path`. Removes leftovers of killed runs in its folder.
///
/// Errors: `Error::Invalid` when the path names no file.
pub(super) fn temporary_of(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        Error::invalid(format!("`{}`", path.display()), "names no file").remedy("give a path that ends with a name")
    })?;
    let temporary = path.with_file_name(format!(".{}.{}{FILE_SUFFIX}", name.to_string_lossy(), Owner::current().tag()));
    sweep(folder_of(path));
    Ok(temporary)
}

/// The folder of a file or folder; `.` for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A folder that is removed when dropped. When this process is killed, a later run removes it.
pub struct ScratchDir {
    folder: tempfile::TempDir,
    _lock: Option<File>,
}

impl ScratchDir {
    /// Creates a folder in `parent`, after removing the leftovers of killed runs there.
    ///
    /// Errors: `Error::Io` when `parent` cannot be written.
    pub fn create_in(parent: &Path) -> Result<Self> {
        sweep(parent);
        let folder = tempfile::Builder::new()
            .prefix(&format!("{FOLDER_PREFIX}{}-", Owner::current().tag()))
            .tempdir_in(parent)
            .map_err(|e| Error::io("create a folder in", parent, e))?;
        let lock = File::open(folder.path()).ok().filter(lock);
        Ok(ScratchDir { folder, _lock: lock })
    }

    /// The folder; it is removed with its content when this value is dropped.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A new folder that appears under its final name only when complete.
pub struct StagedDir {
    target: PathBuf,
    staging: ScratchDir,
}

impl StagedDir {
    /// Begins a folder that `commit` renames to `target`. Removes the leftovers of killed runs in the same parent.
    ///
    /// Errors: `Error::Invalid` when `target` exists already and is not an empty folder; `Error::Io` when its parent
    /// cannot be created.
    pub fn create(target: &Path) -> Result<Self> {
        refuse_hub_cache(target)?;
        match fs::symlink_metadata(target) {
            Ok(metadata) => {
                let empty = metadata.is_dir() && fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
                if !empty {
                    return Err(Error::invalid(format!("output `{}`", target.display()), "exists already")
                        .remedy("name a new folder, or remove this one first"));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", target, error)),
        }
        let parent = folder_of(target);
        fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
        Ok(StagedDir { target: target.to_path_buf(), staging: ScratchDir::create_in(parent)? })
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Gives the folder its final name.
    ///
    /// Errors: `Error::Io`; the staged folder is removed then.
    pub fn commit(self) -> Result<()> {
        if self.target.is_dir() {
            fs::remove_dir(&self.target).map_err(|e| Error::io("replace", &self.target, e))?;
        }
        set_default_permissions(self.staging.path())?;
        fs::rename(self.staging.path(), &self.target).map_err(|e| Error::io("rename", &self.target, e))?;
        let _ = self.staging.folder.keep();
        Ok(())
    }
}

/// A temporary folder is private to the user; the finished one gets the permissions of the umask.
fn set_default_permissions(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // SAFETY: umask only swaps a process-wide integer, and the next line restores the old value.
    let mask = unsafe {
        let mask = libc::umask(0o022);
        libc::umask(mask);
        mask
    };
    let mode = 0o777 & !mask;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| Error::io("set permissions of", path, e))
}

/// Removes the leftovers of killed runs in a folder, once per process, and prints a notice.
fn sweep(folder: &Path) {
    static SWEPT: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);
    let Ok(place) = fs::canonicalize(folder) else { return };
    if !SWEPT.lock().unwrap_or_else(PoisonError::into_inner).insert(place) {
        return;
    }
    let (names, bytes) = remove_orphans(folder);
    if !names.is_empty() {
        let (names_shown, size) = (list_preview(&names, 4), human_bytes(bytes));
        notice(format!("removed what runs that were killed left in `{}`: {names_shown} ({size})", folder.display()));
    }
}

/// Removes the leftovers. Returns their names and total bytes.
fn remove_orphans(folder: &Path) -> (Vec<String>, u64) {
    // SAFETY: geteuid only reads an integer of the process.
    let user = unsafe { libc::geteuid() };
    let mut removed = (Vec::new(), 0);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        let (Some(owner), Ok(metadata)) = (owner_of(&name), fs::symlink_metadata(&path)) else { continue };
        let ours = metadata.uid() == user && metadata.is_dir() == name.starts_with(FOLDER_PREFIX);
        if metadata.is_symlink() || !ours || !owner.is_gone(&path) {
            continue;
        }
        let size = size_of(&path);
        let gone = if metadata.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        // Another run may have removed it at the same time.
        if gone.is_ok() {
            removed.0.push(name);
            removed.1 += size;
        }
    }
    removed.0.sort();
    removed
}

/// The owner in the name of a staged folder or file.
fn owner_of(name: &str) -> Option<Owner> {
    let tag = match name.strip_prefix(FOLDER_PREFIX) {
        // A random part follows the owner.
        Some(rest) => rest.rsplit_once('-')?.0,
        None => name.strip_prefix('.')?.strip_suffix(FILE_SUFFIX)?.rsplit_once('.')?.1,
    };
    Owner::parse(tag)
}

/// Bytes of a file, or of all files in a folder.
fn size_of(path: &Path) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    if !metadata.is_dir() {
        return metadata.len();
    }
    fs::read_dir(path).into_iter().flatten().flatten().map(|entry| size_of(&entry.path())).sum()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_leftovers_of_ended_processes_are_removed() {
        let mut child = Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().unwrap();
        let owner = Owner { process: child.id(), start: start_of(child.id()).unwrap(), place: place() };
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        let staged = format!(".interlace-{}-Ab3", owner.tag());
        let part = format!(".scores.json.{}.part", owner.tag());
        // The id of a live process with another start time: the system has reused the id.
        let reused = Owner { start: 1, ..Owner::current().clone() };
        let reused = format!(".interlace-{}-xyz", reused.tag());
        fs::create_dir(here.join(&staged)).unwrap();
        fs::write(here.join(&staged).join("model.onnx"), "123").unwrap();
        fs::write(here.join(&part), "12").unwrap();
        fs::create_dir(here.join(&reused)).unwrap();
        for strange in
            [".interlace-", ".interlace-1-2", ".interlace-a-b-c-d", ".x.part", ".interlace-1-2-3-4-5", "a.part"]
        {
            fs::create_dir(here.join(strange)).unwrap();
        }
        std::os::unix::fs::symlink("/", here.join(format!(".interlace-{}-link", owner.tag()))).unwrap();
        assert_eq!(remove_orphans(here), (vec![reused], 0));
        assert!(here.join(&staged).exists() && here.join(&part).exists());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(remove_orphans(here), (vec![staged, part], 5));
        assert_eq!(names(here).len(), 7);
    }

    #[test]
    fn a_folder_locked_by_another_container_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = Owner { place: !place(), ..Owner::current().clone() };
        let staged = folder.path().join(format!(".interlace-{}-abc", elsewhere.tag()));
        fs::create_dir(&staged).unwrap();
        let held = File::open(&staged).unwrap();
        assert!(lock(&held));
        assert_eq!(remove_orphans(folder.path()).0.len(), 0);
        drop(held);
        assert_eq!(remove_orphans(folder.path()).0.len(), 1);
    }

    #[test]
    fn a_staged_folder_appears_under_its_name_on_commit() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let staged = StagedDir::create(&target).unwrap();
        assert_eq!(
            names(folder.path()).iter().filter_map(|name| owner_of(name)).collect::<Vec<_>>(),
            [Owner::current().clone()]
        );
        fs::write(staged.path().join("file"), "x").unwrap();
        staged.commit().unwrap();
        assert_eq!(names(folder.path()), ["out"]);
        drop(StagedDir::create(&folder.path().join("other")).unwrap());
        assert_eq!(names(folder.path()), ["out"]);
    }
}
