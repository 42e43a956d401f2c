//! Sections about a tuning: plans, the front, the models that were made, and what each part costs.

use crate::pipeline::TuneReport;

use super::Made;
use super::html::{folded_table, paragraph, table};
use super::run_folder::RunFolder;
use super::svg::{Caption, Chart, Line, lines};

fn of(run: &RunFolder) -> Result<&TuneReport, String> {
    run.tune.as_ref().ok_or_else(|| "the folder holds no tuning".to_string())
}

/// The whole model, the best plan, the best one of each axis, and about a quarter of each.
pub fn plans(run: &RunFolder) -> Made {
    Ok(of(run).map(|tune| {
        let mut text = paragraph(
            "Predicted by adding up. Loss: nats of an answer token on calibration samples; kept: likelihood of an answer token \
             over that of the whole model. Held-back losses are measured.",
        );
        text.push_str(&table("Plans", &tune.plan_cells()));
        tune.notes.iter().for_each(|note| text.push_str(&paragraph(note)));
        text
    }))
}

const FRONT_TITLE: &str = "Kept likelihood over the time to the first token";

/// The chart of the front as predicted, and of the measured models.
pub fn front_chart(tune: &TuneReport) -> Chart {
    let line = |name: &str, mut points: Vec<(f64, f64)>, ringed: Vec<f64>| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name: name.to_string(), points, ringed }
    };
    let predicted = tune.front.iter().map(|plan| (plan.predicted.ttft_ms, 100.0 * plan.predicted_kept)).collect();
    let chosen = tune.chosen.and_then(|number| tune.candidates.get(number));
    let mut all = vec![line("predicted, on calibration samples", predicted, Vec::new())];
    if !tune.candidates.is_empty() {
        let measured = tune.candidates.iter().map(|own| (own.measured.ttft_ms, 100.0 * own.held_back_kept)).collect();
        let ringed = chosen.map(|own| own.measured.ttft_ms).into_iter().collect();
        all.push(line("measured, on held-back samples", measured, ringed));
    }
    let description = match chosen {
        Some(own) => format!(
            "{} plans are on the front. Chosen: {}, {:.2} ms, {:.1}% kept.",
            tune.front.len(),
            own.plan.shown(),
            own.measured.ttft_ms,
            100.0 * own.held_back_kept
        ),
        None => format!("{} plans are on the front. No model was made.", tune.front.len()),
    };
    lines(&Caption { title: FRONT_TITLE, description, x: "milliseconds to the first token", y: "kept, percent" }, &all)
}

/// That chart and its numbers.
pub fn front(run: &RunFolder) -> Made {
    Ok(of(run).map(|tune| {
        let mut text = paragraph(
            "No other plan is as good in one direction and better in the other. A ring marks the chosen model.",
        );
        text.push_str(&front_chart(tune).figure());
        text.push_str(&folded_table(FRONT_TITLE, &tune.front_cells()));
        text
    }))
}

/// The measured models beside what was predicted.
pub fn candidates(run: &RunFolder) -> Made {
    Ok(of(run).and_then(|tune| match tune.candidate_cells() {
        cells if cells.is_empty() && tune.best.is_whole() => Err("the model meets the target as it is".to_string()),
        cells if cells.is_empty() => Err("no model was made; `interlace tune` without `--replan` does it".to_string()),
        cells => Ok(table("Measured models", &cells)),
    }))
}

/// Milliseconds of every part.
pub fn costs(run: &RunFolder) -> Made {
    Ok(of(run).map(|tune| {
        let costs = &tune.costs;
        let mut text = paragraph(&format!("On {} cores, device {}.", costs.cores, costs.device));
        text.push_str(&table("Costs", &costs.cells()));
        text
    }))
}
