//! Names of models on the hub.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result};

/// What a model's name on the hub begins with.
const PREFIX: &str = "hf:";
/// The revision without `@REVISION`.
const MAIN: &str = "main";
/// The hub's limit on the length of owner and name.
const MAX_NAME: usize = 96;
/// Limit on the length of a revision.
const MAX_REVISION: usize = 200;

/// `hf:OWNER/NAME[@REVISION]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    owner: String,
    name: String,
    revision: Option<String>,
}

impl HubName {
    /// True for paths that are names on the hub, whether they are right or not. A file or folder with such a name is `./hf:...`.
    pub fn is_one(path: &Path) -> bool {
        path.to_str().is_some_and(|text| text.starts_with(PREFIX))
    }

    /// The name that a path is; `None` for other paths.
    ///
    /// Errors: `Error::Invalid` for a name that the hub does not allow.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        let Some(rest) = path.to_str().and_then(|text| text.strip_prefix(PREFIX)) else { return Ok(None) };
        let invalid = |problem: &str| {
            Error::invalid(format!("model `{PREFIX}{rest}`"), problem.to_string())
                .remedy("expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION; a folder of that name is ./hf:..")
        };
        let (repository, revision) = match rest.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (rest, None),
        };
        let (owner, name) = repository.split_once('/').ok_or_else(|| invalid("names no owner"))?;
        if !is_plain(owner) || !is_plain(name) || name.ends_with(".git") {
            return Err(invalid(
                "owner and name are letters, digits, `-`, `_` and `.`, without `--` and `..`, and neither begin nor end \
                 with `-` or `.`",
            ));
        }
        if revision.is_some_and(|revision| !is_revision(revision)) {
            return Err(invalid("its revision is no name of a branch, a tag or a commit"));
        }
        let (owner, name) = (owner.to_string(), name.to_string());
        Ok(Some(HubName { owner, name, revision: revision.map(str::to_string) }))
    }

    /// A path of the command line or a recipe: relative to `folder` unless it is a name on the hub.
    pub fn or_in(folder: &Path, path: &Path) -> PathBuf {
        if Self::is_one(path) { path.to_path_buf() } else { folder.join(path) }
    }

    /// `OWNER/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// Name of the repository's folder in the cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}--{}", self.owner, self.name)
    }

    /// Branch, tag or commit; `main` where none was given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.repository())?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// True for an owner's or a model's name that the hub allows.
///
/// Source: `huggingface_hub.utils.validate_repo_id`.
fn is_plain(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let end = |c: char| matches!(c, '-' | '.');
    (1..=MAX_NAME).contains(&name.len())
        && name.chars().all(allowed)
        && !name.starts_with(end)
        && !name.ends_with(end)
        && !name.contains("--")
        && !name.contains("..")
}

/// True for names that Git allows for branches and tags and that are safe as a path.
fn is_revision(revision: &str) -> bool {
    let strange = |c: char| c.is_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\');
    (1..=MAX_REVISION).contains(&revision.len())
        && !revision.contains(strange)
        && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains(".."))
}

/// True for a commit: 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// True for `digits` lower-case hexadecimal digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_hub_are_parsed_strictly() {
        let of = |text: &str| HubName::of(Path::new(text));
        for (text, repository, revision) in [
            ("hf:org/Some-Model_1.5", "org/Some-Model_1.5", "main"),
            ("hf:org/m@v1.0", "org/m", "v1.0"),
            ("hf:org/m@refs/pr/1", "org/m", "refs/pr/1"),
        ] {
            let name = of(text).unwrap().unwrap();
            assert_eq!((name.repository().as_str(), name.revision()), (repository, revision));
            assert_eq!(name.to_string(), text);
        }
        for path in ["model/", "./hf:a/b", "/hf:a/b", ""] {
            assert_eq!(of(path).unwrap(), None, "{path}");
        }
        for bad in [
            "hf:",
            "hf:gpt2",
            "hf:../x",
            "hf:a/..",
            "hf:a/b/c",
            "hf:/a",
            "hf:a/",
            "hf:a/b--c",
            "hf:-a/b",
            "hf:a/b.",
            "hf:a/b.git",
            "hf:a b/c",
            "hf:a\\b/c",
            "hf:a/b@",
            "hf:a/b@../../x",
            "hf:a/b@x/../y",
            "hf:a/b@/x",
            "hf:a/b@x\n",
            "hf:a/b@.x",
            "hf:a/%2e%2e",
        ] {
            let error = of(bad).expect_err(bad).to_string();
            assert!(error.contains("expected hf:OWNER/NAME"), "{bad}: {error}");
        }
    }
}
