//! SHA-256 of files, bytes and settings.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use memmap2::MmapOptions;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::error::{Error, Result};

/// Bytes that a thread hashes as one piece.
const PIECE: u64 = 64 << 20;
/// Bytes mapped at a time.
const WINDOW: usize = 4 << 20;

/// A SHA-256 digest as 64 lower-case hexadecimal digits.
pub type Sha256Digest = String;

/// Digest of a byte string.
pub fn sha256_bytes(bytes: &[u8]) -> Sha256Digest {
    hex(&Sha256::digest(bytes))
}

/// Digest of a file's content, read in 1 MiB pieces.
///
/// Errors: `Error::Io` when the file cannot be opened or read; `Error::Invalid` for a device, which may have no end.
pub fn sha256_file(path: &Path) -> Result<Sha256Digest> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    if file.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device()) {
        return Err(Error::invalid(format!("`{}`", path.display()), "is a device").remedy("give the path of a file"));
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let count = file.read(&mut buffer).map_err(|e| Error::io("read", path, e))?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// Digest of a file of any size, computed on all cores. Up to 64 MiB it is the digest of the content; above, the digest
/// of the file's length (8 bytes, little-endian) followed by the digests of its 64 MiB pieces in order.
///
/// Errors: `Error::Io` when the file cannot be opened or read, or is truncated during the read.
pub fn sha256_large_file(path: &Path) -> Result<Sha256Digest> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let length = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    if length <= PIECE {
        return sha256_file(path);
    }
    let pieces = length.div_ceil(PIECE);
    let next = AtomicU64::new(0);
    let worker = || -> Result<Vec<(u64, [u8; 32])>> {
        let mut done = Vec::new();
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                return Ok(done);
            }
            let (mut at, end) = (piece * PIECE, length.min((piece + 1) * PIECE));
            let mut hasher = Sha256::new();
            while at < end {
                let count = WINDOW.min((end - at) as usize);
                // SAFETY: the map is read-only and this process never writes the file. Another process could truncate
                // it, a hazard of every memory map.
                let part = unsafe { MmapOptions::new().offset(at).len(count).populate().map(&file) };
                hasher.update(&*part.map_err(|e| Error::io("map", path, e))?);
                at += count as u64;
            }
            done.push((piece, hasher.finalize().into()));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(pieces as usize);
    let mut digests = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut digests = Vec::new();
        for worker in workers {
            digests.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<_, Error>(digests)
    })?;
    digests.sort_unstable_by_key(|(piece, _)| *piece);
    let mut hasher = Sha256::new();
    hasher.update(length.to_le_bytes());
    digests.iter().for_each(|(_, digest)| hasher.update(digest));
    Ok(hex(&hasher.finalize()))
}

/// Digest of a value's compact JSON form. The order of the fields changes it.
///
/// Errors: `Error::Invalid` when the value cannot be written as JSON.
pub fn sha256_json<T: Serialize>(value: &T) -> Result<Sha256Digest> {
    let bytes = serde_json::to_vec(value).map_err(|e| Error::invalid("settings", e.to_string()))?;
    Ok(sha256_bytes(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_the_empty_string_is_the_published_one() {
        let want = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256_bytes(b""), want);
    }

    #[test]
    fn a_large_file_is_hashed_in_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        let content: Vec<u8> = (0..PIECE as usize + 3).map(|place| (place % 251) as u8).collect();
        std::fs::write(&path, &content[..PIECE as usize]).unwrap();
        assert_eq!(sha256_large_file(&path).unwrap(), sha256_bytes(&content[..PIECE as usize]));
        std::fs::write(&path, &content).unwrap();
        let (first, last) = content.split_at(PIECE as usize);
        let mut parts = (content.len() as u64).to_le_bytes().to_vec();
        parts.extend(Sha256::digest(first));
        parts.extend(Sha256::digest(last));
        assert_eq!(sha256_large_file(&path).unwrap(), sha256_bytes(&parts));
    }
}
