//! The table of a sweep: means and spreads over seeds, and the Pareto-optimal rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Provenance, human_bytes};

use super::super::table::markdown_of;

/// `sweep.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SweepTable {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The dense model's mean over the groups of questions.
    pub dense_average: f64,
    /// Seeds of which each row is the mean.
    pub seeds: Vec<u64>,
    /// By drop ratio, strategy and recipe, in the order that the sweep names them.
    pub rows: Vec<SweepRow>,
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
    /// Decoder layers that were dropped.
    pub dropped_layers: usize,
    /// The layers that went, by seed.
    pub dropped: Vec<Vec<usize>>,
    /// Average over the dense model's before healing, over seeds.
    pub kept_dropped: SeedSpread,
    /// The same after healing.
    pub kept: SeedSpread,
    /// Decoder speed-up over the dense model.
    pub speedup: f64,
    /// True when it was measured; else it is the ideal, all layers over those that stay.
    pub speedup_measured: bool,
    /// Bytes of all ONNX files.
    pub size_bytes: u64,
    /// True when no other row keeps as much and is as fast, and one of them more.
    pub pareto: bool,
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

impl SweepTable {
    /// Version of the schema of `sweep.json`.
    pub const SCHEMA_VERSION: u32 = 1;

    /// Creates the table and marks the rows on the Pareto front of retention and speed.
    pub fn new(provenance: Provenance, dense_average: f64, seeds: Vec<u64>, mut rows: Vec<SweepRow>) -> Self {
        let points: Vec<(f64, f64)> = rows.iter().map(|row| (row.kept.mean, row.speedup)).collect();
        for (row, &(kept, speed)) in rows.iter_mut().zip(&points) {
            row.pareto = !points.iter().any(|&(k, s)| k >= kept && s >= speed && (k > kept || s > speed));
        }
        SweepTable { provenance, dense_average, seeds, rows }
    }

    /// Header and rows as text.
    pub fn cells(&self) -> Vec<Vec<String>> {
        let measured = self.rows.iter().any(|row| row.speedup_measured);
        let speed = if measured { "decoder speed-up" } else { "ideal decoder speed-up" };
        let head = ["strategy", "drop %", "recipe", "dropped, kept %", "healed, kept %", speed, "size", "Pareto"];
        let rows = self.rows.iter().map(|row| {
            vec![
                row.strategy.clone(),
                format!("{:.0}", 100.0 * row.drop_ratio),
                row.recipe.clone(),
                row.kept_dropped.percent(),
                row.kept.percent(),
                format!("{:.2}", row.speedup),
                human_bytes(row.size_bytes),
                if row.pareto { "yes" } else { "" }.to_string(),
            ]
        });
        std::iter::once(head.map(String::from).to_vec()).chain(rows).collect()
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        markdown_of(&self.cells())
    }
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
            dropped_layers: 4,
            dropped: vec![vec![1, 3]; kept.len()],
            kept_dropped: SeedSpread::over(vec![0.5; kept.len()]),
            kept: SeedSpread::over(kept.to_vec()),
            speedup,
            speedup_measured: false,
            size_bytes: 1_500_000,
            pareto: false,
        }
    }

    #[test]
    fn spreads_are_sample_deviations() {
        // 0.9, 1.0, 1.1: the squared deviations sum to 0.02, divided by two.
        let spread = SeedSpread::over(vec![0.9, 1.0, 1.1]);
        assert!((spread.mean - 1.0).abs() < 1e-12 && (spread.deviation - 0.1).abs() < 1e-12);
        assert_eq!(spread.percent(), "100.0 ± 10.0");
        assert_eq!(SeedSpread::over(vec![0.5]).percent(), "50.0");
    }

    #[test]
    fn rows_that_another_beats_are_not_on_the_front() {
        let rows = vec![
            row("a", &[0.9], 1.3),
            row("b", &[0.8], 1.3),
            row("c", &[0.7], 1.5),
            row("d", &[0.9], 1.3),
            row("e", &[0.6], 1.4),
        ];
        let head = Provenance::new(SweepTable::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap();
        let table = SweepTable::new(head, 0.99, vec![42], rows);
        assert_eq!(table.rows.iter().map(|row| row.pareto).collect::<Vec<_>>(), [true, false, true, true, false]);
        let text = table.markdown();
        assert!(text.contains("| a | 25 | paper | 50.0 | 90.0 | 1.30 | 1.50 MB | yes |"), "{text}");
        assert!(text.contains("ideal decoder speed-up"), "{text}");
    }
}
