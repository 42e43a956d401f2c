//! The result table of a run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, human_bytes};
use crate::eval::{Difference, Interval};

use super::comparison::OtherScore;

/// `table.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Table {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The dense model first, then the same finetuned; then, per strategy, its model with layers dropped and the same healed.
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
    /// Average over that of the dense model finetuned on the same samples, with its 95% paired bootstrap interval; absent
    /// when there is no such row or it scores nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_of_finetuned: Option<Interval>,
    /// Average less that of the dense model finetuned on the same samples, from the same draws.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference_from_finetuned: Option<Difference>,
    /// Average over the dense model's as it came, with its 95% paired bootstrap interval; absent when that scores nothing.
    pub kept_of_dense: Option<Interval>,
    /// Average less the dense model's as it came, from the same draws.
    pub difference_from_dense: Option<Difference>,
    /// Mean loss in nats per answer token on the held-back part of the finetuning data; absent where none is held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_loss: Option<f64>,
    /// Figures on data of other kinds than the models are healed on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<OtherScore>,
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
    pub const SCHEMA_VERSION: u32 = 2;

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
        let timed = self.rows.iter().any(|row| row.speed.is_some());
        let finetuned = self.rows.iter().any(|row| row.kept_of_finetuned.is_some());
        let held_back = self.rows.iter().any(|row| row.held_back_loss.is_some());
        let first = self.rows.first();
        let mut head = vec!["model".to_string()];
        head.extend(first.into_iter().flat_map(|row| row.groups.iter().map(|(name, _)| name.clone())));
        head.push("average".to_string());
        if finetuned {
            head.extend(["kept % of dense, finetuned", "difference from it"].map(String::from));
        }
        head.push("kept % of dense".to_string());
        head.extend(held_back.then(|| "held-back loss".to_string()));
        head.extend(first.into_iter().flat_map(|row| row.other.iter().map(OtherScore::head)));
        if timed {
            head.extend(["TTFT ms", "speed-up", "decoder speed-up", "decode tokens/s"].map(String::from));
        }
        head.push("size".to_string());
        let mut cells = vec![head];
        for row in &self.rows {
            let mut line = vec![row.model.clone()];
            line.extend(row.groups.iter().map(|(_, score)| percent(*score)));
            line.push(percent(row.average));
            if finetuned {
                line.extend([kept(row.kept_of_finetuned), points(row.difference_from_finetuned)]);
            }
            line.push(kept(row.kept_of_dense));
            if held_back {
                line.push(row.held_back_loss.map_or("-".to_string(), |loss| format!("{loss:.4}")));
            }
            line.extend(row.other.iter().map(|other| other.text(other.value)));
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

fn percent(value: f64) -> String {
    format!("{:.1}", 100.0 * value)
}

fn kept(kept: Option<Interval>) -> String {
    let text = |kept: Interval| format!("{} [{}, {}]", percent(kept.ratio), percent(kept.low), percent(kept.high));
    kept.map_or("-".to_string(), text)
}

/// A difference in percentage points.
pub(super) fn points(difference: Option<Difference>) -> String {
    let points = |value: f64| format!("{:+.1}", 100.0 * value);
    let text = |own: Difference| format!("{} [{}, {}]", points(own.difference), points(own.low), points(own.high));
    difference.map_or("-".to_string(), text)
}

/// Cells as a Markdown table: the first row is its head, columns after the first are aligned to the right.
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

    use super::super::comparison::Measure;
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
            kept_of_finetuned: (model != "dense").then_some(Interval { ratio: score / 0.95, low: 0.4, high: 0.6 }),
            difference_from_finetuned: (model != "dense").then_some(Difference {
                difference: score - 0.95,
                low: -0.6,
                high: -0.4,
            }),
            kept_of_dense: Some(Interval { ratio: score / 0.9, low: 0.5, high: 1.0 }),
            difference_from_dense: None,
            held_back_loss: ttft_ms.map(|ms| ms / 10.0),
            other: vec![
                OtherScore { name: "quotes".into(), measure: Measure::Perplexity, value: 31.257, kept: None },
                OtherScore { name: "easy".into(), measure: Measure::Score, value: 0.5, kept: None },
            ],
            size_bytes: 1_500_000,
            speed,
        }
    }

    fn head() -> Provenance {
        Provenance::new(Table::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap()
    }

    #[test]
    fn scores_are_percentages_and_missing_values_are_dashes() {
        let table = Table::new(head(), vec![row("dense", 0.9, None), row("x", 0.45, Some(8.0))]).unwrap();
        let want = "\
            | model | General | Text | average | kept % of dense, finetuned | difference from it | kept % of dense | held-back loss | quotes perplexity | easy % | TTFT ms | speed-up | decoder speed-up | decode tokens/s | size |\n\
            |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n\
            | dense | 90.0 | 90.0 | 90.0 | - | - | 100.0 [50.0, 100.0] | - | 31.26 | 50.0 | - | - | - | - | 1.50 MB |\n\
            | x | 45.0 | 45.0 | 45.0 | 47.4 [40.0, 60.0] | -50.0 [-60.0, -40.0] | 50.0 [50.0, 100.0] | 0.8000 | 31.26 | 50.0 | 8.00 | 1.25 | 1.30 | 123 | 1.50 MB |\n";
        assert_eq!(table.markdown(), want);
    }

    #[test]
    fn rows_with_different_question_groups_are_refused() {
        let mut other = row("x", 0.5, None);
        other.groups.pop();
        let error = Table::new(head(), vec![row("dense", 0.9, None), other]).unwrap_err().to_string();
        assert!(error.starts_with("row `x`: has other groups of questions"), "{error}");
    }
}
