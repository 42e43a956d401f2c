//! Streaming decompression of a Snappy block. Memory holds only a window of the output.
//!
//! Source: google/snappy, format_description.txt.

use std::io::{self, BufRead, Read};

use super::hybrid::varint;

/// Minimum number of decompressed bytes kept for copies. Compressors use blocks of 64 KiB, so their copies do not reach
/// farther back.
const WINDOW: usize = 16 << 20;

/// Reader of the decompressed bytes of a block.
pub(super) struct Snappy<R> {
    input: R,
    /// Bytes of the block that are not decompressed yet; `None` before the length is read.
    left: Option<u64>,
    /// Bytes of the current literal that are not copied yet.
    literal: u64,
    /// The most recently decompressed bytes.
    window: Vec<u8>,
    /// Number of bytes of the window that were already returned.
    taken: usize,
}

impl<R: BufRead> Snappy<R> {
    pub fn new(input: R) -> Self {
        Snappy { input, left: None, literal: 0, window: Vec::new(), taken: 0 }
    }

    /// Decompresses the next piece. Returns false at the end of the block.
    fn advance(&mut self) -> io::Result<bool> {
        let left = match self.left {
            Some(left) => left,
            None => varint(&mut self.input).map_err(io::Error::other)?,
        };
        self.left = Some(left);
        if left == 0 {
            return Ok(false);
        }
        if self.window.len() >= 2 * WINDOW {
            self.window.drain(..self.window.len() - WINDOW);
            self.taken = self.window.len();
        }
        if self.literal == 0 {
            self.element(left)?;
        }
        if self.literal > 0 {
            let bytes = self.input.fill_buf()?;
            let count = bytes.len().min(usize::try_from(self.literal).unwrap_or(usize::MAX));
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.window.extend_from_slice(bytes.get(..count).unwrap_or_default());
            self.input.consume(count);
            self.literal -= count as u64;
            self.left = self.left.map(|left| left - count as u64);
        }
        Ok(true)
    }

    /// Reads the header of a literal, or performs a copy.
    fn element(&mut self, left: u64) -> io::Result<()> {
        let mut number = |bytes: usize| {
            let mut value = [0; 8];
            self.input.read_exact(value.get_mut(..bytes).unwrap_or_default())?;
            io::Result::Ok(u64::from_le_bytes(value))
        };
        let tag = number(1)?;
        let upper = tag >> 2;
        let (length, distance) = match tag & 3 {
            0 if upper < 60 => (upper + 1, None),
            0 => (number(upper as usize - 59)? + 1, None),
            1 => (4 + (upper & 7), Some(((tag >> 5) << 8) | number(1)?)),
            2 => (upper + 1, Some(number(2)?)),
            _ => (upper + 1, Some(number(4)?)),
        };
        if length > left {
            return Err(io::Error::other("is longer than its head says"));
        }
        let Some(distance) = distance else {
            self.literal = length;
            return Ok(());
        };
        let distance = usize::try_from(distance).unwrap_or(usize::MAX);
        if distance == 0 || distance > self.window.len() {
            return Err(io::Error::other(format!("copies from {distance} bytes back, which are not held")));
        }
        for _ in 0..length {
            let byte = self.window.get(self.window.len() - distance).copied().unwrap_or_default();
            self.window.push(byte);
        }
        self.left = Some(left - length);
        Ok(())
    }
}

impl<R: BufRead> Read for Snappy<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.window.len() {
            if !self.advance()? {
                return Ok(0);
            }
        }
        let mut ready = self.window.get(self.taken..).unwrap_or_default();
        let count = ready.read(out)?;
        self.taken += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decompressed(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Snappy::new(io::BufReader::with_capacity(7, bytes)).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn literals_and_copies_of_every_form_are_decoded() {
        let mut block = vec![80 + 4 + 4 + 4];
        // A literal of 80 bytes with its length in a separate byte, then copies with distances of one, two and four
        // bytes.
        block.extend([60 << 2, 79]);
        block.extend(0..80u8);
        block.extend([1, 80]);
        block.extend([(3 << 2) | 2, 84, 0]);
        block.extend([(3 << 2) | 3, 1, 0, 0, 0]);
        let want: Vec<u8> = (0..80).chain([0, 1, 2, 3, 0, 1, 2, 3, 3, 3, 3, 3]).collect();
        assert_eq!(decompressed(&block).unwrap(), want);
    }

    #[test]
    fn malformed_snappy_blocks_are_refused() {
        for (block, want) in [
            (&[9, 0, b'a', 1, 2][..], "copies from 2 bytes back"),
            (&[9, 0, b'a', 1, 0], "copies from 0 bytes back"),
            (&[1, 4, b'a', b'b'], "longer than its head"),
            (&[4, 0, b'a'], "fill"),
            (&[9, 32, b'a'], "end of file"),
        ] {
            let error = decompressed(block).unwrap_err().to_string();
            assert!(error.contains(want), "{block:?}: {error}");
        }
    }
}
