//! The JSON layouts of LLaVA and TRL: a list of objects or one object per line, with `image` or `images`, and
//! `conversations` or `messages`.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::base::{Error, Progress, Result, contained_path, folder_of, shortened};

use super::json_row::{JsonProblem, JsonRow};
use super::json_scan::scan;
use super::listing::{Listed, content_key};
use super::options::DataOptions;
use super::row::SourceRow;
use super::sample::ImageBytes;

/// A `.json` or `.jsonl` file. `image` paths are relative to its folder. Only the byte ranges of the rows are kept in
/// memory.
#[derive(Debug)]
pub(super) struct JsonFile {
    path: PathBuf,
    /// Name of the file in ids.
    name: String,
    options: DataOptions,
    rows: Vec<Range<u64>>,
    listed: Vec<Listed>,
}

impl JsonFile {
    /// Reads the file once, row by row, and lists its rows. Pictures are not read. A row that does not decode is
    /// listed; `read` returns its error.
    ///
    /// Errors: as `scan`; `Error::Unsupported` names the keys that have content but no reader.
    pub fn open(path: &Path, name: &str, options: &DataOptions) -> Result<Self> {
        let file = JsonFile {
            path: path.to_path_buf(),
            name: name.to_string(),
            options: options.clone(),
            rows: Vec::new(),
            listed: Vec::new(),
        };
        let (mut rows, mut listed): (Vec<Range<u64>>, Vec<Listed>) = (Vec::new(), Vec::new());
        let size = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?.len();
        let progress = Progress::new("list", "bytes", size);
        let subject = format!("`{}`", path.display());
        scan(path, |place, bytes| {
            let number = rows.len();
            progress.advance(place.end - rows.last().map_or(0, |last| last.end));
            let key = content_key(&[bytes]);
            match JsonRow::parse(bytes, options) {
                Ok(entry) if !entry.rated(&options.min_ratings) => {}
                Ok(entry) => listed.push(Listed::new(&subject, number, entry.turns(), key)?),
                Err(JsonProblem::Bad(_)) => listed.push(Listed::new(&subject, number, 1, key)?),
                Err(JsonProblem::Unread(keys)) => return Err(super::keys::unread(file.subject(number), &keys)),
            }
            rows.push(place);
            Ok(())
        })?;
        Ok(JsonFile { rows, listed, ..file })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the list of rows out of the reader.
    pub fn take_listed(&mut self) -> Vec<Listed> {
        std::mem::take(&mut self.listed)
    }

    /// Reads the rows with these indices, in the given order.
    pub fn read(&self, rows: Vec<usize>) -> impl Iterator<Item = Result<SourceRow>> + '_ {
        let file = File::open(&self.path).map_err(|e| Error::io("open", &self.path, e));
        rows.into_iter().map(move |row| {
            let subject = self.subject(row);
            let place = self.rows.get(row).ok_or_else(|| Error::invalid(&subject, "does not exist"))?;
            let file = file.as_ref().map_err(|error| Error::invalid(&subject, error.to_string()))?;
            let length = usize::try_from(place.end - place.start).unwrap_or(usize::MAX);
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, place.start).map_err(|e| Error::io("read", &self.path, e))?;
            let entry = JsonRow::parse(&bytes, &self.options).map_err(|problem| match problem {
                JsonProblem::Bad(problem) => Error::invalid(&subject, problem)
                    .remedy("expected `image` and `conversations` of `from` and `value`, or `messages`"),
                JsonProblem::Unread(keys) => super::keys::unread(&subject, &keys),
            })?;
            self.row(subject, entry)
        })
    }

    fn subject(&self, row: usize) -> String {
        format!("row {row} of `{}`", self.name)
    }

    fn row(&self, subject: String, entry: JsonRow) -> Result<SourceRow> {
        let folder = folder_of(&self.path);
        let subject = match &entry.id {
            Some(id) => format!("{subject} (id `{}`)", shortened(id)),
            None => subject,
        };
        let mut images = Vec::new();
        for name in &entry.images {
            let picture = format!("image `{}` of {subject}", shortened(name));
            let path = contained_path(folder, name).map_err(|error| {
                Error::invalid(&picture, error.without_remedy().to_string())
                    .remedy("keep pictures in the folder of the JSON file and name them relative to it")
            })?;
            images.push(ImageBytes::file(picture, path));
        }
        SourceRow::of_messages(subject.clone(), images, entry.messages)
            .map_err(|problem| Error::invalid(subject, problem).remedy("correct the row, or remove it from the file"))
    }
}
