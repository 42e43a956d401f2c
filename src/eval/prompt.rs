//! Questions in the wording of VLMEvalKit.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::data::{BenchRow, Benchmark};

use super::judge::Reference;
use super::metrics::{QuestionKind, metric_of};
use super::text::answers_of_cell;

/// Wording of the questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PromptStyle {
    /// VLMEvalKit's default, for models without a style of their own.
    #[default]
    #[serde(rename = "vlmevalkit")]
    VlmEvalKit,
    /// Prompts of Qwen3-VL's class in VLMEvalKit.
    #[serde(rename = "qwen3-vl")]
    Qwen3Vl,
    /// Prompts of SmolVLM's class in VLMEvalKit.
    #[serde(rename = "smolvlm")]
    SmolVlm,
    /// Prompts of InternVL's class in VLMEvalKit.
    #[serde(rename = "internvl")]
    InternVl,
}

/// One style.
pub struct PromptStyleRow {
    pub style: PromptStyle,
    pub name: &'static str,
    pub about: &'static str,
    write: fn(&Question) -> String,
}

/// Every style there is.
pub const PROMPT_STYLES: &[PromptStyleRow] = &[
    PromptStyleRow {
        style: PromptStyle::VlmEvalKit,
        name: "vlmevalkit",
        about: "VLMEvalKit's default",
        write: vlmevalkit,
    },
    PromptStyleRow {
        style: PromptStyle::Qwen3Vl,
        name: "qwen3-vl",
        about: "VLMEvalKit's for Qwen3-VL with custom prompts",
        write: qwen3_vl,
    },
    PromptStyleRow {
        style: PromptStyle::SmolVlm,
        name: "smolvlm",
        about: "VLMEvalKit's for SmolVLM, but for its lists of formatting rules",
        write: smolvlm,
    },
    PromptStyleRow {
        style: PromptStyle::InternVl,
        name: "internvl",
        about: "VLMEvalKit's for InternVL",
        write: internvl,
    },
];

impl std::str::FromStr for PromptStyle {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let row = PROMPT_STYLES.iter().find(|row| row.name == text).map(|row| row.style);
        let names: Vec<&str> = PROMPT_STYLES.iter().map(|row| row.name).collect();
        row.ok_or_else(|| format!("`{text}` is none of {}", names.join(", ")))
    }
}

/// A row as the styles word it.
struct Question<'a> {
    /// The benchmark's name in lower case.
    benchmark: String,
    kind: QuestionKind,
    question: &'a str,
    hint: Option<&'a str>,
    options: Vec<(char, &'a str)>,
}

impl Question<'_> {
    fn lines(&self) -> String {
        self.options.iter().map(|(letter, text)| format!("{letter}. {text}\n")).collect()
    }
}

/// Suffix of VLMEvalKit for open questions of benchmarks that expect a word.
const SHORT_ANSWER: &str = "\nAnswer the question using a single word or phrase.";

/// Rows of multiple-choice benchmarks, and rows with options of others: hint if there is one, question, one line per
/// option, a last line that asks to select. Others: the question itself with the instruction of its benchmark.
fn vlmevalkit(question: &Question) -> String {
    if question.kind != QuestionKind::Choice && question.options.is_empty() {
        return format!("{}{}", question.question, open_instruction(question));
    }
    let mut text = question.hint.map(|hint| format!("Hint: {hint}\n")).unwrap_or_default();
    text.push_str(&format!("Question: {}\n", question.question));
    if !question.options.is_empty() {
        text.push_str("Options:\n");
        text.push_str(&question.lines());
        text.push_str("Please select the correct answer from the options above. \n");
    }
    text
}

fn open_instruction(question: &Question) -> &'static str {
    match question.kind {
        QuestionKind::Short => SHORT_ANSWER,
        QuestionKind::YesNo if question.benchmark.starts_with("amber") => "\nPlease answer yes or no.",
        _ => "",
    }
}

/// Source: VLMEvalKit's prompts for Qwen3-VL.
fn qwen3_vl(question: &Question) -> String {
    match question.kind {
        QuestionKind::YesNo => format!("{} Please answer yes or no.", question.question),
        QuestionKind::Short | QuestionKind::Plain if question.options.is_empty() => {
            format!("{}\nPlease answer concisely with short words or phrases when possible.", question.question)
        }
        _ => {
            let text = vlmevalkit(question);
            let own = "Answer with the option letter only.";
            text.replace("Please select the correct answer from the options above. \n", own).trim_end().to_string()
        }
    }
}

/// Source: VLMEvalKit's prompts for SmolVLM; its lists of formatting rules for ChartQA and TextVQA are left out.
fn smolvlm(question: &Question) -> String {
    let named = |names: &[&str]| names.iter().any(|name| question.benchmark.starts_with(name));
    if question.options.is_empty() {
        let brief = if named(&["ocrbench"]) { "\nGive a very brief answer." } else { open_instruction(question) };
        return format!("{}{brief}", question.question);
    }
    let hint = question.hint.map(|hint| format!("Hint: {hint}\n")).unwrap_or_default();
    let lines = question.lines();
    if named(&["mmbench"]) {
        return format!("{}\n{hint}Choices:\n{lines}Answer with a letter.", question.question);
    }
    if named(&["ai2d", "scienceqa"]) {
        return format!("{}\n{hint}Choices:\n{lines}Answer with the letter.", question.question);
    }
    vlmevalkit(question)
}

/// Source: VLMEvalKit's prompts for InternVL.
fn internvl(question: &Question) -> String {
    let hint = question.hint.map(|hint| format!("{hint}\n")).unwrap_or_default();
    if question.options.is_empty() {
        return match question.kind {
            QuestionKind::Choice => format!("{hint}{}\nAnswer the question directly.", question.question),
            QuestionKind::YesNo => format!("{}{}", question.question, open_instruction(question)),
            QuestionKind::Short | QuestionKind::Plain => format!("{}{SHORT_ANSWER}", question.question),
        };
    }
    let chinese = question.question.chars().any(|c| ('\u{4e00}'..='\u{9fff}').contains(&c));
    let last = if chinese {
        "请直接回答选项字母。"
    } else {
        "Answer with the option's letter from the given choices directly."
    };
    format!("{hint}{}\n{}{last}", question.question, question.lines())
}

/// The text of a question in a style.
///
/// Errors: `Error::Invalid` naming the row when it has no question.
pub fn question_text(benchmark: &Benchmark, name: &str, row: &BenchRow, style: PromptStyle) -> Result<String> {
    let question = Question {
        benchmark: name.to_lowercase(),
        kind: metric_of(name).map_or(QuestionKind::Plain, |metric| metric.kind),
        question: benchmark.cell(row, "question").ok_or_else(|| missing(row, "question"))?,
        hint: benchmark.value(row, "hint"),
        options: benchmark.options(row),
    };
    let write = PROMPT_STYLES
        .iter()
        .find(|row| row.style == style)
        .map_or(vlmevalkit as fn(&Question) -> String, |row| row.write);
    Ok(write(&question))
}

/// Reference for judging the row's answer.
///
/// Errors: `Error::Invalid` naming the row when it has no answer.
pub fn reference_of(benchmark: &Benchmark, row: &BenchRow) -> Result<Reference> {
    let cell = |column: &str| benchmark.cell(row, column).map(str::to_string);
    Ok(Reference {
        index: row.index.clone(),
        answer: cell("answer").ok_or_else(|| missing(row, "answer"))?,
        options: benchmark.options(row).into_iter().map(|(letter, text)| (letter, text.to_string())).collect(),
        category: cell("category"),
        l2_category: cell("l2-category"),
        g_index: cell("g_index"),
        cycle_category: cell("cycle_category"),
        image_path: cell("image_path"),
    })
}

/// The answer that a model is wanted to give: the letter of a choice, the first of several answers.
pub fn right_answer(reference: &Reference) -> String {
    match reference.options.is_empty() {
        true => answers_of_cell(&reference.answer).into_iter().next().unwrap_or_default(),
        false => reference.answer.trim().to_string(),
    }
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
        let texts: Vec<String> = benchmark
            .rows()
            .iter()
            .map(|row| question_text(&benchmark, "bench", row, PromptStyle::default()).expect("text"))
            .collect();
        assert_eq!(
            texts[0],
            "Question: What is it?\nOptions:\nA. cat\nB. dog\nPlease select the correct answer from the options above. \n"
        );
        assert_eq!(texts[1], "What word?");
        assert!(texts[2].starts_with("Hint: look up\nQuestion: Why?\nOptions:\nA. x\n"), "{}", texts[2]);
        let rows = benchmark.rows();
        let chart = question_text(&benchmark, "ChartQA_TEST", &rows[1], PromptStyle::default()).expect("text");
        assert_eq!(chart, "What word?\nAnswer the question using a single word or phrase.");
        let styled = |name: &str, row: usize, style: &str| {
            question_text(&benchmark, name, &rows[row], style.parse().expect("style")).expect("text")
        };
        assert_eq!(
            styled("MMBench_DEV_EN_V11", 0, "qwen3-vl"),
            "Question: What is it?\nOptions:\nA. cat\nB. dog\nAnswer with the option letter only."
        );
        assert_eq!(styled("POPE", 1, "qwen3-vl"), "What word? Please answer yes or no.");
        assert_eq!(
            styled("MMBench_DEV_EN_V11", 2, "smolvlm"),
            "Why?\nHint: look up\nChoices:\nA. x\nB. y\nC. z\nAnswer with a letter."
        );
        assert_eq!(
            styled("AI2D_TEST", 2, "internvl"),
            "look up\nWhy?\nA. x\nB. y\nC. z\nAnswer with the option's letter from the given choices directly."
        );
        assert_eq!(styled("AMBER", 1, "vlmevalkit"), "What word?\nPlease answer yes or no.");
        assert!("paper".parse::<PromptStyle>().expect_err("no style").contains("internvl"));
        let reference = reference_of(&benchmark, &rows[0]).expect("reference");
        assert_eq!(reference.options, [('A', "cat".to_string()), ('B', "dog".to_string())]);
    }
}
