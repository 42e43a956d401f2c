//! Metrics of benchmarks, one row per metric: the benchmarks that use it, the rule for a single answer, and the
//! function that computes a score from all judged answers.
//!
//! The rules are VLMEvalKit's for exact matching, without a language model as judge. Scores range from 0 to 1.

use std::collections::BTreeMap;

use super::judge::{self, Reference};

/// One judged answer, the input of scores and of their bootstrap.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judged {
    /// Score of the answer alone, 0 to 1.
    pub score: f64,
    /// Number of the answer's unit, see [`Metric::unit`].
    pub unit: usize,
    /// Number of the answer's stratum, see [`Metric::stratum`].
    pub stratum: usize,
    /// The right answer is yes.
    pub truth: bool,
    /// The prediction contains yes and does not contain no.
    pub answered_yes: bool,
    /// The judge's reply could not be parsed, so the answer is left out of all scores.
    pub unjudged: bool,
}

/// Kind of answer that a question expects; the wording of the question depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuestionKind {
    /// Lettered options, or any other form in the row.
    Choice,
    /// The answer is yes or no.
    YesNo,
    /// A word or a phrase.
    Short,
    /// The question alone.
    Plain,
}

/// One metric.
pub struct Metric {
    /// Name in benchmarks and reports.
    pub name: &'static str,
    /// One line about the score, for documents.
    pub about: &'static str,
    /// Benchmarks that use the metric, as lower-case prefixes of their names.
    pub benchmarks: &'static [&'static str],
    /// Kind of the questions.
    pub kind: QuestionKind,
    /// The score of one prediction, 0 to 1.
    pub judge: fn(&Reference, &str) -> f64,
    /// Answers of one unit are scored together and drawn together in the bootstrap; `None`: the
    /// answer is a unit of its own.
    pub unit: fn(&Reference) -> Option<String>,
    /// Answers are averaged within each stratum first, then over strata; `None`: the metric has no strata.
    pub stratum: fn(&Reference) -> Option<String>,
    /// The score of a set of answers.
    pub score: fn(&[Judged]) -> f64,
    /// Further figures for the report; their names state the units.
    pub figures: fn(&[Judged]) -> Vec<(&'static str, f64)>,
}

/// The metric of benchmarks with rotated options.
pub(super) const CIRCULAR: &str = "circular";

fn alone(_: &Reference) -> Option<String> {
    None
}

fn nothing_more(_: &[Judged]) -> Vec<(&'static str, f64)> {
    Vec::new()
}

/// Defaults of a row: each answer is judged separately, and the score is their mean.
const MEAN: Metric = Metric {
    name: "",
    about: "",
    benchmarks: &[],
    kind: QuestionKind::Plain,
    judge: judge::exact_match,
    unit: alone,
    stratum: alone,
    score: mean_score,
    figures: nothing_more,
};

/// The metric of benchmarks with a language model as judge.
pub(super) const JUDGED: &str = "judge";

/// All metrics. Benchmarks are matched in this order.
pub const METRICS: &[Metric] = &[
    Metric {
        name: "ocr_contains",
        about: "1 if one of the answers occurs in the prediction; formulas without spaces and with their case (OCRBench)",
        benchmarks: &["ocrbench"],
        judge: judge::ocr_contains,
        figures: |rows| {
            let hits: f64 = rows.iter().map(|row| row.score).sum();
            vec![("final_score", hits), ("final_score_norm", hits / 10.0)]
        },
        ..MEAN
    },
    Metric {
        name: "relaxed_accuracy",
        about: "1 if a number is within 5% of the answer, or a text equals it (ChartQA)",
        benchmarks: &["chartqa"],
        kind: QuestionKind::Short,
        judge: judge::relaxed_accuracy,
        ..MEAN
    },
    Metric {
        name: "vqa_score",
        about: "agreement with ten annotators, full from three on (TextVQA)",
        benchmarks: &["textvqa", "okvqa", "vqav2"],
        kind: QuestionKind::Short,
        judge: judge::vqa_score,
        ..MEAN
    },
    Metric {
        name: "anls",
        about: "1 minus the normalised edit distance, 0 below 0.5 (DocVQA, InfoVQA)",
        benchmarks: &["docvqa", "infovqa"],
        kind: QuestionKind::Short,
        judge: judge::anls,
        ..MEAN
    },
    Metric {
        name: "accuracy",
        about: "1 if prediction and one of the answers are equal but for case (OCRVQA)",
        benchmarks: &["ocrvqa"],
        kind: QuestionKind::Short,
        judge: |reference, prediction| judge::equal_text(reference, prediction, true),
        ..MEAN
    },
    Metric {
        name: "mean_accuracy",
        about: "the share of the answers that the prediction equals but for case (GQA)",
        benchmarks: &["gqa"],
        kind: QuestionKind::Short,
        judge: |reference, prediction| judge::equal_text(reference, prediction, false),
        ..MEAN
    },
    Metric {
        name: "yes_no_f1",
        about: "F1 with yes as the positive class, questions of several categories counted in each (POPE)",
        benchmarks: &["pope"],
        kind: QuestionKind::YesNo,
        judge: judge::yes_no_as_written,
        score: |rows| YesNo::of(rows).f1,
        figures: yes_no_figures,
        ..MEAN
    },
    Metric {
        name: "yes_no_pairs",
        about: "mean over categories of accuracy and of the share of pictures with both questions right (MME)",
        benchmarks: &["mme"],
        kind: QuestionKind::YesNo,
        judge: judge::yes_no_as_written,
        unit: |reference| {
            Some(format!("{}\n{}", reference.category.as_deref()?, reference.image_path.as_deref().unwrap_or_default()))
        },
        stratum: |reference| reference.category.clone(),
        score: |rows| mean_of_strata(rows, |own| (mean_score(own) + pairs_right(own)) / 2.0),
        ..MEAN
    },
    Metric {
        name: "yes_no_figures",
        about: "accuracy over questions, and over figures with all their questions right (HallusionBench)",
        benchmarks: &["hallusionbench"],
        kind: QuestionKind::YesNo,
        judge: judge::yes_no_as_written,
        unit: |reference| hallusion_key(reference, 4),
        stratum: |reference| hallusion_key(reference, 5),
        figures: |rows| {
            let by = |key: fn(&Judged) -> usize| all_right(rows, key);
            vec![("a_acc", mean_score(rows)), ("f_acc", by(|row| row.unit)), ("q_acc", by(|row| row.stratum))]
        },
        ..MEAN
    },
    Metric {
        name: "yes_no_types",
        about: "mean over the types of question of their accuracy (AMBER)",
        benchmarks: &["amber"],
        kind: QuestionKind::YesNo,
        judge: judge::yes_no_any_case,
        stratum: |reference| Some(amber_type(reference.category.as_deref().unwrap_or_default()).to_string()),
        score: |rows| mean_of_strata(rows, mean_score),
        ..MEAN
    },
    Metric {
        name: CIRCULAR,
        about: "1 for a question whose every rotation of the options is answered rightly (MMBench, CCBench)",
        benchmarks: &["mmbench", "ccbench", "mmcr"],
        kind: QuestionKind::Choice,
        judge: judge::multiple_choice,
        unit: |reference| Some(rotation_of(reference)),
        score: |rows| all_right(rows, |row| row.unit),
        figures: |rows| vec![("vanilla", mean_score(rows))],
        ..MEAN
    },
    Metric {
        name: "cycles",
        about: "mean over the rotations of the options of the accuracy of each (HRBench)",
        benchmarks: &["hrbench"],
        kind: QuestionKind::Choice,
        judge: judge::multiple_choice,
        stratum: |reference| reference.cycle_category.clone(),
        score: |rows| mean_of_strata(rows, mean_score),
        ..MEAN
    },
    Metric {
        name: "choice_or_open",
        about: "as multiple_choice; an open question is one between its answer and anything else (MMMU)",
        benchmarks: &["mmmu"],
        kind: QuestionKind::Choice,
        judge: judge::choice_or_open,
        ..MEAN
    },
    Metric {
        name: "multiple_choice",
        about: "1 if the right letter, or else the right option's text, can be read from the prediction",
        benchmarks: &["ai2d", "scienceqa", "realworldqa", "mmstar", "seedbench", "vstar", "a-okvqa", "blink"],
        kind: QuestionKind::Choice,
        judge: judge::multiple_choice,
        ..MEAN
    },
    Metric {
        name: JUDGED,
        about: "the points that a language model gives, over the most that it may give (MIA-Bench)",
        benchmarks: &["mia-bench", "mia", "miabench"],
        judge: |_, _| 0.0,
        figures: |rows| vec![("unread_replies", rows.iter().filter(|row| row.unjudged).count() as f64)],
        ..MEAN
    },
    Metric {
        name: "yes_no",
        about: "1 if the prediction says yes where the answer is yes, or no where it is no",
        judge: judge::yes_no,
        figures: yes_no_figures,
        ..MEAN
    },
    Metric {
        name: "exact_match",
        about: "1 if prediction and one of the answers are equal in the VQA normal form",
        judge: judge::exact_match,
        ..MEAN
    },
];

/// The metric with this name.
pub fn metric_named(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

/// The metric of a question: that of its benchmark, if the table lists it; otherwise by the row's content: options, a
/// yes or no as the answer, or any other answer.
pub fn metric_for(benchmark: &str, reference: &Reference) -> &'static Metric {
    let by_row = || {
        let answer = reference.answer.trim().to_lowercase();
        match () {
            () if !reference.options.is_empty() => metric_named("multiple_choice"),
            () if answer == "yes" || answer == "no" => metric_named("yes_no"),
            () => metric_named("exact_match"),
        }
    };
    metric_of(benchmark).or_else(by_row).unwrap_or(&METRICS[METRICS.len() - 1])
}

/// The metric of a benchmark that the table lists: `ChartQA_TEST` and `HRBench4K` are listed, `commerce` is not. A
/// benchmark with `circular` in its name is judged over rotations.
pub fn metric_of(benchmark: &str) -> Option<&'static Metric> {
    let benchmark = benchmark.to_lowercase();
    if benchmark.contains("circular") {
        return metric_named(CIRCULAR);
    }
    let named = |known: &str| match benchmark.strip_prefix(known) {
        // `VStarBench` is called `VStar` in some commands.
        Some(rest) => rest == "bench" || !rest.starts_with(char::is_alphabetic),
        None => false,
    };
    METRICS.iter().find(|metric| metric.benchmarks.iter().any(|known| named(known)))
}

/// True for benchmarks that only a language model can judge.
pub fn needs_judge(benchmark: &str) -> bool {
    metric_of(benchmark).is_some_and(|metric| metric.name == JUDGED)
}

/// The mean of the answers' own scores; 0 for none.
pub(super) fn mean_score(rows: &[Judged]) -> f64 {
    let judged = || rows.iter().filter(|row| !row.unjudged);
    let count = judged().count();
    if count == 0 { 0.0 } else { judged().map(|row| row.score).sum::<f64>() / count as f64 }
}

/// The fraction of keys for which all answers are right.
fn all_right(rows: &[Judged], key: impl Fn(&Judged) -> usize) -> f64 {
    let mut units: BTreeMap<usize, bool> = BTreeMap::new();
    for row in rows {
        *units.entry(key(row)).or_insert(true) &= row.score == 1.0;
    }
    units.values().filter(|right| **right).count() as f64 / units.len().max(1) as f64
}

/// MME's `acc+`: the mean over units of the product of their first two answers' scores.
fn pairs_right(rows: &[Judged]) -> f64 {
    let mut units: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for row in rows {
        units.entry(row.unit).or_default().push(row.score);
    }
    let right = units.values().map(|scores| scores.iter().take(2).product::<f64>()).sum::<f64>();
    right / units.len().max(1) as f64
}

/// The mean of `score` over strata.
fn mean_of_strata(rows: &[Judged], score: impl Fn(&[Judged]) -> f64) -> f64 {
    let mut strata: BTreeMap<usize, Vec<Judged>> = BTreeMap::new();
    for row in rows {
        strata.entry(row.stratum).or_default().push(*row);
    }
    strata.values().map(|own| score(own)).sum::<f64>() / strata.len().max(1) as f64
}

/// Figures of yes-or-no questions, with yes as the positive class; an answer with neither counts as no.
struct YesNo {
    precision: f64,
    recall: f64,
    f1: f64,
    yes_ratio: f64,
}

impl YesNo {
    fn of(rows: &[Judged]) -> Self {
        let count = |test: fn(&Judged) -> bool| rows.iter().filter(|row| test(row)).count();
        let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let (both, positive) = (count(|row| row.truth && row.answered_yes), count(|row| row.answered_yes));
        let truth = count(|row| row.truth);
        let (precision, recall) = (share(both, positive), share(both, truth));
        let f1 = if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
        YesNo { precision, recall, f1, yes_ratio: share(positive, rows.len()) }
    }
}

fn yes_no_figures(rows: &[Judged]) -> Vec<(&'static str, f64)> {
    let figures = YesNo::of(rows);
    vec![
        ("accuracy", mean_score(rows)),
        ("precision", figures.precision),
        ("recall", figures.recall),
        ("f1", figures.f1),
        ("yes_ratio", figures.yes_ratio),
    ]
}

/// The question of which a row is a rotation: its `g_index`, or otherwise its index modulo a million.
pub(super) fn rotation_of(reference: &Reference) -> String {
    match (&reference.g_index, reference.index.parse::<u64>()) {
        (Some(group), _) => group.clone(),
        (None, Ok(index)) => (index % 1_000_000).to_string(),
        (None, Err(_)) => reference.index.clone(),
    }
}

/// `l2-category`, set, and figure (part 4 of the index) or question (part 5).
fn hallusion_key(reference: &Reference, part: usize) -> Option<String> {
    let parts: Vec<&str> = reference.index.split('_').collect();
    let (set, own) = (parts.get(3)?, parts.get(part)?);
    Some(format!("{}_{set}_{own}", reference.l2_category.as_deref().unwrap_or_default()))
}

/// AMBER's type of question for a category.
fn amber_type(category: &str) -> &str {
    match category {
        "discriminative-attribute-state" | "discriminative-attribute-number" | "discriminative-attribute-action" => {
            "Attribute"
        }
        "discriminative-hallucination" => "Existence",
        "discriminative-relation" | "relation" => "Relation",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(answer: &str) -> Reference {
        Reference { answer: answer.into(), ..Reference::default() }
    }

    fn choice(answer: &str) -> Reference {
        let options = [('A', "cat"), ('B', "dog"), ('C', "hot dog")];
        let options = options.map(|(letter, text)| (letter, text.into())).to_vec();
        Reference { answer: answer.into(), options, ..Reference::default() }
    }

    #[test]
    fn the_metric_is_chosen_by_benchmark_name_then_by_row() {
        let cases = [
            ("POPE", open("Yes"), "yes_no_f1"),
            ("ChartQA_TEST", open("5"), "relaxed_accuracy"),
            ("TextVQA_VAL", open("stop"), "vqa_score"),
            ("DocVQA_VAL", open("stop"), "anls"),
            ("OCRBench", open("stop"), "ocr_contains"),
            ("MMBench_DEV_EN_V11", choice("A"), "circular"),
            ("BLINK_circular", choice("A"), "circular"),
            ("HRBench4K", choice("A"), "cycles"),
            ("VStarBench", choice("A"), "multiple_choice"),
            ("VStar", choice("A"), "multiple_choice"),
            ("MME", open("Yes"), "yes_no_pairs"),
            ("MMEReasoning", open("Yes"), "yes_no"),
            ("commerce", open("dog"), "exact_match"),
            ("bench", choice("A"), "multiple_choice"),
            ("bench", open("no"), "yes_no"),
            ("bench", open("dog"), "exact_match"),
        ];
        for (benchmark, reference, want) in cases {
            assert_eq!(metric_for(benchmark, &reference).name, want, "{benchmark} {reference:?}");
        }
        assert!(needs_judge("MIA-Bench") && needs_judge("MIABench") && !needs_judge("MME"));
    }
}
