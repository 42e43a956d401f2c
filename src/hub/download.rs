//! Downloads the content of one file into the cache.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::{Body, http};

use crate::base::{Cancel, Error, Progress, Result};

use super::client::{ATTEMPTS, Client, Failure, Incoming};
use super::name::HubName;
use super::tree::HubFile;

/// What is kept of a download that was stopped.
pub(super) const KEPT: &str = "what was downloaded is kept in the hub's cache, and the same command continues it";
/// Bytes of an earlier download that are read at a time.
const PIECE: usize = 256 << 10;

/// The digest that is a file's name in the cache.
enum Digester {
    Sha256(Sha256),
    Git(Sha1),
}

impl Digester {
    /// Git's object id is the SHA-1 of a head and the content.
    fn of(file: &HubFile) -> Self {
        match file.id.len() {
            64 => Digester::Sha256(Sha256::new()),
            _ => Digester::Git(Sha1::new_with_prefix(format!("blob {}\0", file.size))),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Digester::Sha256(digest) => digest.update(bytes),
            Digester::Git(digest) => digest.update(bytes),
        }
    }

    fn text(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Digester::Sha256(digest) => hex(&digest.finalize()),
            Digester::Git(digest) => hex(&digest.finalize()),
        }
    }
}

/// A lock that programs with this cache take while they download a file; `huggingface_hub` takes the same one.
struct Lock(#[allow(dead_code, reason = "the lock is held while the file is open")] File);

impl Lock {
    /// Waits until no other program has it.
    ///
    /// Errors: `Error::Io`; `Error::Interrupted`.
    fn take(path: &Path, cancel: &Cancel) -> Result<Self> {
        let folder = path.parent().unwrap_or(path);
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let file = file.map_err(|e| Error::io("open", path, e))?;
        loop {
            // SAFETY: the descriptor is open.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
                return Ok(Lock(file));
            }
            let error = std::io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EWOULDBLOCK) => {
                    cancel.check("another program downloads the same file")?;
                    std::thread::sleep(Duration::from_millis(100));
                }
                // Without locks two programs may download the same file; its digest is checked before it gets its name.
                Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP) => return Ok(Lock(file)),
                _ => return Err(Error::io("lock", path, error)),
            }
        }
    }
}

/// A file to download, and where it goes.
pub(super) struct Download<'a> {
    pub client: &'a Client,
    pub name: &'a HubName,
    pub commit: &'a str,
    pub file: &'a HubFile,
    /// Its final path.
    pub blob: PathBuf,
    pub lock: PathBuf,
    pub progress: &'a Progress,
    pub cancel: &'a Cancel,
}

/// A part of a file, with the digest of what is there.
struct Part {
    file: File,
    path: PathBuf,
    length: u64,
    digest: Digester,
}

impl Part {
    /// Opens what an earlier download left, or a new file.
    fn open(path: PathBuf, of: &HubFile, cancel: &Cancel) -> Result<Self> {
        let failed = |e| Error::io("open", &path, e);
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).map_err(failed)?;
        let mut digest = Digester::of(of);
        let mut length = 0;
        let mut buffer = vec![0; PIECE];
        loop {
            cancel.check(KEPT)?;
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                count => digest.update(&buffer[..count]),
            }
            length = file.stream_position().map_err(failed)?;
        }
        let mut part = Part { file, path, length, digest };
        // A whole file under this name is one whose digest was wrong, or the end came before it got its name.
        if part.length > of.size {
            part.restart(of)?;
        }
        Ok(part)
    }

    fn restart(&mut self, of: &HubFile) -> Result<()> {
        let failed = |e| Error::io("write", &self.path, e);
        self.file.set_len(0).map_err(failed)?;
        self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        (self.length, self.digest) = (0, Digester::of(of));
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path, e))?;
        self.digest.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }
}

/// The first byte of an answer to a request for a range.
fn range_start(headers: &http::HeaderMap) -> Option<u64> {
    headers.get("content-range")?.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

impl Download<'_> {
    /// Downloads the file unless it is there. A part that an earlier download left is continued.
    ///
    /// Errors: `Error::Invalid` when the server refuses or stays out of reach, and when size or digest are not as listed, in which
    /// case nothing of it is kept; `Error::Io`; `Error::Interrupted`.
    pub fn run(&self) -> Result<()> {
        let _lock = Lock::take(&self.lock, self.cancel)?;
        if fs::metadata(&self.blob).is_ok_and(|found| found.len() == self.file.size) {
            self.progress.advance(self.file.size);
            return Ok(());
        }
        let mut part = Part::open(part_of(&self.blob), self.file, self.cancel)?;
        self.progress.advance(part.length);
        // Attempts count from the last one that came further than all before it.
        let (mut failures, mut furthest, mut problem) = (0, part.length, String::new());
        let mut pause = Duration::ZERO;
        while part.length < self.file.size {
            if failures == ATTEMPTS {
                let subject = format!("`{}`: file `{}`", self.name, self.file.path);
                return Err(Error::invalid(subject, format!("cannot be downloaded: {problem}"))
                    .remedy("check the network and HF_ENDPOINT; the same command continues the download"));
            }
            if failures > 0 {
                self.client.wait(failures, pause, self.cancel)?;
            }
            pause = Duration::ZERO;
            match self.receive(&mut part) {
                Ok(()) => problem = "the connection ended early".to_string(),
                Err(Failure::Passing(what)) => problem = what,
                Err(Failure::Busy(what, asked)) => (problem, pause) = (what, asked),
                Err(Failure::Final(error)) => return Err(error),
            }
            failures = if part.length > furthest { 1 } else { failures + 1 };
            furthest = furthest.max(part.length);
        }
        self.finish(part)
    }

    /// Receives the rest of the file, or a part of it.
    fn receive(&self, part: &mut Part) -> Result<(), Failure> {
        let response = self.client.file(self.name, self.commit, &self.file.path, part.length, self.cancel)?;
        self.place(part, &response)?;
        let incoming = Incoming::of(response);
        loop {
            let piece = incoming.next(self.cancel)?;
            if piece.is_empty() {
                return Ok(());
            }
            if part.length + piece.len() as u64 > self.file.size {
                part.restart(self.file)?;
                drop(fs::remove_file(&part.path));
                return Err(self.wrong(format!("is longer than its {} bytes", self.file.size)).into());
            }
            part.append(&piece)?;
            self.progress.advance(piece.len() as u64);
        }
    }

    /// Makes the part end where the answer begins.
    fn place(&self, part: &mut Part, response: &Response<Body>) -> Result<(), Failure> {
        let start = match response.status().as_u16() {
            206 => range_start(response.headers()).unwrap_or(u64::MAX),
            200 => 0,
            _ => u64::MAX,
        };
        if start == part.length {
            return Ok(());
        }
        let there = part.length;
        part.restart(self.file)?;
        self.progress.take_back(there);
        match start {
            0 => Ok(()),
            _ => Err(Failure::Passing("the server does not continue where the download ended".to_string())),
        }
    }

    /// Checks the digest and gives the file its name.
    fn finish(&self, part: Part) -> Result<()> {
        let Part { file, path, digest, .. } = part;
        let found = digest.text();
        if found != self.file.id {
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            return Err(self.wrong(format!("has the digest {found}, expected {}", self.file.id)));
        }
        file.sync_all().map_err(|e| Error::io("write", &path, e))?;
        fs::rename(&path, &self.blob).map_err(|e| Error::io("rename", &path, e))
    }

    fn wrong(&self, problem: String) -> Error {
        Error::invalid(format!("`{}`: downloaded file `{}`", self.name, self.file.path), problem)
            .remedy("nothing of it was kept: run the command again, and check HF_ENDPOINT if it happens again")
    }
}

/// Path of a download before it is whole.
pub(super) fn part_of(blob: &Path) -> PathBuf {
    blob.with_extension("incomplete")
}
