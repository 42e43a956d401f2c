//! The files of a data set: one file, the files of a folder, or the matches of a pattern.

use std::path::{Path, PathBuf};

use crate::base::{Error, Result};

/// A file and its name in the data set.
#[derive(Debug)]
pub(super) struct DataFile {
    pub path: PathBuf,
    /// Path relative to the folder that contains all files; unique in the data set.
    pub name: String,
}

/// File extensions of each kind. A folder may hold files of only one of these kinds; other files in it are ignored.
const KINDS: &[&[&str]] = &[&["parquet"], &["json", "jsonl"], &["safetensors", "npz"]];

/// The files at `path` (a file, a folder or a glob pattern), sorted by name.
///
/// Errors: `Error::Io`; `Error::Invalid` when there is no file, a file has an unknown extension, or a folder holds
/// files of two kinds.
pub(super) fn data_files(path: &Path) -> Result<Vec<DataFile>> {
    let pattern = path.to_str().filter(|text| text.contains(['*', '?', '[']) && !path.exists());
    let paths = match pattern {
        Some(pattern) => matching(pattern)?,
        None => {
            let metadata = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
            if metadata.is_dir() { in_folder(path)? } else { vec![path.to_path_buf()] }
        }
    };
    for file in &paths {
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if !KINDS.concat().contains(&extension) {
            return Err(Error::invalid(format!("data `{}`", file.display()), "is not a known data set").remedy(
                "expected a .parquet, .json or .jsonl file, .safetensors or .npz for ready tensors, a folder of them, or a \
                 pattern such as `data/*.parquet`",
            ));
        }
    }
    let folder = common_folder(&paths);
    let name = |path: &PathBuf| path.strip_prefix(&folder).unwrap_or(path).to_string_lossy().into_owned();
    let mut files: Vec<DataFile> = paths.iter().map(|path| DataFile { path: path.clone(), name: name(path) }).collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn matching(pattern: &str) -> Result<Vec<PathBuf>> {
    let subject = || format!("data `{pattern}`");
    let found = glob::glob(pattern).map_err(|e| {
        Error::invalid(subject(), format!("is not a valid pattern: {e}"))
            .remedy("escape `*`, `?` and `[` of a plain path as `[*]`, `[?]` and `[[]`")
    })?;
    let mut paths = Vec::new();
    for path in found {
        let path = path.map_err(|e| {
            let path = e.path().to_path_buf();
            Error::io("read", path, e.into())
        })?;
        if path.is_file() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(Error::invalid(subject(), "matches no file")
            .remedy("correct the pattern; it is relative to the working folder"));
    }
    Ok(paths)
}

/// The data files directly in a folder, all of one kind.
fn in_folder(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| Error::io("read", path, e))? {
        files.push(entry.map_err(|e| Error::io("read", path, e))?.path());
    }
    let having = |extensions: &&[&str]| -> Vec<PathBuf> {
        let has = |file: &&PathBuf| file.extension().is_some_and(|own| extensions.iter().any(|name| own == *name));
        files.iter().filter(has).cloned().collect()
    };
    let mut found: Vec<(String, Vec<PathBuf>)> =
        KINDS.iter().map(|kind| (format!(".{}", kind.join(" or .")), having(kind))).collect();
    found.retain(|(_, files)| !files.is_empty());
    let subject = || format!("data `{}`", path.display());
    match &mut found[..] {
        [(_, files)] => Ok(std::mem::take(files)),
        [] => Err(Error::invalid(subject(), "is a folder without .parquet, .json, .jsonl, .safetensors or .npz files")
            .remedy(format!("for files in folders below it give a pattern, such as `{}/*/*.parquet`", path.display()))),
        [(first, _), (second, _), ..] => {
            Err(Error::invalid(subject(), format!("is a folder of {first} and of {second} files"))
                .remedy(format!("say which to read by a pattern, such as `{}/*.parquet`", path.display())))
        }
    }
}

/// The deepest folder that contains all files.
fn common_folder(paths: &[PathBuf]) -> PathBuf {
    let mut folder = paths.first().and_then(|path| path.parent()).map(Path::to_path_buf).unwrap_or_default();
    while !paths.iter().all(|path| path.starts_with(&folder)) {
        if !folder.pop() {
            break;
        }
    }
    folder
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_files_are_named_relative_to_their_common_folder() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["b/x.parquet", "a/x.parquet", "a/notes.txt", "one.json", "both/x.parquet", "both/y.jsonl"] {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let names = |path: &str| -> Vec<String> {
            data_files(&folder.path().join(path)).unwrap().into_iter().map(|file| file.name).collect()
        };
        assert_eq!(names("[ab]/*.parquet"), ["a/x.parquet", "b/x.parquet"]);
        assert_eq!(names("a"), ["x.parquet"]);
        assert_eq!(names("b/x.parquet"), ["x.parquet"]);
        assert_eq!(names("."), ["one.json"]);
        for (path, want) in [
            ("a/*.json", "matches no file"),
            ("a/*.txt", "is not a known data set"),
            ("both", "of .parquet and of .json"),
            ("none", "cannot open"),
        ] {
            let error = data_files(&folder.path().join(path)).unwrap_err().to_string();
            assert!(error.contains(want), "{path}: {error}");
        }
        std::fs::create_dir(folder.path().join("empty")).unwrap();
        let error = data_files(&folder.path().join("empty")).unwrap_err().to_string();
        assert!(error.contains("without .parquet") && error.contains("give a pattern"), "{error}");
    }
}
