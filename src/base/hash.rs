//! SHA-256 of files, bytes and settings.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::error::{Error, Result};

/// A SHA-256 digest as 64 lower-case hexadecimal digits.
pub type Sha256Digest = String;

/// Digest of a byte string.
pub fn sha256_bytes(bytes: &[u8]) -> Sha256Digest {
    hex(&Sha256::digest(bytes))
}

/// Digest of a file's content, read in 1 MiB pieces.
///
/// Errors: `Error::Io` when the file cannot be opened or read.
pub fn sha256_file(path: &Path) -> Result<Sha256Digest> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
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

/// Digest of a value's compact JSON form; field order is part of it.
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
}
