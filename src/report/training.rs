//! Losses of the finetunings.

use crate::finetune::StepMetrics;

use super::Made;
use super::html::{folded_table, paragraph};
use super::run_folder::RunFolder;
use super::svg::{Caption, Line, SERIES, lines};

/// Points of a curve; each is a mean over steps, since single steps vary too much.
const POINTS: usize = 30;

fn mean(steps: &[StepMetrics]) -> f64 {
    steps.iter().map(|step| step.loss).sum::<f64>() / steps.len().max(1) as f64
}

/// Curves of the losses.
pub fn losses(run: &RunFolder) -> Made {
    let trained: Vec<(&String, &Vec<StepMetrics>)> =
        run.metrics.iter().filter(|(_, steps)| !steps.is_empty()).collect();
    if trained.is_empty() {
        let reason = "no finetuning of the run took a step; `[finetune]` with a recipe other than `fast` does";
        return Ok(Err(reason.to_string()));
    }
    let mut rows =
        vec![["model", "steps", "mean of the first quarter", "mean of the last quarter"].map(String::from).to_vec()];
    for (name, steps) in &trained {
        let quarter = steps.len().div_ceil(4);
        let (first, last) = (mean(&steps[..quarter]), mean(&steps[steps.len() - quarter..]));
        rows.push(vec![name.to_string(), steps.len().to_string(), format!("{first:.4}"), format!("{last:.4}")]);
    }
    let line = |(name, steps): &(&String, &Vec<StepMetrics>)| {
        let bin = steps.len().div_ceil(POINTS).max(1);
        let points = steps.chunks(bin).map(|part| (part[part.len() / 2].step as f64, mean(part))).collect();
        Line { name: name.to_string(), points, ringed: Vec::new() }
    };
    let description = rows[1..].iter().map(|row| format!("{}: from {} to {}. ", row[0], row[2], row[3])).collect();
    let curves: Vec<Line> = trained.iter().take(SERIES).map(line).collect();
    let title = "Loss by step";
    let caption = Caption { title, description, x: "optimiser step", y: "loss" };
    let mut text = paragraph(
        "Weighted sum of the loss terms, as means over several steps. Recipes of other losses are not comparable with each \
         other.",
    );
    if trained.len() > SERIES {
        text.push_str(&paragraph(&format!(
            "The chart has the first {SERIES} of {}; the table has all.",
            trained.len()
        )));
    }
    text.push_str(&lines(&caption, &curves).figure());
    text.push_str(&folded_table(title, &rows));
    Ok(Ok(text))
}
