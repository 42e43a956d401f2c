//! Extracts and judges one answer by VLMEvalKit's rules for exact matching, without a language model as judge.

use super::text::{self, answers_of_cell, normalise_answer, normalised_edit_distance, strip_punctuation};

/// Reference for judging a prediction: a row of the benchmark without its picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reference {
    /// The `index` column.
    pub index: String,
    /// The answer in the benchmark's form: text, a letter, or a list in Python's notation.
    pub answer: String,
    /// Letter and text of each choice; empty for open questions.
    pub options: Vec<(char, String)>,
    /// The `category` column.
    pub category: Option<String>,
    /// The `l2-category` column.
    pub l2_category: Option<String>,
    /// The `g_index` column: the question of which this one is a rotation.
    pub g_index: Option<String>,
    /// The `cycle_category` column: number of rotations of the options.
    pub cycle_category: Option<String>,
    /// The `image_path` column.
    pub image_path: Option<String>,
}

/// OCRBench's category with case-sensitive comparison without spaces.
const FORMULAS: &str = "Handwritten Mathematical Expression Recognition";

/// Answers that VLMEvalKit counts as a refusal; a refusal ends the extraction.
const REFUSALS: &[&str] = &[
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
];

/// The text that VLMEvalKit's API clients return after a failed request.
const NO_ANSWER: &str = "Failed to obtain answer via API";

/// The letter of "none of the options".
const NONE_OF_THEM: char = 'Z';

fn hit(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

/// 1 if the prediction equals one of the answers in the VQA normal form.
pub(super) fn exact_match(reference: &Reference, prediction: &str) -> f64 {
    let prediction = normalise_answer(prediction);
    hit(answers_of_cell(&reference.answer).iter().any(|answer| normalise_answer(answer) == prediction))
}

/// The fraction of the answers that equal the prediction, ignoring case and surrounding spaces;
/// with `any`, 1 if one does.
pub(super) fn equal_text(reference: &Reference, prediction: &str, any: bool) -> f64 {
    let clean = |text: &str| text::lower(text::strip(text));
    let prediction = clean(prediction);
    let answers = answers_of_cell(&reference.answer);
    let equal = answers.iter().filter(|answer| clean(answer) == prediction).count();
    if any { hit(equal > 0) } else { equal as f64 / answers.len().max(1) as f64 }
}

/// 1 if one of the answers occurs in the prediction.
pub(super) fn ocr_contains(reference: &Reference, prediction: &str) -> f64 {
    let formula = reference.category.as_deref() == Some(FORMULAS);
    let clean = |text: &str| {
        if formula {
            text::strip(text).replace('\n', " ").replace(' ', "")
        } else {
            text::strip(&text::lower(text)).replace('\n', " ")
        }
    };
    let prediction = clean(prediction);
    hit(answers_of_cell(&reference.answer).iter().any(|answer| prediction.contains(&clean(answer))))
}

/// 1 if a number is within 5% of one of the answers, or a text equals one ignoring case.
///
/// Source: Masry et al. 2022, arXiv:2203.10244, section 5.1.
pub(super) fn relaxed_accuracy(reference: &Reference, prediction: &str) -> f64 {
    let prediction = text::strip(prediction);
    let number = |text: &str| match text.ends_with('%') {
        true => text::parse_float(text.trim_end_matches('%')).map(|value| value / 100.0),
        false => text::parse_float(text),
    };
    let matches = |answer: &String| match (number(prediction), number(answer)) {
        (Some(prediction), Some(target)) if target != 0.0 => (prediction - target).abs() / target.abs() <= 0.05,
        _ => text::lower(prediction) == text::lower(answer),
    };
    hit(answers_of_cell(&reference.answer).iter().any(matches))
}

/// Agreement with the annotators: the mean of `min(1, other annotators that agree / 3)` over all annotators,
/// each left out in turn. A single answer has no other annotators, so it must equal the prediction
/// (VLMEvalKit gives 0 in that case).
///
/// Source: Antol et al. 2015, arXiv:1505.00468.
pub(super) fn vqa_score(reference: &Reference, prediction: &str) -> f64 {
    let prediction = normalise_answer(prediction);
    let answers: Vec<String> =
        answers_of_cell(&reference.answer).iter().map(|answer| normalise_answer(answer)).collect();
    if let [only] = &answers[..] {
        return hit(*only == prediction);
    }
    let matching = answers.iter().filter(|answer| **answer == prediction).count();
    let scores = answers.iter().map(|left_out| {
        let others = matching - usize::from(*left_out == prediction);
        (others as f64 / 3.0).min(1.0)
    });
    scores.sum::<f64>() / answers.len() as f64
}

/// 1 minus the smallest normalised edit distance to an answer; 0 below 0.5.
///
/// Source: Biten et al. 2019, arXiv:1905.13648.
pub(super) fn anls(reference: &Reference, prediction: &str) -> f64 {
    let distances =
        answers_of_cell(&reference.answer).into_iter().map(|answer| normalised_edit_distance(&answer, prediction));
    let similarity = 1.0 - distances.fold(f64::INFINITY, f64::min);
    if similarity < 0.5 { 0.0 } else { similarity }
}

/// 1 if prediction and answer are both yes or both no.
pub(super) fn yes_no(reference: &Reference, prediction: &str) -> f64 {
    hit(read_yes_no(prediction).is_some_and(|yes| read_yes_no(&reference.answer) == Some(yes)))
}

/// As [`yes_no`], for benchmarks whose answers are spelled `Yes` and `No`.
pub(super) fn yes_no_as_written(reference: &Reference, prediction: &str) -> f64 {
    hit(read_yes_no(prediction).is_some_and(|yes| reference.answer == if yes { "Yes" } else { "No" }))
}

/// As [`yes_no`], with answers `yes` and `no` in any case.
pub(super) fn yes_no_any_case(reference: &Reference, prediction: &str) -> f64 {
    hit(read_yes_no(prediction).is_some_and(|yes| text::lower(&reference.answer) == if yes { "yes" } else { "no" }))
}

/// True for yes, false for no; `None` when the text contains neither or both.
pub fn read_yes_no(text: &str) -> Option<bool> {
    let text = strip_punctuation(&text::lower(text));
    let has = |wanted: &str| text::words(&text).any(|word| word == wanted);
    match (has("yes"), has("no")) {
        (true, false) => Some(true),
        (false, true) => Some(false),
        _ => None,
    }
}

/// 1 if the right letter, or otherwise the right option's text, is found in the prediction.
pub(super) fn multiple_choice(reference: &Reference, prediction: &str) -> f64 {
    hit(read_choice(prediction, &reference.options).is_some_and(|letter| reference.answer.chars().eq([letter])))
}

/// As [`multiple_choice`] for MMMU: an open question becomes a choice between A, the answer, and anything else.
pub(super) fn choice_or_open(reference: &Reference, prediction: &str) -> f64 {
    let mut options = reference.options.clone();
    if !options.iter().any(|(letter, _)| *letter == 'A') {
        options.retain(|(letter, _)| *letter != 'B');
        options.splice(0..0, [('A', reference.answer.clone()), ('B', "Other Answers".to_string())]);
    }
    let mut letters = reference.answer.chars();
    let right = match (letters.next(), letters.next()) {
        (Some(letter), None) if letter.is_ascii_uppercase() => letter,
        _ => 'A',
    };
    hit(read_choice(prediction, &options) == Some(right))
}

/// The selected option: a letter, a refusal (`Z`), or the option whose text occurs in the prediction.
fn read_choice(prediction: &str, options: &[(char, String)]) -> Option<char> {
    read_letter(prediction, options).or_else(|| read_text(prediction, options))
}

/// The letter that is a separate word, if there is exactly one and it is among the last four words; otherwise the
/// letter after "answer is".
fn read_letter(prediction: &str, options: &[(char, String)]) -> Option<char> {
    if prediction.contains(NO_ANSWER) {
        return None;
    }
    if REFUSALS.iter().any(|refusal| prediction.contains(refusal)) {
        return Some(NONE_OF_THEM);
    }
    let text = prediction.replace(['.', '(', ')', '[', ']', ',', ':', ';', '!', '*', '#', '{', '}'], " ");
    let words: Vec<&str> = text::words(&text).collect();
    let position = |letter: char| words.iter().position(|word| word.chars().eq([letter]));
    let mut found = options.iter().filter_map(|(letter, _)| Some((*letter, position(*letter)?)));
    match (found.next(), found.next()) {
        (Some((letter, at)), None) if at + 5 > words.len() => return Some(letter),
        (None, _) if position(NONE_OF_THEM).is_some() => return Some(NONE_OF_THEM),
        _ => {}
    }
    named_letter(prediction).filter(|letter| options.iter().any(|(known, _)| known == letter))
}

/// The letter A to D after the first "answer is", case-insensitive, with or without asterisks before it.
fn named_letter(prediction: &str) -> Option<char> {
    // Tries each occurrence of the words in turn, as a regular-expression search does.
    let lower = prediction.to_ascii_lowercase();
    lower.match_indices("answer").find_map(|(at, word)| {
        let rest = skip_spaces(&lower[at + word.len()..])?;
        let rest = skip_spaces(rest.strip_prefix("is")?)?;
        let letter = rest.trim_start_matches('*').chars().next()?.to_ascii_uppercase();
        ('A'..='D').contains(&letter).then_some(letter)
    })
}

/// The text after one or more spaces.
fn skip_spaces(text: &str) -> Option<&str> {
    let rest = text.trim_start_matches(text::is_space);
    (rest.len() < text.len()).then_some(rest)
}

/// The option whose text occurs in the prediction, if there is exactly one and the prediction is not
/// much longer than the options.
fn read_text(prediction: &str, options: &[(char, String)]) -> Option<char> {
    let prediction = text::lower(prediction);
    let total: usize = options.iter().map(|(_, text)| text.chars().count()).sum();
    if prediction.chars().count() > 2 * total {
        return None;
    }
    let mut found = options.iter().filter(|(_, option)| prediction.contains(&text::lower(option)));
    let letter = found.next()?.0;
    found.next().is_none().then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_letter_is_found_in_a_verbose_answer() {
        let cases = [
            ("The correct answer is **B**. Here's why the others fall short of it.", Some('B')),
            ("so the ANSWER  IS c, as far as anybody can tell from it", Some('C')),
            ("the answer is: B and that is what I think of it", None),
            ("the answer is E in my view of these things", None),
            ("the answer\u{1f}is B, and here is the reason for it", Some('B')),
        ];
        for (text, want) in cases {
            assert_eq!(named_letter(text), want, "{text}");
        }
    }

    #[test]
    fn a_single_reference_answer_must_match() {
        let reference = Reference { answer: "dog".into(), ..Reference::default() };
        assert_eq!((vqa_score(&reference, "a dog"), vqa_score(&reference, "cat")), (1.0, 0.0));
    }
}
