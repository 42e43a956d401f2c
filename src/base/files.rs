//! Files: memory maps, atomic writes (temporary file, then rename), and paths that stay inside a folder.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;

use super::error::{Error, Result};
use super::paths::refuse_hub_cache;
use super::staging::{folder_of, hold, temporary_of};
use super::text::{human_bytes, shortened};

/// Bytes that a user may still write on the disk of `path`, or of the nearest folder above it that exists.
///
/// Errors: `Error::Io`.
pub fn free_disk_bytes(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("read", path, e))?;
    let folder = absolute.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let name = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes());
    let name = name.map_err(|e| Error::io("read", folder, io::Error::other(e)))?;
    // SAFETY: `name` ends with 0 and lives through the call, and `found` is the structure that the call fills.
    let found = unsafe {
        let mut found = std::mem::zeroed::<libc::statvfs>();
        (libc::statvfs(name.as_ptr(), &raw mut found) == 0).then_some(found)
    };
    let found = found.ok_or_else(|| Error::io("read", folder, io::Error::last_os_error()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Checks that a file can be created at `path`. Verbs call this before they compute what they write there.
///
/// Errors: `Error::Invalid` when its folder does not exist or is a file, or when `path` is a folder.
pub fn check_output_file(path: &Path) -> Result<()> {
    refuse_hub_cache(path)?;
    let folder = folder_of(path);
    if !folder.exists() {
        return Err(
            Error::invalid(format!("folder `{}`", folder.display()), "does not exist").remedy("create it first")
        );
    }
    if !folder.is_dir() {
        return Err(Error::invalid(format!("output `{}`", path.display()), "its folder is a file, expected a folder")
            .remedy("name a file in a folder that exists"));
    }
    if path.is_dir() {
        return Err(Error::invalid(format!("output `{}`", path.display()), "is a folder, expected the name of a file")
            .remedy("name a file in it"));
    }
    Ok(())
}

/// The content of a plain file of at most `most` bytes.
///
/// Errors: `Error::Io` when it cannot be read; `Error::Invalid` for a folder, a device or a pipe, and for a larger file.
pub fn read_plain(path: &Path, most: u64) -> Result<Vec<u8>> {
    let subject = || format!("`{}`", path.display());
    // Before the file is opened, since opening a pipe waits for its writer.
    if !fs::metadata(path).map_err(|e| Error::io("read", path, e))?.is_file() {
        return Err(Error::invalid(subject(), "is not a plain file").remedy("give the path of a file"));
    }
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut content = Vec::new();
    file.take(most.saturating_add(1)).read_to_end(&mut content).map_err(|e| Error::io("read", path, e))?;
    if content.len() as u64 > most {
        return Err(Error::invalid(subject(), format!("is larger than {}", human_bytes(most)))
            .remedy("name a file that interlace wrote"));
    }
    Ok(content)
}

/// A read-only memory map of a whole file.
pub struct MappedFile {
    path: PathBuf,
    file: File,
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps `path`. An empty file gives an empty slice.
    ///
    /// Errors: `Error::Io` when the file cannot be opened or mapped, `Error::Invalid` when it is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let metadata = file.metadata().map_err(|e| Error::io("read", path, e))?;
        if !metadata.is_file() {
            return Err(Error::invalid(format!("`{}`", path.display()), "is not a plain file")
                .remedy("give the path of a file"));
        }
        let map = if metadata.len() == 0 {
            None
        } else {
            // SAFETY: the map is read-only and this process never writes the file. Another process could truncate it, a
            // hazard of every memory map.
            Some(unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?)
        };
        Ok(MappedFile { path: path.to_path_buf(), file, map })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a range out of the process's memory; the next access reads it from the file again.
    pub fn release(&self, offset: u64, length: u64) {
        if let Some(map) = &self.map {
            // SAFETY: the map is read-only, so a page that is dropped has the file's content when it is read again.
            // A refusal costs memory only.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset as usize, length as usize)
            };
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}

impl std::fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MappedFile({}, {} bytes)", self.path.display(), self.len())
    }
}

/// Appends `length` bytes of a mapped file to `target`, inside the kernel where the file system supports that.
///
/// Errors: `Error::Io` naming the target, `ErrorKind::UnexpectedEof` when the source is shorter than `length`.
pub fn copy_range(source: &MappedFile, offset: u64, length: u64, target: &mut AtomicFile) -> Result<()> {
    let end = offset.checked_add(length).filter(|&end| end <= source.len() as u64);
    let Some(end) = end else {
        return Err(Error::io("read", &source.path, io::ErrorKind::UnexpectedEof.into()));
    };
    let mut position = offset as libc::off64_t;
    while (position as u64) < end {
        let wanted = (end - position as u64).min(1 << 30) as usize;
        // SAFETY: both descriptors are open for the duration of the call and `position` outlives it.
        let copied = unsafe {
            libc::copy_file_range(
                source.file.as_raw_fd(),
                &mut position,
                target.file.as_raw_fd(),
                std::ptr::null_mut(),
                wanted,
                0,
            )
        };
        if copied <= 0 {
            let error = io::Error::last_os_error();
            let fall_back = [libc::EXDEV, libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::EBADF];
            if copied == 0 || error.raw_os_error().is_some_and(|code| fall_back.contains(&code)) {
                return target.write_all(&source[position as usize..end as usize]);
            }
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(Error::io("write", &target.path, error));
        }
    }
    Ok(())
}

/// A file that is written under a temporary name in the folder of its final name. `commit` renames it. Dropped without
/// `commit`, it is removed; when the process is killed, a later run in the same folder removes it.
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    committed: bool,
}

impl AtomicFile {
    /// Errors: `Error::Io` when the folder does not exist or is not writable.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = temporary_of(path)?;
        let file = File::create(&temporary).map_err(|e| Error::io("create", path, e))?;
        hold(&file);
        Ok(AtomicFile { path: path.to_path_buf(), temporary, file, committed: false })
    }

    /// Appends bytes. Errors: `Error::Io` naming the final path.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Flushes to disk and gives the file its final name.
    ///
    /// Errors: `Error::Io`; the temporary file is removed then.
    pub fn commit(self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io("write", &self.path, e))?;
        self.commit_unflushed()
    }

    /// Gives the file its final name without flushing it: a power failure within about half a
    /// minute can lose its content.
    ///
    /// Errors: `Error::Io`; the temporary file is removed then.
    pub fn commit_unflushed(mut self) -> Result<()> {
        fs::rename(&self.temporary, &self.path).map_err(|e| Error::io("rename", &self.path, e))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// True for a file in `REPO/blobs` when `folder` is `REPO/snapshots/REVISION` or `REPO/.interlace/SELECTION`, or below it. Both
/// paths are canonical.
fn is_hub_blob(folder: &Path, file: &Path) -> bool {
    let snapshots = folder
        .ancestors()
        .skip(1)
        .find(|parent| parent.file_name().is_some_and(|name| name == "snapshots" || name == ".interlace"));
    let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
    blobs.is_some_and(|blobs| file.parent() == Some(&blobs))
}

/// Resolves a path from an untrusted file, relative to `folder`.
///
/// A symbolic link may leave the folder only in the layout of the Hugging Face cache: from `REPO/snapshots/REVISION`
/// or `REPO/.interlace/SELECTION` into `REPO/blobs`.
///
/// Errors: `Error::Invalid` for an absolute path, a `..` component or another link that leaves the folder; `Error::Io`
/// when the file does not exist.
pub fn contained_path(folder: &Path, relative: &str) -> Result<PathBuf> {
    // A name that is longer than file systems allow is no name, but for instance a picture in base64.
    let shown = if relative.len() > 255 { shortened(relative) } else { relative.to_string() };
    let subject = || format!("path `{shown}` in `{}`", folder.display());
    let candidate = Path::new(relative);
    let plain = !relative.is_empty()
        && !relative.contains(['\\', '\0'])
        && candidate.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain {
        return Err(Error::invalid(subject(), "must be a relative path without `..`")
            .remedy("name the file by its path below that folder"));
    }
    let joined = folder.join(candidate);
    let root = fs::canonicalize(folder).map_err(|e| Error::io("open", folder, e))?;
    let resolved = fs::canonicalize(&joined).map_err(|e| Error::io("open", folder.join(&shown), e))?;
    if !resolved.starts_with(&root) && !is_hub_blob(&root, &resolved) {
        return Err(Error::invalid(subject(), "leads out of the folder through a link")
            .remedy("copy the folder with its links followed (`cp -rL`)"));
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// What a mapped file holds in memory goes when it is released, and comes back when it is read.
    #[test]
    fn a_released_range_is_read_from_the_file_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let content: Vec<u8> = (0..4u32 << 20).map(|at| (at % 251) as u8).collect();
        fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        let resident = || -> u64 {
            let maps = fs::read_to_string("/proc/self/smaps").unwrap();
            let own = maps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
            let line = own.clone().find(|line| line.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        assert!(file[..] == content[..] && resident() == 4096);
        file.release(0, 4 << 20);
        assert_eq!(resident(), 0);
        assert!(file[..] == content[..]);
    }

    #[test]
    fn the_folder_of_an_output_file_must_exist() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "x").unwrap();
        for good in ["new.json", "file"] {
            check_output_file(&root.path().join(good)).unwrap();
        }
        check_output_file(Path::new("new.json")).unwrap();
        for (bad, want) in [
            ("none/x.json", "none`: does not exist; create it first"),
            ("file/x.json", "its folder is a file, expected a folder"),
            ("", "is a folder, expected the name of a file"),
        ] {
            let error = check_output_file(&root.path().join(bad)).unwrap_err().to_string();
            assert!(error.contains(want), "{bad}: {error}");
        }
    }

    #[test]
    fn symlinks_may_lead_only_inside_the_folder_or_to_hub_cache_blobs() {
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("repo/snapshots/abc/onnx");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(root.path().join("repo/blobs/deep")).unwrap();
        for file in ["repo/blobs/1", "repo/blobs/deep/2", "secret"] {
            fs::write(root.path().join(file), "x").unwrap();
        }
        for (name, target) in [("a", "../../../blobs/1"), ("b", "../../../blobs/deep/2"), ("c", "../../../../secret")] {
            symlink(target, snapshot.join(name)).unwrap();
        }
        assert!(contained_path(&snapshot, "a").is_ok());
        let (link, path) = ("leads out of the folder through a link", "must be a relative path without `..`");
        for (name, want) in [("b", link), ("c", link), ("../onnx/a", path), ("/etc/passwd", path), ("", path)] {
            let error = contained_path(&snapshot, name).unwrap_err().to_string();
            assert!(error.contains(want), "{name}: {error}");
        }
        let plain = root.path().join("plain");
        fs::create_dir(&plain).unwrap();
        symlink("../repo/blobs/1", plain.join("a")).unwrap();
        let error = contained_path(&plain, "a").unwrap_err().to_string();
        assert!(error.contains("leads out of the folder through a link"), "{error}");
    }
}
