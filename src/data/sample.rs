//! What every reader yields: pictures (still encoded) and turns of a conversation, or running text.

use std::path::PathBuf;
use std::sync::Arc;

use crate::base::{Error, Result};

/// The largest encoded picture that is read.
const MAX_IMAGE_BYTES: u64 = 256 << 20;
/// What stands for a picture in the text of a data set.
const MARKER: &str = "<image>";

/// An encoded picture (PNG, JPEG, WebP, GIF, BMP or TIFF), decoded only when it is used.
#[derive(Clone, Debug)]
pub struct ImageBytes {
    /// How errors name it: ``image 0 of row 12 in `x.parquet` ``.
    pub subject: String,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Held(Arc<[u8]>),
    File(PathBuf),
}

impl ImageBytes {
    /// A picture whose bytes are at hand.
    pub fn held(subject: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        ImageBytes { subject: subject.into(), content: Content::Held(bytes.into()) }
    }

    /// A picture in a file, read when it is used.
    pub fn file(subject: impl Into<String>, path: PathBuf) -> Self {
        ImageBytes { subject: subject.into(), content: Content::File(path) }
    }

    /// The encoded bytes.
    ///
    /// Errors: `Error::Io` when the file cannot be read; `Error::Invalid` when it is larger than 256 MiB.
    pub fn read(&self) -> Result<Arc<[u8]>> {
        match &self.content {
            Content::Held(bytes) => Ok(bytes.clone()),
            Content::File(path) => {
                let size = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
                if size > MAX_IMAGE_BYTES {
                    return Err(Error::invalid(
                        &self.subject,
                        format!("is {size} bytes long, expected at most {MAX_IMAGE_BYTES}"),
                    ));
                }
                Ok(std::fs::read(path).map_err(|e| Error::io("read", path, e))?.into())
            }
        }
    }
}

/// A piece of what the user says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The picture at this position of `Sample::images`.
    Image(usize),
    Text(String),
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub user: Vec<Part>,
    pub assistant: String,
}

/// One conversation about some pictures, or a sequence of running text.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Position in the data set.
    pub index: usize,
    /// How errors name it: ``row 12 in `x.parquet` ``.
    pub id: String,
    pub images: Vec<ImageBytes>,
    /// At least one, unless it is running text.
    pub turns: Vec<Turn>,
    /// Token ids of running text, which has no pictures and no turns.
    pub text: Option<Vec<i64>>,
}

impl Sample {
    /// Running text, tokenised.
    pub(super) fn of_text(index: usize, id: String, tokens: Vec<i64>) -> Self {
        Sample { index, id, images: Vec::new(), turns: Vec::new(), text: Some(tokens) }
    }

    /// Places the pictures where the text says `<image>`; where it never does, before the first question.
    ///
    /// Errors: `Error::Invalid` when there are no turns, or the text names another number of pictures than there are.
    pub(super) fn new(index: usize, id: String, images: Vec<ImageBytes>, pairs: Vec<(String, String)>) -> Result<Self> {
        if pairs.is_empty() {
            return Err(Error::invalid(id, "has no question and answer"));
        }
        let markers: usize = pairs.iter().map(|(user, _)| user.matches(MARKER).count()).sum();
        if markers != 0 && markers != images.len() {
            return Err(Error::invalid(
                id,
                format!("says `{MARKER}` {markers} times, but has {} pictures", images.len()),
            ));
        }
        let mut next = 0;
        let mut turns = Vec::with_capacity(pairs.len());
        for (turn, (user, assistant)) in pairs.into_iter().enumerate() {
            let mut parts = Vec::new();
            if turn == 0 && markers == 0 {
                parts.extend((0..images.len()).map(Part::Image));
            }
            push_text(&mut parts, &user, &mut next);
            turns.push(Turn { user: parts, assistant });
        }
        Ok(Sample { index, id, images, turns, text: None })
    }
}

/// Splits at the markers; white space that touches a marker goes with it.
fn push_text(parts: &mut Vec<Part>, text: &str, next: &mut usize) {
    let pieces: Vec<&str> = text.split(MARKER).collect();
    let last = pieces.len() - 1;
    for (place, piece) in pieces.into_iter().enumerate() {
        if place > 0 {
            parts.push(Part::Image(*next));
            *next += 1;
        }
        let piece = if place > 0 { piece.trim_start() } else { piece };
        let piece = if place < last { piece.trim_end() } else { piece };
        if !piece.is_empty() {
            parts.push(Part::Text(piece.to_string()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(count: usize) -> Vec<ImageBytes> {
        (0..count).map(|i| ImageBytes::held(format!("image {i}"), vec![0u8])).collect()
    }

    #[test]
    fn pictures_go_where_the_text_says_or_first() {
        use Part::{Image, Text};
        let cases: [(&str, usize, Vec<Part>); 4] = [
            ("What is it?", 2, vec![Image(0), Image(1), Text("What is it?".into())]),
            ("<image>\nWhat is it?", 1, vec![Image(0), Text("What is it?".into())]),
            ("Is <image> like <image>", 2, vec![Text("Is".into()), Image(0), Text("like".into()), Image(1)]),
            (" plain ", 0, vec![Text(" plain ".into())]),
        ];
        for (text, count, want) in cases {
            let sample = Sample::new(0, "row 0".into(), image(count), vec![(text.into(), "a".into())]).unwrap();
            assert_eq!(sample.turns[0].user, want);
        }
        let error = Sample::new(0, "row 0".into(), image(2), vec![("<image>".into(), "a".into())]).unwrap_err();
        assert!(error.to_string().contains("1 times, but has 2 pictures"), "{error}");
    }
}
