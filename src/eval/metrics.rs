//! How answers are judged: one row of the table per metric, with the benchmarks that use it.
//!
//! The rules are VLMEvalKit's with exact matching, that is without a language model as judge.

use super::text::{answers_of_cell, normalise_answer, normalised_edit_distance, strip_punctuation};

/// What a prediction is judged against.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reference {
    /// The answer as the benchmark writes it: text, a letter, or a list in Python's notation.
    pub answer: String,
    /// Letter and text of each choice; empty for open questions.
    pub options: Vec<(char, String)>,
}

/// One metric.
pub struct Metric {
    pub name: &'static str,
    /// What it counts, for help texts.
    pub about: &'static str,
    /// Benchmarks that are judged by it: how their names begin, in lower case.
    pub benchmarks: &'static [&'static str],
    /// What their questions end with.
    pub instruction: &'static str,
    /// The score of a prediction, 0 to 1.
    pub score: fn(&Reference, &str) -> f64,
}

/// What VLMEvalKit puts behind open questions of the benchmarks that expect a word.
const SHORT_ANSWER: &str = "\nAnswer the question using a single word or phrase.";

/// All metrics. Benchmarks are looked up in this order.
pub const METRICS: &[Metric] = &[
    Metric {
        name: "ocr_contains",
        about: "1 if one of the answers occurs in the prediction (OCRBench)",
        benchmarks: &["ocrbench"],
        instruction: "",
        score: ocr_contains,
    },
    Metric {
        name: "relaxed_accuracy",
        about: "1 if a number is within 5% of the answer, or a text equals it (ChartQA)",
        benchmarks: &["chartqa"],
        instruction: SHORT_ANSWER,
        score: relaxed_accuracy,
    },
    Metric {
        name: "vqa_score",
        about: "agreement with ten annotators, full from three on (TextVQA)",
        benchmarks: &["textvqa", "okvqa", "vqav2"],
        instruction: SHORT_ANSWER,
        score: vqa_score,
    },
    Metric {
        name: "anls",
        about: "1 minus the normalised edit distance, 0 below 0.5 (DocVQA, InfoVQA)",
        benchmarks: &["docvqa", "infovqa"],
        instruction: SHORT_ANSWER,
        score: anls,
    },
    Metric {
        name: "yes_no",
        about: "1 if the prediction says yes where the answer is yes, or no where it is no (POPE)",
        benchmarks: &["pope", "mme", "hallusionbench", "amber"],
        instruction: "",
        score: yes_no,
    },
    Metric {
        name: "multiple_choice",
        about: "1 if the right letter, or else the right option's text, can be read from the prediction",
        benchmarks: &[
            "mmbench",
            "ai2d",
            "scienceqa",
            "realworldqa",
            "mmstar",
            "seedbench",
            "hrbench",
            "vstarbench",
            "a-okvqa",
            "mmmu",
        ],
        instruction: "",
        score: multiple_choice,
    },
    Metric {
        name: "exact_match",
        about: "1 if prediction and one of the answers are equal in the VQA normal form",
        benchmarks: &["ocrvqa"],
        instruction: SHORT_ANSWER,
        score: exact_match,
    },
];

/// The metric of a question: its benchmark's if the table knows it by name; else by what the row holds: options,
/// a yes or no as the answer, anything else.
pub fn metric_for(benchmark: &str, reference: &Reference) -> &'static Metric {
    let by_name = |name: &str| METRICS.iter().find(|metric| metric.name == name);
    let by_row = || {
        let answer = reference.answer.trim().to_lowercase();
        match () {
            () if !reference.options.is_empty() => by_name("multiple_choice"),
            () if answer == "yes" || answer == "no" => by_name("yes_no"),
            () => by_name("exact_match"),
        }
    };
    metric_of(benchmark).or_else(by_row).unwrap_or(&METRICS[METRICS.len() - 1])
}

/// The metric of a benchmark that the table knows by name: `ChartQA_TEST` and `HRBench4K` are known, `commerce` is not.
pub fn metric_of(benchmark: &str) -> Option<&'static Metric> {
    let benchmark = benchmark.to_lowercase();
    let named = |known: &str| match benchmark.strip_prefix(known) {
        Some(rest) => !rest.starts_with(char::is_alphabetic),
        None => false,
    };
    METRICS.iter().find(|metric| metric.benchmarks.iter().any(|known| named(known)))
}

fn hit(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

fn exact_match(reference: &Reference, prediction: &str) -> f64 {
    let prediction = normalise_answer(prediction);
    hit(answers_of_cell(&reference.answer).iter().any(|answer| normalise_answer(answer) == prediction))
}

fn ocr_contains(reference: &Reference, prediction: &str) -> f64 {
    let clean = |text: &str| text.to_lowercase().trim().replace('\n', " ");
    let prediction = clean(prediction);
    hit(answers_of_cell(&reference.answer).iter().any(|answer| prediction.contains(&clean(answer))))
}

fn relaxed_accuracy(reference: &Reference, prediction: &str) -> f64 {
    hit(answers_of_cell(&reference.answer).iter().any(|answer| is_relaxed_match(answer, prediction.trim())))
}

/// Source: Masry et al. 2022, arXiv:2203.10244, section 5.1.
fn is_relaxed_match(target: &str, prediction: &str) -> bool {
    let number = |text: &str| match text.strip_suffix('%') {
        Some(percent) => percent.trim_end_matches('%').trim().parse::<f64>().ok().map(|value| value / 100.0),
        None => text.trim().parse::<f64>().ok(),
    };
    match (number(prediction), number(target)) {
        (Some(prediction), Some(target)) if target != 0.0 => (prediction - target).abs() / target.abs() <= 0.05,
        _ => prediction.to_lowercase() == target.to_lowercase(),
    }
}

/// Source: Antol et al. 2015, arXiv:1505.00468. A lone answer has no others to agree with, so it must be met itself.
fn vqa_score(reference: &Reference, prediction: &str) -> f64 {
    let prediction = normalise_answer(prediction);
    let answers: Vec<String> =
        answers_of_cell(&reference.answer).iter().map(|answer| normalise_answer(answer)).collect();
    if let [only] = &answers[..] {
        return hit(*only == prediction);
    }
    let matching = answers.iter().filter(|answer| **answer == prediction).count();
    // Each annotator in turn is left out and the prediction compared with the others.
    let scores = answers.iter().map(|left_out| {
        let others = matching - usize::from(*left_out == prediction);
        (others as f64 / 3.0).min(1.0)
    });
    scores.sum::<f64>() / answers.len() as f64
}

fn anls(reference: &Reference, prediction: &str) -> f64 {
    let distances =
        answers_of_cell(&reference.answer).into_iter().map(|answer| normalised_edit_distance(&answer, prediction));
    let similarity = 1.0 - distances.fold(1.0, f64::min);
    if similarity < 0.5 { 0.0 } else { similarity }
}

fn yes_no(reference: &Reference, prediction: &str) -> f64 {
    hit(says_yes(prediction).is_some_and(|yes| says_yes(&reference.answer) == Some(yes)))
}

/// Whether a text says yes or no; `None` when it says neither or both.
pub fn says_yes(text: &str) -> Option<bool> {
    let text = strip_punctuation(&text.to_lowercase());
    let has = |wanted: &str| text.split_whitespace().any(|word| word == wanted);
    match (has("yes"), has("no")) {
        (true, false) => Some(true),
        (false, true) => Some(false),
        _ => None,
    }
}

fn multiple_choice(reference: &Reference, prediction: &str) -> f64 {
    let answer = reference.answer.trim();
    let inferred = infer_option(prediction, &reference.options).or_else(|| infer_text(prediction, &reference.options));
    hit(inferred.is_some_and(|letter| answer.chars().eq([letter])))
}

/// The letter that stands alone as a word, if exactly one does and it is among the last four words.
fn infer_option(prediction: &str, options: &[(char, String)]) -> Option<char> {
    let text = prediction.replace(['.', '(', ')', '[', ']', ',', ':', ';', '!', '*', '#', '{', '}'], " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let position = |letter: char| words.iter().position(|word| word.chars().eq([letter]));
    let mut found = options.iter().filter_map(|(letter, _)| Some((*letter, position(*letter)?)));
    let (letter, at) = found.next()?;
    (found.next().is_none() && at + 5 > words.len()).then_some(letter)
}

/// The option whose text occurs in the prediction, if exactly one does and the prediction is not much longer than all.
fn infer_text(prediction: &str, options: &[(char, String)]) -> Option<char> {
    let prediction = prediction.to_lowercase();
    let total: usize = options.iter().map(|(_, text)| text.chars().count()).sum();
    if prediction.chars().count() > 2 * total {
        return None;
    }
    let mut found = options.iter().filter(|(_, text)| prediction.contains(&text.to_lowercase()));
    let letter = found.next()?.0;
    found.next().is_none().then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(answer: &str) -> Reference {
        Reference { answer: answer.into(), options: Vec::new() }
    }

    fn choice(answer: &str) -> Reference {
        let options = [('A', "cat"), ('B', "dog"), ('C', "hot dog")];
        Reference { answer: answer.into(), options: options.map(|(letter, text)| (letter, text.into())).to_vec() }
    }

    #[test]
    fn letters_are_read_as_vlmevalkit_does() {
        let cases = [
            ("B", 1.0),
            (" B.", 1.0),
            ("(B)", 1.0),
            ("The answer is B", 1.0),
            ("A or B", 0.0),
            ("B is what I think of it after all", 0.0),
            ("b", 0.0),
            ("dog", 1.0),
            ("Dog.", 1.0),
            ("cat or dog", 0.0),
            ("hot dog", 0.0),
            ("it is a dog, and here follows a very long explanation of it", 0.0),
            ("A", 0.0),
            ("", 0.0),
        ];
        for (prediction, want) in cases {
            assert_eq!(multiple_choice(&choice("B"), prediction), want, "{prediction}");
        }
    }

    #[test]
    fn yes_and_no_are_read_as_words() {
        let cases = [
            ("Yes, there is.", Some(true)),
            ("no", Some(false)),
            ("yes and no", None),
            ("nothing", None),
            ("No!", Some(false)),
        ];
        for (text, want) in cases {
            assert_eq!(says_yes(text), want, "{text}");
        }
        assert_eq!(yes_no(&open("Yes"), "yes"), 1.0);
        assert_eq!(yes_no(&open("Yes"), "maybe"), 0.0);
        assert_eq!(yes_no(&open("No"), "yes"), 0.0);
    }

    #[test]
    fn numbers_may_be_five_percent_off() {
        let cases = [
            ("100", "105", true),
            ("100", "94.9", false),
            ("50%", "0.51", true),
            ("50%", "48%", true),
            ("0", "0", true),
            ("0", "0.0", false),
            ("Red", "red", true),
            ("red", "blue", false),
            ("10", "ten", false),
        ];
        for (target, prediction, want) in cases {
            assert_eq!(relaxed_accuracy(&open(target), prediction), hit(want), "{target} {prediction}");
        }
        assert_eq!(relaxed_accuracy(&open("['10', '20']"), "20.5"), 1.0);
    }

    #[test]
    fn annotators_are_left_out_in_turn() {
        let annotators = open("['dog', 'dog', 'dogs', 'the dog', 'cat']");
        // Three of five say dog: leaving one of them out leaves 2/3, leaving another out leaves 1.
        let want = (3.0 * (2.0 / 3.0) + 2.0 * 1.0) / 5.0;
        assert!((vqa_score(&annotators, "Dog.") - want).abs() < 1e-12);
        assert!((vqa_score(&annotators, "cat") - (4.0 / 3.0) / 5.0).abs() < 1e-12);
        assert_eq!(vqa_score(&annotators, "bird"), 0.0);
        assert_eq!(vqa_score(&open("dog"), "a dog"), 1.0);
    }

    #[test]
    fn edit_similarity_counts_from_one_half_on() {
        assert_eq!(anls(&open("hello"), "Hello"), 1.0);
        assert_eq!(anls(&open("hello"), "hella"), 0.8);
        assert_eq!(anls(&open("hello"), "world"), 0.0);
        assert_eq!(anls(&open("['x', 'hello']"), "hell"), 0.8);
    }

    #[test]
    fn ocr_answers_are_contained() {
        assert_eq!(ocr_contains(&open("['Coca Cola', 'coke']"), "It says COCA COLA here"), 1.0);
        assert_eq!(ocr_contains(&open("pepsi"), "It says\nCoke"), 0.0);
    }

    #[test]
    fn open_answers_are_compared_in_normal_form() {
        assert_eq!(exact_match(&open("top left"), " Top-left."), 1.0);
        assert_eq!(exact_match(&open("3"), "three"), 1.0);
        assert_eq!(exact_match(&open("dog"), "dogs"), 0.0);
    }

    #[test]
    fn metrics_are_chosen_by_name_then_by_row() {
        let cases = [
            ("POPE", open("Yes"), "yes_no"),
            ("ChartQA_TEST", open("5"), "relaxed_accuracy"),
            ("TextVQA_VAL", open("stop"), "vqa_score"),
            ("DocVQA_VAL", open("stop"), "anls"),
            ("OCRBench", open("stop"), "ocr_contains"),
            ("MMBench_DEV_EN", choice("A"), "multiple_choice"),
            ("HRBench4K", choice("A"), "multiple_choice"),
            ("commerce", open("dog"), "exact_match"),
            ("bench", choice("A"), "multiple_choice"),
            ("bench", open("no"), "yes_no"),
            ("bench", open("dog"), "exact_match"),
        ];
        for (benchmark, reference, want) in cases {
            assert_eq!(metric_for(benchmark, &reference).name, want, "{benchmark} {reference:?}");
        }
    }

    #[test]
    fn every_metric_gives_full_marks_to_the_answer_itself() {
        for metric in METRICS {
            let (reference, prediction) = match metric.name {
                "multiple_choice" => (choice("B"), "B"),
                "yes_no" => (open("Yes"), "Yes"),
                _ => (open("42"), "42"),
            };
            assert_eq!((metric.score)(&reference, prediction), 1.0, "{}", metric.name);
            assert_eq!((metric.score)(&reference, "zzzzzz"), 0.0, "{}", metric.name);
        }
    }
}
