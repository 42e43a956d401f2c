//! Questions as VLMEvalKit puts them to a model.

use crate::base::{Error, Result};
use crate::data::{BenchRow, Benchmark};

use super::metrics::{Reference, metric_of};

/// The text of a question.
///
/// Rows with options get the layout of VLMEvalKit's multiple-choice benchmarks (hint if there is one, question, one
/// line per option, a last line that asks to select); others are the question itself, followed by the instruction of
/// their benchmark where the table of metrics knows it by name.
///
/// Errors: `Error::Invalid` naming the row when it has no question.
pub fn question_text(benchmark: &Benchmark, name: &str, row: &BenchRow) -> Result<String> {
    let question = benchmark.cell(row, "question").ok_or_else(|| missing(row, "question"))?;
    let options = benchmark.options(row);
    if options.is_empty() {
        return Ok(format!("{question}{}", metric_of(name).map_or("", |metric| metric.instruction)));
    }
    let mut text = String::new();
    if let Some(hint) = benchmark.cell(row, "hint") {
        text.push_str(&format!("Hint: {hint}\n"));
    }
    text.push_str(&format!("Question: {question}\nOptions:\n"));
    for (letter, option) in options {
        text.push_str(&format!("{letter}. {option}\n"));
    }
    text.push_str("Please select the correct answer from the options above. \n");
    Ok(text)
}

/// What the row's answer is judged against.
///
/// Errors: `Error::Invalid` naming the row when it has no answer.
pub fn reference_of(benchmark: &Benchmark, row: &BenchRow) -> Result<Reference> {
    let answer = benchmark.cell(row, "answer").ok_or_else(|| missing(row, "answer"))?.to_string();
    let options = benchmark.options(row).into_iter().map(|(letter, text)| (letter, text.to_string())).collect();
    Ok(Reference { answer, options })
}

fn missing(row: &BenchRow, column: &str) -> Error {
    Error::invalid(format!("row `{}` of the benchmark", row.index), format!("has no `{column}`"))
        .remedy("scoring needs questions with answers")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn benchmark(text: &str) -> (tempfile::TempDir, Benchmark) {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("bench.tsv");
        std::fs::write(&path, text).expect("write");
        let benchmark = Benchmark::open(&path).expect("benchmark");
        (folder, benchmark)
    }

    #[test]
    fn questions_read_as_vlmevalkit_writes_them() {
        let image = "A".repeat(80);
        let text = format!(
            "index\timage\tquestion\tA\tB\tC\thint\tanswer\n1\t{image}\tWhat is it?\tcat\tdog\t\t\tB\n2\t1\tWhat word?\t\t\t\t\ttime\n3\t1\tWhy?\tx\ty\tz\tlook up\tA\n"
        );
        let (_folder, benchmark) = benchmark(&text);
        let texts: Vec<String> =
            benchmark.rows().iter().map(|row| question_text(&benchmark, "bench", row).expect("text")).collect();
        assert_eq!(
            texts[0],
            "Question: What is it?\nOptions:\nA. cat\nB. dog\nPlease select the correct answer from the options above. \n"
        );
        assert_eq!(texts[1], "What word?");
        assert!(texts[2].starts_with("Hint: look up\nQuestion: Why?\nOptions:\nA. x\n"), "{}", texts[2]);
        let rows = benchmark.rows();
        let chart = question_text(&benchmark, "ChartQA_TEST", &rows[1]).expect("text");
        assert_eq!(chart, "What word?\nAnswer the question using a single word or phrase.");
        let reference = reference_of(&benchmark, &rows[0]).expect("reference");
        assert_eq!(reference.options, [('A', "cat".to_string()), ('B', "dog".to_string())]);
    }
}
