//! The sample type of all readers: encoded pictures and the turns of a conversation, running text, or ready tensors.

use std::path::PathBuf;
use std::sync::Arc;

use crate::base::{Error, Result};

use super::tensors::TensorRow;

/// Maximum size of an encoded picture in bytes.
pub(super) const MAX_IMAGE_BYTES: u64 = 256 << 20;
/// Placeholder of a picture in the text of a data set.
pub(super) const MARKER: &str = "<image>";

/// An encoded picture (PNG, JPEG, WebP, GIF, BMP or TIFF), or a video as a list of encoded frames. Pictures are decoded
/// on use.
#[derive(Clone, Debug)]
pub struct ImageBytes {
    /// Name in errors: ``image 0 of row 12 in `x.parquet` ``.
    pub subject: String,
    content: ImageContent,
}

#[derive(Clone, Debug)]
enum ImageContent {
    Held(Arc<[u8]>),
    File(PathBuf),
    /// Time in seconds from the start of the video, and picture at that time.
    Frames(Arc<[(f64, ImageBytes)]>),
}

impl ImageBytes {
    /// A picture from bytes in memory.
    pub fn held(subject: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        ImageBytes { subject: subject.into(), content: ImageContent::Held(bytes.into()) }
    }

    /// A picture in a file. The file is read on use.
    pub fn file(subject: impl Into<String>, path: PathBuf) -> Self {
        ImageBytes { subject: subject.into(), content: ImageContent::File(path) }
    }

    /// A video from its frames, each with its time in seconds.
    ///
    /// Errors: `Error::Invalid` without frames, for times that decrease, are negative or are not finite, or when a
    /// frame is a video.
    pub fn frames(subject: impl Into<String>, frames: Vec<(f64, ImageBytes)>) -> Result<Self> {
        let subject = subject.into();
        let times = || frames.iter().map(|(time, _)| *time);
        if frames.is_empty() || frames.iter().any(|(_, frame)| frame.as_frames().is_some()) {
            return Err(Error::invalid(subject, "expected at least one frame, each a picture")
                .remedy("give each frame as a picture with its time"));
        }
        let ordered = times().zip(times().skip(1)).all(|(before, after)| before <= after);
        if !ordered || times().any(|time| !time.is_finite() || time < 0.0) {
            return Err(Error::invalid(
                subject,
                "expected the times of its frames as seconds from 0 that do not go back",
            )
            .remedy("sort the frames by time"));
        }
        Ok(ImageBytes { subject, content: ImageContent::Frames(frames.into()) })
    }

    /// The frames of a video, each with its time in seconds; `None` for a picture.
    pub fn as_frames(&self) -> Option<&[(f64, ImageBytes)]> {
        match &self.content {
            ImageContent::Frames(frames) => Some(frames),
            ImageContent::Held(_) | ImageContent::File(_) => None,
        }
    }

    /// The encoded bytes of a picture.
    ///
    /// Errors: `Error::Io` when the file cannot be read; `Error::Invalid` for a file of more than 256 MiB, or for a
    /// video.
    pub fn read(&self) -> Result<Arc<[u8]>> {
        match &self.content {
            ImageContent::Held(bytes) => Ok(bytes.clone()),
            ImageContent::File(path) => {
                let size = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
                if size > MAX_IMAGE_BYTES {
                    return Err(Error::invalid(
                        &self.subject,
                        format!("is {size} bytes long, expected at most {MAX_IMAGE_BYTES}"),
                    )
                    .remedy("resize the picture"));
                }
                Ok(std::fs::read(path).map_err(|e| Error::io("read", path, e))?.into())
            }
            ImageContent::Frames(_) => {
                Err(Error::invalid(&self.subject, "is a video, expected a picture")
                    .remedy("give its frames as pictures"))
            }
        }
    }
}

/// A piece of a user message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MessagePart {
    /// The picture or video at this position of `Sample::images`.
    Image(usize),
    /// Text, which may be empty.
    Text(String),
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Pictures and texts of the question, in order.
    pub user: Vec<MessagePart>,
    /// The answer, which is the training target.
    pub assistant: String,
}

/// One conversation about some pictures, a sequence of running text, or a row of ready tensors.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Position in the data set.
    pub index: usize,
    /// Name in errors: ``row 12 in `x.parquet` ``.
    pub id: String,
    /// Encoded pictures and videos, in the order of their first use.
    pub images: Vec<ImageBytes>,
    /// System message before the first turn.
    pub system: Option<String>,
    /// At least one turn in a conversation; otherwise empty.
    pub turns: Vec<Turn>,
    /// Token ids of running text. `images` and `turns` are empty then.
    pub text: Option<Vec<i64>>,
    /// Ready tensors. `images` and `turns` are empty then.
    pub tensors: Option<Arc<TensorRow>>,
}
