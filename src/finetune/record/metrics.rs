//! Metrics of a run: one JSON line per optimiser step.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};

/// Name of the metrics file in a work folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Metrics of one optimiser step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StepMetrics {
    /// Optimiser step, counted from 1.
    pub step: u64,
    /// Weighted sum of the loss terms.
    pub loss: f64,
    /// Each term before its weight.
    pub losses: BTreeMap<String, f64>,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens per second of this step, image tokens included, padding excluded.
    pub tokens_per_s: f64,
    /// Answer tokens in this step.
    pub answer_tokens: u64,
    /// Ids of the step's samples, longest first.
    #[serde(default)]
    pub samples: Vec<String>,
    /// Largest resident set of the process so far, in bytes.
    pub peak_memory_bytes: u64,
}

/// Writer of a JSONL file with one line per step.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Opens `path` to continue after optimiser step `step`. Lines of later steps are removed, because a resumed run
    /// repeats these steps. With `step` 0 the file starts empty.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when a complete line of an existing file is not a step's metrics.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let mut kept = String::new();
        if step > 0 && path.exists() {
            for (line, _) in lines(path)?.iter().filter(|(_, metrics)| metrics.step <= step) {
                kept.push_str(line);
            }
        }
        std::fs::write(path, kept).map_err(|e| Error::io("write", path, e))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(MetricsWriter { path: path.to_path_buf(), file })
    }

    /// Appends one step.
    ///
    /// Errors: `Error::Io`.
    pub fn push(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut line = serde_json::to_string(metrics).map_err(|e| Error::invalid("training metrics", e.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io("write", &self.path, e))
    }
}

/// The steps in a metrics file.
///
/// Errors: as [`MetricsWriter::open`].
pub fn read_metrics(path: &Path) -> Result<Vec<StepMetrics>> {
    Ok(lines(path)?.into_iter().map(|(_, metrics)| metrics).collect())
}

/// Complete lines of a metrics file, each with its step.
fn lines(path: &Path) -> Result<Vec<(String, StepMetrics)>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let finished = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let read = finished.map(|line| {
        let metrics = serde_json::from_str(line).map_err(|e| {
            Error::invalid(format!("`{}`", path.display()), format!("is no file of training metrics: {e}"))
        })?;
        Ok((line.to_string(), metrics))
    });
    read.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            loss: 1.5 / step as f64,
            losses: BTreeMap::from([("ce".to_string(), 1.5)]),
            learning_rate: 1e-3,
            grad_norm: 0.5,
            tokens_per_s: 1000.0,
            answer_tokens: 12,
            samples: vec!["a".into(), "b".into()],
            peak_memory_bytes: 1,
        }
    }

    #[test]
    fn a_resumed_run_rewrites_the_metrics_after_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path, 0).unwrap();
        for step in 1..=5 {
            writer.push(&at(step)).unwrap();
        }
        // A process that is killed during a write leaves an incomplete line.
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":6").unwrap();
        let mut writer = MetricsWriter::open(&path, 3).unwrap();
        writer.push(&at(4)).unwrap();
        let steps: Vec<u64> = read_metrics(&path).unwrap().iter().map(|metrics| metrics.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }
}
