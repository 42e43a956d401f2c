//! A folder that one process at a time works in.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::{Error, Result};
use super::progress::notice;
use super::text::printable;

/// Name of the locked file. It stays behind; only a process that is running holds its lock.
pub const LOCK_FILE: &str = "run.lock";
/// Most bytes of the holder's name that are read.
const HOLDER_BYTES: u64 = 200;

/// The lock on a folder, released when dropped and when the process ends in any way.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Locks an existing folder. On a file system without locks it prints a warning.
    ///
    /// Errors: `Error::Invalid`, naming the process, while another one holds the lock; `Error::Io` when the file cannot be
    /// written.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK_FILE);
        // A link is not followed, so that a folder from somewhere else cannot name a file to write.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let mut file = options.open(&path).map_err(|e| Error::io("create", &path, e))?;
        if !file.metadata().map_err(|e| Error::io("read", &path, e))?.is_file() {
            return Err(Error::invalid(format!("`{}`", path.display()), "is not a plain file").remedy("remove it"));
        }
        match file.try_lock() {
            Ok(()) => {
                let written = file.set_len(0).and_then(|()| writeln!(file, "{}", this_process()));
                written.map_err(|e| Error::io("write", &path, e))?;
            }
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // A process that has just taken the lock has not written its name yet.
                let _ = file.take(HOLDER_BYTES).read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "another process".to_string(),
                    name => printable(name).into_owned(),
                };
                return Err(Error::invalid(format!("folder `{}`", folder.display()), format!("{holder} works in it"))
                    .remedy("wait until it ends, or name another folder"));
            }
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                notice(format!("warning: `{}` cannot be locked; let no second process work in it", folder.display()));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path, error)),
        }
        Ok(FolderLock { _file: file })
    }
}

/// Id and machine of this process.
fn this_process() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => format!("process {}", std::process::id()),
        host => format!("process {} on {host}", std::process::id()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_until_the_lock_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let first = FolderLock::take(folder.path()).unwrap();
        let error = FolderLock::take(folder.path()).unwrap_err().to_string();
        let holder = format!("process {}", std::process::id());
        assert!(error.contains(&holder) && error.contains("works in it; wait until it ends"), "{error}");
        drop(first);
        // The file that is left, and one of a process that ended without removing it, hold nothing.
        assert!(folder.path().join(LOCK_FILE).exists());
        assert!(FolderLock::take(folder.path()).is_ok());
    }

    #[test]
    fn a_lock_file_that_is_a_link_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        std::fs::write(&victim, "mine").unwrap();
        std::os::unix::fs::symlink(&victim, folder.path().join(LOCK_FILE)).unwrap();
        assert!(FolderLock::take(folder.path()).is_err());
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "mine");
    }
}
