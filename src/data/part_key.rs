//! What decides whether a row is held back.

use crate::base::{Progress, Result};

use super::listing::{Listed, content_key};
use super::row::SourceRow;
use super::sample::{ImageBytes, MessagePart};

/// The keys by which the listed rows of one file are told apart: rows about the same pictures have one key, whatever is asked
/// about them, and so have rows of the same text, whatever their ids. `rows` are the rows themselves, in the order of the list.
/// A row that cannot be read keeps the key of its entry.
pub(super) fn part_keys(listed: &[Listed], rows: impl Iterator<Item = Result<SourceRow>>) -> Vec<u64> {
    let progress = Progress::new("split", "rows", listed.len() as u64);
    let mut rows = rows.fuse();
    let key = |entry: &Listed| {
        progress.advance(1);
        let row = rows.next().and_then(Result::ok);
        row.and_then(|row| part_key(&row).ok()).unwrap_or(entry.key)
    };
    listed.iter().map(key).collect()
}

/// The least key of the row's pictures, so that rows that share some of several pictures are likely to have one key; without
/// pictures a key of its texts.
///
/// Errors: those of reading a picture.
fn part_key(row: &SourceRow) -> Result<u64> {
    let pictures = row.images.iter().map(picture_key).collect::<Result<Vec<u64>>>()?;
    Ok(pictures.into_iter().min().unwrap_or_else(|| text_key(row)))
}

/// A digest of a picture's bytes; of a video those of its frames.
///
/// Errors: as `ImageBytes::read`.
fn picture_key(image: &ImageBytes) -> Result<u64> {
    match image.as_frames() {
        Some(frames) => {
            let frames = frames.iter().map(|(_, frame)| frame.read()).collect::<Result<Vec<_>>>()?;
            Ok(content_key(&frames))
        }
        None => Ok(content_key(&[image.read()?])),
    }
}

fn text_key(row: &SourceRow) -> u64 {
    let mut texts: Vec<&str> = row.system.iter().map(String::as_str).collect();
    for turn in &row.turns {
        texts.extend(turn.user.iter().filter_map(|part| match part {
            MessagePart::Text(text) => Some(text.as_str()),
            MessagePart::Image(_) => None,
        }));
        texts.push(&turn.assistant);
    }
    content_key(&texts)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use super::super::tests::png;
    use super::super::{DataOptions, DataPart, Dataset, Sample};

    /// The samples of a part, read whole.
    fn part(path: &Path, part: DataPart) -> Vec<Sample> {
        let data = Dataset::open(path, &DataOptions { part, ..DataOptions::default() }).unwrap();
        data.read(&(0..data.len()).collect::<Vec<_>>()).unwrap().map(Result::unwrap).collect()
    }

    fn row(id: usize, image: Option<usize>, question: &str) -> String {
        let image = image.map_or(String::new(), |image| format!("\"image\": \"{image}.png\", "));
        format!(
            "{{\"id\": {id}, {image}\"conversations\": [{{\"from\": \"human\", \"value\": \"{question}\"}}, \
             {{\"from\": \"gpt\", \"value\": \"yes\"}}]}}"
        )
    }

    /// By what `name` says of a sample: how many of its samples are on each side.
    fn sides(path: &Path, name: impl Fn(&Sample) -> Vec<u8>) -> BTreeMap<Vec<u8>, [usize; 2]> {
        let mut counts: BTreeMap<Vec<u8>, [usize; 2]> = BTreeMap::new();
        for (side, data) in [DataPart::Train(0.3), DataPart::HeldBack(0.3)].into_iter().enumerate() {
            for sample in part(path, data) {
                counts.entry(name(&sample)).or_default()[side] += 1;
            }
        }
        counts
    }

    /// Three questions about each of 60 pictures, in rows of their own and under ids of their own.
    #[test]
    fn rows_about_the_same_picture_are_on_the_same_side() {
        let folder = tempfile::tempdir().unwrap();
        let mut rows = Vec::new();
        for image in 0..60 {
            fs::write(folder.path().join(format!("{image}.png")), png(4 * image as u8)).unwrap();
            for question in 0..3 {
                rows.push(row(3 * image + question, Some(image), &format!("Question {question}?")));
            }
        }
        let path = folder.path().join("data.jsonl");
        fs::write(&path, rows.join("\n")).unwrap();
        let counts = sides(&path, |sample| sample.images[0].read().unwrap().to_vec());
        assert_eq!(counts.len(), 60);
        assert!(counts.values().all(|sides| matches!(sides, [3, 0] | [0, 3])), "{counts:?}");
        // Of 60 pictures 18 are expected to be held back, with a standard deviation of 3.5.
        let held_back = counts.values().filter(|sides| sides[1] > 0).count();
        assert!((6..=30).contains(&held_back), "{held_back}");
    }

    #[test]
    fn rows_of_the_same_text_are_on_the_same_side_under_any_id() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        let rows = (0..120).map(|id| row(id, None, &format!("Is {} even?", id % 40)));
        fs::write(&path, rows.collect::<Vec<_>>().join("\n")).unwrap();
        let counts = sides(&path, |sample| format!("{:?}", sample.turns).into_bytes());
        assert_eq!(counts.len(), 40);
        assert!(counts.values().all(|sides| matches!(sides, [3, 0] | [0, 3])), "{counts:?}");
    }

    #[test]
    fn the_key_depends_on_the_pictures_and_not_on_their_order() {
        let row = |shades: &[u8]| {
            let images = shades.iter().map(|shade| super::ImageBytes::held("image", png(*shade))).collect();
            super::SourceRow { images, ..super::SourceRow::of_text(format!("row {shades:?}"), Vec::new()) }
        };
        let key = |shades: &[u8]| super::part_key(&row(shades)).unwrap();
        assert_eq!(key(&[1, 2]), key(&[2, 1]));
        assert_eq!(key(&[1, 2]), key(&[1]).min(key(&[2])));
        assert_ne!(key(&[1]), key(&[2]));
    }
}
