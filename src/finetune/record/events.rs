//! TensorBoard event files with the numbers of the JSONL metrics, one scalar per tag and step.
//!
//! Source: `tensorflow/core/lib/io/record_writer.cc` (framing) and `tensorflow/core/util/event.proto` (field numbers).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::base::{Error, Result};

use super::metrics::StepMetrics;

/// Writer of one event file.
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Creates an event file in `folder`. TensorBoard reads all files of a folder as one run.
    ///
    /// Errors: `Error::Io`.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let path = folder.join(format!(
            "events.out.tfevents.{}.{:09}.{}",
            now.as_secs(),
            now.subsec_nanos(),
            std::process::id()
        ));
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        let mut writer = EventWriter { path, file };
        let mut event = Message::default();
        event.double(1, now.as_secs_f64());
        event.bytes(3, b"brain.Event:2");
        writer.push(&event.0)?;
        Ok(writer)
    }

    /// Appends the scalars of one step.
    ///
    /// Errors: `Error::Io`.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut scalars = vec![
            ("train/loss".to_string(), metrics.loss),
            ("train/learning_rate".to_string(), metrics.learning_rate),
            ("train/grad_norm".to_string(), metrics.grad_norm),
            ("train/tokens_per_s".to_string(), metrics.tokens_per_s),
            ("train/peak_memory_bytes".to_string(), metrics.peak_memory_bytes as f64),
        ];
        scalars.extend(metrics.losses.iter().map(|(name, value)| (format!("loss/{name}"), *value)));
        let mut summary = Message::default();
        for (tag, number) in scalars {
            let mut value = Message::default();
            value.bytes(1, tag.as_bytes());
            value.float(2, number as f32);
            summary.bytes(1, &value.0);
        }
        let mut event = Message::default();
        event.double(1, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        event.integer(2, metrics.step);
        event.bytes(5, &summary.0);
        self.push(&event.0)
    }

    fn push(&mut self, record: &[u8]) -> Result<()> {
        let length = (record.len() as u64).to_le_bytes();
        let mut framed = Vec::with_capacity(record.len() + 16);
        framed.extend_from_slice(&length);
        framed.extend_from_slice(&masked_checksum(&length).to_le_bytes());
        framed.extend_from_slice(record);
        framed.extend_from_slice(&masked_checksum(record).to_le_bytes());
        self.file.write_all(&framed).map_err(|e| Error::io("write", &self.path, e))
    }
}

/// Encoder of a protobuf message, for the field types that an event has.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}

fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit, which is fast enough for records of a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Reference: RFC 3720, appendix B.4, and the common check value of `123456789`.
    #[test]
    fn crc32c_equals_the_published_values() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn records_are_framed_and_hold_tag_value_and_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path()).unwrap();
        let metrics = StepMetrics {
            step: 300,
            loss: 0.5,
            losses: BTreeMap::from([("ce".to_string(), 0.25)]),
            learning_rate: 1e-3,
            grad_norm: 2.0,
            tokens_per_s: 10.0,
            answer_tokens: 1,
            samples: vec!["a".into()],
            peak_memory_bytes: 5,
        };
        writer.step(&metrics).unwrap();
        let bytes = std::fs::read(&writer.path).unwrap();
        let mut rest = bytes.as_slice();
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_checksum(&rest[..8]).to_le_bytes());
            let record = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked_checksum(record).to_le_bytes());
            records.push(record.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // After the wall time: step 300 as field 2, then the summary.
        assert_eq!(records[1][9..12], [0x10, 0xac, 0x02]);
        let value = [b"\x0a\x07loss/ce\x15".as_slice(), &0.25f32.to_le_bytes()].concat();
        assert!(records[1].windows(value.len()).any(|window| window == value));
    }
}
