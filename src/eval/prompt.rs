//! Questions with VLMEvalKit's wording.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result, shortened};
use crate::data::{BenchRow, Benchmark};

use super::judge::Reference;
use super::metrics::{QuestionKind, metric_of};
use super::text::{answers_of_cell, strip};

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

/// All styles.
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
    PromptStyleRow { style: PromptStyle::SmolVlm, name: "smolvlm", about: "VLMEvalKit's for SmolVLM", write: smolvlm },
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

/// A row of a benchmark, the input of the styles.
struct Question<'a> {
    /// The benchmark's name in lower case.
    benchmark: String,
    kind: QuestionKind,
    question: &'a str,
    hint: Option<&'a str>,
    options: Vec<(char, &'a str)>,
}

impl Question<'_> {
    /// True when the benchmark is one of these.
    fn is(&self, names: &[&str]) -> bool {
        names.contains(&self.benchmark.as_str())
    }

    /// True when the benchmark's name contains one of these.
    fn names(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.benchmark.contains(name))
    }

    fn lines(&self) -> String {
        self.options.iter().map(|(letter, text)| format!("{letter}. {text}\n")).collect()
    }
}

/// VLMEvalKit's suffix for open questions of benchmarks that expect a word.
const SHORT_ANSWER: &str = "\nAnswer the question using a single word or phrase.";

/// Multiple-choice benchmarks, and other rows with options: the hint if there is one, the question, one line per
/// option, and an instruction to select. Other rows: the question with the instruction of its benchmark.
fn vlmevalkit(question: &Question) -> String {
    if question.kind != QuestionKind::Choice && question.options.is_empty() {
        return format!("{}{}", question.question, open_instruction(question));
    }
    let mut text = question.hint.map(|hint| format!("Hint: {hint}\n")).unwrap_or_default();
    text.push_str(&format!("Question: {}\n", question.question));
    if !question.options.is_empty() {
        text.push_str("Options:\n");
        text.push_str(&question.lines());
        text.push_str(&format!("{SELECT} \n"));
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

const SELECT: &str = "Please select the correct answer from the options above.";

/// Source: VLMEvalKit's prompts for Qwen3-VL.
fn qwen3_vl(question: &Question) -> String {
    match question.kind {
        QuestionKind::YesNo => format!("{} Please answer yes or no.", question.question),
        QuestionKind::Short | QuestionKind::Plain if question.options.is_empty() => {
            format!("{}\nPlease answer concisely with short words or phrases when possible.", question.question)
        }
        _ if question.is(&["mmmu_dev_val", "mmmu_test"]) => vlmevalkit(question).trim_end().to_string(),
        _ => vlmevalkit(question).replace(SELECT, "Answer with the option letter only.").trim_end().to_string(),
    }
}

/// SmolVLM's instructions before questions, with the benchmarks' names.
const SMOLVLM_RULES: &[(&[&str], &str)] = &[
    (
        &["chartqa_test"],
        "For the question below, follow the following instructions:\n\
         -The answer should contain as few words as possible.\n\
         -Don’t paraphrase or reformat the text you see in the image.\n\
         -Answer a binary question with Yes or No.\n\
         -When asked to give a numerical value, provide a number like 2 instead of Two.\n\
         -If the final answer has two or more items, provide it in the list format like [1, 2].\n\
         -When asked to give a ratio, give out the decimal value like 0.25 instead of 1:4.\n\
         -When asked to give a percentage, give out the whole value like 17 instead of decimal like 0.17%.\n\
         -Don’t include any units in the answer.\n\
         -Do not include any full stops at the end of the answer.\n\
         -Try to include the full label from the graph when asked about an entity.\n\
         Question: ",
    ),
    (
        &["docvqa_val", "docvqa_test"],
        "Give a short and terse answer to the following question. Do not paraphrase or reformat the text you see in the \
         image. Do not include any full stops. Just give the answer without additional explanation. Question: ",
    ),
    (
        &["textvqa_val", "textvqa_test"],
        "Answer the following question about the image using as few words as possible. Follow these additional \
         instructions:\n\
         -Always answer a binary question with Yes or No.\n\
         -When asked what time it is, reply with the time seen in the image.\n\
         -Do not put any full stops at the end of the answer.\n\
         -Do not put quotation marks around the answer.\n\
         -An answer with one or two words is favorable.\n\
         -Do not apply common sense knowledge. The answer can be found in the image.\n\
         Question: ",
    ),
];

/// Benchmarks for which SmolVLM's prompt requests a very brief answer.
const SMOLVLM_BRIEF: &[&str] =
    &["mme", "mmvet", "ocrvqa_test", "ocrvqa_testcore", "infovqa_val", "infovqa_test", "ocrbench"];
/// Benchmarks for which SmolVLM's prompt has the question before the hint.
const SMOLVLM_MMBENCH: &[&str] = &[
    "mmbench_dev_en",
    "mmbench_test_en",
    "mmbench_dev_cn",
    "mmbench_test_cn",
    "mmbench",
    "mmbench_cn",
    "mmbench_dev_en_v11",
    "mmbench_dev_cn_v11",
    "mmbench_test_en_v11",
    "mmbench_test_cn_v11",
    "mmbench_v11",
    "mmbench_cn_v11",
    "ccbench",
];
/// Benchmarks for which SmolVLM's prompt requests a letter.
const SMOLVLM_LETTER: &[&str] = &["mmstar", "seedbench_img", "ai2d_test", "scienceqa_val", "scienceqa_test"];

/// Source: VLMEvalKit's prompts for SmolVLM. For MMMU, VLMEvalKit places the pictures inside the
/// text; here they come first.
fn smolvlm(question: &Question) -> String {
    let whole = vlmevalkit(question);
    let text = strip(&whole);
    if let Some((_, rules)) = SMOLVLM_RULES.iter().find(|(names, _)| question.is(names)) {
        return format!("{rules}{text}");
    }
    let choices = |last: &str| text.replace("\nOptions:", "\nChoices:").replace(SELECT, last);
    match () {
        () if question.is(SMOLVLM_BRIEF) => format!("{text}\nGive a very brief answer."),
        () if question.is(&["hallusionbench"]) => format!("{text}\nAnswer yes or no."),
        () if question.is(SMOLVLM_LETTER) => choices("Answer with the letter."),
        () if question.is(SMOLVLM_MMBENCH) => {
            let text = choices("Answer with a letter.");
            let parts = text.strip_prefix("Hint:").and_then(|rest| {
                let (hint, rest) = rest.split_once("\nQuestion:")?;
                let (asked, choices) = rest.split_once("\nChoices:")?;
                Some(format!("Question:{asked}\nHint:{hint}\nChoices:{choices}"))
            });
            parts.unwrap_or(text)
        }
        () if question.is(&["mathvista_mini"]) => {
            let text =
                ('A'..='H').fold(text.to_string(), |text, c| text.replace(&format!("({c}) "), &format!("{c}. ")));
            strip(&text.replace("\nOptions:", "\nChoices:").replace("Hint: ", "")).to_string()
        }
        () => text.to_string(),
    }
}

/// Benchmarks for which VLMEvalKit's InternVL class has no prompt of its own.
const INTERNVL_NONE: &[&str] = &["mmdu", "mme-realworld", "wemath_cot", "mmalignbench", "chartqapro", "chartmuseum"];
/// Benchmarks whose questions InternVL receives unchanged.
const INTERNVL_PLAIN: &[&str] = &[
    "mathvista",
    "mathvision",
    "vcr",
    "mtvqa",
    "mmvet",
    "crpe",
    "mia-bench",
    "mm-math",
    "dynamath",
    "qspatial",
    "wemath",
    "logicvista",
    "mm-ifeval",
    "chartmimic",
    "mmreason",
];

/// Source: VLMEvalKit's prompts for InternVL.
fn internvl(question: &Question) -> String {
    let asked = question.question;
    if question.names(INTERNVL_NONE) {
        return vlmevalkit(question);
    }
    match question.kind {
        QuestionKind::YesNo if question.names(&["mme"]) => format!("{asked} {}", SHORT_ANSWER.trim_start()),
        QuestionKind::YesNo if question.names(&["hallusionbench", "amber"]) => {
            format!("{asked} Please answer yes or no. {}", SHORT_ANSWER.trim_start())
        }
        QuestionKind::YesNo => asked.to_string(),
        QuestionKind::Short | QuestionKind::Plain if question.options.is_empty() => match () {
            () if question.names(&["llavabench", "wildvision"]) => format!("{asked}\nAnswer this question in detail."),
            () if question.names(&["mathverse"]) => asked.replace("please directly answer the question and", "please"),
            () if question.names(INTERNVL_PLAIN) => asked.to_string(),
            () => format!("{asked}{SHORT_ANSWER}"),
        },
        _ => {
            let hint = question.hint.map(|hint| format!("{hint}\n")).unwrap_or_default();
            let lines: String = question.options.iter().map(|(letter, text)| format!("\n{letter}. {text}")).collect();
            let text = format!("{hint}{asked}{lines}");
            let chinese = text.chars().any(|c| ('\u{4e00}'..='\u{9fff}').contains(&c));
            let last = match (question.options.is_empty(), chinese) {
                (false, true) => "请直接回答选项字母。",
                (false, false) => "Answer with the option's letter from the given choices directly.",
                (true, true) => "请直接回答问题。",
                (true, false) => "Answer the question directly.",
            };
            format!("{text}\n{last}")
        }
    }
}

/// The text of a question in a style.
///
/// Errors: `Error::Invalid` naming the row when it has no question.
pub fn question_text(benchmark: &Benchmark, name: &str, row: &BenchRow, style: PromptStyle) -> Result<String> {
    let question = Question {
        benchmark: name.to_lowercase(),
        kind: metric_of(name).map_or(QuestionKind::Plain, |metric| metric.kind),
        question: benchmark.cell(row, "question").ok_or_else(|| missing(benchmark, row, "question"))?,
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
        answer: cell("answer").ok_or_else(|| missing(benchmark, row, "answer"))?,
        options: benchmark.options(row).into_iter().map(|(letter, text)| (letter, text.to_string())).collect(),
        category: cell("category"),
        l2_category: cell("l2-category"),
        g_index: cell("g_index"),
        cycle_category: cell("cycle_category"),
        image_path: cell("image_path"),
    })
}

/// The reference answer for a model: the letter of a choice, or the first of several answers.
pub fn right_answer(reference: &Reference) -> String {
    match reference.options.is_empty() {
        true => answers_of_cell(&reference.answer).into_iter().next().unwrap_or_default(),
        false => reference.answer.trim().to_string(),
    }
}

fn missing(benchmark: &Benchmark, row: &BenchRow, column: &str) -> Error {
    const REMEDY: &str = "scoring needs questions with answers";
    let columns = benchmark.columns();
    if !columns.iter().any(|name| name == column) {
        let problem = format!("has no column `{column}`, only {}", columns.join(", "));
        return Error::invalid("benchmark", problem).remedy(REMEDY);
    }
    Error::invalid(format!("row `{}` of the benchmark", shortened(&row.index)), format!("has no `{column}`"))
        .remedy(REMEDY)
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
    fn an_unknown_style_is_refused_with_the_known_names() {
        let error = "paper".parse::<PromptStyle>().expect_err("no style");
        assert!(error.starts_with("`paper` is none of "), "{error}");
        assert!(PROMPT_STYLES.iter().all(|row| error.contains(row.name)), "{error}");
    }

    /// `fixtures/vlmevalkit/prompts.json` holds rows of known benchmarks only, without empty options.
    #[test]
    fn empty_options_are_left_out_of_questions_and_references() {
        let image = "A".repeat(80);
        let text = format!(
            "index\timage\tquestion\tA\tB\tC\tanswer\n1\t{image}\tWhat is it?\tcat\tdog\t\tB\n2\t1\tWhat word?\t\t\t\ttime\n"
        );
        let (_folder, benchmark) = benchmark(&text);
        let texts: Vec<String> = benchmark
            .rows()
            .iter()
            .map(|row| question_text(&benchmark, "bench", row, PromptStyle::default()).expect("text"))
            .collect();
        let choice = "Question: What is it?\nOptions:\nA. cat\nB. dog\nPlease select the correct answer from the options above. \n";
        assert_eq!(texts, [choice, "What word?"]);
        let reference = reference_of(&benchmark, &benchmark.rows()[0]).expect("reference");
        assert_eq!(reference.options, [('A', "cat".to_string()), ('B', "dog".to_string())]);
    }
}
