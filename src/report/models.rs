//! The models of a run compared: scores, retention, speed and size.

use crate::base::{Result, human_bytes};
use crate::eval::{Interval, ModelScores, Retention};
use crate::pipeline::TableRow;
use crate::pipeline::steps;

use super::Made;
use super::html::{escaped, folded_table, paragraph, table};
use super::run_folder::RunFolder;
use super::svg::{Caption, Chart, ChartPoint, ErrorBar, SERIES, bars, front, intervals};

/// The table of the run or sweep.
pub fn overview(run: &RunFolder) -> Made {
    let mut text = String::new();
    if let Some(found) = &run.table {
        text.push_str(&table("Models of the run; scores in percent", &found.cells()));
        text.push_str(&paragraph(
            "kept: average over the dense model's, finetuned on the same samples or as it came; difference in percentage \
             points; both with 95% paired bootstrap intervals.",
        ));
    }
    if let Some(found) = &run.sweep {
        text.push_str(&table("Rows of the sweep; scores in percent", &found.cells()));
    }
    let heads = run.table.iter().map(|table| &table.provenance);
    if let Some(head) = heads.chain(run.sweep.iter().map(|sweep| &sweep.provenance)).next() {
        let digest = head.inputs.get("model").map_or("unknown", String::as_str);
        text.push_str(&format!(
            "<dl><dt>dense model</dt><dd>{}</dd><dt>its digest</dt><dd>{}</dd><dt>made by</dt><dd>{}</dd></dl>\n",
            escaped(&run.model()),
            escaped(digest),
            escaped(&head.tool)
        ));
    }
    Ok(Ok(text))
}

fn percent(interval: Option<Interval>) -> Option<ErrorBar> {
    interval.map(|found| ErrorBar { value: 100.0 * found.ratio, low: 100.0 * found.low, high: 100.0 * found.high })
}

fn shown(value: &Option<ErrorBar>) -> String {
    value.as_ref().map_or("-".to_string(), |value| format!("{:.1} [{:.1}, {:.1}]", value.value, value.low, value.high))
}

/// Rows of models with what each keeps of the baselines, in the order of `baselines`.
type Kept = Vec<(String, Vec<Option<ErrorBar>>)>;

/// Retention of each group and of the average, against the dense model as it came and finetuned.
pub fn retention(run: &RunFolder) -> Made {
    if run.table.is_none() {
        return Ok(Err("a sweep keeps averages over groups; the table above and the next chart have them".to_string()));
    }
    let baselines: Vec<(&str, &str)> =
        [(run.dense(), "of the dense model as released"), (run.dense_finetuned(), "of the dense model, finetuned")]
            .into_iter()
            .filter_map(|(name, label)| Some((name?, label)))
            .filter(|(name, _)| run.answers.contains_key(*name))
            .collect();
    let Some(dense) = baselines.first().and_then(|(name, _)| run.answers.get(*name)) else {
        return Ok(Err("the run's folder lacks the answers of its models, `eval-*.json`".to_string()));
    };
    let groups: Vec<&str> = dense.groups.iter().map(|group| group.group.as_str()).collect();
    let mut whole: Kept = Vec::new();
    let mut by_group: Vec<Kept> = groups.iter().map(|_| Vec::new()).collect();
    for row in run.rows().iter().filter(|row| Some(row.model.as_str()) != run.dense()) {
        let Some(own) = run.answers.get(&row.model) else { continue };
        let found: Vec<Retention> =
            baselines.iter().map(|(name, _)| compared(own, &run.answers[*name])).collect::<Result<_>>()?;
        // A model compared with itself keeps everything by definition.
        let is_self = |place: usize| baselines[place].0 == row.model;
        let values = |pick: &dyn Fn(&Retention) -> Option<Interval>| -> Vec<Option<ErrorBar>> {
            let one = |(place, retention): (usize, &Retention)| {
                if is_self(place) { None } else { percent(pick(retention)) }
            };
            found.iter().enumerate().map(one).collect()
        };
        whole.push((row.model.clone(), values(&|retention| retention.score)));
        for (place, kept) in by_group.iter_mut().enumerate() {
            let pick = |retention: &Retention| retention.groups.get(place).and_then(|group| group.retention);
            kept.push((row.model.clone(), values(&pick)));
        }
    }
    let labels: Vec<&str> = baselines.iter().map(|(_, label)| *label).collect();
    let mut text = paragraph("Score over the dense model's, in percent, with its 95% paired bootstrap interval.");
    if labels.len() < 2 {
        text.push_str(&paragraph(
            "No dense model was finetuned beside the others; `[finetune.dense] enabled = true` does it.",
        ));
    }
    text.push_str("<div class=\"charts\">\n");
    for (name, kept) in [("average", &whole)].into_iter().chain(groups.iter().copied().zip(&by_group)) {
        text.push_str(&kept_chart(name, kept, &labels));
    }
    text.push_str("</div>\n");
    Ok(Ok(text))
}

fn compared(own: &ModelScores, baseline: &ModelScores) -> Result<Retention> {
    steps::retention(own, baseline)
}

fn kept_chart(name: &str, kept: &Kept, labels: &[&str]) -> String {
    let described = kept.iter().map(|(model, values)| {
        let values: Vec<String> =
            values.iter().zip(labels).map(|(value, label)| format!("{} {label}", shown(value))).collect();
        format!("{model}: {}. ", values.join(", "))
    });
    let title = format!("Kept: {name}");
    let caption = Caption { title: &title, description: described.collect(), x: "kept, percent", y: "" };
    let mut rows = vec![vec!["model".to_string()]];
    rows[0].extend(labels.iter().map(|label| format!("kept % {label}")));
    rows.extend(kept.iter().map(|(model, values)| {
        let cells = values.iter().map(shown);
        [model.clone()].into_iter().chain(cells).collect()
    }));
    format!(
        "<div>\n<h3>{}</h3>\n{}{}</div>\n",
        escaped(name),
        intervals(&caption, kept, labels, 100.0),
        folded_table(&title, &rows)
    )
}

/// A model of the front: name, series, speed-up, kept percent.
struct Contender {
    name: String,
    series: String,
    at: (f64, f64),
}

/// True for those that no other one beats in one direction and equals in the other.
fn fronts(contenders: &[Contender]) -> Vec<bool> {
    let beats = |other: &Contender, own: &Contender| {
        let (a, b) = (other.at, own.at);
        a.0 >= b.0 && a.1 >= b.1 && (a.0 > b.0 || a.1 > b.1)
    };
    contenders.iter().map(|own| !contenders.iter().any(|other| beats(other, own))).collect()
}

/// What the chart of kept score over speed shows.
struct FrontChart {
    contenders: Vec<Contender>,
    on_front: Vec<bool>,
    series: Vec<String>,
    /// Name of the horizontal axis.
    speed: &'static str,
}

impl FrontChart {
    const TITLE: &'static str = "Kept percent over speed-up";

    /// The models of a run or sweep; `None` with fewer than two whose speed is known.
    fn of(run: &RunFolder) -> Option<Self> {
        let of_run = |row: &TableRow| {
            let (speed, kept) = (row.speed?, row.kept_of_dense?);
            let series = row.model.split(',').next().unwrap_or_default().to_string();
            Some(Contender { name: row.model.clone(), series, at: (speed.decoder_ttft_speedup, 100.0 * kept.ratio) })
        };
        let mut contenders: Vec<Contender> = run.rows().iter().filter_map(of_run).collect();
        let mut measured = true;
        if let Some(sweep) = &run.sweep {
            measured = sweep.rows.iter().all(|row| row.speedup_measured);
            contenders.extend(sweep.rows.iter().map(|row| Contender {
                name: format!("{} at {}, {}", row.strategy, row.drop_ratio, row.recipe_and_precision()),
                series: format!("{}, {}", row.strategy, row.recipe_and_precision()),
                at: (row.speedup, 100.0 * row.kept_of_dense.mean),
            }));
        }
        if contenders.len() < 2 {
            return None;
        }
        let mut series: Vec<String> = Vec::new();
        for contender in &contenders {
            if !series.contains(&contender.series) {
                series.push(contender.series.clone());
            }
        }
        let speed =
            if measured { "speed-up of the decoder's prefill, measured" } else { "ideal speed-up of the decoder" };
        Some(FrontChart { on_front: fronts(&contenders), contenders, series, speed })
    }

    fn chart(&self) -> Chart {
        let place = |own: &Contender| self.series.iter().position(|name| *name == own.series).unwrap_or_default();
        let both = || self.contenders.iter().zip(&self.on_front);
        let points: Vec<ChartPoint> =
            both().map(|(own, on_front)| ChartPoint { series: place(own), at: own.at, on_front: *on_front }).collect();
        let best: Vec<&str> = both().filter(|(_, front)| **front).map(|(own, _)| own.name.as_str()).collect();
        let description = format!("On the front: {}.", best.join("; "));
        let caption = Caption { title: Self::TITLE, description, x: self.speed, y: "kept, percent" };
        front(&caption, &points, &self.series)
    }
}

/// Kept score over measured speed.
pub fn pareto(run: &RunFolder) -> Made {
    let Some(chart) = FrontChart::of(run) else {
        return Ok(Err("no model's speed was measured; `[bench] enabled = true` does it".to_string()));
    };
    let mut rows = vec![["model", "speed-up", "kept %", "on the front"].map(String::from).to_vec()];
    for (own, front) in chart.contenders.iter().zip(&chart.on_front) {
        let front = if *front { "yes" } else { "no" };
        rows.push(vec![own.name.clone(), format!("{:.2}", own.at.0), format!("{:.1}", own.at.1), front.to_string()]);
    }
    let mut text =
        paragraph("Rings mark the front: no other model keeps as much and is as fast, and one of them more.");
    if chart.series.len() > SERIES {
        text.push_str(&paragraph("Marks repeat where there are many series; the table names each point."));
    }
    text.push_str(&chart.chart().figure());
    text.push_str(&folded_table(FrontChart::TITLE, &rows));
    Ok(Ok(text))
}

/// The same chart alone; `None` with fewer than two models whose speed is known.
pub fn pareto_chart(run: &RunFolder) -> Option<Chart> {
    FrontChart::of(run).map(|chart| chart.chart())
}

/// Time of the vision encoder, of the decoder's prefill and of decoding.
pub fn latency(run: &RunFolder) -> Made {
    let Some(first) = run.benches.values().next() else {
        let reason = match run.sweep.is_some() {
            true => "the folder of a sweep has no file of times; its table has the speed-up",
            false => "no model's speed was measured; `[bench] enabled = true` does it",
        };
        return Ok(Err(reason.to_string()));
    };
    let count = |name: &str| first.provenance.settings.get(name).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    let (prompt, new) = (count("prompt_tokens"), count("new_tokens"));
    // The models share the vision encoder, and its features are made once.
    let vision_ms = run.answers.values().find_map(|answers| {
        let profile = answers.timing.profile.filter(|profile| profile.vision_encoder_s > 0.0)?;
        Some(1000.0 * profile.vision_encoder_s / answers.questions.max(1) as f64)
    });
    let dense = run.dense().zip(first.baseline.as_ref());
    let measured = dense
        .into_iter()
        .chain(run.rows().iter().filter_map(|row| Some((row.model.as_str(), &run.benches.get(&row.model)?.model))));
    let (mut rows, mut drawn) = (vec![], vec![]);
    let head = [
        "model",
        "vision ms",
        "prefill ms",
        "decoding ms",
        "decode tokens/s",
        "first token of a picture and a question, ms",
    ];
    rows.push(head.map(String::from).to_vec());
    for (name, bench) in measured {
        let decode = 1000.0 * new / bench.decode_tokens_per_second.median.max(f64::MIN_POSITIVE);
        let parts = vec![vision_ms.unwrap_or(0.0), bench.decoder_ttft_ms.median, decode];
        rows.push(vec![
            name.to_string(),
            vision_ms.map_or("-".to_string(), |value| format!("{value:.2}")),
            format!("{:.2}", parts[1]),
            format!("{:.2}", parts[2]),
            format!("{:.0}", bench.decode_tokens_per_second.median),
            bench.pipeline_ttft_ms.as_ref().map_or("-".to_string(), |spread| format!("{:.2}", spread.median)),
        ]);
        drawn.push((name.to_string(), parts));
    }
    let description = rows[1..]
        .iter()
        .map(|row| format!("{}: vision {} ms, prefill {} ms, decoding {} ms. ", row[0], row[1], row[2], row[3]));
    let title = "Time by part";
    let caption = Caption { title, description: description.collect(), x: "milliseconds", y: "" };
    let mut text = paragraph(&format!(
        "Medians over rounds in turn with the dense model, on {} cores, device {}: prefill of {prompt} tokens, decoding of {new} \
         tokens. Vision: mean of the benchmark's questions, in batches; all models share this part.",
        first.cores, first.device
    ));
    text.push_str(&bars(&caption, &drawn, &["vision", "prefill", "decoding"], "ms"));
    text.push_str(&folded_table(title, &rows));
    Ok(Ok(text))
}

/// Bytes of each model.
pub fn size(run: &RunFolder) -> Made {
    let of_run = run.rows().iter().map(|row| (row.model.clone(), row.size_bytes));
    let of_sweep = run.sweep.iter().flat_map(|sweep| &sweep.rows);
    let of_sweep = of_sweep
        .map(|row| (format!("{} at {}, {}", row.strategy, row.drop_ratio, row.recipe_and_precision()), row.size_bytes));
    let sizes: Vec<(String, u64)> = of_run.chain(of_sweep).collect();
    let mut rows = vec![["model", "bytes", "size"].map(String::from).to_vec()];
    rows.extend(sizes.iter().map(|(name, bytes)| vec![name.clone(), bytes.to_string(), human_bytes(*bytes)]));
    let drawn: Vec<(String, Vec<f64>)> =
        sizes.iter().map(|(name, bytes)| (name.clone(), vec![*bytes as f64 / 1e6])).collect();
    let description = sizes.iter().map(|(name, bytes)| format!("{name}: {}. ", human_bytes(*bytes))).collect();
    let caption = Caption { title: "Size of the ONNX files", description, x: "megabytes (10^6 bytes)", y: "" };
    Ok(Ok(bars(&caption, &drawn, &["size"], "MB") + &folded_table("Size of the ONNX files", &rows)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_has_what_nothing_beats() {
        let at = |at: (f64, f64)| Contender { name: String::new(), series: String::new(), at };
        let found = fronts(&[at((1.0, 100.0)), at((1.3, 99.0)), at((1.3, 98.0)), at((1.2, 98.5)), at((1.3, 99.0))]);
        assert_eq!(found, [true, true, false, false, true]);
    }
}
