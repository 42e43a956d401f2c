//! One row of any data set: pictures and the turns of a conversation, running text, or ready tensors.

use std::sync::Arc;

use super::sample::{ImageBytes, MARKER, MessagePart, Sample, Turn};
use super::tensors::TensorRow;

/// A row in the common form of all readers.
#[derive(Debug)]
pub(super) struct SourceRow {
    /// Name in errors, and id of the sample.
    pub subject: String,
    /// Pictures in the order in which the turns show them.
    pub images: Vec<ImageBytes>,
    pub system: Option<String>,
    pub turns: Vec<Turn>,
    /// Token ids of running text. All other fields except `subject` are empty then.
    pub text: Option<Vec<i64>>,
    /// Ready tensors. All other fields except `subject` are empty then.
    pub tensors: Option<Arc<TensorRow>>,
}

/// Author of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaker {
    System,
    User,
    Assistant,
}

impl Speaker {
    /// The speaker with this name in a data set; `None` for an unknown name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "system" => Some(Speaker::System),
            "human" | "user" => Some(Speaker::User),
            "gpt" | "assistant" => Some(Speaker::Assistant),
            _ => None,
        }
    }
}

/// A piece of a message in a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RawPiece {
    /// Text. In a user's message each `<image>` marks a picture.
    Text(String),
    /// A picture: the one at this position of the row, or the next one.
    Image(Option<usize>),
}

/// A message in a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawMessage {
    pub speaker: Speaker,
    pub pieces: Vec<RawPiece>,
}

impl RawMessage {
    pub fn text(speaker: Speaker, text: String) -> Self {
        RawMessage { speaker, pieces: vec![RawPiece::Text(text)] }
    }
}

impl SourceRow {
    /// A row of running text.
    pub fn of_text(subject: String, tokens: Vec<i64>) -> Self {
        SourceRow { text: Some(tokens), ..Self::empty(subject) }
    }

    /// A row of ready tensors.
    pub fn of_tensors(subject: String, row: TensorRow) -> Self {
        SourceRow { tensors: Some(Arc::new(row)), ..Self::empty(subject) }
    }

    fn empty(subject: String) -> Self {
        SourceRow { subject, images: Vec::new(), system: None, turns: Vec::new(), text: None, tensors: None }
    }

    /// A conversation. Pictures are placed where the users' messages mark them, or before the first question if no
    /// message does.
    ///
    /// Errors: a message when there are no turns, user and assistant do not alternate, or the marks do not match the
    /// pictures.
    pub fn of_messages(
        subject: String,
        images: Vec<ImageBytes>,
        messages: Vec<RawMessage>,
    ) -> std::result::Result<Self, String> {
        let (system, pairs) = split_turns(messages)?;
        let mut shown: Vec<Option<usize>> = Vec::new();
        let mut turns = Vec::with_capacity(pairs.len());
        for (question, assistant) in pairs {
            let mut user = Vec::new();
            for piece in question {
                match piece {
                    RawPiece::Text(text) => push_text(&mut user, &text, &mut shown),
                    RawPiece::Image(index) => {
                        user.push(MessagePart::Image(shown.len()));
                        shown.push(index);
                    }
                }
            }
            turns.push(Turn { user, assistant });
        }
        let images = if shown.is_empty() {
            if let Some(first) = turns.first_mut() {
                first.user.splice(0..0, (0..images.len()).map(MessagePart::Image));
            }
            images
        } else {
            in_order(images, &shown)?
        };
        Ok(SourceRow { images, system, turns, ..Self::empty(subject) })
    }

    /// The whole row as one sample.
    pub fn sample(&self, index: usize) -> Sample {
        Sample {
            index,
            id: self.subject.clone(),
            images: self.images.clone(),
            system: self.system.clone(),
            turns: self.turns.clone(),
            text: self.text.clone(),
            tensors: self.tensors.clone(),
        }
    }

    /// One turn as a sample, with the pictures of this turn and of all earlier turns; `None` when the row has no such
    /// turn.
    pub fn turn(&self, index: usize, turn: usize) -> Option<Sample> {
        let own = self.turns.get(turn)?;
        let count = |turns: &[Turn]| {
            turns.iter().flat_map(|turn| &turn.user).filter(|part| matches!(part, MessagePart::Image(_))).count()
        };
        let (before, until) = (count(self.turns.get(..turn)?), count(self.turns.get(..=turn)?));
        let user = (0..before).map(MessagePart::Image).chain(own.user.iter().cloned()).collect();
        Some(Sample {
            index,
            id: format!("turn {turn} of {}", self.subject),
            images: self.images.get(..until)?.to_vec(),
            system: self.system.clone(),
            turns: vec![Turn { user, assistant: own.assistant.clone() }],
            text: None,
            tensors: None,
        })
    }
}

/// The pieces of a question, and the answer.
type Pair = (Vec<RawPiece>, String);

/// Splits messages into the system message and pairs of question and answer.
fn split_turns(messages: Vec<RawMessage>) -> std::result::Result<(Option<String>, Vec<Pair>), String> {
    let mut messages = messages.into_iter().peekable();
    let system = match messages.next_if(|message| message.speaker == Speaker::System) {
        Some(message) => Some(plain(message, "the system message")?).filter(|text| !text.is_empty()),
        None => None,
    };
    let mut pairs = Vec::new();
    while let Some(question) = messages.next() {
        let answer = messages.next();
        let speakers = (question.speaker, answer.as_ref().map(|message| message.speaker));
        if speakers == (Speaker::User, None) {
            return Err("the conversation ends with the user; an assistant's answer is missing".into());
        }
        let ((Speaker::User, Some(Speaker::Assistant)), Some(answer)) = (speakers, answer) else {
            let name = |speaker| match speaker {
                Speaker::System => "the system",
                Speaker::User => "the user",
                Speaker::Assistant => "the assistant",
            };
            return Err(format!(
                "turn {} is by {} then {}, expected the user then the assistant",
                pairs.len(),
                name(speakers.0),
                speakers.1.map_or("nobody", name)
            ));
        };
        pairs.push((question.pieces, plain(answer, &format!("answer {}", pairs.len()))?));
    }
    if pairs.is_empty() {
        return Err("has no question and answer".into());
    }
    Ok((system, pairs))
}

/// The text of a message that must not have pictures. `what` is the name of the message in errors.
fn plain(message: RawMessage, what: &str) -> std::result::Result<String, String> {
    let mut out = String::new();
    for piece in message.pieces {
        match piece {
            RawPiece::Text(text) => out.push_str(&text),
            RawPiece::Image(_) => return Err(format!("{what} holds a picture, expected text alone")),
        }
    }
    Ok(out)
}

/// Appends `text` to `parts`, split at the image markers. White space next to a marker is removed.
fn push_text(parts: &mut Vec<MessagePart>, text: &str, shown: &mut Vec<Option<usize>>) {
    let pieces: Vec<&str> = text.split(MARKER).collect();
    let last = pieces.len() - 1;
    for (place, piece) in pieces.into_iter().enumerate() {
        if place > 0 {
            parts.push(MessagePart::Image(shown.len()));
            shown.push(None);
        }
        let piece = if place > 0 { piece.trim_start() } else { piece };
        let piece = if place < last { piece.trim_end() } else { piece };
        if !piece.is_empty() {
            parts.push(MessagePart::Text(piece.to_string()));
        }
    }
}

/// The pictures in the order in which they are shown. Each must be shown at least once.
fn in_order(images: Vec<ImageBytes>, shown: &[Option<usize>]) -> std::result::Result<Vec<ImageBytes>, String> {
    let numbered = shown.iter().flatten().count();
    if numbered == 0 {
        if shown.len() != images.len() {
            return Err(format!("shows {} pictures, but has {}", shown.len(), images.len()));
        }
        return Ok(images);
    }
    if numbered != shown.len() {
        return Err("shows some pictures by their number and some without".into());
    }
    let mut used = vec![false; images.len()];
    let mut ordered = Vec::with_capacity(shown.len());
    for &index in shown.iter().flatten() {
        let image = images.get(index).ok_or_else(|| format!("shows picture {index}, but has {}", images.len()))?;
        used[index] = true;
        ordered.push(image.clone());
    }
    match used.iter().position(|used| !used) {
        Some(index) => Err(format!("has picture {index}, but never shows it")),
        None => Ok(ordered),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use MessagePart::{Image, Text};

    fn images(count: usize) -> Vec<ImageBytes> {
        (0..count).map(|number| ImageBytes::held(format!("image {number}"), vec![number as u8])).collect()
    }

    fn dialogue(texts: &[&str]) -> Vec<RawMessage> {
        let speakers = [Speaker::User, Speaker::Assistant].into_iter().cycle();
        texts.iter().zip(speakers).map(|(text, speaker)| RawMessage::text(speaker, text.to_string())).collect()
    }

    fn row(count: usize, messages: Vec<RawMessage>) -> std::result::Result<SourceRow, String> {
        SourceRow::of_messages("row 0".into(), images(count), messages)
    }

    #[test]
    fn pictures_replace_their_placeholders_or_come_first() {
        let cases: [(&str, usize, Vec<MessagePart>); 4] = [
            ("What is it?", 2, vec![Image(0), Image(1), Text("What is it?".into())]),
            ("<image>\nWhat is it?", 1, vec![Image(0), Text("What is it?".into())]),
            ("Is <image> like <image>", 2, vec![Text("Is".into()), Image(0), Text("like".into()), Image(1)]),
            (" plain ", 0, vec![Text(" plain ".into())]),
        ];
        for (text, count, want) in cases {
            assert_eq!(row(count, dialogue(&[text, "a"])).unwrap().turns[0].user, want);
        }
        let error = row(2, dialogue(&["<image>", "a"])).unwrap_err();
        assert!(error.contains("shows 1 pictures, but has 2"), "{error}");
    }

    #[test]
    fn picture_placeholders_are_counted_over_the_whole_conversation() {
        let row = row(2, dialogue(&["<image> one?", "1", "none?", "0", "<image> two?", "2"])).unwrap();
        let parts = |turn: usize| row.turn(7, turn).unwrap().turns[0].user.clone();
        assert_eq!(parts(0), [Image(0), Text("one?".into())]);
        assert_eq!(parts(1), [Image(0), Text("none?".into())]);
        assert_eq!(parts(2), [Image(0), Image(1), Text("two?".into())]);
        assert_eq!([0, 1, 2].map(|turn| row.turn(7, turn).unwrap().images.len()), [1, 1, 2]);
        assert_eq!(row.sample(7).turns[2].user, [Image(1), Text("two?".into())]);
        assert!(row.turn(7, 3).is_none());
    }

    #[test]
    fn a_picture_of_the_second_turn_is_not_part_of_the_first() {
        let row = row(1, dialogue(&["Hi", "ho", "<image>\nWhat?", "cat"])).unwrap();
        assert!(row.turn(0, 0).unwrap().images.is_empty());
        assert_eq!(row.turn(1, 1).unwrap().images.len(), 1);
    }

    #[test]
    fn numbered_pictures_are_reordered_by_their_position() {
        let message = |pieces| RawMessage { speaker: Speaker::User, pieces };
        let answer = || RawMessage::text(Speaker::Assistant, "a".into());
        let pieces = vec![RawPiece::Image(Some(1)), RawPiece::Text("and".into()), RawPiece::Image(Some(0))];
        let found = row(2, vec![message(pieces), answer()]).unwrap();
        assert_eq!(found.turns[0].user, [Image(0), Text("and".into()), Image(1)]);
        assert_eq!(found.images[0].read().unwrap()[0], 1);
        let lost = row(2, vec![message(vec![RawPiece::Image(Some(1))]), answer()]).unwrap_err();
        assert!(lost.contains("has picture 0, but never shows it"), "{lost}");
        let none = row(1, vec![message(vec![RawPiece::Image(Some(1))]), answer()]).unwrap_err();
        assert!(none.contains("shows picture 1, but has 1"), "{none}");
    }

    #[test]
    fn only_a_leading_system_message_and_alternating_turns_are_accepted() {
        let system = RawMessage::text(Speaker::System, "Be short.".into());
        let messages = std::iter::once(system.clone()).chain(dialogue(&["q", "a"])).collect();
        assert_eq!(row(0, messages).unwrap().system.as_deref(), Some("Be short."));
        for (messages, want) in [
            (vec![], "has no question and answer"),
            (dialogue(&["q"]), "the conversation ends with the user; an assistant's answer is missing"),
            (dialogue(&["q", "a", "q"]), "the conversation ends with the user; an assistant's answer is missing"),
            (vec![system], "has no question and answer"),
        ] {
            let error = row(0, messages).unwrap_err();
            assert!(error.starts_with(want), "{error}");
        }
        let late = dialogue(&["q", "a"]).into_iter().chain([RawMessage::text(Speaker::System, "x".into())]).collect();
        let error = row(0, late).unwrap_err();
        assert!(error.contains("turn 1 is by the system then nobody"), "{error}");
    }
}
