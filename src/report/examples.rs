//! Questions of the benchmark with the answers of the dense and the pruned models.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::base::Result;
use crate::data::{BenchRow, Benchmark};
use crate::eval::{Answer, benchmark_name};

use super::Made;
use super::html::{escaped, paragraph};
use super::run_folder::RunFolder;

/// Questions that are shown.
const SHOWN: usize = 6;
/// Pictures up to this number of bytes are put into the page.
const PICTURE_BYTES: usize = 400 << 10;

/// Kinds of pictures that browsers show, by their first bytes.
const KINDS: &[(&[u8], &str)] = &[(b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp")];

/// Examples of the run's first benchmark.
pub fn examples(run: &RunFolder) -> Made {
    let (Some(dense), Some(healed)) = (run.dense(), run.healed()) else {
        return Ok(Err("the run has no table of models; `interlace run` makes one".to_string()));
    };
    let benchmarks = run.benchmarks();
    let (Some(path), true) = (benchmarks.first(), benchmarks.len() == 1) else {
        return Ok(Err("the run has several benchmarks, whose questions may have the same numbers".to_string()));
    };
    let shown = path.display();
    if !path.is_file() {
        let reason = format!(
            "the benchmark `{shown}` is not there; run `interlace report` in the folder where `interlace run` ran"
        );
        return Ok(Err(reason));
    }
    let benchmark = Benchmark::open(path)?;
    let known =
        run.manifest.as_ref().and_then(|manifest| manifest.provenance.inputs.get(&format!("benchmark {shown}")));
    if let Some(known) = known
        && *known != benchmark.digest()?
    {
        return Ok(Err(format!("the benchmark `{shown}` is not the file that the run read")));
    }
    let models: Vec<&str> = run
        .rows()
        .iter()
        .map(|row| row.model.as_str())
        .filter(|name| {
            let is_first = healed.split(',').next() == name.split(',').next();
            (*name == dense || Some(*name) == run.dense_finetuned() || is_first) && run.answers.contains_key(*name)
        })
        .collect();
    if !models.contains(&dense) || !models.contains(&healed) {
        return Ok(Err("the run's folder lacks the answers of its models, `eval-*.json`".to_string()));
    }
    let chosen = chosen(&run.answers[dense].answers, &run.answers[healed].answers);
    let mut text = paragraph(&format!(
        "Benchmark {}. First come questions that the dense model and the model \"{healed}\" do not answer equally well, then \
         others, one of each group in turn.",
        benchmark_name(path)
    ));
    text.push_str("<div class=\"answers\">\n");
    for index in chosen {
        let Some(row) = benchmark.rows().iter().find(|row| row.index == index) else { continue };
        text.push_str(&example(&benchmark, row, &models, run)?);
    }
    text.push_str("</div>\n");
    Ok(Ok(text))
}

/// Indices of the questions to show: at most half of them such on which the two models differ.
fn chosen(dense: &[Answer], healed: &[Answer]) -> Vec<String> {
    let differs = |(own, other): &(&Answer, &Answer)| own.score != other.score;
    let pairs = || dense.iter().zip(healed).filter(|(own, other)| own.index == other.index);
    let mut found: Vec<&Answer> = pairs().filter(differs).take(SHOWN / 2).map(|pair| pair.0).collect();
    let mut groups: Vec<&str> = Vec::new();
    for round in 0..SHOWN {
        for (own, _) in pairs().filter(|pair| !differs(pair)) {
            let taken = found.iter().any(|other| other.index == own.index);
            if found.len() < SHOWN && !taken && groups.iter().filter(|group| **group == own.group).count() == round {
                found.push(own);
                groups.push(&own.group);
            }
        }
    }
    found.iter().map(|answer| answer.index.clone()).collect()
}

fn picture(benchmark: &Benchmark, row: &BenchRow) -> Result<String> {
    let images = benchmark.images(row)?;
    let Some(image) = images.first() else { return Ok(paragraph("This question has no picture.")) };
    let bytes = image.read()?;
    let kind = KINDS.iter().find(|(head, _)| bytes.starts_with(head)).map(|(_, kind)| kind);
    Ok(match kind {
        Some(kind) if bytes.len() <= PICTURE_BYTES => format!(
            "<img alt=\"picture of question {}\" src=\"data:image/{kind};base64,{}\" />\n",
            escaped(&row.index),
            STANDARD.encode(&bytes)
        ),
        Some(_) => paragraph(&format!("The picture has {} bytes and is left out.", bytes.len())),
        None => paragraph("The picture is of a kind that browsers do not show."),
    })
}

fn example(benchmark: &Benchmark, row: &BenchRow, models: &[&str], run: &RunFolder) -> Result<String> {
    let mut text = format!("<article>\n<h3>Question {}</h3>\n{}<dl>", escaped(&row.index), picture(benchmark, row)?);
    let mut entry = |name: &str, value: &str| {
        text.push_str(&format!("<dt>{}</dt><dd>{}</dd>", escaped(name), escaped(value)));
    };
    if let Some(question) = benchmark.value(row, "question") {
        entry("question", question);
    }
    for (letter, option) in benchmark.options(row) {
        entry(&letter.to_string(), option);
    }
    if let Some(answer) = benchmark.value(row, "answer") {
        entry("right", answer);
    }
    for model in models {
        let Some(answer) = run.answers[*model].answers.iter().find(|answer| answer.index == row.index) else {
            continue;
        };
        let verdict = match answer.score {
            score if score >= 1.0 => "right".to_string(),
            score if score <= 0.0 => "wrong".to_string(),
            score => format!("score {score:.2}"),
        };
        entry(model, &format!("{} ({verdict})", answer.prediction));
    }
    text.push_str("</dl>\n</article>\n");
    Ok(text)
}
