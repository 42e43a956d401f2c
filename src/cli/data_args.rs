//! Flags for reading data sets, equal in every verb.

use crate::data::{BackEnd, DataOptions, DataPart, ImageSettings, LeftOut, SEQUENCE_LENGTH, Turns};

use super::args::{count, edge, fraction, parts, pixels, positive};
use super::output::Output;

/// Flags for reading a data set.
#[derive(clap::Args)]
pub struct DataArgs {
    /// Make one sample of a conversation with all its answers (conversation), or one sample of each turn without the turns
    /// before it (separate)
    #[arg(long, value_name = "HOW", default_value = "conversation")]
    turns: Turns,
    /// Use only rows with at least this value in this column of ratings, as in relevance_min=4; may be repeated
    #[arg(long, value_name = "COLUMN=VALUE", value_parser = rating)]
    min_rating: Vec<(String, f64)>,
    /// Ignore these columns or keys, besides ids, sources and others without a part of the conversation
    #[arg(long, value_name = "KEYS", value_delimiter = ',')]
    ignore_keys: Vec<String>,
    /// Stop at the first row that cannot be read [default: leave such rows out]
    #[arg(long)]
    strict: bool,
    /// Leave out this fraction of the rows, which `eval --held-back` with the same fraction reads: choose settings on them
    /// [default: leave out none]
    #[arg(long, value_name = "F", value_parser = fraction)]
    held_back: Option<f64>,
    /// Split running text into sequences of this number of tokens
    #[arg(long, value_name = "N", default_value_t = SEQUENCE_LENGTH, value_parser = count)]
    sequence_length: usize,
    #[command(flatten)]
    images: ImageArgs,
}

/// Image settings that override the model's own files.
#[derive(clap::Args)]
pub struct ImageArgs {
    /// Scale pictures up to at least this number of pixels [default: the model's own setting]
    #[arg(long, value_name = "N", value_parser = pixels)]
    min_pixels: Option<usize>,
    /// Scale pictures down to at most this number of pixels [default: the model's own setting]
    #[arg(long, value_name = "N", value_parser = positive)]
    max_pixels: Option<usize>,
    /// Scale pictures to this edge in pixels: both edges of a square, or the longer one [default: the model's own setting]
    #[arg(long, value_name = "N", value_parser = edge)]
    image_size: Option<usize>,
    /// Cut large pictures into tiles: true or false [default: the model's own setting]
    #[arg(long, value_name = "BOOL")]
    image_tiles: Option<bool>,
    /// Cut a picture into at most this number of tiles [default: the model's own setting]
    #[arg(long, value_name = "N", value_parser = parts)]
    max_image_tiles: Option<usize>,
    /// Resize pictures with the arithmetic of this library: pil or torchvision [default: the one that transformers uses]
    #[arg(long, value_name = "NAME")]
    image_back_end: Option<BackEnd>,
}

impl ImageArgs {
    /// The settings that the flags select.
    pub fn settings(&self) -> ImageSettings {
        ImageSettings {
            min_pixels: self.min_pixels,
            max_pixels: self.max_pixels,
            image_size: self.image_size,
            tiles: self.image_tiles,
            max_tiles: self.max_image_tiles,
            back_end: self.image_back_end,
        }
    }
}

impl DataArgs {
    /// The options that the flags select.
    pub fn options(&self) -> DataOptions {
        DataOptions {
            turns: self.turns,
            min_ratings: self.min_rating.iter().cloned().collect(),
            ignore_keys: self.ignore_keys.clone(),
            strict: self.strict,
            part: self.held_back.map_or(DataPart::All, DataPart::Train),
            sequence_length: self.sequence_length,
            images: self.images.settings(),
        }
    }
}

/// Prints a warning about samples that were left out.
pub fn warn_left_out(left_out: &LeftOut, output: &Output) {
    if let Some(summary) = left_out.summary() {
        output.warn(format!("samples left out: {summary}"));
    }
}

/// `COLUMN=VALUE`.
fn rating(text: &str) -> Result<(String, f64), String> {
    let (column, value) =
        text.split_once('=').ok_or_else(|| format!("`{text}` is not COLUMN=VALUE, as in relevance_min=4"))?;
    let value: f64 = value.parse().map_err(|_| format!("`{value}` is not a number"))?;
    if column.is_empty() || !value.is_finite() {
        return Err(format!("`{text}` is not COLUMN=VALUE, as in relevance_min=4"));
    }
    Ok((column.to_string(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratings_are_parsed_strictly() {
        assert_eq!(rating("relevance_min=4"), Ok(("relevance_min".into(), 4.0)));
        for (bad, want) in [
            ("relevance_min", "is not COLUMN=VALUE"),
            ("=4", "is not COLUMN=VALUE"),
            ("a=", "`` is not a number"),
            ("a=x", "`x` is not a number"),
            ("a=nan", "is not COLUMN=VALUE"),
            ("a=inf", "is not COLUMN=VALUE"),
        ] {
            let error = rating(bad).expect_err(bad);
            assert!(error.contains(want), "{bad}: {error}");
        }
    }
}
