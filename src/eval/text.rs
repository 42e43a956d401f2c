//! Text normalisation of the VQA metric and the small string measures that benchmarks share.
//!
//! Source of the rules: the VQA evaluation (Antol et al. 2015, arXiv:1505.00468) as VLMEvalKit applies it.

/// Marks that the normalisation removes or turns into spaces.
const PUNCTUATION: &[char] =
    &[';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!'];

/// Full stops that one call removes at most.
const MAX_STOPS: usize = 32;

/// Number words and what they are written as.
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

/// Contractions; a word that lacks exactly one apostrophe of one of them is spelled with it.
const CONTRACTIONS: &str = "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've \
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've \
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've \
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've \
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't \
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's \
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll \
    you're you've";

/// Removes punctuation: a mark next to a space vanishes, one between letters becomes a space.
pub fn strip_punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let digit = |at: usize| chars.get(at).is_some_and(|c| c.is_ascii_digit());
    let thousands = (1..chars.len()).any(|at| chars[at] == ',' && digit(at - 1) && digit(at + 1));
    let mut out = text.to_string();
    for &mark in PUNCTUATION {
        let beside_space = chars.windows(2).any(|pair| pair == [mark, ' '] || pair == [' ', mark]);
        let replacement = if beside_space || thousands { "" } else { " " };
        out = out.replace(mark, replacement);
    }
    let chars: Vec<char> = out.chars().collect();
    let mut removed = 0;
    let mut kept = String::with_capacity(out.len());
    for (at, &c) in chars.iter().enumerate() {
        let before_digit = chars.get(at + 1).is_some_and(|next| next.is_numeric());
        if c == '.' && !before_digit && removed < MAX_STOPS {
            removed += 1;
        } else {
            kept.push(c);
        }
    }
    kept
}

/// The normal form in which VQA answers are compared: lower case, no punctuation, no articles, digits for number
/// words, contractions with their apostrophes.
pub fn normalise_answer(text: &str) -> String {
    let text = text.replace(['\n', '\t'], " ");
    let text = strip_punctuation(text.trim()).to_lowercase();
    let mut words = Vec::new();
    for word in text.split_whitespace() {
        let word = NUMBERS.iter().find(|row| row.0 == word).map_or(word, |row| row.1);
        if !matches!(word, "a" | "an" | "the") {
            words.push(contraction(word).unwrap_or(word));
        }
    }
    words.join(" ")
}

fn contraction(word: &str) -> Option<&'static str> {
    CONTRACTIONS.split_whitespace().find(|full| {
        full.len() == word.len() + 1
            && full
                .match_indices('\'')
                .any(|(at, _)| word.get(..at) == full.get(..at) && word.get(at..) == full.get(at + 1..))
    })
}

/// Edit distance of two texts over the longer one's length, in 0 to 1, after lower-casing and joining runs of spaces.
///
/// Source: Biten et al. 2019, arXiv:1905.13648 (ANLS is 1 minus it, 0 below a threshold).
pub fn normalised_edit_distance(a: &str, b: &str) -> f64 {
    let clean = |text: &str| {
        text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ").chars().collect::<Vec<char>>()
    };
    let (a, b) = (clean(a), clean(b));
    let longest = a.len().max(b.len());
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

/// The answers in a cell: a list as Python writes it (`['4', 'four']`), or the cell itself.
pub fn answers_of_cell(cell: &str) -> Vec<String> {
    parse_list(cell.trim()).unwrap_or_else(|| vec![cell.to_string()])
}

fn parse_list(text: &str) -> Option<Vec<String>> {
    let mut rest = text.strip_prefix('[')?.strip_suffix(']')?.trim_start();
    let mut items = Vec::new();
    while !rest.is_empty() {
        let quote = rest.chars().next()?;
        let item;
        if quote == '\'' || quote == '"' {
            let mut value = String::new();
            let mut chars = rest[1..].char_indices();
            let end = loop {
                match chars.next()? {
                    (_, '\\') => value.push(chars.next()?.1),
                    (at, c) if c == quote => break at,
                    (_, c) => value.push(c),
                }
            };
            item = value;
            rest = rest[1 + end + 1..].trim_start();
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            let number = rest[..end].trim();
            number.parse::<f64>().ok()?;
            item = number.to_string();
            rest = &rest[end..];
        }
        items.push(item);
        rest = match rest.strip_prefix(',') {
            Some(rest) => rest.trim_start(),
            None if rest.is_empty() => rest,
            None => return None,
        };
    }
    (!items.is_empty()).then_some(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_normalised_as_the_vqa_metric_does() {
        let cases = [
            ("The Dog.", "dog"),
            ("two  dogs", "2 dogs"),
            ("red/blue", "red blue"),
            ("red, blue", "red blue"),
            ("1,000", "1000"),
            ("3.5", "3.5"),
            ("Mr. X", "mr x"),
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
    fn edit_distances_by_hand() {
        assert_eq!(normalised_edit_distance("kitten", "sitting"), 3.0 / 7.0);
        assert_eq!(normalised_edit_distance(" Hello  World ", "hello world"), 0.0);
        assert_eq!(normalised_edit_distance("", ""), 0.0);
        assert_eq!(normalised_edit_distance("abc", ""), 1.0);
    }

    #[test]
    fn cells_hold_one_answer_or_a_list() {
        let cases: &[(&str, &[&str])] = &[
            ("time", &["time"]),
            ("['4', \"it's\"]", &["4", "it's"]),
            ("[4, 5.5]", &["4", "5.5"]),
            (r"['it\'s']", &["it's"]),
            ("['a'", &["['a'"]),
            ("[]", &["[]"]),
            ("['a' 'b']", &["['a' 'b']"]),
            ("[x]", &["[x]"]),
        ];
        for (cell, want) in cases {
            assert_eq!(answers_of_cell(cell), *want, "{cell}");
        }
    }
}
