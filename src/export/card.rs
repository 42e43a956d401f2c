//! The model card of an export, in the form of Hugging Face's hub.

use std::collections::BTreeSet;

use crate::base::{Result, human_bytes};
use crate::bundle::{Bundle, ListedScores, RecordedStep, Tower, base_in_card, changes, front_matter, is_card};

use super::ExportTarget;

/// Keys of an older card's front matter that are still true of a changed model.
const KEPT: &[&str] = &["license", "license_name", "license_link", "language", "pipeline_tag"];

/// The text of `README.md`.
///
/// Errors: as `Bundle::read_text`.
pub(super) fn text(
    bundle: &Bundle,
    target: &ExportTarget,
    tool: &str,
    scores: &[ListedScores],
    size_bytes: u64,
) -> Result<String> {
    let old = bundle.assets().iter().find(|asset| is_card(&asset.file));
    let old = old.map(|asset| bundle.read_text(&asset.file)).transpose()?.flatten().unwrap_or_default();
    let history = bundle.record()?.map(|record| record.history).unwrap_or_default();
    let base = base_in_card(&old).map(str::to_string).unwrap_or_else(|| bundle.name());
    let mut lines = vec!["---".to_string()];
    lines.extend(kept(front_matter(&old)));
    if base.contains('/') {
        lines.push(format!("base_model: {base}"));
    }
    lines.push(format!("library_name: {}", target.library));
    let is_pruned = history.iter().any(|step| matches!(step, RecordedStep::Prune { .. }));
    lines.extend(["tags:", "- interlace"].map(String::from));
    lines.extend(is_pruned.then(|| "- pruned".to_string()));
    lines.extend(["---", ""].map(String::from));
    lines.push(format!("# {}", base.rsplit('/').next().unwrap_or(&base)));
    lines.push(format!(
        "\nMade from `{base}` by {tool}, for {}. All files together have {}.",
        target.name,
        human_bytes(size_bytes)
    ));
    lines.push("\n## How it was made\n".to_string());
    match history.is_empty() {
        true => lines.push("The weights are those of the model that it was made from.".to_string()),
        false => lines.extend(changes(&history)),
    }
    for tower in [Tower::Text, Tower::Vision] {
        lines.extend(strip(tower, &history));
    }
    lines.push("\n## Scores\n".to_string());
    if scores.is_empty() {
        lines.push("Not measured. Scores of the model that it was made from do not hold for it.".to_string());
    } else {
        lines.extend(["| benchmark | questions | before | after |", "|---|---:|---:|---:|"].map(String::from));
        let percent = |score: f64| format!("{:.1} %", 100.0 * score);
        lines.extend(scores.iter().map(|row| {
            let before = row.before.map_or_else(|| "-".to_string(), percent);
            format!("| {} | {} | {before} | {} |", row.benchmark, row.questions, percent(row.after))
        }));
    }
    lines.push("\n`manifest.json` lists every file with its SHA-256, the digests of what the model was made from, and the settings.".to_string());
    Ok(lines.join("\n") + "\n")
}

/// Entries of a front matter that are kept, each with the lines of its list.
fn kept(front: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in front.lines().filter(|line| line.trim_end() != "---") {
        if !line.starts_with([' ', '-']) {
            let key = line.split(':').next().unwrap_or_default();
            inside = KEPT.contains(&key);
        }
        if inside {
            found.push(line.trim_end().to_string());
        }
    }
    found
}

/// One letter per layer of the model that was never pruned: `D` dropped, `T` trained, `.` as it was.
fn strip(tower: Tower, history: &[RecordedStep]) -> Option<String> {
    let mut layers: Option<Vec<usize>> = None;
    let (mut total, mut dropped, mut trained) = (0, BTreeSet::new(), BTreeSet::new());
    for step in history {
        match step {
            RecordedStep::Prune { tower: of, layers_before, dropped: own, dropped_original, .. } if *of == tower => {
                let now = layers.get_or_insert_with(|| {
                    total = *layers_before;
                    (0..total).collect()
                });
                *now =
                    now.iter().enumerate().filter(|(place, _)| !own.contains(place)).map(|(_, layer)| *layer).collect();
                dropped.extend(dropped_original.iter().copied());
            }
            RecordedStep::Finetune { layers: own, .. } if tower == Tower::Text => {
                let original = |layer: &usize| layers.as_ref().and_then(|layers| layers.get(*layer).copied());
                trained.extend(own.iter().filter_map(original));
            }
            _ => {}
        }
    }
    layers?;
    let letters: String = (0..total)
        .map(|layer| match (dropped.contains(&layer), trained.contains(&layer)) {
            (true, _) => 'D',
            (_, true) => 'T',
            _ => '.',
        })
        .collect();
    Some(format!("\nLayers of the {} tower, `D` dropped, `T` trained, `.` as before:\n\n    {letters}", tower.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strip_counts_layers_as_before_pruning() {
        let prune = |before: usize, dropped: &[usize], original: &[usize]| RecordedStep::Prune {
            tower: Tower::Text,
            layers_before: before,
            dropped: dropped.to_vec(),
            dropped_original: original.to_vec(),
            deepstack: None,
            compensated: Vec::new(),
            bridged: Vec::new(),
            mlps: Vec::new(),
            taps: Vec::new(),
        };
        let train = RecordedStep::Finetune {
            layers: vec![1, 2],
            connector: false,
            samples: 4,
            settings: serde_json::Value::Null,
        };
        let history = [prune(6, &[1], &[1]), train, prune(5, &[3], &[4])];
        assert!(strip(Tower::Text, &history).unwrap().ends_with("    .DTTD."));
        assert_eq!(strip(Tower::Vision, &history), None);
    }

    #[test]
    fn licences_stay_and_figures_of_the_old_card_go() {
        let front = "---\nlicense: other\nlicense_name: x\nmodel-index:\n- name: y\n  results: 99\nlanguage:\n- en\n- de\ntags:\n- a\n---\n";
        assert_eq!(kept(front), ["license: other", "license_name: x", "language:", "- en", "- de"]);
    }
}
