//! Where a file of the cache is from.

use std::fs;
use std::path::{Component, Path};

use super::name::is_commit;

/// Name of the folder in a repository's cache that only this tool reads.
pub(super) const OWN: &str = ".interlace";

/// Repository and commit of a folder in the hub's cache.
fn place(folder: &Path) -> Option<(String, String)> {
    let full = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
    let name = |part: Component| match part {
        Component::Normal(name) => name.to_str().map(str::to_string),
        _ => None,
    };
    let mut parts: Vec<String> = full.components().filter_map(name).collect();
    let commit = parts.pop()?;
    let mut above = parts.pop()?;
    if above != "snapshots" {
        above = parts.pop()?;
        if above != OWN {
            return None;
        }
    }
    let repository = parts.pop()?;
    Some((repository.strip_prefix("models--")?.replacen("--", "/", 1), commit))
}

/// `OWNER/NAME` of the model in a folder of the hub's cache; `None` for other folders.
pub fn name_of(folder: &Path) -> Option<String> {
    Some(place(folder)?.0)
}

/// `hf:OWNER/NAME@COMMIT` of a folder in the hub's cache; `None` for other folders.
pub fn commit_of(folder: &Path) -> Option<String> {
    let (repository, commit) = place(folder)?;
    is_commit(&commit).then(|| format!("hf:{repository}@{commit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_cache_are_named_after_repository_and_commit() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (path, name, full) in [
            (format!("/no/models--org--some--name/snapshots/{commit}"), Some("org/some--name"), true),
            ("/no/models--org--m/snapshots/0abc".to_string(), Some("org/m"), false),
            (format!("/no/models--org--m/.interlace/12ab/{commit}"), Some("org/m"), true),
            (format!("/no/models--org--m/blobs/{commit}"), None, false),
            ("/no/my-model".to_string(), None, false),
            ("/".to_string(), None, false),
        ] {
            let path = Path::new(&path);
            assert_eq!(name_of(path).as_deref(), name, "{}", path.display());
            assert_eq!(commit_of(path), full.then(|| format!("hf:{}@{commit}", name.unwrap())));
        }
    }
}
