//! Text normalisation of the VQA metric, and string measures that several benchmarks use.
//!
//! Source of the rules: the VQA evaluation (Antol et al. 2015, arXiv:1505.00468) in VLMEvalKit's implementation.

use crate::data::string_list;

/// Marks that the normalisation removes or replaces by spaces.
const PUNCTUATION: &[char] =
    &[';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!'];

/// Largest number of full stops that one call removes. VLMEvalKit passes Python's `re.UNICODE`, whose value is 32, as
/// the maximum number of replacements.
const MAX_STOPS: usize = 32;

/// The first digit of each run of ten digits that Python's `\d` and `float` accept, within the basic plane.
const DIGITS: &[u32] = &[
    0x30, 0x660, 0x6F0, 0x7C0, 0x966, 0x9E6, 0xA66, 0xAE6, 0xB66, 0xBE6, 0xC66, 0xCE6, 0xD66, 0xDE6, 0xE50, 0xED0,
    0xF20, 0x1040, 0x1090, 0x17E0, 0x1810, 0x1946, 0x19D0, 0x1A80, 0x1A90, 0x1B50, 0x1BB0, 0x1C40, 0x1C50, 0xA620,
    0xA8D0, 0xA900, 0xA9D0, 0xA9F0, 0xAA50, 0xABF0, 0xFF10,
];

/// The value of a decimal digit of any script.
fn digit_value(c: char) -> Option<u32> {
    DIGITS.iter().find_map(|&zero| u32::from(c).checked_sub(zero).filter(|value| *value < 10))
}

/// True for white space by the rules of Python's `str.split` and `str.strip`.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The words between white space, as in Python's `str.split`.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// The text without white space at its ends, as in Python's `str.strip`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Lower case, as in Python's `str.lower`.
pub fn lower(text: &str) -> String {
    text.to_lowercase()
}

/// A number by the rules of Python's `float`: white space around it, digits of any script, `_` between two digits.
pub fn parse_float(text: &str) -> Option<f64> {
    let text: Vec<char> = strip(text).chars().collect();
    let digit = |at: Option<usize>| at.and_then(|at| text.get(at)).is_some_and(|c| digit_value(*c).is_some());
    let mut plain = String::with_capacity(text.len());
    for (at, &c) in text.iter().enumerate() {
        match digit_value(c).and_then(|value| char::from_digit(value, 10)) {
            Some(digit) => plain.push(digit),
            None if c == '_' && digit(at.checked_sub(1)) && digit(Some(at + 1)) => {}
            None => plain.push(c),
        }
    }
    plain.parse().ok()
}

/// Number words and their digits.
const NUMBERS: &[(&str, &str)] = &[
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Contractions; a word that lacks exactly one apostrophe of a contraction is replaced by it.
const CONTRACTIONS: &str = "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've \
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've \
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've \
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've \
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't \
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's \
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll \
    you're you've";

/// Removes punctuation: a mark next to a space is deleted, one between letters becomes a space.
pub fn strip_punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let digit = |at: usize| chars.get(at).is_some_and(|c| digit_value(*c).is_some());
    let thousands = (1..chars.len()).any(|at| chars[at] == ',' && digit(at - 1) && digit(at + 1));
    let mut out = text.to_string();
    for &mark in PUNCTUATION {
        let beside_space = chars.windows(2).any(|pair| pair == [mark, ' '] || pair == [' ', mark]);
        let replacement = if beside_space || thousands { "" } else { " " };
        out = out.replace(mark, replacement);
    }
    let chars: Vec<char> = out.chars().collect();
    let digit = |at: Option<usize>| at.and_then(|at| chars.get(at)).is_some_and(|c| digit_value(*c).is_some());
    let mut removed = 0;
    let mut kept = String::with_capacity(out.len());
    for (at, &c) in chars.iter().enumerate() {
        let beside_digit = digit(at.checked_sub(1)) || digit(Some(at + 1));
        if c == '.' && !beside_digit && removed < MAX_STOPS {
            removed += 1;
        } else {
            kept.push(c);
        }
    }
    kept
}

/// The normal form for the comparison of VQA answers: lower case, no punctuation, no articles, digits for number words,
/// contractions with their apostrophes.
pub fn normalise_answer(text: &str) -> String {
    let text = text.replace(['\n', '\t'], " ");
    let text = lower(&strip_punctuation(strip(&text)));
    let mut kept = Vec::new();
    for word in words(&text) {
        let word = NUMBERS.iter().find(|row| row.0 == word).map_or(word, |row| row.1);
        if !matches!(word, "a" | "an" | "the") {
            kept.push(contraction(word).unwrap_or(word));
        }
    }
    kept.join(" ")
}

fn contraction(word: &str) -> Option<&'static str> {
    // The only contraction that the rules split.
    if word == "somebody'd" {
        return Some("somebodyd");
    }
    CONTRACTIONS.split_whitespace().find(|full| {
        full.len() == word.len() + 1
            && full
                .match_indices('\'')
                .any(|(at, _)| word.get(..at) == full.get(..at) && word.get(at..) == full.get(at + 1..))
    })
}

/// Edit distance of two texts in lower case with runs of spaces collapsed, divided by the length of
/// the longer original text.
///
/// Source: Biten et al. 2019, arXiv:1905.13648 (ANLS is 1 minus it, 0 below a threshold).
pub fn normalised_edit_distance(a: &str, b: &str) -> f64 {
    let longest = [a, b].map(|text| text.to_uppercase().chars().count()).into_iter().max().unwrap_or(0);
    let clean = |text: &str| words(&lower(text)).collect::<Vec<_>>().join(" ").chars().collect::<Vec<char>>();
    let (a, b) = (clean(a), clean(b));
    if longest == 0 {
        return 0.0;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal } else { 1 + diagonal.min(above).min(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()] as f64 / longest as f64
}

/// The answers in a cell: a list in Python's notation (`['4', 'four']`), or the cell itself.
pub fn answers_of_cell(cell: &str) -> Vec<String> {
    string_list(cell).filter(|items| !items.is_empty()).unwrap_or_else(|| vec![cell.to_string()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_normalised_as_in_the_vqa_metric() {
        let cases = [
            ("The Dog.", "dog"),
            ("two  dogs", "2 dogs"),
            ("red/blue", "red blue"),
            ("red, blue", "red blue"),
            ("1,000", "1000"),
            ("3.5", "3.5"),
            ("Mr. X", "mr x"),
            ("5.", "5."),
            ("somebody'd", "somebodyd"),
            ("dont", "don't"),
            ("couldn'tve", "couldn't've"),
            ("none", "0"),
            ("a", ""),
            ("top-left", "top left"),
            ("shes", "shes"),
        ];
        for (text, want) in cases {
            assert_eq!(normalise_answer(text), want, "{text}");
        }
    }

    #[test]
    fn edit_distances_equal_values_computed_by_hand() {
        assert_eq!(normalised_edit_distance("kitten", "sitting"), 3.0 / 7.0);
        assert_eq!(normalised_edit_distance(" Hello  World ", "hello world"), 0.0);
        // The length is that of the original text, so extra spaces reduce the distance.
        assert_eq!(normalised_edit_distance("ab   ", "ac"), 0.2);
        assert_eq!(normalised_edit_distance("", ""), 0.0);
        assert_eq!(normalised_edit_distance("abc", ""), 1.0);
    }

    #[test]
    fn an_answer_cell_holds_one_answer_or_a_list() {
        let cases: &[(&str, &[&str])] = &[
            ("time", &["time"]),
            ("['4', \"it's\"]", &["4", "it's"]),
            ("[4, 5.5]", &["4", "5.5"]),
            (r"['it\'s']", &["it's"]),
            ("['a'", &["['a'"]),
            ("[]", &["[]"]),
            ("['a' 'b']", &["ab"]),
            (r"['a\nb\x41\d']", &["a\nbA\\d"]),
            ("['a'x]", &["['a'x]"]),
            ("[x]", &["[x]"]),
        ];
        for (cell, want) in cases {
            assert_eq!(answers_of_cell(cell), *want, "{cell}");
        }
    }
}
