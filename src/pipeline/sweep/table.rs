//! The table of a sweep: means and spreads over seeds, and the Pareto-optimal rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Provenance, human_bytes};
use crate::eval::Difference;

use super::super::comparison::{Measure, OtherScore};
use super::super::table::{markdown_of, points};

/// `sweep.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SweepTable {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The dense model as it came.
    pub dense: DenseFigures,
    /// The dense model, finetuned on the samples that pruned models are healed on.
    pub dense_finetuned: Vec<SweepDense>,
    /// Seeds of which each row is the mean.
    pub seeds: Vec<u64>,
    /// By drop ratio, strategy, recipe and precision, in the order that the sweep names them.
    pub rows: Vec<SweepRow>,
}

/// Figures of the dense model as it came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DenseFigures {
    /// Mean over the groups of questions.
    pub average: f64,
    /// Mean loss in nats per answer token on the held-back part of the finetuning data; absent where none is held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_loss: Option<f64>,
    /// Figures on data of other kinds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<OtherScore>,
}

/// The dense model, finetuned, over all seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepDense {
    /// Name in the table.
    pub model: String,
    /// The recipe of healing that it is compared with; the name says so where it was finetuned by another.
    pub recipe: String,
    /// The drop ratio of the plans that name its layers; absent where all layers were trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_ratio: Option<f64>,
    /// Decoder layers that were trained.
    pub trained_layers: usize,
    /// Mean over the groups of questions.
    pub average: SeedSpread,
    /// Average over that of the dense model as it came.
    pub kept_of_dense: SeedSpread,
    /// Mean loss in nats per answer token on what is held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_loss: Option<SeedSpread>,
    /// Figures on data of other kinds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<SweepOther>,
}

/// Figures on data of another kind, over all seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepOther {
    /// Name of the data.
    pub name: String,
    /// What was measured.
    pub measure: Measure,
    /// The score, 0 to 1, or the perplexity.
    pub value: SeedSpread,
    /// The score over the dense model's, or the dense model's perplexity over this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<SeedSpread>,
}

/// One combination over all seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepRow {
    /// Part of the decoder's layers to drop, as in the sweep's recipe.
    pub drop_ratio: f64,
    /// Name of the strategy that chose the layers.
    pub strategy: String,
    /// Name of the finetuning recipe.
    pub recipe: String,
    /// Precision of the healed model, as `export --precision` names it; absent for its floats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// Decoder layers that were dropped.
    pub dropped_layers: usize,
    /// The layers that went, by seed.
    pub dropped: Vec<Vec<usize>>,
    /// Average over the dense model's before healing, over seeds.
    pub kept_dropped: SeedSpread,
    /// Average after healing over that of the dense model finetuned on the same samples with the same seed; absent where
    /// the sweep leaves that out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_of_finetuned: Option<SeedSpread>,
    /// Average after healing less that of the dense model finetuned on the same samples, the mean over seeds, with its 95%
    /// paired bootstrap interval over questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference_from_finetuned: Option<Difference>,
    /// Average after healing over that of the dense model as it came.
    pub kept_of_dense: SeedSpread,
    /// Mean loss in nats per answer token on what is held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back_loss: Option<SeedSpread>,
    /// Figures on data of other kinds than the models are healed on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<SweepOther>,
    /// Decoder speed-up over the dense model.
    pub speedup: f64,
    /// True when it was measured; else it is the ideal, all layers over those that stay.
    pub speedup_measured: bool,
    /// Bytes of all ONNX files of the precision.
    pub size_bytes: u64,
    /// True when no other row of the same precision keeps as much of the dense model and is as fast, and one of them more.
    pub pareto: bool,
    /// True for the row of its drop ratio with the lowest loss on what is held back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub chosen: bool,
}

/// Values of several seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SeedSpread {
    /// Arithmetic mean over seeds.
    pub mean: f64,
    /// Sample standard deviation; 0 for one value.
    pub deviation: f64,
    /// One value per seed, in the order of the sweep's seeds.
    pub values: Vec<f64>,
}

impl SeedSpread {
    /// Mean and deviation of at least one value.
    pub fn over(values: Vec<f64>) -> Self {
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
        SeedSpread { mean, deviation, values }
    }

    fn percent(&self) -> String {
        let (mean, deviation) = (100.0 * self.mean, 100.0 * self.deviation);
        if self.values.len() > 1 { format!("{mean:.1} ± {deviation:.1}") } else { format!("{mean:.1}") }
    }
}

impl SweepRow {
    /// The recipe, and the precision where it is not that of the floats.
    pub fn recipe_and_precision(&self) -> String {
        self.precision.as_ref().map_or(self.recipe.clone(), |precision| format!("{}, {precision}", self.recipe))
    }
}

impl SweepOther {
    fn text(&self) -> String {
        let score = self.score();
        match self.value.values.len() {
            0 | 1 => score.text(self.value.mean),
            _ => format!("{} ± {}", score.text(self.value.mean), score.text(self.value.deviation)),
        }
    }

    fn score(&self) -> OtherScore {
        OtherScore { name: self.name.clone(), measure: self.measure, value: self.value.mean, kept: None }
    }
}

/// Columns that a table has only where something was measured.
#[derive(Clone, Copy)]
struct Columns {
    finetuned: bool,
    held_back: bool,
}

impl SweepTable {
    /// Version of the schema of `sweep.json`.
    pub const SCHEMA_VERSION: u32 = 2;

    /// Marks the rows on the Pareto front of what is kept of the dense model against speed, and those that the loss on
    /// held-back data chooses.
    pub fn new(
        provenance: Provenance,
        dense: DenseFigures,
        dense_finetuned: Vec<SweepDense>,
        seeds: Vec<u64>,
        mut rows: Vec<SweepRow>,
    ) -> Self {
        let points: Vec<(f64, f64)> = rows.iter().map(|row| (row.kept_of_dense.mean, row.speedup)).collect();
        let precisions: Vec<Option<String>> = rows.iter().map(|row| row.precision.clone()).collect();
        let losses: Vec<(f64, Option<f64>)> =
            rows.iter().map(|row| (row.drop_ratio, row.held_back_loss.as_ref().map(|loss| loss.mean))).collect();
        for (place, (row, &(kept, speed))) in rows.iter_mut().zip(&points).enumerate() {
            let mut alike = points.iter().zip(&precisions).filter(|(_, precision)| **precision == row.precision);
            let dominates = |&(k, s): &(f64, f64)| k >= kept && s >= speed && (k > kept || s > speed);
            row.pareto = !alike.any(|(point, _)| dominates(point));
            let (ratio, own) = losses[place];
            let others = losses.iter().enumerate().filter(|(other, (of, _))| *other != place && *of == ratio);
            row.chosen = own.is_some_and(|own| {
                // Of equals the first one.
                others
                    .into_iter()
                    .all(|(other, (_, loss))| loss.is_none_or(|loss| loss > own || loss == own && other > place))
            });
        }
        SweepTable { provenance, dense, dense_finetuned, seeds, rows }
    }

    /// Header and rows as text.
    pub fn cells(&self) -> Vec<Vec<String>> {
        let columns =
            Columns { finetuned: !self.dense_finetuned.is_empty(), held_back: self.dense.held_back_loss.is_some() };
        let measured = self.rows.iter().any(|row| row.speedup_measured);
        let mut head = ["model", "drop %", "recipe", "dropped, kept % of dense"].map(String::from).to_vec();
        if columns.finetuned {
            head.extend(["kept % of dense, finetuned", "difference from it"].map(String::from));
        }
        head.push("kept % of dense".to_string());
        head.extend(columns.held_back.then(|| "held-back loss".to_string()));
        head.extend(self.dense.other.iter().map(OtherScore::head));
        head.push(if measured { "decoder speed-up" } else { "ideal decoder speed-up" }.to_string());
        head.extend(["size", "Pareto"].map(String::from));
        if columns.held_back {
            head.push("chosen".to_string());
        }
        let dense = std::iter::once(self.dense_cells(columns));
        let finetuned = self.dense_finetuned.iter().map(|row| dense_finetuned_cells(row, columns));
        let rows = self.rows.iter().map(|row| row_cells(row, columns));
        std::iter::once(head).chain(dense).chain(finetuned).chain(rows).collect()
    }

    fn dense_cells(&self, columns: Columns) -> Vec<String> {
        let figures = Figures {
            loss: self.dense.held_back_loss.map_or(dash(), |loss| format!("{loss:.4}")),
            other: self.dense.other.iter().map(|other| other.text(other.value)).collect(),
        };
        unhealed("dense", ("-", "-"), "100.0".to_string(), figures, columns)
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        markdown_of(&self.cells())
    }
}

/// Figures of a row besides what is kept.
struct Figures {
    loss: String,
    other: Vec<String>,
}

fn dash() -> String {
    "-".to_string()
}

fn loss_text(loss: Option<&SeedSpread>) -> String {
    loss.map_or(dash(), |loss| match loss.values.len() {
        0 | 1 => format!("{:.4}", loss.mean),
        _ => format!("{:.4} ± {:.4}", loss.mean, loss.deviation),
    })
}

/// A row of a model that lost no layer.
fn unhealed(model: &str, of: (&str, &str), kept: String, figures: Figures, columns: Columns) -> Vec<String> {
    let mut line = vec![model.to_string(), of.0.to_string(), of.1.to_string(), dash()];
    if columns.finetuned {
        line.extend([dash(), dash()]);
    }
    line.push(kept);
    line.extend(columns.held_back.then_some(figures.loss));
    line.extend(figures.other);
    line.extend(["1.00".to_string(), dash(), String::new()]);
    line.extend(columns.held_back.then(String::new));
    line
}

fn dense_finetuned_cells(row: &SweepDense, columns: Columns) -> Vec<String> {
    let ratio = row.drop_ratio.map_or(dash(), |ratio| format!("{:.0}", 100.0 * ratio));
    let other = row.other.iter().map(SweepOther::text).collect();
    let figures = Figures { loss: loss_text(row.held_back_loss.as_ref()), other };
    unhealed(&row.model, (&ratio, &row.recipe), row.kept_of_dense.percent(), figures, columns)
}

fn row_cells(row: &SweepRow, columns: Columns) -> Vec<String> {
    let mut line = vec![
        row.strategy.clone(),
        format!("{:.0}", 100.0 * row.drop_ratio),
        row.recipe_and_precision(),
        row.kept_dropped.percent(),
    ];
    if columns.finetuned {
        line.push(row.kept_of_finetuned.as_ref().map_or(dash(), SeedSpread::percent));
        line.push(points(row.difference_from_finetuned));
    }
    line.push(row.kept_of_dense.percent());
    line.extend(columns.held_back.then(|| loss_text(row.held_back_loss.as_ref())));
    line.extend(row.other.iter().map(SweepOther::text));
    let mark = |set: bool| if set { "yes" } else { "" }.to_string();
    line.extend([format!("{:.2}", row.speedup), human_bytes(row.size_bytes), mark(row.pareto)]);
    line.extend(columns.held_back.then(|| mark(row.chosen)));
    line
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn row(strategy: &str, kept: &[f64], speedup: f64) -> SweepRow {
        SweepRow {
            drop_ratio: 0.25,
            strategy: strategy.into(),
            recipe: "paper".into(),
            precision: None,
            dropped_layers: 4,
            dropped: vec![vec![1, 3]; kept.len()],
            kept_dropped: SeedSpread::over(vec![0.5; kept.len()]),
            kept_of_finetuned: None,
            difference_from_finetuned: None,
            kept_of_dense: SeedSpread::over(kept.to_vec()),
            held_back_loss: None,
            other: Vec::new(),
            speedup,
            speedup_measured: false,
            size_bytes: 1_500_000,
            pareto: false,
            chosen: false,
        }
    }

    fn table(held_back_loss: Option<f64>, dense_finetuned: Vec<SweepDense>, rows: Vec<SweepRow>) -> SweepTable {
        let head = Provenance::new(SweepTable::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap();
        let dense = DenseFigures { average: 0.99, held_back_loss, other: Vec::new() };
        SweepTable::new(head, dense, dense_finetuned, vec![42], rows)
    }

    #[test]
    fn the_spread_over_seeds_is_the_sample_standard_deviation() {
        // 0.9, 1.0, 1.1: the squared deviations sum to 0.02, divided by two.
        let spread = SeedSpread::over(vec![0.9, 1.0, 1.1]);
        assert!((spread.mean - 1.0).abs() < 1e-12 && (spread.deviation - 0.1).abs() < 1e-12);
        assert_eq!(spread.percent(), "100.0 ± 10.0");
        assert_eq!(SeedSpread::over(vec![0.5]).percent(), "50.0");
    }

    #[test]
    fn dominated_rows_are_not_on_the_pareto_front() {
        let rows = vec![
            row("a", &[0.9], 1.3),
            row("b", &[0.8], 1.3),
            row("c", &[0.7], 1.5),
            row("d", &[0.9], 1.3),
            row("e", &[0.6], 1.4),
            // Rows of other precisions are compared with each other.
            SweepRow { precision: Some("int4".into()), ..row("f", &[0.5], 1.3) },
        ];
        let table = table(None, Vec::new(), rows);
        assert_eq!(table.rows.iter().map(|row| row.pareto).collect::<Vec<_>>(), [true, false, true, true, false, true]);
        let text = table.markdown();
        assert!(text.contains("| a | 25 | paper | 50.0 | 90.0 | 1.30 | 1.50 MB | yes |"), "{text}");
        assert!(text.contains("| f | 25 | paper, int4 |"), "{text}");
        assert!(text.contains("ideal decoder speed-up"), "{text}");
    }

    #[test]
    fn the_held_back_loss_chooses_one_row_of_each_drop_ratio() {
        let with = |ratio: f64, loss: f64| SweepRow {
            drop_ratio: ratio,
            held_back_loss: Some(SeedSpread::over(vec![loss])),
            kept_of_finetuned: Some(SeedSpread::over(vec![0.95])),
            difference_from_finetuned: Some(Difference { difference: -0.05, low: -0.07, high: -0.03 }),
            ..row("a", &[0.97], 1.3)
        };
        let dense = SweepDense {
            model: "dense, finetuned".into(),
            recipe: "paper".into(),
            drop_ratio: None,
            trained_layers: 16,
            average: SeedSpread::over(vec![1.0]),
            kept_of_dense: SeedSpread::over(vec![1.02]),
            held_back_loss: Some(SeedSpread::over(vec![0.5])),
            other: Vec::new(),
        };
        let rows = vec![with(0.25, 0.8), with(0.25, 0.6), with(0.25, 0.6), with(0.5, 0.9)];
        let table = table(Some(0.7), vec![dense], rows);
        assert_eq!(table.rows.iter().map(|row| row.chosen).collect::<Vec<_>>(), [false, true, false, true]);
        let text = table.markdown();
        for line in [
            "| dense | - | - | - | - | - | 100.0 | 0.7000 | 1.00 | - |  |  |",
            "| dense, finetuned | - | paper | - | - | - | 102.0 | 0.5000 | 1.00 | - |  |  |",
            "| a | 25 | paper | 50.0 | 95.0 | -5.0 [-7.0, -3.0] | 97.0 | 0.6000 | 1.30 | 1.50 MB | yes | yes |",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
