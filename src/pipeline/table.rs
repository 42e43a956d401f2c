//! The result table of a run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, human_bytes};
use crate::eval::Interval;

/// `table.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Table {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The dense model first; then, per strategy, its model with layers dropped and the same finetuned.
    pub rows: Vec<TableRow>,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TableRow {
    /// Name in the table: `dense`, or the strategy and whether the model is finetuned.
    pub model: String,
    /// Decoder layers that were dropped; 0 for the dense model.
    pub dropped_layers: usize,
    /// Name and mean score of each group of questions, 0 to 1.
    pub groups: Vec<(String, f64)>,
    /// Mean of the groups' scores.
    pub average: f64,
    /// Average over the dense model's, with its 95% bootstrap interval; absent when the dense model scores nothing.
    pub kept: Option<Interval>,
    /// Bytes of all ONNX files.
    pub size_bytes: u64,
    /// Measured times; absent where they were not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
}

/// Medians of a measurement in turn with the dense model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    /// A picture and a question in, first token out.
    pub ttft_ms: f64,
    /// The dense model's time over this one's, round by round.
    pub ttft_speedup: f64,
    /// The same for one prefill of the decoder alone.
    pub decoder_ttft_speedup: f64,
    /// Decoding with the cache.
    pub decode_tokens_per_s: f64,
}

impl Table {
    /// Version of the schema of `table.json`.
    pub const SCHEMA_VERSION: u32 = 1;

    /// Errors: `Error::Invalid` when rows have different groups.
    pub fn new(provenance: Provenance, rows: Vec<TableRow>) -> Result<Self> {
        let groups = |row: &TableRow| row.groups.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        if let Some(row) = rows.iter().find(|row| groups(row) != groups(&rows[0])) {
            return Err(Error::invalid(format!("row `{}`", row.model), "has other groups of questions")
                .remedy("ask all models the same benchmarks"));
        }
        Ok(Table { provenance, rows })
    }

    /// Header and rows as text, scores in percent.
    pub fn cells(&self) -> Vec<Vec<String>> {
        let percent = |value: f64| format!("{:.1}", 100.0 * value);
        let timed = self.rows.iter().any(|row| row.speed.is_some());
        let mut head = vec!["model".to_string()];
        head.extend(self.rows.first().into_iter().flat_map(|row| row.groups.iter().map(|(name, _)| name.clone())));
        head.extend(["average", "kept %"].map(String::from));
        if timed {
            head.extend(["TTFT ms", "speed-up", "decoder speed-up", "decode tokens/s"].map(String::from));
        }
        head.push("size".to_string());
        let mut cells = vec![head];
        for row in &self.rows {
            let mut line = vec![row.model.clone()];
            line.extend(row.groups.iter().map(|(_, score)| percent(*score)));
            line.push(percent(row.average));
            line.push(match row.kept {
                Some(kept) => format!("{} [{}, {}]", percent(kept.ratio), percent(kept.low), percent(kept.high)),
                None => "-".to_string(),
            });
            if timed {
                let figures = row.speed.map(|speed| {
                    let Speed { ttft_ms, ttft_speedup, decoder_ttft_speedup, decode_tokens_per_s } = speed;
                    let fine = [ttft_ms, ttft_speedup, decoder_ttft_speedup].map(|value| format!("{value:.2}"));
                    [fine.to_vec(), vec![format!("{decode_tokens_per_s:.0}")]].concat()
                });
                line.extend(figures.unwrap_or_else(|| vec!["-".to_string(); 4]));
            }
            line.push(human_bytes(row.size_bytes));
            cells.push(line);
        }
        cells
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        markdown_of(&self.cells())
    }
}

/// Cells as a Markdown table: the first row is the header; columns after the first are right-aligned.
pub(super) fn markdown_of(cells: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (number, row) in cells.iter().enumerate() {
        text.push_str(&format!("| {} |\n", row.join(" | ")));
        if number == 0 {
            text.push_str(&format!("|---{}|\n", "|---:".repeat(row.len().saturating_sub(1))));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn row(model: &str, score: f64, ttft_ms: Option<f64>) -> TableRow {
        let speed = ttft_ms.map(|ttft_ms| Speed {
            ttft_ms,
            ttft_speedup: 10.0 / ttft_ms,
            decoder_ttft_speedup: 1.3,
            decode_tokens_per_s: 123.4,
        });
        TableRow {
            model: model.into(),
            dropped_layers: 0,
            groups: vec![("General".into(), score), ("Text".into(), score)],
            average: score,
            kept: Some(Interval { ratio: score / 0.9, low: 0.5, high: 1.0 }),
            size_bytes: 1_500_000,
            speed,
        }
    }

    fn head() -> Provenance {
        Provenance::new(Table::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap()
    }

    #[test]
    fn scores_are_in_percent_and_what_was_not_measured_is_a_dash() {
        let table = Table::new(head(), vec![row("dense", 0.9, None), row("x", 0.45, Some(8.0))]).unwrap();
        let want = "\
            | model | General | Text | average | kept % | TTFT ms | speed-up | decoder speed-up | decode tokens/s | size |\n\
            |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n\
            | dense | 90.0 | 90.0 | 90.0 | 100.0 [50.0, 100.0] | - | - | - | - | 1.50 MB |\n\
            | x | 45.0 | 45.0 | 45.0 | 50.0 [50.0, 100.0] | 8.00 | 1.25 | 1.30 | 123 | 1.50 MB |\n";
        assert_eq!(table.markdown(), want);
    }

    #[test]
    fn rows_of_other_questions_are_refused() {
        let mut other = row("x", 0.5, None);
        other.groups.pop();
        assert!(Table::new(head(), vec![row("dense", 0.9, None), other]).is_err());
    }
}
