//! The files of one commit of a model.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::name::{is_commit, is_hex};

/// Limit on the number of files of a model.
const MAX_FILES: usize = 100_000;
/// Limit on the length of a file's path in bytes.
const MAX_PATH: usize = 1024;
/// Limit on the size of a file in bytes.
const MAX_SIZE: u64 = 1 << 50;

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HubFile {
    /// Path below the model, with `/`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Name in the cache: SHA-256 of a large file, Git's object id (SHA-1) of another.
    pub id: String,
}

/// The files of one commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tree {
    /// The commit.
    pub commit: String,
    /// Its files, sorted by path.
    pub files: Vec<HubFile>,
}

/// True for a path that stays below its folder and that no tool reads in another way.
pub(super) fn is_safe(path: &str) -> bool {
    path.len() <= MAX_PATH
        && !path.contains(|c: char| c.is_control() || c == '\\')
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

impl Tree {
    /// Reads the hub's answer about a model with the details of its files. The answer is not trusted.
    ///
    /// Errors: a text on what is wrong with it.
    pub fn from_answer(answer: &Value) -> Result<Self, String> {
        let commit = answer.get("sha").and_then(Value::as_str).unwrap_or_default().to_string();
        let listed = answer.get("siblings").and_then(Value::as_array).ok_or("has no list of files")?;
        let mut files = Vec::new();
        for entry in listed {
            let path =
                entry.get("rfilename").and_then(Value::as_str).ok_or("names a file by something that is no text")?;
            let large = entry.get("lfs").filter(|large| !large.is_null());
            let id = match large {
                Some(large) => large.get("sha256"),
                None => entry.get("blobId"),
            };
            let size = large.and_then(|large| large.get("size")).or_else(|| entry.get("size")).and_then(Value::as_u64);
            let id = id.and_then(Value::as_str);
            let (Some(size), Some(id)) = (size, id) else {
                return Err(format!("gives no size or digest of `{}`", path.escape_debug()));
            };
            files.push(HubFile { path: path.to_string(), size, id: id.to_string() });
        }
        let mut tree = Tree { commit, files };
        tree.files.sort_by(|a, b| a.path.cmp(&b.path));
        tree.check()?;
        Ok(tree)
    }

    /// Checks a list, which a server or another program wrote.
    ///
    /// Errors: a text on what is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if !is_commit(&self.commit) {
            return Err(format!("names the commit `{}`, expected 40 hexadecimal digits", self.commit.escape_debug()));
        }
        if self.files.len() > MAX_FILES {
            return Err(format!("lists {} files, more than {MAX_FILES}", self.files.len()));
        }
        let mut seen = BTreeSet::new();
        for file in &self.files {
            let shown = file.path.escape_debug();
            if !is_safe(&file.path) {
                return Err(format!("lists a file `{shown}`, whose path is not one inside of the model"));
            }
            if !is_hex(&file.id, 64) && !is_hex(&file.id, 40) {
                return Err(format!("lists `{shown}` with the digest `{}`", file.id.escape_debug()));
            }
            if file.size > MAX_SIZE || !seen.insert(&file.path) {
                return Err(format!("lists `{shown}` twice, or with a size that no file has"));
            }
        }
        Ok(())
    }

    /// The file at a path.
    pub fn file(&self, path: &str) -> Option<&HubFile> {
        self.files.iter().find(|file| file.path == path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_that_are_not_a_list_of_a_models_files_are_refused() {
        let (commit, id) = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef");
        let one = |path: &str, size: u64, id: &str| json!({"rfilename": path, "size": size, "blobId": id});
        let large =
            json!({"rfilename": "onnx/a.onnx", "size": 3, "blobId": id, "lfs": {"sha256": "a".repeat(64), "size": 7}});
        let tree = Tree::from_answer(&json!({"sha": commit, "siblings": [one("z.json", 2, id), large]})).unwrap();
        assert_eq!((tree.files[0].size, tree.files[0].id.len(), tree.files[1].path.as_str()), (7, 64, "z.json"));
        for (files, sha, want) in [
            (json!([one("../x", 1, id)]), commit, "not one inside"),
            (json!([one("/etc/passwd", 1, id)]), commit, "not one inside"),
            (json!([one("a//b", 1, id)]), commit, "not one inside"),
            (json!([one("a\\b", 1, id)]), commit, "not one inside"),
            (json!([one("a\u{0}", 1, id)]), commit, "not one inside"),
            (json!([one("a", 1, "../../x")]), commit, "with the digest"),
            (json!([one("a", 1, id), one("a", 1, id)]), commit, "twice"),
            (json!([one("a", u64::MAX, id)]), commit, "size that no file has"),
            (json!([{"rfilename": "a"}]), commit, "no size or digest"),
            (json!([{"rfilename": 3}]), commit, "no text"),
            (json!({}), commit, "no list"),
            (json!([]), "../x", "expected 40"),
        ] {
            let error = Tree::from_answer(&json!({"sha": sha, "siblings": files})).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}
