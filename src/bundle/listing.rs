//! The files of a model folder.

use std::fs;
use std::path::Path;

use crate::base::{Error, Result};

/// Largest depth of component files below the folder.
const MAX_DEPTH: usize = 8;
/// Folders that tools leave in a model folder and that hold no part of the model. Hidden folders (version control,
/// download caches) are ignored as well.
const LEFT_OUT: &[&str] = &["__pycache__", "__MACOSX"];

/// True for a folder, by its name, that holds no part of a model.
pub(super) fn is_left_out(name: &str) -> bool {
    name.starts_with('.') || LEFT_OUT.contains(&name)
}

/// Paths below a folder, sorted, with `/` as the separator.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub files: Vec<String>,
    /// Ignored folders, with a `/` at the end. Their content is not listed.
    pub left_out: Vec<String>,
    /// True for files on the hub, which need not be on this disk.
    pub remote: bool,
}

impl Listing {
    pub fn has(&self, path: &str) -> bool {
        self.files.iter().any(|file| file == path)
    }

    pub fn any(&self, test: impl Fn(&str) -> bool) -> bool {
        self.files.iter().any(|file| test(file))
    }

    /// The files of a model on the hub.
    pub fn on_hub<'a>(files: impl Iterator<Item = &'a str>) -> Self {
        let hidden = |path: &&str| path.split('/').rev().skip(1).any(|folder| folder.starts_with('.'));
        let files = files.filter(|path| !hidden(path)).map(str::to_string).collect();
        Listing { files, left_out: Vec::new(), remote: true }
    }

    /// Lists the regular files of a folder.
    ///
    /// Errors: `Error::Io` when a folder cannot be read; `Error::Invalid` for names that are not UTF-8, links to
    /// folders, folders that are too deep, and entries that are neither a file nor a folder.
    pub fn read(root: &Path) -> Result<Self> {
        let mut listing = Listing::default();
        let mut folders = vec![(root.to_path_buf(), String::new(), 0)];
        while let Some((folder, prefix, depth)) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|e| Error::io("read", &folder, e))? {
                let entry = entry.map_err(|e| Error::io("read", &folder, e))?;
                let path = entry.path();
                let name = entry.file_name().into_string().map_err(|name| {
                    Error::invalid(format!("`{}`", folder.display()), format!("file name {name:?} is not UTF-8"))
                        .remedy("rename the file, or move it out of the folder")
                })?;
                let relative = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
                let metadata = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?;
                if metadata.is_file() {
                    listing.files.push(relative);
                } else if metadata.is_dir() {
                    if is_left_out(&name) {
                        listing.left_out.push(format!("{relative}/"));
                        continue;
                    }
                    let link = fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_symlink());
                    if link || depth >= MAX_DEPTH {
                        let problem =
                            if link { "is a link to a folder" } else { "is nested too deep for a model folder" };
                        return Err(Error::invalid(format!("`{}`", path.display()), problem)
                            .remedy("give the folder that holds the model's own files"));
                    }
                    folders.push((path, relative, depth + 1));
                } else {
                    return Err(Error::invalid(format!("`{}`", path.display()), "is neither a file nor a folder")
                        .remedy("move it out of the folder"));
                }
            }
        }
        listing.files.sort();
        listing.left_out.sort();
        Ok(listing)
    }
}
