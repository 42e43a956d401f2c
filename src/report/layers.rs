//! Similarities of packs of layers, and the layers of each plan.

use std::collections::BTreeSet;

use crate::method::select::Group;
use crate::method::{LayerRole, Modality, Plan, Scores};

use super::Made;
use super::html::{escaped, folded_table, paragraph};
use super::run_folder::RunFolder;
use super::svg::{Caption, Line, lines};

/// First and last layer of a group of a plan.
fn span(group: &Group) -> Option<(usize, usize)> {
    let layers: BTreeSet<usize> = group.drop.iter().chain(&group.finetune).chain(&group.anchor).copied().collect();
    Some((*layers.first()?, *layers.last()?))
}

/// First layers of the packs of this size that a plan chose by their similarity.
fn chosen(plan: &Plan, size: usize) -> Vec<f64> {
    let ranked = plan.groups.iter().filter(|group| group.score.is_some() && group.anchor.is_some());
    let spans = ranked.filter_map(span).filter(|(first, last)| last - first + 1 == size);
    spans.map(|(first, _)| first as f64).collect()
}

/// Similarity of packs of `size` layers: of all tokens, then of each modality.
fn curves(scores: &Scores, size: usize, ringed: &[f64]) -> Vec<Line> {
    let all = match size {
        1 => Some(&scores.sim_1),
        2 => Some(&scores.sim_2),
        3 => Some(&scores.sim_3),
        _ => scores.longer.get(&size),
    };
    let points = |means: &[f64]| means.iter().enumerate().map(|(layer, mean)| (layer as f64, *mean)).collect();
    let mut found = Vec::new();
    if let Some(all) = all {
        found.push(Line { name: "all tokens".into(), points: points(&all.mean), ringed: ringed.to_vec() });
    }
    for (modality, own) in scores.modalities.iter().filter(|(modality, _)| **modality != Modality::All) {
        if let Some(pack) = own.packs.get(&size) {
            let name = format!("{} tokens", modality.name());
            found.push(Line { name, points: points(&pack.mean), ringed: Vec::new() });
        }
    }
    found
}

/// Curves of the similarities, one chart for each size of packs.
pub fn similarity(run: &RunFolder) -> Made {
    let Some(scores) = &run.scores else {
        return Ok(Err("the run has no `scores.json`; `interlace score` and `interlace run` make it".to_string()));
    };
    let plan = run.plans.values().find(|plan| plan.groups.iter().any(|group| group.anchor.is_some()));
    let mut text = paragraph(&format!(
        "Cosine similarity of the residual stream before and after a pack of layers, mean over {} samples. A pack with a \
         similarity near 1 changes the stream little.",
        scores.num_samples
    ));
    if let Some(plan) = plan {
        let rings = format!("Rings mark the packs that the strategy {} chose.", plan.strategy);
        text.push_str(&paragraph(&rings));
    }
    text.push_str("<div class=\"charts\">\n");
    let sizes: Vec<usize> = [3, 2, 1].into_iter().chain(scores.longer.keys().copied()).collect();
    for size in sizes {
        let ringed = plan.map(|plan| chosen(plan, size)).unwrap_or_default();
        let found = curves(scores, size, &ringed);
        let name = match size {
            1 => "Single layers".to_string(),
            2 => "Pairs".to_string(),
            3 => "Triplets".to_string(),
            size => format!("Packs of {size} layers"),
        };
        let Some(all) = found.first() else { continue };
        let best = all.points.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let best = best
            .map_or(String::new(), |(layer, mean)| format!("The most similar starts at layer {layer}: {mean:.4}. "));
        let rings: Vec<String> = ringed.iter().map(|layer| layer.to_string()).collect();
        let chosen = if rings.is_empty() { String::new() } else { format!("Chosen: {}.", rings.join(", ")) };
        let description = format!("Similarity by the first layer of the pack. {best}{chosen}");
        let caption = Caption { title: &name, description, x: "first layer of the pack", y: "cosine similarity" };
        let mut rows = vec![vec!["first layer".to_string()]];
        rows[0].extend(found.iter().map(|line| line.name.clone()));
        for (place, (layer, _)) in all.points.iter().enumerate() {
            let mark = if ringed.contains(layer) { " (chosen)" } else { "" };
            let mut row = vec![format!("{layer}{mark}")];
            let value = |line: &Line| line.points.get(place).map_or("-".to_string(), |point| format!("{:.4}", point.1));
            row.extend(found.iter().map(value));
            rows.push(row);
        }
        text.push_str(&format!(
            "<div>\n<h3>{}</h3>\n{}{}</div>\n",
            escaped(&name),
            lines(&caption, &found).figure(),
            folded_table(&name, &rows)
        ));
    }
    text.push_str("</div>\n");
    Ok(Ok(text))
}

/// The strip of layers of each plan.
pub fn strips(run: &RunFolder) -> Made {
    if run.plans.is_empty() {
        return Ok(Err("the run has no plan; `[plan] strategies` of the recipe makes one".to_string()));
    }
    let mut text = paragraph("D: dropped. F: finetuned. A: frozen layer that closes a triplet. A dot: frozen.");
    for (name, plan) in &run.plans {
        let list = |layers: &[usize]| layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        text.push_str(&format!("<h3>{}</h3>\n<ol class=\"strip\" aria-label=\"Layers of {0}\">", escaped(name)));
        for layer in &plan.layers {
            let (class, word) = match layer.role {
                LayerRole::Drop => ('D', "dropped"),
                LayerRole::Finetune => ('F', "finetuned"),
                LayerRole::Anchor => ('A', "anchor"),
                LayerRole::Freeze => ('Z', "frozen"),
            };
            text.push_str(&format!(
                "<li class=\"{class}\" title=\"layer {0}: {word}\"><span>{0}</span>{1}</li>",
                layer.index,
                layer.role.letter()
            ));
        }
        text.push_str("</ol>\n");
        text.push_str(&paragraph(&format!(
            "Dropped {} of {}: {}. Finetuned: {}.",
            plan.drop.len(),
            plan.num_layers,
            list(&plan.drop),
            if plan.finetune.is_empty() { "none".to_string() } else { list(&plan.finetune) }
        )));
    }
    Ok(Ok(text))
}
