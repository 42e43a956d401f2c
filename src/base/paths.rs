//! Places of outputs.

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::error::{Error, Result};

/// Checks that an output is outside of the Hugging Face cache, whose files other programs share.
///
/// Errors: `Error::Invalid`; `Error::Io` when the current folder cannot be read.
pub fn refuse_hub_cache(output: &Path) -> Result<()> {
    let place = resolved_path(output)?;
    let is_repository = |folder: &&Path| {
        let name = folder.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("models--")) && folder.join("blobs").is_dir()
    };
    match place.ancestors().find(is_repository) {
        Some(folder) => {
            let problem = format!("is in the Hugging Face cache, in `{}`", folder.display());
            Err(Error::invalid(format!("output `{}`", output.display()), problem).remedy("name a place outside of it"))
        }
        None => Ok(()),
    }
}

/// `path` without links, `.` and `..`, as far as its folders exist; the rest of it is resolved by its text.
///
/// Errors: `Error::Io` when the current folder cannot be read.
pub fn resolved_path(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("read", path, e))?;
    let mut real = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                real.pop();
            }
            part => real.push(part),
        }
        if let Ok(place) = fs::canonicalize(&real) {
            real = place;
        }
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn paths_are_resolved_as_far_as_they_exist() {
        let root = tempfile::tempdir().unwrap();
        let here = fs::canonicalize(root.path()).unwrap();
        fs::create_dir_all(here.join("a/b")).unwrap();
        symlink("a/b", here.join("link")).unwrap();
        for (path, want) in [
            ("a/new", "a/new"),
            ("a/../c/./d", "c/d"),
            ("link/new", "a/b/new"),
            ("link/../new", "a/new"),
            ("none/../a/new", "a/new"),
            ("none/more/../../link/x", "a/b/x"),
        ] {
            assert_eq!(resolved_path(&root.path().join(path)).unwrap(), here.join(want), "{path}");
        }
    }

    #[test]
    fn no_output_lands_in_the_hub_cache() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("models--a--b/blobs")).unwrap();
        fs::create_dir_all(root.path().join("models--mine")).unwrap();
        for inside in ["models--a--b", "models--a--b/snapshots/x/out", "other/../models--a--b/out.json"] {
            let error = refuse_hub_cache(&root.path().join(inside)).unwrap_err().to_string();
            assert!(error.contains("is in the Hugging Face cache"), "{inside}: {error}");
        }
        for outside in ["out", "models--a--c/out", "models--mine/out"] {
            refuse_hub_cache(&root.path().join(outside)).unwrap();
        }
    }
}
