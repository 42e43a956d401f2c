//! One row of a JSON file: its messages, the names of its pictures, and the keys without a reader.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::base::{clipped, shortened};

use super::keys::is_silent;
use super::options::DataOptions;
use super::row::{RawMessage, RawPiece, Speaker};

/// A parsed row. Its pictures are not read.
#[derive(Debug, Default)]
pub(super) struct JsonRow {
    pub id: Option<String>,
    /// Names of the picture files, in order.
    pub images: Vec<String>,
    pub messages: Vec<RawMessage>,
    /// Numbers under keys without a reader; the minimum for a list of numbers.
    numbers: BTreeMap<String, f64>,
}

/// Reason that a row cannot be used.
#[derive(Debug)]
pub(super) enum JsonProblem {
    Bad(String),
    /// Keys that have content but no reader.
    Unread(Vec<String>),
}

impl JsonRow {
    /// Parses a row.
    ///
    /// Errors: `JsonProblem::Unread` for keys of the row, its messages and their parts that have content, but no
    /// reader, and are not silent; `JsonProblem::Bad` for any other problem.
    pub fn parse(bytes: &[u8], options: &DataOptions) -> Result<Self, JsonProblem> {
        let raw: Fields =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("does not decode: {}", clipped(&e.to_string()))))?;
        let mut entry = JsonRow::default();
        let mut unread = Vec::new();
        let (mut images, mut image) = (Vec::new(), Vec::new());
        let mut dialogues = Vec::new();
        for (key, value) in raw.0 {
            match (key.as_str(), value) {
                ("images", Field::Names(names)) => images = names,
                ("image", Field::Names(names)) => image = names,
                ("conversations" | "messages", Field::Messages(messages)) => dialogues.push(messages),
                ("id", Field::Other(Seen::Text(id))) => entry.id = Some(id),
                ("id", Field::Other(Seen::Number(id))) => entry.id = Some(id.to_string()),
                (_, Field::Other(Seen::Blank)) => {}
                (_, Field::Other(seen)) => {
                    if let Seen::Number(number) = seen {
                        entry.numbers.insert(key.clone(), number);
                    }
                    if !is_silent(&key, options) {
                        unread.push(key);
                    }
                }
                (_, Field::Names(_) | Field::Messages(_)) => {}
            }
        }
        if !images.is_empty() && !image.is_empty() {
            return Err(bad("has both `image` and `images`"));
        }
        images.append(&mut image);
        let mut dialogues = dialogues.into_iter().filter(|messages| !messages.is_empty());
        let messages = dialogues.next();
        if dialogues.next().is_some() {
            return Err(bad("has both `conversations` and `messages`"));
        }
        for message in messages.unwrap_or_default() {
            entry.messages.push(raw_message(message, &mut images, options, &mut unread)?);
        }
        entry.images = images;
        if !unread.is_empty() {
            unread.sort();
            unread.dedup();
            return Err(JsonProblem::Unread(unread));
        }
        if entry.messages.is_empty() {
            return Err(bad("has no `conversations` or `messages`"));
        }
        Ok(entry)
    }

    /// Number of question and answer pairs, at least 1.
    pub fn turns(&self) -> usize {
        self.messages.iter().filter(|message| message.speaker == Speaker::Assistant).count().max(1)
    }

    /// True when the row reaches every minimum in `least`. A missing rating does not.
    pub fn rated(&self, least: &BTreeMap<String, f64>) -> bool {
        least.iter().all(|(key, least)| self.numbers.get(key).is_some_and(|number| number >= least))
    }
}

/// One line of running text.
pub(super) struct TextLine;

/// Reason that a line of running text cannot be used.
pub(super) type TextProblem = JsonProblem;

impl TextLine {
    /// True for an object with a `text` and without messages.
    pub fn is_one(line: &[u8]) -> bool {
        let Ok(Fields(fields)) = serde_json::from_slice(line) else { return false };
        let talks = |field: &Field| matches!(field, Field::Messages(messages) if !messages.is_empty());
        fields.iter().any(|(key, _)| key == "text") && !fields.iter().any(|(_, field)| talks(field))
    }

    /// The text of a line.
    ///
    /// Errors: as `JsonRow::parse`.
    pub fn parse(line: &[u8], options: &DataOptions) -> Result<String, TextProblem> {
        let Fields(fields) =
            serde_json::from_slice(line).map_err(|e| bad(format!("does not decode: {}", clipped(&e.to_string()))))?;
        let (mut text, mut unread) = (None, Vec::new());
        for (key, field) in fields {
            match (key.as_str(), field) {
                ("text", Field::Other(Seen::Text(value))) => text = Some(value),
                ("text", Field::Other(Seen::Blank)) => text = Some(String::new()),
                (_, Field::Other(Seen::Blank)) => {}
                (_, Field::Names(names)) if names.is_empty() => {}
                (_, Field::Messages(messages)) if messages.is_empty() => {}
                _ if key == "text" => return Err(bad("has a `text` that is not a string")),
                _ if is_silent(&key, options) => {}
                _ => unread.push(key),
            }
        }
        match (text, unread.is_empty()) {
            (Some(_), false) => Err(JsonProblem::Unread(unread)),
            (Some(text), true) => Ok(text),
            (None, _) => Err(bad("has no `text`")),
        }
    }
}

fn bad(problem: impl Into<String>) -> JsonProblem {
    JsonProblem::Bad(problem.into())
}

/// Converts a message. Appends the names of pictures in its parts to `images`, and keys that have content but no reader
/// to `unread`.
fn raw_message(
    message: JsonMessage,
    images: &mut Vec<String>,
    options: &DataOptions,
    unread: &mut Vec<String>,
) -> Result<RawMessage, JsonProblem> {
    let mut keep = |rest: BTreeMap<String, Seen>| {
        let held = rest.into_iter().filter(|(key, seen)| !matches!(seen, Seen::Blank) && !is_silent(key, options));
        unread.extend(held.map(|(key, _)| key));
    };
    keep(message.rest);
    let speaker = Speaker::named(&message.role).ok_or_else(|| {
        bad(format!("has a message of `{}`, expected system, user or assistant", shortened(&message.role)))
    })?;
    let pieces = match message.content {
        JsonContent::Text(text) => vec![RawPiece::Text(text)],
        JsonContent::Parts(parts) => {
            let mut pieces = Vec::with_capacity(parts.len());
            for part in parts {
                keep(part.rest);
                pieces.push(match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => RawPiece::Text(text),
                    ("image", None | Some(_)) => {
                        let index = match part.index {
                            Some(index) => Some(index),
                            None => part.image.map(|name| {
                                images.push(name);
                                images.len() - 1
                            }),
                        };
                        RawPiece::Image(index)
                    }
                    (kind, _) => {
                        return Err(bad(format!("has a part of type `{}`, expected text or image", shortened(kind))));
                    }
                });
            }
            pieces
        }
    };
    Ok(RawMessage { speaker, pieces })
}

#[derive(Deserialize)]
struct JsonMessage {
    #[serde(alias = "from")]
    role: String,
    #[serde(alias = "value")]
    content: JsonContent,
    #[serde(flatten)]
    rest: BTreeMap<String, Seen>,
}

enum JsonContent {
    Text(String),
    Parts(Vec<JsonPart>),
}

impl<'de> Deserialize<'de> for JsonContent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl<'de> Visitor<'de> for Value {
            type Value = JsonContent;

            fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
                out.write_str("a text or a list of parts")
            }

            fn visit_str<E>(self, text: &str) -> Result<JsonContent, E> {
                Ok(JsonContent::Text(text.to_string()))
            }

            fn visit_seq<S: SeqAccess<'de>>(self, list: S) -> Result<JsonContent, S::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(list)).map(JsonContent::Parts)
            }
        }
        deserializer.deserialize_any(Value)
    }
}

#[derive(Deserialize)]
struct JsonPart {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
    /// Name of a picture file.
    #[serde(default, alias = "path")]
    image: Option<String>,
    /// Position in the row's own list of pictures.
    #[serde(default)]
    index: Option<usize>,
    #[serde(flatten)]
    rest: BTreeMap<String, Seen>,
}

/// Names of pictures: null, one name, or a list.
struct Names(Vec<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl<'de> Visitor<'de> for Value {
            type Value = Names;

            fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
                out.write_str("the name of a picture or a list of names")
            }

            fn visit_unit<E>(self) -> Result<Names, E> {
                Ok(Names(Vec::new()))
            }

            fn visit_str<E>(self, name: &str) -> Result<Names, E> {
                Ok(Names(Some(name.to_string()).filter(|name| !name.is_empty()).into_iter().collect()))
            }

            fn visit_seq<S: SeqAccess<'de>>(self, list: S) -> Result<Names, S::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(list)).map(Names)
            }
        }
        deserializer.deserialize_any(Value)
    }
}

/// Summary of a value that has no reader.
#[derive(Debug, PartialEq)]
enum Seen {
    /// `null`, or an empty text, list or object.
    Blank,
    /// A number, or the minimum of a list of numbers.
    Number(f64),
    Text(String),
    Other,
}

enum Field {
    Names(Vec<String>),
    Messages(Vec<JsonMessage>),
    Other(Seen),
}

struct Fields(Vec<(String, Field)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Rows;
        impl<'de> Visitor<'de> for Rows {
            type Value = Fields;

            fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Fields, M::Error> {
                let mut fields = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let field = match key.as_str() {
                        "image" | "images" => {
                            let names = map.next_value::<Names>();
                            Field::Names(names.map_err(|e| M::Error::custom(format!("`{key}`: {e}")))?.0)
                        }
                        "conversations" | "messages" => {
                            let messages = map.next_value::<Option<Vec<JsonMessage>>>();
                            let messages = messages.map_err(|e| M::Error::custom(format!("`{key}`: {e}")))?;
                            Field::Messages(messages.unwrap_or_default())
                        }
                        _ => Field::Other(map.next_value()?),
                    };
                    fields.push((key, field));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Rows)
    }
}

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl<'de> Visitor<'de> for Value {
            type Value = Seen;

            fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
                out.write_str("any value")
            }

            fn visit_unit<E>(self) -> Result<Seen, E> {
                Ok(Seen::Blank)
            }

            fn visit_none<E>(self) -> Result<Seen, E> {
                Ok(Seen::Blank)
            }

            fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Seen, D::Error> {
                inner.deserialize_any(Value)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Seen, E> {
                Ok(Seen::Other)
            }

            fn visit_i64<E>(self, number: i64) -> Result<Seen, E> {
                Ok(Seen::Number(number as f64))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Seen, E> {
                Ok(Seen::Number(number as f64))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Seen, E> {
                Ok(Seen::Number(number))
            }

            fn visit_str<E>(self, text: &str) -> Result<Seen, E> {
                Ok(if text.is_empty() { Seen::Blank } else { Seen::Text(text.to_string()) })
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<Seen, S::Error> {
                let mut seen = Seen::Blank;
                while let Some(item) = items.next_element::<Seen>()? {
                    seen = match (seen, item) {
                        (Seen::Blank, Seen::Number(number)) => Seen::Number(number),
                        (Seen::Number(least), Seen::Number(number)) => Seen::Number(least.min(number)),
                        _ => Seen::Other,
                    };
                }
                Ok(seen)
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Seen, M::Error> {
                let mut seen = Seen::Blank;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    seen = Seen::Other;
                }
                Ok(seen)
            }
        }
        deserializer.deserialize_any(Value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<JsonRow, JsonProblem> {
        JsonRow::parse(text.as_bytes(), &DataOptions::default())
    }

    const TALK: &str = r#""conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]"#;

    #[test]
    fn the_image_key_holds_a_name_a_list_or_nothing() {
        let images = |text: &str| parse(&format!("{{{text}{TALK}}}")).unwrap().images;
        assert_eq!(images(r#""image": "a.png", "#), ["a.png"]);
        assert_eq!(images(r#""image": ["a.png", "b.png"], "#), ["a.png", "b.png"]);
        assert_eq!(images(r#""images": ["a.png"], "image": null, "#), ["a.png"]);
        assert!(images(r#""image": "", "#).is_empty() && images("").is_empty());
    }

    #[test]
    fn unread_keys_with_a_value_are_named() {
        let unread = |text: &str| match parse(&format!("{{{text}{TALK}}}")) {
            Err(JsonProblem::Unread(keys)) => keys,
            other => panic!("{other:?}"),
        };
        assert_eq!(unread(r#""video": "a.mp4", "audio": [1], "#), ["audio", "video"]);
        assert_eq!(unread(r#""videos": ["a.mp4"], "#), ["videos"]);
        let silent = r#""id": 7, "source": "x", "model": "", "video": null, "videos": [], "relevance_min": 3, "#;
        assert_eq!(parse(&format!("{{{silent}{TALK}}}")).unwrap().id.as_deref(), Some("7"));
        let tools = r#"{"messages": [{"role": "user", "content": "q", "tool_calls": [1]}, {"role": "assistant", "content": "a"}]}"#;
        assert!(matches!(parse(tools), Err(JsonProblem::Unread(keys)) if keys == ["tool_calls"]));
        let ignoring = DataOptions { ignore_keys: vec!["video".into()], ..DataOptions::default() };
        assert!(JsonRow::parse(format!("{{\"video\": \"a\", {TALK}}}").as_bytes(), &ignoring).is_ok());
    }

    #[test]
    fn message_content_is_a_string_or_a_list_of_parts() {
        let text = r#"{"images": ["x.png"], "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q", "index": null}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}"#;
        let entry = parse(text).unwrap();
        assert_eq!(entry.messages[1].pieces, [RawPiece::Image(None), RawPiece::Text("q".into())]);
        assert_eq!((entry.turns(), entry.messages[0].speaker), (1, Speaker::System));
        let named =
            text.replace("\"images\": [\"x.png\"], ", "").replace(r#""image"}"#, r#""image", "image": "y.png"}"#);
        let entry = parse(&named).unwrap();
        assert_eq!(
            (entry.images, &entry.messages[1].pieces[0]),
            (vec!["y.png".to_string()], &RawPiece::Image(Some(0)))
        );
    }

    #[test]
    fn malformed_rows_are_errors() {
        for (text, want) in [
            ("{", "does not decode"),
            ("[]", "does not decode"),
            ("{}", "has no `conversations`"),
            (r#"{"conversations": [{"from": "human"}]}"#, "does not decode"),
            (r#"{"conversations": [{"from": "tool", "value": "x"}]}"#, "a message of `tool`"),
            (r#"{"image": 3, "conversations": []}"#, "does not decode"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "video"}]}]}"#, "of type `video`"),
        ] {
            match parse(text) {
                Err(JsonProblem::Bad(problem)) => assert!(problem.contains(want), "{text}: {problem}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn rows_are_filtered_by_minimum_rating() {
        let entry = parse(&format!(r#"{{"a_min": 3, "b_ratings": [4, 2], "c_min": null, {TALK}}}"#)).unwrap();
        let least = |key: &str, value: f64| BTreeMap::from([(key.to_string(), value)]);
        assert!(entry.rated(&least("a_min", 3.0)) && !entry.rated(&least("a_min", 3.5)));
        assert!(entry.rated(&least("b_ratings", 2.0)) && !entry.rated(&least("b_ratings", 3.0)));
        assert!(!entry.rated(&least("c_min", 0.0)) && !entry.rated(&least("d_min", 0.0)));
    }
}
